package conformance

import (
	"math/rand/v2"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
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
		equal(x, "the leader", r.Leader, r.Header.MemberId)
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
