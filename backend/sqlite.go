package backend

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// sqliteLog is the revision table and what stands beside it in one SQLite file. Its writing connection
// belongs to the holder of the commit token; the reading ones are lent from a pool.
type sqliteLog struct {
	file *sqliteFile
	w    *conn

	begin, commit, rollback            *stmt
	insertRow, deleteRow, readOne      *stmt
	putLease, deleteLease              *stmt
	clearAlarms, putAlarm, putMetadata *stmt
	putPosition                        *stmt

	replicated bool            // it is a replica's
	damaged    func(err error) // is told of errors of reading that show damage; nil: nobody is
	wal        walState
	worked     time.Duration         // of the last transaction, without its COMMIT: what grows with how much it does
	copies     map[*copying]struct{} // of the file, which are being made

	pages, freePages atomic.Int64
	pageBytes        int64
}

func newSQLiteLog(file *sqliteFile, replicated bool) (*sqliteLog, error) {
	l := &sqliteLog{file: file, w: file.writer, replicated: replicated, copies: make(map[*copying]struct{})}
	for _, s := range []struct {
		to  **stmt
		sql string
	}{
		{&l.begin, sqliteBegin}, {&l.commit, sqliteCommit}, {&l.rollback, sqliteRollback},
		{&l.insertRow, sqliteInsertRow}, {&l.deleteRow, sqliteDeleteRow}, {&l.readOne, sqliteRow},
		{&l.putLease, sqlitePutLease}, {&l.deleteLease, sqliteDeleteLease},
		{&l.clearAlarms, sqliteClearAlarms}, {&l.putAlarm, sqlitePutAlarm}, {&l.putMetadata, sqlitePutMeta},
		{&l.putPosition, sqlitePutPosition},
	} {
		var err error
		if *s.to, err = l.w.prepare(s.sql); err != nil {
			return nil, err
		}
	}
	var err error
	if l.pageBytes, err = l.w.queryInt64("PRAGMA page_size"); err != nil {
		return nil, err
	}
	return l, l.measure()
}

// transaction runs f between BEGIN and COMMIT; when either fails nothing of f remains.
func (l *sqliteLog) transaction(f func() error) error {
	if err := l.begin.run(); err != nil {
		return err
	}
	start := time.Now()
	err := f()
	l.worked = time.Since(start)
	if err == nil {
		if err = l.commit.run(); err == nil {
			return nil
		}
	}
	// After some errors SQLite has rolled back by itself.
	if l.w.inTransaction() {
		err = errors.Join(err, l.rollback.run())
	}
	return err
}

// write makes a batch durable: its rows, leases, alarms, users and roles and the compaction revision in one transaction,
// synced by COMMIT. In a replica it is only written, together with the position in the log: see settle.
func (l *sqliteLog) write(b *batch) error {
	return l.transaction(func() error {
		for i := range b.rows {
			if err := l.insert(b, &b.rows[i]); err != nil {
				return err
			}
		}
		if b.leases.any() {
			if err := l.writeLeases(&b.leases); err != nil {
				return err
			}
		}
		if len(b.alarmChanges) > 0 {
			if err := l.writeAlarms(b.alarms); err != nil {
				return err
			}
		}
		if b.authChanged() {
			if err := l.writeAuth(b.authChange()); err != nil {
				return err
			}
		}
		if b.compacted {
			if err := l.putMeta(metaCompactRevision, b.st.compact); err != nil {
				return err
			}
		}
		if l.replicated {
			if err := l.writePosition(b); err != nil {
				return err
			}
		} else if b.others() {
			// The applied index counts rows by their ids; what leaves no row is counted here.
			if err := l.putMeta(metaOtherChanges, int64(b.st.others+1)); err != nil {
				return err
			}
		}
		// Here, in the transaction, it costs no locks.
		return l.measure()
	})
}

func (l *sqliteLog) insert(b *batch, w *row) error {
	s := l.insertRow
	deleted := int64(0)
	if w.deleted {
		deleted = 1
	}
	for i, v := range [...]int64{w.id, w.rev, w.sub, w.create, w.version, w.lease, deleted, w.at} {
		if err := s.bindInt64(i+1, v); err != nil {
			return err
		}
	}
	if err := s.bindText(9, w.author); err != nil {
		return err
	}
	if err := s.bindBlob(10, w.key); err != nil {
		return err
	}
	if err := s.bindBlob(11, w.value); err != nil {
		return err
	}
	return s.run()
}

func (l *sqliteLog) writeLeases(c *leaseChanges) error {
	for _, lease := range c.list() {
		s, args := l.putLease, []int64{lease.id, lease.ttl, lease.deadline}
		if lease.gone() {
			s, args = l.deleteLease, []int64{lease.id}
		}
		if err := runWith(s, args...); err != nil {
			return err
		}
	}
	return nil
}

func (l *sqliteLog) writeAlarms(set alarmSet) error {
	if err := l.clearAlarms.run(); err != nil {
		return err
	}
	for k := range set {
		if err := runWith(l.putAlarm, int64(k.member), int64(k.alarm)); err != nil {
			return err
		}
	}
	return nil
}

