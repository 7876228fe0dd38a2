package backend

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// everything asks for all events from a revision on.
func everything(from int64) HistoryRequest {
	return HistoryRequest{From: from, Key: []byte{0}, RangeEnd: []byte{0}}
}

func mustHistory(t *testing.T, db *DB, req HistoryRequest) HistoryResult {
	t.Helper()
	res, err := db.History(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// withoutRing has f read history from the rows, although it is in memory.
func withoutRing(db *DB, f func()) {
	db.ring.mu.Lock()
	was := db.ring.first
	db.ring.first = math.MaxInt64
	db.ring.mu.Unlock()
	defer func() {
		db.ring.mu.Lock()
		db.ring.first = was
		db.ring.mu.Unlock()
	}()
	f()
}

func eventText(e Event) string {
	return fmt.Sprintf("%d %v %q %s", e.Rev, e.Type, e.Key, frameText(e.KV))
}

func eventTexts(events []Event) (out []string) {
	for _, e := range events {
		out = append(out, eventText(e))
	}
	return out
}

// TestHistoryPages reads a small history from every revision, in pages of every size, from memory and from the rows: both
// give the same pages, no page splits a revision or goes on after its bound, and all pages together are the history.
func TestHistoryPages(t *testing.T) {
	rnd := seed(t)
	db := openTest(t, testPath(t), Options{})
	m := newModel()
	put := func(key, value string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: putReq(key, value)}}
	}
	for range 30 {
		switch rnd.IntN(3) {
		case 0:
			from := fmt.Sprintf("k%d", rnd.IntN(8))
			mustWrite(t, db, &pb.DeleteRangeRequest{Key: []byte(from), RangeEnd: []byte("z")})
			m.deleteRange(from, "z")
		case 1:
			var ops []*pb.RequestOp
			for k := range 1 + rnd.IntN(6) {
				ops = append(ops, put(fmt.Sprintf("k%d", k), fmt.Sprint(rnd.IntN(100))))
			}
			rev := mustWrite(t, db, &pb.TxnRequest{Success: ops}).(*pb.TxnResponse).Header.Revision
			for _, op := range ops {
				kv := op.GetRequestPut()
				m.rev = rev - 1 // the model makes one revision of each put
				m.put(string(kv.Key), string(kv.Value))
			}
		default:
			key := fmt.Sprintf("k%d", rnd.IntN(10))
			mustPut(t, db, key, "v")
			m.put(key, "v")
		}
	}
	if m.rev != db.Revision() {
		t.Fatalf("the model is at %d, the store at %d", m.rev, db.Revision())
	}
	expect := func(from, to int64, k keyRange) (out []string) {
		for _, e := range m.events {
			if e.Kv.ModRevision >= from && e.Kv.ModRevision < to && k.contains(e.Kv.Key) {
				out = append(out, fmt.Sprintf("%d %v %q %s", e.Kv.ModRevision, e.Type, e.Kv.Key, e.Kv.String()))
			}
		}
		return out
	}
	for _, span := range []struct{ key, end string }{{"\x00", "\x00"}, {"k2", "k5"}, {"k3", ""}, {"none", ""}} {
		k := newKeyRange([]byte(span.key), []byte(span.end))
		for from := int64(1); from <= m.rev+2; from++ {
			for _, bounds := range [][2]int{{1, 0}, {2, 0}, {3, 0}, {7, 0}, {0, 1}, {0, 60}, {1000, 0}} {
				for next := from; next <= m.rev; {
					req := HistoryRequest{From: next, Key: []byte(span.key), RangeEnd: []byte(span.end), MaxEvents: bounds[0], MaxBytes: bounds[1]}
					page := mustHistory(t, db, req)
					var rows HistoryResult
					withoutRing(db, func() { rows = mustHistory(t, db, req) })
					if page.Next != rows.Next || page.Head != rows.Head || page.Head != m.rev || !slices.Equal(eventTexts(page.Events), eventTexts(rows.Events)) {
						t.Fatalf("%+v: from memory %v, next %d; from the rows %v, next %d",
							req, eventTexts(page.Events), page.Next, eventTexts(rows.Events), rows.Next)
					}
					if page.Next <= next {
						t.Fatalf("%+v: the next page starts at %d: no progress", req, page.Next)
					}
					if got, want := eventTexts(page.Events), expect(next, page.Next, k); !slices.Equal(got, want) {
						t.Fatalf("%+v: the page up to %d has\n%q\nwant\n%q", req, page.Next, got, want)
					}
					// The bound is reached by the last revision of a page, not before.
					if n := len(page.Events); bounds[0] > 0 && n > bounds[0] {
						last := page.Events[n-1].Rev
						if before := slices.IndexFunc(page.Events, func(e Event) bool { return e.Rev == last }); before >= bounds[0] {
							t.Fatalf("%+v: revision %d was added to a page that was full", req, last)
						}
					}
					next = page.Next
				}
			}
		}
	}
	// At the end, and beyond it.
	for _, from := range []int64{m.rev + 1, m.rev + 100} {
		if res := mustHistory(t, db, everything(from)); len(res.Events) != 0 || res.Next != from || res.Head != m.rev {
			t.Errorf("from %d: %d events, next %d, head %d", from, len(res.Events), res.Next, res.Head)
		}
	}
}

