package etcdapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

func TestKVThroughEtcdsGeneratedClient(t *testing.T) {
	f := newFakeStore()
	kv := pb.NewKVClient(dial(t, newTestServer(t, f, nil)))
	ctx := t.Context()

	put, err := kv.Put(ctx, &pb.PutRequest{Key: []byte("a"), Value: []byte(big)})
	if err != nil {
		t.Fatal(err)
	}
	checkHeader(t, put.Header, 2)
	f.put("b", "2")

	got, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), Limit: 1})
	if err != nil {
		t.Fatal(err)
	}
	checkHeader(t, got.Header, 3)
	if len(got.Kvs) != 1 || string(got.Kvs[0].Value) != big || !got.More || got.Count != 2 {
		t.Errorf("got %d kvs, more %v, count %d", len(got.Kvs), got.More, got.Count)
	}
	none, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte("none")})
	if err != nil || len(none.Kvs) != 0 || none.Count != 0 {
		t.Errorf("a missing key: %v, %v", none, err)
	}
	checkHeader(t, none.GetHeader(), 3)

	del, err := kv.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: []byte("b")})
	if err != nil || del.Deleted != 1 {
		t.Errorf("delete: %v, %v", del, err)
	}
	checkHeader(t, del.GetHeader(), 4)

	txn, err := kv.Txn(ctx, &pb.TxnRequest{Success: ops(opPut("x"))})
	if err != nil || !txn.Succeeded {
		t.Errorf("txn: %v, %v", txn, err)
	}
	checkHeader(t, txn.GetHeader(), 5)
	if n := len(f.commands); n != 3 {
		t.Errorf("%d commands, want 3: put, delete, txn", n)
	}

	read, err := kv.Txn(ctx, &pb.TxnRequest{Success: ops(opRange("x"))})
	if err != nil {
		t.Fatal(err)
	}
	checkHeader(t, read.Header, 5)
	if n := len(f.commands); n != 3 {
		t.Error("a Txn that only reads was written")
	}
}

func TestRefusedRequestsNeverReachTheBackend(t *testing.T) {
	f := newFakeStore()
	kv := pb.NewKVClient(dial(t, newTestServer(t, f, func(o *Options) { o.MaxRequestBytes = 1000; o.MaxTxnOps = 2 })))
	ctx := t.Context()
	for name, c := range map[string]struct {
		call func() error
		want error
	}{
		"range":  {func() error { _, err := kv.Range(ctx, &pb.RangeRequest{}); return err }, rpctypes.ErrGRPCEmptyKey},
		"put":    {func() error { _, err := kv.Put(ctx, &pb.PutRequest{}); return err }, rpctypes.ErrGRPCEmptyKey},
		"delete": {func() error { _, err := kv.DeleteRange(ctx, &pb.DeleteRangeRequest{}); return err }, rpctypes.ErrGRPCEmptyKey},
		"txn":    {func() error { _, err := kv.Txn(ctx, &pb.TxnRequest{Success: ops(opPut("a"), opPut("a"))}); return err }, rpctypes.ErrGRPCDuplicateKey},
		"ops": {func() error {
			_, err := kv.Txn(ctx, &pb.TxnRequest{Success: ops(opPut("a"), opPut("b"), opPut("c"))})
			return err
		}, rpctypes.ErrGRPCTooManyOps},
		"too large": {func() error { _, err := kv.Put(ctx, &pb.PutRequest{Key: []byte("a"), Value: []byte(big)}); return err }, rpctypes.ErrGRPCRequestTooLarge},
		"stream": {func() error {
			s, err := kv.RangeStream(ctx, &pb.RangeRequest{})
			if err == nil {
				_, err = s.Recv()
			}
			return err
		}, rpctypes.ErrGRPCEmptyKey},
	} {
		checkErr(t, name, c.call(), c.want)
	}
	if len(f.commands) != 0 {
		t.Errorf("%d commands reached the backend", len(f.commands))
	}
	huge := strings.Repeat("v", 1000+grpcOverheadBytes)
	if _, err := kv.Put(ctx, &pb.PutRequest{Key: []byte("a"), Value: []byte(huge)}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("beyond the overhead grpc itself refuses: got %v", err)
	}
}

