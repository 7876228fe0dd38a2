package watchpoller

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/quire-db/quire/backend"
)

const (
	// What one read of history brings at most; and how many events times watchers it may come to, which keeps a
	// round with a thousand watchers as short as a round with one.
	catchUpEvents  = 4096
	catchUpBytes   = 1 << 20 // less when no stream has that much room
	minScanBytes   = 4 << 10
	catchUpMatches = 256 << 10
	minScanEvents  = 64

	// catchUpWindow is how many revisions lagging watchers may be apart to be served by one read.
	catchUpWindow = 4096
)

// A scan is the state of catchUp: the watchers it serves together, with their index.
type scan struct {
	round    uint64
	picks    []*watcher
	group    *group // of the watchers in members
	members  map[*watcher]struct{}
	matched  []*watcher
	delivery delivery
}

// catchUp reads history for the lagging watchers, as long as the poller lives. Watchers at about the same revision
// share one read, whatever streams they are on; those far apart take turns.
func (p *Poller) catchUp() {
	defer p.wg.Done()
	var again retry
	yield := yielding{rev: p.src.Revision(), at: time.Now(), most: maxRest}
	for {
		start := time.Now()
		more, gained, err := p.catchUpOnce()
		switch {
		case p.ctx.Err() != nil:
			return
		case err != nil:
			p.o.Hooks.readFailed(err)
			if !again.wait(p.ctx) {
				return
			}
			continue
		}
		again.succeeded()
		if more {
			yield.after(p.ctx, start, p.src.Revision(), gained)
			continue
		}
		p.scan.forget()
		select {
		case <-p.room:
		case <-p.ctx.Done():
			return
		}
	}
}

// Reading history gives way to writing: after a round the reader rests for a multiple of the round, by the rate at
// which revisions are written. Sending what a round brings costs several times the round itself; beside writers that
// never stop, this keeps their p99 within twice its quiet value on two cores (docs/performance.md). It rests less when
// what it gains is not clearly more than what is written, and not at all when it has read to the end: else it might never
// arrive.
const (
	restPerRate = 4                      // rounds of rest for each revision a millisecond
	maxRest     = 16                     // rounds
	maxRestTime = 100 * time.Millisecond // for a round that storage held up
)

// A yielding is what catchUp knows of the writes beside it.
type yielding struct {
	rev  int64
	at   time.Time
	most float64 // rounds that it may rest at present
}

