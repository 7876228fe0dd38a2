package backend

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"go.etcd.io/etcd/api/v3/authpb"
)

// authChange is what a batch has changed about users and roles, as the storages keep it and as processes on one Postgres
// tell each other (migrations/postgres: commits.auth). Bytes are base64 in JSON, and so are names: they may hold what
// Postgres takes for no text.
type authChange struct {
	Enabled  bool        `json:"enabled"`
	Ended    bool        `json:"ended,omitempty"` // auth was switched off, if only for a moment
	Revision uint64      `json:"revision"`
	Users    []authEntry `json:"users,omitempty"`
	Roles    []authEntry `json:"roles,omitempty"`
	Tokens   []authToken `json:"tokens,omitempty"`
}

// authEntry is one user or role as the batch leaves it.
type authEntry struct {
	Name       []byte           `json:"name"`
	Gone       bool             `json:"gone,omitempty"`
	Password   []byte           `json:"password,omitempty"`    // of a user: a bcrypt hash
	NoPassword bool             `json:"no_password,omitempty"` // of a user
	Roles      [][]byte         `json:"roles,omitempty"`       // of a user
	Allows     []authPermission `json:"allows,omitempty"`      // by a role
}

type authPermission struct {
	Type int32  `json:"type"` // authpb.Permission_Type
	Key  []byte `json:"key"`
	End  []byte `json:"end,omitempty"`
}

// authChanged says whether users, roles, permissions or the switch have changed.
func (b *batch) authChanged() bool { return b.st.auth != b.was.auth }

// authChange returns what the batch has changed.
func (b *batch) authChange() *authChange {
	c := b.st.auth.since(b.was.auth)
	c.Ended = b.st.auth.epoch != b.was.auth.epoch
	c.Tokens = b.goodTokens()
	return c
}

// since returns what has become of was: users, roles and the switch. It is in order: the same change is the same JSON everywhere.
func (a *Auth) since(was *Auth) *authChange {
	c := &authChange{Enabled: a.enabled, Revision: a.revision}
	for _, name := range changedNames(was.users, a.users, func(u *authUser) *authpb.User { return u.User }) {
		c.Users = append(c.Users, userEntry(name, a.User(name)))
	}
	for _, name := range changedNames(was.roles, a.roles, func(r *authpb.Role) *authpb.Role { return r }) {
		c.Roles = append(c.Roles, roleEntry(name, a.roles[name]))
	}
	return c
}

// goodTokens are those that no later Command of the batch has ended.
func (b *batch) goodTokens() (good []authToken) {
	for _, t := range b.tokens {
		if t.good(b.st.auth) {
			good = append(good, t)
		}
	}
	return good
}

// changedNames lists the names under which the two hold something else.
func changedNames[V any, M comparable](was, is map[string]V, what func(V) M) []string {
	names := make(map[string]bool)
	for name, v := range is {
		if old, had := was[name]; !had || what(old) != what(v) {
			names[name] = true
		}
	}
	for name := range was {
		if _, has := is[name]; !has {
			names[name] = true
		}
	}
	return slices.Sorted(maps.Keys(names))
}

func userEntry(name string, u *authpb.User) authEntry {
	e := authEntry{Name: []byte(name), Gone: u == nil, Password: u.GetPassword(), NoPassword: u.GetOptions().GetNoPassword()}
	for _, r := range u.GetRoles() {
		e.Roles = append(e.Roles, []byte(r))
	}
	return e
}

func (e *authEntry) user() *authpb.User {
	if e.Gone {
		return nil
	}
	u := &authpb.User{Name: e.Name, Password: e.Password, Options: &authpb.UserAddOptions{NoPassword: e.NoPassword}}
	for _, r := range e.Roles {
		u.Roles = append(u.Roles, string(r))
	}
	return u
}

func roleEntry(name string, r *authpb.Role) authEntry {
	e := authEntry{Name: []byte(name), Gone: r == nil}
	for _, p := range r.GetKeyPermission() {
		e.Allows = append(e.Allows, authPermission{Type: int32(p.PermType), Key: p.Key, End: p.RangeEnd})
	}
	return e
}

func (e *authEntry) role() *authpb.Role {
	if e.Gone {
		return nil
	}
	r := &authpb.Role{Name: e.Name}
	for _, p := range e.Allows {
		r.KeyPermission = append(r.KeyPermission, &authpb.Permission{PermType: authpb.Permission_Type(p.Type), Key: p.Key, RangeEnd: p.End})
	}
	return r
}

// after returns a as a batch leaves it that has made this change.
func (c *authChange) after(a *Auth) *Auth {
	users, roles := make(map[string]*authpb.User), make(map[string]*authpb.Role)
	for i := range c.Users {
		users[string(c.Users[i].Name)] = c.Users[i].user()
	}
	for i := range c.Roles {
		roles[string(c.Roles[i].Name)] = c.Roles[i].role()
	}
	next := a.with(users, roles)
	next.enabled, next.revision = c.Enabled, c.Revision
	if c.Ended {
		next.epoch++
	}
	return next
}

func decodeAuthChange(text []byte) (*authChange, error) {
	c := new(authChange)
	if err := json.Unmarshal(text, c); err != nil {
		return nil, fmt.Errorf("%w: users and roles cannot be read: %w", ErrDamaged, err)
	}
	return c, nil
}

// replayAuth takes over what another process has changed.
func (b *batch) replayAuth(c *authChange) {
	b.st.auth = c.after(b.st.auth)
	for _, t := range c.Tokens {
		b.tokens = append(b.tokens, b.st.auth.token(t.Hash, t.User))
	}
}
