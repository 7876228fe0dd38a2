package backend

import (
	"context"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
)

// state is what only the holder of the commit token reads and writes: the store ahead of the Views.
type state struct {
	keys    *treeEdit
	rev     int64 // newest revision
	compact int64 // compaction revision; -1: never compacted, as etcd counts
	auth    *Auth
	nextID  int64  // id of the next row
	others  uint64 // batches that changed something else than rows; with the rows, the applied index
	replica replicaState
	clock   int64 // µs; the newest committed_at: time does not run backwards in the history
	logical int64 // bytes of keys and values, and rowOverhead for each row, of all rows not compacted; and leaseCharge for each lease

	// log names the records at or after the compaction revision in the order of their revisions:
	// what compaction will walk next.
	log revisionLog
	// waiting holds the tombstones at exactly the compaction revision: they go with the next one.
	waiting []uint32
	// tombs holds the keys of the tombstones in log and in waiting.
	tombs map[uint32]string

	views        []*View // replaced Views, oldest first, until nobody holds them
	retired      []uint32
	retiredSlots []uint32
	garbage      []int64 // ids of rows that nothing refers to, to be deleted
	file         uint64  // counts the files that the rows were in, see Install
}

// rowOverhead is what a row is taken to cost beside its key and value, in bytes.
const rowOverhead = 64

// row is one row of the revision table on its way there.
type row struct {
	id, rev, sub           int64
	create, version, lease int64
	deleted                bool
	at                     int64 // µs; see batch.at
	author                 string
	key, value             []byte
	rec                    uint32
	frame                  Frame // as an event carries it
}

// batch is a number of Commands being applied one after the other to the committer's state, and the
// rows that come of them. Until its rows are durable nothing of it is visible: readers skip records
// newer than their View. If they cannot be written, rollback puts everything back.
type batch struct {
	ctx    context.Context
	db     *DB
	st     *state
	reader // reads the state as the Commands before left it, and the current one's own changes

	now    int64 // µs; the only clock there is in apply: DB.now when the batch began
	at     int64 // µs; committed_at of the rows: the wall clock's, but never before a row that is there
	author string
	begin  int64 // revision before the current Command
	sub    int64 // rows of the current Command so far

	rows           []row
	undo           []undoWrite
	leases         leaseChanges
	compacted      bool                // the compaction revision moved
	physical       *physicalCompaction // the last one
	alarms         alarmSet
	alarmChanges   []alarmChange
	tokens         []authToken
	failure        error
	was            savedState
	stamp          *stamp // of the entry that is being applied, in a replica; space is what is left of it
	unheard        bool   // nobody waits for the answer to the current Command: what only serves that may be left out
	membersChanged bool
	unread         error     // a row could not be read, in a replica: then nothing of the batch may be believed
	applied        time.Time // when apply was done
	graced         int64     // see DB.graced; 0: it stays
	did            Applied
}

type undoWrite struct {
	slot    uint32
	oldHead uint32
	rec     uint32
	newSlot bool
}

// savedState is the part of state that a rollback sets back by value.
type savedState struct {
	keys    *tree
	rev     int64
	compact int64
	auth    *Auth
	nextID  int64
	logical int64
	logLen  int
	clock   int64
	replica replicaState
}

// newBatch begins a batch at a time of DB.now, which is that of leases, and of the wall clock, which is that of people.
// A batch is not cancelled half way: it has no caller's context.
func (db *DB) newBatch(now, wall int64) *batch {
	st := &db.st
	st.clock = max(st.clock, wall)
	b := &batch{
		ctx: context.Background(), db: db, st: st, now: now, at: st.clock,
		was: savedState{
			keys: st.keys.tree(), rev: st.rev, compact: st.compact, auth: st.auth, nextID: st.nextID,
			logical: st.logical, logLen: st.log.len(), clock: st.clock, replica: st.replica,
		},
		alarms: db.alarms.current(),
		leases: leaseChanges{table: &db.leases},
	}
	if db.opts.Hooks.Applied != nil {
		b.did.last, b.did.Commands = time.Now(), db.appliedRoom
	}
	b.reader = reader{index: db.index, keys: st.keys, rev: st.rev, compact: st.compact, row: b.readRow, rows: b.readRows}
	return b
}