func (l *sqliteLog) putMeta(name string, value int64) error {
	if err := l.putMetadata.bindText(1, name); err != nil {
		return err
	}
	if err := l.putMetadata.bindInt64(2, value); err != nil {
		return err
	}
	return l.putMetadata.run()
}

func runWith(s *stmt, args ...int64) error {
	for i, v := range args {
		if err := s.bindInt64(i+1, v); err != nil {
			return err
		}
	}
	return s.run()
}

func (l *sqliteLog) deleteRows(ids []int64) error {
	return l.transaction(func() error {
		for _, id := range ids {
			if err := runWith(l.deleteRow, id); err != nil {
				return err
			}
		}
		return nil
	})
}

func (l *sqliteLog) vacuum(n int) (worked time.Duration, done bool, err error) {
	return l.vacuumTo(max(keepFreePages, l.pages.Load()*keepFreePercent/100), n)
}

// vacuumTo gives up to n free pages back, as long as there are more than the given number.
func (l *sqliteLog) vacuumTo(keep int64, n int) (worked time.Duration, done bool, err error) {
	if err := l.measure(); err != nil {
		return 0, false, err
	}
	free := l.freePages.Load()
	if free <= keep {
		return 0, true, nil
	}
	err = l.transaction(func() error {
		if err := l.w.exec(fmt.Sprintf("PRAGMA incremental_vacuum(%d)", n)); err != nil {
			return err
		}
		return l.measure()
	})
	// A file that was made without auto_vacuum keeps its pages; they are still reused.
	return l.worked, l.freePages.Load() >= free, err
}

func (l *sqliteLog) size() (total, inUse int64) {
	pages, free := l.pages.Load(), l.freePages.Load()
	return pages * l.pageBytes, (pages - free) * l.pageBytes
}

func (l *sqliteLog) reading() int { return len(l.file.slots) }

func (l *sqliteLog) close() error { return errors.Join(l.dropCopies(), l.file.close()) }

// measure reads the size of the database for Stats.
func (l *sqliteLog) measure() error {
	pages, err := l.w.pageCount()
	if err != nil {
		return err
	}
	free, err := l.w.freelistCount()
	if err != nil {
		return err
	}
	l.pages.Store(pages)
	l.freePages.Store(free)
	return nil
}

// errCommittedAfterAll: what SQLite reported as failed is in the database.
var errCommittedAfterAll = errors.New("a write that SQLite reported as failed is in the database")

// resume makes sure, after a batch that failed, that the database ends where memory says. If a commit took
// effect although SQLite reported that it did not, going on would number two rows alike.
func (l *sqliteLog) resume(st *state) error {
	if l.w.inTransaction() {
		if err := l.rollback.run(); err != nil {
			return err
		}
	}
	last, err := l.w.queryInt64(sqliteLastRow)
	if err != nil {
		return err
	}
	if last >= st.nextID {
		return fmt.Errorf("%w (row %d, expected at most %d): restart quire to read it", errCommittedAfterAll, last, st.nextID-1)
	}
	if !l.replicated {
		return nil
	}
	position, _, err := readPosition(l.w)
	if err != nil {
		return err
	}
	if position.index > st.replica.index {
		return fmt.Errorf("%w (entry %d of the log, expected %d): restart quire to read it", errCommittedAfterAll, position.index, st.replica.index)
	}
	return nil
}

// frame reads one row through the writing connection.
func (l *sqliteLog) frame(id int64) (Frame, error) { return readFrame(l.readOne, id) }

// readFrame reads the row with the given id; that it is missing is damage, because its record says it is there.
func readFrame(s *stmt, id int64) (f Frame, err error) {
	if err := s.bindInt64(1, id); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.reset()) }()
	found, err := s.step()
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, fmt.Errorf("row %d of the revision table is missing: %w: run 'quire check'", id, ErrDamaged)
	}
	w := sqliteStoredRow(s)
	return w.frame(), nil
}

// sqliteStoredRow reads the columns of sqliteRow and sqliteRowsFrom; its bytes are valid until the next step.
func sqliteStoredRow(s *stmt) storedRow {
	return storedRow{
		rev: s.columnInt64(0), create: s.columnInt64(1), version: s.columnInt64(2), lease: s.columnInt64(3),
		deleted: s.columnInt64(4) != 0, key: s.columnBlob(5), value: s.columnBlob(6),
	}
}

func (l *sqliteLog) row(ctx context.Context, id int64) (f Frame, err error) {
	err = l.read(ctx, func(c *conn) error {
		s, err := c.cached(sqliteRow)
		if err != nil {
			return err
		}
		f, err = readFrame(s, id)
		return err
	})
	return f, err
}

