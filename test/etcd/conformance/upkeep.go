package conformance

import (
	"fmt"
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/test/etcd/start"
)

func (x *exam) status() *pb.StatusResponse {
	x.Helper()
	r, err := x.Maintenance.Status(x.ctx, &pb.StatusRequest{})
	x.must(err, &pb.StatusRequest{})
	return r
}

func (x *exam) defragment() {
	x.Helper()
	r, err := x.Maintenance.Defragment(x.ctx, &pb.DefragmentRequest{})
	x.must(err, &pb.DefragmentRequest{})
	same(x, "the answer", r, &pb.DefragmentResponse{})
}

// alarm asks for an action and returns the alarms that are answered, without their spelling of spaces.
func (x *exam) alarm(action pb.AlarmRequest_AlarmAction, alarm pb.AlarmType, member uint64) string {
	x.Helper()
	req := &pb.AlarmRequest{Action: action, Alarm: alarm, MemberID: member}
	r, err := x.Maintenance.Alarm(x.ctx, req)
	x.must(err, req)
	var all []string
	for _, a := range r.Alarms {
		all = append(all, fmt.Sprintf("%x %v", a.MemberID, a.Alarm))
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}

// downgrade asks what becomes of a downgrade.
func (x *exam) downgrade(action pb.DowngradeRequest_DowngradeAction, version string) (*pb.DowngradeResponse, error) {
	x.Helper()
	return x.Maintenance.Downgrade(x.ctx, &pb.DowngradeRequest{Action: action, Version: version})
}

// versionsKnown returns when an etcd that was just started has settled the version of its cluster and of its file.
func (x *exam) versionsKnown() {
	x.Helper()
	for {
		r, err := x.downgrade(pb.DowngradeRequest_CANCEL, "")
		x.must(err, &pb.DowngradeRequest{})
		if r.Version == "3.7" && x.status().StorageVersion != "" {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

const (
	activate   = pb.AlarmRequest_ACTIVATE
	deactivate = pb.AlarmRequest_DEACTIVATE
	list       = pb.AlarmRequest_GET
)

var upkeepCases = []testCase{
	{name: "Defragment changes nothing that a client can see", run: func(x *exam) {
		x.grant(7, 1000)
		for i := range 60 {
			x.put(fmt.Sprintf("k%d", i%20), strings.Repeat("v", 5000+i))
		}
		for i := range 15 {
			x.delete(fmt.Sprintf("k%d", i))
		}
		x.putRequest(&pb.PutRequest{Key: []byte("leased"), Lease: 7})
		head := x.revision()
		x.compact(head - 3)
		all := &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}
		before := x.rangeRequest(all)
		ask := &pb.HashKVRequest{Revision: head}
		hash, err := x.Maintenance.HashKV(x.ctx, ask)
		x.must(err, ask)
		size := x.status().DbSize
		x.defragment()
		x.defragment()
		same(x, "what is there", x.rangeRequest(all), before)
		again, err := x.Maintenance.HashKV(x.ctx, ask)
		x.must(err, ask)
		same(x, "the hash", again, hash)
		if now := x.status(); now.DbSize > size {
			x.Errorf("the database has %d bytes, before it had %d", now.DbSize, size)
		}
		equal(x, "the revision of the next put", x.put("k1", "").Header.Revision, head+1)
	}},

	{name: "a store that is full takes a small put after compaction, Defragment and disarming", options: start.Options{QuotaBytes: 13 * 4096}, run: func(x *exam) {
		x.put("first", strings.Repeat("a", 64))
		for refused := false; !refused; { // etcd notices when its file has grown, a moment later
			req := &pb.PutRequest{Key: []byte("second"), Value: []byte(strings.Repeat("b", 4096))}
			_, err := x.KV.Put(x.ctx, req)
			if refused = err != nil; refused {
				x.wantError(err, rpctypes.ErrGRPCNoSpace)
			}
		}
		alarm := x.alarm(list, 0, 0)
		var member uint64 // the one that noticed it
		if _, err := fmt.Sscanf(alarm, "%x NOSPACE", &member); err != nil {
			x.Fatalf("the alarms are %q", alarm)
		}
		_, err := x.KV.Put(x.ctx, &pb.PutRequest{Key: []byte("third"), Value: []byte(strings.Repeat("a", 64))})
		x.wantError(err, rpctypes.ErrGRPCNoSpace)
		x.defragment()
		equal(x, "the alarms after Defragment", x.alarm(list, 0, 0), alarm)
		x.compact(x.revision())
		x.defragment()
		x.alarm(deactivate, pb.AlarmType_NOSPACE, member)
		equal(x, "the alarms", x.alarm(list, 0, 0), "")
		x.put("fourth", strings.Repeat("a", 64))
	}},

	{name: "alarms are raised, listed and cleared by member and kind", run: func(x *exam) {
		equal(x, "raised", x.alarm(activate, pb.AlarmType_NOSPACE, 5), "5 NOSPACE")
		equal(x, "raised again", x.alarm(activate, pb.AlarmType_NOSPACE, 5), "5 NOSPACE")
		equal(x, "raised for another member", x.alarm(activate, pb.AlarmType_NOSPACE, 6), "6 NOSPACE")
		equal(x, "raised of another kind", x.alarm(activate, pb.AlarmType_CORRUPT, 5), "5 CORRUPT")
		equal(x, "raised of no kind", x.alarm(activate, pb.AlarmType_NONE, 5), "")
		equal(x, "all", x.alarm(list, pb.AlarmType_NONE, 0), "5 CORRUPT, 5 NOSPACE, 6 NOSPACE")
		equal(x, "all of a kind", x.alarm(list, pb.AlarmType_NOSPACE, 0), "5 NOSPACE, 6 NOSPACE")
		equal(x, "all of a kind, of whatever member", x.alarm(list, pb.AlarmType_CORRUPT, 6), "5 CORRUPT")
		_, err := x.KV.Put(x.ctx, &pb.PutRequest{Key: []byte("a")})
		x.wantError(err, rpctypes.ErrGRPCCorrupt)
		var errs []string
		for _, e := range x.status().Errors {
			errs = append(errs, strings.Join(strings.Fields(e), " "))
		}
		slices.Sort(errs)
		equal(x, "the errors in Status", strings.Join(errs, ", "), "memberID:5 alarm:CORRUPT, memberID:5 alarm:NOSPACE, memberID:6 alarm:NOSPACE")

		equal(x, "cleared", x.alarm(deactivate, pb.AlarmType_CORRUPT, 5), "5 CORRUPT")
		equal(x, "cleared again", x.alarm(deactivate, pb.AlarmType_CORRUPT, 5), "")
		equal(x, "cleared of no kind", x.alarm(deactivate, pb.AlarmType_NONE, 5), "")
		_, err = x.KV.Put(x.ctx, &pb.PutRequest{Key: []byte("a")})
		x.wantError(err, rpctypes.ErrGRPCNoSpace)
		equal(x, "cleared", x.alarm(deactivate, pb.AlarmType_NOSPACE, 5), "5 NOSPACE")
		_, err = x.KV.Put(x.ctx, &pb.PutRequest{Key: []byte("a")})
		x.wantError(err, rpctypes.ErrGRPCNoSpace)
		equal(x, "cleared of the other member", x.alarm(deactivate, pb.AlarmType_NOSPACE, 6), "6 NOSPACE")
		x.put("a", "")
	}},

	{name: "Status tells the version of the storage, and that nothing is downgraded", options: start.Options{QuotaBytes: -1}, run: func(x *exam) {
		x.versionsKnown()
		r := x.status()
		equal(x, "the storage version", r.StorageVersion, "3.7.0")
		same(x, "what is downgraded", r.DowngradeInfo, &pb.DowngradeInfo{})
		equal(x, "the quota", r.DbSizeQuota, -1)
		if r.DbSize <= 0 || r.DbSizeInUse <= 0 || r.DbSizeInUse > r.DbSize {
			x.Errorf("%d bytes of %d are in use", r.DbSizeInUse, r.DbSize)
		}
	}},

	{name: "a downgrade to what is not the minor version before is refused", run: func(x *exam) {
		x.versionsKnown()
		for version, want := range map[string]error{
			"": rpctypes.ErrGRPCWrongDowngradeVersionFormat, "3": rpctypes.ErrGRPCWrongDowngradeVersionFormat,
			"v3.6": rpctypes.ErrGRPCWrongDowngradeVersionFormat, "3.x": rpctypes.ErrGRPCWrongDowngradeVersionFormat,
			"3.6.1.2": rpctypes.ErrGRPCWrongDowngradeVersionFormat, "3.6-rc.0": rpctypes.ErrGRPCWrongDowngradeVersionFormat,
			"3.5": rpctypes.ErrGRPCInvalidDowngradeTargetVersion, "3.5.0": rpctypes.ErrGRPCInvalidDowngradeTargetVersion,
			"3.7": rpctypes.ErrGRPCInvalidDowngradeTargetVersion, "3.7.3": rpctypes.ErrGRPCInvalidDowngradeTargetVersion,
			"4.6": rpctypes.ErrGRPCInvalidDowngradeTargetVersion, "3.8.0-rc.0": rpctypes.ErrGRPCInvalidDowngradeTargetVersion,
		} {
			for _, action := range []pb.DowngradeRequest_DowngradeAction{pb.DowngradeRequest_VALIDATE, pb.DowngradeRequest_ENABLE} {
				_, err := x.downgrade(action, version)
				x.wantError(err, want)
				if status.Code(err) != status.Code(want) {
					x.Logf("that was %v of %q", action, version)
				}
			}
		}
		_, err := x.downgrade(9, "3.6")
		x.wantError(err, status.Error(codes.Unknown, "etcdserver: unknown method"))
		same(x, "what is downgraded", x.status().DowngradeInfo, &pb.DowngradeInfo{})
	}},

	{name: "to cancel a downgrade that there is not is no error", run: func(x *exam) {
		x.versionsKnown()
		r, err := x.downgrade(pb.DowngradeRequest_CANCEL, "whatever")
		x.must(err, &pb.DowngradeRequest{})
		equal(x, "the version", r.Version, "3.7")
		equal(x, "the header's revision", r.Header.GetRevision(), 1)
	}},
}
