package backend

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
)

// openStore opens the databases of the tests that other storage modes have to pass too.
var openStore = OpenSQLite

// openTest opens a database that is closed, and checked as a whole, when the test ends.
func openTest(t *testing.T, path string, o Options) *DB {
	t.Helper()
	db, err := openStore(t.Context(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeAndCheck(t, db, path) })
	return db
}

func closeAndCheck(t *testing.T, db *DB, path string) {
	t.Helper()
	if err := db.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	report, err := CheckSQLite(context.Background(), path, nil)
	sound(t, report, err)
}

// sound demands that a check of the whole database has found nothing.
func sound(t *testing.T, report CheckReport, err error) {
	t.Helper()
	if err != nil {
		t.Errorf("check: %v", err)
	}
	for _, p := range report.Problems {
		t.Errorf("check: %s", p)
	}
}

func testPath(t *testing.T) string { return filepath.Join(t.TempDir(), "quire.db") }

func seed(t *testing.T) *rand.Rand {
	n := uint64(time.Now().UnixNano())
	if s := os.Getenv("QUIRE_SEED"); s != "" {
		var err error
		if n, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("QUIRE_SEED=%d", n)
	return rand.New(rand.NewPCG(n, 0))
}

// alone runs f as the holder of the commit token: nothing else touches the committer's state or connection.
func alone(t *testing.T, db *DB, f func() error) {
	t.Helper()
	if _, err := db.step(f); err != nil {
		t.Fatal(err)
	}
}

func sqliteOf(db *DB) *sqliteLog { return db.log.(*sqliteLog) }

func execAlone(t *testing.T, db *DB, sql string) {
	t.Helper()
	alone(t, db, func() error { return sqliteOf(db).w.exec(sql) })
}

func mustPut(t *testing.T, db *DB, key, value string) int64 {
	t.Helper()
	return mustWrite(t, db, &pb.PutRequest{Key: []byte(key), Value: []byte(value)}).(*pb.PutResponse).Header.Revision
}

func mustWrite(t *testing.T, db *DB, req proto.Message) proto.Message {
	t.Helper()
	resp, err := db.Write(t.Context(), Command{Request: req})
	if err != nil {
		t.Fatalf("%T: %v", req, err)
	}
	return resp
}

// model is a dumb store: every revision of every key, for ever.
type model struct {
	rev, compact int64
	keys         map[string][]*mvccpb.KeyValue // by revision; a nil value with CreateRevision 0 is a tombstone
	events       []*mvccpb.Event
}

func newModel() *model { return &model{rev: 1, compact: -1, keys: map[string][]*mvccpb.KeyValue{}} }

func (m *model) at(key string, rev int64) *mvccpb.KeyValue {
	revs := m.keys[key]
	for i := len(revs) - 1; i >= 0; i-- {
		if revs[i].ModRevision <= rev {
			if revs[i].CreateRevision == 0 {
				return nil
			}
			return revs[i]
		}
	}
	return nil
}

func (m *model) put(key, value string) {
	m.rev++
	m.putNow(key, value)
}

// putNow is a put that belongs to the newest revision.
func (m *model) putNow(key, value string) {
	kv := &mvccpb.KeyValue{Key: []byte(key), Value: []byte(value), CreateRevision: m.rev, ModRevision: m.rev, Version: 1}
	if old := m.at(key, m.rev); old != nil {
		kv.CreateRevision, kv.Version = old.CreateRevision, old.Version+1
	}
	m.keys[key] = append(m.keys[key], kv)
	m.events = append(m.events, &mvccpb.Event{Type: mvccpb.Event_PUT, Kv: kv})
}

func (m *model) sorted(from, end string, rev int64) (kvs []*mvccpb.KeyValue) {
	var keys []string
	for k := range m.keys {
		if k >= from && k < end {
			keys = append(keys, k)
		}
	}
	sort.Strings(keys)
	for _, k := range keys {
		if kv := m.at(k, rev); kv != nil {
			kvs = append(kvs, kv)
		}
	}
	return kvs
}

func (m *model) deleteRange(from, end string) {
	doomed := m.sorted(from, end, m.rev)
	if len(doomed) == 0 {
		return
	}
	m.rev++
	m.deleteNow(doomed)
}

// deleteNow is a deletion that belongs to the newest revision.
func (m *model) deleteNow(doomed []*mvccpb.KeyValue) {
	for _, kv := range doomed {
		tomb := &mvccpb.KeyValue{Key: kv.Key, ModRevision: m.rev}
		m.keys[string(kv.Key)] = append(m.keys[string(kv.Key)], tomb)
		m.events = append(m.events, &mvccpb.Event{Type: mvccpb.Event_DELETE, Kv: tomb})
	}
}

// TestModel runs random writes, compactions and restarts, and compares every kind of read with the model: at
// every revision that is not compacted, and over the whole history. Its value cache is so small that most reads
// come from SQL.
func TestModel(t *testing.T) {
	rnd := seed(t)
	for _, cache := range []int64{1, 3 << 20, 64 << 20} {
		t.Run(fmt.Sprintf("cache=%d", cache), func(t *testing.T) {
			path := testPath(t)
			playModel(t, rnd, modelStore{
				operations: 600,
				processes:  1,
				open: func() *DB {
					db, err := openStore(t.Context(), path, Options{ValueCacheBytes: cache})
					if err != nil {
						t.Fatal(err)
					}
					return db
				},
				close: func(db *DB) { closeAndCheck(t, db, path) },
			})
		})
	}
}

// modelStore is a database to compare with the model. Several processes may have it open at once; each operation goes
// to one of them.
type modelStore struct {
	operations int
	processes  int
	open       func() *DB
	close      func(*DB)
}

func playModel(t *testing.T, rnd *rand.Rand, s modelStore) {
	t.Helper()
	dbs := make([]*DB, s.processes)
	for i := range dbs {
		dbs[i] = s.open()
	}
	m := newModel()
	newKey := func() string { return fmt.Sprintf("k%02d", rnd.IntN(30)) }
	for i := range s.operations {
		at := rnd.IntN(len(dbs))
		db, key := dbs[at], newKey()
		newValue := func() string { return string(bytes.Repeat([]byte{byte(i)}, rnd.IntN(3000))) }
		switch p := rnd.IntN(100); {
		case p < 55:
			value := newValue()
			if rev := mustPut(t, db, key, value); rev != m.rev+1 {
				t.Fatalf("a put made revision %d, want %d", rev, m.rev+1)
			}
			m.put(key, value)
		case p < 65:
			m.txn(t, db, key, newKey(), newValue())
		case p < 85:
			end := key + "\x00"
			if rnd.IntN(4) == 0 {
				end = newKey()
			}
			mustWrite(t, db, &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(end)})
			m.deleteRange(key, end)
		case p < 90 && m.rev > m.compact:
			m.compact = max(m.compact, 0) + 1 + rnd.Int64N(m.rev-max(m.compact, 0))
			mustWrite(t, db, &pb.CompactionRequest{Revision: m.compact})
			if rnd.IntN(2) == 0 {
				if err := db.WaitCompacted(t.Context(), m.compact); err != nil {
					t.Fatal(err)
				}
			}
		case p < 92:
			s.close(db)
			dbs[at] = s.open()
		default:
			compareWithModel(t, db, m, rnd)
		}
	}
	for _, db := range dbs {
		compareWithModel(t, db, m, rnd)
	}
	for _, db := range dbs {
		s.close(db)
	}
}

