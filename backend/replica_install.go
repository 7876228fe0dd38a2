package backend

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// Installing replaces the database by a copy of another member's. The copy's name says how far that is:
//
//	quire.db.install     it is complete and durable. Whether it is taken is not decided: it may be older than the database.
//	quire.db.installing  it is taken. The database is given up, with its WAL, which would be taken for the copy's.
//	quire.db             done
//
// A crash between any two steps is followed by a start that goes on from there.
const (
	installSuffix    = ".install"
	installingSuffix = ".installing"
)

// InstallPath is where Install is to find a copy. It is beside the file itself, when the database was named by a link to it.
func (db *DB) InstallPath() string {
	return db.current.Load().log.(*sqliteLog).file.path + installSuffix
}

// Install replaces the state by the file at path, a copy that Snapshot of another member has made, and takes the file. It
// must be durable and in the directory of the database; its name is best InstallPath, under which the next start finds it
// too. Readers go on until the moment of the change. Views from before that keep what is in memory; what they
// would have to read from the file is an ErrUnavailable.
//
// If it returns an error the state is as before, or, where that cannot be, the member has to stop: Apply fails then.
func (db *DB) Install(ctx context.Context, path string) error {
	if err := db.replica.failure(); err != nil {
		return err
	}
	file := db.current.Load().log.(*sqliteLog).file
	if err := moveFile(path, file.path+installSuffix); err != nil {
		return fmt.Errorf("installing a snapshot: %w", explainFileError(filepath.Dir(file.path), err))
	}
	fresh, err := db.loadInstall(ctx, file.path+installSuffix)
	if err == nil {
		index, _ := db.Applied()
		if fresh.st.replica.index <= index {
			err = fmt.Errorf("it was made at entry %d of the log, %d is applied already", fresh.st.replica.index, index)
		}
	}
	if err != nil {
		return errors.Join(fmt.Errorf("installing a snapshot: %w", err), removeDatabase(file.path+installSuffix))
	}
	var swapped error
	if err := db.submit(context.WithoutCancel(ctx), &pending{step: func() error {
		swapped = db.swap(ctx, fresh)
		return nil
	}}); err != nil {
		return err
	}
	return swapped
}

// loadInstall loads the database at path, and closes it again: it is sound as far as a start would notice, and the switch
// itself takes no time.
func (db *DB) loadInstall(ctx context.Context, path string) (fresh *DB, err error) {
	file, err := openLockedFile(ctx, path, nil, writerPragmas)
	if err != nil {
		return nil, err
	}
	log, err := newSQLiteLog(file, true)
	if err == nil {
		fresh = newDB(log, db.opts, db.replica)
		fresh.cancel() // nothing of it is ever started
		err = fresh.load(ctx)
	}
	return fresh, errors.Join(file.explainDamage(err), file.merge())
}

// swap puts the installed file in the place of the database, and what was loaded of it into that of the state.
// REQUIRES: the commit token.
func (db *DB) swap(ctx context.Context, fresh *DB) error {
	old := db.log.(*sqliteLog)
	path, lock := old.file.path, old.file.lock
	if err := moveFile(path+installSuffix, path+installingSuffix); err != nil {
		return fmt.Errorf("installing a snapshot: %w", explainFileError(filepath.Dir(path), err))
	}
	// There is no way back from here. The old file may fail as it likes, nobody needs it any more.
	_ = old.dropCopies()
	_ = old.file.abandon(errReplaced)
	err := completeInstall(path)
	var file *sqliteFile
	if err == nil {
		file, err = openLockedFile(context.WithoutCancel(ctx), path, lock, writerPragmas+replicaPragmas)
	}
	var log *sqliteLog
	if err == nil {
		log, err = newSQLiteLog(file, true)
	}
	if err != nil {
		if file != nil {
			err = errors.Join(err, file.closeWriter())
		}
		return db.replica.fail(fmt.Errorf("installing a snapshot: the next start goes on with it: %w", err))
	}
	db.adopt(fresh, log)
	if err := db.settle(); err != nil {
		db.replica.unsettle()
	}
	return db.replica.failure()
}

