package outages

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// watching is one watch on one stream, and everything that came. It does not open the stream again.
type watching struct {
	t       *testing.T
	of      string
	ended   chan struct{}
	created chan struct{}

	mu struct {
		sync.Mutex
		events []stored
		err    error // why the stream ended
	}
}

// watchAll watches everything below a prefix from the next revision on, and returns when the watch is there.
func (q *quire) watchAll(t *testing.T, prefix string) *watching {
	t.Helper()
	stream, err := q.watch.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	end := []byte(prefix)
	end[len(end)-1]++
	err = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte(prefix), RangeEnd: end}}})
	if err != nil {
		t.Fatal(err)
	}
	w := &watching{t: t, of: q.address, ended: make(chan struct{}), created: make(chan struct{})}
	go w.receive(stream)
	select {
	case <-w.created:
	case <-w.ended:
		t.Fatalf("watch on %s: %v", w.of, w.why())
	case <-time.After(patience):
		t.Fatalf("no watch on %s after %v", w.of, patience)
	}
	return w
}

func (w *watching) receive(stream pb.Watch_WatchClient) {
	defer close(w.ended)
	for {
		r, err := stream.Recv()
		if err == nil && r.Canceled {
			err = fmt.Errorf("canceled by the server: %q, compact revision %d", r.CancelReason, r.CompactRevision)
		}
		if err == nil && r.Created {
			close(w.created)
		}
		w.mu.Lock()
		for _, e := range r.GetEvents() {
			w.mu.events = append(w.mu.events, stored{revision: e.Kv.ModRevision, version: e.Kv.Version, key: string(e.Kv.Key), value: string(e.Kv.Value)})
		}
		w.mu.err = err
		w.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (w *watching) why() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.mu.err
}

func (w *watching) seen() []stored {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.mu.events[:len(w.mu.events):len(w.mu.events)]
}

// complete waits until as many events came as wanted, and wants them to be those, in order, on a stream that is still open.
func (w *watching) complete(wanted []stored) {
	w.t.Helper()
	for deadline := time.Now().Add(patience); len(w.seen()) < len(wanted) && time.Now().Before(deadline) && w.open(); time.Sleep(5 * time.Millisecond) {
	}
	if !w.open() {
		w.t.Errorf("the watch on %s has ended: %v", w.of, w.why())
	}
	seen := w.seen()
	if len(seen) != len(wanted) {
		w.t.Errorf("the watch on %s got %d events, want %d", w.of, len(seen), len(wanted))
	}
	for i := range min(len(seen), len(wanted)) {
		if seen[i] != wanted[i] {
			w.t.Errorf("event %d of the watch on %s is %+v, want %+v", i, w.of, seen[i], wanted[i])
			return
		}
	}
}

func (w *watching) open() bool {
	select {
	case <-w.ended:
		return false
	default:
		return true
	}
}

// keeper renews leases, as their clients would: again and again, through outages.
type keeper struct {
	end  context.CancelFunc
	done sync.WaitGroup

	mu struct {
		sync.Mutex
		expired []int64 // leases that the server said are gone
		renewed int
	}
}

const keepEvery = time.Second

// keep renews the leases every second, in streams of ten: a stream renews one after the other.
func (q *quire) keep(t *testing.T, ids []int64) *keeper {
	ctx, cancel := context.WithCancel(t.Context())
	k := &keeper{end: cancel}
	for part := range slices.Chunk(ids, 10) {
		k.done.Go(func() {
			for ctx.Err() == nil {
				// How a stream ends is how the outage looks; the leases are what counts.
				_ = k.keepWhile(ctx, q, part)
				select {
				case <-ctx.Done():
				case <-time.After(300 * time.Millisecond):
				}
			}
		})
	}
	t.Cleanup(k.stop)
	return k
}

func (k *keeper) keepWhile(ctx context.Context, q *quire, ids []int64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := q.lease.LeaseKeepAlive(ctx)
	if err != nil {
		return err
	}
	for {
		began := time.Now()
		sent := make(chan error, 1)
		go func() {
			for _, id := range ids {
				if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: id}); err != nil {
					sent <- err
					return
				}
			}
			sent <- nil
		}()
		for range ids {
			r, err := stream.Recv()
			if err != nil {
				cancel()
				<-sent
				return err
			}
			k.mu.Lock()
			if r.TTL <= 0 {
				k.mu.expired = append(k.mu.expired, r.ID)
			} else {
				k.mu.renewed++
			}
			k.mu.Unlock()
		}
		if err := <-sent; err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(keepEvery - time.Since(began)):
		}
	}
}

func (k *keeper) stop() {
	k.end()
	k.done.Wait()
}

// gone are the leases that a renewal did not find.
func (k *keeper) gone() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.mu.expired)
}

// grant makes n leases, each with a key below "leased/".
func (q *quire) grant(t *testing.T, n int, ttl, first int64) []int64 {
	t.Helper()
	ids := make([]int64, n)
	var all sync.WaitGroup
	for i := range ids {
		ids[i] = first + int64(i)
		all.Go(func() {
			if _, err := q.lease.LeaseGrant(within(t, patience), &pb.LeaseGrantRequest{ID: ids[i], TTL: ttl}); err != nil {
				t.Errorf("grant a lease: %v", err)
				return
			}
			_, err := q.kv.Put(within(t, patience), &pb.PutRequest{Key: fmt.Appendf(nil, "leased/%d", ids[i]), Lease: ids[i]})
			if err != nil {
				t.Errorf("attach a key: %v", err)
			}
		})
	}
	all.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return ids
}

// leased is how many keys hang on leases at present.
func (q *quire) leased(t *testing.T) int64 {
	t.Helper()
	r, err := q.kv.Range(within(t, patience), &pb.RangeRequest{Key: []byte("leased/"), RangeEnd: []byte("leased0"), CountOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	return r.Count
}

func isUnavailable(err error) bool { return status.Code(err) == codes.Unavailable }