// after rests after a round that began at start and came so many revisions further; 0: to the end.
func (y *yielding) after(ctx context.Context, start time.Time, rev, gained int64) {
	now := time.Now()
	written := rev - y.rev
	rate := float64(written) / max(1, float64(now.Sub(y.at))/float64(time.Millisecond))
	y.rev, y.at = rev, now
	if gained == 0 {
		return
	}
	if gained < written+written/4 {
		y.most /= 2
	} else {
		y.most = min(max(2*y.most, 1), maxRest)
	}
	rest := min(time.Duration(min(restPerRate*rate, y.most)*float64(now.Sub(start))), maxRestTime)
	if rest <= 0 {
		return
	}
	t := time.NewTimer(rest)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// catchUpOnce reads one piece of history. It reports whether a lagging watcher could take more, and how many revisions
// it came further; 0 when it came to the end.
func (p *Poller) catchUpOnce() (more bool, gained int64, err error) {
	sc := &p.scan
	from, ok := p.pick()
	if !ok {
		return false, 0, nil
	}
	g := sc.index()
	hull := sc.picks[0].rng
	for _, w := range sc.picks[1:] {
		hull = hull.hull(w.rng)
	}
	room := minScanBytes
	for _, w := range sc.picks {
		room = max(room, w.s.historyRoom())
	}
	key, end := hull.request()
	res, err := p.src.History(p.ctx, backend.HistoryRequest{
		From: from, Key: key, RangeEnd: end, MaxBytes: min(room, catchUpBytes),
		MaxEvents: max(minScanEvents, min(catchUpEvents, catchUpMatches/len(sc.picks))),
	})
	var compacted *backend.CompactedError
	switch {
	case errors.As(err, &compacted):
		if compacted.CompactRevision <= from {
			return false, 0, fmt.Errorf("read history from revision %d on: %w", from, err)
		}
		p.cancelOvertaken(compacted.CompactRevision)
		return true, 0, nil
	case err != nil:
		return false, 0, fmt.Errorf("read history from revision %d on: %w", from, err)
	case res.Next <= from && from <= res.Head:
		return false, 0, fmt.Errorf("read history from revision %d on: there is none, but the store is at %d", from, res.Head)
	}

	d := &sc.delivery
	d.begin((*stream).historyRoom)
	var encoder slab
	if len(sc.picks) == 1 {
		encoder.size = slabSize // all neighbours go to the same client
	}
	for i := range res.Events {
		sc.matched = g.match(sc.matched[:0], res.Events[i].Key)
		var ev *event
		for _, w := range sc.matched {
			if !w.wants(&res.Events[i]) {
				continue
			}
			if ev == nil {
				ev = encoder.encode(res.Events[i])
			}
			d.add(w, ev)
		}
	}
	clear(sc.matched)
	d.flush(res.Head)
	p.handOver(res)
	if res.Next > res.Head {
		return true, 0, nil
	}
	return true, res.Next - from, nil
}

// pick chooses the lagging watchers of the next round, and the revision to read from. The one that has waited
// longest is among them; with it come those that are near, so that they go on together.
func (p *Poller) pick() (from int64, ok bool) {
	sc := &p.scan
	p.mu.Lock()
	defer p.mu.Unlock()
	compactRev := p.src.CompactRevision()
	clear(sc.picks)
	sc.picks = sc.picks[:0]
	var lead *watcher
	for w := range p.mu.lagging {
		if !w.s.hasRoom() {
			continue // its sender rings when there is
		}
		if w.next < compactRev {
			p.cancelCompacted(w, compactRev)
			continue
		}
		sc.picks = append(sc.picks, w)
		if lead == nil || w.served < lead.served || w.served == lead.served && w.next < lead.next {
			lead = w
		}
	}
	p.answerAsking() // of streams whose lagging watchers were just canceled
	if lead == nil {
		return 0, false
	}
	from = lead.next
	for _, w := range sc.picks {
		if w.next < from && w.next >= lead.next-catchUpWindow {
			from = w.next
		}
	}
	sc.round++
	n := 0
	for _, w := range sc.picks {
		if w.next >= from && w.next <= lead.next+catchUpWindow {
			w.served = sc.round
			sc.picks[n] = w
			n++
		}
	}
	clear(sc.picks[n:])
	sc.picks = sc.picks[:n]
	return from, true
}

// index returns a group of the picks; the one of the round before, if they are the same.
func (sc *scan) index() *group {
	same := sc.group != nil && len(sc.members) == len(sc.picks)
	for i := 0; same && i < len(sc.picks); i++ {
		_, same = sc.members[sc.picks[i]]
	}
	if same {
		return sc.group
	}
	sc.group, sc.members = newGroup(), make(map[*watcher]struct{}, len(sc.picks))
	for _, w := range sc.picks {
		sc.group.add(w)
		sc.members[w] = struct{}{}
	}
	return sc.group
}

// forget lets go of watchers while there is nothing to do.
func (sc *scan) forget() {
	clear(sc.picks)
	sc.picks, sc.group, sc.members = sc.picks[:0], nil, nil
}

// cancelOvertaken cancels the picks that compaction has overtaken.
func (p *Poller) cancelOvertaken(compactRev int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, w := range p.scan.picks {
		if w.state == lagging && w.next < compactRev {
			p.cancelCompacted(w, compactRev)
		}
	}
	p.answerAsking()
}

// handOver notes how far the picks have come after a read, and makes those synced that have seen all that the synced
// watchers have been given. From then on follow serves them: it and this work under one lock, so that no revision is
// given twice or by nobody.
func (p *Poller) handOver(res backend.HistoryResult) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, w := range p.scan.picks {
		if w.state != lagging {
			continue // canceled meanwhile
		}
		if w.missed != 0 {
			w.next = w.missed
			continue
		}
		w.next = max(w.next, res.Next)
		if p.mu.synced.empty() && w.next > res.Head {
			// Nobody else depends on where follow stands. Without this a watcher could chase it for long.
			p.mu.next = w.next
		}
		if w.next >= p.mu.next {
			p.unlag(w)
			w.state = synced
			p.mu.synced.add(w)
		}
	}
	p.scan.delivery.end() // before the lock is given up: follow may own some of the watchers now
	p.answerAsking()
	p.wake.ring() // follow may have skipped, or stand before rows that it has been told of
}
