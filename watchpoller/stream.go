package watchpoller

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// What one response of a watcher carries at most. It always carries at least one revision, and only whole ones.
const (
	responseRevisions = 1000 // as etcd when it catches up
	responseBytes     = 1 << 20
)

// maxControls is how many answers may wait for a client that does not read, before its requests are not read either.
const maxControls = 64

type state uint8

const (
	synced  state = iota + 1 // in Poller.mu.synced; who holds Poller.mu owns it
	lagging                  // in Poller.mu.lagging; catchUp owns it
	dead                     // canceled by compaction; only its id remains
	gone                     // canceled by the client
)

// A watcher is one watch of one stream.
type watcher struct {
	s              *stream
	id             int64
	rng            keyRange
	startRev       int64 // as the client gave it; 0: from its creation on
	filters        []mvccpb.Event_EventType
	prevKV         bool
	progressNotify bool
	fragment       bool

	quiet atomic.Bool // no events were sent since the last tick of the progress timer

	// Guarded by Poller.mu.
	state state
	next  int64 // the first revision that it may still be given; while synced a lower bound of it
	// served is the round of catchUp in which it was read for last.
	served uint64

	// Of the watcher's owner, see delivery.
	share  *share
	fresh  []*event
	missed int64 // the first revision of which something did not fit; 0: none

	// Guarded by stream.mu.
	dropped bool   // canceled: nothing queued for it is sent
	open    *entry // the queued entry that its next events may join; nil: none
	opened  uint64 // the epoch of open
}

func (w *watcher) filtered(t mvccpb.Event_EventType) bool {
	for _, f := range w.filters {
		if f == t {
			return true
		}
	}
	return false
}

// cost is what a queued event counts against the bound of the stream.
func (w *watcher) cost(ev *event) int {
	if w.prevKV {
		return 2*len(ev.plain) + eventOverhead // the value before is taken to be as large
	}
	return len(ev.plain) + eventOverhead
}

// An entry is one response in waiting.
type entry struct {
	w    *watcher          // nil: belongs to no watcher
	ctrl *pb.WatchResponse // nil: events. The ids in its header are filled in when it is sent

	events []*event
	revs   int   // distinct revisions in events
	last   int64 // the newest of them
	rev    int64 // for the header
	bytes  int   // encoded
	cost   int
}

// A stream is one client: any number of watchers, one queue, one sender.
type stream struct {
	p    *Poller
	send func(any) error

	wake    bell          // the queue has something
	drained bell          // there is room for answers
	done    chan struct{} // closed when Serve returns

	// Guarded by Poller.mu.
	ended    bool
	watchers map[int64]*watcher // by id, dead ones too
	nextID   int64
	askedFor int64 // while in Poller.mu.asking: the revision that the progress answer must reach

	bytes   atomic.Int64 // cost of what is queued or being sent
	lagging atomic.Int32 // lagging watchers

	mu struct {
		sync.Mutex
		closed   bool
		queue    []*entry
		head     int // queue[:head] is taken
		controls int
		pending  int    // events
		epoch    uint64 // grows with each answer: events do not join an entry from before one
	}
}

// Serve runs one client's watch stream until ctx ends or recv or send fails, and returns that error; ErrClosed when
// the Poller is closed. recv returning io.EOF means that the client will ask for nothing more; as in etcd its watchers
// go on.
//
// send is given *pb.WatchResponse (created, canceled, progress) or *Response (events), by one goroutine, and may
// block: only this stream waits. recv runs in a goroutine of its own and must return once Serve has returned. The
// messages from recv are kept.
func (p *Poller) Serve(ctx context.Context, recv func() (*pb.WatchRequest, error), send func(msg any) error) error {
	s := &stream{
		p: p, send: send, wake: newBell(), drained: newBell(), done: make(chan struct{}),
		watchers: make(map[int64]*watcher),
	}
	p.mu.Lock()
	if p.mu.closed {
		p.mu.Unlock()
		return ErrClosed
	}
	p.mu.streams[s] = struct{}{}
	p.wg.Add(2) // under the lock: Close waits only after it has set closed
	p.mu.Unlock()
	defer p.wg.Done()
	count(p.o.Hooks.Streams, 1)
	defer count(p.o.Hooks.Streams, -1)
	defer s.end()

	received := make(chan error, 1)
	go func() {
		defer p.wg.Done()
		received <- s.receive(ctx, recv)
	}()
	return s.sendLoop(ctx, received)
}

