package backend

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/quire-db/quire/migrations"
)

const (
	// sqliteApplicationID marks a file as quire's ("quir", shown by file(1)), so that quire never takes over the database
	// of another program.
	sqliteApplicationID = 0x71756972
	// maxReaders bounds the reader connections. Each commit drops their page caches and all connections share one
	// page-cache mutex: with four busy readers the writer falls to a tenth (docs/design.md).
	maxReaders = 2
)

// newFilePragmas go to a new file before its first page exists: most cannot be changed later without rewriting it.
// 8 KiB pages were best or equal in every measurement; incremental vacuum returns space while the server runs.
const newFilePragmas = `
	PRAGMA page_size = 8192;
	PRAGMA auto_vacuum = INCREMENTAL;
	PRAGMA synchronous = FULL;
	PRAGMA application_id = %d;`

// writerPragmas:
//   - synchronous FULL: a commit is in the WAL, synced, before it returns; a power cut loses nothing acknowledged.
//   - wal_autocheckpoint: the writing connection copies the WAL into the database after a commit that brings it to this
//     many pages, 4 MiB. Measured: p50 of a commit 153 µs and a WAL that stays small; with a second connection that
//     checkpoints in the background 310 µs and a WAL that grows without end.
//   - busy_timeout, milliseconds: only other programs can hold a lock that we wait for, an sqlite3 shell that writes, or
//     one that reads while we empty the WAL. Short, because every client waits with us.
//   - cell_size_check and trusted_schema: notice a damaged or doctored file rather than follow it.
//   - cache_size, KiB when negative: appending needs few pages; more is wanted for deletes of a compaction.
const writerPragmas = `
	PRAGMA busy_timeout = 250;
	PRAGMA synchronous = FULL;
	PRAGMA wal_autocheckpoint = 500;
	PRAGMA journal_size_limit = 67108864;
	PRAGMA cache_size = -16384;
	PRAGMA temp_store = MEMORY;
	PRAGMA mmap_size = 0;
	PRAGMA foreign_keys = OFF;
	PRAGMA trusted_schema = OFF;
	PRAGMA cell_size_check = ON;`

// replicaPragmas come after writerPragmas where the cluster's log is what makes a write durable: a commit is only written,
// and synced with the next checkpoint. When that is, the replica says (see sqliteLog.settle).
const replicaPragmas = `
	PRAGMA synchronous = NORMAL;
	PRAGMA wal_autocheckpoint = 0;`

// readerPragmas: a small cache, as each commit of the writer empties it.
const readerPragmas = `
	PRAGMA busy_timeout = 250;
	PRAGMA query_only = ON;
	PRAGMA cache_size = -2048;
	PRAGMA temp_store = MEMORY;
	PRAGMA mmap_size = 0;
	PRAGMA foreign_keys = OFF;
	PRAGMA trusted_schema = OFF;
	PRAGMA cell_size_check = ON;`

// sqliteFile is one open database file with its lock, its one writer and its few readers.
//
// Guarantees: no other quire has the file open; its schema is the one this binary knows; it is in WAL mode and a commit on
// the writer is durable when it returns (but see replicaPragmas). Other programs may read the file at any time. The file is never opened, read or
// closed in this process by other means than SQLite: any close drops SQLite's POSIX locks on it.
type sqliteFile struct {
	path     string // absolute, symbolic links resolved
	lock     *fileLock
	writer   *conn // belongs to the one goroutine that commits
	pageSize int64 // bytes

	slots chan struct{} // one token for each reader that is lent
	done  chan struct{} // closed when it is being closed
	gone  error         // why, for who wants to read then; set before
	idle  struct {
		sync.Mutex
		readers []*conn
	}
}

// openSQLiteFile opens the database at path or makes a new one, in a directory that is made if missing (mode 0700, and
// durable when this returns). Errors say what to do and wrap, where it is the reason: ErrInUse, ErrNewerSchema, ErrDamaged,
// ErrDiskFull, ErrStorage.
func openSQLiteFile(ctx context.Context, path string) (*sqliteFile, error) {
	path, lock, err := lockSQLiteFile(path)
	if err != nil {
		return nil, err
	}
	f, err := openLockedFile(ctx, path, lock, writerPragmas)
	if err != nil {
		return nil, errors.Join(err, lock.unlock())
	}
	return f, nil
}

// lockSQLiteFile locks the database at path, which need not be there yet, and returns the one name it has.
func lockSQLiteFile(path string) (located string, lock *fileLock, err error) {
	path, err = locateFile(path)
	if err != nil {
		return "", nil, err
	}
	if err := refuseNetworkFileSystem(filepath.Dir(path)); err != nil {
		return "", nil, err
	}
	lock, err = lockFile(path + ".lock")
	if err != nil {
		return "", nil, explainFileError(filepath.Dir(path), err)
	}
	return path, lock, nil
}

