package watchpoller

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/backend"
)

// ErrClosed is returned by Serve when the poller is closed.
var ErrClosed = errors.New("watch: the server is shutting down")

// Options of a Poller. The zero value serves.
type Options struct {
	// Header returns the cluster id, member id and raft term that each response bears; the revision is filled in
	// here. The message is not changed. It is called once per response, outside of all locks. nil: none of them.
	Header func() *pb.ResponseHeader

	// Permit says whether the client of ctx may watch what req names: empty for yes, else the cancel_reason it is
	// answered with. nil: everybody may watch everything. It may block that one client's requests.
	Permit func(ctx context.Context, req *pb.WatchCreateRequest) (reason string)

	// ProgressInterval is how often a watcher with progress_notify hears of the revision when nothing else was sent
	// to it. As in etcd each stream adds up to a tenth, 100 ms is the least, and 0 means ten minutes.
	ProgressInterval time.Duration

	// MaxResponseBytes is the size from which a response is fragmented, for watchers that ask for it.
	// 0: 2 MiB, which is etcd's request limit of 1.5 MiB and its 512 KiB for gRPC.
	MaxResponseBytes int

	// StreamBytes bounds the events that wait for one client, in bytes; a single revision that is larger may go
	// beyond it. A watcher whose client is that far behind reads history again when there is room. 0: 4 MiB.
	StreamBytes int

	// PollInterval is the period of looking for new rows without having been told. 0: never, the Source's
	// Subscribe is enough when all writes go through this process.
	PollInterval time.Duration

	Hooks Hooks
}

// Hooks report to the outside. Any may be nil; none may block, and none may call the Poller. n may be negative.
type Hooks struct {
	Streams       func(n int) // clients connected
	Watchers      func(n int) // watchers that get events
	SlowWatchers  func(n int) // watchers that read history, because they began in the past or are slow
	PendingEvents func(n int) // events queued for clients
	EventsSent    func(n int) // only grows
	// Sent: a response went out, which took that long, the flow control of its client included.
	Sent       func(events int, kind SentKind, took time.Duration)
	ReadFailed func(err error) // the source could not be read; it is tried again
}

// SentKind is what a response of a watch stream carries.
type SentKind int

const (
	SentEvents   SentKind = iota
	SentProgress          // a notification that there is nothing new
	SentControl           // the answer to a request of the client, or the end of a watcher
)

func count(f func(int), n int) {
	if f != nil && n != 0 {
		f(n)
	}
}

func (h *Hooks) readFailed(err error) {
	if h.ReadFailed != nil {
		h.ReadFailed(err)
	}
}

const (
	defaultProgressInterval = 10 * time.Minute
	minProgressInterval     = 100 * time.Millisecond
	defaultMaxResponseBytes = 1536<<10 + 512<<10
	defaultStreamBytes      = 4 << 20

	// What one read of new rows brings at most, so that the lock is never held for long.
	followEvents = 1024
	followBytes  = 1 << 20
)

// A Poller turns committed rows into watch events. Make one with Start.
//
// Two goroutines read rows: follow, new ones for the watchers that have seen everything (synced), and catchUp, old
// ones for the watchers that have not (lagging). Where there is little to read, who commits does follow's work (direct).
// See DESIGN.md.
//
// Lock order: Poller.mu, then stream.mu.
type Poller struct {
	src         Source
	o           Options
	ctx         context.Context
	cancel      context.CancelFunc
	unsubscribe func()
	wg          sync.WaitGroup

	wake    bell         // there may be new rows
	room    bell         // a lagging watcher may have become able to go on
	watches atomic.Int64 // synced and lagging watchers; 0: nobody cares for new rows

	mu struct {
		sync.Mutex
		closed bool
		// next is the first revision that the synced watchers have not been given.
		// Invariant: next <= Source.Revision()+1; every event before next that a synced watcher must get is in its
		// stream's queue or was sent.
		next   int64
		synced *group
		// Invariant: from revision watcher.next on, nothing was queued for a lagging watcher; before, everything.
		lagging map[*watcher]struct{}
		streams map[*stream]struct{}
		asking  map[*stream]struct{} // streams with an unanswered progress request
	}

	scratch delivery   // of distribute, guarded by mu
	matched []*watcher // likewise
	scan    scan       // of catchUp
}