// txn puts one key if another exists, and else deletes it and puts two: what depends on what is there, and makes several
// rows at one revision.
func (m *model) txn(t *testing.T, db *DB, key, other, value string) {
	t.Helper()
	if key == other {
		return
	}
	put := func(key string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: []byte(value)}}}
	}
	resp := mustWrite(t, db, &pb.TxnRequest{
		Compare: []*pb.Compare{{Key: []byte(other), Target: pb.Compare_VERSION, Result: pb.Compare_GREATER, TargetUnion: &pb.Compare_Version{}}},
		Success: []*pb.RequestOp{put(key), deleteOp(other, "")},
		Failure: []*pb.RequestOp{put(other), put(key)},
	}).(*pb.TxnResponse)
	there := m.at(other, m.rev)
	m.rev++
	if there != nil {
		m.putNow(key, value)
		m.deleteNow([]*mvccpb.KeyValue{there})
	} else {
		m.putNow(other, value)
		m.putNow(key, value)
	}
	if resp.Succeeded != (there != nil) || resp.Header.Revision != m.rev {
		t.Fatalf("a Txn succeeded: %t, at revision %d; want %t, %d", resp.Succeeded, resp.Header.Revision, there != nil, m.rev)
	}
}

func compareWithModel(t *testing.T, db *DB, m *model, rnd *rand.Rand) {
	t.Helper()
	if err := db.Linearizable(t.Context()); err != nil {
		t.Fatal(err)
	}
	v := db.View()
	defer v.Release()
	if v.Revision() != m.rev || v.compact != m.compact {
		t.Fatalf("at revision %d compacted %d, want %d and %d", v.Revision(), v.compact, m.rev, m.compact)
	}
	rev := max(m.compact, 1) + rnd.Int64N(m.rev-max(m.compact, 1)+1)
	for _, rev := range []int64{m.rev, rev, max(m.compact, 1), max(m.compact, m.rev-5, 1)} {
		want := m.sorted("k", "l", rev)
		got, err := v.Range(t.Context(), &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l"), Revision: rev})
		if err != nil {
			t.Fatal(err)
		}
		if len(got.KVs) != len(want) || got.Count != int64(len(want)) {
			t.Fatalf("at %d: %d keys (count %d), want %d", rev, len(got.KVs), got.Count, len(want))
		}
		for i, f := range got.KVs {
			if !proto.Equal(f.KeyValue(), want[i]) {
				t.Fatalf("at %d: got %.80v, want %.80v", rev, f.KeyValue(), want[i])
			}
		}
		compareHash(t, db, m, rev)
		counted, err := v.Range(t.Context(), &pb.RangeRequest{Key: []byte("k1"), RangeEnd: []byte("k2"), Revision: rev, CountOnly: true})
		if err != nil || counted.Count != int64(len(m.sorted("k1", "k2", rev))) {
			t.Fatalf("at %d: count %d (%v), want %d", rev, counted.Count, err, len(m.sorted("k1", "k2", rev)))
		}
	}
	var wantEvents []*mvccpb.Event
	for _, e := range m.events {
		if e.Kv.ModRevision >= rev {
			wantEvents = append(wantEvents, e)
		}
	}
	var got []Event
	for next := rev; next <= m.rev; {
		page, err := db.History(t.Context(), HistoryRequest{From: next, Key: []byte{0}, RangeEnd: []byte{0}, MaxEvents: 1 + rnd.IntN(20)})
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, page.Events...)
		next = page.Next
	}
	if len(got) != len(wantEvents) {
		t.Fatalf("history from %d: %d events, want %d", rev, len(got), len(wantEvents))
	}
	for i, e := range got {
		w := wantEvents[i]
		if e.Type != w.Type || e.Rev != w.Kv.ModRevision || !proto.Equal(e.KV.KeyValue(), w.Kv) {
			t.Fatalf("history from %d: event %d is %v %.60v, want %.60v", rev, i, e.Type, e.KV.KeyValue(), w)
		}
		var prev *mvccpb.KeyValue
		if e.Rev-1 >= m.compact {
			prev = m.at(string(e.Key), e.Rev-1)
		}
		f, err := db.PrevKV(t.Context(), e.Key, e.Rev)
		if err != nil || (f == nil) != (prev == nil) || f != nil && !proto.Equal(f.KeyValue(), prev) {
			t.Fatalf("previous value of %q at %d: %v (%v), want %.60v", e.Key, e.Rev, f, err, prev)
		}
	}
}

