package backend

import (
	"bytes"
	"context"

	"github.com/jackc/pgx/v5/pgconn"
)

// readAuth reads users and roles. REQUIRES: the transaction that reads the rest.
func (p *pgLog) readAuth(ctx context.Context, c *pgconn.PgConn) (*Auth, error) {
	to := newAuthLoader()
	for _, q := range []struct {
		sql  string
		each func(pgRow)
	}{
		{p.sql.authMeta, func(r pgRow) { to.meta(r.text(0), r.int8(1)) }},
		{p.sql.users, func(r pgRow) { to.user(bytes.Clone(r[0]), bytes.Clone(r[1]), r.bool(2)) }},
		{p.sql.roles, func(r pgRow) { to.role(bytes.Clone(r[0])) }},
		{p.sql.grants, func(r pgRow) { to.grant(bytes.Clone(r[0]), bytes.Clone(r[1])) }},
		{p.sql.permissions, func(r pgRow) {
			to.permission(bytes.Clone(r[0]), authPermission{Type: int32(r.int8(1)), Key: bytes.Clone(r[2]), End: bytes.Clone(r[3])})
		}},
	} {
		if err := pgQuery(ctx, c, q.sql, new(pgArgs), func(r pgRow) error { q.each(r); return nil }); err != nil {
			return nil, err
		}
	}
	return to.auth()
}