// Start begins to follow src. Close ends it.
func Start(src Source, o Options) *Poller {
	if o.Header == nil {
		o.Header = func() *pb.ResponseHeader { return nil }
	}
	if o.ProgressInterval <= 0 {
		o.ProgressInterval = defaultProgressInterval
	}
	o.ProgressInterval = max(o.ProgressInterval, minProgressInterval)
	if o.MaxResponseBytes <= 0 {
		o.MaxResponseBytes = defaultMaxResponseBytes
	}
	if o.StreamBytes <= 0 {
		o.StreamBytes = defaultStreamBytes
	}
	p := &Poller{src: src, o: o, wake: newBell(), room: newBell()}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.mu.synced = newGroup()
	p.mu.lagging = make(map[*watcher]struct{})
	p.mu.streams = make(map[*stream]struct{})
	p.mu.asking = make(map[*stream]struct{})
	p.mu.next = src.Revision() + 1
	p.unsubscribe = src.Subscribe(p.told)
	p.wg.Add(2)
	go p.follow()
	go p.catchUp()
	return p
}

// Close ends all streams, whose Serve returns ErrClosed, and waits for every goroutine of the poller. It must come
// before the source is closed. Serve's recv must return once Serve has returned; Close waits for that too.
func (p *Poller) Close() {
	p.mu.Lock()
	p.mu.closed = true
	p.mu.Unlock()
	p.cancel()
	p.unsubscribe()
	p.wg.Wait()
}

// directWork bounds what told does itself, in new events times synced watchers: some tenths of a millisecond in which
// nobody is answered and nothing is committed.
const directWork = 2 << 10

// told is called by whoever has committed revisions up to rev, before their writers are answered. If there is little to
// do it queues the events at once, which spares the way over follow: an event is often there before its writer's answer.
func (p *Poller) told(rev int64) {
	// A watcher counts before it reads the revision it starts from: if it is missed here, it starts behind us.
	if p.watches.Load() > 0 && !p.direct(rev) {
		p.wake.ring()
	}
}

// direct is a short advance; false when follow has to do it.
func (p *Poller) direct(rev int64) bool {
	if !p.mu.TryLock() {
		return false
	}
	defer p.mu.Unlock()
	from := p.mu.next
	if p.mu.synced.empty() || from > rev || (rev-from+1)*int64(p.mu.synced.size) > directWork {
		return false
	}
	key, end := everything.request()
	res, ok := p.src.Recent(backend.HistoryRequest{
		From: from, Key: key, RangeEnd: end, MaxEvents: followEvents, MaxBytes: followBytes,
	})
	if !ok || res.Next <= from || len(res.Events)*p.mu.synced.size > directWork {
		return false // a revision may have any number of events
	}
	return !p.given(res)
}

// given queues what was read for the synced watchers, and reports whether there was more. REQUIRES: p.mu; the read began
// at p.mu.next.
func (p *Poller) given(res backend.HistoryResult) (more bool) {
	p.distribute(res.Events)
	p.mu.next = res.Next
	p.answerAsking()
	return res.Next <= res.Head
}

var everything = keyRange{key: []byte{0}, end: []byte{}}

