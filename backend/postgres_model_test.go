package backend

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/test/postgres"
)

// TestPostgresModel is TestModel with one to three processes on one database, of which each operation goes to one drawn
// at random, and a restart is that of one beside the others.
func TestPostgresModel(t *testing.T) {
	rnd := seed(t)
	for _, c := range []struct {
		processes int
		cache     int64
	}{{1, 1}, {1, 64 << 20}, {2, 3 << 20}, {3, 1}, {3, 64 << 20}} {
		t.Run(fmt.Sprintf("processes=%d,cache=%d", c.processes, c.cache), func(t *testing.T) {
			o := pgTestOptions(t)
			playModel(t, rnd, modelStore{
				operations: 400,
				processes:  c.processes,
				open: func() *DB {
					db, err := OpenPostgres(t.Context(), o, Options{ValueCacheBytes: c.cache})
					if err != nil {
						t.Fatal(err)
					}
					return db
				},
				close: func(db *DB) {
					if err := db.Close(); err != nil {
						t.Errorf("close: %v", err)
					}
					report, err := CheckPostgres(context.Background(), o, nil)
					sound(t, report, err)
				},
			})
		})
	}
}

// TestPostgresAProcessThatEndsIsNotWaitedFor: however short it lived and whatever it was doing, nobody waits for it before
// compacted rows are deleted.
func TestPostgresAProcessThatEndsIsNotWaitedFor(t *testing.T) {
	s := postgres.Shared(t)
	database := postgres.Database(t, s)
	o := PostgresOptions{URL: s.DSN(database, postgres.Superuser), Name: t.Name()}
	rnd := seed(t)
	for range 30 {
		db, err := OpenPostgres(t.Context(), o, Options{})
		if err != nil {
			t.Fatal(err)
		}
		mustWrite(t, db, &pb.CompactionRequest{Revision: mustPut(t, db, "k", "v")})
		time.Sleep(time.Duration(rnd.IntN(5000)) * time.Microsecond) // so that it ends at any moment of its background work
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		left, err := s.Query(t.Context(), database, "SELECT name, seq, released FROM quire.process")
		if err != nil {
			t.Fatal(err)
		}
		if len(left) != 0 {
			t.Fatalf("a process has ended and is still among those that are waited for: %q", left)
		}
	}
}

// TestPostgresReadersDuringWrites is TestReadersDuringWrites with two processes.
func TestPostgresReadersDuringWrites(t *testing.T) {
	o, small := pgTestOptions(t), Options{ValueCacheBytes: 2 << 20}
	readDuringWrites(t, 40, openPostgresTest(t, o, small), openPostgresTest(t, o, small))
}

// TestPostgresNobodyReadsBehind: what one client has read of a process, or has been answered by it, the next
// linearizable read finds, whichever process is asked.
func TestPostgresNobodyReadsBehind(t *testing.T) {
	o := pgTestOptions(t)
	a, b := openPostgresTest(t, o, Options{}), openPostgresTest(t, o, Options{})
	const puts, writers, readers = 300, 4, 4
	var newest atomic.Int64 // that anybody has seen
	see := func(rev int64) {
		for {
			old := newest.Load()
			if rev <= old || newest.CompareAndSwap(old, rev) {
				return
			}
		}
	}
	var reading sync.WaitGroup
	stop := make(chan struct{})
	for _, db := range []*DB{a, b} {
		for range readers {
			reading.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					least := newest.Load()
					if err := db.Linearizable(t.Context()); err != nil {
						t.Error(err)
						return
					}
					v := db.View()
					rev := v.Revision()
					v.Release()
					if rev < least {
						t.Errorf("a linearizable read at revision %d began after somebody had seen %d", rev, least)
						return
					}
					see(rev)
				}
			})
		}
	}
	var writing sync.WaitGroup
	for range writers {
		writing.Go(func() {
			for range puts {
				resp, err := a.Write(t.Context(), Command{Request: &pb.PutRequest{Key: []byte("k")}})
				if err != nil {
					t.Error(err)
					return
				}
				see(resp.(*pb.PutResponse).Header.Revision)
			}
		})
	}
	writing.Wait()
	close(stop)
	reading.Wait()
}
