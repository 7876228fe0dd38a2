package backend

import (
	"fmt"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// traced runs f and returns the statements that ran on the writing connection meanwhile, repeated ones counted.
func traced(t *testing.T, db *DB, f func()) string {
	t.Helper()
	var s *statements
	alone(t, db, func() error { s = watch(t, sqliteOf(db).w); return nil })
	f()
	alone(t, db, func() error { s.unwatch(); return nil })
	var out []string
	for i := 0; i < len(s.ran); {
		n := 1
		for i+n < len(s.ran) && s.ran[i+n] == s.ran[i] {
			n++
		}
		line := s.ran[i]
		if n > 1 {
			line = fmt.Sprintf("%d × %s", n, line)
		}
		out = append(out, line)
		i += n
	}
	return strings.Join(out, "; ")
}

// TestStatements is the trace of the durable path: what each operation runs on the one connection that writes. Reads of
// what is resident run nothing, neither there nor elsewhere.
func TestStatements(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	mustWrite(t, db, &pb.LeaseGrantRequest{ID: 7, TTL: 1000})
	for n := range 10 {
		mustPut(t, db, fmt.Sprintf("k%d", n), "v")
	}
	settled(t, db)
	write := func(req proto.Message) func() { return func() { mustWrite(t, db, req) } }
	fail := func(req proto.Message) func() {
		return func() {
			if _, err := db.Write(t.Context(), Command{Request: req}); err == nil {
				t.Errorf("%v succeeded", req)
			}
		}
	}
	read := func(req *pb.RangeRequest) func() {
		return func() {
			v := db.View()
			defer v.Release()
			if _, err := v.Range(t.Context(), req); err != nil {
				t.Error(err)
			}
		}
	}
	k0 := []byte("k0")
	for _, c := range []struct {
		name string
		do   func()
		want string
	}{
		{"put", write(putReq("k0", "w")), "BEGIN IMMEDIATE; INSERT revisions; COMMIT"},
		{"put with prev_kv", write(&pb.PutRequest{Key: k0, Value: k0, PrevKv: true}), "BEGIN IMMEDIATE; INSERT revisions; COMMIT"},
		{"put on a lease", write(&pb.PutRequest{Key: k0, Lease: 7}), "BEGIN IMMEDIATE; INSERT revisions; COMMIT"},
		{"put on no lease that exists", fail(&pb.PutRequest{Key: k0, Lease: 99}), ""},
		{"64 puts in one batch", func() { putTogether(t, db, 64) }, "BEGIN IMMEDIATE; 64 × INSERT revisions; COMMIT"},
		{"delete of 3", write(&pb.DeleteRangeRequest{Key: []byte("k7"), RangeEnd: []byte("kA"), PrevKv: true}), "BEGIN IMMEDIATE; 3 × INSERT revisions; COMMIT"},
		{"delete of nothing", write(&pb.DeleteRangeRequest{Key: []byte("k7")}), ""},
		{"txn of put and delete", write(&pb.TxnRequest{Success: []*pb.RequestOp{
			{Request: &pb.RequestOp_RequestPut{RequestPut: putReq("k1", "w")}},
			{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: k0}}},
			{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte("k2")}}},
		}}), "BEGIN IMMEDIATE; 2 × INSERT revisions; COMMIT"},
		{"txn that only reads", write(&pb.TxnRequest{Success: []*pb.RequestOp{
			{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: k0}}}}}), ""},
		{"grant", write(&pb.LeaseGrantRequest{ID: 8, TTL: 1000}), "BEGIN IMMEDIATE; INSERT lease; INSERT meta; COMMIT"},
		{"keepalive", write(&pb.LeaseKeepAliveRequest{ID: 8}), "BEGIN IMMEDIATE; INSERT lease; INSERT meta; COMMIT"},
		{"revoke", write(&pb.LeaseRevokeRequest{ID: 8}), "BEGIN IMMEDIATE; DELETE lease; INSERT meta; COMMIT"},
		{"revoke with a key", write(&pb.LeaseRevokeRequest{ID: 7}), "BEGIN IMMEDIATE; INSERT revisions; DELETE lease; INSERT meta; COMMIT"},
		{"alarm", write(&pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, Alarm: pb.AlarmType_CORRUPT}), "BEGIN IMMEDIATE; DELETE alarm; INSERT alarm; INSERT meta; COMMIT"},
		{"alarm cleared", write(&pb.AlarmRequest{Action: pb.AlarmRequest_DEACTIVATE, Alarm: pb.AlarmType_CORRUPT}), "BEGIN IMMEDIATE; DELETE alarm; INSERT meta; COMMIT"},

		{"get", read(&pb.RangeRequest{Key: k0}), ""},
		{"get of an older revision", read(&pb.RangeRequest{Key: k0, Revision: 5}), ""},
		{"list", read(&pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}), ""},
		{"count", read(&pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, CountOnly: true}), ""},
		{"keys only", read(&pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, KeysOnly: true}), ""},
		{"newest history", func() {
			if _, err := db.History(t.Context(), HistoryRequest{From: 2, Key: []byte{0}, RangeEnd: []byte{0}}); err != nil {
				t.Error(err)
			}
		}, ""},
		{"time to live", func() { db.Lease(7, true) }, ""},
		{"stats", func() { db.Stats() }, ""},

		{"compaction and its sweep", func() {
			mustWrite(t, db, &pb.CompactionRequest{Revision: 13})
			settled(t, db)
		}, "BEGIN IMMEDIATE; 2 × INSERT meta; COMMIT; BEGIN IMMEDIATE; 2 × DELETE revisions; COMMIT"},
	} {
		if got := traced(t, db, c.do); got != c.want {
			t.Errorf("%s runs\n  %s\nwant\n  %s", c.name, got, c.want)
		}
	}
	// Nothing of all this needed a reading connection.
	sqliteOf(db).file.idle.Lock()
	defer sqliteOf(db).file.idle.Unlock()
	if n := len(sqliteOf(db).file.idle.readers); n != 0 {
		t.Errorf("%d reading connections were opened, though all values are resident", n)
	}
}

