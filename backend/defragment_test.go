package backend

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"modernc.org/libc"
	sqlite3 "modernc.org/sqlite/lib"
)

// sparse fills a store so that compaction leaves a little of every page.
func sparse(t *testing.T, rnd *rand.Rand, db *DB) {
	t.Helper()
	const keys, kept = 8000, 2
	for i := 0; i < keys; i += 100 {
		var ops []*pb.RequestOp
		for k := range 100 {
			value := make([]byte, rnd.IntN(1600))
			if rnd.IntN(200) == 0 {
				value = make([]byte, 100_000)
			}
			ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: fmt.Appendf(nil, "k%06d", i+k), Value: value}}})
		}
		mustWrite(t, db, &pb.TxnRequest{Success: ops})
	}
	for i := 0; i < keys; i += 100 {
		var ops []*pb.RequestOp
		for k := range 100 {
			if (i+k)%kept > 0 {
				ops = append(ops, deleteOp(fmt.Sprintf("k%06d", i+k), ""))
			}
		}
		mustWrite(t, db, &pb.TxnRequest{Success: ops})
	}
	mustWrite(t, db, &pb.CompactionRequest{Revision: db.Revision()})
	mustPut(t, db, "newest", "")
	settled(t, db)
}

func TestDefragmentGivesRoomBack(t *testing.T) {
	path := testPath(t)
	db := openTest(t, path, Options{})
	defragments(t, seed(t), db)
	mustDo(t, db.Close())
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if logical := openTest(t, path, Options{}).Stats().LogicalBytes; info.Size() > logical*5/4 {
		t.Errorf("the file has %d bytes, for %d", info.Size(), logical)
	}
}

func TestReplicaDefragmentGivesRoomBack(t *testing.T) {
	defragments(t, seed(t), openReplicaTest(t, testPath(t), Options{}))
}

func defragments(t *testing.T, rnd *rand.Rand, db *DB) {
	t.Helper()
	sparse(t, rnd, db)
	before, want := db.Stats(), contents(t, db)
	if before.DBSizeInUse < before.LogicalBytes*4/3 {
		t.Fatalf("the pages are too full for this test: %+v", before)
	}
	mustDo(t, db.Defragment(t.Context()))
	after := db.Stats()
	t.Logf("%d of %d bytes in use, after it %d of %d, for %d", before.DBSizeInUse, before.DBSize, after.DBSizeInUse, after.DBSize, after.LogicalBytes)
	if after.DBSize != after.DBSizeInUse || after.DBSize > after.LogicalBytes*5/4 {
		t.Errorf("after the defragmentation %d of %d bytes are in use, for %d", after.DBSizeInUse, after.DBSize, after.LogicalBytes)
	}
	mustEqual(t, "after a defragmentation", contents(t, db), want)
	mustDo(t, db.Defragment(t.Context()))
	mustEqual(t, "after another one", contents(t, db), want)
	mustGoOn(t, db)
}

// TestDefragmentDuringWrites: nothing is lost of what is written, read and compacted meanwhile, by whoever, and no write
// waits for long.
func TestDefragmentDuringWrites(t *testing.T) {
	db := openTest(t, testPath(t), Options{ValueCacheBytes: 1})
	sparse(t, seed(t), db)
	done := make(chan struct{})
	var busy sync.WaitGroup
	var waits []time.Duration
	busy.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			default:
			}
			start := time.Now()
			mustPut(t, db, fmt.Sprintf("n%d", i%20), fmt.Sprint(i))
			waits = append(waits, time.Since(start))
			if i%100 == 99 {
				mustWrite(t, db, &pb.CompactionRequest{Revision: db.Revision() - 10})
			}
			for _, key := range []string{fmt.Sprintf("n%d", i%20), "k000002", "newest"} {
				if got := mustGet(t, db, key); len(got.Kvs) != 1 {
					t.Errorf("%s is not there", key)
				}
			}
		}
	})
	var both sync.WaitGroup
	for range 2 {
		both.Go(func() { mustDo(t, db.Defragment(t.Context())) })
	}
	both.Wait()
	close(done)
	busy.Wait()
	slices.Sort(waits)
	t.Logf("%d puts meanwhile, p99 %v, the slowest %v", len(waits), waits[len(waits)*99/100], waits[len(waits)-1])
	if len(waits) < 20 {
		t.Errorf("only %d puts were made meanwhile", len(waits))
	}
	settled(t, db)
	mustGoOn(t, db)
}

