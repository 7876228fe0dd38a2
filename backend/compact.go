package backend

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// Compaction has two halves. The Command moves the compaction revision, and from then on nothing older
// can be asked for. The rows that nobody can see any more are removed behind it, in small steps that
// run between batches (see queue): which rows those are is known from the records, without a scan. First all
// of them leave memory; then they are deleted in the order in which they lie in the table, neighbours together:
// a page that holds many of them is written once, not once for each. In that order a key's older rows also go
// before its newer ones, so that after a crash no row is left whose tombstone is gone.
//
// What goes, when the store is compacted at C (etcd's key index does the same):
//   - a revision that was superseded at or before C;
//   - a tombstone before C. One at exactly C stays until the next compaction, because a watch that
//     starts at C must still see that DELETE (etcd #19179).
//
// Example, compacted at 5:
//
//	a: 2 put, 4 put, 7 put   -> 2 goes; 4 is what a Range at 5 or 6 sees
//	b: 3 put, 5 delete       -> 3 goes; the tombstone 5 stays until the next compaction
//	c: 2 put, 3 delete       -> both go, and the key with them
const (
	sweepEntries  = 1024 // records that one step looks at
	tombstoneWork = 4    // records that are as much work as taking a key out of the tree
	deleteRows    = 256  // rows that one step deletes unless Options say otherwise; under a millisecond
	vacuumPages   = 64   // pages that one step gives back; about a millisecond
)

// vacuumStep is what a step that gives pages back should take at most.
const vacuumStep = 4 * time.Millisecond

// Free pages are kept for reuse up to this: giving every page back only to ask for it again would be
// work for nothing.
const (
	keepFreePages   = 256
	keepFreePercent = 10
)

// compactor is the background half.
type compactor struct {
	kick chan struct{}

	mu sync.Mutex
	// memory is the revision up to which everything that compactions made unreachable has left memory. It belongs to the
	// holder of the commit token.
	memory int64
	swept  int64         // no row is left that a compaction up to here made unreachable
	moved  chan struct{} // closed and replaced when swept moves
}

func (c *compactor) init() {
	c.kick = make(chan struct{}, 1)
	c.moved = make(chan struct{})
	c.swept, c.memory = -1, -1
}

func (c *compactor) wake() {
	select {
	case c.kick <- struct{}{}:
	default:
	}
}

// done notes that everything up to rev is swept, and says whether that is news.
func (c *compactor) done(rev int64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if rev <= c.swept {
		return false
	}
	c.swept = rev
	close(c.moved)
	c.moved = make(chan struct{})
	return true
}

// WaitCompacted returns when the rows that compaction at rev made unreachable are gone from the database
// (CompactionRequest.physical).
func (db *DB) WaitCompacted(ctx context.Context, rev int64) error {
	for {
		db.compactor.mu.Lock()
		swept, moved := db.compactor.swept, db.compactor.moved
		db.compactor.mu.Unlock()
		if swept >= rev {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		case <-db.ctx.Done():
			return ErrClosed
		}
	}
}

// stepRetry is how long the compactor waits after a step that could not be written.
const stepRetry = time.Second

func (db *DB) compactLoop() {
	var heal <-chan time.Time // when a NOSPACE alarm may go; nil: there is none to look after
	for {
		select {
		case <-db.compactor.kick:
		case <-heal:
			heal = nil
			if db.clearNoSpace() != nil {
				heal = time.After(stepRetry)
			}
			continue
		case <-db.ctx.Done():
			return
		}
		for db.compactOnce() != nil {
			if !db.pause(stepRetry) {
				return
			}
		}
		if heal == nil && db.alarms.current().has(pb.AlarmType_NOSPACE) {
			heal = time.After(db.opts.NoSpaceHold)
		}
	}
}

func (db *DB) pause(d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-db.ctx.Done():
		return false
	}
}

// compactOnce removes everything that the present compaction revision made unreachable, and returns free
// space to the file system.
func (db *DB) compactOnce() error {
	start := time.Now()
	target := db.current.Load().compact
	db.remember()
	if err := db.waitForReaders(target); err != nil {
		return err
	}
	rest := resting{db: db}
	for more := true; more; {
		took, err := db.step(func() error { more = db.sweep(target); return nil })
		if err != nil {
			return err
		}
		db.compacting(took)
		if more && !rest.after(took) {
			return db.ctx.Err()
		}
	}
	removeRows := db.removeGarbage
	if db.shared != nil {
		removeRows = db.sweepShared
	}
	rows, err := removeRows(target)
	if err != nil {
		return err
	}
	db.marks.dropBefore(target)
	if db.compactor.done(target) {
		if h := db.opts.Hooks.CompactionDone; h != nil {
			h(target, rows, time.Since(start))
		}
	}
	return db.vacuum()
}

