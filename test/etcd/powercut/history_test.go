//go:build linux

package powercut

import (
	"bytes"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"strings"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// outcome is what a client knows of a write that it has sent.
type outcome int

const (
	unknown      outcome = iota // no answer, or an error that leaves it open: it may have happened, once
	acknowledged                // it must be there, at write.rev
	refused                     // it must not be there
)

// write is one request that changes keys.
type write struct {
	id      string           // unique; every value that it puts begins with it
	client  string           // a client sends one after the other
	seq     int              // position among the writes of its client
	after   int64            // newest revision that anybody had been told of when it was sent
	guards  map[string]int64 // compares: mod_revision of keys, 0 is no such key
	steps   []step
	outcome outcome
	rev     int64 // of the answer, if acknowledged
}

func (w *write) String() string {
	return fmt.Sprintf("write %s (%s, revision %d)", w.id, [...]string{"without an answer", "acknowledged", "refused"}[w.outcome], w.rev)
}

// step puts a value, or deletes [key, end), or key if end is empty.
type step struct {
	del      bool
	key, end string
	size     int
	lease    int64
}

func (s step) covers(key string) bool {
	if s.end == "" {
		return key == s.key
	}
	return s.key <= key && key < s.end
}

// op is the step as a client sends it.
func (w *write) op(s step) clientv3.Op {
	if s.del {
		return clientv3.OpDelete(s.key, clientv3.WithRange(s.end))
	}
	return clientv3.OpPut(s.key, string(value(w.id, s.size)), clientv3.WithLease(clientv3.LeaseID(s.lease)))
}

// value is what a write puts: its id, a slash, and filling that follows from the id, so that torn bytes show.
func value(id string, size int) []byte {
	b := append([]byte(id), '/')
	h := fnv.New64a()
	h.Write(b)
	x := h.Sum64() | 1
	for range size {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b = append(b, byte(x))
	}
	return b
}

// writer is the id of the write that has put the value.
func writer(value []byte) string {
	id, _, _ := bytes.Cut(value, []byte("/"))
	return string(id)
}

// history is what a store must hold at revision rev: it is told what clients sent, and replays what the store says has
// happened.
//
// If replay returns no error:
//  1. revisions follow each other without gap or repeat;
//  2. each acknowledged write is there, whole, at its revision, with the versions it must have; its compares held;
//  3. each event belongs to one write that was sent and not refused, once, or to a lease that was due or revoked;
//  4. the writes of a client are in its order, and after all that anybody had been told of before they were sent.
type history struct {
	rev  int64
	keys map[string]*mvccpb.KeyValue

	open    map[string]*write // sent and not refused, not yet found, by id
	byRev   map[int64]*write  // the acknowledged ones of them
	lastSeq map[string]int    // of each client, the newest that was found

	found, happened, never int // acknowledged writes found; writes without an answer that happened, and that did not
}

func newHistory() *history {
	return &history{
		rev: 1, keys: make(map[string]*mvccpb.KeyValue),
		open: make(map[string]*write), byRev: make(map[int64]*write), lastSeq: make(map[string]int),
	}
}

// sent tells of a write whose outcome is settled.
func (h *history) sent(w *write) error {
	if w.outcome == refused {
		return nil
	}
	h.open[w.id] = w
	if w.outcome != acknowledged {
		return nil
	}
	if w.rev <= h.rev {
		return fmt.Errorf("%s: the history has been at revision %d without it", w, h.rev)
	}
	if other := h.byRev[w.rev]; other != nil {
		return fmt.Errorf("%s and %s have the same revision", w, other)
	}
	h.byRev[w.rev] = w
	return nil
}

// replay goes on with the events after h.rev, up to and with revision `to`. mayEnd says why a lease cannot have ended.
func (h *history) replay(events []*clientv3.Event, to int64, mayEnd func(lease int64) error) error {
	for len(events) > 0 {
		rev, n := events[0].Kv.ModRevision, 1
		for n < len(events) && events[n].Kv.ModRevision == rev {
			n++
		}
		if rev != h.rev+1 {
			return fmt.Errorf("revision %d comes after %d: there is a gap or a repeat", rev, h.rev)
		}
		if err := h.apply(rev, events[:n], mayEnd); err != nil {
			return fmt.Errorf("revision %d: %w", rev, err)
		}
		h.rev, events = rev, events[n:]
	}
	if h.rev != to {
		return fmt.Errorf("the store is at revision %d, its history ends at %d", to, h.rev)
	}
	for _, rev := range slices.Sorted(maps.Keys(h.byRev)) {
		return fmt.Errorf("acknowledged write lost: %s is not in the history up to revision %d", h.byRev[rev], to)
	}
	return nil
}

// settle declares that what has not happened yet never will. REQUIRES: replay.
func (h *history) settle() {
	h.never += len(h.open)
	clear(h.open)
}

func (h *history) apply(rev int64, events []*clientv3.Event, mayEnd func(int64) error) error {
	w := h.byRev[rev]
	if w == nil {
		w = h.unanswered(rev, events)
	}
	if w == nil {
		return h.applyLease(rev, events, mayEnd)
	}
	for _, key := range slices.Sorted(maps.Keys(w.guards)) {
		if got := h.keys[key].GetModRevision(); got != w.guards[key] {
			return fmt.Errorf("%s has compared mod_revision(%q) with %d and won, but it was %d", w, key, w.guards[key], got)
		}
	}
	switch {
	case rev <= w.after:
		return fmt.Errorf("%s was sent after somebody had been told of revision %d", w, w.after)
	case w.seq <= h.lastSeq[w.client]:
		return fmt.Errorf("%s comes after number %d of its client", w, h.lastSeq[w.client])
	}
	if err := h.take(h.effects(w, rev), events); err != nil {
		return fmt.Errorf("%s: %w", w, err)
	}
	h.lastSeq[w.client] = w.seq
	delete(h.open, w.id)
	delete(h.byRev, rev)
	if w.outcome == acknowledged {
		h.found++
	} else {
		h.happened++
	}
	return nil
}

// unanswered finds the write without an answer that made these events.
func (h *history) unanswered(rev int64, events []*clientv3.Event) *write {
	for _, e := range events {
		if e.Type == mvccpb.PUT {
			if w := h.open[writer(e.Kv.Value)]; w != nil && w.outcome == unknown {
				return w
			}
			return nil
		}
	}
	// Deletes bear no id: any that has this effect will do.
	for _, id := range slices.Sorted(maps.Keys(h.open)) {
		if w := h.open[id]; w.outcome == unknown && sameEvents(h.effects(w, rev), events) == nil {
			return w
		}
	}
	return nil
}

// effects are the events of a write in the present state.
func (h *history) effects(w *write, rev int64) (out []*clientv3.Event) {
	for _, s := range w.steps {
		if s.del {
			for _, key := range h.sorted(func(kv *mvccpb.KeyValue) bool { return s.covers(string(kv.Key)) }) {
				out = append(out, h.gone(key, rev))
			}
			continue
		}
		kv := &mvccpb.KeyValue{
			Key: []byte(s.key), Value: value(w.id, s.size), CreateRevision: rev, ModRevision: rev, Version: 1, Lease: s.lease,
		}
		old := h.keys[s.key]
		if old != nil {
			kv.CreateRevision, kv.Version = old.CreateRevision, old.Version+1
		}
		out = append(out, &clientv3.Event{Type: mvccpb.PUT, Kv: kv, PrevKv: old})
	}
	return out
}

func (h *history) gone(key string, rev int64) *clientv3.Event {
	return &clientv3.Event{Type: mvccpb.DELETE, Kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: rev}, PrevKv: h.keys[key]}
}

