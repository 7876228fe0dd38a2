package etcdapi

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

// The services over the real store: what the fake cannot show is that both sides mean the same.
func TestServicesOverTheRealBackend(t *testing.T) {
	ctx := t.Context()
	db, err := backend.OpenSQLite(ctx, filepath.Join(t.TempDir(), "quire.db"), backend.Options{MemberID: testMember})
	if err != nil {
		t.Fatal(err)
	}
	s := New(Options{
		Backend:  db,
		View:     func() View { return db.View() },
		Watcher:  failingWatcher{errors.New("not under test")},
		Identity: Identity{ClusterID: testCluster, MemberID: testMember},
	})
	conn := dial(t, s)
	kv, lease, maintenance := pb.NewKVClient(conn), pb.NewLeaseClient(conn), pb.NewMaintenanceClient(conn)

	const n = 200
	for i := range n {
		put, err := kv.Put(ctx, &pb.PutRequest{Key: fmt.Appendf(nil, "k%04d", i), Value: []byte(big)[:i*20]})
		if err != nil {
			t.Fatal(err)
		}
		checkHeader(t, put.Header, int64(i)+2)
	}
	all := &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}
	want, err := kv.Range(ctx, all)
	if err != nil || len(want.Kvs) != n || want.Count != n || want.Kvs[7].ModRevision != 9 || len(want.Kvs[7].Value) != 140 {
		t.Fatalf("range: %d keys of %d, %v", len(want.GetKvs()), want.GetCount(), err)
	}
	checkHeader(t, want.Header, n+1)
	for _, limit := range []int64{0, 1, 10, 57, n, n + 1} {
		all.Limit = limit
		if want, err = kv.Range(ctx, all); err != nil {
			t.Fatal(err)
		}
		chunks, err := streamAll(t, kv, all)
		if err != nil {
			t.Fatal(err)
		}
		got := new(pb.RangeResponse)
		for _, c := range chunks {
			proto.Merge(got, c)
		}
		if !proto.Equal(got, want) {
			t.Errorf("limit %d: the merged stream has %d keys, more %v, count %d; unary %d, %v, %d",
				limit, len(got.Kvs), got.More, got.Count, len(want.Kvs), want.More, want.Count)
		}
	}

	txn, err := kv.Txn(ctx, &pb.TxnRequest{
		Compare: []*pb.Compare{{Key: []byte("k0001"), Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: 3}}},
		Success: ops(opPut("k0001"), opRange("k0001")),
	})
	if err != nil || !txn.Succeeded || len(txn.Responses) != 2 || txn.Responses[1].GetResponseRange().Kvs[0].ModRevision != n+2 {
		t.Errorf("txn: %v, %v", txn, err)
	}
	checkHeader(t, txn.GetHeader(), n+2)
	read, err := kv.Txn(ctx, &pb.TxnRequest{Success: ops(opRange("k0001"), opTxn(ops(opRange("k0002")), nil))})
	if err != nil || !read.Succeeded || len(read.Responses) != 2 {
		t.Errorf("read-only txn: %v, %v", read, err)
	}
	checkHeader(t, read.GetHeader(), n+2)

	_, err = kv.Range(ctx, &pb.RangeRequest{Key: []byte("a"), Revision: 9999})
	checkErr(t, "future revision", err, rpctypes.ErrGRPCFutureRev)
	_, err = kv.Put(ctx, &pb.PutRequest{Key: []byte("none"), IgnoreValue: true})
	checkErr(t, "ignore_value", err, rpctypes.ErrGRPCKeyNotFound)
	_, err = kv.Put(ctx, &pb.PutRequest{Key: []byte("k"), Lease: 404})
	checkErr(t, "unknown lease", err, rpctypes.ErrGRPCLeaseNotFound)
	compact, err := kv.Compact(ctx, &pb.CompactionRequest{Revision: 50, Physical: true})
	if err != nil {
		t.Fatal(err)
	}
	checkHeader(t, compact.Header, n+2)
	_, err = kv.Compact(ctx, &pb.CompactionRequest{Revision: 50})
	checkErr(t, "compacted twice", err, rpctypes.ErrGRPCCompacted)
	_, err = kv.Range(ctx, &pb.RangeRequest{Key: []byte("a"), Revision: 49})
	checkErr(t, "compacted revision", err, rpctypes.ErrGRPCCompacted)

	grant, err := lease.LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: 1000})
	if err != nil || grant.ID <= 0 || grant.TTL != 1000 {
		t.Fatalf("grant: %v, %v", grant, err)
	}
	checkHeader(t, grant.Header, n+2)
	_, err = lease.LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: grant.ID, TTL: 1})
	checkErr(t, "grant twice", err, rpctypes.ErrGRPCLeaseExist)
	_, err = lease.LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: 1 << 60})
	checkErr(t, "too large a TTL", err, rpctypes.ErrGRPCLeaseTTLTooLarge)
	if _, err = kv.Put(ctx, &pb.PutRequest{Key: []byte("leased"), Lease: grant.ID}); err != nil {
		t.Fatal(err)
	}
	ttl, err := lease.LeaseTimeToLive(ctx, &pb.LeaseTimeToLiveRequest{ID: grant.ID, Keys: true})
	if err != nil || ttl.GrantedTTL != 1000 || len(ttl.Keys) != 1 || string(ttl.Keys[0]) != "leased" {
		t.Errorf("time to live: %v, %v", ttl, err)
	}
	alive, err := lease.LeaseKeepAlive(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for id, wantTTL := range map[int64]int64{grant.ID: 1000, 404: 0} {
		if err := alive.Send(&pb.LeaseKeepAliveRequest{ID: id}); err != nil {
			t.Fatal(err)
		}
		if got, err := alive.Recv(); err != nil || got.TTL != wantTTL {
			t.Errorf("keepalive: %v, %v; want TTL %d", got, err, wantTTL)
		}
	}
	revoke, err := lease.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: grant.ID})
	if err != nil {
		t.Fatal(err)
	}
	checkHeader(t, revoke.Header, n+4) // the leased put, and its deletion now
	_, err = lease.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: grant.ID})
	checkErr(t, "revoke twice", err, rpctypes.ErrGRPCLeaseNotFound)

	if _, err := maintenance.Alarm(ctx, &pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, Alarm: pb.AlarmType_NOSPACE, MemberID: testMember}); err != nil {
		t.Fatal(err)
	}
	_, err = kv.Put(ctx, &pb.PutRequest{Key: []byte("k")})
	checkErr(t, "put under NOSPACE", err, rpctypes.ErrGRPCNoSpace)
	status, err := maintenance.Status(ctx, &pb.StatusRequest{})
	wantErrors := []string{(&pb.AlarmMember{MemberID: testMember, Alarm: pb.AlarmType_NOSPACE}).String()}
	if err != nil || status.DbSize == 0 || status.DbSizeQuota == 0 || status.RaftIndex == 0 || !slices.Equal(status.Errors, wantErrors) {
		t.Errorf("status: %v, %v", status, err)
	}

	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = kv.Put(ctx, &pb.PutRequest{Key: []byte("k")})
	checkErr(t, "put after Close", err, rpctypes.ErrGRPCStopped)
}
