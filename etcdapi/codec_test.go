package etcdapi

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

func testCodec() *codec {
	m := NewMetrics(MetricsOptions{})
	return &codec{sent: m.sentBytes, received: m.receivedBytes}
}

func kvOf(i, size int) *mvccpb.KeyValue {
	return &mvccpb.KeyValue{
		Key: []byte(fmt.Sprintf("/registry/%06d", i)), Value: bytes.Repeat([]byte{byte(i)}, size),
		CreateRevision: int64(i) + 2, ModRevision: int64(i) + 3, Version: 4,
	}
}

func many(n, size int) (kvs []*mvccpb.KeyValue) {
	for i := range n {
		kvs = append(kvs, kvOf(i, size))
	}
	return kvs
}

func TestRangeResponsesAreByteForByteWhatProtobufMakesOfThem(t *testing.T) {
	header := &pb.ResponseHeader{ClusterId: 1 << 63, MemberId: 7, Revision: 300, RaftTerm: 2}
	mixed := append(many(100, 100), kvOf(100, 10_000), kvOf(101, 4), kvOf(102, referenceFrom), kvOf(103, 1<<20))
	for name, m := range map[string]*pb.RangeResponse{
		"empty message":       {},
		"nothing found":       {Header: header},
		"count only":          {Header: header, Count: 12345},
		"zero header fields":  {Header: &pb.ResponseHeader{}, Count: 1},
		"a get":               {Header: header, Kvs: many(1, 100), Count: 1},
		"a large get":         {Header: header, Kvs: many(1, 1<<20), Count: 1},
		"an empty value":      {Header: header, Kvs: many(1, 0), Count: 1},
		"a page":              {Header: header, Kvs: many(500, 1000), More: true, Count: 100_000},
		"10k objects":         {Header: header, Kvs: many(10_000, 200), Count: 10_000},
		"just below a chunk":  {Kvs: many(9, 3600)},
		"mixed sizes":         {Header: header, Kvs: mixed, More: true, Count: 104},
		"chunk of a stream":   {Kvs: many(10, 50)},
		"negative count":      {Header: header, Count: -1},
		"more without others": {More: true},
	} {
		r := &rangeResponse{header: m.Header, more: m.More, count: m.Count}
		for _, kv := range m.Kvs {
			r.kvs = append(r.kvs, frameOf(kv))
		}
		if got := r.size(); got != proto.Size(m) {
			t.Errorf("%s: size() is %d, the message has %d bytes", name, got, proto.Size(m))
		}
		compareWire(t, name, r, m)
		r.stream = true
		compareWire(t, name+", streamed", r, &pb.RangeStreamResponse{RangeResponse: m})
	}
}

// compareWire encodes got with the codec and compares it with protobuf's form of want, in bytes and decoded.
func compareWire(t *testing.T, name string, got any, want proto.Message) {
	t.Helper()
	bs, err := testCodec().Marshal(got)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	defer bs.Free()
	plain, err := proto.MarshalOptions{Deterministic: true}.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	wire := bs.Materialize()
	decoded := want.ProtoReflect().New().Interface()
	if err := proto.Unmarshal(wire, decoded); err != nil {
		t.Fatalf("%s: what we sent does not decode: %v", name, err)
	}
	if !proto.Equal(decoded, want) {
		t.Errorf("%s: the decoded message differs", name)
	}
	if !bytes.Equal(wire, plain) {
		t.Errorf("%s: %d bytes on the wire, protobuf makes %d others", name, len(wire), len(plain))
	}
}

