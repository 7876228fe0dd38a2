package backend

import (
	"strconv"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// A compaction that pauses between its rows is cut short by a stop, and what is left goes after the next start.
func TestCompactionKeepsToItsPace(t *testing.T) {
	path := testPath(t)
	db, err := openStore(t.Context(), path, Options{CompactionBatch: 1, CompactionPause: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	const puts, rev, superseded = 10, 6, 4 // the first put is revision 2
	for i := range puts {
		mustPut(t, db, "key", strconv.Itoa(i))
	}
	mustWrite(t, db, &pb.CompactionRequest{Revision: rev})
	for rows := int64(puts); rows != puts-1; {
		time.Sleep(time.Millisecond) // the compaction runs by itself
		alone(t, db, func() (err error) {
			rows, err = sqliteOf(db).w.queryInt64("SELECT count(*) FROM revisions")
			return err
		})
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}

	removed := make(chan int64, 1)
	done := func(_, rows int64, _ time.Duration) { removed <- rows }
	openTest(t, path, Options{Hooks: Hooks{CompactionDone: done}})
	select {
	case rows := <-removed:
		if rows != superseded-1 {
			t.Errorf("%d rows were left for the next start, want %d: all but one batch", rows, superseded-1)
		}
	case <-time.After(30 * time.Second):
		t.Error("the compaction was not finished after the start")
	}
}
