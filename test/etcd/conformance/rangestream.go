package conformance

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// rangeStream reads a whole stream and checks what holds for each: header, more and count on the last
// chunk only.
func (x *exam) rangeStream(r *pb.RangeRequest) (chunks []*pb.RangeResponse) {
	x.Helper()
	s, err := x.KV.RangeStream(x.ctx, r)
	x.must(err, r)
	for {
		c, err := s.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		x.must(err, r)
		chunks = append(chunks, c.RangeResponse)
	}
	if len(chunks) == 0 {
		x.Fatalf("%s: a stream without any chunk", show(r))
	}
	for i, c := range chunks[:len(chunks)-1] {
		if c.Header != nil || c.More || c.Count != 0 {
			x.Errorf("%s: chunk %d of %d has header, more or count: %s", show(r), i, len(chunks), show(c))
		}
	}
	if last := chunks[len(chunks)-1]; last.Header.GetMemberId() == 0 || last.Header.GetRevision() == 0 {
		x.Errorf("%s: the last chunk has header %v", show(r), last.Header)
	}
	return chunks
}

func allKVs(chunks []*pb.RangeResponse) (kvs []*mvccpb.KeyValue) {
	for _, c := range chunks {
		kvs = append(kvs, c.Kvs...)
	}
	return kvs
}

func (x *exam) fillMany(n int, value string) {
	for i := 0; i < n; i += 100 {
		t := &pb.TxnRequest{}
		for j := i; j < min(i+100, n); j++ {
			t.Success = append(t.Success, putOp(fmt.Sprintf("k/%05d", j), value))
		}
		x.txn(t)
	}
}

