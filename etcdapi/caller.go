package etcdapi

import (
	"context"
	"errors"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

// commonName is that of the client's certificate. Only a verified chain counts; a certificate that nobody checked
// (--client-cert-auth off) names whoever its bearer likes.
func commonName(ctx context.Context) (name string, verified bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return "", false
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return "", false
	}
	for _, chain := range info.State.VerifiedChains {
		if len(chain) > 0 {
			return chain[0].Subject.CommonName, true
		}
	}
	return "", false
}

// caller is who asks, as auth knows them: by the token of the call, else, with --client-cert-auth, by the common name of
// their certificate. While auth is off, and for whom it knows by neither, it is the zero Caller. A token that is not good is
// refused whatever else is known (etcd: AuthInfoFromCtx).
func (s *Server) caller(ctx context.Context, auth *backend.Auth) (backend.Caller, error) {
	if !auth.Enabled() {
		return backend.Caller{}, nil
	}
	md, ok := metadata.FromIncomingContext(ctx)
	if !ok {
		return backend.Caller{}, nil
	}
	tokens := md.Get(rpctypes.TokenFieldNameGRPC)
	if len(tokens) == 0 {
		tokens = md.Get(rpctypes.TokenFieldNameSwagger)
	}
	if len(tokens) > 0 {
		return s.opts.Tokens.caller(ctx, s, strings.TrimPrefix(tokens[0], "Bearer "), auth)
	}
	if name, verified := commonName(ctx); verified && s.opts.ClientCertAuth && len(md.Get("grpcgateway-accept")) == 0 {
		return backend.Caller{Name: name, Revision: auth.Revision()}, nil
	}
	return backend.Caller{}, nil
}

// command is req as its caller asks for it.
func (s *Server) command(ctx context.Context, req proto.Message) (backend.Command, error) {
	auth := s.opts.Backend.Auth()
	who, err := s.caller(ctx, auth)
	if err != nil {
		return backend.Command{}, err
	}
	if who.Revision == 0 {
		who.Name, _ = commonName(ctx) // for the history
		return backend.Command{Request: req, Author: who.Name}, nil
	}
	switch req.(type) {
	case *pb.PutRequest, *pb.DeleteRangeRequest, *pb.TxnRequest:
	default:
		// A JSON web token of an older revision is good for what is not about keys, as in etcd.
		who.Revision = max(who.Revision, auth.Revision())
	}
	return backend.Command{Request: req, Author: who.Name, AuthRevision: who.Revision}, nil
}

// permit checks the caller against auth.
func (s *Server) permit(ctx context.Context, auth *backend.Auth, check func(*backend.Auth, backend.Caller) error) error {
	if !auth.Enabled() {
		return nil
	}
	who, err := s.caller(ctx, auth)
	if err != nil {
		return err
	}
	return check(auth, who)
}

// guards are the methods that the caller must be allowed whatever the request says, and which change nothing in the store:
// what does is checked where it is committed (backend). Those of Auth are not here, they answer for themselves.
var guards = map[string]func(*backend.Auth, backend.Caller) error{
	pb.KV_Compact_FullMethodName:             (*backend.Auth).CheckAdmin,
	pb.Lease_LeaseGrant_FullMethodName:       (*backend.Auth).CheckKnown,
	pb.Lease_LeaseRevoke_FullMethodName:      (*backend.Auth).CheckKnown,
	pb.Lease_LeaseTimeToLive_FullMethodName:  (*backend.Auth).CheckKnown,
	pb.Lease_LeaseLeases_FullMethodName:      (*backend.Auth).CheckKnown,
	pb.Cluster_MemberAdd_FullMethodName:      (*backend.Auth).CheckAdmin,
	pb.Cluster_MemberRemove_FullMethodName:   (*backend.Auth).CheckAdmin,
	pb.Cluster_MemberUpdate_FullMethodName:   (*backend.Auth).CheckAdmin,
	pb.Cluster_MemberPromote_FullMethodName:  (*backend.Auth).CheckAdmin,
	pb.Cluster_MemberList_FullMethodName:     (*backend.Auth).CheckKnown,
	pb.Maintenance_Alarm_FullMethodName:      (*backend.Auth).CheckKnown,
	pb.Maintenance_Status_FullMethodName:     (*backend.Auth).CheckKnown,
	pb.Maintenance_Defragment_FullMethodName: (*backend.Auth).CheckAdmin,
	pb.Maintenance_Hash_FullMethodName:       (*backend.Auth).CheckAdmin,
	pb.Maintenance_HashKV_FullMethodName:     (*backend.Auth).CheckAdmin,
	pb.Maintenance_Snapshot_FullMethodName:   (*backend.Auth).CheckAdmin,
	pb.Maintenance_MoveLeader_FullMethodName: (*backend.Auth).CheckAdmin,
	pb.Maintenance_Downgrade_FullMethodName:  (*backend.Auth).CheckAdmin,
}

// guard refuses callers who may not call a method at all. req is nil for a stream.
func (s *Server) guard(ctx context.Context, method string, req any) error {
	auth := s.opts.Backend.Auth()
	if !auth.Enabled() {
		return nil
	}
	check := guards[method]
	if alarm, ok := req.(*pb.AlarmRequest); ok && alarm.Action != pb.AlarmRequest_GET {
		check = (*backend.Auth).CheckAdmin
	}
	if check == nil {
		return nil
	}
	return toStatus(s.permit(ctx, auth, check))
}

// PermitWatch says whether the caller of ctx may watch what req names: empty for yes, else why not, in etcd's words
// (v3rpc: recvLoop). It is asked once, when the watcher is created.
func (s *Server) PermitWatch(ctx context.Context, req *pb.WatchCreateRequest) (reason string) {
	key := req.Key
	if len(key) == 0 {
		key = []byte{0} // the smallest one
	}
	err := toStatus(s.permit(ctx, s.opts.Backend.Auth(), func(a *backend.Auth, who backend.Caller) error {
		return a.CheckRead(who, key, req.RangeEnd)
	}))
	if err == nil {
		return ""
	}
	for _, told := range []error{rpctypes.ErrGRPCInvalidAuthToken, rpctypes.ErrGRPCAuthOldRevision, rpctypes.ErrGRPCUserEmpty} {
		if errors.Is(err, told) {
			return told.Error()
		}
	}
	return rpctypes.ErrGRPCPermissionDenied.Error()
}
