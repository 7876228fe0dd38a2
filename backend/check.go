package backend

import (
	"context"
	"errors"
	"fmt"
	"os"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// CheckReport is what CheckSQLite found.
type CheckReport struct {
	Revision, CompactRevision int64
	Rows, Keys, Leases        int64
	Problems                  []string // empty: the database is sound
}

// maxProblems bounds the report: a damaged file has either few or countless.
const maxProblems = 100

// CheckSQLite reads a whole database, which no quire may have open, and reports everything in it that is unsound:
// what SQLite's own integrity check finds, rows out of order, gaps between revisions, and chains of a key's
// revisions that no sequence of etcd requests can have made. It changes nothing but for what opening a database
// after a crash changes. progress, which may be nil, is called with rows.
func CheckSQLite(ctx context.Context, path string, progress func(done, total int64)) (CheckReport, error) {
	if _, err := os.Stat(path); err != nil {
		return CheckReport{}, fmt.Errorf("there is no database to check: %w", err)
	}
	file, err := openSQLiteFile(ctx, path)
	if err != nil {
		return CheckReport{}, err
	}
	c := newChecker()
	err = c.run(ctx, file.writer, progress)
	if e := asSQLiteError(err); e != nil && e.corrupt() {
		c.problem("SQLite: %v: what could be read is above; stop here, restore a backup or try `sqlite3 FILE .recover`", e)
		err = nil
	}
	return c.report, errors.Join(err, file.close())
}

type checkedKey struct {
	rev, create, version, lease int64
	deleted                     bool
}

// checkedRow is a row as a storage reads it for a check; its bytes are valid during the call only.
type checkedRow struct {
	checkedKey
	id, sub, at, size int64
	key               []byte
	notBytes          bool // its key or value is stored as something else
}

type checker struct {
	report  CheckReport
	keys    map[string]checkedKey
	leases  map[int64]bool
	compact int64

	id, rev, sub, at int64
}

func newChecker() *checker {
	return &checker{keys: make(map[string]checkedKey), leases: make(map[int64]bool), compact: -1, rev: 1}
}

func (c *checker) problem(format string, args ...any) {
	if len(c.report.Problems) < maxProblems {
		c.report.Problems = append(c.report.Problems, fmt.Sprintf(format, args...))
	}
}

func (c *checker) run(ctx context.Context, db *conn, progress func(done, total int64)) error {
	err := eachRow(db, "PRAGMA integrity_check", func(s *stmt) error {
		if line := s.columnText(0); line != "ok" {
			c.problem("SQLite's integrity check: %s", line)
		}
		return ctx.Err()
	})
	if err != nil {
		return err
	}
	auth := newAuthLoader()
	err = eachRow(db, sqliteMeta, func(s *stmt) error {
		if s.columnText(0) == metaCompactRevision {
			c.compacted(s.columnInt64(1))
		}
		auth.meta(s.columnText(0), s.columnInt64(1))
		return nil
	})
	if err != nil {
		return err
	}
	err = eachRow(db, sqliteLeases, func(s *stmt) error {
		c.lease(leaseChange{id: s.columnInt64(0), ttl: s.columnInt64(1), deadline: s.columnInt64(2)})
		return nil
	})
	if err != nil {
		return err
	}
	err = eachRow(db, sqliteAlarms, func(s *stmt) error { c.alarm(s.columnInt64(1)); return nil })
	if err != nil {
		return err
	}
	if err := c.auth(readAuth(db, auth)); err != nil {
		return err
	}
	if err := c.member(db); err != nil {
		return err
	}
	total, err := db.queryInt64(sqliteCountRows)
	if err != nil {
		return err
	}
	err = eachRow(db, sqliteCheckRows, func(s *stmt) error {
		return c.next(ctx, &checkedRow{
			checkedKey: checkedKey{rev: s.columnInt64(1), create: s.columnInt64(3), version: s.columnInt64(4), lease: s.columnInt64(5), deleted: s.columnInt64(6) != 0},
			id:         s.columnInt64(0), sub: s.columnInt64(2), at: s.columnInt64(7), size: s.columnInt64(8), key: s.columnBlob(9),
			notBytes: s.columnText(10) != "blob" || s.columnText(11) != "blob",
		}, total, progress)
	})
	if err != nil {
		return err
	}
	c.finish()
	return nil
}

func (c *checker) compacted(rev int64) {
	c.compact = rev
	c.report.CompactRevision = max(rev, 0)
}

func (c *checker) lease(l leaseChange) {
	c.leases[l.id] = true
	if l.ttl <= 0 || l.ttl > maxLeaseTTL {
		c.problem("lease %016x was granted %d seconds", l.id, l.ttl)
	}
	if l.deadline <= 0 {
		c.problem("lease %016x has no deadline", l.id)
	}
}

func (c *checker) alarm(kind int64) {
	if a := pb.AlarmType(kind); a != pb.AlarmType_NOSPACE && a != pb.AlarmType_CORRUPT {
		c.problem("alarm %d is of no known type", a)
	}
}

// auth takes what was read of users and roles.
func (c *checker) auth(a *Auth, err error) error {
	switch {
	case errors.Is(err, ErrDamaged):
		c.problem("%v", err)
		return nil
	case err != nil:
		return err
	}
	for _, u := range a.Users() {
		for _, r := range u.Roles {
			if r != RootRole && a.roles[r] == nil {
				c.problem("the user %q has the role %q, which does not exist", u.Name, r)
			}
		}
	}
	if a.enabled && (a.users[rootUser] == nil || !a.users[rootUser].root) {
		c.problem("auth is on, but there is no user root with the role root")
	}
	return nil
}

// next takes the next row of about total.
func (c *checker) next(ctx context.Context, w *checkedRow, total int64, progress func(done, total int64)) error {
	c.row(w)
	if c.report.Rows++; c.report.Rows%loadProgressRows == 0 || c.report.Rows == total {
		if progress != nil {
			progress(c.report.Rows, total)
		}
		return ctx.Err()
	}
	return nil
}

// member checks what only the database of a member of a cluster has.
func (c *checker) member(db *conn) error {
	position, _, err := readPosition(db)
	if err != nil {
		return err
	}
	if position.clockTerm > position.term {
		c.problem("the log is applied up to an entry of term %d, but its clock is of term %d", position.term, position.clockTerm)
	}
	err = readMembers(db, position.members)
	if errors.Is(err, ErrDamaged) {
		c.problem("%v", err)
		return nil
	}
	return err
}

// finish is called after the last row.
func (c *checker) finish() {
	if c.compact > c.rev {
		c.problem("compacted at revision %d, but the newest revision is %d", c.compact, c.rev)
	}
	for _, k := range c.keys {
		if k.deleted {
			continue
		}
		c.report.Keys++
		if k.lease != 0 && !c.leases[k.lease] {
			c.problem("the key last written at revision %d has lease %016x, which does not exist", k.rev, k.lease)
		}
	}
	c.report.Revision, c.report.Leases = c.rev, int64(len(c.leases))
}

// row checks one row against those before it. Keys and values are not printed: they may be secrets.
func (c *checker) row(w *checkedRow) {
	k, id, rev, sub, at := w.checkedKey, w.id, w.rev, w.sub, w.at
	switch {
	case id <= c.id:
		c.problem("row %d follows row %d", id, c.id)
	case rev < c.rev || rev == c.rev && sub <= c.sub && c.id != 0:
		c.problem("row %d: revision %d.%d follows %d.%d", id, rev, sub, c.rev, c.sub)
	case rev > c.rev && rev > max(c.compact, c.rev)+1:
		c.problem("revisions %d to %d are missing before row %d", max(c.compact, c.rev)+1, rev-1, id)
	}
	if rev > c.compact {
		// Nothing of this revision can have been compacted: its rows are numbered from 0 without a gap.
		want := int64(0)
		if rev == c.rev && c.id != 0 {
			want = c.sub + 1
		}
		if sub != want {
			c.problem("row %d: revision %d.%d where %d.%d was expected", id, rev, sub, rev, want)
		}
	}
	if at < c.at {
		c.problem("row %d: revision %d was committed before the one in front of it", id, rev)
	}
	key := string(w.key)
	prev, seen := c.keys[key]
	known := seen && rev > c.compact
	if len(key) == 0 || w.notBytes {
		c.problem("row %d: its key is empty, or its key or value is not stored as bytes", id)
	}
	switch {
	case seen && prev.rev == rev:
		c.problem("row %d: revision %d holds its key twice", id, rev)
	case k.deleted && (k.create != 0 || k.version != 0 || k.lease != 0 || w.size != 0):
		c.problem("row %d: a tombstone with a version, lease or value", id)
	case k.deleted && rev > c.compact && (!seen || prev.deleted):
		c.problem("row %d: revision %d deletes a key that does not exist", id, rev)
	case k.deleted:
	case k.version < 1 || k.create < 2 || k.create > rev:
		c.problem("row %d: revision %d has version %d and create revision %d", id, rev, k.version, k.create)
	case k.version == 1 && k.create != rev:
		c.problem("row %d: revision %d is a first version, but created at %d", id, rev, k.create)
	case !seen && rev > c.compact && k.version != 1:
		c.problem("row %d: revision %d has version %d, but nothing of its key is left before it", id, rev, k.version)
	case known && prev.deleted && k.version != 1:
		c.problem("row %d: revision %d has version %d after a delete", id, rev, k.version)
	case known && !prev.deleted && (k.version != prev.version+1 || k.create != prev.create):
		c.problem("row %d: revision %d has version %d, created %d, after version %d, created %d", id, rev, k.version, k.create, prev.version, prev.create)
	}
	c.keys[key] = k
	c.id, c.rev, c.sub, c.at = id, rev, sub, at
}