// TestReadersDuringWrites: a View does not change, whatever is written, compacted and freed meanwhile.
func TestReadersDuringWrites(t *testing.T) {
	readDuringWrites(t, 300, openTest(t, testPath(t), Options{ValueCacheBytes: 2 << 20}))
}

// readDuringWrites reads from and writes to processes on one database, all at once; each of four writers writes so often.
func readDuringWrites(t *testing.T, writes int, dbs ...*DB) {
	t.Helper()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var reads atomic.Int64
	for r := range 3 {
		db := dbs[r%len(dbs)]
		wg.Add(1)
		go func() {
			defer wg.Done()
			for {
				select {
				case <-stop:
					return
				default:
				}
				v := db.View()
				req := &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l")}
				a, err := v.Range(context.Background(), req)
				if err != nil {
					t.Error(err)
				}
				for _, f := range a.KVs {
					kv := f.KeyValue()
					if kv.ModRevision > v.Revision() || string(kv.Value[:len(kv.Key)]) != string(kv.Key) {
						t.Errorf("View %d: key %q modified at %d has the value of %q", v.Revision(), kv.Key, kv.ModRevision, kv.Value[:3])
					}
				}
				b, err := v.Range(context.Background(), req)
				if err != nil {
					t.Error(err)
				}
				if len(a.KVs) != len(b.KVs) || int64(len(a.KVs)) != a.Count {
					t.Errorf("a View changed: %d keys, then %d (count %d)", len(a.KVs), len(b.KVs), a.Count)
				}
				for i := range min(len(a.KVs), len(b.KVs)) {
					if !bytes.Equal(a.KVs[i], b.KVs[i]) {
						t.Errorf("a View changed at key %d", i)
					}
				}
				v.Release()
				reads.Add(1)
			}
		}()
	}
	var writers sync.WaitGroup
	for w := range 4 {
		writers.Add(1)
		go func() {
			defer writers.Done()
			rnd := rand.New(rand.NewPCG(uint64(w), 1))
			for i := range writes {
				db := dbs[rnd.IntN(len(dbs))]
				key := fmt.Sprintf("k%02d", rnd.IntN(50))
				var req proto.Message = &pb.PutRequest{Key: []byte(key), Value: append([]byte(key), make([]byte, rnd.IntN(4000))...)}
				switch {
				case i%7 == 3:
					req = &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte("k49")}
				case i%11 == 5:
					req = &pb.CompactionRequest{Revision: db.Revision()}
				}
				if _, err := db.Write(context.Background(), Command{Request: req}); err != nil && !errors.Is(err, ErrCompacted) {
					t.Error(err)
				}
			}
		}()
	}
	writers.Wait()
	close(stop)
	wg.Wait()
	t.Logf("%d reads beside %d revisions", reads.Load(), dbs[0].Revision())
}

