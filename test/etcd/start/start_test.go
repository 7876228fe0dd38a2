package start

import (
	"context"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// A fresh store is at revision 1 and its first write makes revision 2.
func TestServersStart(t *testing.T) {
	t.Run("etcd", func(t *testing.T) { firstWrite(t, Etcd) })
	t.Run("quire", func(t *testing.T) { firstWrite(t, Quire) })
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