// TestStatementsOfValuesThatAreNotResident: reads take a reading connection, a write the writing one.
func TestStatementsOfValuesThatAreNotResident(t *testing.T) {
	path := testPath(t)
	db := openTest(t, path, Options{})
	mustPut(t, db, "k0", "v")
	mustPut(t, db, "k1", "v")
	forget := func(key string) {
		alone(t, db, func() error {
			slot, _, _ := db.st.keys.get([]byte(key))
			db.index.vals.drop(db.index.recs.at(db.index.slots.head(slot)))
			return nil
		})
	}
	settled(t, db)
	forget("k0")
	forget("k1")
	get := func() {
		v := db.View()
		defer v.Release()
		res, err := v.Range(t.Context(), &pb.RangeRequest{Key: []byte("k0")})
		if err != nil || string(res.KVs[0].Value()) != "v" {
			t.Errorf("got %v, %v", res, err)
		}
	}
	if got := traced(t, db, get); got != "" {
		t.Errorf("a get of a value that is not resident runs %q on the writing connection", got)
	}
	put := func() { mustWrite(t, db, &pb.PutRequest{Key: []byte("k1"), PrevKv: true}) }
	if got, want := traced(t, db, put), "SELECT revisions; BEGIN IMMEDIATE; INSERT revisions; COMMIT"; got != want {
		t.Errorf("a put with a prev_kv that is not resident runs\n  %s\nwant\n  %s", got, want)
	}
	if got, want := traced(t, db, put), "BEGIN IMMEDIATE; INSERT revisions; COMMIT"; got != want {
		t.Errorf("and again\n  %s\nwant\n  %s", got, want)
	}
}

// putTogether commits n puts as one batch: they wait while the test holds the commit token.
func putTogether(t *testing.T, db *DB, n int) {
	t.Helper()
	held, release, done := make(chan struct{}), make(chan struct{}), make(chan error, n+1)
	go func() {
		_, err := db.step(func() error { close(held); <-release; return nil })
		done <- err
	}()
	<-held
	for i := range n {
		go func() {
			_, err := db.Write(t.Context(), Command{Request: putReq(fmt.Sprintf("together%d", i), "v")})
			done <- err
		}()
	}
	for queued := 0; queued < n; {
		db.queue.mu.Lock()
		queued = len(db.queue.items)
		db.queue.mu.Unlock()
	}
	close(release)
	for range n + 1 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}
