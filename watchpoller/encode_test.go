package watchpoller

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/protobuf/proto"
)

// TestEncodingIsProtobufs compares what is put together by hand with what the generated message gives, byte by byte.
func TestEncodingIsProtobufs(t *testing.T) {
	src := newMemSource()
	src.put("k", "1")
	src.put("k", string(bytes.Repeat([]byte("v"), 300)))
	src.txn(op{key: "k", del: true}, op{key: "large", value: string(make([]byte, 70000))})
	src.put("k", "")
	for _, slabbed := range []int{0, slabSize} {
		for _, withPrev := range []bool{false, true} {
			for _, id := range []int64{0, 5, -1} {
				t.Run(fmt.Sprintf("slab=%d/prev=%v/id=%d", slabbed, withPrev, id), func(t *testing.T) {
					h := &pb.ResponseHeader{ClusterId: 1 << 63, MemberId: 7, Revision: 12, RaftTerm: 1}
					want := &pb.WatchResponse{Header: h, WatchId: id}
					enc := slab{size: slabbed}
					var bufs [][]byte
					for _, row := range src.rows {
						kv := new(mvccpb.KeyValue)
						if err := proto.Unmarshal(row.KV[1:][lengthSize(row.KV[1:]):], kv); err != nil {
							t.Fatal(err)
						}
						e := &mvccpb.Event{Type: row.Type, Kv: kv}
						ev := enc.encode(row)
						b := ev.plain
						if withPrev {
							var err error
							if b, err = ev.prevKV(context.Background(), src); err != nil {
								t.Fatal(err)
							}
							if f, err := src.PrevKV(context.Background(), row.Key, row.Rev); err != nil {
								t.Fatal(err)
							} else if f != nil && kv.CreateRevision != kv.ModRevision {
								e.PrevKv = new(mvccpb.KeyValue)
								if err := proto.Unmarshal(f[1:][lengthSize(f[1:]):], e.PrevKv); err != nil {
									t.Fatal(err)
								}
							}
						}
						bufs = append(bufs, b)
						want.Events = append(want.Events, e)
					}
					r := newResponse(encodeHead(h, 12, id, false), bufs)
					wire, err := proto.MarshalOptions{Deterministic: true}.Marshal(want)
					if err != nil {
						t.Fatal(err)
					}
					if got := bytes.Join(r.WireBuffers(), nil); !bytes.Equal(got, wire) {
						t.Errorf("encoded\n%x, want\n%x", got, wire)
					}
					if !proto.Equal(r.Proto(), want) {
						t.Errorf("decoded %v, want %v", r.Proto(), want)
					}
					if r.Events() != len(want.Events) {
						t.Errorf("%d events, want %d", r.Events(), len(want.Events))
					}
					for _, b := range r.WireBuffers() {
						if cap(b) != len(b) {
							t.Errorf("appending to a buffer of %d bytes would write into its neighbour", len(b))
						}
					}
				})
			}
		}
	}
}

func lengthSize(b []byte) int {
	n := 1
	for b[n-1] >= 0x80 {
		n++
	}
	return n
}

func TestNeighboursBecomeOneBuffer(t *testing.T) {
	src := newMemSource()
	for range 10 {
		src.put("k", "v")
	}
	enc := slab{size: slabSize}
	var bufs [][]byte
	for _, row := range src.rows {
		bufs = append(bufs, enc.encode(row).plain)
	}
	if n := len(newResponse([]byte{}, bufs).WireBuffers()); n != 2 {
		t.Errorf("ten neighbours and a head are %d buffers, want 2", n)
	}
	if n := len(newResponse([]byte{}, [][]byte{bufs[0], bufs[2], bufs[3]}).WireBuffers()); n != 3 {
		t.Errorf("one event and two neighbours and a head are %d buffers, want 3", n)
	}
}

// TestPrevKVIsReadOnce: however many watchers want it; and a failed read is not remembered.
func TestPrevKVIsReadOnce(t *testing.T) {
	src := newMemSource()
	src.put("k", "1")
	src.put("k", "2")
	ev := new(slab).encode(src.rows[1])
	src.fail(errBroken)
	if _, err := ev.prevKV(context.Background(), src); !errors.Is(err, errBroken) {
		t.Fatalf("a failed read returned %v", err)
	}
	src.fail(nil)
	src.prevRead = 0
	for range 3 {
		if _, err := ev.prevKV(context.Background(), src); err != nil {
			t.Fatal(err)
		}
	}
	if src.prevRead != 1 {
		t.Errorf("the value before was read %d times, want once", src.prevRead)
	}
}

func TestMalformedRowsAreErrors(t *testing.T) {
	src := newMemSource()
	src.put("k", "1")
	row := src.rows[0]
	for _, bad := range [][]byte{nil, {0x12}, {0x12, 5, 1}, {0x12, 1, 0xff}, {0x12, 2, 0x0a, 9}} {
		row.KV = bad
		if _, err := new(slab).encode(row).prevKV(context.Background(), src); err == nil {
			t.Errorf("the malformed value %x was taken", bad)
		}
	}
}

// TestSplit states etcd's rule: below the limit nothing is split; each part stays below it unless it is one event.
func TestSplit(t *testing.T) {
	h := &pb.ResponseHeader{ClusterId: 1, MemberId: 2, RaftTerm: 3}
	src := newMemSource()
	var bufs [][]byte
	for range 20 {
		src.put("k", string(make([]byte, 100)))
	}
	for _, row := range src.rows {
		bufs = append(bufs, new(slab).encode(row).plain)
	}
	for limit := 1; limit < 3000; limit += 7 {
		parts := split(h, 30, 4, bufs, limit)
		n := 0
		for i, part := range parts {
			m := part.Proto()
			if m.Fragment != (i < len(parts)-1) {
				t.Fatalf("limit %d: part %d of %d has fragment=%v", limit, i, len(parts), m.Fragment)
			}
			if len(m.Events) > 1 && len(parts) > 1 && proto.Size(m) >= limit {
				t.Fatalf("limit %d: part %d has %d bytes", limit, i, proto.Size(m))
			}
			n += len(m.Events)
		}
		if n != len(bufs) {
			t.Fatalf("limit %d: %d events, want %d", limit, n, len(bufs))
		}
	}
	if n := len(split(h, 30, 4, bufs, 1<<20)); n != 1 {
		t.Errorf("below the limit there are %d parts", n)
	}
}

func TestReasonsAreEtcds(t *testing.T) {
	if want := rpctypes.ErrCompacted.Error(); reasonNegativeRevision != want {
		t.Errorf("the reason for a negative revision is %q, want %q", reasonNegativeRevision, want)
	}
	if defaultMaxResponseBytes != 2<<20 {
		t.Errorf("responses are fragmented from %d bytes on, want 2 MiB", defaultMaxResponseBytes)
	}
}
