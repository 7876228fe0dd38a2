package backend

import (
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

func benchDB(b *testing.B, path string) *DB {
	b.Helper()
	db, err := OpenSQLite(b.Context(), path, Options{QuotaBytes: -1})
	if err != nil {
		b.Fatal(err)
	}
	return db
}

func benchKey(i int64) string { return fmt.Sprintf("/registry/pods/namespace-%02d/pod-%06d", i%50, i) }

// fillBench puts n keys with values of size bytes, many to a transaction.
func fillBench(b *testing.B, db *DB, n, size int) {
	b.Helper()
	value := string(make([]byte, size))
	for i := 0; i < n; {
		var ops []*pb.RequestOp
		for ; i < n && len(ops) < 2000; i++ {
			ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: putReq(benchKey(int64(i)), value)}})
		}
		if _, err := db.Write(b.Context(), Command{Request: &pb.TxnRequest{Success: ops}}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkPut: durable puts of 1 KiB over 10,000 keys.
func BenchmarkPut(b *testing.B) {
	for _, writers := range []int{1, 64} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			db := benchDB(b, filepath.Join(b.TempDir(), "quire.db"))
			value := string(make([]byte, 1<<10))
			var next atomic.Int64
			var wg sync.WaitGroup
			for b.Loop() {
				// One round is a put of each writer.
				for range writers {
					wg.Go(func() {
						if _, err := db.Write(b.Context(), Command{Request: putReq(benchKey(next.Add(1)%10_000), value)}); err != nil {
							b.Error(err)
						}
					})
				}
				wg.Wait()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(next.Load()), "ns/put")
			if err := db.Close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkGet: one key of 10,000 with resident values.
func BenchmarkGet(b *testing.B) {
	db := benchDB(b, filepath.Join(b.TempDir(), "quire.db"))
	fillBench(b, db, 10_000, 1<<10)
	b.ReportAllocs()
	for i := int64(0); b.Loop(); i++ {
		v := db.View()
		res, err := v.Range(b.Context(), &pb.RangeRequest{Key: []byte(benchKey(i % 10_000))})
		v.Release()
		if err != nil || len(res.KVs) != 1 {
			b.Fatalf("%v, %v", res, err)
		}
	}
	if err := db.Close(); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkListPage500: what kube-apiserver asks for, a page of 500 of 10,000 keys.
func BenchmarkListPage500(b *testing.B) {
	db := benchDB(b, filepath.Join(b.TempDir(), "quire.db"))
	fillBench(b, db, 10_000, 1<<10)
	b.ReportAllocs()
	req := &pb.RangeRequest{Key: []byte("/registry/pods/"), RangeEnd: []byte("/registry/pods0"), Limit: 500}
	for b.Loop() {
		v := db.View()
		res, err := v.Range(b.Context(), req)
		v.Release()
		if err != nil || len(res.KVs) != 500 || !res.More || res.Count != 10_000 {
			b.Fatalf("%v, %v", res, err)
		}
	}
	if err := db.Close(); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkOpen: the load of 200,000 keys.
func BenchmarkOpen(b *testing.B) {
	path := filepath.Join(b.TempDir(), "quire.db")
	db := benchDB(b, path)
	fillBench(b, db, 200_000, 512)
	if err := db.Close(); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		db := benchDB(b, path)
		if n := db.Stats().Keys; n != 200_000 {
			b.Fatalf("%d keys", n)
		}
		b.StopTimer()
		if err := db.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
