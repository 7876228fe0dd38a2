package backend

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// contents prints everything that a client can find out about a database, and the revision numbers of what comes next,
// so that two states can be compared.
func contents(t *testing.T, db *DB) []string {
	t.Helper()
	var out []string
	say := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	s := db.Stats()
	say("revision %d, compacted at %d, %d keys, %d leases", s.Revision, s.CompactRevision, s.Keys, s.Leases)
	v := db.View()
	defer v.Release()
	for rev := max(v.CompactRevision(), 1); rev <= v.Revision(); rev++ {
		res, err := v.Range(t.Context(), &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Revision: rev})
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range res.KVs {
			say("at %d: %s", rev, frameText(f))
		}
	}
	all, err := db.History(t.Context(), HistoryRequest{From: v.CompactRevision(), Key: []byte{0}, RangeEnd: []byte{0}})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all.Events {
		say("event %d: %v %s", e.Rev, e.Type, frameText(e.KV))
	}
	for _, id := range db.Leases() {
		status, _ := db.Lease(id, true)
		db.leases.mu.RLock()
		say("lease %d: granted %d, until %d, keys %q", id, status.GrantedTTL, db.leases.byID[id].deadline, status.Keys)
		db.leases.mu.RUnlock()
	}
	for _, a := range db.Alarms() {
		say("alarm %v", a)
	}
	return out
}

// frameText prints a Frame, a long value by its checksum.
func frameText(f Frame) string {
	kv := f.KeyValue()
	if len(kv.Value) > 100 {
		kv.Value = fmt.Appendf(nil, "%d bytes, checksum %x", len(kv.Value), crc32.Checksum(kv.Value, crc32.MakeTable(crc32.Castagnoli)))
	}
	return kv.String()
}

func mustEqual(t *testing.T, what string, got, want []string) {
	t.Helper()
	for i := range max(len(got), len(want)) {
		g, w := "nothing", "nothing"
		if i < len(got) {
			g = got[i]
		}
		if i < len(want) {
			w = want[i]
		}
		if g != w {
			t.Fatalf("%s: line %d is\n  %s\nwant\n  %s", what, i, g, w)
		}
	}
}

// settled waits until the compaction is through: then logical bytes are what a reopened database counts too.
func settled(t *testing.T, db *DB) (logical int64) {
	t.Helper()
	if err := db.WaitCompacted(t.Context(), db.current.Load().compact); err != nil {
		t.Fatal(err)
	}
	return db.Stats().LogicalBytes
}

// reopen closes and checks a database, opens it again and wants the same in it.
func reopen(t *testing.T, db *DB, path string, o Options) *DB {
	t.Helper()
	logical, want := settled(t, db), contents(t, db)
	closeAndCheck(t, db, path)
	again, err := openStore(t.Context(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	mustEqual(t, "after a restart", contents(t, again), want)
	if got := settled(t, again); got != logical {
		t.Errorf("%d logical bytes after a restart, %d before", got, logical)
	}
	return again
}

// faultSteps are writes of every kind, each possible after those before it.
var faultSteps = []struct {
	name string
	req  proto.Message
}{
	{"put", putReq("a", "2")},
	{"put of a new key on a lease", &pb.PutRequest{Key: []byte("new"), Value: []byte("1"), Lease: 8}},
	{"put that changes the lease", &pb.PutRequest{Key: []byte("leased1"), Lease: 8}},
	{"put that detaches", &pb.PutRequest{Key: []byte("leased2")}},
	{"delete of a range", &pb.DeleteRangeRequest{Key: []byte("b"), RangeEnd: []byte("d")}},
	{"txn", &pb.TxnRequest{Success: []*pb.RequestOp{
		{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte("new")}}},
		{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("c"), Lease: 7}}},
		{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("newer"), Value: []byte("1"), Lease: 8}}},
	}}},
	{"grant", &pb.LeaseGrantRequest{ID: 9, TTL: 900}},
	{"keepalive", &pb.LeaseKeepAliveRequest{ID: 7}},
	{"revoke", &pb.LeaseRevokeRequest{ID: 7}},
	{"revoke without keys", &pb.LeaseRevokeRequest{ID: 9}},
	{"compaction", &pb.CompactionRequest{Revision: 12}},
	{"alarm", &pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, MemberID: 1, Alarm: pb.AlarmType_CORRUPT}},
	{"alarm cleared", &pb.AlarmRequest{Action: pb.AlarmRequest_DEACTIVATE, MemberID: 1, Alarm: pb.AlarmType_CORRUPT}},
	{"delete of everything", &pb.DeleteRangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}},
}

