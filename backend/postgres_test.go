package backend

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/test/postgres"
)

// openPostgresTest opens a database that is closed, and checked as a whole, when the test ends.
func openPostgresTest(t *testing.T, o PostgresOptions, options Options) *DB {
	t.Helper()
	db, err := OpenPostgres(t.Context(), o, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		found, err := CheckPostgres(context.Background(), o, nil)
		if err != nil {
			t.Errorf("check: %v", err)
		}
		for _, problem := range found.Problems {
			t.Errorf("check: %s", problem)
		}
	})
	return db
}

func pgTestOptions(t *testing.T) PostgresOptions {
	t.Helper()
	s := postgres.Shared(t)
	return PostgresOptions{URL: s.DSN(postgres.Database(t, s), "postgres"), Name: t.Name()}
}

func mustGet(t *testing.T, db *DB, key string) *pb.RangeResponse {
	t.Helper()
	if err := db.Linearizable(t.Context()); err != nil {
		t.Fatal(err)
	}
	v := db.View()
	defer v.Release()
	res, err := v.Range(t.Context(), &pb.RangeRequest{Key: []byte(key)})
	if err != nil {
		t.Fatal(err)
	}
	resp := &pb.RangeResponse{Header: &pb.ResponseHeader{Revision: res.Revision}}
	for _, f := range res.KVs {
		resp.Kvs = append(resp.Kvs, f.KeyValue())
	}
	return resp
}

func TestPostgresWhatOneWritesTheOtherReads(t *testing.T) {
	o := pgTestOptions(t)
	a, b := openPostgresTest(t, o, Options{}), openPostgresTest(t, o, Options{})
	for i := range 50 {
		w, r := a, b
		if i%2 == 1 {
			w, r = b, a
		}
		value := fmt.Sprintf("%d", i)
		rev := mustPut(t, w, "k", value)
		if want := int64(i + 2); rev != want {
			t.Fatalf("put %d made revision %d, want %d", i, rev, want)
		}
		got := mustGet(t, r, "k")
		if len(got.Kvs) != 1 || string(got.Kvs[0].Value) != value || got.Kvs[0].Version != int64(i+1) || got.Kvs[0].CreateRevision != 2 {
			t.Fatalf("after put %d the other process reads %v", i, got.Kvs)
		}
	}
}

// "Three processes with 64 clients each hammering the same 8 keys with compare-and-swap Txns: every success is a real one."
func TestPostgresCompareAndSwapFromThree(t *testing.T) {
	o := pgTestOptions(t)
	const keys, clients, rounds = 8, 16, 12
	var dbs []*DB
	for range 3 {
		dbs = append(dbs, openPostgresTest(t, o, Options{}))
	}
	var mu sync.Mutex
	wins := map[string]map[int64]int{} // by key and the revision compared with
	total := 0
	var all sync.WaitGroup
	for _, db := range dbs {
		for c := range clients {
			all.Go(func() {
				key := fmt.Sprintf("k%d", c%keys)
				for range rounds {
					if err := db.Linearizable(t.Context()); err != nil {
						t.Error(err)
						return
					}
					v := db.View()
					res, err := v.Range(t.Context(), &pb.RangeRequest{Key: []byte(key)})
					v.Release()
					if err != nil {
						t.Error(err)
						return
					}
					mod := int64(0)
					if len(res.KVs) > 0 {
						mod = res.KVs[0].KeyValue().ModRevision
					}
					resp, err := db.Write(t.Context(), Command{Request: &pb.TxnRequest{
						Compare: []*pb.Compare{{Key: []byte(key), Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: mod}}},
						Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: []byte("v")}}}},
					}})
					if err != nil {
						t.Error(err)
						return
					}
					if resp.(*pb.TxnResponse).Succeeded {
						mu.Lock()
						if wins[key] == nil {
							wins[key] = map[int64]int{}
						}
						wins[key][mod]++
						total++
						mu.Unlock()
					}
				}
			})
		}
	}
	all.Wait()
	for key, by := range wins {
		for mod, n := range by {
			if n > 1 {
				t.Errorf("%s: %d Txns won against revision %d", key, n, mod)
			}
		}
	}
	got := mustGet(t, dbs[0], "k0")
	if got.Header.Revision != int64(total+1) {
		t.Errorf("%d wins, but the store is at revision %d", total, got.Header.Revision)
	}
	var versions int64
	for key := range wins {
		kv := mustGet(t, dbs[1], key).Kvs[0]
		versions += kv.Version
		if want := len(wins[key]); kv.Version != int64(want) {
			t.Errorf("%s has version %d after %d wins", key, kv.Version, want)
		}
	}
	t.Logf("%d wins", total)
}

