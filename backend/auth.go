package backend

import (
	"bytes"
	"cmp"
	"maps"
	"slices"
	"sync"

	"go.etcd.io/etcd/api/v3/authpb"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// Auth is who may do what, as one batch left it: the users, the roles, and whether anybody asks. It never changes, and
// belongs to a View like its keys do: what is read from a View is checked against the permissions of the same moment.
//
// The checks return nil, ErrUserEmpty, ErrUserNotFound, ErrPermissionDenied or ErrAuthOldRevision, in the cases in which
// etcd does (server/auth: isOpPermitted, IsAdminPermitted), and nil for whatever is asked while auth is off.
type Auth struct {
	enabled  bool
	revision uint64
	users    map[string]*authUser
	roles    map[string]*authpb.Role
	epoch    uint64 // counts how often auth was switched off, as far as this process knows
}

// Caller is who asks. Without a Revision nobody has said who it is, whatever the Name.
type Caller struct {
	Name string
	// Revision is the auth revision at which the caller was recognized. One that is older than the store's is refused: what
	// the caller was allowed then may have changed.
	Revision uint64
}

// Names with a meaning of their own (etcd: server/auth).
const (
	rootUser = "root"
	RootRole = "root" // may do everything; needs not exist to be granted
)

// firstAuthRevision is that of a store in which auth was never changed, as in etcd.
const firstAuthRevision = 1

// authUser is a user with what all of their roles allow: that is put together when it is first asked for, as a role may have
// thousands of users.
type authUser struct {
	*authpb.User
	root   bool
	rights func() (read, write spans)
}

func newAuth() *Auth {
	return &Auth{revision: firstAuthRevision, users: make(map[string]*authUser), roles: make(map[string]*authpb.Role)}
}

// Enabled says whether permissions are asked for.
func (a *Auth) Enabled() bool { return a.enabled }

// Revision counts the changes of users, roles and permissions; 1 before the first.
func (a *Auth) Revision() uint64 { return a.revision }

// Users and Roles list them by name. What they return must not be changed; a user's password is a bcrypt hash.
func (a *Auth) Users() []*authpb.User {
	all := make([]*authpb.User, 0, len(a.users))
	for _, name := range slices.Sorted(maps.Keys(a.users)) {
		all = append(all, a.users[name].User)
	}
	return all
}

func (a *Auth) Roles() []*authpb.Role {
	all := make([]*authpb.Role, 0, len(a.roles))
	for _, name := range slices.Sorted(maps.Keys(a.roles)) {
		all = append(all, a.roles[name])
	}
	return all
}

// User and Role return nil where there is none of that name.
func (a *Auth) User(name string) *authpb.User {
	if u := a.users[name]; u != nil {
		return u.User
	}
	return nil
}

func (a *Auth) Role(name string) *authpb.Role { return a.roles[name] }

// HasRole says whether a user has a role.
func (a *Auth) HasRole(user, role string) bool {
	_, has := slices.BinarySearch(a.User(user).GetRoles(), role)
	return has
}

// with returns what a will be after the users and roles given have taken the place of those of their names, and those with a
// name only are gone. What users may do is worked out anew where it can have changed.
func (a *Auth) with(users map[string]*authpb.User, roles map[string]*authpb.Role) *Auth {
	next := &Auth{enabled: a.enabled, revision: a.revision, roles: a.roles, epoch: a.epoch}
	if len(roles) > 0 {
		next.roles = maps.Clone(a.roles)
		for name, r := range roles {
			if next.roles[name] = r; r == nil {
				delete(next.roles, name)
			}
		}
	}
	next.users = maps.Clone(a.users)
	for name, u := range users {
		if next.users[name] = (&authUser{User: u}); u == nil {
			delete(next.users, name)
		}
	}
	for name, u := range next.users {
		_, changed := users[name]
		if changed || slices.ContainsFunc(u.Roles, func(r string) bool { _, changed := roles[r]; return changed }) {
			next.users[name] = next.withRights(u.User)
		}
	}
	return next
}

// withRights returns a user with what their roles allow.
func (a *Auth) withRights(u *authpb.User) *authUser {
	var perms [][]*authpb.Permission
	for _, name := range u.Roles {
		perms = append(perms, a.roles[name].GetKeyPermission())
	}
	return &authUser{User: u, root: slices.Contains(u.Roles, RootRole), rights: sync.OnceValues(func() (read, write spans) {
		for _, p := range slices.Concat(perms...) {
			s := spanOf(p.Key, p.RangeEnd)
			if p.PermType == authpb.Permission_READ || p.PermType == authpb.Permission_READWRITE {
				read = append(read, s)
			}
			if p.PermType == authpb.Permission_WRITE || p.PermType == authpb.Permission_READWRITE {
				write = append(write, s)
			}
		}
		return read.merged(), write.merged()
	})}
}

// CheckKnown refuses who is nobody.
func (a *Auth) CheckKnown(who Caller) error {
	if a.enabled && who.Revision == 0 {
		return ErrUserEmpty
	}
	return nil
}

// CheckAdmin allows those who have the role root.
func (a *Auth) CheckAdmin(who Caller) error {
	if !a.enabled {
		return nil
	}
	if who.Revision == 0 || who.Name == "" {
		return ErrUserEmpty
	}
	u := a.users[who.Name]
	switch {
	case u == nil:
		return ErrUserNotFound
	case !u.root:
		return ErrPermissionDenied
	}
	return nil
}

// check allows a range of keys of which the caller may read, or write, all.
func (a *Auth) check(who Caller, key, end []byte, write bool) error {
	switch {
	case !a.enabled:
		return nil
	case who.Revision == 0:
		return ErrUserEmpty
	case who.Revision < a.revision:
		return ErrAuthOldRevision
	}
	u := a.users[who.Name]
	switch {
	case u == nil:
		return ErrPermissionDenied
	case u.root:
		return nil
	}
	allowed, writable := u.rights()
	if write {
		allowed = writable
	}
	if !allowed.cover(spanOf(key, end)) {
		return ErrPermissionDenied
	}
	return nil
}

// CheckRead allows to read the keys of a range, which is one key where end is empty.
func (a *Auth) CheckRead(who Caller, key, end []byte) error {
	return a.check(who, key, end, false)
}

func (a *Auth) checkWrite(who Caller, key, end []byte) error {
	return a.check(who, key, end, true)
}

// leaseKeys calls each with the keys of a lease until that returns an error, and returns that.
type leaseKeys func(id int64, each func(key []byte) error) error

// CheckLeaseRead allows to see the keys of a lease to whom may read them all.
func (a *Auth) CheckLeaseRead(who Caller, keys [][]byte) error {
	if a.CheckAdmin(who) == nil {
		return nil
	}
	for _, key := range keys {
		if err := a.CheckRead(who, key, nil); err != nil {
			return err
		}
	}
	return a.CheckKnown(who)
}

// checkLease allows to attach keys to a lease, to prolong it and to revoke it to whom may write all keys that hang on it.
func (a *Auth) checkLease(who Caller, id int64, keys leaseKeys) error {
	if a.CheckAdmin(who) == nil {
		return nil
	}
	return keys(id, func(key []byte) error { return a.checkWrite(who, key, nil) })
}

func (a *Auth) checkPut(who Caller, r *pb.PutRequest, keys leaseKeys) error {
	if err := a.checkWrite(who, r.Key, nil); err != nil {
		return err
	}
	if err := a.checkLease(who, r.Lease, keys); err != nil {
		return err
	}
	if r.PrevKv {
		return a.CheckRead(who, r.Key, nil)
	}
	return nil
}

func (a *Auth) checkDelete(who Caller, r *pb.DeleteRangeRequest) error {
	if err := a.checkWrite(who, r.Key, r.RangeEnd); err != nil {
		return err
	}
	if r.PrevKv {
		return a.CheckRead(who, r.Key, r.RangeEnd)
	}
	return nil
}

// checkTxn allows a Txn of which every compare and every operation of both branches is allowed, nested ones included:
// which branch is taken says something about keys, too.
func (a *Auth) checkTxn(who Caller, r *pb.TxnRequest, keys leaseKeys) error {
	for _, c := range r.GetCompare() {
		if err := a.CheckRead(who, c.Key, c.RangeEnd); err != nil {
			return err
		}
	}
	for _, ops := range [][]*pb.RequestOp{r.GetSuccess(), r.GetFailure()} {
		for _, op := range ops {
			if err := a.checkOp(who, op, keys); err != nil {
				return err
			}
		}
	}
	return nil
}

func (a *Auth) checkOp(who Caller, op *pb.RequestOp, keys leaseKeys) error {
	switch o := op.Request.(type) {
	case *pb.RequestOp_RequestRange:
		return a.CheckRead(who, o.RequestRange.GetKey(), o.RequestRange.GetRangeEnd())
	case *pb.RequestOp_RequestPut:
		return a.checkPut(who, o.RequestPut, keys)
	case *pb.RequestOp_RequestDeleteRange:
		return a.checkDelete(who, o.RequestDeleteRange)
	case *pb.RequestOp_RequestTxn:
		return a.checkTxn(who, o.RequestTxn, keys)
	}
	return nil
}

// CheckReadTxn is the check of a Txn that writes nothing.
func (a *Auth) CheckReadTxn(who Caller, r *pb.TxnRequest) error {
	return a.checkTxn(who, r, func(int64, func([]byte) error) error { return nil })
}

// span is a range of keys: from from, up to but without to; no to is no end.
type span struct{ from, to []byte }

// spanOf reads a range as etcd's requests and permissions write it: without an end it is one key, and with an end of one zero
// byte it has none.
func spanOf(key, end []byte) span {
	switch {
	case len(end) == 0:
		return span{key, append(slices.Clip(key), 0)}
	case len(end) == 1 && end[0] == 0:
		return span{key, nil}
	}
	return span{key, end}
}

// compareEnds puts the end that is none last.
func compareEnds(a, b []byte) int {
	switch {
	case a == nil && b == nil:
		return 0
	case a == nil:
		return 1
	case b == nil:
		return -1
	}
	return bytes.Compare(a, b)
}

// spans are ranges of keys in order, none of which touches another, once merged.
type spans []span

func (s spans) merged() spans {
	slices.SortFunc(s, func(a, b span) int {
		return cmp.Or(bytes.Compare(a.from, b.from), compareEnds(a.to, b.to))
	})
	out := s[:0]
	for _, next := range s {
		last := len(out) - 1
		switch {
		case last < 0 || out[last].to != nil && bytes.Compare(out[last].to, next.from) < 0:
			out = append(out, next)
		case compareEnds(out[last].to, next.to) < 0:
			out[last].to = next.to
		}
	}
	return out
}

// cover says whether all of a range lies in one of s. One that can hold nothing does not; in etcd it depends on the shape of
// its interval tree.
func (s spans) cover(want span) bool {
	if want.to != nil && bytes.Compare(want.from, want.to) >= 0 {
		return false
	}
	i, found := slices.BinarySearchFunc(s, want.from, func(have span, from []byte) int { return bytes.Compare(have.from, from) })
	if !found {
		i--
	}
	return i >= 0 && compareEnds(want.to, s[i].to) <= 0
}
