package etcdapi

import (
	"context"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

type clusterServer struct {
	s                      *Server
	pb.UnsafeClusterServer // a new method of the service must break the build
}

// MemberList answers with this one member, and all the doors that it has. Like etcd's, its header has no revision.
func (c *clusterServer) MemberList(ctx context.Context, _ *pb.MemberListRequest) (*pb.MemberListResponse, error) {
	id := c.s.opts.Identity
	if f := c.s.opts.ClientURLs; f != nil {
		if urls := f(ctx); len(urls) > 0 {
			id.ClientURLs = urls
		}
	}
	return &pb.MemberListResponse{
		Header:  c.s.headerWithoutRevision(nil),
		Members: []*pb.Member{{ID: id.MemberID, Name: id.Name, PeerURLs: id.PeerURLs, ClientURLs: id.ClientURLs}},
	}, nil
}

var errOneMember = status.Error(codes.Unimplemented,
	"etcdserver: this server is the only member of its cluster; adding, removing, updating and promoting members is not supported")

func (c *clusterServer) MemberAdd(context.Context, *pb.MemberAddRequest) (*pb.MemberAddResponse, error) {
	return nil, errOneMember
}

func (c *clusterServer) MemberRemove(context.Context, *pb.MemberRemoveRequest) (*pb.MemberRemoveResponse, error) {
	return nil, errOneMember
}

func (c *clusterServer) MemberUpdate(context.Context, *pb.MemberUpdateRequest) (*pb.MemberUpdateResponse, error) {
	return nil, errOneMember
}

func (c *clusterServer) MemberPromote(context.Context, *pb.MemberPromoteRequest) (*pb.MemberPromoteResponse, error) {
	return nil, errOneMember
}
