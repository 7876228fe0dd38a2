package etcdapi

import (
	"context"
	"net"
	"net/url"
	"slices"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/backend"
)

// Cluster is a cluster as one of its members sees and changes it. Errors are etcd's (rpctypes); each change answers
// with all members after it.
type Cluster interface {
	// Members is who belongs to the cluster, in the order of their ids: as this member knows it, or, linearizable, as of
	// a moment not before the call.
	Members(ctx context.Context, linearizable bool) ([]backend.Member, error)
	AddMember(ctx context.Context, peerURLs []string, learner bool) (added backend.Member, all []backend.Member, err error)
	RemoveMember(ctx context.Context, id uint64) (all []backend.Member, err error)
	UpdateMember(ctx context.Context, id uint64, peerURLs []string) (all []backend.Member, err error)
	PromoteMember(ctx context.Context, id uint64) (all []backend.Member, err error)
	// MoveLeader returns once the member to leads. REQUIRES: this member leads.
	MoveLeader(ctx context.Context, to uint64) error

	// Status is asked for at least once in every request: it is cheap.
	Status() ClusterStatus
	// LeaderChanged returns a channel that is closed when Status().Leader is another one than at the time of the call.
	LeaderChanged() <-chan struct{}
}

// ClusterStatus is what a member knows of itself and its cluster.
type ClusterStatus struct {
	ClusterID uint64
	ID        uint64 // of this member
	Leader    uint64 // 0: none
	Term      uint64
	Committed uint64 // indexes of the newest entries that are committed and applied
	Applied   uint64
	Learner   bool
}

type clusterServer struct {
	s                      *Server
	pb.UnsafeClusterServer // a new method of the service must break the build
}

// MemberList, like all of this service, answers with a header without a revision, as etcd does.
func (c *clusterServer) MemberList(ctx context.Context, req *pb.MemberListRequest) (*pb.MemberListResponse, error) {
	all, err := c.s.cluster.Members(ctx, req.Linearizable)
	if err != nil {
		return nil, toStatus(err)
	}
	return &pb.MemberListResponse{Header: c.s.headerWithoutRevision(nil), Members: membersOf(all)}, nil
}

func (c *clusterServer) MemberAdd(ctx context.Context, req *pb.MemberAddRequest) (*pb.MemberAddResponse, error) {
	urls, err := checkPeerURLs(req.PeerURLs)
	if err != nil {
		return nil, err
	}
	slices.Sort(urls) // as etcd does here, and not in MemberUpdate
	added, all, err := c.s.cluster.AddMember(ctx, urls, req.IsLearner)
	if err != nil {
		return nil, toStatus(err)
	}
	return &pb.MemberAddResponse{Header: c.s.headerWithoutRevision(nil), Member: memberOf(added), Members: membersOf(all)}, nil
}

func (c *clusterServer) MemberRemove(ctx context.Context, req *pb.MemberRemoveRequest) (*pb.MemberRemoveResponse, error) {
	all, err := c.s.cluster.RemoveMember(ctx, req.ID)
	if err != nil {
		return nil, toStatus(err)
	}
	return &pb.MemberRemoveResponse{Header: c.s.headerWithoutRevision(nil), Members: membersOf(all)}, nil
}

// MemberUpdate checks the URLs, which etcd does not: its members would panic over what they cannot dial.
func (c *clusterServer) MemberUpdate(ctx context.Context, req *pb.MemberUpdateRequest) (*pb.MemberUpdateResponse, error) {
	urls, err := checkPeerURLs(req.PeerURLs)
	if err != nil {
		return nil, err
	}
	all, err := c.s.cluster.UpdateMember(ctx, req.ID, urls)
	if err != nil {
		return nil, toStatus(err)
	}
	return &pb.MemberUpdateResponse{Header: c.s.headerWithoutRevision(nil), Members: membersOf(all)}, nil
}

