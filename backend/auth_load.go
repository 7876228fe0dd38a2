package backend

import "fmt"

// authLoader puts users and roles together from the rows of their tables.
type authLoader struct {
	change       authChange
	users, roles map[string]int // places in change
	err          error
}

func newAuthLoader() *authLoader {
	return &authLoader{change: authChange{Revision: firstAuthRevision}, users: make(map[string]int), roles: make(map[string]int)}
}

func (l *authLoader) meta(name string, value int64) {
	switch name {
	case metaAuthEnabled:
		l.change.Enabled = value != 0
	case metaAuthRevision:
		l.change.Revision = uint64(value)
	}
}

func (l *authLoader) user(name, password []byte, none bool) {
	l.users[string(name)] = len(l.change.Users)
	l.change.Users = append(l.change.Users, authEntry{Name: name, Password: password, NoPassword: none})
}

func (l *authLoader) role(name []byte) {
	l.roles[string(name)] = len(l.change.Roles)
	l.change.Roles = append(l.change.Roles, authEntry{Name: name})
}

// grant and permission come after all users and roles.
func (l *authLoader) grant(user, role []byte) {
	i, ok := l.users[string(user)]
	if !ok {
		l.lost("user", user)
		return
	}
	u := &l.change.Users[i]
	u.Roles = append(u.Roles, role)
}

func (l *authLoader) permission(role []byte, p authPermission) {
	i, ok := l.roles[string(role)]
	if !ok {
		l.lost("role", role)
		return
	}
	r := &l.change.Roles[i]
	r.Allows = append(r.Allows, p)
}

// lost: who may do what must not be guessed.
func (l *authLoader) lost(what string, name []byte) {
	l.err = fmt.Errorf("%w: the %s %q has rights but does not exist: restore a backup", ErrDamaged, what, name)
}

func (l *authLoader) auth() (*Auth, error) {
	if l.err != nil {
		return nil, l.err
	}
	return l.change.after(newAuth()), nil
}
