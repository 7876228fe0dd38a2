package backend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// EtcdSurroundings is what an etcd writes down of itself beside the store.
type EtcdSurroundings struct {
	StorageVersion string // as "3.7.0": of the form of the file
	ClusterVersion string
	Index, Term    uint64 // of the newest entry that is applied
	Members        []Member
}

// EtcdSnapshot is the database of an etcd that holds what the store held at one moment: what etcd's Snapshot answers
// with, without the hash behind it. It is an open file that has no name.
type EtcdSnapshot struct {
	io.Reader
	Size     int64 // bytes, a multiple of 512
	Revision int64 // the newest in it
	file     *os.File
}

// Close gives the room on the disk back.
func (s *EtcdSnapshot) Close() error { return s.file.Close() }

// EtcdSnapshot writes the store as of a moment between the call and its return as the database of an etcd 3.7: the rows that
// HashKV is about, so that an etcd started with it has the same keys, revisions, versions and hashes; the leases with all
// of their TTL; alarms, users and roles.
//
// Nobody waits for it: the moment is a View, and the rows are read in pages, one reader of pages at a time (see hashPage).
// Compaction deletes nothing meanwhile. It takes memory for one page and for the leases, not for the store, and as
// much room as the store beside the database (in Options.SnapshotDir, where that is set) until the snapshot is closed.
// ErrDiskFull says that not enough would be left there for the store to go on (see leastRoom).
// When ctx ends it stops and gives the room back.
func (db *DB) EtcdSnapshot(ctx context.Context, s EtcdSurroundings) (_ *EtcdSnapshot, err error) {
	path := db.snapshotPath()
	dir := filepath.Dir(path)
	if err := MakeDirectory(dir); err != nil {
		return nil, explainFileError(dir, err)
	}
	written, err := os.CreateTemp(dir, filepath.Base(path)+snapshotSuffix)
	if err != nil {
		return nil, explainFileError(dir, err)
	}
	// From here on there is no file to be seen, whatever becomes of this process.
	read, err := os.Open(written.Name())
	if gone := os.Remove(written.Name()); gone != nil && !errors.Is(gone, fs.ErrNotExist) {
		err = errors.Join(err, gone)
	}
	if err != nil {
		return nil, errors.Join(explainFileError(dir, err), written.Close())
	}
	size, rev, err := db.writeEtcdFile(ctx, written, &s)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("writing a snapshot into %s: %w", dir, explainFileError(dir, err)), read.Close())
	}
	return &EtcdSnapshot{Reader: io.NewSectionReader(read, 0, size), Size: size, Revision: rev, file: read}, nil
}

// snapshotPath is what snapshots are named after: the database, or on Postgres where one would be.
func (db *DB) snapshotPath() string {
	if log, ok := db.current.Load().log.(*sqliteLog); ok {
		return log.file.path
	}
	return db.opts.pathOnPostgres()
}

func (o Options) pathOnPostgres() string { return filepath.Join(o.SnapshotDir, "quire.db") }

// etcdMoment is what a snapshot is about, all as of one moment. The View has the rows, users and roles.
type etcdMoment struct {
	view   *View
	leases []LeaseStatus
	alarms alarmSet
}

func (db *DB) etcdMoment() (m etcdMoment, err error) {
	_, err = db.step(func() error {
		m = etcdMoment{view: db.View(), leases: db.leases.granted(), alarms: db.alarms.current()}
		return nil
	})
	return m, err
}

// writeEtcdFile fills the file, which it closes.
func (db *DB) writeEtcdFile(ctx context.Context, file *os.File, s *EtcdSurroundings) (size, rev int64, err error) {
	f, err := newEtcdFile(file)
	if err != nil {
		return 0, 0, errors.Join(err, file.Close())
	}
	defer func() { err = errors.Join(err, f.close()) }()
	m, err := db.etcdMoment()
	if err != nil {
		return 0, 0, err
	}
	defer m.view.Release()
	for _, write := range []func() error{
		func() error { return db.writeEtcdRows(ctx, f, m.view) },
		func() error { return f.leases(m.leases) },
		func() error { return f.alarms(m.alarms) },
		func() error { return f.auth(m.view.Auth()) },
		func() error { return f.cluster(s) },
		func() error { return f.meta(s, m.view.compact) },
		ctx.Err,
	} {
		if err := write(); err != nil {
			return 0, 0, err
		}
	}
	size, err = f.finish()
	return size, m.view.rev, err
}

// writeEtcdRows writes the rows that are left of v, as in an etcd that has finished its compaction.
func (db *DB) writeEtcdRows(ctx context.Context, f *etcdFile, v *View) error {
	left := newestRows{v: v, rev: v.compact}
	var failed error
	err := db.rowsBetween(ctx, v, 0, v.rev, func(w *storedRow) (more bool) {
		if left.keep(w) {
			failed = f.row(w)
		}
		return failed == nil
	})
	return errors.Join(err, failed)
}
