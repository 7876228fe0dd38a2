package conformance

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func (x *exam) locks() v3lockpb.LockClient { return v3lockpb.NewLockClient(x.Conn) }

func (x *exam) lock(name string, lease int64) string {
	x.Helper()
	r := &v3lockpb.LockRequest{Name: []byte(name), Lease: lease}
	resp, err := x.locks().Lock(x.ctx, r)
	x.must(err, r)
	if resp.Header.GetRevision() == 0 || resp.Header.GetMemberId() == 0 {
		x.Errorf("incomplete header %v", resp.Header)
	}
	return string(resp.Key)
}

func (x *exam) unlock(key string) {
	x.Helper()
	r := &v3lockpb.UnlockRequest{Key: []byte(key)}
	_, err := x.locks().Unlock(x.ctx, r)
	x.must(err, r)
}

// outcome is how a call in the background has ended.
type outcome struct {
	key string
	err error
}

// lockLater asks for a lock in the background, and returns once it waits in the queue.
func (x *exam) lockLater(ctx context.Context, name string, lease int64) <-chan outcome {
	x.Helper()
	done := make(chan outcome, 1)
	go func() {
		resp, err := x.locks().Lock(ctx, &v3lockpb.LockRequest{Name: []byte(name), Lease: lease})
		done <- outcome{string(resp.GetKey()), err}
	}()
	x.appears(fmt.Sprintf("%s/%x", name, lease))
	return done
}

// appears waits until a key is there, or is there no more.
func (x *exam) appears(key string) { x.Helper(); x.awaitKey(key, true) }
func (x *exam) goes(key string)    { x.Helper(); x.awaitKey(key, false) }

func (x *exam) awaitKey(key string, there bool) {
	x.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		r := x.rangeRequest(&pb.RangeRequest{Key: []byte(key), CountOnly: true})
		if r.Count == 1 == there {
			return
		}
		if time.Now().After(deadline) {
			x.Fatalf("after 10 s: %s is there: %v, want %v", key, !there, there)
		}
	}
}

// waits fails if the call has ended.
func (x *exam) waits(done <-chan outcome) {
	x.Helper()
	select {
	case o := <-done:
		x.Fatalf("it has ended with %q, %v", o.key, o.err)
	case <-time.After(100 * time.Millisecond):
	}
}

func (x *exam) ends(done <-chan outcome, key string) {
	x.Helper()
	select {
	case o := <-done:
		if o.err != nil || o.key != key {
			x.Fatalf("it has ended with %q, %v, want %q", o.key, o.err, key)
		}
	case <-time.After(10 * time.Second):
		x.Fatal("it does not end within 10 s")
	}
}

func (x *exam) fails(done <-chan outcome, want error) {
	x.Helper()
	select {
	case o := <-done:
		x.wantError(o.err, want)
	case <-time.After(10 * time.Second):
		x.Fatal("it does not end within 10 s")
	}
}