func TestBackendErrorsReachTheClient(t *testing.T) {
	f := newFakeStore()
	f.onWrite = func(backend.Command) (proto.Message, error) {
		return nil, fmt.Errorf("apply: %w", backend.ErrNoSpace)
	}
	kv := pb.NewKVClient(dial(t, newTestServer(t, f, nil)))
	ctx := t.Context()
	_, err := kv.Put(ctx, &pb.PutRequest{Key: []byte("a")})
	checkErr(t, "put", err, rpctypes.ErrGRPCNoSpace)
	_, err = kv.Txn(ctx, &pb.TxnRequest{Success: ops(opPut("a"))})
	checkErr(t, "txn", err, rpctypes.ErrGRPCNoSpace)
	_, err = kv.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: []byte("a")})
	checkErr(t, "delete", err, rpctypes.ErrGRPCNoSpace)
	_, err = kv.Compact(ctx, &pb.CompactionRequest{Revision: 1, Physical: true})
	checkErr(t, "compact", err, rpctypes.ErrGRPCNoSpace)
	_, err = kv.Range(ctx, &pb.RangeRequest{Key: []byte("a"), Revision: 99})
	checkErr(t, "range", err, rpctypes.ErrGRPCFutureRev)
	if len(f.waited) != 0 {
		t.Error("waited for a compaction that was refused")
	}
}

func TestCompactWaitsOnlyWhenPhysicalAndAnswersWithTheStoresRevision(t *testing.T) {
	f := newFakeStore()
	f.put("a", "1")
	f.put("a", "2")
	kv := pb.NewKVClient(dial(t, newTestServer(t, f, nil)))
	for _, physical := range []bool{false, true} {
		resp, err := kv.Compact(t.Context(), &pb.CompactionRequest{Revision: 2, Physical: physical})
		if err != nil {
			t.Fatal(err)
		}
		checkHeader(t, resp.Header, 3)
	}
	if !slices.Equal(f.waited, []int64{2}) {
		t.Errorf("waited for %v, want [2]", f.waited)
	}
}

func streamAll(t *testing.T, kv pb.KVClient, req *pb.RangeRequest) ([]*pb.RangeResponse, error) {
	t.Helper()
	s, err := kv.RangeStream(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	var out []*pb.RangeResponse
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return out, err
		}
		out = append(out, m.RangeResponse)
	}
}

func TestRangeStreamMergesToTheUnaryAnswer(t *testing.T) {
	f := newFakeStore()
	for i := range 500 {
		f.put(fmt.Sprintf("k%04d", i), strings.Repeat("v", i*10))
	}
	kv := pb.NewKVClient(dial(t, newTestServer(t, f, func(o *Options) { o.MaxRequestBytes = 100_000 })))
	for name, req := range map[string]*pb.RangeRequest{
		"all":        {Key: []byte{0}, RangeEnd: []byte{0}},
		"limit":      {Key: []byte{0}, RangeEnd: []byte{0}, Limit: 123},
		"limit 1":    {Key: []byte{0}, RangeEnd: []byte{0}, Limit: 1},
		"exactly 10": {Key: []byte{0}, RangeEnd: []byte{0}, Limit: 10},
		"exact":      {Key: []byte{0}, RangeEnd: []byte{0}, Limit: 500},
		"beyond":     {Key: []byte{0}, RangeEnd: []byte{0}, Limit: 501},
		"one key":    {Key: []byte("k0001")},
		"nothing":    {Key: []byte("x")},
		"keys only":  {Key: []byte{0}, RangeEnd: []byte{0}, KeysOnly: true},
		"revision":   {Key: []byte{0}, RangeEnd: []byte{0}, Revision: 20},
		"negative":   {Key: []byte{0}, RangeEnd: []byte{0}, Limit: -1},
	} {
		want, err := kv.Range(t.Context(), proto.CloneOf(req))
		if err != nil {
			t.Fatal(err)
		}
		chunks, err := streamAll(t, kv, req)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		got := new(pb.RangeResponse)
		for i, c := range chunks {
			if last := i == len(chunks)-1; !last && (c.Header != nil || c.More || c.Count != 0 || len(c.Kvs) == 0) {
				t.Errorf("%s: chunk %d of %d has header, more or count, or no keys", name, i, len(chunks))
			}
			proto.Merge(got, c)
		}
		if !proto.Equal(got, want) {
			t.Errorf("%s: merged stream has header <%v>, %d keys, more %v, count %d; unary has <%v>, %d, %v, %d", name,
				got.Header, len(got.Kvs), got.More, got.Count, want.Header, len(want.Kvs), want.More, want.Count)
		}
	}
}