func beforeFaults(t *testing.T, path string, o Options) *DB {
	t.Helper()
	db, err := openStore(t.Context(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []int64{7, 8} {
		mustWrite(t, db, &pb.LeaseGrantRequest{ID: id, TTL: 1000})
	}
	for _, key := range []string{"a", "b", "c", "d"} {
		mustPut(t, db, key, "1")
	}
	for _, key := range []string{"leased1", "leased2"} {
		mustWrite(t, db, &pb.PutRequest{Key: []byte(key), Lease: 7})
	}
	return db
}

// failAndCheck runs req, which arm has made sure to fail, and wants nothing changed; then the next write to succeed.
func failAndCheck(t *testing.T, db *DB, req proto.Message, want error) {
	t.Helper()
	before, stats := contents(t, db), db.Stats()
	var told atomic.Int64
	cancel := db.Subscribe(func(int64) { told.Add(1) })
	_, err := db.Write(t.Context(), Command{Request: req})
	cancel()
	heal()
	if !errors.Is(err, want) || !errors.Is(db.Err(), want) {
		t.Fatalf("got %v (Err is %v), want %v", err, db.Err(), want)
	}
	mustEqual(t, "after the failure", contents(t, db), before)
	if s := db.Stats(); s.LogicalBytes != stats.LogicalBytes || s.AppliedIndex != stats.AppliedIndex {
		t.Errorf("%d logical bytes and %d commands applied, %d and %d before", s.LogicalBytes, s.AppliedIndex, stats.LogicalBytes, stats.AppliedIndex)
	}
	if told.Load() != 0 {
		t.Error("subscribers heard of a batch that failed")
	}
}

// mustGoOn wants the next write to succeed with the next revision.
func mustGoOn(t *testing.T, db *DB) {
	t.Helper()
	rev := db.Revision()
	if len(db.Alarms()) > 0 { // CORRUPT: then nothing but an alarm request is taken, one that changes nothing here
		mustWrite(t, db, &pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, MemberID: 1, Alarm: pb.AlarmType_CORRUPT})
		return
	}
	if got := mustPut(t, db, "next", fmt.Sprint(rev)); got != rev+1 {
		t.Errorf("the write after a failure has revision %d, want %d", got, rev+1)
	}
	if db.Err() != nil {
		t.Errorf("Err is %v after a write that succeeded", db.Err())
	}
}

// TestEveryStatementFails: a write whose first, second... statement fails has changed nothing, in memory and on disk,
// and the next one succeeds.
func TestEveryStatementFails(t *testing.T) {
	path := testPath(t)
	db := beforeFaults(t, path, Options{})
	defer func() { closeAndCheck(t, db, path) }()
	for _, step := range faultSteps {
		var failed []string
		for n := 1; ; n++ {
			settled(t, db)
			var s *statements
			alone(t, db, func() error { s = watch(t, sqliteOf(db).w); s.failAt = n; return nil })
			// How many statements there are is known when one too many does not come.
			if n > 1 && failed[len(failed)-1] == "COMMIT" {
				v := db.View() // keeps the compactor away, whose statements are not the write's
				mustWrite(t, db, step.req)
				alone(t, db, func() error { s.unwatch(); return nil })
				v.Release()
				if s.failed != "" {
					t.Fatalf("%s runs %q after its COMMIT", step.name, s.failed)
				}
				break
			}
			failAndCheck(t, db, step.req, ErrStorage)
			alone(t, db, func() error { s.unwatch(); return nil })
			failed = append(failed, s.failed)
			mustGoOn(t, db)
			db = reopen(t, db, path, Options{})
		}
		t.Logf("%s: failed at %q", step.name, failed)
		db = reopen(t, db, path, Options{})
	}
}

// TestEveryWriteFails does the same one level down: the first, the second... write to the WAL fails, with a full disk
// and with a broken one.
func TestEveryWriteFails(t *testing.T) {
	path := testPath(t)
	db := beforeFaults(t, path, Options{})
	defer func() { closeAndCheck(t, db, path) }()
	req := &pb.TxnRequest{Success: []*pb.RequestOp{
		{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte("a"), RangeEnd: []byte("c")}}},
		{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("c"), Value: make([]byte, 20_000), Lease: 8}}},
	}}
	for _, disk := range []struct {
		errno syscall.Errno
		want  error
	}{{syscall.ENOSPC, ErrDiskFull}, {syscall.EIO, ErrStorage}} {
		n := int64(1)
		for ; n < 100; n++ {
			settled(t, db)
			before := contents(t, db)
			f := failWrites(t, &writeFault{file: "-wal", at: n, errno: disk.errno})
			_, err := db.Write(t.Context(), Command{Request: req})
			heal()
			if !f.hit() {
				if err != nil {
					t.Fatal(err)
				}
				break
			}
			if !errors.Is(err, disk.want) || strings.Contains(err.Error(), "leased") {
				t.Fatalf("write %d: got %v, want %v", n, err, disk.want)
			}
			mustEqual(t, fmt.Sprintf("after write %d failed", n), contents(t, db), before)
			mustGoOn(t, db)
			if n%3 == 0 {
				db = reopen(t, db, path, Options{})
			}
		}
		if n < 4 {
			t.Errorf("only %d writes failed: the test tests little", n-1)
		}
		t.Logf("%v: %d writes", disk.errno, n-1)
		mustPut(t, db, "a", "again")
		mustPut(t, db, "b", "again")
		db = reopen(t, db, path, Options{})
	}
}