func (l *sqliteLog) rows(ctx context.Context, ids []int64, each func(i int, f Frame)) error {
	return l.read(ctx, func(c *conn) error {
		s, err := c.cached(sqliteRow)
		if err != nil {
			return err
		}
		for i, id := range ids {
			if i%contextEvery == 0 && ctx.Err() != nil {
				return ctx.Err()
			}
			f, err := readFrame(s, id)
			if err != nil {
				return err
			}
			each(i, f)
		}
		return nil
	})
}

// read lends a reading connection to f.
func (l *sqliteLog) read(ctx context.Context, f func(c *conn) error) error {
	c, err := l.file.acquireReader(ctx)
	if err != nil {
		return err
	}
	err = f(c)
	if released := l.file.releaseReader(c, err == nil || ctx.Err() != nil); released != nil {
		err = errors.Join(err, released)
	}
	err = l.explain(err)
	if l.damaged != nil && errors.Is(err, ErrDamaged) {
		l.damaged(err)
	}
	return err
}

func (l *sqliteLog) scan(ctx context.Context, start, _ int64, each func(w *storedRow) (more bool)) error {
	return l.read(ctx, func(c *conn) (err error) {
		s, err := c.cached(sqliteRowsFrom)
		if err != nil {
			return err
		}
		if err := s.bindInt64(1, start); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.reset()) }()
		var w storedRow // one for all
		for n := 0; ; n++ {
			if n%contextEvery == 0 && ctx.Err() != nil {
				return ctx.Err()
			}
			found, err := s.step()
			if err != nil || !found {
				return err
			}
			w = sqliteStoredRow(s)
			w.id, w.sub = s.columnInt64(7), s.columnInt64(8)
			if !each(&w) {
				return nil
			}
		}
	})
}

// explain gives an error of the storage its sentinel, ErrDiskFull or ErrStorage, and its advice. Errors
// of a context pass as they are.
func (l *sqliteLog) explain(err error) error {
	for _, sorted := range []error{nil, context.Canceled, context.DeadlineExceeded, ErrClosed, ErrDiskFull, ErrStorage} {
		if errors.Is(err, sorted) {
			return err
		}
	}
	err = explainSQLiteError(l.file.path, err)
	if errors.Is(err, ErrDiskFull) || errors.Is(err, ErrStorage) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrStorage, err)
}

func (l *sqliteLog) load(ctx context.Context, beside func(loadBeside) error, page func(*loadPage) error) error {
	all, err := l.loadBeside()
	if err != nil {
		return err
	}
	if err := beside(all); err != nil {
		return err
	}
	p := newLoadPage(0)
	err = eachRow(l.w, sqliteLoadRows, func(s *stmt) error {
		p.add(loadRow{
			id: s.columnInt64(0), rev: s.columnInt64(1), create: s.columnInt64(2), version: s.columnInt64(3),
			lease: s.columnInt64(4), deleted: s.columnInt64(5) != 0, size: uint32(s.columnInt64(6)), at: s.columnInt64(7),
		}, s.columnBlob(8))
		if !p.full() {
			return nil
		}
		full := p
		p = newLoadPage(cap(full.keys))
		if err := page(full); err != nil {
			return err
		}
		return ctx.Err()
	})
	if err != nil {
		return err
	}
	return page(p)
}

func (l *sqliteLog) loadBeside() (all loadBeside, err error) {
	all = loadBeside{compact: -1, alarms: make(alarmSet)}
	auth := newAuthLoader()
	err = eachRow(l.w, sqliteMeta, func(s *stmt) error {
		switch s.columnText(0) {
		case metaCompactRevision:
			all.compact = s.columnInt64(1)
		case metaOtherChanges:
			all.others = uint64(s.columnInt64(1))
		default:
			auth.meta(s.columnText(0), s.columnInt64(1))
		}
		return nil
	})
	if err != nil {
		return all, err
	}
	err = eachRow(l.w, sqliteLeases, func(s *stmt) error {
		all.leases = append(all.leases, leaseChange{id: s.columnInt64(0), ttl: s.columnInt64(1), deadline: s.columnInt64(2)})
		return nil
	})
	if err != nil {
		return all, err
	}
	err = eachRow(l.w, sqliteAlarms, func(s *stmt) error {
		all.alarms[alarmKey{uint64(s.columnInt64(0)), pb.AlarmType(s.columnInt64(1))}] = struct{}{}
		return nil
	})
	if err != nil {
		return all, err
	}
	if all.auth, err = readAuth(l.w, auth); err != nil {
		return all, err
	}
	if l.replicated {
		if all.replica, _, err = readPosition(l.w); err == nil {
			err = readMembers(l.w, all.replica.members)
		}
		if err != nil {
			return all, err
		}
	}
	all.total, err = l.w.queryInt64(sqliteCountRows)
	return all, err
}

// eachRow runs a statement and calls f for every row.
func eachRow(c *conn, sql string, f func(s *stmt) error) error {
	s, err := c.prepare(sql)
	if err != nil {
		return err
	}
	defer s.finalize()
	for {
		found, err := s.step()
		if err != nil || !found {
			return err
		}
		if err := f(s); err != nil {
			return err
		}
	}
}