// readRow reads a row for apply: one of this batch from memory, an older one through the writing
// connection, which the committer owns.
func (b *batch) readRow(_ context.Context, id int64) (Frame, error) {
	if i := id - b.was.nextID; i >= 0 && i < int64(len(b.rows)) {
		return b.rows[i].frame, nil
	}
	f, err := b.db.log.frame(id)
	if err != nil && b.db.replica != nil {
		b.unread = err
	}
	return f, b.db.log.explain(err)
}

func (b *batch) readRows(ctx context.Context, ids []int64, each func(i int, f Frame)) error {
	if b.db.shared == nil {
		for i, id := range ids {
			f, err := b.readRow(ctx, id)
			if err != nil {
				return err
			}
			each(i, f)
		}
		return nil
	}
	// Those that are not of this batch in one round trip: other processes may be waiting for this one.
	var old []int64
	var places []int
	for i, id := range ids {
		if id < b.was.nextID {
			old, places = append(old, id), append(places, i)
		} else if f, err := b.readRow(ctx, id); err == nil {
			each(i, f)
		} else {
			return err
		}
	}
	if len(old) == 0 {
		return nil
	}
	return b.db.log.rows(ctx, old, func(i int, f Frame) { each(places[i], f) })
}

// next begins a Command.
func (b *batch) next(author string) {
	b.did.begin()
	b.author, b.begin, b.sub = author, b.st.rev, 0
	b.reader.rev, b.reader.compact = b.st.rev, b.st.compact
}

// write is the one place where a revision of a key comes into being. live says whether the key exists.
func (b *batch) write(slot uint32, known bool, kv *keyValue, deleted bool) {
	st, ix := b.st, b.db.index
	u := undoWrite{slot: slot}
	if known {
		u.oldHead = ix.slots.head(slot)
	} else {
		u.slot, u.newSlot = ix.slots.alloc(), true
	}
	kv.mod = b.begin + 1
	if u.oldHead != 0 && ix.recs.at(u.oldHead).rev >= kv.mod {
		panic(fmt.Sprintf("backend: a key is written twice in revision %d", kv.mod))
	}
	u.rec = ix.recs.alloc()
	r := ix.recs.at(u.rec)
	r.id, r.rev, r.create, r.version, r.lease = st.nextID, kv.mod, kv.create, kv.version, kv.lease
	r.prev, r.size = u.oldHead, uint32(len(kv.key)+len(kv.value))

	w := row{
		id: st.nextID, rev: kv.mod, sub: b.sub, create: kv.create, version: kv.version, lease: kv.lease,
		deleted: deleted, at: b.at, author: b.author, key: kv.key, value: kv.value, rec: u.rec,
	}
	if deleted {
		w.frame = kv.appendFrame(make([]byte, 0, kv.frameSize()))
		w.key = w.frame.Key()
		st.tombs[u.rec] = string(kv.key)
	} else {
		w.frame = ix.vals.add(u.rec, kv)
	}
	if u.oldHead != 0 {
		ix.vals.supersede(ix.recs.at(u.oldHead))
	}
	ix.slots.setHead(u.slot, u.rec)
	st.keys.set(kv.key, u.slot, !deleted)
	st.log.push(u.rec)
	st.logical += int64(r.size) + rowOverhead
	st.nextID++
	st.rev, st.clock = kv.mod, b.at
	b.reader.rev = kv.mod
	b.sub++
	b.undo = append(b.undo, u)
	b.rows = append(b.rows, w)
}