// TestCheckpointFails: a commit is durable when the WAL is synced; that its pages cannot be copied into the database
// fails no write, and loses nothing.
func TestCheckpointFails(t *testing.T) {
	path := testPath(t)
	db := beforeFaults(t, path, Options{})
	for _, at := range []int64{1, 2, 10} {
		f := failWrites(t, &writeFault{file: ".db", at: at, all: true, errno: syscall.EIO})
		for n := range 14 { // each of 62 pages, so several checkpoints are due
			mustPut(t, db, fmt.Sprintf("big%d", n%3), string(bytes.Repeat([]byte{byte(n)}, 500_000)))
		}
		heal()
		if !f.hit() {
			t.Fatal("nothing was written to the database: the test tests nothing")
		}
		db = reopen(t, db, path, Options{})
	}
	// Nor does Close lose anything when it cannot empty the WAL.
	mustPut(t, db, "last", string(make([]byte, 100_000)))
	want := contents(t, db)
	failWrites(t, &writeFault{file: ".db", at: 1, all: true, errno: syscall.ENOSPC})
	if err := db.Close(); !errors.Is(err, ErrDiskFull) {
		t.Errorf("Close says %v, want ErrDiskFull", err)
	}
	heal()
	db = openTest(t, path, Options{})
	mustEqual(t, "after a Close that failed", contents(t, db), want)
}

// TestOpeningFails: whichever write of a first start fails, the error is a clear one, and the next start goes well.
func TestOpeningFails(t *testing.T) {
	path := testPath(t)
	n := int64(1)
	for ; n < 500; n++ {
		f := failWrites(t, &writeFault{at: n, errno: syscall.ENOSPC})
		db, err := OpenSQLite(t.Context(), path, Options{})
		heal()
		if !f.hit() {
			if err != nil {
				t.Fatal(err)
			}
			mustPut(t, db, "a", "1")
			closeAndCheck(t, db, path)
			break
		}
		if err == nil { // such as a checkpoint, which does not matter
			mustPut(t, db, "a", "1")
			closeAndCheck(t, db, path)
		} else if !errors.Is(err, ErrDiskFull) && !errors.Is(err, ErrStorage) { // ErrStorage where database/sql lost the errno
			t.Fatalf("write %d failed: %v, want ErrDiskFull", n, err)
		} else {
			if db, err = OpenSQLite(t.Context(), path, Options{}); err != nil {
				t.Fatalf("the start after the one in which write %d failed: %v", n, err)
			}
			mustPut(t, db, "a", "1")
			closeAndCheck(t, db, path)
		}
		for _, suffix := range []string{"", "-wal", "-shm", "-journal"} {
			if err := os.Remove(path + suffix); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
		}
	}
	if n < 10 {
		t.Errorf("only %d writes failed: the test tests little", n-1)
	}
	t.Logf("%d writes", n-1)
}