var rangeStreamCases = []testCase{
	{name: "the chunks put together are the answer of Range", run: func(x *exam) {
		x.fillMany(95, "v")
		for _, r := range []*pb.RangeRequest{
			{Key: []byte{0}, RangeEnd: []byte{0}},
			{Key: []byte("k/00001")},
			{Key: []byte("none")},
			{Key: []byte("k/"), RangeEnd: []byte("k0"), Limit: 7},
			{Key: []byte("k/"), RangeEnd: []byte("k0"), Limit: 33},
			{Key: []byte("k/"), RangeEnd: []byte("k0"), Limit: 95},
			{Key: []byte("k/"), RangeEnd: []byte("k0"), Limit: 1000},
			{Key: []byte("k/"), RangeEnd: []byte("k0"), KeysOnly: true},
			{Key: []byte("k/"), RangeEnd: []byte("k0"), CountOnly: true},
			{Key: []byte("k/"), RangeEnd: []byte("k0"), CountOnly: true, Limit: 3},
			{Key: []byte("k/"), RangeEnd: []byte("k0"), Serializable: true},
			{Key: []byte("b"), RangeEnd: []byte("a")},
			{Key: []byte("k/"), RangeEnd: []byte("k0"), Revision: 1},
			{Key: []byte("k/"), RangeEnd: []byte("k0"), SortTarget: pb.RangeRequest_KEY, SortOrder: pb.RangeRequest_ASCEND},
		} {
			want := x.rangeRequest(r)
			chunks := x.rangeStream(r)
			last := chunks[len(chunks)-1]
			same(x, "the sum of "+show(r), &pb.RangeResponse{Header: last.Header, Kvs: allKVs(chunks), More: last.More, Count: last.Count}, want)
		}
	}},

	{name: "the first chunk has ten keys and small keys double from there", run: func(x *exam) {
		x.fillMany(200, "v")
		var sizes []int
		for _, c := range x.rangeStream(everything) {
			sizes = append(sizes, len(c.Kvs))
		}
		if want := []int{10, 20, 40, 80, 50}; !slices.Equal(sizes, want) {
			x.Errorf("chunks have %v keys, want %v", sizes, want)
		}
	}},

	{name: "large values shrink the chunks", run: func(x *exam) {
		value := bytes.Repeat([]byte("v"), 1<<20)
		for i := range 30 {
			x.putRequest(&pb.PutRequest{Key: fmt.Appendf(nil, "k/%05d", i), Value: value})
		}
		var sizes []int
		for _, c := range x.rangeStream(everything) {
			sizes = append(sizes, len(c.Kvs))
		}
		if want := []int{10, 5, 2, 2, 2, 2, 2, 2, 2, 1}; !slices.Equal(sizes, want) {
			x.Errorf("chunks have %v keys, want %v", sizes, want)
		}
	}},

	{name: "an old revision streams the old keys under today's header", run: func(x *exam) {
		x.fillMany(20, "old")
		old := x.revision()
		x.deleteRequest(&pb.DeleteRangeRequest{Key: []byte("k/00005"), RangeEnd: []byte("k0")})
		chunks := x.rangeStream(&pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Revision: old})
		equal(x, "keys", len(allKVs(chunks)), 20)
		equal(x, "the header's revision", chunks[len(chunks)-1].Header.Revision, old+1)
	}},

	{name: "a stream shows one revision although the store moves on", run: func(x *exam) {
		x.fillMany(3000, string(bytes.Repeat([]byte("v"), 2000)))
		pinned := x.revision()
		s, err := x.KV.RangeStream(x.ctx, everything)
		x.must(err, everything)
		var kvs []*mvccpb.KeyValue
		for chunk := 0; ; chunk++ {
			c, err := s.Recv()
			if errors.Is(err, io.EOF) {
				break
			}
			x.must(err, everything)
			if chunk == 0 {
				x.deleteRequest(&pb.DeleteRangeRequest{Key: []byte("k/02000"), RangeEnd: []byte("k0")})
				x.put("k/02999/new", "")
			}
			kvs = append(kvs, c.RangeResponse.Kvs...)
			if h := c.RangeResponse.Header; h != nil {
				equal(x, "the header's revision", h.Revision, pinned)
			}
		}
		equal(x, "keys", len(kvs), 3000)
	}},

	{name: "what a stream cannot do is refused", run: func(x *exam) {
		x.put("a", "1")
		x.put("a", "2")
		x.put("a", "3")
		x.compact(3)
		for _, c := range []struct {
			request *pb.RangeRequest
			want    error
		}{
			{&pb.RangeRequest{}, rpctypes.ErrGRPCEmptyKey},
			{&pb.RangeRequest{Key: []byte("a"), SortOrder: 9}, rpctypes.ErrGRPCInvalidSortOption},
			{&pb.RangeRequest{Key: []byte("a"), Revision: 9}, rpctypes.ErrGRPCFutureRev},
			{&pb.RangeRequest{Key: []byte("a"), Revision: 2}, rpctypes.ErrGRPCCompacted},
			{&pb.RangeRequest{Key: []byte("a"), Revision: 9, CountOnly: true}, rpctypes.ErrGRPCFutureRev},
			{&pb.RangeRequest{Key: []byte("a"), SortOrder: pb.RangeRequest_DESCEND}, status.Error(codes.Unimplemented, "RangeStream does not support custom sort orders")},
			{&pb.RangeRequest{Key: []byte("a"), SortTarget: pb.RangeRequest_MOD, SortOrder: pb.RangeRequest_ASCEND}, status.Error(codes.Unimplemented, "RangeStream does not support custom sort orders")},
			{&pb.RangeRequest{Key: []byte("a"), MinModRevision: 1}, status.Error(codes.Unimplemented, "RangeStream does not support revision filters")},
			{&pb.RangeRequest{Key: []byte("a"), MaxCreateRevision: 1}, status.Error(codes.Unimplemented, "RangeStream does not support revision filters")},
		} {
			s, err := x.KV.RangeStream(x.ctx, c.request)
			x.must(err, c.request)
			_, err = s.Recv()
			x.wantError(err, c.want)
		}
	}},
}
