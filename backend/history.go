package backend

import (
	"context"
	"sort"
	"sync"

	"go.etcd.io/etcd/api/v3/mvccpb"
)

// Event is one committed row as a watcher sees it. Its bytes are shared and must not be changed.
type Event struct {
	Rev  int64 // main revision
	Type mvccpb.Event_EventType
	Key  []byte
	KV   Frame // a DELETE has key and mod_revision only, as in etcd

	born bool // a PUT of a key that did not exist
}

// HistoryRequest asks for the events of whole revisions, From included, whose keys lie in
// [Key, RangeEnd): no RangeEnd is the one key, "\x00" every key from Key on; so "\x00","\x00" is everything.
type HistoryRequest struct {
	From          int64
	Key, RangeEnd []byte
	// The answer ends with the revision in which one of these was reached. 0: a default.
	MaxEvents, MaxBytes int
}

const (
	defaultHistoryEvents = 1024
	defaultHistoryBytes  = 4 << 20
	// historyScan bounds the rows that one call looks at when few of them match.
	historyScan = 64 << 10
)

// HistoryResult holds the events in the order of their revisions. Everything that matches in
// [From, Next) is in Events. Next > Head says that there was no more when it was read.
type HistoryResult struct {
	Events []Event
	Next   int64
	Head   int64
}

// History returns events in order, without gap or duplicate: the newest from memory, older ones from the
// rows. From below the compaction revision is a *CompactedError, unless all from there on is still in memory: so
// a watcher that keeps up is not overtaken by a compaction that comes right behind a write. From at the
// compaction revision is allowed, as in etcd.
func (db *DB) History(ctx context.Context, req HistoryRequest) (HistoryResult, error) {
	if req.MaxEvents <= 0 {
		req.MaxEvents = defaultHistoryEvents
	}
	if req.MaxBytes <= 0 {
		req.MaxBytes = defaultHistoryBytes
	}
	v := db.View()
	defer v.Release()
	h := &historyPage{req: req, k: newKeyRange(req.Key, req.RangeEnd), head: v.rev, next: req.From}
	if req.From > v.rev || db.ring.read(h) {
		return h.result(), nil
	}
	if req.From < v.compact {
		return HistoryResult{}, &CompactedError{CompactRevision: v.compact}
	}
	// The View keeps the rows from being compacted away under us.
	more := true
	err := v.log.scan(ctx, db.marks.before(req.From), req.From, func(w *storedRow) bool {
		more = h.take(w)
		return more
	})
	if err != nil {
		return HistoryResult{}, err
	}
	if more {
		h.end()
	}
	return h.result(), nil
}

// Recent is History that never waits for storage: it is not ok when From is no longer in memory.
func (db *DB) Recent(req HistoryRequest) (res HistoryResult, ok bool) {
	h := &historyPage{req: req, k: newKeyRange(req.Key, req.RangeEnd), head: db.current.Load().rev, next: req.From}
	if !db.ring.read(h) {
		return HistoryResult{}, false
	}
	return h.result(), true
}

// historyPage collects one answer.
type historyPage struct {
	req    HistoryRequest
	k      keyRange
	head   int64 // no event after this revision: it may not be visible yet
	events []Event
	bytes  int
	last   int64 // revision of the last row seen
	seen   int
	next   int64
}

// wants says whether the page takes a row of rev, and closes the page when it does not. A page is only
// ever closed between two revisions.
func (h *historyPage) wants(rev int64) bool {
	if rev > h.head {
		h.next = h.head + 1
		return false
	}
	if rev != h.last && (len(h.events) >= h.req.MaxEvents || h.bytes >= h.req.MaxBytes || h.seen >= historyScan) {
		h.next = rev
		return false
	}
	h.last = rev
	h.seen++
	return true
}

// take adds what it wants of a stored row; more says whether to go on with the next.
func (h *historyPage) take(w *storedRow) (more bool) {
	if w.rev < h.req.From {
		return true
	}
	if !h.wants(w.rev) {
		return false
	}
	if h.k.contains(w.key) {
		h.add(w.event())
	}
	return true
}

