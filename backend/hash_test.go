package backend

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/test/postgres"
)

// hashKV is etcd's rule worked out the slow way, from everything that ever happened.
func (m *model) hashKV(t *testing.T, rev int64) uint32 {
	t.Helper()
	there, left := make(map[*mvccpb.KeyValue]bool), make(map[*mvccpb.KeyValue]bool)
	for key := range m.keys {
		if kv := m.at(key, rev); kv != nil {
			there[kv] = true
		}
		if kv := m.at(key, m.compact); kv != nil {
			left[kv] = true
		}
	}
	h := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	h.Write([]byte("key"))
	sub := uint64(0)
	for i, e := range m.events {
		if sub++; i == 0 || e.Kv.ModRevision != m.events[i-1].Kv.ModRevision {
			sub = 0
		}
		if e.Kv.ModRevision > rev || e.Kv.ModRevision <= m.compact && (!left[e.Kv] || len(there) > 0 && !there[e.Kv]) {
			continue
		}
		name := binary.BigEndian.AppendUint64(nil, uint64(e.Kv.ModRevision))
		name = binary.BigEndian.AppendUint64(append(name, '_'), sub)
		kv := e.Kv
		if e.Type == mvccpb.Event_DELETE {
			name, kv = append(name, 't'), &mvccpb.KeyValue{Key: kv.Key}
		}
		value, err := proto.Marshal(kv)
		if err != nil {
			t.Fatal(err)
		}
		h.Write(name)
		h.Write(value)
	}
	return h.Sum32()
}

// compareHash compares HashKV with the model's.
func compareHash(t *testing.T, db *DB, m *model, rev int64) {
	t.Helper()
	want := KVHash{Hash: m.hashKV(t, rev), Revision: rev, CompactRevision: m.compact, Head: m.rev}
	if got := mustHashKV(t, db, rev); got != want {
		t.Fatalf("at revision %d the hash is %+v, want %+v", rev, got, want)
	}
}