// applyLease takes a revision that nobody wrote: the end of a lease deletes all its keys.
func (h *history) applyLease(rev int64, events []*clientv3.Event, mayEnd func(int64) error) error {
	first := events[0]
	old := h.keys[string(first.Kv.Key)]
	if first.Type == mvccpb.PUT || old.GetLease() == 0 {
		return fmt.Errorf("%s: nobody has sent that, or it was refused, or it is there twice", show(first))
	}
	if err := mayEnd(old.Lease); err != nil {
		return fmt.Errorf("%s: nobody has sent that, and %w", show(first), err)
	}
	var want []*clientv3.Event
	for _, key := range h.sorted(func(kv *mvccpb.KeyValue) bool { return kv.Lease == old.Lease }) {
		want = append(want, h.gone(key, rev))
	}
	if err := h.take(want, events); err != nil {
		return fmt.Errorf("the end of lease %d: %w", old.Lease, err)
	}
	return nil
}

// take compares the events of a revision with those that there must be, and changes the state.
func (h *history) take(want, got []*clientv3.Event) error {
	if err := sameEvents(want, got); err != nil {
		return err
	}
	for _, e := range got {
		if e.Type == mvccpb.PUT {
			h.keys[string(e.Kv.Key)] = e.Kv
		} else {
			delete(h.keys, string(e.Kv.Key))
		}
	}
	return nil
}

