package backend

import (
	"bytes"
	"errors"
	"fmt"
)

// writeAuth writes what a batch has changed about users and roles. REQUIRES: a transaction.
func (l *sqliteLog) writeAuth(c *authChange) error {
	for i := range c.Users {
		u := &c.Users[i]
		name := string(u.Name)
		if err := errors.Join(l.runOnce(sqliteDeleteUser, name), l.runOnce(sqliteDeleteGrants, name)); err != nil {
			return err
		}
		if u.Gone {
			continue
		}
		none := int64(0)
		if u.NoPassword {
			none = 1
		}
		if err := l.runOnce(sqlitePutUser, name, u.Password, none); err != nil {
			return err
		}
		for _, role := range u.Roles {
			if err := l.runOnce(sqlitePutGrant, name, string(role)); err != nil {
				return err
			}
		}
	}
	for i := range c.Roles {
		r := &c.Roles[i]
		name := string(r.Name)
		if err := errors.Join(l.runOnce(sqliteDeleteRole, name), l.runOnce(sqliteDeletePermission, name)); err != nil {
			return err
		}
		if r.Gone {
			continue
		}
		if err := l.runOnce(sqlitePutRole, name); err != nil {
			return err
		}
		for place, p := range r.Allows {
			if err := l.runOnce(sqlitePutPermission, name, int64(place), int64(p.Type), p.Key, p.End); err != nil {
				return err
			}
		}
	}
	enabled := int64(0)
	if c.Enabled {
		enabled = 1
	}
	return errors.Join(l.putMeta(metaAuthEnabled, enabled), l.putMeta(metaAuthRevision, int64(c.Revision)))
}

// runOnce runs a statement that is too rare to be kept.
func (l *sqliteLog) runOnce(sql string, args ...any) error {
	s, err := l.w.prepare(sql)
	if err != nil {
		return err
	}
	defer s.finalize()
	for i, arg := range args {
		switch v := arg.(type) {
		case string:
			err = s.bindText(i+1, v)
		case []byte:
			err = s.bindBlob(i+1, v)
		case int64:
			err = s.bindInt64(i+1, v)
		default:
			panic(fmt.Sprintf("backend: no parameter for a %T", arg))
		}
		if err != nil {
			return err
		}
	}
	return s.run()
}

// readAuth reads users and roles; what meta says of them has been read.
func readAuth(c *conn, to *authLoader) (*Auth, error) {
	for _, q := range []struct {
		sql  string
		each func(s *stmt)
	}{
		{sqliteUsers, func(s *stmt) {
			to.user([]byte(s.columnText(0)), bytes.Clone(s.columnBlob(1)), s.columnInt64(2) != 0)
		}},
		{sqliteRoles, func(s *stmt) { to.role([]byte(s.columnText(0))) }},
		{sqliteGrants, func(s *stmt) { to.grant([]byte(s.columnText(0)), []byte(s.columnText(1))) }},
		{sqlitePermissions, func(s *stmt) {
			to.permission([]byte(s.columnText(0)), authPermission{
				Type: int32(s.columnInt64(1)), Key: bytes.Clone(s.columnBlob(2)), End: bytes.Clone(s.columnBlob(3)),
			})
		}},
	} {
		if err := eachRow(c, q.sql, func(s *stmt) error { q.each(s); return nil }); err != nil {
			return nil, err
		}
	}
	return to.auth()
}
