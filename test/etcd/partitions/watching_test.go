//go:build linux

package partitions

import (
	"context"
	"fmt"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/test/etcd/partitions/cluster"
)

// watching is one client that watches everything through one member, from the first revision on, and resumes whenever its
// stream breaks, after what it knows.
type watching struct {
	member *cluster.Member
	leader bool // the stream is to end when the member knows no leader
	record *record
	end    context.CancelFunc
	ended  chan struct{}

	mu struct {
		sync.Mutex
		events  []*mvccpb.Event
		seen    []time.Duration // when each event came
		past    int64           // every event up to this revision has come, by the word of an event or a bookmark
		streams int
		marks   int // bookmarks
		last    error
		wrong   []string
	}
}

func watch(ctx context.Context, r *record, m *cluster.Member, leader bool) *watching {
	ctx, cancel := context.WithCancel(ctx)
	w := &watching{member: m, leader: leader, record: r, end: cancel, ended: make(chan struct{})}
	go func() {
		defer close(w.ended)
		for ctx.Err() == nil {
			err := w.stream(ctx)
			w.mu.Lock()
			w.mu.last = err
			w.mu.Unlock()
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
	}()
	return w
}

func (w *watching) stop() {
	w.end()
	<-w.ended
}

func (w *watching) String() string {
	if w.leader {
		return "the watch on " + w.member.Name + " that wants a leader"
	}
	return "the watch on " + w.member.Name
}

// stream is one stream, from its opening to its end.
func (w *watching) stream(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if w.leader {
		ctx = metadata.AppendToOutgoingContext(ctx, "hasleader", "true")
	}
	stream, err := w.member.Watch.Watch(ctx)
	if err != nil {
		return err
	}
	w.mu.Lock()
	w.mu.streams++
	from := w.mu.past + 1
	w.mu.Unlock()
	err = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key: []byte{0}, RangeEnd: []byte{0}, StartRevision: from, PrevKv: true,
	}}})
	if err != nil {
		return err
	}
	// Bookmarks are asked for all the time. That also makes a stream end whose other end is gone.
	asked := make(chan struct{})
	defer func() { cancel(); <-asked }()
	go func() {
		defer close(asked)
		for ctx.Err() == nil {
			if stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}}) != nil {
				return // the receiver is told why
			}
			select {
			case <-ctx.Done():
			case <-time.After(300 * time.Millisecond):
			}
		}
	}()
	for {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		if err := w.take(r); err != nil {
			return err
		}
	}
}

// take notes what came, and what of it breaks a promise.
func (w *watching) take(r *pb.WatchResponse) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	complain := func(format string, args ...any) {
		w.mu.wrong = append(w.mu.wrong, fmt.Sprintf("%s, at %v: ", w, w.record.now().Round(time.Millisecond))+fmt.Sprintf(format, args...))
	}
	if r.Canceled {
		if r.CompactRevision != 0 {
			complain("canceled: %q, compact revision %d; nothing was compacted", r.CancelReason, r.CompactRevision)
		}
		return fmt.Errorf("canceled: %q", r.CancelReason)
	}
	if r.Created {
		return nil
	}
	if len(r.Events) == 0 {
		if r.Header.Revision < w.mu.past {
			complain("broke Bookmarkable: a bookmark at revision %d after one, or an event, at %d", r.Header.Revision, w.mu.past)
		}
		w.mu.past = max(w.mu.past, r.Header.Revision)
		w.mu.marks++
		return nil
	}
	newest := w.mu.past
	for _, e := range r.Events {
		switch {
		case e.Kv.ModRevision <= w.mu.past:
			complain("broke Ordered, Unique, Atomic or Bookmarkable: revision %d after everything up to %d had come", e.Kv.ModRevision, w.mu.past)
		case e.Kv.ModRevision < newest:
			complain("broke Ordered: revision %d after %d in one answer", e.Kv.ModRevision, newest)
		}
		newest = max(newest, e.Kv.ModRevision)
		w.mu.events = append(w.mu.events, e)
		w.mu.seen = append(w.mu.seen, w.record.now())
	}
	if r.Header.Revision < newest {
		complain("an answer with revision %d in its header has an event of revision %d", r.Header.Revision, newest)
	}
	w.mu.past = newest
	return nil
}

// wait returns when the watcher knows everything up to a revision.
func (w *watching) wait(ctx context.Context, revision int64) error {
	for {
		w.mu.Lock()
		past, last := w.mu.past, w.mu.last
		w.mu.Unlock()
		if past >= revision {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("broke Reliable: %s has come to revision %d only, want %d; its last stream ended with: %v", w, past, revision, last)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// complete compares what came with what there was. REQUIRES: wait has returned.
func (w *watching) complete(events []*mvccpb.Event) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if where := firstDifference(w.mu.events, events); where != "" {
		return append(w.mu.wrong, fmt.Sprintf("%s: %s", w, where))
	}
	return w.mu.wrong
}

// firstDifference says where got is not what was wanted, "" when it is.
func firstDifference(got, want []*mvccpb.Event) string {
	for i := range min(len(got), len(want)) {
		if !proto.Equal(got[i], want[i]) {
			return fmt.Sprintf("event %d is %v, want %v", i, got[i], want[i])
		}
	}
	if len(got) != len(want) {
		return fmt.Sprintf("%d events, want %d", len(got), len(want))
	}
	return ""
}

// earliest is, by revision, when the first of the watchers saw it.
func earliest(watchers []*watching) map[int64]time.Duration {
	first := map[int64]time.Duration{}
	for _, w := range watchers {
		w.mu.Lock()
		for i, e := range w.mu.events {
			if at, known := first[e.Kv.ModRevision]; !known || w.mu.seen[i] < at {
				first[e.Kv.ModRevision] = w.mu.seen[i]
			}
		}
		w.mu.Unlock()
	}
	return first
}

// events reads everything up to a revision through a member, in one stream.
func events(ctx context.Context, r *record, m *cluster.Member, revision int64) ([]*mvccpb.Event, error) {
	w := watch(ctx, r, m, false)
	defer w.stop()
	if err := w.wait(ctx, revision); err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.mu.wrong) > 0 {
		return nil, fmt.Errorf("%v", w.mu.wrong)
	}
	return w.mu.events, nil
}
