package backend

import (
	"context"
	"fmt"
	"sort"
	"sync"

	"go.etcd.io/etcd/api/v3/mvccpb"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
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
	err  error
}

const (
	loadPageRows     = 4096
	loadPagesAhead   = 4
	loadProgressRows = 256 << 10
)

// load reads the whole database into memory. REQUIRES: nothing else uses db yet.
func (db *DB) load(ctx context.Context) error {
	st := &db.st
	st.rev, st.compact, st.nextID = 1, -1, 1
	st.tombs = make(map[uint32]string)
	if err := db.loadMeta(); err != nil {
		return err
	}
	total, err := db.log.w.queryInt64(sqliteCountRows)
	if err != nil {
		return err
	}
	if err := db.loadRows(ctx, total); err != nil {
		return err
	}
	if st.compact > st.rev {
		return fmt.Errorf("%w: it is compacted at revision %d, but its newest revision is %d: the end is missing, restore a backup", ErrDamaged, st.compact, st.rev)
	}
	st.logical += leaseCharge * int64(len(db.leases.byID))
	return nil
}

func (db *DB) loadMeta() error {
	st := &db.st
	err := db.each(sqliteMeta, func(s *stmt) error {
		switch s.columnText(0) {
		case metaCompactRevision:
			st.compact = s.columnInt64(1)
		case metaOtherChanges:
			st.others = uint64(s.columnInt64(1))
		}
		return nil
	})
	if err != nil {
		return err
	}
	err = db.each(sqliteLeases, func(s *stmt) error {
		db.leases.insert(&lease{
			id: s.columnInt64(0), ttl: s.columnInt64(1), deadline: s.columnInt64(2), keys: make(map[string]struct{}),
		})
		return nil
	})
	if err != nil {
		return err
	}
	set := make(alarmSet)
	err = db.each(sqliteAlarms, func(s *stmt) error {
		set[alarmKey{uint64(s.columnInt64(0)), pb.AlarmType(s.columnInt64(1))}] = struct{}{}
		return nil
	})
	db.alarms.set(set)
	return err
}

// each runs a statement through the writing connection and calls f for every row.
func (db *DB) each(sql string, f func(s *stmt) error) error { return eachRow(db.log.w, sql, f) }

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

func (db *DB) loadRows(ctx context.Context, total int64) error {
	ctx, cancel := context.WithCancel(ctx)
	pages := make(chan *loadPage, loadPagesAhead)
	var scanner sync.WaitGroup
	scanner.Add(1)
	go func() {
		defer scanner.Done()
		defer close(pages)
		db.scan(ctx, pages)
	}()
	defer scanner.Wait()
	defer cancel()

	l := loader{db: db, slotOf: make(map[string]uint32, min(total, 1<<20))}
	var done int64
	for p := range pages {
		if p.err != nil {
			return p.err
		}
		start := uint32(0)
		for i := range p.rows {
			w := &p.rows[i]
			if err := l.row(w, p.keys[start:w.keyEnd]); err != nil {
				return err
			}
			start = w.keyEnd
		}
		done += int64(len(p.rows))
		if f := db.opts.Hooks.LoadProgress; f != nil && (done/loadProgressRows != (done-int64(len(p.rows)))/loadProgressRows || done == total) {
			f(done, total)
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	l.finish()
	return nil
}

// scan sends the rows in pages, and an error as the last page.
func (db *DB) scan(ctx context.Context, pages chan<- *loadPage) {
	p := &loadPage{}
	send := func() error {
		select {
		case pages <- p:
			p = &loadPage{rows: make([]loadRow, 0, loadPageRows), keys: make([]byte, 0, cap(p.keys))}
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	err := db.each(sqliteLoadRows, func(s *stmt) error {
		key := s.columnBlob(8)
		p.keys = append(p.keys, key...)
		p.rows = append(p.rows, loadRow{
			id: s.columnInt64(0), rev: s.columnInt64(1), create: s.columnInt64(2), version: s.columnInt64(3),
			lease: s.columnInt64(4), deleted: s.columnInt64(5) != 0, size: uint32(s.columnInt64(6)) + uint32(len(key)),
			at: s.columnInt64(7), keyEnd: uint32(len(p.keys)),
		})
		if len(p.rows) == loadPageRows {
			return send()
		}
		return nil
	})
	p.err = err
	if len(p.rows) > 0 || err != nil {
		select {
		case pages <- p:
		case <-ctx.Done():
		}
	}
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

// rowEvent makes an event of a history row.
func rowEvent(s *stmt) Event {
	kv := rowKeyValue(s)
	e := Event{Rev: kv.mod, Type: mvccpb.Event_PUT}
	if s.columnInt64(4) != 0 {
		e.Type = mvccpb.Event_DELETE
		kv.create, kv.version, kv.lease, kv.value = 0, 0, 0, nil
	}
	e.KV = kv.appendFrame(make([]byte, 0, kv.frameSize()))
	e.Key = e.KV.Key()
	return e
}