func TestLargeFramesGoOutByReferenceAndSmallOnesInFewBuffers(t *testing.T) {
	large := frameOf(kvOf(1, 100_000))
	bs := (&rangeResponse{kvs: []backend.Frame{frameOf(kvOf(0, 10)), large}}).encode()
	if last := bs[len(bs)-1].ReadOnlyData(); &last[0] != &large[0] {
		t.Error("a large frame was copied")
	}

	r := &rangeResponse{header: &pb.ResponseHeader{Revision: 1}, count: 10_000}
	for i := range 10_000 {
		r.kvs = append(r.kvs, frameOf(kvOf(i, 200)))
	}
	bs = r.encode()
	defer bs.Free()
	if max := bs.Len()/(copyChunk-referenceFrom) + 3; len(bs) > max {
		t.Errorf("10,000 small frames of %d bytes became %d buffers, want at most %d", bs.Len(), len(bs), max)
	}
}

func TestPooledBuffersReturnOnlyAfterTheLastReference(t *testing.T) {
	c := testCodec()
	want := &pb.RangeResponse{Kvs: many(200, 100)}
	r := &rangeResponse{}
	for _, kv := range want.Kvs {
		r.kvs = append(r.kvs, frameOf(kv))
	}
	bs, err := c.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	bs.Ref() // as grpc's transport does
	bs.Free()
	for range 100 { // would take the buffers if they were back in the pool
		other, err := c.Marshal(&pb.PutRequest{Value: bytes.Repeat([]byte{0xff}, 30_000)})
		if err != nil {
			t.Fatal(err)
		}
		other.Free()
	}
	got := new(pb.RangeResponse)
	if err := c.Unmarshal(bs, got); err != nil || !proto.Equal(got, want) {
		t.Errorf("a buffer still in use was overwritten: %v", err)
	}
	bs.Free()
}

func TestMessagesWithWireBuffersAreSentAsTheyAre(t *testing.T) {
	want := &pb.WatchResponse{Header: &pb.ResponseHeader{Revision: 5}, WatchId: 3}
	for i, size := range []int{10, 20_000, 0, 3, 4096} {
		want.Events = append(want.Events, &mvccpb.Event{Kv: kvOf(i, size)})
	}
	whole, err := proto.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	for _, cut := range []int{1, 7, 100, 5000, len(whole)} {
		var p parts
		for rest := whole; len(rest) > 0; {
			n := min(cut, len(rest))
			p, rest = append(p, rest[:n:n], nil), rest[n:]
		}
		compareWire(t, fmt.Sprintf("parts of %d bytes", cut), p, want)
	}
	compareWire(t, "no parts", parts{}, &pb.WatchResponse{})
}

func TestOrdinaryMessagesAreOrdinaryProtobuf(t *testing.T) {
	for _, size := range []int{0, 10, 900, 1100, 100_000} {
		m := &pb.PutRequest{Key: []byte("k"), Value: []byte(strings.Repeat("x", size))}
		compareWire(t, fmt.Sprint(size), m, m)
	}
}

func TestCodecRefusesWhatItCannotEncode(t *testing.T) {
	c := testCodec()
	if _, err := c.Marshal("text"); err == nil || !strings.Contains(err.Error(), "string") {
		t.Errorf("Marshal of a string: %v", err)
	}
	if err := c.Unmarshal(nil, "text"); err == nil || !strings.Contains(err.Error(), "string") {
		t.Errorf("Unmarshal into a string: %v", err)
	}
	if err := c.Unmarshal(mem.BufferSlice{mem.SliceBuffer{0xff}}, &pb.PutRequest{}); err == nil {
		t.Error("Unmarshal of rubbish succeeded")
	}
}

func TestFrameKey(t *testing.T) {
	kv := kvOf(42, 70_000)
	if got := frameKey(frameOf(kv)); !bytes.Equal(got, kv.Key) {
		t.Errorf("got %q, want %q", got, kv.Key)
	}
	for _, bad := range []backend.Frame{nil, {0x12}, {0x12, 0}, {0x12, 2, 0x0a, 9}, {0x12, 1, 0xff}, {0x0a, 1, 1}} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("frame %x: no panic", []byte(bad))
				}
			}()
			frameKey(bad)
		}()
	}
}