// TestCompactionFreesMemory: what compaction removes is used again, and a held View delays it.
func TestCompactionFreesMemory(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	for i := range 50 {
		mustPut(t, db, fmt.Sprintf("k%d", i%10), "v")
	}
	v := db.View()
	rev := db.Revision()
	mustWrite(t, db, &pb.CompactionRequest{Revision: rev})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := db.WaitCompacted(ctx, rev); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("rows went away under a View: %v", err)
	}
	if res, err := v.Range(t.Context(), &pb.RangeRequest{Key: []byte("k0"), Revision: 2}); err != nil || len(res.KVs) != 1 {
		t.Fatalf("the View from before the compaction has lost revision 2: %v", err)
	}
	v.Release()
	if err := db.WaitCompacted(t.Context(), rev); err != nil {
		t.Fatal(err)
	}
	var before, after uint32
	alone(t, db, func() error { before = db.index.recs.next; return nil })
	for i := range 30 {
		mustPut(t, db, fmt.Sprintf("k%d", i%10), "w")
	}
	alone(t, db, func() error { after = db.index.recs.next; return nil })
	if before != after {
		t.Errorf("%d records were allocated beside the 40 that compaction freed", after-before)
	}
}

// TestDiskFull: a batch that finds no room changes nothing, in memory as on disk; reads go on; and so do
// writes once there is room.
func TestDiskFull(t *testing.T) {
	path := testPath(t)
	var failed, healed atomic.Int64
	db := openTest(t, path, Options{Hooks: Hooks{
		StorageError:  func(error) { failed.Add(1) },
		StorageHealed: func() { healed.Add(1) },
	}})
	mustPut(t, db, "a", "1")
	mustPut(t, db, "b", "1")
	lease := mustWrite(t, db, &pb.LeaseGrantRequest{TTL: 1000}).(*pb.LeaseGrantResponse).ID
	alone(t, db, func() error {
		pages, err := sqliteOf(db).w.pageCount()
		return errors.Join(err, sqliteOf(db).w.exec(fmt.Sprintf("PRAGMA max_page_count = %d", pages)))
	})
	big := bytes.Repeat([]byte("x"), 100<<10)
	rev := db.Revision()
	txn := &pb.TxnRequest{Success: []*pb.RequestOp{
		{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte("a")}}},
		{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("b"), Value: big, Lease: lease}}},
		{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("new"), Value: big, Lease: lease}}},
	}}
	for range 3 {
		if _, err := db.Write(t.Context(), Command{Request: txn}); !errors.Is(err, ErrDiskFull) {
			t.Fatalf("got %v, want ErrDiskFull", err)
		}
		if !errors.Is(db.Err(), ErrDiskFull) {
			t.Errorf("Err is %v", db.Err())
		}
		v := db.View()
		res, err := v.Range(t.Context(), &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z")})
		if err != nil || res.Revision != rev || res.Count != 2 || len(res.KVs) != 2 || string(res.KVs[1].Value()) != "1" {
			t.Fatalf("after a failed batch: %v, %+v", err, res)
		}
		v.Release()
		if s, ok := db.Lease(lease, true); !ok || len(s.Keys) != 0 {
			t.Errorf("the failed batch left keys on the lease: %v", s.Keys)
		}
	}
	execAlone(t, db, "PRAGMA max_page_count = 1073741823")
	if got := mustWrite(t, db, txn).(*pb.TxnResponse).Header.Revision; got != rev+1 {
		t.Errorf("the write after the failures has revision %d, want %d: revisions have no gaps", got, rev+1)
	}
	if db.Err() != nil || failed.Load() != 3 || healed.Load() != 1 {
		t.Errorf("Err %v, %d failures and %d recoveries reported", db.Err(), failed.Load(), healed.Load())
	}
	if s, _ := db.Lease(lease, true); len(s.Keys) != 2 {
		t.Errorf("keys on the lease: %q", s.Keys)
	}
}

