package backend

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// DB is one open database. All its methods may be called by any number of goroutines at once.
type DB struct {
	opts Options
	// log and index belong to the holder of the commit token: a replica may get others. Who only reads takes those of a View.
	log     storage
	index   *index
	shared  *pgLog   // log, where other processes write to it as well; else nil
	replica *replica // where writes go through a log of several processes; else nil
	heads   headRounds

	current atomic.Pointer[View]
	ring    eventRing
	marks   rowMarks
	leases  leaseTable
	alarms  alarms
	tokens  authTokens
	hashes  hashMemory

	queue         queue
	committerDone chan struct{}
	// st, suspect, broken and graceBefore belong to the holder of the commit token (queue.busy).
	st      state
	suspect bool  // something could not be written since the last batch
	broken  error // why the last batch could not
	// graceBefore: whatever lease was due at or before this time (DB.now) ran out while nobody could renew it; 0 once a
	// batch has prolonged those.
	graceBefore int64
	// graced is the end of the last silence of a shared database for which leases were prolonged.
	graced int64
	err    atomic.Pointer[error]

	opened      time.Time // with its monotonic clock, see now
	drawLeaseID func() int64

	appliedIndex atomic.Uint64
	logical      atomic.Int64

	subscribeMu sync.Mutex
	subscribers atomic.Pointer[[]*subscriber]

	appliedRoom []AppliedCommand // empty, for the next batch; it belongs to the holder of the commit token

	hashTurn   chan struct{} // see hashPage
	defragTurn chan struct{} // see Defragment

	compactor  compactor
	ctx        context.Context // ends with Close
	cancel     context.CancelFunc
	background sync.WaitGroup
	closeOnce  sync.Once
	closeErr   error
}

// OpenSQLite opens the database file at path, making it and its directory (mode 0700) where they are
// missing, and loads the index. The file is locked against a second quire; people may read it at any time.
// That of a member of a cluster is refused: what the cluster has committed since would be missing.
// Errors wrap ErrInUse, ErrNewerSchema or ErrDamaged, and say what to do.
func OpenSQLite(ctx context.Context, path string, o Options) (*DB, error) {
	file, err := openSQLiteFile(ctx, path)
	if err != nil {
		return nil, err
	}
	if err = refuseMember(file); err == nil {
		err = removeSnapshots(file.path)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening %s: %w", path, err), file.close())
	}
	return openOnFile(ctx, file, nil, o)
}

// openOnFile opens a database on its file, which is closed when that fails.
func openOnFile(ctx context.Context, file *sqliteFile, r *replica, o Options) (*DB, error) {
	log, err := newSQLiteLog(file, r != nil)
	var db *DB
	if err == nil {
		db = newDB(log, o, r)
		if r != nil {
			log.damaged = db.damaged
		}
		db, err = openDB(ctx, db, nil)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening %s: %w", file.path, file.explainDamage(err)), file.close())
	}
	return db, nil
}

// newDB makes a DB on a storage, with nothing loaded yet.
func newDB(log storage, o Options, r *replica) *DB {
	o = o.withDefaults()
	recs := newRecords()
	db := &DB{
		opts:          o,
		log:           log,
		replica:       r,
		index:         &index{recs: recs, slots: newSlots(), vals: newValues(recs, o.ValueCacheBytes)},
		committerDone: make(chan struct{}),
		opened:        time.Now(),
		drawLeaseID:   drawLeaseID,
		hashTurn:      make(chan struct{}, 1),
		defragTurn:    make(chan struct{}, 1),
	}
	db.queue.init()
	db.leases.init()
	db.tokens.init(o.TokenTTL)
	db.compactor.init()
	db.heads.init()
	db.ctx, db.cancel = context.WithCancel(context.Background())
	return db
}

// openDB loads a new DB and starts its work; shared is its storage, if that is shared.
func openDB(ctx context.Context, db *DB, shared *pgLog) (*DB, error) {
	db.shared = shared
	o := db.opts
	if err := db.load(ctx); err != nil {
		return nil, err
	}
	if db.replica != nil {
		if err := db.loadReplica(); err != nil {
			return nil, err
		}
	}
	opened := db.now()
	db.graceBefore = opened
	db.ring.first = db.st.rev + 1
	db.storeCounters()
	db.publish()

	for _, a := range db.Alarms() {
		if o.Hooks.Alarm != nil {
			o.Hooks.Alarm(a, true)
		}
	}
	if len(db.st.garbage) == 0 {
		db.compactor.swept, db.compactor.memory = db.st.compact, db.st.compact
	}
	go db.commitLoop()
	db.background.Go(db.compactLoop)
	// A compaction that the last process did not finish goes on.
	db.compactor.wake()
	if db.replica != nil {
		db.startReplica()
		return db, nil
	}
	db.background.Go(db.expireLoop)
	if db.shared != nil {
		db.startShared()
	}
	// Who asks for a lease now is to see its grace. If it cannot be written, StorageError has heard of it.
	if due, ok := db.leases.next(); ok && due <= opened {
		_ = db.submit(ctx, &pending{expire: &expireLeases{}})
	}
	return db, nil
}

