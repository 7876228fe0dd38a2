package differential

import (
	"context"
	"fmt"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// patience is how long an answer that must come may take. It is long because the machine may be busy; a
// lost answer costs this once.
const patience = 30 * time.Second

// watchStream is one watch RPC on one server and what it has sent.
type watchStream struct {
	rpc    pb.Watch_WatchClient
	cancel context.CancelFunc
	done   chan struct{} // closed when the receiver has ended

	changed chan struct{} // a hint that something below has changed

	mu       sync.Mutex
	controls []*pb.WatchResponse         // answers without events, in order, not yet taken
	events   map[int64][]*mvccpb.Event   // per live watch id, not yet taken
	last     map[int64]*pb.WatchResponse // per live watch id, the last answer with events
	marks    map[int64]int64             // per live watch id, the newest revision that progress was told for
	owed     int                         // progress requests that the judge has dropped, set by the pair
	broken   error                       // first broken promise, or the end of the stream
}

func openStream(client pb.WatchClient) (*watchStream, error) {
	ctx, cancel := context.WithCancel(context.Background())
	rpc, err := client.Watch(ctx)
	if err != nil {
		cancel()
		return nil, err
	}
	s := &watchStream{
		rpc: rpc, cancel: cancel, done: make(chan struct{}), changed: make(chan struct{}, 1),
		events: make(map[int64][]*mvccpb.Event), last: make(map[int64]*pb.WatchResponse), marks: make(map[int64]int64),
	}
	go s.receive()
	return s, nil
}

func (s *watchStream) close() {
	s.cancel()
	<-s.done
}

func (s *watchStream) receive() {
	defer close(s.done)
	for {
		r, err := s.rpc.Recv()
		s.mu.Lock()
		if err != nil {
			s.fail(fmt.Errorf("the watch stream ended: %w", err))
		} else {
			s.accept(r)
		}
		s.mu.Unlock()
		select {
		case s.changed <- struct{}{}:
		default:
		}
		if err != nil {
			return
		}
	}
}

func (s *watchStream) fail(err error) {
	if s.broken == nil {
		s.broken = err
	}
}

// accept checks what etcd promises for every single answer and files it. REQUIRES: s.mu.
func (s *watchStream) accept(r *pb.WatchResponse) {
	id := r.WatchId
	if h := r.Header; h == nil || h.ClusterId == 0 || h.MemberId == 0 || h.RaftTerm == 0 {
		s.fail(fmt.Errorf("watch %d: incomplete header %v", id, h))
	}
	if len(r.Events) == 0 {
		switch {
		case r.Created && !r.Canceled:
			if s.events[id] != nil {
				s.fail(fmt.Errorf("broke Unique - watch %d was created twice", id))
			}
			s.events[id] = []*mvccpb.Event{}
		case r.Canceled && !r.Created:
			delete(s.last, id)
			delete(s.marks, id)
			// Events that came before stay until they are taken; later ones are an error.
			if len(s.events[id]) == 0 {
				delete(s.events, id)
			}
		}
		if isProgress(r) {
			for open := range s.events {
				if id == allWatches || id == open {
					s.marks[open] = max(s.marks[open], r.Header.GetRevision())
				}
			}
		}
		s.controls = append(s.controls, r)
		return
	}
	if first := r.Events[0].Kv.ModRevision; first <= s.marks[id] {
		s.fail(fmt.Errorf("broke Bookmarkable - watch %d got revision %d after progress at %d", id, first, s.marks[id]))
	}
	if s.events[id] == nil {
		s.fail(fmt.Errorf("an event for watch %d, which is not open: %v", id, r.Events[0]))
		return
	}
	if last := s.last[id]; last != nil {
		before, after := last.Events[len(last.Events)-1].Kv.ModRevision, r.Events[0].Kv.ModRevision
		if after < before {
			s.fail(fmt.Errorf("broke Ordered - watch %d got revision %d after %d", id, after, before))
		}
		if after == before && !last.Fragment {
			s.fail(fmt.Errorf("broke Atomic - watch %d got revision %d in two answers", id, after))
		}
	}
	for i := 1; i < len(r.Events); i++ {
		if r.Events[i].Kv.ModRevision < r.Events[i-1].Kv.ModRevision {
			s.fail(fmt.Errorf("broke Ordered - watch %d got revision %d after %d in one answer",
				id, r.Events[i].Kv.ModRevision, r.Events[i-1].Kv.ModRevision))
		}
	}
	if newest := r.Events[len(r.Events)-1].Kv.ModRevision; r.Header.GetRevision() < newest {
		s.fail(fmt.Errorf("watch %d: header revision %d below that of an event, %d", id, r.Header.GetRevision(), newest))
	}
	s.last[id] = r
	s.events[id] = append(s.events[id], r.Events...)
}

// wait blocks until ready says so (called with the lock held) or the stream is broken.
func (s *watchStream) wait(what string, ready func() bool) error {
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	for {
		s.mu.Lock()
		ok, broken := ready(), s.broken
		s.mu.Unlock()
		if broken != nil {
			return broken
		}
		if ok {
			return nil
		}
		select {
		case <-s.changed:
		case <-timeout.C:
			return fmt.Errorf("nothing within %v: %s", patience, what)
		}
	}
}

// allWatches is the watch id of progress that holds for every watch of the stream.
const allWatches = -1

func isProgress(r *pb.WatchResponse) bool {
	return len(r.Events) == 0 && !r.Created && !r.Canceled
}

// control takes the next answer without events. Late progress is passed over, see late.
func (s *watchStream) control(what string, head int64) (*pb.WatchResponse, error) {
	for {
		if err := s.wait(what, func() bool { return len(s.controls) > 0 }); err != nil {
			return nil, err
		}
		s.mu.Lock()
		r := s.controls[0]
		s.controls = s.controls[1:]
		passed := s.late(r, what, head)
		s.mu.Unlock()
		if !passed {
			return r, nil
		}
	}
}

const progress = "progress"

// late tells whether r answers a progress request that came too early and that the judge dropped. The API
// says "as soon as possible": etcd answers at once or never, another server may answer when it can. What
// such an answer promises has been checked by accept. REQUIRES: s.mu.
func (s *watchStream) late(r *pb.WatchResponse, wanted string, head int64) bool {
	if s.owed == 0 || !isProgress(r) || r.WatchId != allWatches || wanted == progress && r.Header.GetRevision() == head {
		return false
	}
	s.owed--
	return true
}

// take returns at least n events of watcher id: all that have come.
func (s *watchStream) take(id int64, n int, what string) ([]*mvccpb.Event, error) {
	if err := s.wait(what, func() bool { return len(s.events[id]) >= n }); err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.events[id], err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	got := s.events[id]
	if got != nil {
		s.events[id] = got[:0:0]
	}
	return got, nil
}

// untaken are answers that nobody expected.
func (s *watchStream) untaken() (unexpected []*pb.WatchResponse) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.controls {
		if !s.late(r, "", 0) {
			unexpected = append(unexpected, r)
		}
	}
	return unexpected
}
