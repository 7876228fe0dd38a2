package backend

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"
)

// replica is what a DB has beside its store when its writes go through a log that several processes keep together.
//
// A write goes from proposals (replica_write.go) into the log and comes back to Apply (replica_apply.go), on every member.
// Apply may use nothing but the state, the Commands and the entry's stamp (replica_stamp.go): so the rows of all members
// are the same.
type replica struct {
	proposals proposals
	log       atomic.Pointer[ReplicatedLog] // nil until Join
	applied   appliedMark
	clock     clusterClock
	members   atomic.Pointer[Membership]
	durable   atomic.Uint64 // see Durable
	unsettled chan struct{} // there is something that is not durable
	// failed is why this member cannot go on: its file is not what memory says, or may not be.
	failed atomic.Pointer[error]
	told   atomic.Bool // Hooks.Failed knows
}

// replicaState is what follows from the log beside the store, as of the newest entry that is applied.
type replicaState struct {
	index, term uint64
	clock       int64  // µs; what leases expire by
	clockTerm   uint64 // term of the newest entry with a stamp; 0: there was none yet
	members     *Membership
}

// OpenReplica opens the database file at path as OpenSQLite does, for a member of a cluster. Join connects it to the log;
// until then Write fails, and so does what needs to know what others have written. A file that was not a member's keeps
// its data and revisions; its applied index is 0.
//
// A copy of another member's state that is found beside it, as Install takes it (path + ".install"), takes the file's
// place if its applied index is the higher one, and is deleted if not.
func OpenReplica(ctx context.Context, path string, o Options) (*DB, error) {
	path, lock, err := lockSQLiteFile(path)
	if err != nil {
		return nil, err
	}
	err = finishInstall(ctx, path)
	if err == nil {
		err = removeSnapshots(path)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening %s: %w", path, err), lock.unlock())
	}
	file, err := openLockedFile(ctx, path, lock, writerPragmas+replicaPragmas)
	if err != nil {
		return nil, errors.Join(err, lock.unlock())
	}
	r := &replica{unsettled: make(chan struct{}, 1)}
	r.proposals.init()
	return openOnFile(ctx, file, r, o)
}

// loadReplica takes over what load has found. REQUIRES: nothing else uses db yet.
func (db *DB) loadReplica() error {
	r, st := db.replica, &db.st.replica
	if st.members == nil {
		st.members = &Membership{}
	}
	r.members.Store(st.members)
	r.applied.move(st.index, st.term)
	r.clock.take(st.clock, st.clockTerm, time.Time{})
	// What is found after a crash of the process may still be in the kernel's memory only.
	return db.settle()
}

func (db *DB) startReplica() {
	db.background.Go(db.leaseLoop)
	db.background.Go(db.settleLoop)
	db.background.Add(1)
	go db.headLoop()
}

// Join connects a replica to its log. Apply may be called before. REQUIRES: db is a replica, and this the first call.
func (db *DB) Join(l ReplicatedLog) {
	if !db.replica.log.CompareAndSwap(nil, &l) {
		panic("backend: a replica joins its log twice")
	}
}

var errNotJoined = fmt.Errorf("%w: this member has not joined its cluster yet", ErrUnavailable)

// joined returns the log.
func (r *replica) joined() (ReplicatedLog, error) {
	if l := r.log.Load(); l != nil {
		return *l, nil
	}
	return nil, errNotJoined
}

// failure is why this member cannot go on, nil when it can.
func (r *replica) failure() error {
	if err := r.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// fail makes the member stop for good.
func (r *replica) fail(err error) error {
	r.failed.CompareAndSwap(nil, &err)
	return *r.failed.Load()
}

// damaged makes the member stop because of damage that was met elsewhere than in Apply. REQUIRES: db is a replica.
func (db *DB) damaged(err error) {
	_ = db.replica.fail(err)
	db.tellFailure()
}

// tellFailure has the hook know that the member cannot go on, if that is so. REQUIRES: db is a replica.
func (db *DB) tellFailure() {
	r := db.replica
	if err := r.failure(); err != nil && r.told.CompareAndSwap(false, true) && db.opts.Hooks.Failed != nil {
		db.opts.Hooks.Failed(err)
	}
}

// removeSnapshots deletes the copies that were being made when the last process ended. REQUIRES: no other process needs a
// file of that name, or it can do without the name.
func removeSnapshots(path string) error {
	entries, err := os.ReadDir(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), filepath.Base(path)+snapshotSuffix) {
			if err := os.Remove(filepath.Join(filepath.Dir(path), e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("an unfinished snapshot cannot be removed: %w", err)
			}
		}
	}
	return nil
}