// openLockedFile opens the database at a path that lockSQLiteFile has returned. The lock goes with the file; it may be nil
// where close is not called.
func openLockedFile(ctx context.Context, path string, lock *fileLock, pragmas string) (_ *sqliteFile, err error) {
	f := &sqliteFile{path: path, lock: lock, slots: make(chan struct{}, maxReaders), done: make(chan struct{}), gone: ErrClosed}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.closeWriter())
		}
	}()

	if err := createFile(path); err != nil {
		return nil, explainFileError(filepath.Dir(path), err)
	}
	if err := prepareFile(path); err != nil {
		return nil, explainOpenError(path, err)
	}
	if err := migrateFile(ctx, path); err != nil {
		return nil, explainOpenError(path, err)
	}
	if err := f.openWriter(pragmas); err != nil {
		return nil, explainOpenError(path, err)
	}
	// The names of the database, its WAL and its lock file.
	if err := SyncDirectory(filepath.Dir(path)); err != nil {
		return nil, explainFileError(filepath.Dir(path), err)
	}
	return f, nil
}

// locateFile makes the directory and returns the one name under which the file is locked, whatever link led to it.
func locateFile(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("database path: %w", err)
	}
	if err := MakeDirectory(filepath.Dir(path)); err != nil {
		return "", explainFileError(filepath.Dir(path), err)
	}
	directory, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return "", explainFileError(filepath.Dir(path), err)
	}
	path = filepath.Join(directory, filepath.Base(path))
	info, err := os.Lstat(path)
	if err == nil && info.Mode()&fs.ModeSymlink != 0 {
		link := path
		if path, err = filepath.EvalSymlinks(link); errors.Is(err, fs.ErrNotExist) {
			return replacedFile(link)
		} else if err == nil {
			info, err = os.Lstat(path)
		}
	} else if errors.Is(err, fs.ErrNotExist) {
		return path, nil
	}
	if err != nil {
		return "", explainFileError(directory, err)
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s is not a regular file: name a file for the database", path)
	}
	return path, nil
}

// replacedFile is the path of the file that a link leads to and that is not there, because a crash came when Install replaced it.
// If it is missing for another reason (a disk that is not mounted), the link is refused.
func replacedFile(link string) (string, error) {
	target, err := os.Readlink(link)
	if err != nil {
		return "", explainFileError(filepath.Dir(link), err)
	}
	if !filepath.IsAbs(target) {
		target = filepath.Join(filepath.Dir(link), target)
	}
	directory, err := filepath.EvalSymlinks(filepath.Dir(target))
	if err != nil {
		return "", explainFileError(filepath.Dir(target), err)
	}
	target = filepath.Join(directory, filepath.Base(target))
	if info, err := os.Lstat(target); err == nil && info.Mode()&fs.ModeSymlink != 0 {
		return replacedFile(target)
	}
	if _, err := os.Lstat(target + installingSuffix); err != nil {
		return "", fmt.Errorf("%s is a link to %s, which is not there; name the file itself to have it made: %w", link, target, err)
	}
	return target, nil
}

// MakeDirectory is os.MkdirAll, with mode 0700, that also makes the new names durable.
func MakeDirectory(directory string) error {
	var missing []string // innermost first
	for at := directory; ; at = filepath.Dir(at) {
		_, err := os.Stat(at)
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) || at == filepath.Dir(at) {
			return err
		}
		missing = append(missing, at)
	}
	if err := os.MkdirAll(directory, 0o700); err != nil {
		return err
	}
	for _, created := range missing {
		if err := SyncDirectory(filepath.Dir(created)); err != nil {
			return err
		}
	}
	return nil
}

// SyncDirectory makes durable which names are in a directory.
func SyncDirectory(directory string) error {
	d, err := os.Open(directory)
	if err != nil {
		return err
	}
	err = d.Sync()
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.ENOTSUP) {
		err = nil // a file system that has no sync for directories keeps names durable by itself
	}
	return errors.Join(err, d.Close())
}

// createFile makes an empty file with mode 0600 if there is none: SQLite would make it readable for everybody (as far as
// the umask lets it), and gives its WAL and its shared memory the mode of the database. No connection is open yet, so
// closing the file here drops no lock.
func createFile(path string) error {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return file.Close()
}