// adopt makes what was loaded the state. What Views need comes first, the View last: a reader who has it finds the rest.
// REQUIRES: the commit token.
func (db *DB) adopt(fresh *DB, log *sqliteLog) {
	alarms, file := db.alarms.current(), db.st.file+1
	log.damaged = db.damaged
	db.st, db.log, db.index = fresh.st, log, fresh.index
	db.st.file = file
	db.suspect = false
	db.ring.reset(db.st.rev + 1)
	db.marks.replace(&fresh.marks)
	db.leases.replace(&fresh.leases)
	db.alarms.set(fresh.alarms.current())
	db.tokens.forget()
	db.storeCounters()
	// Not publish: what is retired from now on is nothing that the Views so far could reach.
	db.current.Store(db.newView())

	r, st := db.replica, &db.st.replica
	r.members.Store(st.members)
	r.clock.take(st.clock, st.clockTerm, time.Now())
	r.applied.move(st.index, st.term)
	db.noteStorage(nil)
	db.notify(db.st.rev)
	if len(db.st.garbage) == 0 {
		db.compactor.done(db.st.compact)
	}
	db.compactor.wake()
	db.leases.tell()
	db.tellAlarms(alarms, fresh.alarms.current())
}

// tellAlarms has the hook know what alarms have changed.
func (db *DB) tellAlarms(before, after alarmSet) {
	f := db.opts.Hooks.Alarm
	if f == nil {
		return
	}
	for _, k := range slices.Concat(before.sorted(), after.sorted()) {
		_, was := before[k]
		if _, is := after[k]; was != is {
			f(&pb.AlarmMember{MemberID: k.member, Alarm: k.alarm}, is)
		}
	}
}

// finishInstall goes on with what Install of the last process has begun. REQUIRES: path is locked, and not open.
func finishInstall(ctx context.Context, path string) error {
	if _, err := os.Lstat(path + installingSuffix); err == nil {
		if err := completeInstall(path); err != nil {
			return err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if _, err := os.Lstat(path + installSuffix); errors.Is(err, fs.ErrNotExist) {
		return removeDatabase(path + installSuffix) // what another copy of that name has left would be taken for the next one's
	} else if err != nil {
		return err
	}
	found, err := positionIn(ctx, path+installSuffix, (*sqliteFile).merge)
	if err != nil {
		return fmt.Errorf("an installed snapshot cannot be read, remove it to start without: %w", err)
	}
	have, err := positionIn(ctx, path, (*sqliteFile).closeWriter) // somebody may be reading it
	if err != nil {
		return err
	}
	if found.index <= have.index {
		return removeDatabase(path + installSuffix)
	}
	if err := moveFile(path+installSuffix, path+installingSuffix); err != nil {
		return err
	}
	return completeInstall(path)
}

// positionIn opens a database, reads up to where the log is applied in it, and ends it.
func positionIn(ctx context.Context, path string, end func(*sqliteFile) error) (r replicaState, err error) {
	file, err := openLockedFile(ctx, path, nil, writerPragmas)
	if err != nil {
		return r, err
	}
	r, _, err = readPosition(file.writer)
	return r, errors.Join(err, end(file))
}

// completeInstall puts the file that is being installed in the place of the database. REQUIRES: that is not open here.
//
// The name of the old one goes first: another program that opened it now would make a WAL for it, which would be taken for
// that of the new one.
func completeInstall(path string) error {
	if err := removeDatabase(path); err != nil {
		return err
	}
	return moveFile(path+installingSuffix, path)
}

// removeDatabase removes what there is of a database's files, durably.
func removeDatabase(path string) error {
	for _, name := range []string{path, path + "-wal", path + "-shm"} {
		if err := removeFile(name); err != nil {
			return err
		}
	}
	return nil
}

// moveFile renames a file within its directory, durably. Nothing happens when it has the name already.
func moveFile(from, to string) error {
	if from == to {
		return nil
	}
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return SyncDirectory(filepath.Dir(to))
}

// removeFile removes a file, durably, if it is there.
func removeFile(path string) error {
	if err := os.Remove(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	return SyncDirectory(filepath.Dir(path))
}

// refuseMember returns an error for the file of a member of a cluster.
func refuseMember(f *sqliteFile) error {
	position, found, err := readPosition(f.writer)
	if err != nil {
		return explainSQLiteError(f.path, err)
	}
	if found {
		return fmt.Errorf("it belongs to a member of a cluster (applied up to entry %d of its log): start quire with the cluster's flags, "+
			"or with --force-new-cluster, which keeps what is here and leaves the other members behind", position.index)
	}
	for _, suffix := range []string{installSuffix, installingSuffix} {
		if _, err := os.Lstat(f.path + suffix); err == nil {
			return fmt.Errorf("%s is the state of a cluster that this database was about to take over: start quire with the cluster's flags, or remove it", f.path+suffix)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