// compacting reports a step.
func (db *DB) compacting(took time.Duration) {
	if f := db.opts.Hooks.CompactionStep; f != nil {
		f(took)
	}
}

// removeGarbage deletes the rows that nothing refers to any more.
func (db *DB) removeGarbage(int64) (rows int64, err error) {
	// What is swept meanwhile waits for the next time, and so need not be sorted with the rest.
	var ids []int64
	var file uint64
	if _, err := db.step(func() error { ids, file = db.takeGarbage(); return nil }); err != nil {
		return 0, err
	}
	slices.Sort(ids)
	rows = int64(len(ids))
	rest := resting{db: db, least: db.opts.CompactionPause}
	for len(ids) > 0 {
		took, err := db.step(func() (err error) { ids, err = db.deleteGarbage(ids, file); return err })
		if err != nil {
			return 0, err
		}
		db.compacting(took)
		if len(ids) > 0 && !rest.after(took) {
			return 0, db.ctx.Err()
		}
	}
	return rows, nil
}

// vacuum gives free pages back. It stops when there is a compaction to do, which will call it again. What one page costs
// grows with the number of free pages (SQLite looks for it in the list of them), so the steps are made as short as it takes.
func (db *DB) vacuum() error {
	rest := resting{db: db}
	pages := vacuumPace()
	for done := false; !done && len(db.compactor.kick) == 0; {
		var worked time.Duration
		took, err := db.step(func() error {
			var err error
			worked, done, err = db.log.vacuum(pages.n)
			return err
		})
		if err != nil {
			return err
		}
		pages.after(worked)
		if !done && !rest.after(took) {
			return db.ctx.Err()
		}
	}
	return nil
}

// pace is how much one step of background work does: as much as takes about its goal.
type pace struct {
	n, most int
	goal    time.Duration
}

// vacuumPace is in pages.
func vacuumPace() pace { return pace{vacuumPages, vacuumPages, vacuumStep} }

// after a step that worked so long. What a disk takes to sync the step is not for this to know: it is the same for a small
// one, and a slow disk would make the steps ever smaller and the whole ever longer.
func (p *pace) after(worked time.Duration) {
	switch {
	case worked > p.goal:
		p.n = max(p.n/2, 1)
	case worked < p.goal/2:
		p.n = min(2*p.n, p.most)
	}
}

// resting leaves time to others between the steps of background work, whatever the disk: half of it while there are
// writes, and more if the steps are long; a fifth while there are none, and who reads does not wait for a step.
type resting struct {
	db    *DB
	rev   int64
	least time.Duration
}

// after a step that took so long; false when the database is being closed.
func (r *resting) after(took time.Duration) bool {
	rev := r.db.current.Load().rev
	switch {
	case rev == r.rev:
		took = min(took/4, 20*time.Millisecond)
	case took > vacuumStep:
		took = min(4*took, time.Second)
	}
	r.rev = rev
	return r.db.pause(max(took, r.least))
}

// step runs f under the commit token and says how long it took. An error is reported.
func (db *DB) step(f func() error) (took time.Duration, err error) {
	// It is not left alone half way: what f captures belongs to the caller again when this returns.
	err = db.submit(context.Background(), &pending{step: func() error {
		start := time.Now()
		defer func() { took = time.Since(start) }()
		if db.replica != nil {
			if err := db.replica.failure(); err != nil {
				return err
			}
		}
		return f()
	}})
	if err != nil && db.ctx.Err() == nil {
		explained := db.current.Load().log.explain(err)
		if db.opts.Hooks.StorageError != nil {
			db.opts.Hooks.StorageError(explained)
		}
		if db.replica != nil {
			if errors.Is(explained, ErrDamaged) {
				_ = db.replica.fail(explained)
			}
			db.tellFailure()
		}
	}
	return took, err
}

// waitForReaders waits until nobody holds a View from before the compaction at target: then no reader can
// reach what it made unreachable.
func (db *DB) waitForReaders(target int64) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		var oldest int64
		if _, err := db.step(func() error { oldest = db.oldestCompact(); return nil }); err != nil {
			return err
		}
		if oldest >= target {
			return nil
		}
		if !db.pause(wait) {
			return db.ctx.Err()
		}
	}
}