// prepareFile gives a new file its lasting properties, makes sure that an old one is quire's, and turns on the WAL.
func prepareFile(path string) (err error) {
	// SQLite takes a file shorter than its smallest page for a new one and would write over what is left of an old one.
	if info, err := os.Stat(path); err != nil {
		return err
	} else if size := info.Size(); size > 0 && size < 512 {
		return &sqliteError{Code: sqlite3.SQLITE_NOTADB, Extended: sqlite3.SQLITE_NOTADB, Op: "open", Msg: fmt.Sprintf("file is cut off after %d bytes", size)}
	}
	c, err := openConn(path, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	if c.readOnlyFile() {
		return fmt.Errorf("%s cannot be written: give the user that runs quire write permission on it, or remount its file system read-write: %w",
			path, fs.ErrPermission)
	}
	if err := c.exec("PRAGMA busy_timeout = 2000"); err != nil {
		return err
	}
	pages, err := c.pageCount()
	if err != nil {
		return err
	}
	fresh := pages == 0
	if !fresh {
		// A start that ended between the first page and the mark in it has left a file without any table.
		tables, err := c.queryInt64("SELECT count(*) FROM sqlite_schema")
		if err != nil {
			return err
		}
		id, err := c.queryInt64("PRAGMA application_id")
		if err != nil {
			return err
		}
		fresh = tables == 0 && id == 0
	}
	if fresh {
		// Still with a rollback journal: so the first page is durable in the file itself before there is a WAL. SQLite
		// removes the WAL of an empty file.
		if err := c.exec(fmt.Sprintf(newFilePragmas, sqliteApplicationID)); err != nil {
			return err
		}
	}
	id, err := c.queryInt64("PRAGMA application_id")
	if err != nil {
		return err
	}
	if id != sqliteApplicationID {
		return fmt.Errorf("%s is a SQLite database, but not one of quire (application_id %#x): name another file, it was left as it is", path, id)
	}
	mode, err := c.queryText("PRAGMA journal_mode = WAL")
	if err != nil {
		return err
	}
	if mode != "wal" {
		return fmt.Errorf("%s: the file system does not support SQLite's WAL (journal mode stays %q): use a local disk", path, mode)
	}
	return nil
}

// migrateFile brings the schema up to date through database/sql, which is closed again before our own connections open.
func migrateFile(ctx context.Context, path string) (err error) {
	name := url.URL{Scheme: "file", Path: path, RawQuery: "_pragma=busy_timeout(2000)&_pragma=synchronous(FULL)"}
	db, err := sql.Open("sqlite", name.String())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	db.SetMaxOpenConns(1)
	err = migrations.Up(ctx, db, migrations.SQLite)
	var newer *migrations.NewerSchemaError
	if errors.As(err, &newer) {
		return fmt.Errorf("%w: %s: %w", ErrNewerSchema, path, err)
	}
	var reported *sqlite.Error
	if errors.As(err, &reported) {
		return fmt.Errorf("%w (%w)", err, &sqliteError{Code: reported.Code() & 0xff, Extended: reported.Code(), Op: "migrate", Msg: reported.Error()})
	}
	return err
}

func (f *sqliteFile) openWriter(pragmas string) (err error) {
	if f.writer, err = openConn(f.path, false); err != nil {
		return err
	}
	if err := f.writer.exec(pragmas); err != nil {
		return err
	}
	if f.pageSize, err = f.writer.queryInt64("PRAGMA page_size"); err != nil {
		return err
	}
	// What the last process wrote into the WAL and did not come to sync is about to be served. A checkpoint would sync it
	// too, but none that a reader of another program stands in the way of.
	return f.writer.syncWAL()
}

// acquireReader lends a connection for reading; it must be given back with releaseReader. If all are lent it waits.
// Between its statements it sees what is committed by then; end a statement (reset) soon, an open one keeps the WAL long.
func (f *sqliteFile) acquireReader(ctx context.Context) (*conn, error) {
	select {
	case <-f.done:
		return nil, f.gone
	default:
	}
	select {
	case f.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-f.done:
		return nil, f.gone
	}
	f.idle.Lock()
	if n := len(f.idle.readers); n > 0 {
		c := f.idle.readers[n-1]
		f.idle.readers = f.idle.readers[:n-1]
		f.idle.Unlock()
		return c, nil
	}
	f.idle.Unlock()

	c, err := openConn(f.path, true)
	if err == nil {
		if err = c.exec(readerPragmas); err != nil {
			err = errors.Join(err, c.close())
		}
	}
	if err != nil {
		<-f.slots
		return nil, explainSQLiteError(f.path, err)
	}
	return c, nil
}

// releaseReader takes a lent connection back. One that met an error is closed instead of being lent again (keep false).
// REQUIRES: all its statements are reset.
func (f *sqliteFile) releaseReader(c *conn, keep bool) error {
	var err error
	if keep {
		f.idle.Lock()
		f.idle.readers = append(f.idle.readers, c)
		f.idle.Unlock()
	} else {
		err = c.close()
	}
	<-f.slots
	return err
}

// close waits for lent readers and closes everything, in this order: the readers, so that none holds the WAL; the WAL into
// the database; the writer; the lock last, when nothing is left that another process could disturb. Whatever fails, the
// rest is done, and nothing committed is lost: what stays in the WAL is read again with the next open.
// REQUIRES: called by the goroutine that owns the writer, once.
func (f *sqliteFile) close() error {
	if f.writer == nil {
		return f.lock.unlock() // it was abandoned
	}
	errs := []error{f.closeReaders()}
	if _, _, err := f.writer.walCheckpoint(checkpointTruncate); err != nil {
		if e := asSQLiteError(err); e == nil || !e.busy() { // busy: somebody reads the file with another program
			errs = append(errs, explainSQLiteError(f.path, err))
		}
	}
	errs = append(errs, f.closeWriter(), f.lock.unlock())
	return errors.Join(errs...)
}

// closeReaders waits for lent readers and closes all. Nobody can read any more then.
func (f *sqliteFile) closeReaders() error {
	close(f.done)
	for range maxReaders {
		f.slots <- struct{}{}
	}
	var errs []error
	for _, c := range f.idle.readers {
		errs = append(errs, c.close())
	}
	f.idle.readers = nil
	return errors.Join(errs...)
}

// abandon closes everything but the lock, because the file is about to be replaced: who still wants to read it gets why.
// REQUIRES: as close.
func (f *sqliteFile) abandon(why error) error {
	f.gone = why
	err := errors.Join(f.closeReaders(), f.closeWriter())
	f.writer = nil
	return err
}

// merge closes a file that nobody reads from, with everything in the file itself: there is no WAL then. The lock stays.
func (f *sqliteFile) merge() error {
	_, _, err := f.writer.walCheckpoint(checkpointTruncate)
	return errors.Join(explainSQLiteError(f.path, err), f.closeWriter())
}

func (f *sqliteFile) closeWriter() error {
	if f.writer == nil {
		return nil
	}
	return f.writer.close()
}

// explainSQLiteError says what a failure of SQLite on the open file means and what to do, and wraps ErrDiskFull, ErrDamaged
// or ErrStorage. Other errors are returned as they are.
func explainSQLiteError(path string, err error) error {
	e := asSQLiteError(err)
	switch {
	case e == nil || e.interrupted():
		return err
	case e.full():
		return fmt.Errorf("%w: %s: free space on its file system, or delete and compact; nothing is lost: %w", ErrDiskFull, path, err)
	case e.corrupt():
		return fmt.Errorf("%w: %s: stop quire, copy the file together with its -wal, then restore a backup or try `sqlite3 FILE .recover`: %w",
			ErrDamaged, path, err)
	case e.busy():
		return fmt.Errorf("%w: %s is locked by another program, such as an sqlite3 shell that writes: end it: %w", ErrStorage, path, err)
	case e.readonly():
		return fmt.Errorf("%w: %s cannot be written: was its file system remounted read-only, or its owner changed? %w", ErrStorage, path, err)
	default:
		return fmt.Errorf("%w: %s: look for disk errors in the system's log: %w", ErrStorage, path, err)
	}
}

// explainDamage makes sure that an error of a damaged file is an ErrDamaged.
func (f *sqliteFile) explainDamage(err error) error {
	if e := asSQLiteError(err); e != nil && e.corrupt() && !errors.Is(err, ErrDamaged) {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return err
}

// explainOpenError is explainSQLiteError for failures while opening.
func explainOpenError(path string, err error) error {
	e := asSQLiteError(err)
	switch {
	case e != nil && e.busy():
		return fmt.Errorf("%w: %s is locked by another program, such as an sqlite3 shell that writes: end it and start again: %w", ErrInUse, path, err)
	case e != nil && e.cantopen() && (e.Errno == syscall.EACCES || e.Errno == syscall.EROFS || e.Errno == syscall.EPERM):
		return explainFileError(filepath.Dir(path), fmt.Errorf("%w: %w", err, e.Errno))
	default:
		return explainSQLiteError(path, err)
	}
}

// explainFileError says what to do about a failure of the operating system in directory.
func explainFileError(directory string, err error) error {
	switch {
	case errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%s is on a read-only file system: remount it read-write or choose another data directory: %w", directory, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s: the user that runs quire may not write there: change its owner or mode, or choose another data directory: %w", directory, err)
	case errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("%w: %s: free space and start again: %w", ErrDiskFull, directory, err)
	default:
		return err
	}
}