var lockCases = []testCase{
	{name: "a lock is a key below its name, attached to the lease", run: func(x *exam) {
		x.grant(0xabc, 100)
		key := x.lock("name", 0xabc)
		equal(x, "the key", key, "name/abc")
		kv := x.get(key)
		equal(x, "its lease", kv.Lease, 0xabc)
		equal(x, "its value", string(kv.Value), "")
		equal(x, "locked again with the same lease", x.lock("name", 0xabc), key)
		equal(x, "still of the first time", x.get(key).ModRevision, kv.ModRevision)
		x.unlock(key)
		x.goes(key)
		x.unlock(key) // nothing to delete is no error
	}},

	{name: "a lock without lease gets one of a minute", run: func(x *exam) {
		key := x.lock("name", 0)
		kv := x.get(key)
		equal(x, "the key", key, fmt.Sprintf("name/%x", kv.Lease))
		equal(x, "the time it was granted for", x.timeToLive(kv.Lease).GrantedTTL, 60)
	}},

	{name: "who waits gets the lock in the order of asking, each after the one before", run: func(x *exam) {
		for id := int64(1); id <= 4; id++ {
			x.grant(id, 100)
		}
		x.lock("name", 1)
		x.lock("nam", 2) // another one
		second := x.lockLater(x.ctx, "name", 2)
		third := x.lockLater(x.ctx, "name", 3)
		fourth := x.lockLater(x.ctx, "name", 4)
		x.waits(second)
		x.unlock("name/1")
		x.ends(second, "name/2")
		x.waits(third)
		x.unlock("name/3") // who waits is thrown out
		x.unlock("name/2")
		x.ends(fourth, "name/4")
		x.fails(third, status.Error(codes.Unknown, "mutex: session is expired"))
	}},

	{name: "the lock ends with the lease of its owner", run: func(x *exam) {
		x.grant(1, 100)
		x.grant(2, 100)
		x.lock("name", 1)
		second := x.lockLater(x.ctx, "name", 2)
		_, err := x.Lease.LeaseRevoke(x.ctx, &pb.LeaseRevokeRequest{ID: 1})
		x.must(err, &pb.LeaseRevokeRequest{ID: 1})
		x.ends(second, "name/2")
	}},

	{name: "who waits with a lease that ends does not get the lock", run: func(x *exam) {
		x.grant(1, 100)
		x.grant(2, 100)
		x.lock("name", 1)
		second := x.lockLater(x.ctx, "name", 2)
		_, err := x.Lease.LeaseRevoke(x.ctx, &pb.LeaseRevokeRequest{ID: 2})
		x.must(err, &pb.LeaseRevokeRequest{ID: 2})
		x.waits(second)
		x.unlock("name/1")
		x.fails(second, status.Error(codes.Unknown, "mutex: session is expired"))
	}},

	{name: "who goes away while waiting leaves the queue", run: func(x *exam) {
		x.grant(1, 100)
		x.grant(2, 100)
		x.lock("name", 1)
		ctx, cancel := context.WithCancel(x.ctx)
		second := x.lockLater(ctx, "name", 2)
		cancel()
		x.fails(second, status.Error(codes.Canceled, "context canceled"))
		x.goes("name/2")
	}},

	{name: "a lock with a lease that is not there is refused", run: func(x *exam) {
		_, err := x.locks().Lock(x.ctx, &v3lockpb.LockRequest{Name: []byte("name"), Lease: 77})
		x.wantError(err, status.Error(codes.Unknown, rpctypes.ErrorDesc(rpctypes.ErrGRPCLeaseNotFound)))
	}},

	{name: "of many who lock one name only one has it at a time", run: func(x *exam) {
		const clients, times = 8, 5
		var all sync.WaitGroup
		var inside, entered atomic.Int32
		for id := range int64(clients) {
			x.grant(id+1, 100)
			all.Go(func() {
				for range times {
					resp, err := x.locks().Lock(x.ctx, &v3lockpb.LockRequest{Name: []byte("name"), Lease: id + 1})
					if err != nil {
						x.Errorf("lock: %v", err)
						return
					}
					if n := inside.Add(1); n != 1 {
						x.Errorf("%d have the lock", n)
					}
					entered.Add(1)
					time.Sleep(time.Millisecond)
					inside.Add(-1)
					if _, err := x.locks().Unlock(x.ctx, &v3lockpb.UnlockRequest{Key: resp.Key}); err != nil {
						x.Errorf("unlock: %v", err)
					}
				}
			})
		}
		all.Wait()
		equal(x, "how often somebody had it", entered.Load(), clients*times)
	}},

	{name: "an unlock of no key is refused", run: func(x *exam) {
		_, err := x.locks().Unlock(x.ctx, &v3lockpb.UnlockRequest{})
		x.wantError(err, status.Error(codes.Unknown, rpctypes.ErrorDesc(rpctypes.ErrGRPCEmptyKey)))
	}},
}
