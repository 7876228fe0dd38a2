package conformance

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/authpb"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/test/etcd/start"
)

// cheap makes hashes of passwords quick: there are many here.
var cheap = start.Options{BcryptCost: 4}

func (x *exam) auth() pb.AuthClient { return pb.NewAuthClient(x.Conn) }

// as is the context of somebody with a token.
func (x *exam) as(token string) context.Context {
	return metadata.AppendToOutgoingContext(x.ctx, rpctypes.TokenFieldNameGRPC, token)
}

// login returns the context of a user whose password is their name.
func (x *exam) login(user string) context.Context {
	x.Helper()
	r := &pb.AuthenticateRequest{Name: user, Password: user}
	resp, err := x.auth().Authenticate(x.ctx, r)
	x.must(err, r)
	return x.as(resp.Token)
}

func (x *exam) addUser(ctx context.Context, name string, roles ...string) {
	x.Helper()
	r := &pb.AuthUserAddRequest{Name: name, Password: name}
	_, err := x.auth().UserAdd(ctx, r)
	x.must(err, r)
	for _, role := range roles {
		r := &pb.AuthUserGrantRoleRequest{User: name, Role: role}
		_, err := x.auth().UserGrantRole(ctx, r)
		x.must(err, r)
	}
}

func (x *exam) addRole(ctx context.Context, name string, perms ...*authpb.Permission) {
	x.Helper()
	r := &pb.AuthRoleAddRequest{Name: name}
	_, err := x.auth().RoleAdd(ctx, r)
	x.must(err, r)
	for _, p := range perms {
		r := &pb.AuthRoleGrantPermissionRequest{Name: name, Perm: p}
		_, err := x.auth().RoleGrantPermission(ctx, r)
		x.must(err, r)
	}
}

func perm(t authpb.Permission_Type, key, end string) *authpb.Permission {
	return &authpb.Permission{PermType: t, Key: []byte(key), RangeEnd: []byte(end)}
}

const (
	read      = authpb.Permission_READ
	writing   = authpb.Permission_WRITE
	readWrite = authpb.Permission_READWRITE
)

// enable makes the user root and switches auth on.
func (x *exam) enable() (root context.Context) {
	x.Helper()
	x.addUser(x.ctx, "root", "root")
	_, err := x.auth().AuthEnable(x.ctx, &pb.AuthEnableRequest{})
	x.must(err, &pb.AuthEnableRequest{})
	return x.login("root")
}

func (x *exam) authStatus() (enabled bool, revision uint64) {
	x.Helper()
	resp, err := x.auth().AuthStatus(x.ctx, &pb.AuthStatusRequest{})
	x.must(err, &pb.AuthStatusRequest{})
	if resp.Header.GetRevision() == 0 || resp.Header.GetMemberId() == 0 {
		x.Errorf("incomplete header %v", resp.Header)
	}
	return resp.Enabled, resp.AuthRevision
}

// secretFile stands in options for a file with a secret, which each case has of its own.
const secretFile = "SECRET-FILE"

// withSecret fills in the file. Its name is that of the case, in which there must be no comma: options are separated by them.
func withSecret(t *testing.T, o start.Options) start.Options {
	t.Helper()
	if !strings.Contains(o.AuthToken, secretFile) {
		return o
	}
	path := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(path, []byte("a secret of the tests"), 0o600); err != nil {
		t.Fatal(err)
	}
	o.AuthToken = strings.ReplaceAll(o.AuthToken, secretFile, path)
	return o
}

// jwtOptions are those of tokens that are signed with a secret.
func jwtOptions(ttl string) start.Options {
	return start.Options{BcryptCost: 4, AuthToken: "jwt,priv-key=" + secretFile + ",sign-method=HS256,ttl=" + ttl}
}

var errNoPasswordUser = status.Error(codes.Unknown, "auth: authentication failed, password was given for no password user")

