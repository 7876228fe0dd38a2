package backend

import (
	"fmt"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/test/postgres"
)

// BenchmarkPostgresPut is one client that waits for each answer.
func BenchmarkPostgresPut(b *testing.B) {
	s := postgres.Shared(b)
	db, err := OpenPostgres(b.Context(), PostgresOptions{URL: s.DSN(postgres.Database(b, s), "postgres")}, Options{})
	if err != nil {
		b.Fatal(err)
	}
	value := make([]byte, 1024)
	i := 0
	for b.Loop() {
		i++
		req := &pb.PutRequest{Key: fmt.Appendf(nil, "k%d", i%1000), Value: value}
		if _, err := db.Write(b.Context(), Command{Request: req}); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	if err := db.Close(); err != nil {
		b.Fatal(err)
	}
}