func (h *historyPage) add(e Event) {
	h.events = append(h.events, e)
	h.bytes += len(e.KV)
}

// end closes the page when there are no more rows.
func (h *historyPage) end() { h.next = h.head + 1 }

func (h *historyPage) result() HistoryResult {
	return HistoryResult{Events: h.events, Next: max(h.next, h.req.From), Head: h.head}
}

// PrevKV returns what key held just before revision rev, nil when it did not exist or when that revision
// is compacted.
func (db *DB) PrevKV(ctx context.Context, key []byte, rev int64) (Frame, error) {
	v := db.View()
	defer v.Release()
	if rev-1 < v.compact || rev-1 <= 0 {
		return nil, nil
	}
	var f Frame
	var err error
	v.visit(keyRange{from: key, single: true}, min(rev-1, v.rev), false, func(_ []byte, n uint32, r *record) bool {
		f, err = v.frame(ctx, n, r)
		return false
	})
	return f, err
}

// eventRing keeps the newest events, so that watchers that keep up never read SQL.
type eventRing struct {
	mu     sync.RWMutex
	events []Event
	bytes  int
	first  int64 // every event of this and later revisions is in events
}

// Bounds of the ring; the oldest revisions leave first.
const (
	ringEvents = 32 << 10
	ringBytes  = 16 << 20
)

func (r *eventRing) add(events []Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, events...)
	for i := range events {
		r.bytes += len(events[i].KV)
	}
	if len(r.events) <= ringEvents && r.bytes <= ringBytes {
		return
	}
	// Leave in larger steps than one, so that the copying is rare.
	drop := 0
	for len(r.events)-drop > ringEvents*3/4 || (r.bytes > ringBytes*3/4 && drop < len(r.events)) {
		r.bytes -= len(r.events[drop].KV)
		drop++
	}
	for drop > 0 && drop < len(r.events) && r.events[drop].Rev == r.events[drop-1].Rev {
		r.bytes -= len(r.events[drop].KV)
		drop++
	}
	r.first = r.events[drop-1].Rev + 1
	r.events = append(make([]Event, 0, ringEvents), r.events[drop:]...)
}

// reset empties the ring: it will have the events from revision first on.
func (r *eventRing) reset(first int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events, r.bytes, r.first = nil, 0, first
}

// read answers a page from memory; false when its start is no longer there.
func (r *eventRing) read(h *historyPage) bool {
	events, first := r.snapshot()
	if h.req.From < first {
		return false
	}
	i := sort.Search(len(events), func(i int) bool { return events[i].Rev >= h.req.From })
	for ; i < len(events); i++ {
		e := &events[i]
		if !h.wants(e.Rev) {
			return true
		}
		if h.k.contains(e.Key) {
			h.add(*e)
		}
	}
	h.end()
	return true
}

// snapshot returns the events there are, and the revision from which on they are complete. Events are only ever appended,
// and leave with the whole array, so what it returns does not change.
func (r *eventRing) snapshot() (events []Event, first int64) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.events, r.first
}

// liveChange returns by how many the keys of k that exist became more from revision after up to revision to. It is
// not ok when the ring does not reach back so far, or more than limit events lie between the two.
func (r *eventRing) liveChange(k keyRange, after, to int64, limit int) (delta int64, ok bool) {
	events, first := r.snapshot()
	if after+1 < first {
		return 0, false
	}
	from := sort.Search(len(events), func(i int) bool { return events[i].Rev > after })
	for i := from; i < len(events) && events[i].Rev <= to; i++ {
		if i-from >= limit {
			return 0, false
		}
		e := &events[i]
		deleted := e.Type == mvccpb.Event_DELETE
		switch {
		case !deleted && !e.born, !k.contains(e.Key):
		case deleted:
			delta--
		default:
			delta++
		}
	}
	return delta, true
}
