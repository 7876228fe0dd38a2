package backend

import (
	"context"
	"sync/atomic"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// View is the store as one committed batch left it: its newest revision, and through it every older
// one down to the compaction revision. It never changes, and reading it takes no lock.
//
// Views share records, slots and tree nodes. What a View can reach:
//   - its own tree, which later batches copy before they change it;
//   - for each key the newest record that is not newer than the revision asked for. A slot's head may
//     have moved on since; the reader then walks back past the newer records.
//
// A record can therefore be given back when no View can walk to it: when it was superseded at or
// before the compaction revision of the oldest View that is still held (compact.go), or, where a View
// may be standing on it, when every View of its time has been released (retired).
type View struct {
	reader
	auth *Auth
	log  storage // where its rows are
	refs atomic.Int64
	// retired is what became unreachable with the batch that replaced this View.
	retired      []uint32
	retiredSlots []uint32
}

// View returns the newest published state. The caller must Release it, soon: rows and records that a
// held View can reach are not removed by compaction.
func (db *DB) View() *View {
	for {
		v := db.current.Load()
		v.refs.Add(1)
		if db.current.Load() == v {
			return v
		}
		// A batch was published in between, and its committer may not have seen us: take the new one.
		v.refs.Add(-1)
	}
}

// Auth is who may do what as of the newest View.
func (db *DB) Auth() *Auth { return db.current.Load().auth }

// Release gives the View back.
func (v *View) Release() {
	if v.refs.Add(-1) < 0 {
		panic("backend: a View was released twice")
	}
}

// Revision is the newest revision in the View; 1 in an empty store, as in etcd.
func (v *View) Revision() int64 { return v.rev }

// CompactRevision is the revision the store is compacted at, 0 when it never was.
func (v *View) CompactRevision() int64 { return max(v.compact, 0) }

// Auth is who may read from the View.
func (v *View) Auth() *Auth { return v.auth }

// Range answers req. Its Revision (for the response header) is the View's, also where req asks for an
// older one, as in etcd. It returns ErrFutureRev or a *CompactedError for a revision that the View
// does not hold. The request's form (an empty key, unknown enums) is for the caller to check.
func (v *View) Range(ctx context.Context, req *pb.RangeRequest) (*RangeResult, error) {
	return v.rangeKeys(ctx, req, true)
}

// Page is Range without a Count: at a revision long past, counting walks every key behind the limit.
func (v *View) Page(ctx context.Context, req *pb.RangeRequest) (*RangeResult, error) {
	return v.rangeKeys(ctx, req, false)
}

// Txn answers a Txn that only reads.
func (v *View) Txn(ctx context.Context, req *pb.TxnRequest) (*pb.TxnResponse, error) {
	x := txn{ctx: ctx, reader: &v.reader}
	return x.run(req)
}

// publish makes the state of the committer visible to readers. REQUIRES: the commit token is held.
func (db *DB) publish() {
	old := db.current.Load()
	db.current.Store(db.newView())
	if old == nil {
		return
	}
	// Nobody can take the old View any more. If nobody holds it either, only those before it are in the way of
	// what was retired.
	st := &db.st
	if last := len(st.views) - 1; last >= 0 && old.refs.Load() == 0 {
		st.views[last].retired = append(st.views[last].retired, st.retired...)
		st.views[last].retiredSlots = append(st.views[last].retiredSlots, st.retiredSlots...)
	} else {
		old.retired, old.retiredSlots = st.retired, st.retiredSlots
		st.views = append(st.views, old)
	}
	st.retired, st.retiredSlots = nil, nil
	db.reclaim()
}

// newView is a View of the committed state; its rows come from the reading connections. REQUIRES: the commit token is held.
func (db *DB) newView() *View {
	return &View{auth: db.st.auth, log: db.log, reader: reader{
		index: db.index, keys: db.st.keys.tree(), rev: db.st.rev, compact: db.st.compact, row: db.log.row, rows: db.log.rows, ring: &db.ring,
	}}
}

// reclaim frees what was retired with Views that nobody holds any more, oldest first.
// REQUIRES: the commit token is held.
func (db *DB) reclaim() {
	views := db.st.views
	for len(views) > 0 && views[0].refs.Load() == 0 {
		for _, n := range views[0].retired {
			db.freeRecord(n)
		}
		for _, n := range views[0].retiredSlots {
			db.index.slots.release(n)
		}
		views[0] = nil
		views = views[1:]
	}
	db.st.views = views
}

// oldestCompact is the smallest compaction revision among the Views that are still held.
// REQUIRES: the commit token is held.
func (db *DB) oldestCompact() int64 {
	db.reclaim()
	if len(db.st.views) > 0 {
		return db.st.views[0].compact
	}
	return db.current.Load().compact
}

func (db *DB) freeRecord(n uint32) {
	r := db.index.recs.at(n)
	db.index.vals.drop(r)
	r.id, r.rev, r.create, r.version, r.lease, r.prev, r.size = 0, 0, 0, 0, 0, 0, 0
	r.val.Store(0)
	db.index.recs.release(n)
}