// TestCommittedThoughReportedFailed: if a commit that SQLite reported as failed is found in the database, quire
// refuses to number further rows over it.
func TestCommittedThoughReportedFailed(t *testing.T) {
	path := testPath(t)
	db, err := OpenSQLite(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	mustPut(t, db, "a", "1")
	execAlone(t, db, "INSERT INTO revisions SELECT id+1, rev+1, 0, create_rev, version+1, lease, 0, committed_at, author, key, value FROM revisions")
	alone(t, db, func() error { db.suspect = true; return nil })
	if _, err := db.Write(t.Context(), Command{Request: &pb.PutRequest{Key: []byte("a")}}); !errors.Is(err, ErrStorage) {
		t.Fatalf("got %v, want ErrStorage", err)
	}
	closeAndCheck(t, db, path)
	again := openTest(t, path, Options{})
	if again.Revision() != 3 {
		t.Errorf("after the restart at revision %d, want 3", again.Revision())
	}
	mustPut(t, again, "a", "3")
}

func TestQuotaRaisesNoSpaceAndClearsIt(t *testing.T) {
	changes := make(chan bool, 10)
	const hold = 300 * time.Millisecond
	db := openTest(t, testPath(t), Options{QuotaBytes: 64 << 10, NoSpaceHold: hold, Hooks: Hooks{Alarm: func(_ *pb.AlarmMember, raised bool) { changes <- raised }}})
	var err error
	puts := 0
	for ; err == nil && puts < 1000; puts++ {
		_, err = db.Write(t.Context(), Command{Request: &pb.PutRequest{Key: []byte("k"), Value: make([]byte, 1<<10)}})
	}
	if !errors.Is(err, ErrNoSpace) || len(db.Alarms()) != 1 || !<-changes {
		t.Fatalf("after %d puts: %v, alarms %v", puts, err, db.Alarms())
	}
	if _, err := db.Write(t.Context(), Command{Request: &pb.LeaseGrantRequest{TTL: 10}}); !errors.Is(err, ErrNoSpace) {
		t.Errorf("a grant got %v", err)
	}
	// Reading and deleting go on, and compaction makes room.
	mustWrite(t, db, &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestDeleteRange{
		RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte("k")}}}}})
	compacted := time.Now()
	mustWrite(t, db, &pb.CompactionRequest{Revision: db.Revision()})
	if raised := <-changes; raised || len(db.Alarms()) != 0 {
		t.Fatalf("alarms after the compaction: %v", db.Alarms())
	}
	if took := time.Since(compacted); took < hold {
		t.Errorf("the alarm has stood for %v only: who made room by hand does not find it", took)
	}
	mustPut(t, db, "k", "v")
}

func TestALeaseIDThatIsTakenIsDrawnAgainButNotOneTheClientChose(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	draws := []int64{7, 7, 7, 8}
	db.drawLeaseID = func() int64 {
		id := draws[0]
		draws = draws[1:]
		return id
	}
	for _, want := range []int64{7, 8} {
		if got := mustWrite(t, db, &pb.LeaseGrantRequest{TTL: 100}).(*pb.LeaseGrantResponse).ID; got != want {
			t.Errorf("drew %d, want %d", got, want)
		}
	}
	if _, err := db.Write(t.Context(), Command{Request: &pb.LeaseGrantRequest{ID: 7, TTL: 100}}); !errors.Is(err, ErrLeaseExists) {
		t.Errorf("a chosen id that is taken: %v", err)
	}
}

func TestLeaseDeadlinesSurviveARestart(t *testing.T) {
	path := testPath(t)
	db, err := OpenSQLite(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	mustWrite(t, db, &pb.LeaseGrantRequest{ID: 7, TTL: 2})
	mustWrite(t, db, &pb.LeaseGrantRequest{ID: 8, TTL: 500})
	mustWrite(t, db, &pb.PutRequest{Key: []byte("short"), Lease: 7})
	mustWrite(t, db, &pb.PutRequest{Key: []byte("long"), Lease: 8})
	deadlines := map[int64]int64{7: db.leases.byID[7].deadline, 8: db.leases.byID[8].deadline}
	closeAndCheck(t, db, path)

	expired := make(chan int64, 1)
	db = openTest(t, path, Options{Hooks: Hooks{LeaseExpired: func(id int64) { expired <- id }}})
	for id, want := range deadlines {
		if l := db.leases.byID[id]; l == nil || l.deadline != want {
			t.Errorf("lease %d: %+v, want deadline %d", id, l, want)
		}
	}
	if s, ok := db.Lease(8, true); !ok || s.GrantedTTL != 500 || len(s.Keys) != 1 || string(s.Keys[0]) != "long" {
		t.Errorf("lease 8: %+v", s)
	}
	rev := db.Revision()
	if id := <-expired; id != 7 || time.Now().UnixMicro() < deadlines[7] {
		t.Errorf("lease %d expired at %v", id, time.Now())
	}
	h, err := db.History(t.Context(), HistoryRequest{From: rev + 1, Key: []byte{0}, RangeEnd: []byte{0}})
	if err != nil || len(h.Events) != 1 || h.Events[0].Type != mvccpb.Event_DELETE || string(h.Events[0].Key) != "short" {
		t.Errorf("expiry left %v (%v)", h.Events, err)
	}
}

func putOp(key string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key)}}}
}

