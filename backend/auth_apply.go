package backend

import (
	"bytes"
	"encoding/base64"
	"slices"

	"go.etcd.io/etcd/api/v3/authpb"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// permit checks that who asks may do so, by the users and roles as the Commands before left them: nobody writes by a
// permission that was taken away first.
func (b *batch) permit(cmd *Command) error {
	a := b.st.auth
	if !a.enabled || cmd.AuthRevision == ByItself {
		return nil
	}
	who := Caller{Name: cmd.Author, Revision: cmd.AuthRevision}
	if who.Revision != 0 && who.Revision < a.revision {
		// Who was recognized by users and roles of before may not be who they were, whatever they ask for.
		return ErrAuthOldRevision
	}
	switch r := cmd.Request.(type) {
	case *pb.PutRequest:
		return a.checkPut(who, r, b.leaseKeys)
	case *pb.DeleteRangeRequest:
		return a.checkDelete(who, r)
	case *pb.TxnRequest:
		return a.checkTxn(who, r, b.leaseKeys)
	case *pb.LeaseGrantRequest:
		return a.CheckKnown(who)
	case *pb.LeaseRevokeRequest:
		return b.permitLease(who, r.ID)
	case *pb.LeaseKeepAliveRequest:
		return b.permitLease(who, r.ID)
	case *pb.InternalAuthenticateRequest:
		return nil
	}
	return a.CheckAdmin(who)
}

func (b *batch) permitLease(who Caller, id int64) error {
	if err := b.st.auth.CheckKnown(who); err != nil {
		return err
	}
	return b.st.auth.checkLease(who, id, b.leaseKeys)
}

func (b *batch) leaseKeys(id int64, each func(key []byte) error) error {
	l := b.db.leases.byID[id]
	if l == nil {
		return nil
	}
	for key := range l.keys {
		if err := each([]byte(key)); err != nil {
			return err
		}
	}
	return nil
}

// applyAuth runs a Command that is about users and roles; handled is false for any other.
func (b *batch) applyAuth(req proto.Message) (resp proto.Message, handled bool, err error) {
	switch r := req.(type) {
	case *pb.AuthEnableRequest:
		resp, err = &pb.AuthEnableResponse{Header: b.header()}, b.authEnable()
	case *pb.AuthDisableRequest:
		resp = &pb.AuthDisableResponse{Header: b.header()}
		b.authDisable()
	case *pb.InternalAuthenticateRequest:
		resp, err = &pb.AuthenticateResponse{Header: b.header()}, b.assignToken(r)
	case *pb.AuthUserAddRequest:
		resp, err = &pb.AuthUserAddResponse{Header: b.header()}, b.userAdd(r)
	case *pb.AuthUserDeleteRequest:
		resp, err = &pb.AuthUserDeleteResponse{Header: b.header()}, b.userDelete(r)
	case *pb.AuthUserChangePasswordRequest:
		resp, err = &pb.AuthUserChangePasswordResponse{Header: b.header()}, b.userChangePassword(r)
	case *pb.AuthUserGrantRoleRequest:
		resp, err = &pb.AuthUserGrantRoleResponse{Header: b.header()}, b.userGrantRole(r)
	case *pb.AuthUserRevokeRoleRequest:
		resp, err = &pb.AuthUserRevokeRoleResponse{Header: b.header()}, b.userRevokeRole(r)
	case *pb.AuthRoleAddRequest:
		resp, err = &pb.AuthRoleAddResponse{Header: b.header()}, b.roleAdd(r)
	case *pb.AuthRoleDeleteRequest:
		resp, err = &pb.AuthRoleDeleteResponse{Header: b.header()}, b.roleDelete(r)
	case *pb.AuthRoleGrantPermissionRequest:
		resp, err = &pb.AuthRoleGrantPermissionResponse{Header: b.header()}, b.roleGrantPermission(r)
	case *pb.AuthRoleRevokePermissionRequest:
		resp, err = &pb.AuthRoleRevokePermissionResponse{Header: b.header()}, b.roleRevokePermission(r)
	default:
		return nil, false, nil
	}
	if err != nil {
		return nil, true, err
	}
	return resp, true, nil
}

// changeAuth makes users and roles what is given, nil: gone, and counts the change.
func (b *batch) changeAuth(users map[string]*authpb.User, roles map[string]*authpb.Role) {
	b.st.auth = b.st.auth.with(users, roles)
	b.st.auth.revision++
}

func (b *batch) changeUser(u *authpb.User) {
	b.changeAuth(map[string]*authpb.User{string(u.Name): u}, nil)
}

func (b *batch) changeRole(r *authpb.Role) {
	b.changeAuth(nil, map[string]*authpb.Role{string(r.Name): r})
}

// authEnable counts as no change of the auth revision; authDisable does (etcd: AuthEnable, AuthDisable).
func (b *batch) authEnable() error {
	a := b.st.auth
	if a.enabled {
		return nil
	}
	root := a.users[rootUser]
	switch {
	case root == nil:
		return ErrRootUserNotExist
	case !root.root:
		return ErrRootRoleNotExist
	}
	next := *a
	next.enabled = true
	b.st.auth = &next
	return nil
}

func (b *batch) authDisable() {
	if !b.st.auth.enabled {
		return
	}
	next := *b.st.auth
	next.enabled = false
	next.revision++
	next.epoch++
	b.st.auth = &next
}

// assignToken makes a token, of which the request has only the hash, that of a user whose password etcdapi has checked.
func (b *batch) assignToken(r *pb.InternalAuthenticateRequest) error {
	a := b.st.auth
	if !a.enabled {
		return ErrAuthNotEnabled
	}
	u := a.users[r.Name]
	if u == nil || u.Options.GetNoPassword() {
		return ErrAuthFailed
	}
	b.tokens = append(b.tokens, a.token(r.SimpleToken, r.Name))
	return nil
}

// password reads the hash that etcdapi has made of a password.
func password(hashed string) ([]byte, error) {
	hash, err := base64.StdEncoding.DecodeString(hashed)
	if err != nil {
		return nil, ErrNoPasswordUser // etcd's answer to what is no hash
	}
	return hash, nil
}

func (b *batch) userAdd(r *pb.AuthUserAddRequest) (err error) {
	switch {
	case r.Name == "":
		return ErrUserEmpty
	case b.st.auth.users[r.Name] != nil:
		return ErrUserExists
	}
	u := &authpb.User{Name: []byte(r.Name), Options: &authpb.UserAddOptions{NoPassword: r.Options.GetNoPassword()}}
	if !u.Options.NoPassword {
		if u.Password, err = password(r.HashedPassword); err != nil {
			return err
		}
	}
	b.changeUser(u)
	return nil
}

func (b *batch) userDelete(r *pb.AuthUserDeleteRequest) error {
	a := b.st.auth
	switch {
	case a.enabled && r.Name == rootUser:
		return ErrInvalidAuthMgmt
	case a.users[r.Name] == nil:
		return ErrUserNotFound
	}
	b.changeAuth(map[string]*authpb.User{r.Name: nil}, nil)
	return nil
}

func (b *batch) userChangePassword(r *pb.AuthUserChangePasswordRequest) (err error) {
	u := b.st.auth.users[r.Name]
	if u == nil {
		return ErrUserNotFound
	}
	next := &authpb.User{Name: u.Name, Roles: u.Roles, Options: u.Options}
	if !u.Options.GetNoPassword() {
		if next.Password, err = password(r.HashedPassword); err != nil {
			return err
		}
	}
	b.changeUser(next)
	return nil
}

func (b *batch) userGrantRole(r *pb.AuthUserGrantRoleRequest) error {
	a := b.st.auth
	u := a.users[r.User]
	switch {
	case u == nil:
		return ErrUserNotFound
	case r.Role != RootRole && a.roles[r.Role] == nil:
		return ErrRoleNotFound
	}
	at, has := slices.BinarySearch(u.Roles, r.Role)
	if has {
		return nil // nothing has changed
	}
	b.changeUser(&authpb.User{
		Name: u.Name, Password: u.Password, Options: u.Options, Roles: slices.Insert(slices.Clone(u.Roles), at, r.Role),
	})
	return nil
}

// withoutRole returns the user without a role, or nil where they do not have it.
func withoutRole(u *authpb.User, role string) *authpb.User {
	at, has := slices.BinarySearch(u.Roles, role)
	if !has {
		return nil
	}
	return &authpb.User{
		Name: u.Name, Password: u.Password, Options: u.Options, Roles: slices.Delete(slices.Clone(u.Roles), at, at+1),
	}
}

func (b *batch) userRevokeRole(r *pb.AuthUserRevokeRoleRequest) error {
	a := b.st.auth
	u := a.users[r.Name]
	switch {
	case a.enabled && r.Name == rootUser && r.Role == RootRole:
		return ErrInvalidAuthMgmt
	case u == nil:
		return ErrUserNotFound
	}
	next := withoutRole(u.User, r.Role)
	if next == nil {
		return ErrRoleNotGranted
	}
	b.changeUser(next)
	return nil
}

func (b *batch) roleAdd(r *pb.AuthRoleAddRequest) error {
	switch {
	case r.Name == "":
		return ErrRoleEmpty
	case b.st.auth.roles[r.Name] != nil:
		return ErrRoleExists
	}
	b.changeRole(&authpb.Role{Name: []byte(r.Name)})
	return nil
}

// roleDelete takes the role away from its users, too.
func (b *batch) roleDelete(r *pb.AuthRoleDeleteRequest) error {
	a := b.st.auth
	switch {
	case a.enabled && r.Role == RootRole:
		return ErrInvalidAuthMgmt
	case a.roles[r.Role] == nil:
		return ErrRoleNotFound
	}
	users := make(map[string]*authpb.User)
	for name, u := range a.users {
		if next := withoutRole(u.User, r.Role); next != nil {
			users[name] = next
		}
	}
	b.changeAuth(users, map[string]*authpb.Role{r.Role: nil})
	return nil
}

// roleGrantPermission gives the same range another type where the role has it already. (etcd overlooks it where the role has
// another range with the same beginning, and adds to the old permission then.)
func (b *batch) roleGrantPermission(r *pb.AuthRoleGrantPermissionRequest) error {
	switch {
	case r.Perm == nil:
		return ErrPermissionNotGiven
	case !validPermission(r.Perm.Key, r.Perm.RangeEnd):
		return ErrInvalidAuthMgmt
	}
	role := b.st.auth.roles[r.Name]
	if role == nil {
		return ErrRoleNotFound
	}
	granted := &authpb.Permission{PermType: r.Perm.PermType, Key: r.Perm.Key, RangeEnd: r.Perm.RangeEnd}
	perms := slices.Clone(role.KeyPermission)
	if i := findPermission(perms, r.Perm.Key, r.Perm.RangeEnd); i >= 0 {
		perms[i] = granted
	} else {
		perms = append(perms, granted)
		slices.SortStableFunc(perms, func(a, b *authpb.Permission) int { return bytes.Compare(a.Key, b.Key) })
	}
	b.changeRole(&authpb.Role{Name: role.Name, KeyPermission: perms})
	return nil
}

func (b *batch) roleRevokePermission(r *pb.AuthRoleRevokePermissionRequest) error {
	role := b.st.auth.roles[r.Role]
	if role == nil {
		return ErrRoleNotFound
	}
	i := findPermission(role.KeyPermission, r.Key, r.RangeEnd)
	if i < 0 {
		return ErrPermissionNotGranted
	}
	b.changeRole(&authpb.Role{Name: role.Name, KeyPermission: slices.Delete(slices.Clone(role.KeyPermission), i, i+1)})
	return nil
}

// findPermission returns the place of the permission on exactly this range, -1 where there is none.
func findPermission(perms []*authpb.Permission, key, end []byte) int {
	return slices.IndexFunc(perms, func(p *authpb.Permission) bool { return bytes.Equal(p.Key, key) && bytes.Equal(p.RangeEnd, end) })
}

// validPermission: etcd's isValidPermissionRange.
func validPermission(key, end []byte) bool {
	return len(key) > 0 && (len(end) == 0 || len(end) == 1 && end[0] == 0 || bytes.Compare(key, end) < 0)
}