func TestRangeStreamChunksBeginWithTenKeysAndSteerTowardMaxRequestBytes(t *testing.T) {
	f := newFakeStore()
	for i := range 300 {
		f.put(fmt.Sprintf("k%04d", i), strings.Repeat("v", 1000))
	}
	for i := 300; i < 400; i++ {
		f.put(fmt.Sprintf("k%04d", i), strings.Repeat("v", 19_000))
	}
	kv := pb.NewKVClient(dial(t, newTestServer(t, f, func(o *Options) { o.MaxRequestBytes = 100_000 })))
	chunks, err := streamAll(t, kv, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
	if err != nil {
		t.Fatal(err)
	}
	var sizes []int
	for _, c := range chunks {
		sizes = append(sizes, len(c.Kvs))
	}
	// 10, 20, 40 KB are below half of 100 KB: doubled. 80 KB is left alone. Then 19 KB values: 760 KB, halved
	// until a chunk is not above 200 KB.
	want := []int{10, 20, 40, 80, 80, 80, 40, 20, 10, 10, 10}
	if !slices.Equal(sizes, want) {
		t.Errorf("chunks of %v keys, want %v", sizes, want)
	}
}

func TestNextChunkKeys(t *testing.T) {
	for _, c := range []struct {
		last  int64
		bytes int
		want  int64
	}{{10, 0, 20}, {10, 499, 20}, {10, 500, 10}, {10, 2000, 10}, {10, 2001, 5}, {1, 5000, 1}} {
		if got := nextChunkKeys(c.last, c.bytes, 1000); got != c.want {
			t.Errorf("after %d keys with %d bytes: %d keys, want %d", c.last, c.bytes, got, c.want)
		}
	}
}

func TestRangeStreamStaysAtTheRevisionOfItsFirstChunk(t *testing.T) {
	f := newFakeStore()
	for i := range 50 {
		f.put(fmt.Sprintf("k%04d", i), "v")
	}
	n := 0
	f.afterGet = func() { n++; f.put(fmt.Sprintf("new%04d", n), "v") }
	kv := pb.NewKVClient(dial(t, newTestServer(t, f, nil)))
	chunks, err := streamAll(t, kv, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
	if err != nil {
		t.Fatal(err)
	}
	keys := 0
	for _, c := range chunks {
		keys += len(c.Kvs)
	}
	last := chunks[len(chunks)-1]
	if keys != 50 || last.Count != 50 || len(chunks) < 2 {
		t.Errorf("%d keys in %d chunks, count %d; want 50, as before the writes", keys, len(chunks), last.Count)
	}
	checkHeader(t, last.Header, 51)
}

func TestRangeStreamCountOnlyIsOneMessage(t *testing.T) {
	f := newFakeStore()
	for i := range 50 {
		f.put(fmt.Sprintf("k%04d", i), "v")
	}
	kv := pb.NewKVClient(dial(t, newTestServer(t, f, nil)))
	chunks, err := streamAll(t, kv, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, CountOnly: true, Revision: 10})
	if err != nil {
		t.Fatal(err)
	}
	if len(chunks) != 1 || chunks[0].Count != 9 || len(chunks[0].Kvs) != 0 || chunks[0].More {
		t.Errorf("got %v", chunks)
	}
	checkHeader(t, chunks[0].Header, 51)
}

func TestRangeStreamEndsWithTheErrorOfAChunk(t *testing.T) {
	f := newFakeStore()
	for i := range 50 {
		f.put(fmt.Sprintf("k%04d", i), "v")
	}
	f.afterGet = func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.readErr = &backend.CompactedError{CompactRevision: 51}
	}
	s := newTestServer(t, f, func(o *Options) {
		o.View = func() View { return &failingView{f.View().(*fakeView)} }
	})
	chunks, err := streamAll(t, pb.NewKVClient(dial(t, s)), &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
	checkErr(t, "second chunk", err, rpctypes.ErrGRPCCompacted)
	if len(chunks) != 1 {
		t.Errorf("%d chunks before the error, want 1", len(chunks))
	}
}

// failingView answers with the store's readErr once it is set.
type failingView struct{ *fakeView }

func (v *failingView) Range(ctx context.Context, r *pb.RangeRequest) (*backend.RangeResult, error) {
	v.f.mu.Lock()
	err := v.f.readErr
	v.f.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return v.fakeView.Range(ctx, r)
}
