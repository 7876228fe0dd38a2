package conformance

import (
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/test/etcd/start"
)

// clientURLs are those of all processes that serve the store, sorted.
func clientURLs(x *exam) []string {
	urls := []string{"http://" + x.Address}
	for _, p := range x.Processes {
		urls = append(urls, "http://"+p.Address)
	}
	slices.Sort(urls)
	return slices.Compact(urls)
}

// isMember says whether a member has that id.
func (x *exam) isMember(id uint64) bool {
	r, err := x.Cluster.MemberList(x.ctx, &pb.MemberListRequest{})
	x.must(err, &pb.MemberListRequest{})
	return slices.ContainsFunc(r.Members, func(m *pb.Member) bool { return m.ID == id })
}

var clusterCases = []testCase{
	{name: "MemberList has the one member under the name, id and address it serves", run: func(x *exam) {
		if len(x.Processes) > 0 && start.OnRaft(x.T) {
			x.Skip("this cluster has several members; test/etcd/cluster looks at them")
		}
		for _, linearizable := range []bool{true, false} {
			r, err := x.Cluster.MemberList(x.ctx, &pb.MemberListRequest{Linearizable: linearizable})
			x.must(err, &pb.MemberListRequest{})
			if len(r.Members) != 1 {
				x.Fatalf("members are %v, want one", r.Members)
			}
			m := r.Members[0]
			equal(x, "name", m.Name, "default")
			equal(x, "id", m.ID, r.Header.MemberId)
			equal(x, "learner", m.IsLearner, false)
			if got := slices.Sorted(slices.Values(m.ClientURLs)); !slices.Equal(got, clientURLs(x)) {
				x.Errorf("client URLs are %v, want %v", got, clientURLs(x))
			}
			if len(m.PeerURLs) == 0 {
				x.Error("no peer URL")
			}
			if r.Header.ClusterId == 0 || r.Header.RaftTerm == 0 {
				x.Errorf("incomplete header %v", r.Header)
			}
		}
	}},

	{name: "etcd's own client syncs its endpoints", run: func(x *exam) {
		c := x.Client(x.T)
		if err := c.Sync(x.ctx); err != nil {
			x.Fatal(err)
		}
		if got := slices.Sorted(slices.Values(c.Endpoints())); !slices.Equal(got, clientURLs(x)) {
			x.Errorf("endpoints are %v, want %v", got, clientURLs(x))
		}
	}},
}
