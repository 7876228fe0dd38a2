package conformance

import (
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

func (x *exam) timeToLive(id int64) *pb.LeaseTimeToLiveResponse {
	x.Helper()
	r, err := x.Lease.LeaseTimeToLive(x.ctx, &pb.LeaseTimeToLiveRequest{ID: id, Keys: true})
	x.must(err, &pb.LeaseTimeToLiveRequest{ID: id})
	return r
}

func (x *exam) leases() (ids []int64) {
	x.Helper()
	r, err := x.Lease.LeaseLeases(x.ctx, &pb.LeaseLeasesRequest{})
	x.must(err, &pb.LeaseLeasesRequest{})
	for _, l := range r.Leases {
		ids = append(ids, l.ID)
	}
	return ids
}

func (x *exam) putLease(key string, lease int64) {
	x.Helper()
	x.putRequest(&pb.PutRequest{Key: []byte(key), Lease: lease})
}

// leaseKeys are the keys attached to a lease, sorted: etcd gives them in no order.
func (x *exam) leaseKeys(id int64) (keys []string) {
	x.Helper()
	for _, k := range x.timeToLive(id).Keys {
		keys = append(keys, string(k))
	}
	slices.Sort(keys)
	return keys
}

var leaseCases = []testCase{
	{name: "a grant answers the id and the time to live it was given", run: func(x *exam) {
		r := x.grant(77, 1000)
		equal(x, "id", r.ID, 77)
		equal(x, "time to live", r.TTL, 1000)
		equal(x, "the header's revision", r.Header.Revision, 1)
		l := x.timeToLive(77)
		equal(x, "granted", l.GrantedTTL, 1000)
		if l.TTL < 990 || l.TTL > 1000 {
			x.Errorf("%d seconds remain of 1000", l.TTL)
		}
		equal(x, "the store's revision", x.revision(), 1)
	}},

	{name: "a grant without id draws a new one each time", run: func(x *exam) {
		seen := make(map[int64]bool)
		for range 50 {
			r := x.grant(0, 1000)
			if r.ID <= 0 || seen[r.ID] {
				x.Fatalf("drawn id %d is not new and positive", r.ID)
			}
			seen[r.ID] = true
		}
		equal(x, "leases", len(x.leases()), 50)
	}},

	{name: "a time to live below the minimum is raised", run: func(x *exam) {
		for i, ttl := range []int64{1, 0, -5} {
			r := x.grant(int64(i+1), ttl)
			equal(x, "time to live", r.TTL, 2)
		}
	}},

	{name: "a grant with a used id or a senseless time is refused", run: func(x *exam) {
		x.grant(1, 1000)
		for _, c := range []struct {
			request *pb.LeaseGrantRequest
			want    error
		}{
			{&pb.LeaseGrantRequest{ID: 1, TTL: 5}, rpctypes.ErrGRPCLeaseExist},
			{&pb.LeaseGrantRequest{ID: 2, TTL: 9_000_000_001}, rpctypes.ErrGRPCLeaseTTLTooLarge},
		} {
			_, err := x.Lease.LeaseGrant(x.ctx, c.request)
			x.wantError(err, c.want)
		}
		equal(x, "the largest time to live", x.grant(3, 9_000_000_000).TTL, 9_000_000_000)
		equal(x, "a negative id", x.grant(-4, 100).ID, -4)
	}},

	{name: "a revoke deletes the keys at one revision", run: func(x *exam) {
		x.grant(1, 1000)
		x.putLease("b", 1)
		x.putLease("a", 1)
		x.put("c", "")
		w := x.watch(&pb.WatchCreateRequest{Key: []byte{0}, RangeEnd: []byte{0}, PrevKv: true})
		r, err := x.Lease.LeaseRevoke(x.ctx, &pb.LeaseRevokeRequest{ID: 1})
		x.must(err, &pb.LeaseRevokeRequest{})
		equal(x, "the revision", r.Header.Revision, 5)
		events := w.events(2)
		for i, key := range []string{"a", "b"} {
			e := events[i]
			if e.Type != mvccpb.Event_DELETE || string(e.Kv.Key) != key || e.Kv.ModRevision != 5 || e.PrevKv == nil {
				x.Errorf("event %d is %v, want the deletion of %s at 5 with its previous pair", i, e, key)
			}
		}
		wantKeys(x, x.rangeRequest(everything).Kvs, "c")
		equal(x, "leases", len(x.leases()), 0)
	}},

	{name: "a revoke without keys makes no revision; an unknown lease is an error", run: func(x *exam) {
		x.grant(1, 1000)
		r, err := x.Lease.LeaseRevoke(x.ctx, &pb.LeaseRevokeRequest{ID: 1})
		x.must(err, &pb.LeaseRevokeRequest{})
		equal(x, "the revision", r.Header.Revision, 1)
		for _, id := range []int64{1, 0, 99} {
			_, err = x.Lease.LeaseRevoke(x.ctx, &pb.LeaseRevokeRequest{ID: id})
			x.wantError(err, rpctypes.ErrGRPCLeaseNotFound)
		}
		x.grant(1, 1000)
	}},

	{name: "the time to live of an unknown lease is -1", run: func(x *exam) {
		l := x.timeToLive(404)
		equal(x, "id", l.ID, 404)
		equal(x, "time to live", l.TTL, -1)
		equal(x, "granted", l.GrantedTTL, 0)
		equal(x, "keys", len(l.Keys), 0)
	}},

	{name: "a key belongs to the lease of its last put", run: func(x *exam) {
		x.grant(1, 1000)
		x.grant(2, 1000)
		x.putLease("a", 1)
		x.putLease("b", 1)
		x.putLease("c", 1)
		if got := x.leaseKeys(1); !slices.Equal(got, []string{"a", "b", "c"}) {
			x.Errorf("keys are %q", got)
		}
		x.putLease("a", 2)
		x.put("b", "")
		x.delete("c")
		if got := x.leaseKeys(1); len(got) != 0 {
			x.Errorf("keys left on the first lease: %q", got)
		}
		if got := x.leaseKeys(2); !slices.Equal(got, []string{"a"}) {
			x.Errorf("keys of the second lease are %q", got)
		}
		r, err := x.Lease.LeaseTimeToLive(x.ctx, &pb.LeaseTimeToLiveRequest{ID: 2})
		x.must(err, &pb.LeaseTimeToLiveRequest{})
		equal(x, "keys when not asked for", len(r.Keys), 0)
		_, err = x.Lease.LeaseRevoke(x.ctx, &pb.LeaseRevokeRequest{ID: 1})
		x.must(err, &pb.LeaseRevokeRequest{})
		wantKeys(x, x.rangeRequest(everything).Kvs, "a", "b")
	}},

	{name: "leases are listed by their end, the first to end first", run: func(x *exam) {
		equal(x, "leases of a fresh store", len(x.leases()), 0)
		x.grant(1, 3000)
		x.grant(2, 1000)
		x.grant(3, 2000)
		if got := x.leases(); !slices.Equal(got, []int64{2, 3, 1}) {
			x.Errorf("leases are %v, want 2, 3, 1", got)
		}
	}},

	{name: "a keepalive answers the granted time and starts it anew", run: func(x *exam) {
		x.grant(1, 3)
		k, err := x.Lease.LeaseKeepAlive(x.ctx)
		x.must(err, &pb.LeaseKeepAliveRequest{})
		began := time.Now()
		// Longer than the lease would live by itself.
		for time.Since(began) < 5*time.Second {
			x.must(k.Send(&pb.LeaseKeepAliveRequest{ID: 1}), &pb.LeaseKeepAliveRequest{})
			r, err := k.Recv()
			x.must(err, &pb.LeaseKeepAliveRequest{})
			equal(x, "id", r.ID, 1)
			equal(x, "time to live", r.TTL, 3)
			time.Sleep(500 * time.Millisecond) // a client's pace
		}
		if l := x.timeToLive(1); l.TTL < 1 {
			x.Errorf("the lease has %d seconds left although it was kept alive", l.TTL)
		}
	}},

	{name: "a keepalive of an unknown or revoked lease answers 0 and the stream goes on", run: func(x *exam) {
		x.grant(1, 1000)
		k, err := x.Lease.LeaseKeepAlive(x.ctx)
		x.must(err, &pb.LeaseKeepAliveRequest{})
		ask := func(id int64) int64 {
			x.must(k.Send(&pb.LeaseKeepAliveRequest{ID: id}), &pb.LeaseKeepAliveRequest{})
			r, err := k.Recv()
			x.must(err, &pb.LeaseKeepAliveRequest{})
			equal(x, "id", r.ID, id)
			equal(x, "the header's revision", r.Header.Revision, 1)
			return r.TTL
		}
		equal(x, "an unknown lease", ask(404), 0)
		equal(x, "a lease", ask(1), 1000)
		_, err = x.Lease.LeaseRevoke(x.ctx, &pb.LeaseRevokeRequest{ID: 1})
		x.must(err, &pb.LeaseRevokeRequest{})
		equal(x, "a revoked lease", ask(1), 0)
	}},

	{name: "an expired lease is gone and its keys are deleted with events", run: func(x *exam) {
		x.grant(1, 2)
		x.grant(2, 1000)
		x.putLease("short", 1)
		x.putLease("long", 2)
		w := x.watch(&pb.WatchCreateRequest{Key: []byte{0}, RangeEnd: []byte{0}, PrevKv: true})
		granted := time.Now()
		e := w.events(1)[0]
		if e.Type != mvccpb.Event_DELETE || string(e.Kv.Key) != "short" || e.Kv.ModRevision != 4 {
			x.Errorf("the event is %v, want the deletion of short at revision 4", e)
		}
		same(x, "the previous pair", e.PrevKv, &mvccpb.KeyValue{Key: []byte("short"), CreateRevision: 2, ModRevision: 2, Version: 1, Lease: 1})
		if d := time.Since(granted); d < 1500*time.Millisecond || d > 8*time.Second {
			x.Errorf("a lease of 2s ended after %v", d)
		}
		equal(x, "the expired lease's time to live", x.timeToLive(1).TTL, -1)
		wantKeys(x, x.rangeRequest(everything).Kvs, "long")
	}},

	{name: "a put does not renew a lease", run: func(x *exam) {
		x.grant(1, 2)
		deadline := time.Now().Add(10 * time.Second)
		for n := 0; ; n++ {
			_, err := x.KV.Put(x.ctx, &pb.PutRequest{Key: []byte("k"), Lease: 1})
			if err != nil {
				x.wantError(err, rpctypes.ErrGRPCLeaseNotFound)
				break
			}
			if time.Now().After(deadline) {
				x.Fatalf("the lease lives on after %d puts", n)
			}
			time.Sleep(50 * time.Millisecond) // a client's pace
		}
		if x.get("k") != nil {
			x.Error("the key outlived its lease")
		}
	}},

	{name: "many keys of one lease go together", run: func(x *exam) {
		x.grant(1, 1000)
		const n = 1000
		for i := 0; i < n; i += 100 {
			t := &pb.TxnRequest{}
			for j := range 100 {
				t.Success = append(t.Success, putRequestOp(&pb.PutRequest{Key: []byte{byte((i + j) >> 8), byte(i + j), 'k'}, Lease: 1}))
			}
			x.txn(t)
		}
		equal(x, "keys of the lease", len(x.leaseKeys(1)), n)
		before := x.revision()
		_, err := x.Lease.LeaseRevoke(x.ctx, &pb.LeaseRevokeRequest{ID: 1})
		x.must(err, &pb.LeaseRevokeRequest{})
		equal(x, "keys left", x.rangeRequest(everything).Count, 0)
		equal(x, "the revision", x.revision(), before+1)
	}},
}