func (b *batch) put(key, value []byte, lease int64) {
	b.did.Puts++
	b.did.PutBytes += len(key) + len(value)
	kv := keyValue{key: key, value: value, create: b.begin + 1, version: 1, lease: lease}
	var oldLease int64
	slot, live, known := b.st.keys.get(key)
	if live {
		r := b.db.index.recs.at(b.db.index.slots.head(slot))
		kv.create, kv.version, oldLease = r.create, r.version+1, r.lease
	}
	b.write(slot, known, &kv, false)
	b.leases.move(key, oldLease, lease)
}

// deleteKeys deletes every key of k that exists, in key order, and returns how many.
func (b *batch) deleteKeys(k keyRange) int64 {
	b.did.Deletes++
	var keys [][]byte
	b.visit(k, b.reader.rev, false, func(key []byte, _ uint32, _ *record) bool {
		keys = append(keys, append([]byte(nil), key...))
		return true
	})
	for _, key := range keys {
		slot, _, _ := b.st.keys.get(key)
		lease := b.db.index.recs.at(b.db.index.slots.head(slot)).lease
		b.write(slot, true, &keyValue{key: key}, true)
		b.leases.move(key, lease, 0)
	}
	return int64(len(keys))
}

// dirty says whether anything has to be written.
func (b *batch) dirty() bool {
	return len(b.rows) > 0 || b.others()
}

// others says whether anything but rows has to be written.
func (b *batch) others() bool {
	return b.leases.any() || b.compacted || len(b.alarmChanges) > 0 || b.authChanged() ||
		len(b.tokens) > 0 && b.db.shared != nil // elsewhere they are kept in memory only
}

// rollback undoes the batch in memory.
func (b *batch) rollback() {
	st, ix := b.st, b.db.index
	for i := len(b.undo) - 1; i >= 0; i-- {
		u := b.undo[i]
		ix.slots.setHead(u.slot, u.oldHead)
		if u.oldHead != 0 {
			ix.vals.restore(ix.recs.at(u.oldHead))
		}
		delete(st.tombs, u.rec)
		// A reader may be looking at the record on its way past it: it is freed with its View.
		st.retired = append(st.retired, u.rec)
		if u.newSlot {
			st.retiredSlots = append(st.retiredSlots, u.slot)
		}
	}
	st.keys = b.was.keys.edit()
	st.rev, st.compact, st.auth, st.nextID = b.was.rev, b.was.compact, b.was.auth, b.was.nextID
	st.logical, st.clock, st.replica = b.was.logical, b.was.clock, b.was.replica
	st.log.truncate(b.was.logLen)
	b.leases.rollback()
}

// events turns the rows into what watchers see. The Frames are copied: an event may be held for long, and must not
// keep the whole slab of its value from leaving.
func (b *batch) events() []Event {
	events := make([]Event, len(b.rows))
	size := 0
	for i := range b.rows {
		size += len(b.rows[i].frame)
	}
	buf := make([]byte, 0, size)
	for i := range b.rows {
		w := &b.rows[i]
		start := len(buf)
		buf = append(buf, w.frame...)
		frame := Frame(buf[start:len(buf):len(buf)])
		events[i] = Event{Rev: w.rev, Type: mvccpb.Event_PUT, Key: frame.Key(), KV: frame, born: w.create == w.rev}
		if w.deleted {
			events[i].Type = mvccpb.Event_DELETE
		}
	}
	return events
}

// revisionLog is a queue of record numbers.
type revisionLog struct {
	items []uint32
	head  int
}

func (l *revisionLog) len() int       { return len(l.items) - l.head }
func (l *revisionLog) push(n uint32)  { l.items = append(l.items, n) }
func (l *revisionLog) front() uint32  { return l.items[l.head] }
func (l *revisionLog) truncate(n int) { l.items = l.items[:l.head+n] }
func (l *revisionLog) pop() (n uint32) {
	n = l.items[l.head]
	l.head++
	if l.head > 4096 && l.head > len(l.items)/2 {
		l.items = append(l.items[:0], l.items[l.head:]...)
		l.head = 0
	}
	return n
}
