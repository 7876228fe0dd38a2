package crash

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
)

// event is one event as a watcher received it.
type event struct {
	rev  int64
	key  string
	del  bool
	kv   *mvccpb.KeyValue
	prev *mvccpb.KeyValue // if the watcher asked for it
	at   time.Time        // when it arrived
}

func newEvent(e *mvccpb.Event, at time.Time) event {
	return event{rev: e.Kv.ModRevision, key: string(e.Kv.Key), del: e.Type == mvccpb.DELETE, kv: e.Kv, prev: e.PrevKv, at: at}
}

// same says whether two watchers received the same event; prev is not compared, as not every watcher asks for it.
func (e event) same(o event) bool {
	return e.rev == o.rev && e.key == o.key && e.del == o.del && sameKV(e.kv, o.kv)
}

func (e event) String() string {
	kind := "PUT"
	if e.del {
		kind = "DELETE"
	}
	return fmt.Sprintf("%s %q at revision %d (of write %q)", kind, e.key, e.rev, writeID(e.kv.Value))
}

func sameKV(a, b *mvccpb.KeyValue) bool {
	if a == nil || b == nil {
		return a == b
	}
	return bytes.Equal(a.Key, b.Key) && bytes.Equal(a.Value, b.Value) && a.CreateRevision == b.CreateRevision &&
		a.ModRevision == b.ModRevision && a.Version == b.Version && a.Lease == b.Lease
}

// model is what the store must hold at revision rev: a small etcd that is told the history and checks each
// revision of it against what the clients know.
//
// Guarantees, if replay never returned an error:
//  1. The revisions follow each other without gap or repeat.
//  2. Each acknowledged write is there, whole, at its revision, and did what it had to do in that state.
//  3. Each event belongs to exactly one write that was sent, or to a lease that was due or revoked.
//  4. Writes of one client are in the order in which they were sent; a write comes after all that was
//     acknowledged to anyone before it was sent.
type model struct {
	rev  int64
	keys map[string]*mvccpb.KeyValue

	writes  map[string]*write // sent and not yet found in the history, by id
	byRev   map[int64]*write  // the acknowledged ones of them, by revision
	lastSeq map[string]int    // of each client: seq of its newest write in the history
	checks  []check           // sorted by revision when replay runs
	leases  *leaseBook

	applied, lost int // writes without an answer that turned out to have happened, and not to
}

// check is something that must hold in the state at a revision.
type check struct {
	rev  int64
	what func(m *model) error
}

func newModel(leases *leaseBook) *model {
	return &model{
		rev:     1, // an empty store
		keys:    map[string]*mvccpb.KeyValue{},
		writes:  map[string]*write{},
		byRev:   map[int64]*write{},
		lastSeq: map[string]int{},
		leases:  leases,
	}
}

// sent tells the model of a write whose outcome is settled (unknown counts).
func (m *model) sent(w *write) error {
	if w.outcome == refused {
		return nil
	}
	if other := m.byRev[w.rev]; w.outcome == acknowledged && other != nil {
		return fmt.Errorf("%s and %s were acknowledged with the same revision", w, other)
	}
	m.writes[w.id] = w
	if w.outcome == acknowledged {
		if w.rev <= m.rev {
			return fmt.Errorf("%s was acknowledged, but revision %d was already in the history without it", w, w.rev)
		}
		m.byRev[w.rev] = w
	}
	return nil
}

