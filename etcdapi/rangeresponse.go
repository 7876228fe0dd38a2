package etcdapi

import (
	"fmt"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/quire-db/quire/backend"
)

// Field numbers of etcd's rpc.proto.
const (
	headerClusterID = 1
	headerMemberID  = 2
	headerRevision  = 3
	headerRaftTerm  = 4

	rangeHeader = 1
	rangeKVs    = 2 // a backend.Frame begins with this tag
	rangeMore   = 3
	rangeCount  = 4

	rangeStreamResponse = 1 // RangeStreamResponse.range_response

	keyValueKey = 1 // mvccpb.KeyValue.key
)

// copyOne is the size up to which the value of a get is copied next to its header.
const copyOne = 4 << 10

// rangeResponse is a RangeResponse, or with stream a RangeStreamResponse around one, whose key-values are already
// encoded. Its wire form is, byte for byte, what protobuf makes of the same message.
//
// In a list the frames outnumber everything else ten thousand to one, so header and tail are built by hand
// around them and nothing is decoded.
type rangeResponse struct {
	header *pb.ResponseHeader // nil: not on the wire (all chunks of a stream but the last)
	kvs    []backend.Frame    // shared, immutable
	more   bool
	count  int64
	stream bool
}

// size is the length of the encoded RangeResponse in bytes, without RangeStreamResponse's envelope.
func (r *rangeResponse) size() int {
	n := 0
	if r.header != nil {
		n += protowire.SizeTag(rangeHeader) + protowire.SizeBytes(headerSize(r.header))
	}
	for _, f := range r.kvs {
		n += len(f)
	}
	if r.more {
		n += protowire.SizeTag(rangeMore) + 1
	}
	return n + sizeVarintField(rangeCount, uint64(r.count))
}

func (r *rangeResponse) encode() mem.BufferSlice {
	head := make([]byte, 0, 64)
	if r.stream {
		head = protowire.AppendTag(head, rangeStreamResponse, protowire.BytesType)
		head = protowire.AppendVarint(head, uint64(r.size()))
	}
	if h := r.header; h != nil {
		head = protowire.AppendTag(head, rangeHeader, protowire.BytesType)
		head = protowire.AppendVarint(head, uint64(headerSize(h)))
		head = appendVarintField(head, headerClusterID, h.ClusterId)
		head = appendVarintField(head, headerMemberID, h.MemberId)
		head = appendVarintField(head, headerRevision, uint64(h.Revision))
		head = appendVarintField(head, headerRaftTerm, h.RaftTerm)
	}
	tail := appendVarintField(make([]byte, 0, 16), rangeMore, protowire.EncodeBool(r.more))
	tail = appendVarintField(tail, rangeCount, uint64(r.count))

	switch {
	case len(r.kvs) == 0:
		return mem.BufferSlice{mem.SliceBuffer(append(head, tail...))}
	case len(r.kvs) == 1 && len(r.kvs[0]) < copyOne: // a get: one buffer
		parts := [...]backend.Frame{head, r.kvs[0], tail}
		return mem.BufferSlice{copied(parts[:], len(head)+len(r.kvs[0])+len(tail))}
	}
	var out mem.BufferSlice
	if len(head) > 0 {
		out = append(out, mem.SliceBuffer(head))
	}
	out = gather(out, r.kvs)
	if len(tail) > 0 {
		out = append(out, mem.SliceBuffer(tail))
	}
	return out
}

// frameKey is the key in f, without decoding (and copying) its value. It panics on bytes that are no frame: they
// come from the backend, not from a client.
func frameKey(f backend.Frame) []byte {
	num, typ, n := protowire.ConsumeTag(f)
	if n > 0 && num == rangeKVs && typ == protowire.BytesType {
		kv, m := protowire.ConsumeBytes(f[n:])
		for m > 0 && len(kv) > 0 {
			num, typ, t := protowire.ConsumeTag(kv)
			if t < 0 {
				break
			}
			if num == keyValueKey && typ == protowire.BytesType {
				if key, k := protowire.ConsumeBytes(kv[t:]); k > 0 {
					return key
				}
				break
			}
			skip := protowire.ConsumeFieldValue(num, typ, kv[t:])
			if skip < 0 {
				break
			}
			kv = kv[t+skip:]
		}
	}
	panic(fmt.Sprintf("etcdapi: the backend answered with a frame of %d bytes that holds no KeyValue with a key", len(f)))
}

func headerSize(h *pb.ResponseHeader) int {
	return sizeVarintField(headerClusterID, h.ClusterId) + sizeVarintField(headerMemberID, h.MemberId) +
		sizeVarintField(headerRevision, uint64(h.Revision)) + sizeVarintField(headerRaftTerm, h.RaftTerm)
}

// sizeVarintField and appendVarintField leave a zero out, as proto3 does.
func sizeVarintField(num protowire.Number, v uint64) int {
	if v == 0 {
		return 0
	}
	return protowire.SizeTag(num) + protowire.SizeVarint(v)
}

func appendVarintField(b []byte, num protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, num, protowire.VarintType), v)
}