// readAll reads the whole history in pages, and wants revisions without gap or repeat.
func readAll(t *testing.T, db *DB, from int64, bounds HistoryRequest) (events []Event) {
	t.Helper()
	head := db.Revision()
	for next := from; next <= head; {
		req := everything(next)
		req.MaxEvents, req.MaxBytes = bounds.MaxEvents, bounds.MaxBytes
		page := mustHistory(t, db, req)
		want := next
		for _, e := range page.Events {
			if e.Rev != want && e.Rev != want+1 && len(events)+len(page.Events) > 0 && e.Rev != next {
				t.Fatalf("revision %d follows %d", e.Rev, want)
			}
			want = e.Rev
		}
		if page.Next <= next {
			t.Fatalf("no progress at %d", next)
		}
		events = append(events, page.Events...)
		next = page.Next
	}
	return events
}

// TestRingOverflowByEvents: what no longer fits in memory comes from the rows, and a revision is in one or the other.
func TestRingOverflowByEvents(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	const perTxn = 1500
	total := 0
	for round := 0; total <= ringEvents+3*perTxn; round++ {
		var ops []*pb.RequestOp
		for i := range perTxn {
			ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: putReq(fmt.Sprintf("k%d", i), fmt.Sprint(round))}})
		}
		mustWrite(t, db, &pb.TxnRequest{Success: ops})
		total += perTxn
	}
	mustBeInRing := func() {
		t.Helper()
		db.ring.mu.RLock()
		defer db.ring.mu.RUnlock()
		bytes := 0
		for _, e := range db.ring.events {
			bytes += len(e.KV)
		}
		if n := len(db.ring.events); n > ringEvents || db.ring.bytes > ringBytes || bytes != db.ring.bytes {
			t.Errorf("%d events of %d bytes are in memory, %d are counted", n, bytes, db.ring.bytes)
		}
		if len(db.ring.events) > 0 && db.ring.events[0].Rev != db.ring.first {
			t.Errorf("memory starts with revision %d, it says %d", db.ring.events[0].Rev, db.ring.first)
		}
	}
	mustBeInRing()
	if db.ring.first <= 2 {
		t.Fatal("nothing left memory: the test tests nothing")
	}
	all := readAll(t, db, 1, HistoryRequest{MaxEvents: 4000})
	if len(all) != total {
		t.Fatalf("%d events were read, %d were written", len(all), total)
	}
	for i, e := range all {
		if e.Rev != int64(2+i/perTxn) || string(e.KV.Value()) != fmt.Sprint(i/perTxn) {
			t.Fatalf("event %d is %s", i, eventText(e))
		}
	}
	// One revision larger than the ring leaves it empty, and is read from the rows; whole.
	for i := 0; i < ringEvents+1; i += 8192 {
		var ops []*pb.RequestOp
		for k := i; k < min(i+8192, ringEvents+1); k++ {
			ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: putReq(fmt.Sprintf("x%05d", k), "")}})
		}
		mustWrite(t, db, &pb.TxnRequest{Success: ops})
	}
	rev := mustWrite(t, db, &pb.DeleteRangeRequest{Key: []byte("x"), RangeEnd: []byte("y")}).(*pb.DeleteRangeResponse).Header.Revision
	mustBeInRing()
	page := mustHistory(t, db, HistoryRequest{From: rev, Key: []byte{0}, RangeEnd: []byte{0}, MaxEvents: 10})
	if len(page.Events) != ringEvents+1 || page.Next != rev+1 {
		t.Errorf("a revision of %d deletes comes as %d events, next %d", ringEvents+1, len(page.Events), page.Next)
	}
	last := mustPut(t, db, "after", "")
	if page := mustHistory(t, db, everything(last)); len(page.Events) != 1 || page.Events[0].Rev != last {
		t.Errorf("after it: %v", eventTexts(page.Events))
	}
	mustBeInRing()
}

func TestRingOverflowByBytes(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	const puts = 25
	value := make([]byte, 1<<20)
	for i := range puts {
		value[0] = byte(i)
		mustPut(t, db, "k", string(value))
	}
	db.ring.mu.RLock()
	first, bytes := db.ring.first, db.ring.bytes
	db.ring.mu.RUnlock()
	if bytes > ringBytes || first <= 2 {
		t.Fatalf("%d bytes are in memory, from revision %d on", bytes, first)
	}
	all := readAll(t, db, 1, HistoryRequest{})
	if len(all) != puts {
		t.Fatalf("%d events were read, %d were written", len(all), puts)
	}
	for i, e := range all {
		if e.Rev != int64(i+2) || e.KV.Value()[0] != byte(i) {
			t.Errorf("event %d is of revision %d", i, e.Rev)
		}
	}
	// A page ends with the revision that fills it.
	withoutRing(db, func() {
		if page := mustHistory(t, db, HistoryRequest{From: 2, Key: []byte{0}, RangeEnd: []byte{0}, MaxBytes: 3 << 20}); len(page.Events) != 3 || page.Next != 5 {
			t.Errorf("a page of 3 MiB has %d events of 1 MiB, next %d", len(page.Events), page.Next)
		}
	})
}

