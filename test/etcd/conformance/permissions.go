package conformance

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/authpb"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// user makes a user with one role of these permissions, and returns their context.
func (x *exam) user(root context.Context, name string, perms ...*authpb.Permission) context.Context {
	x.Helper()
	x.addRole(root, name, perms...)
	x.addUser(root, name, name)
	return x.login(name)
}

func (x *exam) allowed(what string, err error) {
	x.Helper()
	if err != nil {
		x.Errorf("%s: %v, want it to be allowed", what, err)
	}
}

func (x *exam) denied(what string, err error) {
	x.Helper()
	if status.Convert(err).Message() != status.Convert(rpctypes.ErrGRPCPermissionDenied).Message() || status.Code(err) != codes.PermissionDenied {
		x.Errorf("%s: %v, want %v", what, err, rpctypes.ErrGRPCPermissionDenied)
	}
}

func (x *exam) tryGet(ctx context.Context, key, end string) error {
	_, err := x.KV.Range(ctx, &pb.RangeRequest{Key: []byte(key), RangeEnd: []byte(end)})
	return err
}

func (x *exam) tryPut(ctx context.Context, r *pb.PutRequest) error {
	_, err := x.KV.Put(ctx, r)
	return err
}

func (x *exam) tryDelete(ctx context.Context, key, end string, prev bool) error {
	_, err := x.KV.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(end), PrevKv: prev})
	return err
}

func (x *exam) tryTxn(ctx context.Context, r *pb.TxnRequest) error {
	_, err := x.KV.Txn(ctx, r)
	return err
}

// tryWatch creates a watcher, and returns why it was refused; empty: it was not.
func (x *exam) tryWatch(ctx context.Context, key, end string) string {
	x.Helper()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w, err := x.Watch.Watch(ctx)
	if err != nil {
		x.Fatal(err)
	}
	create := &pb.WatchCreateRequest{Key: []byte(key), RangeEnd: []byte(end)}
	if err := w.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: create}}); err != nil {
		x.Fatal(err)
	}
	resp, err := w.Recv()
	if err != nil {
		x.Fatal(err)
	}
	if resp.Canceled && (!resp.Created || resp.WatchId != -1) {
		x.Errorf("refused with %s", show(resp))
	}
	return resp.CancelReason
}

func (x *exam) tryKeepAlive(ctx context.Context, id int64) error {
	x.Helper()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := x.Lease.LeaseKeepAlive(ctx)
	if err != nil {
		x.Fatal(err)
	}
	if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: id}); err != nil {
		x.Fatal(err)
	}
	_, err = stream.Recv()
	return err
}