// replay goes on with the events of the revisions after m.rev up to and with rev `to`, oldest first, runs the checks of those
// revisions, and says what is wrong. Afterwards no sent write is open: those without an answer that were not
// found will never be.
func (m *model) replay(events []event, to int64) error {
	slices.SortStableFunc(m.checks, func(a, b check) int { return cmp.Compare(a.rev, b.rev) })
	if err := m.runChecks(); err != nil {
		return err
	}
	for len(events) > 0 {
		rev := events[0].rev
		n := 1
		for n < len(events) && events[n].rev == rev {
			n++
		}
		if rev != m.rev+1 {
			return fmt.Errorf("the watch went from revision %d to %d: events were lost or repeated", m.rev, rev)
		}
		if err := m.apply(rev, events[:n]); err != nil {
			return fmt.Errorf("revision %d: %w", rev, err)
		}
		m.rev = rev
		if err := m.runChecks(); err != nil {
			return err
		}
		events = events[n:]
	}
	if m.rev != to {
		return fmt.Errorf("the store is at revision %d, its watch history ends at %d", to, m.rev)
	}
	for _, w := range m.writes {
		if w.outcome == acknowledged {
			return fmt.Errorf("acknowledged write lost: %s is not in the history up to revision %d", w, m.rev)
		}
		m.lost++
	}
	clear(m.writes)
	if len(m.checks) > 0 {
		return fmt.Errorf("a client was answered at revision %d, the store is only at %d", m.checks[0].rev, m.rev)
	}
	return nil
}

func (m *model) runChecks() error {
	for len(m.checks) > 0 && m.checks[0].rev <= m.rev {
		c := m.checks[0]
		m.checks = m.checks[1:]
		if c.rev < m.rev {
			return fmt.Errorf("a client was answered at revision %d after %d had been served", c.rev, m.rev)
		}
		if err := c.what(m); err != nil {
			return fmt.Errorf("state at revision %d: %w", m.rev, err)
		}
	}
	return nil
}

// apply checks one revision and takes over what it changed.
func (m *model) apply(rev int64, events []event) error {
	w := m.byRev[rev]
	if w == nil {
		w = m.unanswered(events)
	}
	if w == nil {
		return m.applyLease(rev, events)
	}
	for _, e := range events {
		if id := writeID(e.kv.Value); !e.del && id != w.id {
			return fmt.Errorf("%s belongs to %s, yet holds %s", "the revision", w, e)
		}
	}
	if w.outcome == unknown {
		m.applied++
	}
	delete(m.writes, w.id)
	delete(m.byRev, rev)

	if rev <= w.after {
		return fmt.Errorf("%s is older than revision %d, which had been acknowledged before it was sent", w, w.after)
	}
	if last, ok := m.lastSeq[w.client]; ok && w.seq <= last {
		return fmt.Errorf("%s (number %d) comes after number %d of the same client", w, w.seq, last)
	}
	m.lastSeq[w.client] = w.seq
	for _, g := range w.guard {
		if got := m.modRev(g.key); got != g.rev {
			return fmt.Errorf("%s compared mod_revision(%q) with %d and won, but it was %d", w, g.key, g.rev, got)
		}
	}
	if w.prev != nil && m.modRev(w.steps[0].key) != w.prev.rev {
		return fmt.Errorf("%s was told that the key's last revision was %d, but it was %d", w, w.prev.rev, m.modRev(w.steps[0].key))
	}
	rest := events
	for _, s := range w.steps {
		for _, want := range m.effects(w, s, rev) {
			if len(rest) == 0 {
				return fmt.Errorf("%s is not whole: %s is missing", w, want)
			}
			if err := m.take(want, rest[0]); err != nil {
				return fmt.Errorf("%s: %w", w, err)
			}
			rest = rest[1:]
		}
	}
	if len(rest) > 0 {
		return fmt.Errorf("%s has too much: %s", w, rest[0])
	}
	return nil
}

// unanswered finds the write without an answer that made these events: by the id in a value, or, for deletes
// only, the one that would have deleted exactly such keys.
func (m *model) unanswered(events []event) *write {
	for _, e := range events {
		if !e.del {
			return m.writes[writeID(e.kv.Value)]
		}
	}
	for _, w := range m.writes {
		if w.outcome != unknown || slices.ContainsFunc(w.steps, func(s step) bool { return !s.del }) {
			continue
		}
		if slices.ContainsFunc(w.steps, func(s step) bool { return s.covers(events[0].key) }) {
			return w
		}
	}
	return nil
}