// sweep takes the next records up to target out of memory, and notes their rows as garbage; more says whether there is
// more to do. REQUIRES: the commit token; no View is held that is older than the compaction at target.
func (db *DB) sweep(target int64) (more bool) {
	st := &db.st
	treeChanged := false
	n := 0
	room := func() bool { n++; return n <= sweepEntries }
	for len(st.waiting) > 0 && db.index.recs.at(st.waiting[0]).rev < target && room() {
		treeChanged = db.sweepTombstone(st.waiting[0]) || treeChanged
		n += tombstoneWork
		st.waiting = st.waiting[1:]
	}
	for st.log.len() > 0 && room() {
		rec := st.log.front()
		r := db.index.recs.at(rec)
		if r.rev > target {
			break
		}
		st.log.pop()
		if r.prev != 0 {
			db.sweepSuperseded(r)
		}
		switch {
		case !r.tombstone():
		case r.rev == target:
			st.waiting = append(st.waiting, rec)
		default:
			treeChanged = db.sweepTombstone(rec) || treeChanged
			n += tombstoneWork
		}
	}
	if treeChanged {
		db.publish()
	}
	db.logical.Store(st.logical)

	return db.sweepable(target)
}

// takeGarbage hands out the ids of the rows that nothing refers to any more, and the number of the file they are in.
// REQUIRES: the commit token.
func (db *DB) takeGarbage() (ids []int64, file uint64) {
	ids, db.st.garbage = db.st.garbage, nil
	return ids, db.st.file
}

// deleteGarbage deletes the next of the rows that were taken, and returns the rest: none where the file has been replaced.
// What cannot be deleted is garbage again. REQUIRES: the commit token.
func (db *DB) deleteGarbage(ids []int64, file uint64) (rest []int64, err error) {
	if file != db.st.file {
		return nil, nil
	}
	n := min(len(ids), cmp.Or(db.opts.CompactionBatch, deleteRows))
	if err := db.log.deleteRows(ids[:n]); err != nil {
		db.st.garbage = append(db.st.garbage, ids...)
		return nil, err
	}
	return ids[n:], nil
}

// sweepable says whether records up to target are left.
func (db *DB) sweepable(target int64) bool {
	st := &db.st
	return len(st.waiting) > 0 && db.index.recs.at(st.waiting[0]).rev < target ||
		st.log.len() > 0 && db.index.recs.at(st.log.front()).rev <= target
}

// sweepSuperseded frees the record before r. No reader walks past r: they all read at r's revision or later.
func (db *DB) sweepSuperseded(r *record) {
	prev := db.index.recs.at(r.prev)
	if prev.id != 0 {
		db.dropRow(prev)
	}
	db.freeRecord(r.prev)
	r.prev = 0
}

// sweepTombstone drops the row of a tombstone, and if nothing has been written to the key since, the key.
// It reports whether the tree changed. A tombstone that has been written over stays in memory, without its
// row, until what follows it is swept.
func (db *DB) sweepTombstone(rec uint32) (treeChanged bool) {
	st := &db.st
	r := db.index.recs.at(rec)
	key := []byte(st.tombs[rec])
	delete(st.tombs, rec)
	db.dropRow(r)
	r.id = 0
	slot, _, ok := st.keys.get(key)
	if !ok || db.index.slots.head(slot) != rec {
		return false
	}
	st.keys.delete(key)
	// Readers of the present View may be standing on both.
	st.retired = append(st.retired, rec)
	st.retiredSlots = append(st.retiredSlots, slot)
	return true
}

func (db *DB) dropRow(r *record) {
	db.st.garbage = append(db.st.garbage, r.id)
	db.st.logical -= int64(r.size) + rowOverhead
}

// clearNoSpace lets the NOSPACE alarm go when compaction has made room, some time after it has: somebody who makes room by
// hand, and disarms the alarm as etcd's manual says, is to find it.
func (db *DB) clearNoSpace() error {
	var gone []alarmKey
	if _, err := db.step(func() error { gone = db.outlived(); return nil }); err != nil {
		return err
	}
	for _, k := range gone {
		clear := &pb.AlarmRequest{Action: pb.AlarmRequest_DEACTIVATE, MemberID: k.member, Alarm: k.alarm}
		if _, err := db.Write(db.ctx, Command{Request: clear}); err != nil {
			return err
		}
	}
	return nil
}