// TestSweepFails: rows that a compaction made unreachable are deleted in steps. Whichever statement fails, readers see
// the same as before, and what is left is deleted with the next step or after a restart.
func TestSweepFails(t *testing.T) {
	for n := 1; ; n++ {
		path := testPath(t)
		db := beforeFaults(t, path, Options{})
		for i := range 4 {
			mustPut(t, db, "a", fmt.Sprint(i))
		}
		mustWrite(t, db, &pb.DeleteRangeRequest{Key: []byte("b")})
		mustPut(t, db, "a", "last")
		// A View keeps the compactor away; the test sweeps in its place, and never reads the View.
		v := db.View()
		target := db.Revision()
		mustWrite(t, db, &pb.CompactionRequest{Revision: target})
		before := contents(t, db)
		var failed []string
		alone(t, db, func() error {
			s := watch(t, sqliteOf(db).w)
			defer s.unwatch()
			s.failAt = n
			if more, err := sweepAll(db, target); (err != nil) != (s.failed != "") || err != nil && !more {
				t.Errorf("statement %d: more to do %v, error %v", n, more, err)
			}
			failed = s.ran
			return nil
		})
		mustEqual(t, "after a failed sweep", contents(t, db), before)
		mustGoOn(t, db)
		v.Release()
		if n%2 == 0 {
			settled(t, db)
		}
		want := contents(t, db)
		closeAndCheck(t, db, path)
		db = openTest(t, path, Options{})
		mustEqual(t, "after a restart", contents(t, db), want)
		settled(t, db)
		if report := rowsIn(t, db); report != db.Stats().Keys+int64(tombstones(db)) {
			t.Errorf("%d rows are left for %d keys", report, db.Stats().Keys)
		}
		if len(failed) < n {
			if !slices.Contains(failed, "COMMIT") {
				t.Errorf("the sweep ran %q", failed)
			}
			break
		}
	}
}

// sweepAll empties memory of what compaction at target made unreachable, and takes the first step on disk.
func sweepAll(db *DB, target int64) (more bool, err error) {
	for db.sweep(target) {
	}
	ids, file := db.takeGarbage()
	slices.Sort(ids)
	ids, err = db.deleteGarbage(ids, file)
	db.st.garbage = append(db.st.garbage, ids...)
	return len(db.st.garbage) > 0, err
}

// tombstones counts the tombstones that are kept.
func tombstones(db *DB) (n int) {
	if _, err := db.step(func() error { n = len(db.st.tombs); return nil }); err != nil {
		panic(err)
	}
	return n
}

func rowsIn(t *testing.T, db *DB) (n int64) {
	t.Helper()
	alone(t, db, func() (err error) { n, err = sqliteOf(db).w.queryInt64(sqliteCountRows); return err })
	return n
}

// TestSweepFailsMidway: of several steps one is done, the next fails, and the process ends there.
func TestSweepFailsMidway(t *testing.T) {
	path := testPath(t)
	db := beforeFaults(t, path, Options{})
	for i := range 4 {
		var ops []*pb.RequestOp
		for k := range 200 {
			ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: putReq(fmt.Sprintf("k%03d", k), fmt.Sprint(i))}})
		}
		mustWrite(t, db, &pb.TxnRequest{Success: ops})
		mustWrite(t, db, &pb.DeleteRangeRequest{Key: []byte("k0"), RangeEnd: []byte("k1")})
	}
	v := db.View()
	target := db.Revision()
	mustWrite(t, db, &pb.CompactionRequest{Revision: target})
	alone(t, db, func() error {
		before := len(db.st.garbage)
		for db.sweep(target) {
		}
		ids, file := db.takeGarbage()
		slices.Sort(ids)
		rest, err := db.deleteGarbage(ids, file)
		if before != 0 || len(ids)-len(rest) != deleteRows || len(rest) == 0 || err != nil {
			t.Errorf("the first step: %d rows of garbage before, %d after the sweep, %d now, %v", before, len(ids), len(rest), err)
		}
		s := watch(t, sqliteOf(db).w)
		defer s.unwatch()
		s.failAt = deleteRows / 2
		if none, err := db.deleteGarbage(rest, file); err == nil || len(none) > 0 || len(db.st.garbage) != len(rest) {
			t.Errorf("the second step: %d rows of %d are garbage again, %v", len(db.st.garbage), len(rest), err)
		}
		return nil
	})
	want := contents(t, db)
	v.Release()
	// Close before the compactor is back.
	closeAndCheck(t, db, path)
	db = openTest(t, path, Options{})
	mustEqual(t, "after a restart", contents(t, db), want)
	logical := settled(t, db)
	if got := rowsIn(t, db); got != db.Stats().Keys+int64(tombstones(db)) {
		t.Errorf("%d rows are left for %d keys", got, db.Stats().Keys)
	}
	var sum int64
	alone(t, db, func() (err error) {
		sum, err = sqliteOf(db).w.queryInt64("SELECT sum(length(key) + length(value) + 64) FROM revisions")
		return err
	})
	if sum += 2 * leaseCharge; sum != logical {
		t.Errorf("%d logical bytes, the rows and two leases have %d", logical, sum)
	}
}