func deleteOp(key, end string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(end)}}}
}

func txnOp(ops ...*pb.RequestOp) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{Success: ops}}}
}

// TestTxnWritesAKeyOnce: Txns that end the process of an etcd are refused, and what is no conflict is not.
func TestTxnWritesAKeyOnce(t *testing.T) {
	for _, c := range []struct {
		name string
		ops  []*pb.RequestOp
		want error
	}{
		{"a put, then a delete of it", []*pb.RequestOp{txnOp(putOp("b")), txnOp(deleteOp("b", ""))}, ErrDuplicateKey},
		{"a delete up to the end, then a put", []*pb.RequestOp{deleteOp("a", "\x00"), putOp("live")}, ErrDuplicateKey},
		{"two puts", []*pb.RequestOp{txnOp(putOp("b")), putOp("c"), txnOp(txnOp(putOp("b")))}, ErrDuplicateKey},
		{"a put of a key that the delete did not find", []*pb.RequestOp{txnOp(deleteOp("b", "")), txnOp(putOp("b"))}, nil},
		{"two deletes", []*pb.RequestOp{deleteOp("live", ""), deleteOp("a", "\x00")}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			db := openTest(t, testPath(t), Options{})
			mustPut(t, db, "live", "")
			_, err := db.Write(t.Context(), Command{Request: &pb.TxnRequest{Success: c.ops}})
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if want := int64(2); c.want != nil && db.Revision() != want {
				t.Errorf("a refused Txn left revision %d", db.Revision())
			}
			mustPut(t, db, "after", "")
		})
	}
}

// TestLeaseThatRanOutWhileClosed: its client could not renew it, so it gets a grace after the start.
func TestLeaseThatRanOutWhileClosed(t *testing.T) {
	path := testPath(t)
	db, err := OpenSQLite(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	mustWrite(t, db, &pb.LeaseGrantRequest{ID: 7, TTL: 1000})
	mustWrite(t, db, &pb.PutRequest{Key: []byte("k"), Lease: 7})
	execAlone(t, db, "UPDATE lease SET deadline = deadline - 2000000000")
	closeAndCheck(t, db, path)
	if db, err = OpenSQLite(t.Context(), path, Options{}); err != nil {
		t.Fatal(err)
	}
	if s, ok := db.Lease(7, true); !ok || s.TTL < 5 || s.TTL > 10 || len(s.Keys) != 1 {
		t.Fatalf("after the restart: %+v, %v", s, ok)
	}
	want := db.leases.byID[7].deadline
	closeAndCheck(t, db, path)
	db = openTest(t, path, Options{})
	if got := db.leases.byID[7].deadline; got != want {
		t.Errorf("the second restart moved the deadline by %d µs", got-want)
	}
	if r := mustWrite(t, db, &pb.LeaseKeepAliveRequest{ID: 7}).(*pb.LeaseKeepAliveResponse); r.TTL != 1000 {
		t.Errorf("renewed for %d s", r.TTL)
	}
}

// TestStorageFailureWithALeaseDue: the expiry loop tries again at its own pace, and what failed batches leave behind
// is freed although no batch succeeds.
func TestStorageFailureWithALeaseDue(t *testing.T) {
	var failures atomic.Int64
	db := openTest(t, testPath(t), Options{MinLeaseTTL: 1, Hooks: Hooks{StorageError: func(error) { failures.Add(1) }}})
	mustWrite(t, db, &pb.LeaseGrantRequest{ID: 7, TTL: 1})
	for i := range 20 {
		mustWrite(t, db, &pb.PutRequest{Key: fmt.Appendf(nil, "k%d", i), Lease: 7})
	}
	execAlone(t, db, "CREATE TEMP TRIGGER refuse BEFORE INSERT ON revisions BEGIN SELECT RAISE(ABORT, 'refused'); END")
	time.Sleep(2 * time.Second) // the lease is due after one
	if n := failures.Load(); n < 1 || n > 5 {
		t.Errorf("%d attempts in a second", n)
	}
	for range 50 {
		if _, err := db.Write(t.Context(), Command{Request: &pb.PutRequest{Key: []byte("k")}}); !errors.Is(err, ErrStorage) {
			t.Fatalf("got %v", err)
		}
	}
	alone(t, db, func() error {
		if n := len(db.st.retired); n != 0 || len(db.st.views) > 1 {
			t.Errorf("failed batches have left %d records and %d Views", n, len(db.st.views))
		}
		return nil
	})
	execAlone(t, db, "DROP TRIGGER temp.refuse")
	for len(db.Leases()) > 0 {
		time.Sleep(10 * time.Millisecond) // the loop's next attempt
	}
}

// TestCorruptAlarmKeepsLeases: under CORRUPT nothing is revoked and renewals go on, as in etcd.
func TestCorruptAlarmKeepsLeases(t *testing.T) {
	db := openTest(t, testPath(t), Options{MinLeaseTTL: 1})
	mustWrite(t, db, &pb.LeaseGrantRequest{ID: 7, TTL: 1})
	mustWrite(t, db, &pb.LeaseGrantRequest{ID: 8, TTL: 100})
	mustWrite(t, db, &pb.PutRequest{Key: []byte("k"), Lease: 7})
	corrupt := &pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, MemberID: 1, Alarm: pb.AlarmType_CORRUPT}
	mustWrite(t, db, corrupt)
	rev := db.Revision()
	time.Sleep(1500 * time.Millisecond) // past the deadline
	mustWrite(t, db, &pb.LeaseKeepAliveRequest{ID: 8})
	if _, err := db.Write(t.Context(), Command{Request: &pb.PutRequest{Key: []byte("k")}}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a put got %v", err)
	}
	if db.Revision() != rev || len(db.Leases()) != 2 {
		t.Errorf("at revision %d with %d leases", db.Revision(), len(db.Leases()))
	}
	mustWrite(t, db, &pb.AlarmRequest{Action: pb.AlarmRequest_DEACTIVATE, MemberID: 1, Alarm: pb.AlarmType_CORRUPT})
	for len(db.Leases()) != 1 {
		time.Sleep(10 * time.Millisecond) // the loop's next attempt
	}
}