// advance reads the next new rows once for all synced watchers and queues them. It reports whether there may be more.
func (p *Poller) advance() (more bool, err error) {
	p.mu.Lock()
	if p.mu.synced.empty() {
		p.skipUnwatched()
		p.answerAsking()
		p.mu.Unlock()
		return false, nil
	}
	from := p.mu.next
	p.mu.Unlock()

	if p.src.Revision() < from {
		return false, nil
	}
	key, end := everything.request()
	res, err := p.src.History(p.ctx, backend.HistoryRequest{
		From: from, Key: key, RangeEnd: end, MaxEvents: followEvents, MaxBytes: followBytes,
	})
	var compacted *backend.CompactedError
	if err != nil && !errors.As(err, &compacted) {
		return false, fmt.Errorf("read the rows from revision %d on: %w", from, err)
	}

	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.next != from {
		return true, nil // moved meanwhile: what was read is nobody's (nobody was synced), or was given already (direct)
	}
	if compacted != nil {
		if compacted.CompactRevision <= from {
			return false, fmt.Errorf("read the rows from revision %d on: %w", from, err)
		}
		p.overtaken(compacted.CompactRevision)
		return true, nil
	}
	if res.Next <= from {
		return false, fmt.Errorf("read the rows from revision %d on: there are none, but the store is at %d",
			from, p.src.Revision())
	}
	return p.given(res), nil
}

// skipUnwatched moves past rows that no synced watcher waits for. REQUIRES: p.mu; synced is empty.
func (p *Poller) skipUnwatched() { p.mu.next = max(p.mu.next, p.src.Revision()+1) }

// distribute queues new events for the synced watchers. A watcher whose stream is full lags from there on.
// REQUIRES: p.mu.
func (p *Poller) distribute(events []backend.Event) {
	d := &p.scratch
	d.begin((*stream).liveRoom)
	var each slab
	for i := range events {
		p.matched = p.mu.synced.match(p.matched[:0], events[i].Key)
		var ev *event
		for _, w := range p.matched {
			if !w.wants(&events[i]) {
				continue
			}
			if ev == nil {
				ev = each.encode(events[i])
			}
			d.add(w, ev)
		}
	}
	clear(p.matched)
	d.flush(0)
	for _, w := range d.touched {
		if w.missed != 0 {
			p.mu.synced.remove(w)
			w.next = w.missed
			p.lag(w)
		}
	}
	d.end()
}

// overtaken handles that the rows from p.mu.next on were compacted before they were read. Watchers that needed them
// lag, and catchUp will tell them that they are too late. REQUIRES: p.mu.
func (p *Poller) overtaken(compactRev int64) {
	for s := range p.mu.streams {
		for _, w := range s.watchers {
			if w.state != synced {
				continue
			}
			if w.next = max(w.next, p.mu.next); w.next < compactRev {
				p.mu.synced.remove(w)
				p.lag(w)
			}
		}
	}
	p.mu.next = compactRev
	p.answerAsking()
}

// lag makes w read history from w.next on. REQUIRES: p.mu; w is in no group.
func (p *Poller) lag(w *watcher) {
	w.state = lagging
	p.mu.lagging[w] = struct{}{}
	w.s.lagging.Add(1)
	count(p.o.Hooks.SlowWatchers, 1)
	p.room.ring()
}

// unlag takes w out of the lagging watchers. REQUIRES: p.mu; w is lagging.
func (p *Poller) unlag(w *watcher) {
	delete(p.mu.lagging, w)
	w.s.lagging.Add(-1)
	count(p.o.Hooks.SlowWatchers, -1)
}

// drop takes w out of whatever holds it; no event will be queued for it. REQUIRES: p.mu.
func (p *Poller) drop(w *watcher, as state) {
	switch w.state {
	case synced:
		p.mu.synced.remove(w)
	case lagging:
		p.unlag(w)
	default:
		w.state = as
		return
	}
	w.state = as
	p.watches.Add(-1)
	count(p.o.Hooks.Watchers, -1)
}

// cancelCompacted tells the client that w comes too late. As in etcd the id stays taken until the client cancels it,
// and the header bears no revision. REQUIRES: p.mu; w is lagging.
func (p *Poller) cancelCompacted(w *watcher, compactRev int64) {
	p.drop(w, dead)
	w.s.control(nil, &pb.WatchResponse{
		Header: &pb.ResponseHeader{}, WatchId: w.id, Canceled: true, CompactRevision: compactRev,
	})
}
