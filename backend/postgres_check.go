package backend

import (
	"context"
	"errors"
	"fmt"
)

// CheckPostgres reads a whole store as it is at one moment, while quire processes may go on, and reports everything in it
// that is unsound, as CheckSQLite does. It changes nothing.
func CheckPostgres(ctx context.Context, o PostgresOptions, progress func(done, total int64)) (CheckReport, error) {
	o, err := o.withDefaults()
	if err != nil {
		return CheckReport{}, err
	}
	p, err := newPgLog(o)
	if err != nil {
		return CheckReport{}, err
	}
	c := newChecker()
	err = p.check(ctx, c, progress)
	if err != nil {
		err = fmt.Errorf("checking %s: %w", RedactPostgresURL(o.URL), p.explain(err))
	}
	within, cancel := context.WithTimeout(context.WithoutCancel(ctx), pgConnectTimeout)
	defer cancel()
	p.writer.close(within)
	return c.report, err
}

func (p *pgLog) check(ctx context.Context, c *checker, progress func(done, total int64)) (err error) {
	conn, err := p.writer.open(ctx)
	if err != nil {
		return err
	}
	if _, err := conn.Exec(ctx, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").ReadAll(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.endTransaction(conn)) }()
	var total, last int64
	none := new(pgArgs)
	for _, q := range []struct {
		sql  string
		each func(pgRow) error
	}{
		{p.sql.compactRevision, func(r pgRow) error { c.compacted(r.int8(0)); return nil }},
		{p.sql.leases, func(r pgRow) error {
			c.lease(leaseChange{id: r.int8(0), ttl: r.int8(1), deadline: r.int8(2)})
			return nil
		}},
		{p.sql.alarms, func(r pgRow) error { c.alarm(r.int8(1)); return nil }},
		{p.sql.countRows, func(r pgRow) error { total = r.int8(0); return nil }},
		{p.sql.lastID, func(r pgRow) error { last = r.int8(0); return nil }},
		{p.sql.checkRows, func(r pgRow) error {
			return c.next(ctx, &checkedRow{
				checkedKey: checkedKey{rev: r.int8(1), create: r.int8(3), version: r.int8(4), lease: r.int8(5), deleted: r.bool(6)},
				id:         r.int8(0), sub: r.int8(2), at: r.int8(7), size: r.int8(8), key: r[9],
			}, total, progress)
		}},
	} {
		if err := pgQuery(ctx, conn, q.sql, none, q.each); err != nil {
			return err
		}
	}
	if err := c.auth(p.readAuth(ctx, conn)); err != nil {
		return err
	}
	if c.id > last {
		c.problem("row %d follows row %d, the last one of the newest batch", c.id, last)
	}
	c.finish()
	return nil
}
