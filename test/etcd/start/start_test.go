package start

import (
	"context"
	"io"
	"strconv"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// A fresh store is at revision 1 and its first write makes revision 2.
func TestServersStart(t *testing.T) {
	t.Run("etcd", func(t *testing.T) { firstWrite(t, Etcd) })
	t.Run("quire", func(t *testing.T) { firstWrite(t, Quire) })
}

// Every process of several gets its share of the calls, and answers as if it were the only one.
func TestSeveralQuiresAreOneServer(t *testing.T) {
	if !OnPostgres(t) {
		t.Skip("several quires on one store need QUIRE_STORAGE=postgres")
	}
	s := Several(3)(t, Options{})
	const writes = 60
	for i := range int64(writes) {
		r, err := s.KV.Put(t.Context(), &pb.PutRequest{Key: []byte("k")})
		if err != nil {
			t.Fatal(err)
		}
		if r.Header.Revision != i+2 {
			t.Fatalf("write %d made revision %d, want %d", i, r.Header.Revision, i+2)
		}
		for _, serializable := range []bool{false, true} {
			got, err := s.KV.Range(t.Context(), &pb.RangeRequest{Key: []byte("k"), Serializable: serializable})
			if err != nil {
				t.Fatal(err)
			}
			if len(got.Kvs) != 1 || got.Kvs[0].Version != i+1 {
				t.Fatalf("after write %d a read (serializable: %t) finds %v", i, serializable, got.Kvs)
			}
		}
	}
	const puts = `grpc_server_handled_total{grpc_code="OK",grpc_method="Put",grpc_service="etcdserverpb.KV",grpc_type="unary"} `
	total := 0
	for _, p := range s.Processes {
		page, err := p.Get(t.Context(), "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(page.Body)
		page.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		served := 0
		for line := range strings.Lines(string(body)) {
			if n, ok := strings.CutPrefix(line, puts); ok {
				if served, err = strconv.Atoi(strings.TrimSpace(n)); err != nil {
					t.Fatal(err)
				}
			}
		}
		if served < writes/10 {
			t.Errorf("%s served %d of %d writes", p.Address, served, writes)
		}
		total += served
	}
	if total != writes {
		t.Errorf("%d writes were served, want %d", total, writes)
	}
}

func firstWrite(t *testing.T, begin Func) {
	s := begin(t, Options{})
	r, err := s.KV.Put(context.Background(), &pb.PutRequest{Key: []byte("k")})
	if err != nil {
		t.Fatal(err)
	}
	if r.Header.Revision != 2 {
		t.Fatalf("the first write made revision %d, want 2", r.Header.Revision)
	}
}
