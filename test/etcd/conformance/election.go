package conformance

import (
	"context"
	"fmt"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func (x *exam) elections() v3electionpb.ElectionClient { return v3electionpb.NewElectionClient(x.Conn) }

func (x *exam) campaign(name string, lease int64, value string) *v3electionpb.LeaderKey {
	x.Helper()
	r := &v3electionpb.CampaignRequest{Name: []byte(name), Lease: lease, Value: []byte(value)}
	resp, err := x.elections().Campaign(x.ctx, r)
	x.must(err, r)
	if resp.Header.GetRevision() == 0 || resp.Header.GetMemberId() == 0 {
		x.Errorf("incomplete header %v", resp.Header)
	}
	return resp.Leader
}

func (x *exam) campaignLater(ctx context.Context, name string, lease int64, value string) <-chan outcome {
	x.Helper()
	done := make(chan outcome, 1)
	go func() {
		resp, err := x.elections().Campaign(ctx, &v3electionpb.CampaignRequest{Name: []byte(name), Lease: lease, Value: []byte(value)})
		done <- outcome{string(resp.GetLeader().GetKey()), err}
	}()
	x.appears(fmt.Sprintf("%s/%x", name, lease))
	return done
}

// led tells who leads and what was proclaimed.
func (x *exam) led(name string) string {
	x.Helper()
	r := &v3electionpb.LeaderRequest{Name: []byte(name)}
	resp, err := x.elections().Leader(x.ctx, r)
	x.must(err, r)
	return fmt.Sprintf("%s=%s", resp.Kv.Key, resp.Kv.Value)
}

func (x *exam) resign(leader *v3electionpb.LeaderKey) {
	x.Helper()
	r := &v3electionpb.ResignRequest{Leader: leader}
	_, err := x.elections().Resign(x.ctx, r)
	x.must(err, r)
}

var errNotLeader = status.Error(codes.Unknown, "election: not leader")

var electionCases = []testCase{
	{name: "a leader is elected, proclaims and resigns", run: func(x *exam) {
		x.grant(0xabc, 100)
		_, err := x.elections().Leader(x.ctx, &v3electionpb.LeaderRequest{Name: []byte("name")})
		x.wantError(err, status.Error(codes.Unknown, "election: no leader"))
		leader := x.campaign("name", 0xabc, "one")
		kv := x.get("name/abc")
		equal(x, "the leader", fmt.Sprint(string(leader.Name), string(leader.Key), leader.Rev, leader.Lease), fmt.Sprint("name", "name/abc", kv.CreateRevision, 0xabc))
		equal(x, "its lease", kv.Lease, 0xabc)
		equal(x, "who leads", x.led("name"), "name/abc=one")
		r := &v3electionpb.ProclaimRequest{Leader: leader, Value: []byte("two")}
		resp, err := x.elections().Proclaim(x.ctx, r)
		x.must(err, r)
		equal(x, "the revision of the proclamation", resp.Header.Revision, x.get("name/abc").ModRevision)
		equal(x, "who leads", x.led("name"), "name/abc=two")
		x.resign(leader)
		x.goes("name/abc")
		x.resign(leader) // of no effect
		_, err = x.elections().Proclaim(x.ctx, r)
		x.wantError(err, errNotLeader)
	}},

	{name: "the next in the queue leads when the leader resigns, or its lease ends", run: func(x *exam) {
		for id := int64(1); id <= 3; id++ {
			x.grant(id, 100)
		}
		first := x.campaign("name", 1, "one")
		second := x.campaignLater(x.ctx, "name", 2, "two")
		third := x.campaignLater(x.ctx, "name", 3, "three")
		x.waits(second)
		equal(x, "who leads", x.led("name"), "name/1=one")
		x.resign(first)
		x.ends(second, "name/2")
		equal(x, "who leads", x.led("name"), "name/2=two")
		x.waits(third)
		_, err := x.Lease.LeaseRevoke(x.ctx, &pb.LeaseRevokeRequest{ID: 2})
		x.must(err, &pb.LeaseRevokeRequest{ID: 2})
		x.ends(third, "name/3")
		equal(x, "who leads", x.led("name"), "name/3=three")
	}},

	{name: "who campaigns again with the same lease has the same place and the new value", run: func(x *exam) {
		x.grant(1, 100)
		before := x.campaign("name", 1, "one")
		again := x.campaign("name", 1, "two")
		equal(x, "the revision", again.Rev, before.Rev)
		equal(x, "who leads", x.led("name"), "name/1=two")
		x.campaign("name", 1, "two")
		equal(x, "versions", x.get("name/1").Version, 2)
	}},

	{name: "who goes away while campaigning leaves the queue", run: func(x *exam) {
		x.grant(1, 100)
		x.grant(2, 100)
		x.campaign("name", 1, "one")
		ctx, cancel := context.WithCancel(x.ctx)
		second := x.campaignLater(ctx, "name", 2, "two")
		cancel()
		x.fails(second, status.Error(codes.Canceled, "context canceled"))
		x.goes("name/2")
	}},

	{name: "an observer hears of leaders and proclamations", run: func(x *exam) {
		x.grant(1, 100)
		x.grant(2, 100)
		stream, err := x.elections().Observe(x.ctx, &v3electionpb.LeaderRequest{Name: []byte("name")})
		if err != nil {
			x.Fatal(err)
		}
		next := func(want string) {
			x.Helper()
			r, err := stream.Recv()
			if err != nil {
				x.Fatal(err)
			}
			equal(x, "observed", fmt.Sprintf("%s=%s at %d", r.Kv.Key, r.Kv.Value, r.Kv.ModRevision), want)
			if r.Header.GetRevision() < r.Kv.ModRevision {
				x.Errorf("the header %v is older than what it comes with", r.Header)
			}
		}
		first := x.campaign("name", 1, "one")
		next(fmt.Sprintf("name/1=one at %d", first.Rev))
		second := x.campaignLater(x.ctx, "name", 2, "two")
		r, err := x.elections().Proclaim(x.ctx, &v3electionpb.ProclaimRequest{Leader: first, Value: []byte("uno")})
		if err != nil {
			x.Fatal(err)
		}
		next(fmt.Sprintf("name/1=uno at %d", r.Header.Revision))
		x.resign(first)
		x.ends(second, "name/2")
		next(fmt.Sprintf("name/2=two at %d", x.get("name/2").ModRevision))
	}},

	{name: "an observer that comes late hears of the leader there is", run: func(x *exam) {
		x.grant(1, 100)
		x.campaign("name", 1, "one")
		stream, err := x.elections().Observe(x.ctx, &v3electionpb.LeaderRequest{Name: []byte("name")})
		if err != nil {
			x.Fatal(err)
		}
		r, err := stream.Recv()
		if err != nil {
			x.Fatal(err)
		}
		equal(x, "observed", fmt.Sprintf("%s=%s", r.Kv.Key, r.Kv.Value), "name/1=one")
	}},

	{name: "who names no leader, or one who does not lead, is refused", run: func(x *exam) {
		missing := status.Error(codes.Unknown, `"leader" field must be provided`)
		_, err := x.elections().Proclaim(x.ctx, &v3electionpb.ProclaimRequest{})
		x.wantError(err, missing)
		_, err = x.elections().Resign(x.ctx, &v3electionpb.ResignRequest{})
		x.wantError(err, missing)
		x.grant(1, 100)
		leader := x.campaign("name", 1, "one")
		leader.Rev--
		_, err = x.elections().Proclaim(x.ctx, &v3electionpb.ProclaimRequest{Leader: leader, Value: []byte("two")})
		x.wantError(err, errNotLeader)
		x.resign(leader) // does nothing
		equal(x, "who leads", x.led("name"), "name/1=one")
		_, err = x.elections().Campaign(x.ctx, &v3electionpb.CampaignRequest{Name: []byte("name"), Lease: 77})
		x.wantError(err, status.Error(codes.Unknown, rpctypes.ErrorDesc(rpctypes.ErrGRPCLeaseNotFound)))
	}},
}