// effects are the events that a step must cause in the present state.
func (m *model) effects(w *write, s step, rev int64) []event {
	if !s.del {
		kv := &mvccpb.KeyValue{
			Key: []byte(s.key), Value: value(w.id, s.size), CreateRevision: rev, ModRevision: rev, Version: 1, Lease: s.lease,
		}
		if old := m.keys[s.key]; old != nil {
			kv.CreateRevision, kv.Version = old.CreateRevision, old.Version+1
		}
		return []event{{rev: rev, key: s.key, kv: kv}}
	}
	var out []event
	for _, key := range m.sorted(func(kv *mvccpb.KeyValue) bool { return s.covers(string(kv.Key)) }) {
		out = append(out, tombstone(key, rev))
	}
	return out
}

// applyLease takes a revision that no client wrote: all keys of one lease are deleted, in their order.
func (m *model) applyLease(rev int64, events []event) error {
	first := events[0]
	if !first.del {
		return fmt.Errorf("%s: no client has sent that, or it is there twice", first)
	}
	old := m.keys[first.key]
	if old == nil {
		return fmt.Errorf("%s: there was no such key", first)
	}
	if err := m.leases.mayEnd(old.Lease, first.at); err != nil {
		return fmt.Errorf("%s: no client deleted that: %w", first, err)
	}
	keys := m.sorted(func(kv *mvccpb.KeyValue) bool { return kv.Lease == old.Lease })
	if len(keys) != len(events) {
		return fmt.Errorf("lease %d had %d keys, its end deleted %d", old.Lease, len(keys), len(events))
	}
	for i, key := range keys {
		if err := m.take(tombstone(key, rev), events[i]); err != nil {
			return fmt.Errorf("end of lease %d: %w", old.Lease, err)
		}
	}
	return nil
}

// take compares an event with the one that had to come and changes the state.
func (m *model) take(want, got event) error {
	if !want.same(got) {
		return fmt.Errorf("expected %s, version %d, created %d, lease %d; got %s, version %d, created %d, lease %d",
			want, want.kv.Version, want.kv.CreateRevision, want.kv.Lease, got, got.kv.Version, got.kv.CreateRevision, got.kv.Lease)
	}
	if old := m.keys[want.key]; !sameKV(got.prev, old) {
		return fmt.Errorf("%s: its prev_kv is not the key's state before", got)
	}
	if got.del {
		delete(m.keys, got.key)
	} else {
		m.keys[got.key] = got.kv
	}
	return nil
}

// compare says how the answer of a Range over all keys differs from the model.
func (m *model) compare(kvs []*mvccpb.KeyValue) error {
	if len(kvs) != len(m.keys) {
		return fmt.Errorf("the store has %d keys, its watch history leads to %d", len(kvs), len(m.keys))
	}
	for _, kv := range kvs {
		if want := m.keys[string(kv.Key)]; !sameKV(kv, want) {
			return fmt.Errorf("key %q: the store has mod_revision %d (write %q), its watch history leads to mod_revision %d",
				kv.Key, kv.ModRevision, writeID(kv.Value), want.GetModRevision())
		}
	}
	return nil
}

// clone is the present state alone, to be compared later.
func (m *model) clone() *model {
	keys := make(map[string]*mvccpb.KeyValue, len(m.keys))
	for k, kv := range m.keys {
		keys[k] = kv
	}
	return &model{rev: m.rev, keys: keys}
}

func (m *model) modRev(key string) int64 {
	if kv := m.keys[key]; kv != nil {
		return kv.ModRevision
	}
	return 0
}

func (m *model) sorted(which func(*mvccpb.KeyValue) bool) []string {
	var keys []string
	for key, kv := range m.keys {
		if which(kv) {
			keys = append(keys, key)
		}
	}
	slices.SortFunc(keys, strings.Compare)
	return keys
}

func tombstone(key string, rev int64) event {
	return event{rev: rev, key: key, del: true, kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: rev}}
}
