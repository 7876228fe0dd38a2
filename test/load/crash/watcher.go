package crash

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// watcher collects events over all crashes. When its stream breaks it opens another one from the revision after
// the last it has seen, as a Kubernetes reflector does. It says so if an event comes twice or out of order.
type watcher struct {
	name     string
	key, end string
	prevKV   bool
	fragment bool
	progress bool // asks for progress all the time and resumes from what it was told

	mu struct {
		sync.Mutex
		events  []event // not yet taken by the run, oldest first
		next    int64   // every event below this revision has arrived
		streams int     // opened so far
		problem error
	}
}

func newWatcher(name, key, end string) *watcher {
	w := &watcher{name: name, key: key, end: end}
	w.mu.next = 2 // the first write of an empty store
	return w
}

// matches says whether the watcher is to receive events of the key.
func (w *watcher) matches(key string) bool {
	if w.end == "\x00" {
		return key >= w.key
	}
	return step{key: w.key, end: w.end}.covers(key)
}

// seen is the newest revision up to which the watcher knows everything, and what went wrong so far.
func (w *watcher) seen() (int64, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.mu.next - 1, w.mu.problem
}

// take removes and returns the events up to the revision.
func (w *watcher) take(to int64) []event {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for n < len(w.mu.events) && w.mu.events[n].rev <= to {
		n++
	}
	out := w.mu.events[:n]
	w.mu.events = append([]event(nil), w.mu.events[n:]...)
	return out
}

// streams is how many streams the watcher has needed.
func (w *watcher) streams() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.mu.streams
}

func (w *watcher) fail(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.mu.problem == nil {
		w.mu.problem = fmt.Errorf("watcher %s: %w", w.name, fmt.Errorf(format, args...))
	}
}

// add takes the events of one answer, which holds whole revisions only.
func (w *watcher) add(events []*mvccpb.Event) bool {
	at := time.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	last := w.mu.next - 1
	for _, e := range events {
		rev := e.Kv.ModRevision
		if rev < w.mu.next || rev < last {
			w.mu.problem = fmt.Errorf("watcher %s: revision %d came after everything below %d had been seen: repeated, out of order or split",
				w.name, rev, max(w.mu.next, last))
			return false
		}
		last = rev
		w.mu.events = append(w.mu.events, newEvent(e, at))
	}
	w.mu.next = last + 1
	return true
}

// run collects until ctx ends.
func (w *watcher) run(ctx context.Context, client pb.WatchClient) {
	for ctx.Err() == nil {
		if err := w.stream(ctx, client); err != nil {
			w.fail("%w", err)
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(3 * time.Millisecond): // the server is down: do not spin
		}
	}
}

// stream follows one stream until it breaks, which is no error.
func (w *watcher) stream(ctx context.Context, client pb.WatchClient) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := client.Watch(ctx)
	if err != nil {
		return nil
	}
	w.mu.Lock()
	start := w.mu.next
	w.mu.Unlock()
	if err := s.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key: []byte(w.key), RangeEnd: []byte(w.end), StartRevision: start, PrevKv: w.prevKV, Fragment: w.fragment,
	}}}); err != nil {
		return nil
	}
	if w.progress {
		go askProgress(ctx, s)
	}
	created := false
	var parts []*mvccpb.Event
	for {
		r, err := s.Recv()
		if err != nil {
			return nil
		}
		switch {
		case r.Canceled:
			return fmt.Errorf("canceled by the server when started at revision %d: %q (compact revision %d)", start, r.CancelReason, r.CompactRevision)
		case r.Created:
			created = true
			w.mu.Lock()
			w.mu.streams++
			w.mu.Unlock()
		case !created:
			return errors.New("an answer came before created")
		case len(r.Events) == 0:
			if w.progress {
				w.mu.Lock()
				w.mu.next = max(w.mu.next, r.Header.Revision+1)
				w.mu.Unlock()
			}
		case r.Fragment:
			parts = append(parts, r.Events...)
		default:
			if !w.add(append(parts, r.Events...)) {
				return nil // the finding is noted already
			}
			parts = nil
		}
	}
}

// askProgress asks until the stream ends. It is the only sender once the watch is created.
func askProgress(ctx context.Context, s pb.Watch_WatchClient) {
	tick := time.NewTicker(15 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := s.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}}); err != nil {
				return // the reader of the stream sees why
			}
		}
	}
}

// runClientV3 collects through clientv3, which resumes by itself.
func (w *watcher) runClientV3(ctx context.Context, cl *clientv3.Client) {
	for r := range cl.Watch(ctx, w.key, clientv3.WithRange(w.end), clientv3.WithRev(2)) {
		if err := r.Err(); err != nil {
			if ctx.Err() == nil {
				w.fail("clientv3 gave up: %w", err)
			}
			return
		}
		events := make([]*mvccpb.Event, len(r.Events))
		for i, e := range r.Events {
			events[i] = (*mvccpb.Event)(e)
		}
		if !w.add(events) {
			return
		}
	}
	if ctx.Err() == nil {
		w.fail("clientv3 closed the watch")
	}
}
