package etcdapi

import (
	"context"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// authServer says that auth is off, which it always is: users, roles and permissions are not kept yet, and every
// method that would keep them is Unimplemented.
type authServer struct {
	s *Server
	pb.UnimplementedAuthServer
}

// firstAuthRevision is what an etcd reports in which auth was never changed.
const firstAuthRevision = 1

func (a *authServer) AuthStatus(context.Context, *pb.AuthStatusRequest) (*pb.AuthStatusResponse, error) {
	return &pb.AuthStatusResponse{Header: a.s.header(nil), Enabled: false, AuthRevision: firstAuthRevision}, nil
}

// Authenticate is refused as by an etcd whose auth is off. Clients that are given a user and a password go on without
// a token then.
func (a *authServer) Authenticate(context.Context, *pb.AuthenticateRequest) (*pb.AuthenticateResponse, error) {
	return nil, rpctypes.ErrGRPCAuthNotEnabled
}