var permissionCases = []testCase{
	// CVE-2026-33413: leases, members, alarms and compactions were for everybody.
	{name: "who says nothing may read and write nothing", options: cheap, run: func(x *exam) {
		x.put("k", "v")
		x.enable()
		want := rpctypes.ErrGRPCUserEmpty
		x.wantError(x.tryGet(x.ctx, "k", ""), want)
		x.wantError(x.tryPut(x.ctx, &pb.PutRequest{Key: []byte("k")}), want)
		x.wantError(x.tryDelete(x.ctx, "k", "", false), want)
		x.wantError(x.tryTxn(x.ctx, &pb.TxnRequest{Success: []*pb.RequestOp{getOp("k")}}), want)
		x.wantError(x.tryTxn(x.ctx, &pb.TxnRequest{Success: []*pb.RequestOp{putOp("k", "v")}}), want)
		// A Txn without any operation asks for nothing.
		x.allowed("an empty Txn", x.tryTxn(x.ctx, &pb.TxnRequest{}))
		_, err := x.KV.Compact(x.ctx, &pb.CompactionRequest{Revision: 1})
		x.wantError(err, want)
		_, err = x.Lease.LeaseGrant(x.ctx, &pb.LeaseGrantRequest{TTL: 10})
		x.wantError(err, want)
		_, err = x.Lease.LeaseRevoke(x.ctx, &pb.LeaseRevokeRequest{ID: 1})
		x.wantError(err, want)
		_, err = x.Lease.LeaseTimeToLive(x.ctx, &pb.LeaseTimeToLiveRequest{ID: 1})
		x.wantError(err, want)
		_, err = x.Lease.LeaseLeases(x.ctx, &pb.LeaseLeasesRequest{})
		x.wantError(err, want)
		x.wantError(x.tryKeepAlive(x.ctx, 1), want)
		equal(x, "the watch is refused with", x.tryWatch(x.ctx, "k", ""), want.Error())
		_, err = x.Cluster.MemberList(x.ctx, &pb.MemberListRequest{})
		x.wantError(err, want)
		_, err = x.Maintenance.Status(x.ctx, &pb.StatusRequest{})
		x.wantError(err, want)
		_, err = x.Maintenance.Alarm(x.ctx, &pb.AlarmRequest{})
		x.wantError(err, want)
		stream, err := x.KV.RangeStream(x.ctx, &pb.RangeRequest{Key: []byte("k")})
		if err == nil {
			_, err = stream.Recv()
		}
		x.wantError(err, want)
	}},

	{name: "what only root may do", options: cheap, run: func(x *exam) {
		root := x.enable()
		u := x.user(root, "u", perm(readWrite, "\x00", "\x00"))
		for _, who := range []struct {
			ctx  context.Context
			want error
		}{{u, rpctypes.ErrGRPCPermissionDenied}, {x.ctx, rpctypes.ErrGRPCUserEmpty}} {
			_, err := x.KV.Compact(who.ctx, &pb.CompactionRequest{Revision: 1})
			x.wantError(err, who.want)
			_, err = x.Maintenance.Hash(who.ctx, &pb.HashRequest{})
			x.wantError(err, who.want)
			_, err = x.Maintenance.HashKV(who.ctx, &pb.HashKVRequest{})
			x.wantError(err, who.want)
			_, err = x.Maintenance.Defragment(who.ctx, &pb.DefragmentRequest{})
			x.wantError(err, who.want)
			_, err = x.Maintenance.MoveLeader(who.ctx, &pb.MoveLeaderRequest{TargetID: 1})
			x.wantError(err, who.want)
			_, err = x.Maintenance.Downgrade(who.ctx, &pb.DowngradeRequest{})
			x.wantError(err, who.want)
			_, err = x.Maintenance.Alarm(who.ctx, &pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, Alarm: pb.AlarmType_NOSPACE})
			x.wantError(err, who.want)
			_, err = x.Maintenance.Alarm(who.ctx, &pb.AlarmRequest{Action: pb.AlarmRequest_DEACTIVATE, Alarm: pb.AlarmType_NOSPACE})
			x.wantError(err, who.want)
			_, err = x.Cluster.MemberAdd(who.ctx, &pb.MemberAddRequest{PeerURLs: []string{"http://127.0.0.1:1"}})
			x.wantError(err, who.want)
			_, err = x.Cluster.MemberRemove(who.ctx, &pb.MemberRemoveRequest{ID: 1})
			x.wantError(err, who.want)
			_, err = x.Cluster.MemberUpdate(who.ctx, &pb.MemberUpdateRequest{ID: 1, PeerURLs: []string{"http://127.0.0.1:1"}})
			x.wantError(err, who.want)
			_, err = x.Cluster.MemberPromote(who.ctx, &pb.MemberPromoteRequest{ID: 1})
			x.wantError(err, who.want)
			snapshot, err := x.Maintenance.Snapshot(who.ctx, &pb.SnapshotRequest{})
			if err == nil {
				_, err = snapshot.Recv()
			}
			x.wantError(err, who.want)
		}
		_, err := x.Maintenance.HashKV(root, &pb.HashKVRequest{})
		x.must(err, &pb.HashKVRequest{})
		_, err = x.Maintenance.Status(u, &pb.StatusRequest{})
		x.must(err, &pb.StatusRequest{})
		_, err = x.Maintenance.Alarm(u, &pb.AlarmRequest{})
		x.must(err, &pb.AlarmRequest{})
		_, err = x.Cluster.MemberList(u, &pb.MemberListRequest{})
		x.must(err, &pb.MemberListRequest{})
	}},

	{name: "reading and writing are allowed apart", options: cheap, run: func(x *exam) {
		root := x.enable()
		r := x.user(root, "reader", perm(read, "k", ""))
		w := x.user(root, "writer", perm(writing, "k", ""))
		x.allowed("reading", x.tryGet(r, "k", ""))
		x.denied("reading another key", x.tryGet(r, "k2", ""))
		x.denied("reading more", x.tryGet(r, "k", "l"))
		x.denied("reading all that follows", x.tryGet(r, "k", "\x00"))
		x.denied("writing by a reader", x.tryPut(r, &pb.PutRequest{Key: []byte("k")}))
		x.denied("deleting by a reader", x.tryDelete(r, "k", "", false))
		x.allowed("writing", x.tryPut(w, &pb.PutRequest{Key: []byte("k")}))
		x.allowed("deleting", x.tryDelete(w, "k", "", false))
		x.denied("reading by a writer", x.tryGet(w, "k", ""))
		x.denied("deleting more", x.tryDelete(w, "k", "l", false))
		_, err := x.KV.Range(r, &pb.RangeRequest{Key: []byte("k"), Serializable: true})
		x.allowed("a serializable read", err)
		_, err = x.KV.Range(w, &pb.RangeRequest{Key: []byte("k"), Serializable: true})
		x.denied("a serializable read by a writer", err)
	}},

	// CVE-2026-44283: what a Put or a delete hands back is reading, in a Txn too.
	{name: "the previous value is for readers only", options: cheap, run: func(x *exam) {
		x.put("k", "secret")
		root := x.enable()
		w := x.user(root, "writer", perm(writing, "k", ""))
		prev := &pb.PutRequest{Key: []byte("k"), PrevKv: true}
		x.denied("Put with prev_kv", x.tryPut(w, prev))
		x.denied("DeleteRange with prev_kv", x.tryDelete(w, "k", "", true))
		x.denied("Put with prev_kv in a Txn", x.tryTxn(w, &pb.TxnRequest{Success: []*pb.RequestOp{putRequestOp(prev)}}))
		deletes := &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte("k"), PrevKv: true}}}
		x.denied("DeleteRange with prev_kv in a Txn", x.tryTxn(w, &pb.TxnRequest{Failure: []*pb.RequestOp{deletes}}))
		x.denied("the same in a Txn in a Txn", x.tryTxn(w, &pb.TxnRequest{Success: []*pb.RequestOp{txnOp(&pb.TxnRequest{Success: []*pb.RequestOp{putRequestOp(prev)}})}}))
		x.allowed("without", x.tryPut(w, &pb.PutRequest{Key: []byte("k")}))
	}},

	// CVE-2026-33343: what a Txn in a Txn did was not asked about.
	{name: "a Txn is allowed when all of it is, whichever branch is taken, however deep", options: cheap, run: func(x *exam) {
		x.put("secret", "s")
		root := x.enable()
		u := x.user(root, "u", perm(readWrite, "k", ""))
		mine := &pb.TxnRequest{
			Compare: []*pb.Compare{createdBefore("k", 100)},
			Success: []*pb.RequestOp{putOp("k", "1"), getOp("k")},
			Failure: []*pb.RequestOp{deleteOp("k", "")},
		}
		x.allowed("one's own", x.tryTxn(u, mine))
		for what, r := range map[string]*pb.TxnRequest{
			"a compare":                 {Compare: []*pb.Compare{createdBefore("secret", 100)}, Success: []*pb.RequestOp{putOp("k", "")}},
			"a compare alone":           {Compare: []*pb.Compare{createdBefore("secret", 100)}},
			"a compare of a range":      {Compare: []*pb.Compare{{Key: []byte("k"), RangeEnd: []byte("z"), Target: pb.Compare_VERSION, TargetUnion: &pb.Compare_Version{}}}},
			"a read":                    {Success: []*pb.RequestOp{getOp("secret")}},
			"a read, not taken":         {Failure: []*pb.RequestOp{getOp("secret")}},
			"a put":                     {Success: []*pb.RequestOp{putOp("secret", "")}},
			"a put, not taken":          {Failure: []*pb.RequestOp{putOp("secret", "")}},
			"a delete":                  {Success: []*pb.RequestOp{deleteOp("k", "z")}},
			"a nested compare":          {Success: []*pb.RequestOp{txnOp(&pb.TxnRequest{Compare: []*pb.Compare{createdBefore("secret", 100)}})}},
			"a nested read":             {Success: []*pb.RequestOp{txnOp(&pb.TxnRequest{Success: []*pb.RequestOp{getOp("secret")}})}},
			"a nested put, not taken":   {Success: []*pb.RequestOp{txnOp(&pb.TxnRequest{Failure: []*pb.RequestOp{putOp("secret", "")}})}},
			"a nested delete, beside":   {Success: []*pb.RequestOp{putOp("k", ""), txnOp(&pb.TxnRequest{Success: []*pb.RequestOp{deleteOp("secret", "")}})}},
			"a read in what only reads": {Compare: []*pb.Compare{createdBefore("k", 100)}, Success: []*pb.RequestOp{getOp("k"), getOp("secret")}},
		} {
			x.denied(what, x.tryTxn(u, r))
		}
		got := x.getAs(root, "secret")
		equal(x, "the secret", got, "s")
	}},

	{name: "ranges of several roles add up, and holes are holes", options: cheap, run: func(x *exam) {
		root := x.enable()
		u := x.user(root, "u", perm(read, "a", "c"), perm(read, "c", "e"), perm(read, "f", "g"), perm(read, "m", ""))
		x.addRole(root, "more", perm(read, "e", "f"), perm(read, "x", "\x00"))
		_, err := x.auth().UserGrantRole(root, &pb.AuthUserGrantRoleRequest{User: "u", Role: "more"})
		x.must(err, &pb.AuthUserGrantRoleRequest{})
		x.allowed("[a,g)", x.tryGet(u, "a", "g"))
		x.allowed("[b,d)", x.tryGet(u, "b", "d"))
		x.denied("[a,g\\0)", x.tryGet(u, "a", "g\x00"))
		x.denied("[f,n)", x.tryGet(u, "f", "n"))
		x.allowed("m", x.tryGet(u, "m", ""))
		x.allowed("[m,m\\0)", x.tryGet(u, "m", "m\x00"))
		x.allowed("x and all that follows", x.tryGet(u, "x", "\x00"))
		x.allowed("[y,z)", x.tryGet(u, "y", "z"))
		x.denied("everything", x.tryGet(u, "\x00", "\x00"))
		x.denied("w and all that follows", x.tryGet(u, "w", "\x00"))
	}},

	{name: "random permissions cover what lies within their union", options: cheap, run: func(x *exam) {
		seed := rand.Uint64()
		x.Logf("seed %d", seed)
		rnd := rand.New(rand.NewPCG(seed, 0))
		root := x.enable()
		letter := func() string { return string(rune('a' + rnd.IntN(8))) }
		any := func() (key, end string) {
			key = letter()
			switch rnd.IntN(8) {
			case 0, 1, 2:
			case 3:
				end = "\x00"
			default:
				end = letter()
			}
			if rnd.IntN(4) == 0 {
				key += "\x00"
			}
			return key, end
		}
		covers := func(p *authpb.Permission, at string) bool {
			key, end := string(p.Key), string(p.RangeEnd)
			switch end {
			case "":
				return at == key
			case "\x00":
				return at >= key
			}
			return at >= key && at < end
		}
		for round := range 12 {
			name := fmt.Sprint("u", round)
			var perms []*authpb.Permission
			for range 1 + rnd.IntN(4) {
				if key, end := any(); end == "" || end == "\x00" || key < end {
					perms = append(perms, perm(read, key, end))
				}
			}
			u := x.user(root, name, perms...)
			for range 40 {
				key, end := any()
				if end != "" && end != "\x00" && key >= end {
					continue // nothing lies in there: what etcd says depends on the shape of its tree
				}
				// All that matters are these points: letters, what follows them, and a last one for what has no end.
				want := true
				for _, at := range points() {
					if covers(&authpb.Permission{Key: []byte(key), RangeEnd: []byte(end)}, at) {
						one := false
						for _, p := range perms {
							one = one || covers(p, at)
						}
						want = want && one
					}
				}
				if err := x.tryGet(u, key, end); (err == nil) != want {
					x.Fatalf("%v: reading [%q,%q): %v, want allowed=%v", perms, key, end, err, want)
				}
			}
		}
	}},

	// GHSA-xg4h-6gfc-h4m8: a watch on one key's grant must not become one on all that follow.
	{name: "a watcher sees what its user may read, no more", options: cheap, run: func(x *exam) {
		root := x.enable()
		u := x.user(root, "u", perm(read, "k", ""), perm(read, "p", "q"), perm(writing, "w", ""))
		denied := rpctypes.ErrGRPCPermissionDenied.Error()
		equal(x, "the key", x.tryWatch(u, "k", ""), "")
		equal(x, "the prefix", x.tryWatch(u, "p", "q"), "")
		equal(x, "the key and all that follow", x.tryWatch(u, "k", "\x00"), denied)
		equal(x, "the key and one more", x.tryWatch(u, "k", "k\x00\x00"), denied)
		equal(x, "everything", x.tryWatch(u, "\x00", "\x00"), denied)
		equal(x, "without a key", x.tryWatch(u, "", ""), denied)
		equal(x, "without a key, all that follow", x.tryWatch(u, "", "\x00"), denied)
		equal(x, "a key that may be written", x.tryWatch(u, "w", ""), denied)
		equal(x, "root, everything", x.tryWatch(root, "\x00", "\x00"), "")
		equal(x, "root, without a key", x.tryWatch(root, "", "\x00"), "")
		equal(x, "a token of nobody", x.tryWatch(x.as("nobody.1"), "k", ""), rpctypes.ErrGRPCInvalidAuthToken.Error())
	}},

	// CVE-2026-44283: a Put in a Txn attached to any lease. CVE-2023-32082: LeaseTimeToLive showed all keys.
	{name: "a lease is for those who may write all of its keys", options: cheap, run: func(x *exam) {
		root := x.enable()
		u := x.user(root, "u", perm(readWrite, "u", ""))
		o := x.user(root, "o", perm(readWrite, "o", "p"))
		for _, id := range []int64{7, 8, 9} {
			_, err := x.Lease.LeaseGrant(u, &pb.LeaseGrantRequest{ID: id, TTL: 100})
			x.must(err, &pb.LeaseGrantRequest{})
		}
		x.allowed("attaching", x.tryPut(u, &pb.PutRequest{Key: []byte("u"), Lease: 7}))
		x.denied("attaching to a lease with another's key", x.tryPut(o, &pb.PutRequest{Key: []byte("o"), Lease: 7}))
		x.denied("the same in a Txn", x.tryTxn(o, &pb.TxnRequest{Success: []*pb.RequestOp{putRequestOp(&pb.PutRequest{Key: []byte("o"), Lease: 7})}}))
		x.denied("the same in a Txn in a Txn", x.tryTxn(o, &pb.TxnRequest{Success: []*pb.RequestOp{
			txnOp(&pb.TxnRequest{Failure: []*pb.RequestOp{putRequestOp(&pb.PutRequest{Key: []byte("o"), Lease: 7})}}),
		}}))
		_, err := x.Lease.LeaseRevoke(o, &pb.LeaseRevokeRequest{ID: 7})
		x.denied("revoking it", err)
		x.denied("prolonging it", x.tryKeepAlive(o, 7))
		_, err = x.Lease.LeaseTimeToLive(o, &pb.LeaseTimeToLiveRequest{ID: 7})
		x.allowed("asking for its time to live", err)
		_, err = x.Lease.LeaseTimeToLive(o, &pb.LeaseTimeToLiveRequest{ID: 7, Keys: true})
		x.denied("asking for its keys", err)
		_, err = x.Lease.LeaseLeases(o, &pb.LeaseLeasesRequest{})
		x.denied("listing all leases", err)
		_, err = x.Lease.LeaseLeases(u, &pb.LeaseLeasesRequest{})
		x.allowed("listing all leases by whom all keys are readable to", err)
		x.allowed("prolonging one's own", x.tryKeepAlive(u, 7))
		x.allowed("prolonging one without keys", x.tryKeepAlive(o, 8))
		x.allowed("prolonging one that is not there", x.tryKeepAlive(o, 99))
		_, err = x.Lease.LeaseRevoke(o, &pb.LeaseRevokeRequest{ID: 8})
		x.allowed("revoking one without keys", err)
		_, err = x.Lease.LeaseRevoke(u, &pb.LeaseRevokeRequest{ID: 7})
		x.allowed("revoking one's own", err)
		x.allowed("with root's keys", x.tryPut(root, &pb.PutRequest{Key: []byte("o"), Lease: 9}))
		x.allowed("attaching to it by whom its keys are writable to", x.tryPut(o, &pb.PutRequest{Key: []byte("o2"), Lease: 9}))
	}},

	{name: "a lease of another ends by itself, whoever wrote its keys", options: cheap, run: func(x *exam) {
		root := x.enable()
		u := x.user(root, "u", perm(readWrite, "u", ""))
		_, err := x.Lease.LeaseGrant(u, &pb.LeaseGrantRequest{ID: 7, TTL: 2})
		x.must(err, &pb.LeaseGrantRequest{})
		x.allowed("attaching", x.tryPut(u, &pb.PutRequest{Key: []byte("u"), Lease: 7}))
		for begin := time.Now(); x.getAs(root, "u") != "(none)"; time.Sleep(100 * time.Millisecond) {
			if time.Since(begin) > 20*time.Second {
				x.Fatal("the key is there after 20 s")
			}
		}
	}},

	{name: "a write that comes after its permission was taken away fails", options: cheap, run: func(x *exam) {
		root := x.enable()
		u := x.user(root, "u", perm(readWrite, "k", ""))
		var writers sync.WaitGroup
		var mu sync.Mutex
		last := int64(0)
		ctx, cancel := context.WithCancel(u)
		defer cancel()
		for range 8 {
			writers.Go(func() {
				for ctx.Err() == nil {
					resp, err := x.KV.Put(ctx, &pb.PutRequest{Key: []byte("k")})
					if err != nil {
						switch status.Convert(err).Message() {
						case status.Convert(rpctypes.ErrGRPCPermissionDenied).Message(), status.Convert(rpctypes.ErrGRPCAuthOldRevision).Message():
						default:
							x.Error(err)
						}
						return
					}
					mu.Lock()
					last = max(last, resp.Header.Revision)
					mu.Unlock()
				}
			})
		}
		time.Sleep(50 * time.Millisecond)
		r := &pb.AuthUserRevokeRoleRequest{Name: "u", Role: "u"}
		resp, err := x.auth().UserRevokeRole(root, r)
		x.must(err, r)
		writers.Wait()
		mu.Lock()
		defer mu.Unlock()
		if last > resp.Header.Revision {
			x.Errorf("a write at revision %d, the permission was gone at %d", last, resp.Header.Revision)
		}
	}},

	{name: "locks and elections are for those who may write their keys", options: cheap, run: func(x *exam) {
		root := x.enable()
		u := x.user(root, "u", perm(readWrite, "lock/", "lock0"), perm(readWrite, "vote/", "vote0"))
		asUnknown := func(err error) error { return status.Error(codes.Unknown, status.Convert(err).Message()) }
		got, err := x.locks().Lock(u, &v3lockpb.LockRequest{Name: []byte("lock")})
		x.must(err, &pb.PutRequest{})
		_, err = x.locks().Lock(u, &v3lockpb.LockRequest{Name: []byte("other")})
		x.wantError(err, asUnknown(rpctypes.ErrGRPCPermissionDenied))
		_, err = x.locks().Lock(x.ctx, &v3lockpb.LockRequest{Name: []byte("lock")})
		x.wantError(err, asUnknown(rpctypes.ErrGRPCUserEmpty))
		_, err = x.locks().Unlock(u, &v3lockpb.UnlockRequest{Key: []byte("other/1")})
		x.wantError(err, asUnknown(rpctypes.ErrGRPCPermissionDenied))
		_, err = x.locks().Unlock(u, &v3lockpb.UnlockRequest{Key: got.Key})
		x.must(err, &pb.PutRequest{})
		elections := v3electionpb.NewElectionClient(x.Conn)
		_, err = elections.Campaign(u, &v3electionpb.CampaignRequest{Name: []byte("vote"), Value: []byte("me")})
		x.must(err, &pb.PutRequest{})
		_, err = elections.Leader(u, &v3electionpb.LeaderRequest{Name: []byte("vote")})
		x.must(err, &pb.PutRequest{})
		_, err = elections.Leader(u, &v3electionpb.LeaderRequest{Name: []byte("other")})
		x.wantError(err, asUnknown(rpctypes.ErrGRPCPermissionDenied))
	}},

	{name: "the JSON gateway takes the token from the header Authorization", options: cheap, run: func(x *exam) {
		root := x.enable()
		x.user(root, "u", perm(readWrite, "k", ""))
		post := func(path, token, body string) (int, string) {
			x.Helper()
			req, err := http.NewRequestWithContext(x.ctx, http.MethodPost, x.URL(path), strings.NewReader(body))
			if err != nil {
				x.Fatal(err)
			}
			if token != "" {
				req.Header.Set("Authorization", token)
			}
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				x.Fatal(err)
			}
			defer resp.Body.Close()
			answer, err := io.ReadAll(resp.Body)
			if err != nil {
				x.Fatal(err)
			}
			// protobuf's JSON has a space here and there, as it likes.
			return resp.StatusCode, strings.ReplaceAll(string(bytes.TrimSpace(answer)), ", ", ",")
		}
		code, answer := post("/v3/auth/authenticate", "", `{"name":"u","password":"u"}`)
		equal(x, "the status of authenticate", code, http.StatusOK)
		_, token, _ := strings.Cut(answer, `"token":"`)
		token, _, _ = strings.Cut(token, `"`)
		if token == "" {
			x.Fatalf("no token in %s", answer)
		}
		for _, t := range []string{token, "Bearer " + token} {
			code, answer = post("/v3/kv/put", t, `{"key":"aw==","value":"dg=="}`)
			equal(x, "the status of a put, "+answer, code, http.StatusOK)
		}
		code, answer = post("/v3/kv/put", token, `{"key":"eA==","value":"dg=="}`)
		equal(x, "the status of a put that is denied", code, http.StatusForbidden)
		equal(x, "its body", answer, `{"code":7,"message":"etcdserver: permission denied"}`)
		code, answer = post("/v3/kv/put", "", `{"key":"aw==","value":"dg=="}`)
		equal(x, "the status of a put by nobody", code, http.StatusBadRequest)
		equal(x, "its body", answer, `{"code":3,"message":"etcdserver: user name is empty"}`)
		code, answer = post("/v3/kv/put", "wrong", `{"key":"aw==","value":"dg=="}`)
		equal(x, "the status of a put with a token of nobody", code, http.StatusUnauthorized)
		equal(x, "its body", answer, `{"code":16,"message":"etcdserver: invalid auth token"}`)
	}},

	{name: "health and version are for everybody", options: cheap, run: func(x *exam) {
		x.enable()
		x.wantPage("/health", http.StatusOK, `{"health":"true","reason":""}`)
		x.wantPage("/livez", http.StatusOK, "ok")
		x.wantPage("/readyz", http.StatusOK, "ok")
		if code, _ := x.page("/version"); code != http.StatusOK {
			x.Errorf("/version: %d", code)
		}
	}},
}

// getAs is a key's value, or "(none)".
func (x *exam) getAs(ctx context.Context, key string) string {
	x.Helper()
	r := &pb.RangeRequest{Key: []byte(key)}
	resp, err := x.KV.Range(ctx, r)
	x.must(err, r)
	if len(resp.Kvs) == 0 {
		return "(none)"
	}
	return string(resp.Kvs[0].Value)
}

func createdBefore(key string, rev int64) *pb.Compare {
	return &pb.Compare{Key: []byte(key), Result: pb.Compare_LESS, Target: pb.Compare_CREATE, TargetUnion: &pb.Compare_CreateRevision{CreateRevision: rev}}
}

// points are keys of which one lies in every part that two ranges with ends in 'a'…'h' can have in common.
func points() (all []string) {
	for c := 'a'; c <= 'i'; c++ {
		all = append(all, string(c), string(c)+"\x00", string(c)+"\x00\x00")
	}
	return all
}