// TestDefragmentOnASlowDisk: a disk that takes long to sync does not make the steps ever smaller, and so the whole endless.
func TestDefragmentOnASlowDisk(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	sparse(t, seed(t), db)
	commits := 0
	slow := func(*libc.TLS, uintptr) int32 {
		commits++
		time.Sleep(2 * repackStep)
		return 0
	}
	alone(t, db, func() error {
		w := sqliteOf(db).w
		sqlite3.Xsqlite3_commit_hook(w.tls, w.db, cFunction(slow), 0)
		return nil
	})
	stats := db.Stats()
	mustDo(t, db.Defragment(t.Context()))
	alone(t, db, func() error {
		w := sqliteOf(db).w
		sqlite3.Xsqlite3_commit_hook(w.tls, w.db, 0, 0)
		return nil
	})
	// The race detector alone makes them four rows small.
	if rows := int(stats.Keys); commits < 5 || commits > rows/2 {
		t.Errorf("%d commits for %d rows", commits, rows)
	}
}

// TestDefragmentEndsWithItsContext, and what it has done remains.
func TestDefragmentEndsWithItsContext(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	sparse(t, seed(t), db)
	want := contents(t, db)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
	defer cancel()
	if err := db.Defragment(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("it ended with %v", err)
	}
	if err := db.Defragment(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("one that came too late ended with %v", err)
	}
	mustEqual(t, "after a part of a defragmentation", contents(t, db), want)
	mustGoOn(t, db)
}

func TestDefragmentOfADatabaseThatIsClosed(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	mustDo(t, db.Close())
	if err := db.Defragment(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("it ended with %v", err)
	}
}

// TestPostgresDefragment: rows that were deleted make room for new ones.
func TestPostgresDefragment(t *testing.T) {
	o := pgTestOptions(t)
	db := openPostgresTest(t, o, Options{})
	sparse(t, seed(t), db)
	want := contents(t, db)
	mustDo(t, db.Defragment(t.Context()))
	mustEqual(t, "after a defragmentation", contents(t, db), want)
}

// TestDefragmentFails: whatever statement fails, the rows are all there, and the next attempt goes on.
func TestDefragmentFails(t *testing.T) {
	path := testPath(t)
	db := openTest(t, path, Options{})
	for i := range 100 {
		mustPut(t, db, fmt.Sprintf("k%02d", i), string(make([]byte, 1000)))
	}
	want := contents(t, db)
	failures, last := 0, int64(0)
	for n := 1; ; n++ {
		var s *statements
		alone(t, db, func() error {
			s = watch(t, sqliteOf(db).w)
			defer s.unwatch()
			s.pragmas, s.failAt = true, n
			var err error
			if last, _, err = sqliteOf(db).repackRows(10, 50); (err != nil) != (s.failed != "") {
				t.Errorf("statement %d, %q: %v", n, s.failed, err)
			}
			return nil
		})
		mustEqual(t, "after a failed step", contents(t, db), want)
		if s.failed == "" {
			break
		}
		failures++
	}
	if failures < 7 || last != 60 {
		t.Errorf("%d statements failed, and then rows up to %d were written", failures, last)
	}
	f := failWrites(t, &writeFault{at: 1, all: true, errno: syscall.ENOSPC})
	if err := db.Defragment(t.Context()); !errors.Is(err, ErrDiskFull) || !f.hit() {
		t.Errorf("a defragmentation on a full disk: %v", err)
	}
	heal()
	mustDo(t, db.Defragment(t.Context()))
	mustEqual(t, "in the end", contents(t, db), want)
	closeAndCheck(t, db, path)
	mustEqual(t, "after a restart", contents(t, openTest(t, path, Options{})), want)
}