func (c *clusterServer) MemberPromote(ctx context.Context, req *pb.MemberPromoteRequest) (*pb.MemberPromoteResponse, error) {
	all, err := c.s.cluster.PromoteMember(ctx, req.ID)
	if raft := c.s.cluster.Status(); raft.Leader == raft.ID { // as etcd counts
		c.s.metrics.promoted(err)
	}
	if err != nil {
		return nil, toStatus(err)
	}
	return &pb.MemberPromoteResponse{Header: c.s.headerWithoutRevision(nil), Members: membersOf(all)}, nil
}

func membersOf(all []backend.Member) []*pb.Member {
	out := make([]*pb.Member, len(all))
	for i, m := range all {
		out[i] = memberOf(m)
	}
	return out
}

func memberOf(m backend.Member) *pb.Member {
	return &pb.Member{ID: m.ID, Name: m.Name, PeerURLs: m.PeerURLs, ClientURLs: m.ClientURLs, IsLearner: m.Learner}
}

// checkPeerURLs returns the URLs in one way of writing them, or etcd's error (client/pkg/v3/types: NewURLs).
func checkPeerURLs(texts []string) ([]string, error) {
	if len(texts) == 0 {
		return nil, rpctypes.ErrGRPCMemberBadURLs
	}
	urls := make([]string, len(texts))
	for i, text := range texts {
		u, err := url.Parse(strings.TrimSpace(text))
		if err != nil {
			return nil, rpctypes.ErrGRPCMemberBadURLs
		}
		switch u.Scheme {
		case "http", "https":
			if _, _, err := net.SplitHostPort(u.Host); err != nil || u.Path != "" {
				return nil, rpctypes.ErrGRPCMemberBadURLs
			}
		case "unix", "unixs":
		default:
			return nil, rpctypes.ErrGRPCMemberBadURLs
		}
		urls[i] = u.String()
	}
	return urls, nil
}

// oneMember is a store that is no cluster's, whatever the number of processes on it: its only member, which leads.
type oneMember struct{ opts *Options }

// Members is this one member with all the doors that it has.
func (o oneMember) Members(ctx context.Context, _ bool) ([]backend.Member, error) {
	id := o.opts.Identity
	if f := o.opts.ClientURLs; f != nil {
		if urls := f(ctx); len(urls) > 0 {
			id.ClientURLs = urls
		}
	}
	return []backend.Member{{ID: id.MemberID, Name: id.Name, PeerURLs: id.PeerURLs, ClientURLs: id.ClientURLs}}, nil
}

func (oneMember) AddMember(context.Context, []string, bool) (backend.Member, []backend.Member, error) {
	return backend.Member{}, nil, errOneMember
}

func (oneMember) RemoveMember(context.Context, uint64) ([]backend.Member, error) {
	return nil, errOneMember
}

func (oneMember) UpdateMember(context.Context, uint64, []string) ([]backend.Member, error) {
	return nil, errOneMember
}

func (oneMember) PromoteMember(context.Context, uint64) ([]backend.Member, error) {
	return nil, errOneMember
}

func (o oneMember) MoveLeader(_ context.Context, to uint64) error {
	if to != o.opts.Identity.MemberID {
		return rpctypes.ErrGRPCBadLeaderTransferee
	}
	return nil
}

// Status has no indexes: Server.status takes the store's.
func (o oneMember) Status() ClusterStatus {
	id := &o.opts.Identity
	return ClusterStatus{ClusterID: id.ClusterID, ID: id.MemberID, Leader: id.MemberID, Term: OneMemberTerm}
}

func (oneMember) LeaderChanged() <-chan struct{} { return nil } // never

// OneMemberTerm is the Raft term where there is no Raft: that of a one-member etcd after its first start. It is not
// zero, and one byte long on the wire: etcd's own tests compare encoded headers.
const OneMemberTerm = 2

var errOneMember = status.Error(codes.Unimplemented,
	"etcdserver: this server is the only member of its cluster; adding, removing, updating and promoting members is not "+
		"supported by its storage (one in a SQLite file becomes the first member of a cluster by a start with --initial-cluster)")