// TestAHugeRevisionIsNeverSplit, neither from memory nor from the rows.
func TestAHugeRevisionIsNeverSplit(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	var ops []*pb.RequestOp
	for k := range 5000 {
		ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: putReq(fmt.Sprintf("k%04d", k), "")}})
	}
	before := mustPut(t, db, "a", "")
	mustWrite(t, db, &pb.TxnRequest{Success: ops})
	rev := mustWrite(t, db, &pb.DeleteRangeRequest{Key: []byte("k"), RangeEnd: []byte("l")}).(*pb.DeleteRangeResponse).Header.Revision
	after := mustPut(t, db, "z", "")
	check := func() {
		t.Helper()
		for _, c := range []struct {
			from, next int64
			max, want  int
		}{
			{rev, rev + 1, 1, 5000}, {rev, rev + 1, 4999, 5000}, {rev, rev + 1, 5000, 5000}, {rev, after + 1, 5001, 5001},
			{before, rev, 2, 5001}, {before, after + 1, 100_000, 10_002}, {rev + 1, after + 1, 1, 1},
		} {
			req := everything(c.from)
			req.MaxEvents = c.max
			page := mustHistory(t, db, req)
			if len(page.Events) != c.want || page.Next != c.next {
				t.Errorf("from %d, at most %d: %d events, next %d; want %d, %d", c.from, c.max, len(page.Events), page.Next, c.want, c.next)
			}
			if !slices.IsSortedFunc(page.Events, func(a, b Event) int { return int(a.Rev - b.Rev) }) {
				t.Errorf("from %d: out of order", c.from)
			}
		}
	}
	check()
	withoutRing(db, check)
}

// TestHistoryFromTheCompactRevision: a watch that starts there still sees that revision, a DELETE too (etcd #19179);
// below it lies nothing.
func TestHistoryFromTheCompactRevision(t *testing.T) {
	path := testPath(t)
	db, err := openStore(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	mustPut(t, db, "a", "1")
	mustPut(t, db, "b", "1")
	deleted := mustWrite(t, db, &pb.DeleteRangeRequest{Key: []byte("a")}).(*pb.DeleteRangeResponse).Header.Revision
	put := mustPut(t, db, "b", "2")
	mustPut(t, db, "c", "1")
	for _, c := range []struct {
		at    int64
		event mvccpb.Event_EventType
		key   string
	}{{deleted, mvccpb.Event_DELETE, "a"}, {put, mvccpb.Event_PUT, "b"}} {
		mustWrite(t, db, &pb.CompactionRequest{Revision: c.at})
		settled(t, db)
		for range 2 { // as it is, and after a restart
			withoutRing(db, func() {
				page := mustHistory(t, db, everything(c.at))
				if len(page.Events) == 0 || page.Events[0].Rev != c.at || page.Events[0].Type != c.event || string(page.Events[0].Key) != c.key {
					t.Errorf("from %d: %v", c.at, eventTexts(page.Events))
				}
				_, err := db.History(t.Context(), everything(c.at-1))
				var compacted *CompactedError
				if !errors.As(err, &compacted) || compacted.CompactRevision != c.at || !errors.Is(err, ErrCompacted) {
					t.Errorf("from %d, compacted at %d: %v", c.at-1, c.at, err)
				}
			})
			db = reopen(t, db, path, Options{})
		}
	}
	closeAndCheck(t, db, path)
}

// TestCompactionDuringPagedReads: pages read from the rows, while others write and compact, are whole or refused.
func TestCompactionDuringPagedReads(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	const revisions = 1500
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		for i := range revisions {
			rev := mustPut(t, db, fmt.Sprintf("k%d", i%3), fmt.Sprint(i))
			if i%50 == 49 {
				mustWrite(t, db, &pb.CompactionRequest{Revision: rev - 30})
			}
		}
	}()
	pages, refused := 0, 0
	withoutRing(db, func() {
		for db.Revision() < revisions+1 {
			for next := max(db.CompactRevision(), 2); next <= db.Revision(); {
				req := everything(next)
				req.MaxEvents = 5
				page, err := db.History(t.Context(), req)
				var compacted *CompactedError
				if errors.As(err, &compacted) {
					if compacted.CompactRevision <= next {
						t.Fatalf("from %d: %v", next, err)
					}
					refused++
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				for i, e := range page.Events {
					if e.Rev != next+int64(i) || string(e.KV.Value()) != fmt.Sprint(e.Rev-2) {
						t.Fatalf("the page from %d has %v", next, eventTexts(page.Events))
					}
				}
				if page.Next != next+int64(len(page.Events)) {
					t.Fatalf("from %d: %d events, next %d", next, len(page.Events), page.Next)
				}
				pages++
				next = page.Next
			}
		}
	})
	wg.Wait()
	t.Logf("%d pages, %d refused as compacted", pages, refused)
}