func (h *history) sorted(which func(*mvccpb.KeyValue) bool) (keys []string) {
	for key, kv := range h.keys {
		if which(kv) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

// compare says how the answer to a read of all keys differs from the history.
func (h *history) compare(kvs []*mvccpb.KeyValue) error {
	seen := make(map[string]bool)
	for _, kv := range kvs {
		seen[string(kv.Key)] = true
		if want := h.keys[string(kv.Key)]; !sameKV(kv, want) {
			return fmt.Errorf("key %q: the store has %s, its history leads to %s", kv.Key, showKV(kv), showKV(want))
		}
	}
	for _, key := range h.sorted(func(kv *mvccpb.KeyValue) bool { return !seen[string(kv.Key)] }) {
		return fmt.Errorf("key %q: the store has none, its history leads to %s", key, showKV(h.keys[key]))
	}
	return nil
}

func sameEvents(want, got []*clientv3.Event) error {
	for i := range max(len(want), len(got)) {
		switch {
		case i >= len(got):
			return fmt.Errorf("it is not whole, there is no %s", show(want[i]))
		case i >= len(want):
			return fmt.Errorf("it has too much: %s", show(got[i]))
		case want[i].Type != got[i].Type || !sameKV(want[i].Kv, got[i].Kv):
			return fmt.Errorf("got %s, want %s", show(got[i]), show(want[i]))
		case !sameKV(want[i].PrevKv, got[i].PrevKv):
			return fmt.Errorf("%s: before it the key was %s, must have been %s", show(got[i]), showKV(got[i].PrevKv), showKV(want[i].PrevKv))
		}
	}
	return nil
}

func sameKV(a, b *mvccpb.KeyValue) bool {
	if a == nil || b == nil {
		return a == b
	}
	return bytes.Equal(a.Key, b.Key) && bytes.Equal(a.Value, b.Value) && a.CreateRevision == b.CreateRevision &&
		a.ModRevision == b.ModRevision && a.Version == b.Version && a.Lease == b.Lease
}

func show(e *clientv3.Event) string {
	return fmt.Sprintf("%s %q as %s", strings.ToLower(e.Type.String()), e.Kv.Key, showKV(e.Kv))
}

func showKV(kv *mvccpb.KeyValue) string {
	if kv == nil {
		return "absent"
	}
	return fmt.Sprintf("[write %q, %d bytes, revision %d, created %d, version %d, lease %d]",
		writer(kv.Value), len(kv.Value), kv.ModRevision, kv.CreateRevision, kv.Version, kv.Lease)
}