// end cancels all watchers and forgets the queue.
func (s *stream) end() {
	p := s.p
	p.mu.Lock()
	s.ended = true
	for _, w := range s.watchers {
		p.drop(w, gone)
	}
	clear(s.watchers)
	delete(p.mu.streams, s)
	delete(p.mu.asking, s)
	p.mu.Unlock()

	s.mu.Lock()
	s.mu.closed = true
	s.mu.queue = nil
	pending := s.mu.pending
	s.mu.pending = 0
	s.mu.Unlock()
	count(p.o.Hooks.PendingEvents, -pending)
	close(s.done)
}

// sendLoop sends what is queued, in order.
func (s *stream) sendLoop(ctx context.Context, received <-chan error) error {
	ticker := time.NewTicker(s.p.progressPeriod())
	defer ticker.Stop()
	for {
		e := s.take()
		if e != nil {
			start := time.Now()
			if err := s.transmit(ctx, e); err != nil {
				return err
			}
			if f := s.p.o.Hooks.Sent; f != nil {
				f(len(e.events), e.kind(), time.Since(start))
			}
			s.release(e)
			select { // a busy stream looks after the rest, too
			case <-s.p.ctx.Done():
				return ErrClosed
			case <-ctx.Done():
				return ctx.Err()
			case err := <-received:
				if !errors.Is(err, io.EOF) {
					return err
				}
			case <-ticker.C:
				s.notifyProgress()
			default:
			}
			continue
		}
		select {
		case <-s.wake:
		case <-s.p.ctx.Done():
			return ErrClosed
		case <-ctx.Done():
			return ctx.Err()
		case err := <-received:
			if !errors.Is(err, io.EOF) {
				return err
			}
		case <-ticker.C:
			s.notifyProgress()
		}
	}
}

// low is the fill up to which history is read for the stream.
func (s *stream) low() int64 { return max(1, int64(s.p.o.StreamBytes)/2) }

// hasRoom says whether history may be read for the stream.
func (s *stream) hasRoom() bool { return s.bytes.Load() < s.low() }

func (s *stream) historyRoom() int { return s.p.o.StreamBytes - int(s.bytes.Load()) }

// liveRoom leaves half of the queue to watchers that read history, if there are some: else the others could starve
// them.
func (s *stream) liveRoom() int {
	if s.lagging.Load() > 0 {
		return int(s.low() - s.bytes.Load())
	}
	return s.historyRoom()
}

// control queues an answer or a notification. If w is given it is not sent once w is canceled.
func (s *stream) control(w *watcher, resp *pb.WatchResponse) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.closed {
		return
	}
	s.mu.epoch++
	s.mu.controls++
	s.push(&entry{w: w, ctrl: resp})
}

// events queues whole revisions for w, oldest first, and takes over the slice. head, if not 0, is the revision for the
// header; otherwise it is that of the last event.
func (s *stream) events(w *watcher, events []*event, head int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.closed || w.dropped {
		return
	}
	s.mu.pending += len(events)
	count(s.p.o.Hooks.PendingEvents, len(events))
	for len(events) > 0 {
		e := w.open
		if e == nil || w.opened != s.mu.epoch || e.full() {
			e = &entry{w: w}
			w.open, w.opened = e, s.mu.epoch
			s.push(e)
		}
		cost, n := e.join(events)
		e.rev = max(e.rev, e.last, head)
		s.bytes.Add(int64(cost))
		events = events[n:]
	}
}

func (e *entry) kind() SentKind {
	switch {
	case e.ctrl == nil:
		return SentEvents
	case e.ctrl.Created || e.ctrl.Canceled:
		return SentControl
	}
	return SentProgress
}

func (e *entry) full() bool { return e.revs >= responseRevisions || e.bytes >= responseBytes }

