package crash

import (
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
)

// story is a sound history of six revisions, with the writes that made it. Lease 7 is short and due.
func story() ([]event, []*write, *leaseBook) {
	leases := newLeaseBook()
	at := time.Now()
	leases.update(7, func(l *lease) { l.ttl, l.sent = shortTTL, at.Add(-time.Minute) })
	put := func(rev int64, w *write, s step, create, version int64, prev *mvccpb.KeyValue) event {
		kv := &mvccpb.KeyValue{
			Key: []byte(s.key), Value: value(w.id, s.size), CreateRevision: create, ModRevision: rev, Version: version, Lease: s.lease,
		}
		return event{rev: rev, key: s.key, kv: kv, prev: prev, at: at}
	}
	gone := func(rev int64, prev *mvccpb.KeyValue) event {
		e := tombstone(string(prev.Key), rev)
		e.prev, e.at = prev, at
		return e
	}
	a := &write{id: "a-1", client: "a", seq: 1, after: 1, outcome: acknowledged, rev: 2, steps: []step{{key: "a/1", size: 5}}}
	b := &write{id: "b-1", client: "b", seq: 1, after: 2, outcome: acknowledged, rev: 3, guard: []guard{{key: "a/1", rev: 2}},
		steps: []step{{key: "a/1", size: 1}, {key: "b/2"}}}
	c := &write{id: "b-2", client: "b", seq: 2, after: 3, outcome: unknown, steps: []step{{key: "c", lease: 7}}}
	d := &write{id: "a-2", client: "a", seq: 2, after: 3, outcome: acknowledged, rev: 5, steps: []step{{del: true, key: "a/1", end: "b/3"}}}
	never := &write{id: "a-3", client: "a", seq: 3, after: 3, outcome: unknown, steps: []step{{key: "x"}}}

	e2 := put(2, a, a.steps[0], 2, 1, nil)
	e3a := put(3, b, b.steps[0], 2, 2, e2.kv)
	e3b := put(3, b, b.steps[1], 3, 1, nil)
	e4 := put(4, c, c.steps[0], 4, 1, nil)
	return []event{e2, e3a, e3b, e4, gone(5, e3a.kv), gone(5, e3b.kv), gone(6, e4.kv)}, []*write{a, b, c, d, never}, leases
}

// judge replays a history up to revision 6.
func judge(events []event, writes []*write, leases *leaseBook, checks ...check) error {
	m := newModel(leases)
	for _, w := range writes {
		if err := m.sent(w); err != nil {
			return err
		}
	}
	m.checks = checks
	return m.replay(events, 6)
}

func TestModelAcceptsASoundHistory(t *testing.T) {
	events, writes, leases := story()
	if err := judge(events, writes, leases); err != nil {
		t.Fatal(err)
	}
}