// Close ends the background work, waits for the batch that is being committed, answers what is still queued with
// ErrClosed, and closes the file. Views must have been released. It may be called more than once.
func (db *DB) Close() error {
	db.closeOnce.Do(func() {
		q := &db.queue
		q.mu.Lock()
		q.closed = true
		left := append(q.items, q.steps...)
		q.items, q.steps = nil, nil
		q.mu.Unlock()
		for _, p := range left {
			p.err = ErrClosed
			close(p.done)
		}
		db.cancel()
		if db.shared != nil {
			db.shared.beginClosing()
		}
		if db.replica != nil {
			db.replica.proposals.close()
		}
		db.background.Wait()
		q.whenIdle()
		close(q.wake)
		<-db.committerDone
		db.closeErr = db.log.close()
	})
	return db.closeErr
}

// now is the time in µs since the epoch as leases count it: the wall clock when the database was opened, and from
// there the monotonic one. A clock that is set while quire runs neither ends leases nor prolongs them (etcd: Lease.expiry).
// Where several processes share leases it is the clock of the database, or that of the log.
func (db *DB) now() int64 {
	if db.shared != nil {
		return db.shared.clock.now()
	}
	if db.replica != nil {
		return db.replica.clock.now()
	}
	return db.opened.UnixMicro() + time.Since(db.opened).Microseconds()
}

// wall is the time that rows get, µs since the epoch: that of people's clocks.
func (db *DB) wall(t time.Time) int64 {
	if db.shared != nil {
		return db.shared.clock.now()
	}
	return t.UnixMicro()
}

// storeCounters copies what Stats reports of the committer's state. REQUIRES: the commit token.
func (db *DB) storeCounters() {
	others := db.st.others
	if db.shared != nil {
		others = uint64(db.shared.position().seq) // the same number in every process
	}
	applied := uint64(db.st.nextID-1) + others
	if db.replica != nil {
		applied = db.st.replica.index
	}
	db.appliedIndex.Store(applied)
	db.logical.Store(db.st.logical)
}

// Revision is the newest published revision; 1 in an empty store.
func (db *DB) Revision() int64 { return db.current.Load().rev }

// Empty says whether nothing was ever written, as far as can be seen: no key, no compaction, no lease, no alarm, no user.
func (db *DB) Empty() bool {
	db.leases.mu.RLock()
	leases := len(db.leases.byID)
	db.leases.mu.RUnlock()
	return db.Revision() == 1 && db.CompactRevision() == 0 && leases == 0 && len(db.alarms.current()) == 0 &&
		db.current.Load().auth.revision == firstAuthRevision
}

// CompactRevision is the revision the store is compacted at, 0 when it never was.
func (db *DB) CompactRevision() int64 { return db.current.Load().CompactRevision() }

// Stats are cheap to ask for: nothing is scanned.
type Stats struct {
	DBSize, DBSizeInUse int64 // bytes of the file, and of its pages that are not free
	Quota               int64 // bytes; negative: none
	LogicalBytes        int64 // what counts against the quota
	Keys                int64 // that exist now
	Revision            int64
	CompactRevision     int64
	Leases              int
	ValueCacheBytes     int64
	ReadTransactions    int // open in the database; reads from memory need none
	AuthRevision        uint64
	AppliedIndex        uint64 // rows and other changes since the database was made, in a replica entries of the log; it never falls
}

// Stats reports on the newest state.
func (db *DB) Stats() Stats {
	v := db.View()
	defer v.Release()
	db.leases.mu.RLock()
	leases := len(db.leases.byID)
	db.leases.mu.RUnlock()
	total, inUse := v.log.size()
	return Stats{
		DBSize:           total,
		DBSizeInUse:      inUse,
		Quota:            db.opts.QuotaBytes,
		LogicalBytes:     db.logical.Load(),
		Keys:             int64(v.keys.(*tree).liveLen()),
		Revision:         v.rev,
		CompactRevision:  v.CompactRevision(),
		Leases:           leases,
		ValueCacheBytes:  v.index.vals.bytes(),
		ReadTransactions: v.log.reading(),
		AuthRevision:     v.auth.revision,
		AppliedIndex:     db.appliedIndex.Load(),
	}
}
