package backend

import (
	"context"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
)

// storage is where the rows lie: the truth that everything in memory is made from. There is one for each storage mode.
//
// load is called once, before all others. write, resume, frame, deleteRows and vacuum belong to the holder of the commit
// token; the rest may be called by any goroutine at any time. Errors are given their sentinel and advice by explain.
type storage interface {
	// load reads the whole store as it was at one moment: first what stands beside the rows, then the rows in
	// order. It ends with the first error of beside or page, or with that of ctx.
	load(ctx context.Context, beside func(loadBeside) error, page func(*loadPage) error) error
	// write makes a batch durable, all of it or nothing: its rows, leases, alarms and the compaction revision.
	write(b *batch) error
	// resume is called before the next batch after one that failed, or a step that did.
	resume(st *state) error
	// frame reads a row for apply, row for a reader. REQUIRES of row: a View is held that can reach it.
	frame(id int64) (Frame, error)
	row(ctx context.Context, id int64) (Frame, error)
	// rows reads many rows for a reader, in the order of ids, and calls each with the place in ids.
	rows(ctx context.Context, ids []int64, each func(i int, f Frame)) error
	// scan calls each with the rows from the id start on, in order, until it wants no more or there are none. Of revisions
	// before from it may leave out what compaction is deleting. REQUIRES: a View is held that is not compacted after from.
	scan(ctx context.Context, start, from int64, each func(w *storedRow) (more bool)) error
	// deleteRows deletes rows that nothing refers to any more.
	deleteRows(ids []int64) error
	// vacuum gives up to n free pages back; done says that few enough are left, worked what it took but for
	// the sync.
	vacuum(n int) (worked time.Duration, done bool, err error)
	explain(err error) error
	// size is the bytes that the store takes, and how many of them are in use.
	size() (total, inUse int64)
	// reading is how many reads are under way.
	reading() int
	close() error
}

// storedRow is a row as a storage hands it out; its bytes are valid during the call only.
type storedRow struct {
	rev, create, version, lease int64
	deleted                     bool
	key, value                  []byte
	id, sub                     int64 // from scan only
}

func (w *storedRow) frame() Frame {
	kv := keyValue{mod: w.rev, create: w.create, version: w.version, lease: w.lease, key: w.key, value: w.value}
	return kv.appendFrame(make([]byte, 0, kv.frameSize()))
}

// event makes an event of a row.
func (w *storedRow) event() Event {
	e := Event{Rev: w.rev, Type: mvccpb.Event_PUT}
	kv := keyValue{mod: w.rev, create: w.create, version: w.version, lease: w.lease, key: w.key, value: w.value}
	if w.deleted {
		e.Type = mvccpb.Event_DELETE
		kv = keyValue{mod: w.rev, key: w.key}
	}
	e.KV = kv.appendFrame(make([]byte, 0, kv.frameSize()))
	e.Key = e.KV.Key()
	return e
}