// TestVacuumFails: giving space back may fail at any statement; nobody is told but the hook.
func TestVacuumFails(t *testing.T) {
	path := testPath(t)
	db := openTest(t, path, Options{})
	for n := range 20 {
		mustPut(t, db, fmt.Sprintf("big%d", n%2), string(bytes.Repeat([]byte{byte(n)}, 400_000)))
	}
	v := db.View()
	target := db.Revision()
	mustWrite(t, db, &pb.CompactionRequest{Revision: target})
	alone(t, db, func() error {
		for more := true; more; {
			var err error
			if more, err = sweepAll(db, target); err != nil {
				return err
			}
		}
		return nil
	})
	want := contents(t, db)
	failures := 0
	for n := 1; ; n++ {
		var s *statements
		alone(t, db, func() error {
			s = watch(t, sqliteOf(db).w)
			defer s.unwatch()
			s.pragmas, s.failAt = true, n
			if _, _, err := db.log.vacuum(vacuumPages); (err != nil) != (s.failed != "") {
				t.Errorf("statement %d, %q: %v", n, s.failed, err)
			}
			return nil
		})
		mustEqual(t, "after a failed vacuum", contents(t, db), want)
		if s.failed == "" {
			break
		}
		failures++
	}
	if failures < 3 {
		t.Errorf("only %d statements failed: the test tests little", failures)
	}
	f := failWrites(t, &writeFault{at: 1, all: true, errno: syscall.ENOSPC})
	alone(t, db, func() error {
		if _, _, err := db.log.vacuum(vacuumPages); err == nil || !f.hit() {
			t.Errorf("a vacuum on a full disk: %v", err)
		}
		return nil
	})
	heal()
	v.Release()
	settled(t, db)
	mustEqual(t, "in the end", contents(t, db), want)
	// The compactor does what is left, after it has said that the rows are gone.
	for deadline := time.Now().Add(20 * time.Second); db.Stats().DBSize > 4<<20; {
		if s := db.Stats(); time.Now().After(deadline) {
			t.Fatalf("%d bytes of file for %d in use", s.DBSize, s.DBSizeInUse)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestRealFullDisk: a file system that is really full, and then is not.
func TestRealFullDisk(t *testing.T) {
	directory := t.TempDir()
	if err := syscall.Mount("quire-test", directory, "tmpfs", 0, "size=12m"); err != nil {
		t.Skipf("needs the right to mount a small tmpfs (root): %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(directory, 0); err != nil {
			t.Error(err)
		}
	})
	path := filepath.Join(directory, "quire.db")
	db, err := OpenSQLite(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	ballast := filepath.Join(directory, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 7<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	n := 0
	for ; err == nil && n < 1000; n++ {
		_, err = db.Write(t.Context(), Command{Request: putReq(fmt.Sprintf("k%03d", n), string(bytes.Repeat([]byte("x"), 20_000)))})
	}
	if !errors.Is(err, ErrDiskFull) || !errors.Is(db.Err(), ErrDiskFull) {
		t.Fatalf("after %d puts: %v", n, err)
	}
	if got := int64(n - 1); db.Stats().Keys != got {
		t.Errorf("%d keys are there, %d puts were acknowledged", db.Stats().Keys, got)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	mustGoOn(t, db)
	mustWrite(t, db, &pb.DeleteRangeRequest{Key: []byte("next")})
	db = reopen(t, db, path, Options{})

	// Not a block is free: SQLite cannot even make its shared memory file, and opening says why.
	closeAndCheck(t, db, path)
	fillDisk(t, ballast)
	if _, err = OpenSQLite(t.Context(), path, Options{}); !errors.Is(err, ErrDiskFull) || !strings.Contains(err.Error(), "free space") {
		t.Fatalf("opening on a full disk: %v", err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	db, err = OpenSQLite(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if got := db.Stats().Keys; got != int64(n-1) {
		t.Errorf("%d keys, want %d", got, n-1)
	}
	mustGoOn(t, db)
	closeAndCheck(t, db, path)
}

// fillDisk leaves no block free in the ballast's file system.
func fillDisk(t *testing.T, ballast string) {
	t.Helper()
	f, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}