// join appends the first of events, whole revisions until e is full. REQUIRES: e is not full; the first event is of a
// newer revision than e.last.
func (e *entry) join(events []*event) (cost, n int) {
	for _, ev := range events {
		if ev.rev != e.last {
			if n > 0 && e.full() {
				break
			}
			e.revs++
			e.last = ev.rev
		}
		e.bytes += len(ev.plain)
		cost += e.w.cost(ev)
		n++
	}
	if e.events == nil {
		e.events = events[:n:n]
	} else {
		e.events = append(e.events, events[:n]...)
	}
	e.cost += cost
	return cost, n
}

// push appends to the queue. REQUIRES: s.mu.
func (s *stream) push(e *entry) {
	if s.mu.head == len(s.mu.queue) {
		s.mu.queue, s.mu.head = s.mu.queue[:0], 0
	}
	s.mu.queue = append(s.mu.queue, e)
	s.wake.ring()
}

// take removes the first entry that is to be sent; nil when there is none.
func (s *stream) take() *entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.mu.head < len(s.mu.queue) {
		e := s.mu.queue[s.mu.head]
		s.mu.queue[s.mu.head] = nil
		s.mu.head++
		if s.mu.head > 1024 && s.mu.head > len(s.mu.queue)/2 {
			// A queue that is never quite empty must not grow at its taken end.
			n := copy(s.mu.queue, s.mu.queue[s.mu.head:])
			clear(s.mu.queue[n:])
			s.mu.queue, s.mu.head = s.mu.queue[:n], 0
		}
		if e.ctrl != nil {
			s.mu.controls--
			s.drained.ring()
		}
		if e.w == nil {
			return e
		}
		if e.w.open == e {
			e.w.open = nil
		}
		if !e.w.dropped {
			return e
		}
		s.discard(e)
	}
	return nil
}

// discard gives back the room of an entry that is not sent. REQUIRES: s.mu.
func (s *stream) discard(e *entry) {
	s.mu.pending -= len(e.events)
	count(s.p.o.Hooks.PendingEvents, -len(e.events))
	s.freed(e.cost)
}

// release gives back the room of an entry that was sent.
func (s *stream) release(e *entry) {
	if len(e.events) == 0 {
		return
	}
	e.w.quiet.Store(false)
	s.mu.Lock()
	s.mu.pending -= len(e.events)
	s.mu.Unlock()
	count(s.p.o.Hooks.PendingEvents, -len(e.events))
	count(s.p.o.Hooks.EventsSent, len(e.events))
	s.freed(e.cost)
}

// freed rings for the lagging watchers when the queue falls below its low mark. A watcher that begins to lag at this
// moment is not missed: it rings itself, after it counts as lagging.
func (s *stream) freed(cost int) {
	after := s.bytes.Add(-int64(cost))
	if after < s.low() && after+int64(cost) >= s.low() && s.lagging.Load() > 0 {
		s.p.room.ring()
	}
}

// transmit sends one entry.
func (s *stream) transmit(ctx context.Context, e *entry) error {
	h := s.p.o.Header()
	if e.ctrl != nil {
		e.ctrl.Header.ClusterId = h.GetClusterId()
		e.ctrl.Header.MemberId = h.GetMemberId()
		e.ctrl.Header.RaftTerm = h.GetRaftTerm()
		return s.send(e.ctrl)
	}
	bufs := make([][]byte, len(e.events))
	for i, ev := range e.events {
		bufs[i] = ev.plain
		if e.w.prevKV {
			var err error
			if bufs[i], err = s.prevKV(ctx, ev); err != nil {
				return err
			}
		}
	}
	if !e.w.fragment {
		return s.send(newResponse(encodeHead(h, e.rev, e.w.id, false), bufs))
	}
	for _, r := range split(h, e.rev, e.w.id, bufs, s.p.o.MaxResponseBytes) {
		if err := s.send(r); err != nil {
			return err
		}
	}
	return nil
}

// prevKV returns ev with prev_kv. While the source cannot be read it waits: an event without its prev_kv would be a
// wrong one.
func (s *stream) prevKV(ctx context.Context, ev *event) ([]byte, error) {
	var again retry
	for {
		b, err := ev.prevKV(ctx, s.p.src)
		if err == nil {
			return b, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		s.p.o.Hooks.readFailed(fmt.Errorf("prev_kv of a watch: %w", err))
		if !again.waitEither(ctx, s.p.ctx) {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			return nil, ErrClosed
		}
	}
}