// TestEventsDoNotPinValues: the memory of values stays within its budget, whatever events are held.
func TestEventsDoNotPinValues(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	mustPut(t, db, "k", "v")
	h, err := db.History(t.Context(), HistoryRequest{From: 2, Key: []byte("k")})
	if err != nil || len(h.Events) != 1 {
		t.Fatal(h, err)
	}
	v := db.View()
	defer v.Release()
	res, err := v.Range(t.Context(), &pb.RangeRequest{Key: []byte("k")})
	if err != nil {
		t.Fatal(err)
	}
	if &h.Events[0].KV[0] == &res.KVs[0][0] || cap(h.Events[0].KV) > 64 {
		t.Error("an event lies in the slab of its value")
	}
}

// TestHeldViewKeepsNoOthers: Views that nobody holds go, although an older one is held.
func TestHeldViewKeepsNoOthers(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	v := db.View()
	defer v.Release()
	for i := range 50 {
		mustPut(t, db, fmt.Sprint(i), "")
	}
	alone(t, db, func() error {
		if n := len(db.st.views); n > 2 {
			t.Errorf("%d Views are kept because of one", n)
		}
		return nil
	})
}

// TestUnreadableRowFailsItsReaderOnly: a Command that cannot read a damaged row fails, and nobody else's.
func TestUnreadableRowFailsItsReaderOnly(t *testing.T) {
	path := testPath(t)
	db, err := OpenSQLite(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	mustPut(t, db, "a", "1")
	mustPut(t, db, "b", "1")
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if db, err = OpenSQLite(t.Context(), path, Options{}); err != nil {
		t.Fatal(err)
	}
	execAlone(t, db, "DELETE FROM revisions WHERE rev = 2")
	alone(t, db, func() error {
		b := db.newBatch(db.now(), db.now())
		if _, err := b.apply(Command{Request: &pb.PutRequest{Key: []byte("a"), PrevKv: true}}); !errors.Is(err, ErrDamaged) {
			t.Errorf("got %v, want ErrDamaged", err)
		}
		if _, err := b.apply(Command{Request: &pb.PutRequest{Key: []byte("b"), PrevKv: true}}); err != nil || b.failure != nil {
			t.Errorf("the next command: %v, the batch: %v", err, b.failure)
		}
		b.rollback()
		db.publish()
		return nil
	})
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestLostTail: a database that ends before its compaction revision is refused, not continued.
func TestLostTail(t *testing.T) {
	path := testPath(t)
	db, err := OpenSQLite(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		mustPut(t, db, "k", "v")
	}
	mustWrite(t, db, &pb.CompactionRequest{Revision: 9})
	execAlone(t, db, "DELETE FROM revisions WHERE rev > 7")
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenSQLite(t.Context(), path, Options{}); !errors.Is(err, ErrDamaged) {
		t.Errorf("got %v, want ErrDamaged", err)
	}
}

// TestKeepAliveOfADueLease: a lease whose time is over is not renewed, even before it is revoked.
func TestKeepAliveOfADueLease(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	mustWrite(t, db, &pb.LeaseGrantRequest{ID: 7, TTL: 100})
	alone(t, db, func() error {
		b := db.newBatch(db.now()+(200*time.Second).Microseconds(), db.now())
		if _, err := b.apply(Command{Request: &pb.LeaseKeepAliveRequest{ID: 7}}); !errors.Is(err, ErrLeaseNotFound) {
			t.Errorf("got %v, want ErrLeaseNotFound", err)
		}
		b.rollback()
		return nil
	})
}

// TestApplyIsDeterministic: the same Commands at the same times make the same rows.
func TestApplyIsDeterministic(t *testing.T) {
	rnd := seed(t)
	dbs := [2]*DB{openTest(t, testPath(t), Options{}), openTest(t, testPath(t), Options{})}
	now := time.Now().Add(time.Hour).UnixMicro() // ahead of the expiry loops, which have nothing to do here
	for step := range 400 {
		var req proto.Message
		key := []byte(fmt.Sprintf("k%d", rnd.IntN(20)))
		lease := 1 + rnd.Int64N(5)
		switch rnd.IntN(6) {
		case 0:
			req = &pb.LeaseGrantRequest{ID: lease, TTL: 5 + rnd.Int64N(50)}
		case 1:
			req = &pb.LeaseRevokeRequest{ID: lease}
		case 2:
			req = &pb.PutRequest{Key: key, Lease: lease}
		case 3:
			req = &pb.DeleteRangeRequest{Key: key, RangeEnd: []byte("k5")}
		default:
			req = &pb.PutRequest{Key: key, Value: []byte(strconv.Itoa(step)), PrevKv: true}
		}
		now += rnd.Int64N(3e6)
		var rows [2][]row
		var answers [2]string
		for i, db := range dbs {
			alone(t, db, func() (failure error) {
				b := db.newBatch(now, now)
				expired := b.applyExpiry()
				resp, err := b.apply(Command{Request: req, Author: "a"})
				answers[i] = fmt.Sprint(expired, resp, err)
				rows[i] = b.rows
				if b.dirty() {
					failure = sqliteOf(db).write(b)
				}
				db.publish()
				b.leases.unlock()
				return failure
			})
		}
		if answers[0] != answers[1] {
			t.Fatalf("step %d: %s and %s", step, answers[0], answers[1])
		}
		for i := range rows[0] {
			a, b := rows[0][i], rows[1][i]
			if a.id != b.id || a.rev != b.rev || a.sub != b.sub || !bytes.Equal(a.frame, b.frame) {
				t.Fatalf("step %d: row %d differs", step, i)
			}
		}
	}
}

func TestFrameIsTheEncodingOfTheProto(t *testing.T) {
	for _, kv := range []keyValue{
		{key: []byte("k"), value: []byte("v"), create: 2, mod: 3, version: 4, lease: 5},
		{key: []byte("tombstone"), mod: 1 << 40},
		{key: bytes.Repeat([]byte("k"), 300), value: bytes.Repeat([]byte{0}, 70000), create: 1 << 62, mod: 1<<63 - 1, version: 1, lease: -1},
		{},
	} {
		f := Frame(kv.appendFrame(nil))
		if len(f) != kv.frameSize() {
			t.Errorf("frameSize says %d, it has %d bytes", kv.frameSize(), len(f))
		}
		want := &mvccpb.KeyValue{Key: kv.key, Value: kv.value, CreateRevision: kv.create, ModRevision: kv.mod, Version: kv.version, Lease: kv.lease}
		wire, err := proto.MarshalOptions{Deterministic: true}.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(wire, f.Message()) {
			t.Errorf("%.60x, want %.60x", f.Message(), wire)
		}
		if !bytes.Equal(f.Key(), kv.key) || !bytes.Equal(f.Value(), kv.value) || !proto.Equal(f.KeyValue(), want) {
			t.Errorf("a frame does not give back what it was made of: %.60v", f.KeyValue())
		}
	}
}

// TestWriteCancelled: a Command that still waits when its context ends is withdrawn.
func TestWriteCancelled(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	release := make(chan struct{})
	started := make(chan struct{})
	go db.step(func() error { close(started); <-release; return nil })
	<-started
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := db.Write(ctx, Command{Request: &pb.PutRequest{Key: []byte("withdrawn")}})
		done <- err
	}()
	for {
		db.queue.mu.Lock()
		n := len(db.queue.items)
		db.queue.mu.Unlock()
		if n == 1 {
			break
		}
		time.Sleep(time.Millisecond) // until the goroutine has queued its entry
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	close(release)
	if rev := mustPut(t, db, "next", ""); rev != 2 {
		t.Errorf("the withdrawn write took a revision: the next one has %d", rev)
	}
}