var authCases = []testCase{
	{name: "auth is off at first, at revision 1", options: cheap, run: func(x *exam) {
		enabled, rev := x.authStatus()
		equal(x, "enabled", enabled, false)
		equal(x, "the auth revision", rev, 1)
		_, err := x.auth().Authenticate(x.ctx, &pb.AuthenticateRequest{Name: "root", Password: "root"})
		x.wantError(err, rpctypes.ErrGRPCAuthNotEnabled)
		_, err = x.auth().AuthDisable(x.ctx, &pb.AuthDisableRequest{})
		x.must(err, &pb.AuthDisableRequest{})
		_, rev = x.authStatus()
		equal(x, "the auth revision after it was switched off twice", rev, 1)
	}},

	{name: "enabling needs a user root with the role root", options: cheap, run: func(x *exam) {
		_, err := x.auth().AuthEnable(x.ctx, &pb.AuthEnableRequest{})
		x.wantError(err, rpctypes.ErrGRPCRootUserNotExist)
		x.addUser(x.ctx, "root")
		_, err = x.auth().AuthEnable(x.ctx, &pb.AuthEnableRequest{})
		x.wantError(err, rpctypes.ErrGRPCRootRoleNotExist)
		// The role needs not exist.
		_, err = x.auth().UserGrantRole(x.ctx, &pb.AuthUserGrantRoleRequest{User: "root", Role: "root"})
		x.must(err, &pb.AuthUserGrantRoleRequest{})
		_, before := x.authStatus()
		_, err = x.auth().AuthEnable(x.ctx, &pb.AuthEnableRequest{})
		x.must(err, &pb.AuthEnableRequest{})
		enabled, rev := x.authStatus()
		equal(x, "enabled", enabled, true)
		equal(x, "the auth revision, which enabling leaves", rev, before)
		root := x.login("root")
		_, err = x.auth().AuthEnable(root, &pb.AuthEnableRequest{})
		x.must(err, &pb.AuthEnableRequest{})
		_, err = x.auth().AuthDisable(root, &pb.AuthDisableRequest{})
		x.must(err, &pb.AuthDisableRequest{})
		enabled, rev = x.authStatus()
		equal(x, "enabled", enabled, false)
		equal(x, "the auth revision, which disabling raises", rev, before+1)
	}},

	{name: "each change of users, roles and permissions raises the auth revision by one, and no other revision", options: cheap, run: func(x *exam) {
		want := uint64(1)
		step := func(what string, by uint64, err error) {
			x.Helper()
			if err != nil {
				x.Fatalf("%s: %v", what, err)
			}
			want += by
			_, rev := x.authStatus()
			equal(x, "the auth revision after "+what, rev, want)
		}
		a := x.auth()
		_, err := a.UserAdd(x.ctx, &pb.AuthUserAddRequest{Name: "u", Password: "p"})
		step("UserAdd", 1, err)
		_, err = a.RoleAdd(x.ctx, &pb.AuthRoleAddRequest{Name: "r"})
		step("RoleAdd", 1, err)
		_, err = a.RoleGrantPermission(x.ctx, &pb.AuthRoleGrantPermissionRequest{Name: "r", Perm: perm(read, "k", "")})
		step("RoleGrantPermission", 1, err)
		_, err = a.RoleGrantPermission(x.ctx, &pb.AuthRoleGrantPermissionRequest{Name: "r", Perm: perm(read, "k", "")})
		step("the same RoleGrantPermission", 1, err)
		_, err = a.UserGrantRole(x.ctx, &pb.AuthUserGrantRoleRequest{User: "u", Role: "r"})
		step("UserGrantRole", 1, err)
		_, err = a.UserGrantRole(x.ctx, &pb.AuthUserGrantRoleRequest{User: "u", Role: "r"})
		step("the same UserGrantRole", 0, err)
		_, err = a.UserChangePassword(x.ctx, &pb.AuthUserChangePasswordRequest{Name: "u", Password: "q"})
		step("UserChangePassword", 1, err)
		_, err = a.UserRevokeRole(x.ctx, &pb.AuthUserRevokeRoleRequest{Name: "u", Role: "r"})
		step("UserRevokeRole", 1, err)
		_, err = a.RoleRevokePermission(x.ctx, &pb.AuthRoleRevokePermissionRequest{Role: "r", Key: []byte("k")})
		step("RoleRevokePermission", 1, err)
		_, err = a.RoleDelete(x.ctx, &pb.AuthRoleDeleteRequest{Role: "r"})
		step("RoleDelete", 1, err)
		_, err = a.UserDelete(x.ctx, &pb.AuthUserDeleteRequest{Name: "u"})
		step("UserDelete", 1, err)
		equal(x, "the store's revision", x.revision(), 1)
	}},

	{name: "users", options: cheap, run: func(x *exam) {
		a := x.auth()
		_, err := a.UserAdd(x.ctx, &pb.AuthUserAddRequest{})
		x.wantError(err, rpctypes.ErrGRPCUserEmpty)
		_, err = a.UserAdd(x.ctx, &pb.AuthUserAddRequest{Name: "long", Password: strings.Repeat("p", 73)})
		x.wantError(err, status.Error(codes.Unknown, "bcrypt: password length exceeds 72 bytes"))
		x.addUser(x.ctx, "b")
		x.addUser(x.ctx, "a\x00ä")
		x.addUser(x.ctx, "c")
		_, err = a.UserAdd(x.ctx, &pb.AuthUserAddRequest{Name: "b", Password: "x"})
		x.wantError(err, rpctypes.ErrGRPCUserAlreadyExist)
		list, err := a.UserList(x.ctx, &pb.AuthUserListRequest{})
		x.must(err, &pb.AuthUserListRequest{})
		if want := []string{"a\x00ä", "b", "c"}; !slices.Equal(list.Users, want) {
			x.Errorf("users %q, want %q", list.Users, want)
		}
		_, err = a.UserDelete(x.ctx, &pb.AuthUserDeleteRequest{Name: "c"})
		x.must(err, &pb.AuthUserDeleteRequest{})
		_, err = a.UserDelete(x.ctx, &pb.AuthUserDeleteRequest{Name: "c"})
		x.wantError(err, rpctypes.ErrGRPCUserNotFound)
		_, err = a.UserGet(x.ctx, &pb.AuthUserGetRequest{Name: "c"})
		x.wantError(err, rpctypes.ErrGRPCUserNotFound)
		_, err = a.UserChangePassword(x.ctx, &pb.AuthUserChangePasswordRequest{Name: "c", Password: "x"})
		x.wantError(err, rpctypes.ErrGRPCUserNotFound)
		_, err = a.UserGrantRole(x.ctx, &pb.AuthUserGrantRoleRequest{User: "c", Role: "none"})
		x.wantError(err, rpctypes.ErrGRPCUserNotFound)
		_, err = a.UserRevokeRole(x.ctx, &pb.AuthUserRevokeRoleRequest{Name: "c", Role: "none"})
		x.wantError(err, rpctypes.ErrGRPCUserNotFound)
	}},

	{name: "roles of users are sorted, and go with the role", options: cheap, run: func(x *exam) {
		a := x.auth()
		x.addUser(x.ctx, "u")
		_, err := a.UserGrantRole(x.ctx, &pb.AuthUserGrantRoleRequest{User: "u", Role: "none"})
		x.wantError(err, rpctypes.ErrGRPCRoleNotFound)
		for _, r := range []string{"z", "m", "a"} {
			x.addRole(x.ctx, r)
			_, err := a.UserGrantRole(x.ctx, &pb.AuthUserGrantRoleRequest{User: "u", Role: r})
			x.must(err, &pb.AuthUserGrantRoleRequest{})
		}
		wantRoles := func(want ...string) {
			x.Helper()
			got, err := a.UserGet(x.ctx, &pb.AuthUserGetRequest{Name: "u"})
			x.must(err, &pb.AuthUserGetRequest{})
			if !slices.Equal(got.Roles, want) {
				x.Errorf("roles %q, want %q", got.Roles, want)
			}
		}
		wantRoles("a", "m", "z")
		_, err = a.RoleDelete(x.ctx, &pb.AuthRoleDeleteRequest{Role: "m"})
		x.must(err, &pb.AuthRoleDeleteRequest{})
		wantRoles("a", "z")
		_, err = a.UserRevokeRole(x.ctx, &pb.AuthUserRevokeRoleRequest{Name: "u", Role: "m"})
		x.wantError(err, rpctypes.ErrGRPCRoleNotGranted)
		_, err = a.UserRevokeRole(x.ctx, &pb.AuthUserRevokeRoleRequest{Name: "u", Role: "a"})
		x.must(err, &pb.AuthUserRevokeRoleRequest{})
		wantRoles("z")
	}},

	{name: "roles and their permissions", options: cheap, run: func(x *exam) {
		a := x.auth()
		_, err := a.RoleAdd(x.ctx, &pb.AuthRoleAddRequest{})
		x.wantError(err, rpctypes.ErrGRPCRoleEmpty)
		x.addRole(x.ctx, "r", perm(read, "m", "z"), perm(writing, "c", ""), perm(readWrite, "d", "\x00"))
		_, err = a.RoleAdd(x.ctx, &pb.AuthRoleAddRequest{Name: "r"})
		x.wantError(err, rpctypes.ErrGRPCRoleAlreadyExist)
		want := func(perms ...*authpb.Permission) {
			x.Helper()
			got, err := a.RoleGet(x.ctx, &pb.AuthRoleGetRequest{Role: "r"})
			x.must(err, &pb.AuthRoleGetRequest{})
			same(x, "the role", &pb.AuthRoleGetResponse{Perm: got.Perm}, &pb.AuthRoleGetResponse{Perm: perms})
		}
		want(perm(writing, "c", ""), perm(readWrite, "d", "\x00"), perm(read, "m", "z"))
		_, err = a.RoleGrantPermission(x.ctx, &pb.AuthRoleGrantPermissionRequest{Name: "r", Perm: perm(read, "c", "")})
		x.must(err, &pb.AuthRoleGrantPermissionRequest{})
		want(perm(read, "c", ""), perm(readWrite, "d", "\x00"), perm(read, "m", "z"))
		_, err = a.RoleRevokePermission(x.ctx, &pb.AuthRoleRevokePermissionRequest{Role: "r", Key: []byte("d"), RangeEnd: []byte("e")})
		x.wantError(err, rpctypes.ErrGRPCPermissionNotGranted)
		_, err = a.RoleRevokePermission(x.ctx, &pb.AuthRoleRevokePermissionRequest{Role: "r", Key: []byte("d"), RangeEnd: []byte{0}})
		x.must(err, &pb.AuthRoleRevokePermissionRequest{})
		want(perm(read, "c", ""), perm(read, "m", "z"))

		_, err = a.RoleGrantPermission(x.ctx, &pb.AuthRoleGrantPermissionRequest{Name: "r"})
		x.wantError(err, rpctypes.ErrGRPCPermissionNotGiven)
		for _, p := range []*authpb.Permission{perm(read, "", "z"), perm(read, "b", "a"), perm(read, "b", "b"), perm(read, "", "\x00")} {
			_, err = a.RoleGrantPermission(x.ctx, &pb.AuthRoleGrantPermissionRequest{Name: "r", Perm: p})
			x.wantError(err, rpctypes.ErrGRPCInvalidAuthMgmt)
		}
		_, err = a.RoleGrantPermission(x.ctx, &pb.AuthRoleGrantPermissionRequest{Name: "none", Perm: perm(read, "a", "")})
		x.wantError(err, rpctypes.ErrGRPCRoleNotFound)
		_, err = a.RoleRevokePermission(x.ctx, &pb.AuthRoleRevokePermissionRequest{Role: "none", Key: []byte("a")})
		x.wantError(err, rpctypes.ErrGRPCRoleNotFound)
		_, err = a.RoleGet(x.ctx, &pb.AuthRoleGetRequest{Role: "none"})
		x.wantError(err, rpctypes.ErrGRPCRoleNotFound)
		_, err = a.RoleDelete(x.ctx, &pb.AuthRoleDeleteRequest{Role: "none"})
		x.wantError(err, rpctypes.ErrGRPCRoleNotFound)
	}},

	{name: "the role root shows that it may do everything", options: cheap, run: func(x *exam) {
		_, err := x.auth().RoleGet(x.ctx, &pb.AuthRoleGetRequest{Role: "root"})
		x.wantError(err, rpctypes.ErrGRPCRoleNotFound)
		x.addRole(x.ctx, "root")
		got, err := x.auth().RoleGet(x.ctx, &pb.AuthRoleGetRequest{Role: "root"})
		x.must(err, &pb.AuthRoleGetRequest{})
		same(x, "the role", &pb.AuthRoleGetResponse{Perm: got.Perm}, &pb.AuthRoleGetResponse{Perm: []*authpb.Permission{perm(readWrite, "", "\x00")}})
	}},

	{name: "root stays root while auth is on", options: cheap, run: func(x *exam) {
		x.addRole(x.ctx, "root")
		root := x.enable()
		_, err := x.auth().UserDelete(root, &pb.AuthUserDeleteRequest{Name: "root"})
		x.wantError(err, rpctypes.ErrGRPCInvalidAuthMgmt)
		_, err = x.auth().UserRevokeRole(root, &pb.AuthUserRevokeRoleRequest{Name: "root", Role: "root"})
		x.wantError(err, rpctypes.ErrGRPCInvalidAuthMgmt)
		_, err = x.auth().RoleDelete(root, &pb.AuthRoleDeleteRequest{Role: "root"})
		x.wantError(err, rpctypes.ErrGRPCInvalidAuthMgmt)
		_, err = x.auth().AuthDisable(root, &pb.AuthDisableRequest{})
		x.must(err, &pb.AuthDisableRequest{})
		_, err = x.auth().UserDelete(x.ctx, &pb.AuthUserDeleteRequest{Name: "root"})
		x.must(err, &pb.AuthUserDeleteRequest{})
	}},

	{name: "a password that is wrong, of nobody or of a user without one is refused", options: cheap, run: func(x *exam) {
		x.enable()
		_, err := x.auth().Authenticate(x.ctx, &pb.AuthenticateRequest{Name: "root", Password: "wrong"})
		x.wantError(err, rpctypes.ErrGRPCAuthFailed)
		_, err = x.auth().Authenticate(x.ctx, &pb.AuthenticateRequest{Name: "root"})
		x.wantError(err, rpctypes.ErrGRPCAuthFailed)
		_, err = x.auth().Authenticate(x.ctx, &pb.AuthenticateRequest{Name: "nobody", Password: "wrong"})
		x.wantError(err, rpctypes.ErrGRPCAuthFailed)
		_, err = x.auth().Authenticate(x.ctx, &pb.AuthenticateRequest{})
		x.wantError(err, rpctypes.ErrGRPCAuthFailed)
		r := &pb.AuthUserAddRequest{Name: "cert", Password: "ignored", Options: &authpb.UserAddOptions{NoPassword: true}}
		_, err = x.auth().UserAdd(x.login("root"), r)
		x.must(err, r)
		for _, password := range []string{"", "ignored"} {
			_, err = x.auth().Authenticate(x.ctx, &pb.AuthenticateRequest{Name: "cert", Password: password})
			x.wantError(err, errNoPasswordUser)
		}
	}},

	{name: "a user with an empty password can be made, and its password emptied for good", options: cheap, run: func(x *exam) {
		root := x.enable()
		_, err := x.auth().UserAdd(root, &pb.AuthUserAddRequest{Name: "u"})
		x.must(err, &pb.AuthUserAddRequest{})
		_, err = x.auth().Authenticate(x.ctx, &pb.AuthenticateRequest{Name: "u"})
		x.must(err, &pb.AuthenticateRequest{})
		_, err = x.auth().UserChangePassword(root, &pb.AuthUserChangePasswordRequest{Name: "u"})
		x.must(err, &pb.AuthUserChangePasswordRequest{})
		_, err = x.auth().Authenticate(x.ctx, &pb.AuthenticateRequest{Name: "u"})
		x.wantError(err, rpctypes.ErrGRPCAuthFailed)
	}},

	{name: "a simple token is sixteen letters and a number", options: cheap, run: func(x *exam) {
		x.enable()
		resp, err := x.auth().Authenticate(x.ctx, &pb.AuthenticateRequest{Name: "root", Password: "root"})
		x.must(err, &pb.AuthenticateRequest{})
		letters, number, _ := strings.Cut(resp.Token, ".")
		if len(letters) != 16 || number == "" || strings.Trim(number, "0123456789") != "" {
			x.Errorf("token %q", resp.Token)
		}
		equal(x, "the header's revision", resp.Header.GetRevision(), 1)
		again, err := x.auth().Authenticate(x.ctx, &pb.AuthenticateRequest{Name: "root", Password: "root"})
		x.must(err, &pb.AuthenticateRequest{})
		if again.Token == resp.Token {
			x.Error("the same token was given out twice")
		}
	}},

	{name: "a token that was never given out is refused, whatever is asked", options: cheap, run: func(x *exam) {
		x.enable()
		for _, token := range []string{"x", "", "abcdefghijklmnop.1", "a.b.c", "Bearer x"} {
			ctx := x.as(token)
			_, err := x.KV.Range(ctx, &pb.RangeRequest{Key: []byte("k")})
			x.wantError(err, rpctypes.ErrGRPCInvalidAuthToken)
			_, err = x.KV.Put(ctx, &pb.PutRequest{Key: []byte("k")})
			x.wantError(err, rpctypes.ErrGRPCInvalidAuthToken)
			_, err = x.auth().AuthStatus(ctx, &pb.AuthStatusRequest{})
			x.wantError(err, rpctypes.ErrGRPCInvalidAuthToken)
			_, err = x.Cluster.MemberList(ctx, &pb.MemberListRequest{})
			x.wantError(err, rpctypes.ErrGRPCInvalidAuthToken)
		}
	}},

	{name: "tokens come under either name, with and without Bearer", options: cheap, run: func(x *exam) {
		x.enable()
		resp, err := x.auth().Authenticate(x.ctx, &pb.AuthenticateRequest{Name: "root", Password: "root"})
		x.must(err, &pb.AuthenticateRequest{})
		for _, name := range []string{"token", "authorization"} {
			for _, prefix := range []string{"", "Bearer "} {
				_, err := x.KV.Put(metadata.AppendToOutgoingContext(x.ctx, name, prefix+resp.Token), &pb.PutRequest{Key: []byte("k")})
				x.must(err, &pb.PutRequest{})
			}
		}
	}},

	{name: "a token ends with another password, with its user, and with auth", options: cheap, run: func(x *exam) {
		root := x.enable()
		x.addUser(root, "u", "root")
		ctx := x.login("u")
		works := func(ctx context.Context) {
			x.Helper()
			_, err := x.KV.Range(ctx, &pb.RangeRequest{Key: []byte("k")})
			x.must(err, &pb.RangeRequest{})
		}
		ended := func(ctx context.Context) {
			x.Helper()
			_, err := x.KV.Range(ctx, &pb.RangeRequest{Key: []byte("k")})
			x.wantError(err, rpctypes.ErrGRPCInvalidAuthToken)
		}
		works(ctx)
		_, err := x.auth().UserChangePassword(root, &pb.AuthUserChangePasswordRequest{Name: "u", Password: "u"})
		x.must(err, &pb.AuthUserChangePasswordRequest{})
		ended(ctx)
		works(root)
		ctx = x.login("u")
		works(ctx)
		_, err = x.auth().UserRevokeRole(root, &pb.AuthUserRevokeRoleRequest{Name: "u", Role: "root"})
		x.must(err, &pb.AuthUserRevokeRoleRequest{})
		_, err = x.KV.Range(ctx, &pb.RangeRequest{Key: []byte("k")})
		x.wantError(err, rpctypes.ErrGRPCPermissionDenied)
		_, err = x.auth().UserDelete(root, &pb.AuthUserDeleteRequest{Name: "u"})
		x.must(err, &pb.AuthUserDeleteRequest{})
		ended(ctx)
		x.addUser(root, "u", "root")
		ended(ctx)
		ctx = x.login("u")
		_, err = x.auth().AuthDisable(root, &pb.AuthDisableRequest{})
		x.must(err, &pb.AuthDisableRequest{})
		works(ctx)
		_, err = x.auth().AuthEnable(ctx, &pb.AuthEnableRequest{})
		x.must(err, &pb.AuthEnableRequest{})
		ended(ctx)
		ended(root)
		works(x.login("root"))
	}},

	{name: "a token that is not used ends", options: start.Options{BcryptCost: 4, AuthTokenTTL: 2}, run: func(x *exam) {
		root := x.enable()
		for begin := time.Now(); time.Since(begin) < 3*time.Second; time.Sleep(300 * time.Millisecond) {
			_, err := x.KV.Range(root, &pb.RangeRequest{Key: []byte("k")})
			x.must(err, &pb.RangeRequest{})
		}
		time.Sleep(4 * time.Second)
		_, err := x.KV.Range(root, &pb.RangeRequest{Key: []byte("k")})
		x.wantError(err, rpctypes.ErrGRPCInvalidAuthToken)
	}},

	{name: "who only may see themselves", options: cheap, run: func(x *exam) {
		root := x.enable()
		x.addRole(root, "mine")
		x.addRole(root, "other")
		x.addUser(root, "u", "mine")
		u := x.login("u")
		_, err := x.auth().UserGet(u, &pb.AuthUserGetRequest{Name: "u"})
		x.must(err, &pb.AuthUserGetRequest{})
		_, err = x.auth().UserGet(u, &pb.AuthUserGetRequest{Name: "root"})
		x.wantError(err, rpctypes.ErrGRPCPermissionDenied)
		_, err = x.auth().UserGet(u, &pb.AuthUserGetRequest{Name: "none"})
		x.wantError(err, rpctypes.ErrGRPCPermissionDenied)
		_, err = x.auth().UserGet(x.ctx, &pb.AuthUserGetRequest{Name: "u"})
		x.wantError(err, rpctypes.ErrGRPCUserEmpty)
		_, err = x.auth().RoleGet(u, &pb.AuthRoleGetRequest{Role: "mine"})
		x.must(err, &pb.AuthRoleGetRequest{})
		_, err = x.auth().RoleGet(u, &pb.AuthRoleGetRequest{Role: "other"})
		x.wantError(err, rpctypes.ErrGRPCPermissionDenied)
		for _, who := range []struct {
			ctx  context.Context
			want error
		}{{u, rpctypes.ErrGRPCPermissionDenied}, {x.ctx, rpctypes.ErrGRPCUserEmpty}} {
			_, err = x.auth().UserList(who.ctx, &pb.AuthUserListRequest{})
			x.wantError(err, who.want)
			_, err = x.auth().RoleList(who.ctx, &pb.AuthRoleListRequest{})
			x.wantError(err, who.want)
			_, err = x.auth().UserAdd(who.ctx, &pb.AuthUserAddRequest{Name: "v"})
			x.wantError(err, who.want)
			_, err = x.auth().UserChangePassword(who.ctx, &pb.AuthUserChangePasswordRequest{Name: "u", Password: "v"})
			x.wantError(err, who.want)
			_, err = x.auth().UserGrantRole(who.ctx, &pb.AuthUserGrantRoleRequest{User: "u", Role: "root"})
			x.wantError(err, who.want)
			_, err = x.auth().RoleGrantPermission(who.ctx, &pb.AuthRoleGrantPermissionRequest{Name: "mine", Perm: perm(readWrite, "\x00", "\x00")})
			x.wantError(err, who.want)
			_, err = x.auth().AuthDisable(who.ctx, &pb.AuthDisableRequest{})
			x.wantError(err, who.want)
		}
	}},

	{name: "a JSON web token says who asks as of which auth revision", options: jwtOptions("1h"), run: func(x *exam) {
		root := x.enable()
		_, err := x.KV.Put(root, &pb.PutRequest{Key: []byte("k")})
		x.must(err, &pb.PutRequest{})
		resp, err := x.auth().Authenticate(x.ctx, &pb.AuthenticateRequest{Name: "root", Password: "root"})
		x.must(err, &pb.AuthenticateRequest{})
		equal(x, "points in the token", strings.Count(resp.Token, "."), 2)
		forged := resp.Token[:len(resp.Token)-4] + "AAAA"
		_, err = x.KV.Range(x.as(forged), &pb.RangeRequest{Key: []byte("k")})
		x.wantError(err, rpctypes.ErrGRPCInvalidAuthToken)
		x.addRole(root, "r")
		_, err = x.KV.Range(root, &pb.RangeRequest{Key: []byte("k")})
		x.wantError(err, rpctypes.ErrGRPCAuthOldRevision)
		_, err = x.KV.Put(root, &pb.PutRequest{Key: []byte("k")})
		x.wantError(err, rpctypes.ErrGRPCAuthOldRevision)
		// What needs root does not look at the revision.
		_, err = x.auth().UserList(root, &pb.AuthUserListRequest{})
		x.must(err, &pb.AuthUserListRequest{})
		_, err = x.KV.Range(x.login("root"), &pb.RangeRequest{Key: []byte("k")})
		x.must(err, &pb.RangeRequest{})
	}},

	{name: "a JSON web token ends", options: jwtOptions("1s"), run: func(x *exam) {
		root := x.enable()
		time.Sleep(2500 * time.Millisecond)
		_, err := x.KV.Range(root, &pb.RangeRequest{Key: []byte("k")})
		x.wantError(err, rpctypes.ErrGRPCInvalidAuthToken)
	}},
}
