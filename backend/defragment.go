package backend

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// A defragmentation writes rows anew in small transactions, a run of neighbours at a time: what compaction has left of a
// page is then put with what it has left of the next ones. (SQLite itself joins neighbouring pages only when they are
// nearly empty.) Rows keep their ids, so nobody notices.
const (
	repackRows    = 128 // of one step, at first
	repackRowsMax = 1024
	repackBytes   = 256 << 10 // of keys and values of one step, but for one long row
	repackStep    = 4 * time.Millisecond
)

// Defragment gives the file system all the room back that the database does not need. Reads and writes go on: it works in
// steps of some milliseconds between batches, and leaves the time between them to others. One runs at a time, others wait.
// It ends with ctx; what it has done until then remains. ErrDiskFull, ErrStorage: a step could not be written, and
// has changed nothing.
//
// On Postgres it is a VACUUM of quire's tables, which makes the room of deleted rows free for new ones, and gives back what
// is free at the end of a table.
func (db *DB) Defragment(ctx context.Context) (err error) {
	defer func() {
		if ctx.Err() == nil {
			err = db.current.Load().log.explain(err)
		}
	}()
	select {
	case db.defragTurn <- struct{}{}:
		defer func() { <-db.defragTurn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if db.shared != nil {
		return db.shared.vacuumTables(ctx)
	}
	var file uint64
	if _, err := db.step(func() error { file = db.st.file; return nil }); err != nil {
		return err
	}
	if err := db.repack(ctx, file); err != nil {
		return err
	}
	return db.giveBack(ctx, file)
}

// fileStep is a step on the file of that number, and rests after it. It is not the same any more where a copy of another
// member's has taken its place: then nothing is done.
func (db *DB) fileStep(ctx context.Context, file uint64, rest *resting, f func(l *sqliteLog) error) (same bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	took, err := db.step(func() error {
		if same = file == db.st.file; !same {
			return nil
		}
		if err := f(db.log.(*sqliteLog)); err != nil || db.replica == nil {
			return err
		}
		return db.settleSome()
	})
	if err == nil && same && !rest.after(took) {
		err = ErrClosed
	}
	return same, err
}

// steps takes steps on the file of that number until one is the last.
func (db *DB) steps(ctx context.Context, file uint64, size pace, f func(l *sqliteLog, n int) (worked time.Duration, done bool, err error)) error {
	rest := resting{db: db}
	for done := false; !done; {
		var worked time.Duration
		same, err := db.fileStep(ctx, file, &rest, func(l *sqliteLog) (err error) {
			worked, done, err = f(l, size.n)
			return err
		})
		if err != nil || !same {
			return err
		}
		size.after(worked)
	}
	return nil
}

// repack writes all rows anew.
func (db *DB) repack(ctx context.Context, file uint64) error {
	last := int64(0)
	return db.steps(ctx, file, pace{repackRows, repackRowsMax, repackStep}, func(l *sqliteLog, n int) (worked time.Duration, done bool, err error) {
		last, done, err = l.repackRows(last, n)
		return l.worked, done, err
	})
}

// giveBack gives all free pages back.
func (db *DB) giveBack(ctx context.Context, file uint64) error {
	err := db.steps(ctx, file, vacuumPace(), func(l *sqliteLog, n int) (time.Duration, bool, error) { return l.vacuumTo(0, n) })
	if err != nil {
		return err
	}
	// The file itself becomes shorter when the WAL is copied into it.
	_, err = db.fileStep(ctx, file, &resting{db: db}, func(l *sqliteLog) error {
		if db.replica != nil {
			return db.settle()
		}
		_, _, err := l.w.walCheckpoint(checkpointPassive)
		if e := asSQLiteError(err); e != nil && e.busy() {
			return nil // somebody reads; the next checkpoint does it
		}
		return err
	})
	return err
}

// repackRows writes up to n rows after an id anew, and returns the id of the last of them.
func (l *sqliteLog) repackRows(after int64, n int) (last int64, done bool, err error) {
	last = after
	err = l.transaction(func() (err error) {
		last, done, err = l.repackRun(after, n)
		if err != nil || last == after {
			return err
		}
		for _, run := range []struct {
			sql  string
			args []int64
		}{
			{sqliteTakeRows, []int64{after, last}},
			{sqliteDeleteRows, []int64{after, last}},
			{sqlitePutRows, nil},
			{sqliteClearTaken, nil},
		} {
			s, err := l.w.cached(run.sql)
			if err != nil {
				return err
			}
			if err := runWith(s, run.args...); err != nil {
				return err
			}
		}
		return l.measure()
	})
	return last, done, err
}

// repackRun is the id up to which rows after another one are to be written anew together; done says that no more follow.
func (l *sqliteLog) repackRun(after int64, n int) (last int64, done bool, err error) {
	if err := l.w.exec(sqliteTakenTable); err != nil {
		return after, false, err
	}
	s, err := l.w.cached(sqliteRowSizes)
	if err != nil {
		return after, false, err
	}
	defer func() { err = errors.Join(err, s.reset()) }()
	if err := s.bindInt64(1, after); err != nil {
		return after, false, err
	}
	last = after
	for count, bytes := 0, int64(0); count < n && bytes < repackBytes; count++ {
		found, err := s.step()
		if err != nil || !found {
			return last, err == nil, err
		}
		size := s.columnInt64(1)
		if count > 0 && bytes+size > repackBytes {
			break
		}
		last = s.columnInt64(0)
		bytes += size
	}
	return last, false, nil
}

// vacuumTables runs VACUUM, on a connection of its own: it takes as long as it takes. Where the role may not do that,
// Postgres says so in its log only.
func (p *pgLog) vacuumTables(ctx context.Context) error {
	if err := p.usable(); err != nil {
		return err
	}
	lane := pgLane{server: &p.pg}
	defer func() {
		within, cancel := context.WithTimeout(context.WithoutCancel(ctx), pgCloseGrace)
		defer cancel()
		lane.close(within)
	}()
	return lane.ask(ctx, func(c *pgconn.PgConn) error {
		return pgQuery(ctx, c, p.sql.vacuum, new(pgArgs), nil)
	})
}
