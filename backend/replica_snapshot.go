package backend

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// snapshotSuffix is behind the database's name in that of a copy being made. A copy that is complete has no name.
const snapshotSuffix = ".snapshot-"

// A copy is made in steps between batches, as compaction does its work: a few pages at a time.
const (
	copyPages    = 32
	copyPagesMax = 512
	copyStep     = 3 * time.Millisecond // what a step should take at most
)

// The copy is of no use if the process ends, and synced by who gets it.
const copyPragmas = `
	PRAGMA journal_mode = OFF;
	PRAGMA synchronous = OFF;
	PRAGMA cache_size = -2048;`

var errReplaced = fmt.Errorf("%w: the state was replaced by a snapshot of another member's meanwhile, ask again", ErrUnavailable)

// copying is a copy of the file on its way. It belongs to the holder of the commit token as long as it is among the
// sqliteLog's copies: what ends the log ends them too.
type copying struct {
	backup *backup
	to     *conn
}

// drop ends a copy.
func (l *sqliteLog) drop(c *copying) error {
	delete(l.copies, c)
	return errors.Join(c.backup.finish(), c.to.close())
}

// dropCopies ends all copies that are being made. REQUIRES: the commit token.
func (l *sqliteLog) dropCopies() error {
	var errs []error
	for c := range l.copies {
		errs = append(errs, l.drop(c))
	}
	return errors.Join(errs...)
}

// fileSnapshot is a copy that is complete: an open file without a name.
type fileSnapshot struct {
	*os.File
	replicaState
	size int64
}

func (s *fileSnapshot) Index() uint64       { return s.index }
func (s *fileSnapshot) Term() uint64        { return s.term }
func (s *fileSnapshot) Members() Membership { return *s.members }
func (s *fileSnapshot) Size() int64         { return s.size }
func (s *fileSnapshot) Release() error      { return s.Close() }

// Snapshot copies the database beside it while writes go on, and needs as much space there until the copy is released. The
// copy is the state as of an applied index between the call and its return; rows that compaction is about to delete may be
// in it.
func (db *DB) Snapshot(ctx context.Context) (_ Snapshot, err error) {
	path := db.current.Load().log.(*sqliteLog).file.path
	file, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+snapshotSuffix)
	if err != nil {
		return nil, explainFileError(filepath.Dir(path), err)
	}
	// From here on the file has no name, or soon has none; SQLite is done with it then, so closing it costs no lock.
	defer func() {
		err = errors.Join(err, os.Remove(file.Name()))
		if err != nil {
			err = errors.Join(fmt.Errorf("copying %s: %w", path, err), file.Close())
		}
	}()
	state, err := db.copyFile(ctx, file.Name())
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	return &fileSnapshot{File: file, replicaState: state, size: info.Size()}, nil
}

// copyFile copies the database to a file that is empty, and returns the state that the copy has.
func (db *DB) copyFile(ctx context.Context, name string) (state replicaState, err error) {
	to, err := openConn(name, false)
	if err != nil {
		return state, explainSQLiteError(name, err)
	}
	if err := to.exec(copyPragmas); err != nil {
		return state, errors.Join(explainSQLiteError(name, err), to.close())
	}
	var log *sqliteLog
	c := &copying{to: to}
	_, err = db.step(func() (err error) {
		log = db.log.(*sqliteLog)
		if c.backup, err = newBackup(log.w, to); err == nil {
			log.copies[c] = struct{}{}
		}
		return err
	})
	if err != nil {
		if c.backup == nil {
			err = errors.Join(err, to.close())
		}
		return state, explainSQLiteError(name, err)
	}
	pages := copyPages
	rest := resting{db: db}
	for done := false; !done; {
		failed := ctx.Err()
		took, closed := db.step(func() error {
			if _, ours := log.copies[c]; !ours {
				failed = errReplaced
				return nil
			}
			if failed == nil {
				done, failed = c.backup.step(pages)
			}
			if done {
				state = db.st.replica
			}
			if done || failed != nil {
				failed = errors.Join(failed, log.drop(c))
			}
			return nil
		})
		switch {
		case closed != nil:
			return state, closed // and the log ends the copy
		case failed != nil:
			return state, explainSQLiteError(name, failed)
		case done:
			return state, nil
		case took > copyStep:
			pages = max(pages/2, 1)
		case took < copyStep/2:
			pages = min(2*pages, copyPagesMax)
		}
		if !rest.after(took) {
			return state, ErrClosed
		}
	}
	return state, nil
}