func mustHashKV(t *testing.T, db *DB, rev int64) KVHash {
	t.Helper()
	got, err := db.HashKV(t.Context(), rev)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func mustHashRows(t *testing.T, db *DB, after, upTo int64) (hash uint32, compact int64) {
	t.Helper()
	hash, compact, err := db.HashRows(t.Context(), after, upTo)
	if err != nil {
		t.Fatal(err)
	}
	return hash, compact
}

// playWrites plays random writes on stores that are to become alike, and on the model.
func playWrites(t *testing.T, rnd *rand.Rand, m *model, n int, dbs ...*DB) {
	t.Helper()
	for i := range n {
		a, b, value := fmt.Sprintf("k%d", rnd.IntN(6)), fmt.Sprintf("k%d", rnd.IntN(6)), fmt.Sprint(i)
		var req proto.Message
		switch choice := rnd.IntN(10); {
		case choice < 4 || choice < 7 && a == b:
			req = putReq(a, value)
			m.put(a, value)
		case choice < 7:
			req = &pb.TxnRequest{Success: []*pb.RequestOp{
				{Request: &pb.RequestOp_RequestPut{RequestPut: putReq(a, value)}}, deleteOp(b, ""),
			}}
			there := m.at(b, m.rev)
			m.put(a, value)
			if there != nil {
				m.deleteNow([]*mvccpb.KeyValue{there})
			}
		case choice < 9:
			req = &pb.DeleteRangeRequest{Key: []byte(a)}
			m.deleteRange(a, a+"\x00")
		default:
			req = &pb.DeleteRangeRequest{Key: []byte(a), RangeEnd: []byte("l")}
			m.deleteRange(a, "l")
		}
		for _, db := range dbs {
			mustWrite(t, db, req)
		}
	}
}

// etcdsHashes are what etcd 3.7.3, just started, answers for the history of TestHashKVIsEtcds: by the compaction revision
// (-1: not compacted), for each revision from there on.
var etcdsHashes = map[int64][]uint32{
	-1: {1084519789, 2587454935, 2496657716, 1543696425, 2893221802, 3269532146, 1785341192, 1091550242, 3687456380},
	2:  {2587454935, 2496657716, 1163751741, 2855008449, 3269532146, 760595100, 1091550242, 4063669223},
	3:  {2496657716, 98560032, 3041832747, 3269532146, 1466303871, 1091550242, 513225969},
	4:  {3562459356, 1401271407, 1729103079, 610025639, 1345488207, 1452270188},
	5:  {1401271407, 1729103079, 4120640015, 1345488207, 4194455765},
	6:  {1084519789, 4214247573, 1514729167, 1996583395},
	7:  {4214247573, 1514729167, 1889150178},
	8:  {1084519789, 2193859217},
	9:  {2193859217},
}

// TestHashKVIsEtcds holds the answers of a real etcd; test/etcd compares with a live one.
func TestHashKVIsEtcds(t *testing.T) {
	for compact := range etcdsHashes {
		db := openTest(t, testPath(t), Options{})
		for _, req := range []proto.Message{
			&pb.LeaseGrantRequest{ID: 7, TTL: 1000},
			putReq("a", "1"),
			putReq("b", ""),
			txnOp(putOp("c"), deleteOp("b", ""), putOp("a")).GetRequestTxn(),
			&pb.PutRequest{Key: []byte("d\x00\xff"), Value: []byte("leased"), Lease: 7},
			&pb.DeleteRangeRequest{Key: []byte{0}, RangeEnd: []byte{0}},
			putReq("a", "again"),
			&pb.DeleteRangeRequest{Key: []byte("a")},
			putReq("c", "last"),
		} {
			mustWrite(t, db, req)
		}
		if compact >= 0 {
			mustWrite(t, db, &pb.CompactionRequest{Revision: compact})
		}
		for i, want := range etcdsHashes[compact] {
			rev := max(compact, 1) + int64(i)
			if got := mustHashKV(t, db, rev); got.Hash != want || got.CompactRevision != compact || got.Revision != rev {
				t.Errorf("compacted at %d, revision %d: %+v, want hash %d", compact, rev, got, want)
			}
		}
	}
}

// TestHashesDoNotDependOnTheSweep: of two stores with the same history one has deleted what was compacted and the other
// not yet. All hashes are the same, those before the compaction revision too, and stay the same.
func TestHashesDoNotDependOnTheSweep(t *testing.T) {
	rnd := seed(t)
	path := testPath(t)
	swept, late := openTest(t, path, Options{}), openTest(t, filepath.Join(t.TempDir(), "late.db"), Options{})
	sweepIndependence(t, rnd, swept, late)
}

func TestPostgresHashesDoNotDependOnTheSweep(t *testing.T) {
	rnd := seed(t)
	sweepIndependence(t, rnd, openPostgresTest(t, pgTestOptions(t), Options{}), openPostgresTest(t, pgTestOptions(t), Options{}))
}

func sweepIndependence(t *testing.T, rnd *rand.Rand, swept, late *DB) {
	t.Helper()
	m := newModel()
	for range 12 {
		playWrites(t, rnd, m, 12, swept, late)
		if m.rev == max(m.compact, 1) {
			continue
		}
		// The View keeps rows from being deleted.
		v := late.View()
		m.compact = max(m.compact, 0) + 1 + rnd.Int64N(m.rev-max(m.compact, 0))
		for _, db := range []*DB{swept, late} {
			mustWrite(t, db, &pb.CompactionRequest{Revision: m.compact})
		}
		settled(t, swept)
		compare := func() {
			for rev := max(m.compact, 1); rev <= m.rev; rev++ {
				compareHash(t, swept, m, rev)
				compareHash(t, late, m, rev)
			}
			for after := int64(0); after < m.rev; after++ {
				upTo := after + 1 + rnd.Int64N(m.rev-after)
				want, compact := mustHashRows(t, swept, after, upTo)
				if got, at := mustHashRows(t, late, after, upTo); got != want || at != m.compact || compact != m.compact {
					t.Fatalf("revisions after %d up to %d: %x at %d and %x at %d, compacted at %d", after, upTo, want, compact, got, at, m.compact)
				}
			}
			want, _, err := swept.Hash(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if got, rev, err := late.Hash(t.Context()); err != nil || got != want || rev != m.rev {
				t.Fatalf("the stores hash to %x and %x at %d, %v", want, got, rev, err)
			}
		}
		compare()
		v.Release()
		settled(t, late)
		compare()
	}
}

func TestHashKVRefuses(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	for range 10 {
		mustPut(t, db, "k", "v")
	}
	mustWrite(t, db, &pb.CompactionRequest{Revision: 5})
	if _, err := db.HashKV(t.Context(), 12); !errors.Is(err, ErrFutureRev) {
		t.Errorf("a future revision: %v", err)
	}
	var compacted *CompactedError
	if _, err := db.HashKV(t.Context(), 4); !errors.As(err, &compacted) || compacted.CompactRevision != 5 {
		t.Errorf("a compacted revision: %v", err)
	}
	if _, _, err := db.HashRows(t.Context(), 3, 12); !errors.Is(err, ErrFutureRev) {
		t.Errorf("rows up to a future revision: %v", err)
	}
	if newest := mustHashKV(t, db, 11); mustHashKV(t, db, 0) != newest {
		t.Errorf("revision 0 is %+v, the newest %+v", mustHashKV(t, db, 0), newest)
	}
	// What etcd answers: no row is older.
	if none := mustHashKV(t, db, -3); none != (KVHash{Hash: crc32.Checksum([]byte("key"), castagnoli), Revision: -3, CompactRevision: 5, Head: 11}) {
		t.Errorf("a negative revision: %+v", none)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := db.HashKV(gone, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("a request that was cancelled: %v", err)
	}
	db.hashTurn <- struct{}{} // another hash is being made
	if _, err := db.HashKV(gone, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("a request that was cancelled while it waited: %v", err)
	}
	<-db.hashTurn
	if db.View().refs.Load() != 1 {
		t.Error("a View was not released")
	}
	db.current.Load().Release()
}

// fillRevisions makes n revisions of one put each, over a number of keys.
func fillRevisions(t testing.TB, db *DB, n, keys int) {
	t.Helper()
	const writers = 32
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := w; i < n; i += writers {
				if _, err := db.Write(t.Context(), Command{Request: putReq(fmt.Sprintf("k%d", i%keys), fmt.Sprint(i))}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// TestHashRowsBeginsInTheMiddle: a part is found wherever it lies, before the compaction revision too, without reading all
// that lies before it.
func TestHashRowsBeginsInTheMiddle(t *testing.T) {
	rnd := seed(t)
	path := testPath(t)
	db, err := OpenSQLite(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	const revisions = 4000
	fillRevisions(t, db, revisions, 2500)
	compact := int64(revisions - 20)
	mustWrite(t, db, &pb.CompactionRequest{Revision: compact})
	settled(t, db)
	var rows []storedRow
	err = db.log.scan(t.Context(), 0, compact, func(w *storedRow) bool {
		row := *w
		row.key, row.value = bytes.Clone(w.key), bytes.Clone(w.value)
		rows = append(rows, row)
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // as it is, and after a restart
		for range 200 {
			after := rnd.Int64N(revisions)
			upTo := after + 1 + rnd.Int64N(min(revisions+1-after, 50))
			v := db.View()
			start, err := db.rowAfter(t.Context(), v, after)
			v.Release()
			if err != nil {
				t.Fatal(err)
			}
			var want rowHash
			passed := 0 // rows from start on that are not wanted
			for _, w := range rows {
				switch {
				case w.rev <= after && w.id >= start:
					passed++
				case w.rev > after && w.id < start:
					t.Fatalf("a row after revision %d is %d, where they begin was found to be %d", after, w.id, start)
				case w.rev > after && w.rev <= upTo:
					want.row(&w)
				}
			}
			if passed > hashSearchRows {
				t.Fatalf("to read what is after revision %d, %d rows before it are read", after, passed)
			}
			if got, at := mustHashRows(t, db, after, upTo); got != want.sum || at != compact {
				t.Fatalf("revisions after %d up to %d: %x at %d, want %x", after, upTo, got, at, want.sum)
			}
		}
		db = reopen(t, db, path, Options{})
	}
	closeAndCheck(t, db, path)
}

// TestHashSomeEndsInTime: parts one behind the other make up the whole; each ends before it is too large, with a whole
// revision.
func TestHashSomeEndsInTime(t *testing.T) {
	rnd := seed(t)
	db := openTest(t, testPath(t), Options{})
	sizes := map[int64]struct{ rows, bytes int }{}
	for rev := int64(2); rev < 300; rev++ {
		var ops []*pb.RequestOp
		bytes := 0
		for i := range 1 + rnd.IntN(5) {
			p := &pb.PutRequest{Key: fmt.Appendf(nil, "k%d", i), Value: make([]byte, rnd.IntN(2000))}
			bytes += len(p.Key) + len(p.Value)
			ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: p}})
		}
		mustWrite(t, db, &pb.TxnRequest{Success: ops})
		sizes[rev] = struct{ rows, bytes int }{len(ops), bytes}
	}
	for range 20 {
		maxRows, maxBytes := 1+rnd.IntN(40), 1+rnd.Int64N(20_000)
		for at := int64(0); at < db.Revision(); {
			reached, hash, compact, err := db.HashSome(t.Context(), at, db.Revision(), maxRows, maxBytes)
			if err != nil || reached <= at {
				t.Fatalf("after revision %d: up to %d, %v", at, reached, err)
			}
			if want, of := mustHashRows(t, db, at, reached); hash != want || compact != of {
				t.Fatalf("revisions after %d up to %d: %x, want %x", at, reached, hash, want)
			}
			rows, bytes := 0, int64(0)
			for rev := at + 1; rev < reached; rev++ {
				rows, bytes = rows+sizes[rev].rows, bytes+int64(sizes[rev].bytes)
			}
			if rows >= maxRows || bytes >= maxBytes {
				t.Fatalf("revisions after %d up to %d are %d rows and %d bytes without the last, of %d and %d", at, reached, rows, bytes, maxRows, maxBytes)
			}
			rows, bytes = rows+sizes[reached].rows, bytes+int64(sizes[reached].bytes)
			if reached < db.Revision() && rows < maxRows && bytes < maxBytes {
				t.Fatalf("revisions after %d up to %d are no more than %d rows and %d bytes, of %d and %d", at, reached, rows, bytes, maxRows, maxBytes)
			}
			at = reached
		}
	}
}

// TestHashRowsFindsWhatDiffers: a byte that is changed behind the store's back changes the hash of the part that it lies
// in, and no other.
func TestHashRowsFindsWhatDiffers(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	const revisions, part = 200, 20
	fillRevisions(t, db, revisions, revisions)
	mustWrite(t, db, &pb.CompactionRequest{Revision: 100})
	settled(t, db)
	parts := func() (all []uint32) {
		for after := int64(0); after < db.Revision(); after += part {
			hash, _ := mustHashRows(t, db, after, min(after+part, db.Revision()))
			all = append(all, hash)
		}
		return all
	}
	good := parts()
	for rev := int64(2); rev <= revisions+1; rev += 13 {
		for _, change := range []string{"value = value || x'00'", "key = key || x'00'", "lease = 1", "version = 2", "sub = 1", "deleted = 1", "create_rev = create_rev - 1"} {
			if rev <= 100 && (change[0] == 'k' || change[0] == 'd') {
				continue // by the key it is decided what is left there
			}
			execAlone(t, db, "CREATE TEMP TABLE kept AS SELECT * FROM revisions")
			execAlone(t, db, fmt.Sprintf("UPDATE revisions SET %s WHERE rev = %d", change, rev))
			for i, hash := range parts() {
				if inside := int64(i) == (rev-1)/part; (hash != good[i]) != inside {
					t.Errorf("revision %d, %s: part %d changed: %t", rev, change, i, hash != good[i])
				}
			}
			execAlone(t, db, "DELETE FROM revisions")
			execAlone(t, db, "INSERT INTO revisions SELECT * FROM kept")
			execAlone(t, db, "DROP TABLE kept")
		}
	}
}

// TestHashOfEverything: two stores hash to the same as long as they hold the same.
func TestHashOfEverything(t *testing.T) {
	a, b := openTest(t, testPath(t), Options{}), openTest(t, filepath.Join(t.TempDir(), "b.db"), Options{})
	seen := make(map[uint32]int)
	for i, req := range []proto.Message{
		putReq("k", "v"),
		&pb.LeaseGrantRequest{ID: 1, TTL: 100},
		&pb.LeaseGrantRequest{ID: 2, TTL: 100},
		&pb.LeaseRevokeRequest{ID: 1},
		&pb.PutRequest{Key: []byte("k"), Lease: 2},
		&pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, MemberID: 5, Alarm: pb.AlarmType_NOSPACE},
		&pb.DeleteRangeRequest{Key: []byte("k")},
		&pb.CompactionRequest{Revision: 3},
		&pb.CompactionRequest{Revision: 4},
	} {
		mustWrite(t, a, req)
		first, _, err := a.Hash(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		other, _, err := b.Hash(t.Context())
		if err != nil || other == first {
			t.Errorf("after step %d, which only one of them has done, both hash to %x (%v)", i, first, err)
		}
		mustWrite(t, b, req)
		same, rev, err := b.Hash(t.Context())
		if err != nil || same != first || rev != a.Revision() {
			t.Errorf("after step %d the stores hash to %x and %x at %d (%v)", i, first, same, rev, err)
		}
		if before, again := seen[first]; again {
			t.Errorf("step %d made the hash of step %d", i, before)
		}
		seen[first] = i
	}
}

// TestHashesDuringWrites: while others write and compact, whoever asks for the same thing at the same compaction revision
// gets the same hash.
func TestHashesDuringWrites(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	value := string(make([]byte, 1<<10))
	for range 2 { // several pages, by their rows and by their bytes
		var ops []*pb.RequestOp
		for k := range 10_000 {
			ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: putReq(fmt.Sprintf("k%05d", k), value)}})
		}
		mustWrite(t, db, &pb.TxnRequest{Success: ops})
	}
	whole := rowHash{sum: crc32.Checksum([]byte("key"), castagnoli)}
	if err := db.log.scan(t.Context(), 0, -1, func(w *storedRow) bool { whole.row(w); return true }); err != nil {
		t.Fatal(err)
	}
	if h := mustHashKV(t, db, 0); h.Hash != whole.sum {
		t.Fatalf("in pages the hash is %x, at once %x", h.Hash, whole.sum)
	}

	type question struct {
		rows         bool
		rev, compact int64
	}
	var mu sync.Mutex
	answers := make(map[question]uint32)
	repeated := 0
	answered := func(q question, hash uint32) {
		mu.Lock()
		defer mu.Unlock()
		if was, again := answers[q]; !again {
			answers[q] = hash
		} else if repeated++; was != hash {
			t.Errorf("%+v was %x, is now %x", q, was, hash)
		}
	}
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for range 12 {
				for _, rev := range []int64{db.CompactRevision() + 1, 0} {
					h, err := db.HashKV(t.Context(), rev)
					if errors.Is(err, ErrCompacted) {
						continue
					}
					if err != nil {
						t.Error(err)
						return
					}
					answered(question{false, h.Revision, h.CompactRevision}, h.Hash)
				}
				hash, compact, err := db.HashRows(t.Context(), 2, 5)
				if err != nil {
					t.Error(err)
					return
				}
				answered(question{true, 5, compact}, hash)
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	for i := 0; ; i++ {
		rev := mustPut(t, db, fmt.Sprintf("k%05d", i%10_000), "new")
		if i%50 == 49 {
			mustWrite(t, db, &pb.CompactionRequest{Revision: rev - 40})
		}
		select {
		case <-done:
			t.Logf("%d writes; %d questions, asked again %d times", i, len(answers), repeated)
			if len(answers) < 5 || repeated == 0 {
				t.Error("that shows nothing")
			}
			return
		default:
		}
	}
}

// BenchmarkHashKV hashes 100,000 revisions of 1 KiB; compacted, half of them are looked up in the index.
func BenchmarkHashKV(b *testing.B) {
	db := benchDB(b, filepath.Join(b.TempDir(), "quire.db"))
	benchHashKV(b, db)
	if err := db.Close(); err != nil {
		b.Fatal(err)
	}
}

func benchHashKV(b *testing.B, db *DB) {
	b.Helper()
	const keys, size = 50_000, 1 << 10
	fillBench(b, db, keys, size)
	half := db.Revision()
	fillBench(b, db, keys/2, size)
	for _, c := range []struct {
		name string
		rows int64
	}{{"whole", keys * 3 / 2}, {"compacted", keys}} {
		if c.name == "compacted" {
			if _, err := db.Write(b.Context(), Command{Request: &pb.CompactionRequest{Revision: half + 1}}); err != nil {
				b.Fatal(err)
			}
			if err := db.WaitCompacted(b.Context(), half+1); err != nil {
				b.Fatal(err)
			}
		}
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(c.rows * int64(size+len(benchKey(0))))
			for b.Loop() {
				if _, err := db.HashKV(b.Context(), 0); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkHashRows hashes 100 of 20,000 revisions, wherever they lie.
func BenchmarkHashRows(b *testing.B) {
	db := benchDB(b, filepath.Join(b.TempDir(), "quire.db"))
	const revisions = 20_000
	fillRevisions(b, db, revisions, revisions)
	for i := int64(0); b.Loop(); i++ {
		after := i * 100 % revisions
		if _, _, err := db.HashRows(b.Context(), after, after+100); err != nil {
			b.Fatal(err)
		}
	}
	if err := db.Close(); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkPostgresHashKV is BenchmarkHashKV on Postgres.
func BenchmarkPostgresHashKV(b *testing.B) {
	server := postgres.Shared(b)
	db, err := OpenPostgres(b.Context(), PostgresOptions{URL: server.DSN(postgres.Database(b, server), "postgres")}, Options{QuotaBytes: -1})
	if err != nil {
		b.Fatal(err)
	}
	benchHashKV(b, db)
	if err := db.Close(); err != nil {
		b.Fatal(err)
	}
}

// TestHashOfACompactionIsRemembered: as in etcd, the hash up to the revision of a compaction is that of before, whatever the
// compaction has removed; for the last ten whose client waited, until a restart.
func TestHashOfACompactionIsRemembered(t *testing.T) {
	path := testPath(t)
	db, err := OpenSQLite(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	hash := func(rev int64) KVHash {
		t.Helper()
		h, err := db.HashKV(t.Context(), rev)
		if err != nil {
			t.Fatal(err)
		}
		h.Head = 0
		return h
	}
	compact := func(rev int64, physical bool) {
		t.Helper()
		mustWrite(t, db, &pb.CompactionRequest{Revision: rev, Physical: physical})
		mustDo(t, db.WaitCompacted(t.Context(), rev))
	}
	want := map[int64]KVHash{}
	var revs []int64
	for range rememberedHashes + 3 {
		for i := range 6 {
			mustPut(t, db, fmt.Sprint("k", i%2), "v")
		}
		mustWrite(t, db, &pb.DeleteRangeRequest{Key: []byte("k0")})
		rev := db.Revision()
		mustPut(t, db, "k1", "w")
		want[rev] = hash(rev)
		revs = append(revs, rev)
		compact(rev, true)
	}
	for i, rev := range revs {
		if i < 3 {
			if _, err := db.HashKV(t.Context(), rev); !errors.Is(err, ErrCompacted) {
				t.Errorf("compaction %d, too old to be remembered: %v", i, err)
			}
			continue
		}
		if got := hash(rev); got != want[rev] {
			t.Errorf("compaction %d: %+v, want %+v", i, got, want[rev])
		}
	}
	mustPut(t, db, "k0", "v")
	mustPut(t, db, "k0", "w")
	rev := db.Revision()
	before := hash(rev)
	compact(rev, false)
	fresh := hash(rev)
	if fresh == before {
		t.Error("nobody waited for the compaction, and it was remembered")
	}
	last := revs[len(revs)-1]
	mustDo(t, db.Close())
	if db, err = OpenSQLite(t.Context(), path, Options{}); err != nil {
		t.Fatal(err)
	}
	if _, err := db.HashKV(t.Context(), last); !errors.Is(err, ErrCompacted) {
		t.Errorf("after a restart: %v", err)
	}
	if got := hash(rev); got != fresh {
		t.Errorf("after a restart: %+v, want %+v", got, fresh)
	}
	closeAndCheck(t, db, path)
}
