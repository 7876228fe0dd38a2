package etcdapi

import (
	"context"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

func (f *fakeStore) HashKV(ctx context.Context, rev int64) (backend.KVHash, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.readErr != nil {
		return backend.KVHash{}, f.readErr
	}
	return backend.KVHash{Hash: 1<<32 - 1, Revision: rev, CompactRevision: -1, Head: f.rev}, ctx.Err()
}

func (f *fakeStore) Hash(ctx context.Context) (hash uint32, rev int64, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.readErr != nil {
		return 0, 0, f.readErr
	}
	return 17, f.rev, ctx.Err()
}

func TestHashes(t *testing.T) {
	f := newFakeStore()
	f.put("a", "1")
	f.put("a", "2")
	c := pb.NewMaintenanceClient(dial(t, newTestServer(t, f, nil)))
	kv, err := c.HashKV(t.Context(), &pb.HashKVRequest{Revision: 2})
	if err != nil {
		t.Fatal(err)
	}
	checkHeader(t, kv.Header, 3)
	kv.Header = nil
	if want := (&pb.HashKVResponse{Hash: 1<<32 - 1, CompactRevision: -1, HashRevision: 2}); !proto.Equal(kv, want) {
		t.Errorf("HashKV: %v, want %v", kv, want)
	}
	all, err := c.Hash(t.Context(), &pb.HashRequest{})
	if err != nil || all.Hash != 17 {
		t.Fatalf("Hash: %v, %v", all, err)
	}
	checkHeader(t, all.Header, 3)

	for _, e := range []struct{ err, want error }{
		{&backend.CompactedError{CompactRevision: 3}, rpctypes.ErrGRPCCompacted},
		{backend.ErrFutureRev, rpctypes.ErrGRPCFutureRev},
		{backend.ErrClosed, rpctypes.ErrGRPCStopped},
	} {
		f.mu.Lock()
		f.readErr = e.err
		f.mu.Unlock()
		_, err := c.HashKV(t.Context(), &pb.HashKVRequest{Revision: 2})
		checkErr(t, "HashKV", err, e.want)
		_, err = c.Hash(t.Context(), &pb.HashRequest{})
		checkErr(t, "Hash", err, e.want)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.HashKV(ctx, &pb.HashKVRequest{}); status.Code(err) != codes.Canceled {
		t.Errorf("HashKV of a client that has left: %v", err)
	}
}