// TestModelFindsWhatIsWrong bends the sound history and expects the finding.
func TestModelFindsWhatIsWrong(t *testing.T) {
	for _, tc := range []struct {
		name string
		bend func(events []event, writes []*write, leases *leaseBook) ([]event, []*write)
		want string
	}{
		{"a revision is missing", func(e []event, w []*write, _ *leaseBook) ([]event, []*write) { return slices.Delete(e, 3, 4), w }, "lost or repeated"},
		{"a revision comes twice", func(e []event, w []*write, _ *leaseBook) ([]event, []*write) { return slices.Insert(e, 1, e[0]), w }, "not whole|too much"},
		{"the newest revision is missing", func(e []event, w []*write, _ *leaseBook) ([]event, []*write) { return e[:6], w }, "history ends at 5"},
		{"half a Txn", func(e []event, w []*write, _ *leaseBook) ([]event, []*write) { return slices.Delete(e, 2, 3), w }, "not whole"},
		{"another write at an acknowledged revision", func(e []event, w []*write, _ *leaseBook) ([]event, []*write) {
			w[0].id = "a-9"
			return e, w
		}, "belongs to"},
		{"an acknowledged write is nowhere", func(e []event, w []*write, _ *leaseBook) ([]event, []*write) {
			w[4].outcome, w[4].rev = acknowledged, 7
			return e, w
		}, "acknowledged write lost"},
		{"a refused write happened", func(e []event, w []*write, _ *leaseBook) ([]event, []*write) {
			w[2].outcome = refused
			return e, w
		}, "no client has sent that"},
		{"a guard that did not hold", func(e []event, w []*write, _ *leaseBook) ([]event, []*write) {
			w[1].guard[0].rev = 0
			return e, w
		}, "and won"},
		{"a write before what was acknowledged", func(e []event, w []*write, _ *leaseBook) ([]event, []*write) {
			w[2].after = 4
			return e, w
		}, "acknowledged before it was sent"},
		{"writes of one client out of order", func(e []event, w []*write, _ *leaseBook) ([]event, []*write) {
			w[2].seq = 0
			return e, w
		}, "same client"},
		{"a wrong version", func(e []event, w []*write, _ *leaseBook) ([]event, []*write) {
			e[3].kv.Version = 2
			return e, w
		}, "expected PUT"},
		{"a wrong prev_kv", func(e []event, w []*write, _ *leaseBook) ([]event, []*write) {
			e[4].prev = nil
			return e, w
		}, "prev_kv"},
		{"a range delete that forgot a key", func(e []event, w []*write, _ *leaseBook) ([]event, []*write) { return slices.Delete(e, 5, 6), w }, "not whole"},
		{"a lease that ends early", func(e []event, w []*write, l *leaseBook) ([]event, []*write) {
			l.update(7, func(l *lease) { l.sent = time.Now().Add(-time.Second) })
			return e, w
		}, "ended after"},
		{"a delete by nobody", func(e []event, w []*write, _ *leaseBook) ([]event, []*write) {
			w[3].outcome, w[3].steps[0].key = unknown, "b/9"
			return e, w
		}, "no client deleted that"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			events, writes, leases := story()
			events, writes = tc.bend(events, writes, leases)
			err := judge(events, writes, leases)
			if err == nil {
				t.Fatal("the model found nothing")
			}
			for part := range strings.SplitSeq(tc.want, "|") {
				if strings.Contains(err.Error(), part) {
					return
				}
			}
			t.Fatalf("found %q, expected %q", err, tc.want)
		})
	}
}

func TestModelChecksReadsAtTheirRevision(t *testing.T) {
	events, writes, leases := story()
	seen := int64(0)
	ok := check{rev: 4, what: func(m *model) error { seen = m.modRev("a/1"); return nil }}
	if err := judge(events, writes, leases, ok); err != nil || seen != 3 {
		t.Fatalf("a check at revision 4 saw a/1 at %d, error %v; it is at 3 there", seen, err)
	}
	future := check{rev: 9, what: func(*model) error { return nil }}
	events, writes, leases = story()
	if err := judge(events, writes, leases, future); err == nil {
		t.Fatal("an answer at a revision that is gone was not found")
	}
}

func TestLeaseBookFindsWhatIsWrong(t *testing.T) {
	for _, tc := range []struct {
		name   string
		lease  lease
		listed bool
		want   string // "" if it is sound
	}{
		{"a granted long lease is listed", lease{ttl: longTTL, granted: acknowledged}, true, ""},
		{"a granted long lease is not listed", lease{ttl: longTTL, granted: acknowledged}, false, "lost"},
		{"a grant without an answer is not listed", lease{ttl: longTTL}, false, ""},
		{"a revoked lease is not listed", lease{ttl: longTTL, granted: acknowledged, revoked: true, revoke: acknowledged}, false, ""},
		{"a revoked lease is listed", lease{ttl: longTTL, granted: acknowledged, revoked: true, revoke: acknowledged}, true, "back"},
		{"a revoke without an answer", lease{ttl: longTTL, granted: acknowledged, revoked: true}, false, ""},
		{"a due lease is not listed", lease{ttl: shortTTL, sent: time.Now().Add(-time.Hour), granted: acknowledged}, false, ""},
		{"a short lease is lost before its time", lease{ttl: shortTTL, sent: time.Now(), granted: acknowledged}, false, "lost"},
		{"a lease that was gone is listed", lease{ttl: shortTTL, gone: true}, true, "back"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newLeaseBook()
			b.update(1, func(l *lease) { *l = tc.lease; l.id = 1 })
			_, err := b.verify(map[int64]bool{1: tc.listed})
			if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, expected %q", err, tc.want)
			}
		})
	}
	if _, err := newLeaseBook().verify(map[int64]bool{5: true}); err == nil {
		t.Fatal("a lease that nobody asked for was not found")
	}
}
