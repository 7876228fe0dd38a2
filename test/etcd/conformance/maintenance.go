package conformance

import (
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"golang.org/x/mod/semver"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/test/etcd/start"
)

var maintenanceCases = []testCase{
	{name: "Status tells version, leader, term, indexes and sizes", options: start.Options{QuotaBytes: 1 << 30}, run: func(x *exam) {
		x.put("a", strings.Repeat("v", 100_000))
		r, err := x.Maintenance.Status(x.ctx, &pb.StatusRequest{})
		x.must(err, &pb.StatusRequest{})
		equal(x, "the header's revision", r.Header.Revision, 2)
		if semver.Compare("v"+r.Version, "v3.7.0") < 0 {
			x.Errorf("the version is %q, want 3.7.0 or later", r.Version)
		}
		list, err := x.Cluster.MemberList(x.ctx, &pb.MemberListRequest{})
		x.must(err, &pb.MemberListRequest{})
		if !slices.ContainsFunc(list.Members, func(m *pb.Member) bool { return m.ID == r.Leader }) {
			x.Errorf("the leader is %x, of the members %v", r.Leader, list.Members)
		}
		equal(x, "the term", r.RaftTerm, r.Header.RaftTerm)
		equal(x, "a learner", r.IsLearner, false)
		equal(x, "the quota", r.DbSizeQuota, 1<<30)
		equal(x, "errors", len(r.Errors), 0)
		if r.RaftIndex == 0 || r.RaftAppliedIndex == 0 || r.RaftAppliedIndex > r.RaftIndex {
			x.Errorf("indexes are %d and applied %d", r.RaftIndex, r.RaftAppliedIndex)
		}
		if r.StorageVersion == "" || r.DowngradeInfo == nil || r.DowngradeInfo.Enabled {
			x.Errorf("storage version %q, downgrade %v", r.StorageVersion, r.DowngradeInfo)
		}
		x.put("b", "")
		later, err := x.Maintenance.Status(x.ctx, &pb.StatusRequest{})
		x.must(err, &pb.StatusRequest{})
		if later.RaftAppliedIndex <= r.RaftAppliedIndex {
			x.Errorf("the applied index did not grow with a write: %d, then %d", r.RaftAppliedIndex, later.RaftAppliedIndex)
		}
	}},

	{name: "the sizes in Status grow with the data", run: func(x *exam) {
		// Random bytes, which no database stores in less room than they take.
		value := make([]byte, 200_000)
		rand.NewChaCha8([32]byte{}).Read(value)
		x.put("a", string(value))
		// etcd writes its database file behind the answer, every 100 ms.
		for {
			r, err := x.Maintenance.Status(x.ctx, &pb.StatusRequest{})
			x.must(err, &pb.StatusRequest{})
			if r.DbSizeInUse > r.DbSize {
				x.Fatalf("%d bytes are in use of %d", r.DbSizeInUse, r.DbSize)
			}
			if r.DbSizeInUse >= 200_000 {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	}},

	{name: "the default quota is 2 GiB", run: func(x *exam) {
		r, err := x.Maintenance.Status(x.ctx, &pb.StatusRequest{})
		x.must(err, &pb.StatusRequest{})
		equal(x, "the quota", r.DbSizeQuota, 2<<30)
	}},

	{name: "there are no alarms on a fresh store", run: func(x *exam) {
		r, err := x.Maintenance.Alarm(x.ctx, &pb.AlarmRequest{Action: pb.AlarmRequest_GET})
		x.must(err, &pb.AlarmRequest{})
		equal(x, "alarms", len(r.Alarms), 0)
		if r.Header.GetMemberId() == 0 {
			x.Errorf("incomplete header %v", r.Header)
		}
	}},

	{name: "an alarm raised by hand is listed, stops writes and ends by hand", run: func(x *exam) {
		status, err := x.Maintenance.Status(x.ctx, &pb.StatusRequest{})
		x.must(err, &pb.StatusRequest{})
		me := status.Header.MemberId
		raise := &pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, Alarm: pb.AlarmType_NOSPACE, MemberID: me}
		_, err = x.Maintenance.Alarm(x.ctx, raise)
		x.must(err, raise)
		list, err := x.Maintenance.Alarm(x.ctx, &pb.AlarmRequest{})
		x.must(err, &pb.AlarmRequest{})
		if len(list.Alarms) != 1 || list.Alarms[0].Alarm != pb.AlarmType_NOSPACE || list.Alarms[0].MemberID != me {
			x.Errorf("alarms are %v", list.Alarms)
		}
		after, err := x.Maintenance.Status(x.ctx, &pb.StatusRequest{})
		x.must(err, &pb.StatusRequest{})
		equal(x, "errors in Status", len(after.Errors), 1)
		end := &pb.AlarmRequest{Action: pb.AlarmRequest_DEACTIVATE, Alarm: pb.AlarmType_NOSPACE, MemberID: me}
		_, err = x.Maintenance.Alarm(x.ctx, end)
		x.must(err, end)
		x.put("a", "")
	}},

	{name: "HashKV is a number that follows from the history alone", run: func(x *exam) {
		ask := func(rev int64, hash uint32, compact int64) {
			x.Helper()
			r, err := x.Maintenance.HashKV(x.ctx, &pb.HashKVRequest{Revision: rev})
			x.must(err, &pb.HashKVRequest{Revision: rev})
			if rev == 0 {
				rev = r.Header.Revision
			}
			if r.Hash != hash || r.CompactRevision != compact || r.HashRevision != rev || r.Header.GetMemberId() == 0 {
				x.Errorf("the hash of revision %d, compacted at %d, is %v, want %d", rev, compact, r, hash)
			}
		}
		ask(0, 1084519789, -1)
		x.grant(7, 1000)
		x.put("a", "1")
		x.put("b", "")
		x.txn(&pb.TxnRequest{Success: []*pb.RequestOp{putOp("c", ""), deleteOp("b", ""), putOp("a", "")}})
		x.putRequest(&pb.PutRequest{Key: []byte("d\x00\xff"), Value: []byte("leased"), Lease: 7})
		x.deleteRequest(&pb.DeleteRangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
		x.put("a", "again")
		x.delete("a")
		x.put("c", "last")
		for i, hash := range []uint32{1084519789, 2587454935, 2496657716, 1543696425, 2893221802, 3269532146, 1785341192, 1091550242, 3687456380} {
			ask(int64(i+1), hash, -1)
		}
		ask(0, 3687456380, -1)
		x.compact(4)
		// Of the compaction revision itself etcd remembers, until it is restarted, what it was before.
		for i, hash := range []uint32{1401271407, 1729103079, 610025639, 1345488207, 1452270188} {
			ask(int64(i+5), hash, 4)
		}
		x.compact(6)
		for i, hash := range []uint32{4214247573, 1514729167, 1996583395} {
			ask(int64(i+7), hash, 6)
		}
		ask(0, 1996583395, 6)
		ask(-1, 1084519789, 6)
		for rev, want := range map[int64]error{1: rpctypes.ErrGRPCCompacted, 5: rpctypes.ErrGRPCCompacted, 10: rpctypes.ErrGRPCFutureRev} {
			_, err := x.Maintenance.HashKV(x.ctx, &pb.HashKVRequest{Revision: rev})
			x.wantError(err, want)
		}
	}},

	{name: "Hash changes with the store", run: func(x *exam) {
		seen := make(map[uint32]bool)
		for range 5 {
			x.put("a", "")
			r, err := x.Maintenance.Hash(x.ctx, &pb.HashRequest{})
			x.must(err, &pb.HashRequest{})
			equal(x, "a hash that was there before", seen[r.Hash], false)
			equal(x, "the revision", r.Header.GetRevision(), x.revision())
			seen[r.Hash] = true
		}
	}},

	{name: "the gRPC health service says SERVING for the server as a whole", run: func(x *exam) {
		r, err := x.Health.Check(x.ctx, &healthpb.HealthCheckRequest{})
		if err != nil {
			x.Fatal(err)
		}
		equal(x, "status", r.Status, healthpb.HealthCheckResponse_SERVING)
		_, err = x.Health.Check(x.ctx, &healthpb.HealthCheckRequest{Service: "no such service"})
		equal(x, "the code for an unknown service", status.Code(err), codes.NotFound)
	}},
}
