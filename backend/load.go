package backend

import (
	"context"
	"errors"
	"fmt"
	"sort"
)

// Opening a database rebuilds the index from the narrow columns of the rows; no value is read. One goroutine
// steps through the rows, another builds, so that both cores work.

// loadRow is a row without its value; its key lies in the page's keys.
type loadRow struct {
	id, rev, create, version, lease, at int64
	size                                uint32
	deleted                             bool
	keyEnd                              uint32
}

// loadPage is a run of rows on its way from the scanner to the builder.
type loadPage struct {
	rows []loadRow
	keys []byte
}

const (
	loadPageRows     = 4096
	loadPagesAhead   = 4
	loadProgressRows = 256 << 10
)

// loadBeside is what stands beside the rows.
type loadBeside struct {
	compact int64 // -1: never compacted
	others  uint64
	leases  []leaseChange
	alarms  alarmSet
	auth    *Auth
	total   int64 // rows, about
	replica replicaState
}

func newLoadPage(keyBytes int) *loadPage {
	return &loadPage{rows: make([]loadRow, 0, loadPageRows), keys: make([]byte, 0, keyBytes)}
}

// add appends a row; its size is so far that of the value.
func (p *loadPage) add(w loadRow, key []byte) {
	p.keys = append(p.keys, key...)
	w.size += uint32(len(key))
	w.keyEnd = uint32(len(p.keys))
	p.rows = append(p.rows, w)
}

func (p *loadPage) full() bool { return len(p.rows) == loadPageRows }

// load reads the whole database into memory. REQUIRES: nothing else uses db yet.
func (db *DB) load(ctx context.Context) error {
	st := &db.st
	st.rev, st.compact, st.nextID, st.auth = 1, -1, 1, newAuth()
	st.tombs = make(map[uint32]string)

	ctx, cancel := context.WithCancel(ctx)
	started := make(chan loadBeside, 1)
	pages := make(chan *loadPage, loadPagesAhead)
	var scanned error
	go func() {
		defer close(pages)
		defer close(started)
		scanned = db.log.load(ctx, func(all loadBeside) error {
			started <- all
			return ctx.Err()
		}, func(p *loadPage) error {
			select {
			case pages <- p:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}()
	err := db.build(started, pages)
	cancel()
	for range pages { // until the scanner has ended
	}
	if err = errors.Join(err, scanned); err != nil {
		return err
	}
	if st.compact > st.rev {
		return fmt.Errorf("%w: it is compacted at revision %d, but its newest revision is %d: the end is missing, restore a backup", ErrDamaged, st.compact, st.rev)
	}
	st.logical += leaseCharge * int64(len(db.leases.byID))
	return nil
}

// build takes in what the scanner sends, until it sends no more.
func (db *DB) build(started <-chan loadBeside, pages <-chan *loadPage) error {
	st := &db.st
	beside := <-started
	st.compact, st.auth, st.others, st.replica = beside.compact, beside.auth, beside.others, beside.replica
	for _, l := range beside.leases {
		db.leases.insert(&lease{id: l.id, ttl: l.ttl, deadline: l.deadline, keys: make(map[string]struct{})})
	}
	db.alarms.set(beside.alarms)

	l := loader{db: db, slotOf: make(map[string]uint32, min(beside.total, 1<<20))}
	var done int64
	for p := range pages {
		start := uint32(0)
		for i := range p.rows {
			w := &p.rows[i]
			if err := l.row(w, p.keys[start:w.keyEnd]); err != nil {
				return err
			}
			start = w.keyEnd
		}
		before := done
		done += int64(len(p.rows))
		if f := db.opts.Hooks.LoadProgress; f != nil && (done/loadProgressRows != before/loadProgressRows || done == beside.total && done > before) {
			f(done, beside.total)
		}
	}
	l.finish()
	return nil
}

// loader builds the index. It treats rows at or before the compaction revision as a compaction does: what
// was superseded becomes garbage at once, in case the process ended before it was deleted.
type loader struct {
	db     *DB
	slotOf map[string]uint32
	keys   []string // by slot
	last   loadRow
}

func (l *loader) row(w *loadRow, key []byte) error {
	st, ix := &l.db.st, l.db.index
	if w.id <= l.last.id || w.rev < l.last.rev || w.rev < 2 {
		return fmt.Errorf("%w: row %d (revision %d) follows row %d (revision %d): restore a backup", ErrDamaged, w.id, w.rev, l.last.id, l.last.rev)
	}
	if w.rev > max(st.compact, st.rev)+1 && w.rev != l.last.rev {
		return fmt.Errorf("%w: revisions %d to %d are missing: restore a backup", ErrDamaged, max(st.compact, st.rev)+1, w.rev-1)
	}
	l.last = *w
	l.db.marks.add(w.rev, w.id)
	st.rev, st.nextID, st.clock = w.rev, w.id+1, max(st.clock, w.at)

	slot, known := l.slotOf[string(key)]
	if !known {
		slot = ix.slots.alloc()
		k := string(key)
		l.slotOf[k] = slot
		l.keys = append(l.keys, k)
	}
	head := ix.slots.head(slot)
	if w.rev <= st.compact {
		if head != 0 {
			// It is no tombstone: one from before the compaction did not get a record.
			l.db.dropRow(ix.recs.at(head))
			l.db.freeRecord(head)
			head = 0
			ix.slots.setHead(slot, 0)
		}
		if w.deleted && w.rev < st.compact {
			st.garbage = append(st.garbage, w.id)
			return nil
		}
	}
	rec := ix.recs.alloc()
	r := ix.recs.at(rec)
	r.id, r.rev, r.version, r.lease, r.prev, r.size = w.id, w.rev, w.version, w.lease, head, w.size
	if !w.deleted {
		r.create = w.create
	}
	ix.slots.setHead(slot, rec)
	if head != 0 {
		ix.vals.supersede(ix.recs.at(head))
	}
	st.logical += int64(w.size) + rowOverhead
	if w.rev > st.compact {
		st.log.push(rec)
	} else if w.deleted {
		st.waiting = append(st.waiting, rec)
	}
	if w.deleted {
		st.tombs[rec] = l.keys[slot]
	}
	return nil
}

// finish sorts the keys into the tree and attaches keys to their leases.
func (l *loader) finish() {
	ix := l.db.index
	order := make([]uint32, 0, len(l.keys))
	for slot := range l.keys {
		if ix.slots.head(uint32(slot)) == 0 {
			ix.slots.release(uint32(slot))
			continue
		}
		order = append(order, uint32(slot))
	}
	sort.Slice(order, func(i, j int) bool { return l.keys[order[i]] < l.keys[order[j]] })
	t := buildTree(len(order), func(i int) (key []byte, slot uint32, live bool) {
		slot = order[i]
		r := ix.recs.at(ix.slots.head(slot))
		if !r.tombstone() && r.lease != 0 {
			if lease := l.db.leases.byID[r.lease]; lease != nil {
				lease.keys[l.keys[slot]] = struct{}{}
			}
		}
		return []byte(l.keys[slot]), slot, !r.tombstone()
	})
	l.db.st.keys = t.edit()
	l.db.st.rev = max(l.db.st.rev, 1)
}
