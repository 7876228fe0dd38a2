package watchpoller

import (
	"bytes"
	"fmt"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// Response is a WatchResponse with events, already encoded. The events' bytes are shared with other watchers.
type Response struct {
	bufs   [][]byte
	events int
}

// WireBuffers returns the parts of the encoded WatchResponse. They are shared: the caller must not change them, and
// may keep them as long as it likes.
func (r *Response) WireBuffers() [][]byte { return r.bufs }

// Events returns how many events the response carries.
func (r *Response) Events() int { return r.events }

// Proto decodes the response into a message of the caller's own.
func (r *Response) Proto() *pb.WatchResponse {
	m := new(pb.WatchResponse)
	if err := proto.Unmarshal(bytes.Join(r.bufs, nil), m); err != nil {
		panic(fmt.Sprintf("watchpoller: encoded a response of %d events that does not decode: %v", r.events, err))
	}
	return m
}

// newResponse puts head and events together; neighbours in memory become one buffer.
func newResponse(head []byte, events [][]byte) *Response {
	r := &Response{events: len(events), bufs: make([][]byte, 1, 2)}
	r.bufs[0] = head
	for _, e := range events {
		last := r.bufs[len(r.bufs)-1]
		if len(r.bufs) > 1 && follows(last, e) {
			r.bufs[len(r.bufs)-1] = last[:len(last)+len(e)]
			continue
		}
		r.bufs = append(r.bufs, e)
	}
	for i, b := range r.bufs {
		r.bufs[i] = b[:len(b):len(b)] // so that nobody can append into the neighbour
	}
	return r
}

// encodeHead encodes the fields of a WatchResponse that come before its events.
func encodeHead(h *pb.ResponseHeader, rev, id int64, fragment bool) []byte {
	hdr := make([]byte, 0, 40)
	for _, f := range [...]struct {
		num protowire.Number
		v   uint64
	}{
		{headerClusterID, h.GetClusterId()},
		{headerMemberID, h.GetMemberId()},
		{headerRevision, uint64(rev)},
		{headerRaftTerm, h.GetRaftTerm()},
	} {
		if f.v != 0 {
			hdr = protowire.AppendTag(hdr, f.num, protowire.VarintType)
			hdr = protowire.AppendVarint(hdr, f.v)
		}
	}
	b := make([]byte, 0, len(hdr)+16)
	b = protowire.AppendTag(b, watchResponseHeader, protowire.BytesType)
	b = protowire.AppendBytes(b, hdr)
	if id != 0 {
		b = protowire.AppendTag(b, watchResponseWatchID, protowire.VarintType)
		b = protowire.AppendVarint(b, uint64(id))
	}
	if fragment {
		b = protowire.AppendTag(b, watchResponseFragment, protowire.VarintType)
		b = protowire.AppendVarint(b, 1)
	}
	return b
}

// split divides the encoded events of one response of a watcher that asked for fragments: each part stays below
// limit bytes if it has more than one event, and all parts but the last say that more follow. The rule, down to the
// byte, is that of etcd's v3rpc.
func split(h *pb.ResponseHeader, rev, id int64, events [][]byte, limit int) []*Response {
	size := 0
	for _, e := range events {
		size += len(e)
	}
	head := encodeHead(h, rev, id, false)
	if len(events) < 2 || len(head)+size < limit {
		return []*Response{newResponse(head, events)}
	}
	var out []*Response
	more := encodeHead(h, rev, id, true)
	for len(events) > 0 {
		n, size := 1, len(more)+len(events[0])
		for n < len(events) && size+len(events[n]) < limit {
			size += len(events[n])
			n++
		}
		part := more
		if n == len(events) {
			part = head
		}
		out = append(out, newResponse(part, events[:n]))
		events = events[n:]
	}
	return out
}
