package etcdapi

import (
	"fmt"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
)

// wireBuffers is a message that is already encoded: its wire form is the buffers one after the other. The buffers
// are shared and immutable, also after the send returned (grpc may still be writing them).
type wireBuffers interface {
	WireBuffers() [][]byte
}

// codec is grpc's codec for all services: ordinary protobuf, but for messages that come encoded. Those go out by
// reference where that pays; a value is never marshalled a second time.
type codec struct {
	sent, received prometheus.Counter // bytes of message bodies
}

var _ encoding.CodecV2 = (*codec)(nil)

// Name is "proto": clients see the standard content type.
func (c *codec) Name() string { return "proto" }

// Marshal encodes a proto.Message, a message with WireBuffers, or one of our own responses. The caller frees the
// result; freeing returns only the pooled parts to their pool.
func (c *codec) Marshal(v any) (mem.BufferSlice, error) {
	var out mem.BufferSlice
	switch m := v.(type) {
	case *rangeResponse:
		out = m.encode()
	case wireBuffers:
		out = gather(nil, m.WireBuffers())
	case proto.Message:
		var err error
		if out, err = marshalProto(m); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("etcdapi: cannot marshal a %T: it is neither a protobuf message nor has WireBuffers", v)
	}
	c.sent.Add(float64(out.Len()))
	return out, nil
}

// Unmarshal decodes data into v, a proto.Message. It copies: data may be reused afterwards.
func (c *codec) Unmarshal(data mem.BufferSlice, v any) error {
	m, ok := v.(proto.Message)
	if !ok {
		return fmt.Errorf("etcdapi: cannot unmarshal into a %T: it is no protobuf message", v)
	}
	buf := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buf.Free()
	c.received.Add(float64(buf.Len()))
	return proto.Unmarshal(buf.ReadOnlyData(), m)
}

func marshalProto(m proto.Message) (mem.BufferSlice, error) {
	size := proto.Size(m)
	opts := proto.MarshalOptions{UseCachedSize: true} // of the line above
	if mem.IsBelowBufferPoolingThreshold(size) {
		b, err := opts.Marshal(m)
		if err != nil {
			return nil, err
		}
		return mem.BufferSlice{mem.SliceBuffer(b)}, nil
	}
	pool := mem.DefaultBufferPool()
	buf := pool.Get(size)
	if _, err := opts.MarshalAppend((*buf)[:0], m); err != nil {
		pool.Put(buf)
		return nil, err
	}
	return mem.BufferSlice{mem.NewBuffer(buf, pool)}, nil
}

const (
	// referenceFrom is the size from which a part is handed to grpc by reference: then an answer in flight costs the
	// server a slice header for each value, and any number of answers share the values in the cache. A client that
	// does not read keeps the slabs its answer lies in, also those that leave the cache meanwhile: at worst a whole
	// slab for each value. Below this size copying is cheaper than one more entry in the list that grpc walks, and
	// the list is as large as the copy.
	referenceFrom = 256
	// copyChunk bounds a pooled buffer: 32 KiB is a tier of grpc's pool, the next one is 1 MiB.
	copyChunk = 32 << 10
)

// gather appends parts to out: runs of small ones copied into pooled buffers, large ones by reference. The parts
// must stay unchanged for as long as grpc holds out.
func gather[B ~[]byte](out mem.BufferSlice, parts []B) mem.BufferSlice {
	large := 0
	for _, p := range parts {
		if len(p) >= referenceFrom {
			large++
		}
	}
	refs := make([]mem.SliceBuffer, 0, large) // one allocation, pointed into
	out = slices.Grow(out, large+8)
	for i := 0; i < len(parts); {
		if len(parts[i]) >= referenceFrom {
			refs = append(refs, mem.SliceBuffer(parts[i]))
			out = append(out, &refs[len(refs)-1])
			i++
			continue
		}
		end, size := i, 0
		for end < len(parts) && len(parts[end]) < referenceFrom && size+len(parts[end]) <= copyChunk {
			size += len(parts[end])
			end++
		}
		if size > 0 {
			out = append(out, copied(parts[i:end], size))
		}
		i = end
	}
	return out
}

// copied is one buffer with all parts, size bytes together.
func copied[B ~[]byte](parts []B, size int) mem.Buffer {
	if mem.IsBelowBufferPoolingThreshold(size) {
		b := make([]byte, 0, size)
		for _, p := range parts {
			b = append(b, p...)
		}
		return mem.SliceBuffer(b)
	}
	pool := mem.DefaultBufferPool()
	buf := pool.Get(size)
	b := (*buf)[:0]
	for _, p := range parts {
		b = append(b, p...)
	}
	return mem.NewBuffer(buf, pool)
}
