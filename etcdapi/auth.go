package etcdapi

import (
	"context"
	"encoding/base64"
	"runtime"

	"go.etcd.io/etcd/api/v3/authpb"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/crypto/bcrypt"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

// authServer keeps users, roles and permissions, and gives out tokens. What changes something is checked and done by the
// backend, in one commit; passwords become hashes here and go no further.
type authServer struct {
	s                   *Server
	pb.UnsafeAuthServer // a new method of the service must break the build
	// hashing has room for as many passwords as are hashed at once. That takes tens of milliseconds each, and whoever can
	// connect may ask for it: a CPU is left for the rest.
	hashing chan struct{}
}

func newAuthServer(s *Server) *authServer {
	return &authServer{s: s, hashing: make(chan struct{}, max(runtime.GOMAXPROCS(0)-1, 1))}
}

// DefaultBcryptCost is etcd's: a password takes so long to check that few can be tried.
const DefaultBcryptCost = bcrypt.DefaultCost

func (a *authServer) AuthEnable(ctx context.Context, req *pb.AuthEnableRequest) (*pb.AuthEnableResponse, error) {
	return changeAuth[*pb.AuthEnableResponse](ctx, a.s, "AuthEnable", req)
}

func (a *authServer) AuthDisable(ctx context.Context, req *pb.AuthDisableRequest) (*pb.AuthDisableResponse, error) {
	return changeAuth[*pb.AuthDisableResponse](ctx, a.s, "AuthDisable", req)
}

// changeAuth is write for this service.
func changeAuth[Resp interface {
	proto.Message
	GetHeader() *pb.ResponseHeader
}](ctx context.Context, s *Server, kind string, req proto.Message) (resp Resp, err error) {
	if resp, err = write[Resp](ctx, s, kind, req); err == nil {
		s.header(resp.GetHeader())
	}
	return resp, err
}

// AuthStatus answers everybody, but for those with a token that is not good.
func (a *authServer) AuthStatus(ctx context.Context, _ *pb.AuthStatusRequest) (*pb.AuthStatusResponse, error) {
	auth, _, err := a.current(ctx)
	if err != nil {
		return nil, err
	}
	return &pb.AuthStatusResponse{Header: a.s.header(nil), Enabled: auth.Enabled(), AuthRevision: auth.Revision()}, nil
}

// Authenticate gives out a token for a user with a password.
func (a *authServer) Authenticate(ctx context.Context, req *pb.AuthenticateRequest) (*pb.AuthenticateResponse, error) {
	if err := a.s.ready(ctx, false); err != nil {
		return nil, toStatus(err)
	}
	for {
		auth := a.s.opts.Backend.Auth()
		if err := a.checkPassword(ctx, auth, req.Name, req.Password); err != nil {
			return nil, toStatus(err)
		}
		token, header, err := a.s.opts.Tokens.give(ctx, a.s, req.Name, auth)
		if err != nil {
			return nil, toStatus(err)
		}
		// The password may have been changed while it was compared.
		if a.s.opts.Backend.Auth().Revision() == auth.Revision() {
			return &pb.AuthenticateResponse{Header: a.s.header(header), Token: token}, nil
		}
	}
}

// checkPassword compares a password with the hash of the user's.
func (a *authServer) checkPassword(ctx context.Context, auth *backend.Auth, name, password string) (err error) {
	u := auth.User(name)
	switch {
	case !auth.Enabled():
		return backend.ErrAuthNotEnabled
	case u == nil:
		err = backend.ErrAuthFailed
	case u.Options.GetNoPassword():
		err = backend.ErrNoPasswordUser
	default:
		err = a.inTurn(ctx, func() error {
			if bcrypt.CompareHashAndPassword(u.Password, []byte(password)) != nil {
				return backend.ErrAuthFailed
			}
			return nil
		})
	}
	if f := a.s.opts.Hooks.AuthFailed; f != nil && err != nil && ctx.Err() == nil {
		f(cutOff(name), err)
	}
	return err
}

// hash is what is kept of a password.
func (a *authServer) hash(ctx context.Context, password string) (text string, err error) {
	err = a.inTurn(ctx, func() error {
		hash, err := bcrypt.GenerateFromPassword([]byte(password), a.s.opts.BcryptCost)
		text = base64.StdEncoding.EncodeToString(hash)
		return err
	})
	return text, toStatus(err)
}

// inTurn does what takes long.
func (a *authServer) inTurn(ctx context.Context, work func() error) error {
	select {
	case a.hashing <- struct{}{}:
		defer func() { <-a.hashing }()
		return work()
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (a *authServer) UserAdd(ctx context.Context, req *pb.AuthUserAddRequest) (*pb.AuthUserAddResponse, error) {
	kept := &pb.AuthUserAddRequest{Name: req.Name, Options: req.Options}
	if !req.Options.GetNoPassword() {
		var err error
		if kept.HashedPassword, err = a.hash(ctx, req.Password); err != nil {
			return nil, err
		}
	}
	return changeAuth[*pb.AuthUserAddResponse](ctx, a.s, "AuthUserAdd", kept)
}

func (a *authServer) UserDelete(ctx context.Context, req *pb.AuthUserDeleteRequest) (*pb.AuthUserDeleteResponse, error) {
	return changeAuth[*pb.AuthUserDeleteResponse](ctx, a.s, "AuthUserDelete", req)
}

// UserChangePassword with an empty password leaves the user one that nothing fits, as in etcd, or takes the hash given.
func (a *authServer) UserChangePassword(ctx context.Context, req *pb.AuthUserChangePasswordRequest) (*pb.AuthUserChangePasswordResponse, error) {
	kept := &pb.AuthUserChangePasswordRequest{Name: req.Name, HashedPassword: req.HashedPassword}
	if req.Password != "" {
		var err error
		if kept.HashedPassword, err = a.hash(ctx, req.Password); err != nil {
			return nil, err
		}
	}
	return changeAuth[*pb.AuthUserChangePasswordResponse](ctx, a.s, "AuthUserChangePassword", kept)
}

func (a *authServer) UserGrantRole(ctx context.Context, req *pb.AuthUserGrantRoleRequest) (*pb.AuthUserGrantRoleResponse, error) {
	return changeAuth[*pb.AuthUserGrantRoleResponse](ctx, a.s, "AuthUserGrantRole", req)
}

func (a *authServer) UserRevokeRole(ctx context.Context, req *pb.AuthUserRevokeRoleRequest) (*pb.AuthUserRevokeRoleResponse, error) {
	return changeAuth[*pb.AuthUserRevokeRoleResponse](ctx, a.s, "AuthUserRevokeRole", req)
}

func (a *authServer) RoleAdd(ctx context.Context, req *pb.AuthRoleAddRequest) (*pb.AuthRoleAddResponse, error) {
	return changeAuth[*pb.AuthRoleAddResponse](ctx, a.s, "AuthRoleAdd", req)
}

func (a *authServer) RoleDelete(ctx context.Context, req *pb.AuthRoleDeleteRequest) (*pb.AuthRoleDeleteResponse, error) {
	return changeAuth[*pb.AuthRoleDeleteResponse](ctx, a.s, "AuthRoleDelete", req)
}

func (a *authServer) RoleGrantPermission(ctx context.Context, req *pb.AuthRoleGrantPermissionRequest) (*pb.AuthRoleGrantPermissionResponse, error) {
	return changeAuth[*pb.AuthRoleGrantPermissionResponse](ctx, a.s, "AuthRoleGrantPermission", req)
}

func (a *authServer) RoleRevokePermission(ctx context.Context, req *pb.AuthRoleRevokePermissionRequest) (*pb.AuthRoleRevokePermissionResponse, error) {
	return changeAuth[*pb.AuthRoleRevokePermissionResponse](ctx, a.s, "AuthRoleRevokePermission", req)
}

// UserGet shows a user to root and to themselves.
func (a *authServer) UserGet(ctx context.Context, req *pb.AuthUserGetRequest) (*pb.AuthUserGetResponse, error) {
	auth, who, err := a.current(ctx)
	if err != nil {
		return nil, err
	}
	if err := auth.CheckAdmin(who); err != nil && req.Name != who.Name {
		return nil, toStatus(err)
	}
	u := auth.User(req.Name)
	if u == nil {
		return nil, toStatus(backend.ErrUserNotFound)
	}
	return &pb.AuthUserGetResponse{Header: a.s.header(nil), Roles: u.Roles}, nil
}

// RoleGet shows a role to root and to those who have it.
func (a *authServer) RoleGet(ctx context.Context, req *pb.AuthRoleGetRequest) (*pb.AuthRoleGetResponse, error) {
	auth, who, err := a.current(ctx)
	if err != nil {
		return nil, err
	}
	if err := auth.CheckAdmin(who); err != nil && !auth.HasRole(who.Name, req.Role) {
		return nil, toStatus(err)
	}
	r := auth.Role(req.Role)
	if r == nil {
		return nil, toStatus(backend.ErrRoleNotFound)
	}
	perms := r.KeyPermission
	if req.Role == backend.RootRole {
		perms = []*authpb.Permission{{PermType: authpb.Permission_READWRITE, Key: []byte{}, RangeEnd: []byte{0}}}
	}
	return &pb.AuthRoleGetResponse{Header: a.s.header(nil), Perm: perms}, nil
}

func (a *authServer) UserList(ctx context.Context, _ *pb.AuthUserListRequest) (*pb.AuthUserListResponse, error) {
	auth, who, err := a.current(ctx)
	if err == nil {
		err = toStatus(auth.CheckAdmin(who))
	}
	if err != nil {
		return nil, err
	}
	resp := &pb.AuthUserListResponse{Header: a.s.header(nil)}
	for _, u := range auth.Users() {
		resp.Users = append(resp.Users, string(u.Name))
	}
	return resp, nil
}

func (a *authServer) RoleList(ctx context.Context, _ *pb.AuthRoleListRequest) (*pb.AuthRoleListResponse, error) {
	auth, who, err := a.current(ctx)
	if err == nil {
		err = toStatus(auth.CheckAdmin(who))
	}
	if err != nil {
		return nil, err
	}
	resp := &pb.AuthRoleListResponse{Header: a.s.header(nil)}
	for _, r := range auth.Roles() {
		resp.Roles = append(resp.Roles, string(r.Name))
	}
	return resp, nil
}

// current is what is committed of users and roles, and who asks.
func (a *authServer) current(ctx context.Context) (*backend.Auth, backend.Caller, error) {
	if err := a.s.ready(ctx, false); err != nil {
		return nil, backend.Caller{}, toStatus(err)
	}
	auth := a.s.opts.Backend.Auth()
	who, err := a.s.caller(ctx, auth)
	return auth, who, toStatus(err)
}