func TestPostgresLeasesAreShared(t *testing.T) {
	o := pgTestOptions(t)
	a, b := openPostgresTest(t, o, Options{MinLeaseTTL: 1}), openPostgresTest(t, o, Options{MinLeaseTTL: 1})
	mustWrite(t, a, &pb.LeaseGrantRequest{ID: 7, TTL: 1})
	mustWrite(t, b, &pb.PutRequest{Key: []byte("k"), Lease: 7})
	if status, ok := a.Lease(7, true); !ok {
		t.Fatal("the lease is gone")
	} else if err := a.Linearizable(t.Context()); err != nil {
		t.Fatal(err)
	} else if status, _ = a.Lease(7, true); len(status.Keys) != 1 {
		t.Fatalf("the lease has keys %q", status.Keys)
	}
	start := time.Now()
	for {
		if got := mustGet(t, b, "k"); len(got.Kvs) == 0 {
			if got.Header.Revision != 3 {
				t.Errorf("the lease was revoked at revision %d, want 3", got.Header.Revision)
			}
			break
		}
		if time.Since(start) > 5*time.Second {
			t.Fatal("the lease did not expire")
		}
		time.Sleep(10 * time.Millisecond)
	}
	if _, ok := b.Lease(7, false); ok {
		t.Error("the lease is still there")
	}
}

func TestPostgresCompactionAndRestart(t *testing.T) {
	o := pgTestOptions(t)
	a, b := openPostgresTest(t, o, Options{}), openPostgresTest(t, o, Options{})
	for i := range 500 {
		mustPut(t, a, fmt.Sprintf("k%d", i%10), fmt.Sprint(i))
	}
	mustWrite(t, b, &pb.DeleteRangeRequest{Key: []byte("k3")})
	mustWrite(t, b, &pb.CompactionRequest{Revision: 502})
	for _, db := range []*DB{a, b} {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		if err := db.Linearizable(ctx); err != nil {
			t.Fatal(err)
		}
		if err := db.WaitCompacted(ctx, 502); err != nil {
			t.Fatal(err)
		}
		cancel()
	}
	c := openPostgresTest(t, o, Options{})
	if got := c.Stats(); got.Keys != 9 || got.CompactRevision != 502 || got.Revision != 502 {
		t.Errorf("after a restart: %+v", got)
	}
	if kv := mustGet(t, c, "k4").Kvs[0]; string(kv.Value) != "494" || kv.Version != 50 {
		t.Errorf("k4 is %v", kv)
	}
	_, err := c.History(t.Context(), HistoryRequest{From: 100, Key: []byte{0}, RangeEnd: []byte{0}})
	if !errors.Is(err, ErrCompacted) {
		t.Errorf("history from 100: %v", err)
	}
	mustPut(t, c, "k5", "new")
	if kv := mustGet(t, a, "k5").Kvs[0]; string(kv.Value) != "new" {
		t.Errorf("k5 is %v", kv)
	}
}

// TestPostgresCompactionAtNothing: the first compaction may be at revision 0, and every process hears of it.
func TestPostgresCompactionAtNothing(t *testing.T) {
	o := pgTestOptions(t)
	a, b := openPostgresTest(t, o, Options{}), openPostgresTest(t, o, Options{})
	mustWrite(t, a, &pb.CompactionRequest{Revision: 0})
	for _, db := range []*DB{a, b} {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		if err := db.WaitCompacted(ctx, 0); err != nil {
			t.Error(err)
		}
		cancel()
		if _, err := db.Write(t.Context(), Command{Request: &pb.CompactionRequest{Revision: 0}}); !errors.Is(err, ErrCompacted) {
			t.Errorf("compacted at 0 once more: %v", err)
		}
	}
}

// seen waits until a process has a revision, without asking it to look.
func seen(t *testing.T, db *DB, rev int64, limit time.Duration) {
	t.Helper()
	for start := time.Now(); db.Revision() < rev; time.Sleep(time.Millisecond) {
		if time.Since(start) > limit {
			t.Fatalf("revision %d is not here after %v, but %d", rev, limit, db.Revision())
		}
	}
}

// "An event written by one process reaches a watcher on another within the poll interval when notifications are lost or
// impossible." How soon it is with notifications is measured by make bench-postgres.
func TestPostgresWithoutNotifications(t *testing.T) {
	o := pgTestOptions(t)
	deaf := o
	deaf.ListenURL = "postgres://127.0.0.1:1/nobody?sslmode=disable"
	deaf.PollInterval = 200 * time.Millisecond
	hearing := o
	hearing.PollInterval = time.Hour
	a, b, c := openPostgresTest(t, o, Options{}), openPostgresTest(t, deaf, Options{}), openPostgresTest(t, hearing, Options{})
	mustPut(t, a, "k", "v")
	seen(t, c, 2, 10*time.Second) // its listener may have come too late for the notification, but looks when it is there
	for i := range 5 {
		rev := mustPut(t, a, "k", fmt.Sprint(i))
		seen(t, b, rev, 10*time.Second)
		seen(t, c, rev, 10*time.Second)
	}
}
