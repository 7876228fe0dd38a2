// Package model says what a watcher must see, worked out from the plain list of everything that happened.
// It is deliberately dumb: no groups, no batches, no catching up.
package model

import (
	"bytes"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// History is every event of a store in revision order, each with its previous key-value pair.
type History struct {
	Events []*mvccpb.Event
}

// Watcher walks a History and picks what one watch request asked for.
type Watcher struct {
	Request *pb.WatchCreateRequest
	// From is the first revision to deliver.
	From int64
	// Compacted was the compaction revision when the watcher was made: a previous pair from before it is
	// gone, so the event at exactly that revision comes without one.
	Compacted int64

	next int // first event of the History not looked at
}

// Next returns the events of h that w must see and has not been told of.
func (w *Watcher) Next(h *History) []*mvccpb.Event {
	var out []*mvccpb.Event
	for ; w.next < len(h.Events); w.next++ {
		e := h.Events[w.next]
		if e.Kv.ModRevision < w.From || !Contains(w.Request.Key, w.Request.RangeEnd, e.Kv.Key) || w.filtered(e) {
			continue
		}
		if e.PrevKv != nil && (!w.Request.PrevKv || e.Kv.ModRevision <= w.Compacted) {
			e = &mvccpb.Event{Type: e.Type, Kv: e.Kv}
		}
		out = append(out, e)
	}
	return out
}

func (w *Watcher) filtered(e *mvccpb.Event) bool {
	for _, f := range w.Request.Filters {
		if f == pb.WatchCreateRequest_NOPUT && e.Type == mvccpb.Event_PUT ||
			f == pb.WatchCreateRequest_NODELETE && e.Type == mvccpb.Event_DELETE {
			return true
		}
	}
	return false
}

// Contains tells whether key lies in [from, end) by the conventions of RangeRequest: no end is the one
// key, the end "\x00" is everything from the key on. A watch without key starts at the smallest one.
func Contains(from, end, key []byte) bool {
	if len(from) == 0 {
		from = []byte{0}
	}
	switch {
	case len(end) == 0:
		return bytes.Equal(key, from)
	case len(end) == 1 && end[0] == 0:
		return bytes.Compare(key, from) >= 0
	default:
		return bytes.Compare(key, from) >= 0 && bytes.Compare(key, end) < 0
	}
}
