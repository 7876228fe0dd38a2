package differential

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/test/etcd/start"
)

var historiesFlag = flag.Int("histories", 8, "histories whose hashes are compared")

// TestSameHashKVAsEtcd plays random writes, compactions and restarts on etcd and on quire and compares HashKV at every
// revision: hash, revisions, errors. A failure is the name of its seed:
//
//	go test ./differential -run HashKV -args -seed=… -histories=1
//
// plays that history again; -processes=3 is three quires on one database.
//
// Both remember what the hash was when they compacted, until they are restarted: the revision of a compaction is compared
// where both do or neither does. On Postgres quire remembers nothing. And etcd counts rows that it is about to delete where no key exists, so every compaction is waited for.
func TestSameHashKVAsEtcd(t *testing.T) {
	seed := *seedFlag
	if seed == 0 {
		seed = rand.Uint64N(1 << 40)
	}
	for i := range uint64(*historiesFlag) {
		t.Run(fmt.Sprintf("seed=%d", seed+i), func(t *testing.T) {
			t.Parallel()
			h := hashHistory{t: t, g: newGenerator(seed + i)}
			h.play()
		})
	}
}

// hashHistory is one history.
type hashHistory struct {
	t       *testing.T
	g       *generator
	servers [2]*start.Server
	restart [2]func() *start.Server // nil: it cannot be restarted
	pair    *pair
	// remembered are the revisions that each has compacted at since it was started.
	remembered [2]map[int64]bool
	compared   int
}

func (h *hashHistory) play() {
	dir := h.t.TempDir()
	h.remembered = [2]map[int64]bool{{}, {}}
	h.restart[0] = func() *start.Server { return start.EtcdIn(h.t, filepath.Join(dir, "etcd"), start.Options{}) }
	if *processesFlag > 1 {
		h.servers[1] = start.Several(*processesFlag)(h.t, start.Options{})
	} else {
		h.restart[1] = func() *start.Server { return start.QuireIn(h.t, filepath.Join(dir, "quire"), start.Options{}) }
	}
	h.begin(0, 1)
	defer func() { h.pair.close() }()
	for range 8 {
		for range 5 + h.g.r.IntN(40) {
			h.write()
		}
		h.compare()
		for range h.g.r.IntN(3) {
			h.compact()
			h.compare()
		}
		switch h.g.r.IntN(3) {
		case 0:
			h.begin(0)
			h.compare()
		case 1:
			h.begin(1)
		}
	}
	h.begin(0, 1)
	h.compare()
	h.t.Logf("%d hashes compared, up to revision %d, compacted at %d", h.compared, h.pair.head, h.pair.compact)
}

// begin starts servers, again if they run.
func (h *hashHistory) begin(which ...int) {
	h.t.Helper()
	head, compact := int64(1), int64(-1)
	if h.pair != nil {
		head, compact = h.pair.head, h.pair.compact
		h.pair.close()
	}
	for _, i := range which {
		if h.restart[i] == nil {
			continue
		}
		if h.servers[i] != nil {
			h.servers[i].Stop(h.t)
		}
		h.servers[i] = h.restart[i]()
		h.remembered[i] = make(map[int64]bool)
	}
	p, err := newPair(h.servers[0], h.servers[1])
	if err != nil {
		h.t.Fatal(err)
	}
	p.head, p.seen, p.compact = head, head, compact
	h.pair = p
}

func (h *hashHistory) do(o operation) {
	h.t.Helper()
	if err := h.pair.play(o); err != nil {
		h.t.Fatalf("%s\n%v", o, err)
	}
}

// write is one random write.
func (h *hashHistory) write() {
	h.t.Helper()
	g := h.g
	g.head, g.compacted = h.pair.head, max(h.pair.compact, 0)
	switch n := g.r.IntN(100); {
	case n < 40:
		h.do(operation{kind: opPut, request: g.put()})
	case n < 55:
		h.do(operation{kind: opDelete, request: g.deleteRange()})
	case n < 62:
		h.do(operation{kind: opDelete, request: &pb.DeleteRangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}})
	case n < 85:
		h.do(operation{kind: opTxn, request: g.txn(0)})
	case n < 95:
		h.do(operation{kind: opGrant, request: g.grant()})
	default:
		h.do(operation{kind: opRevoke, request: &pb.LeaseRevokeRequest{ID: g.leaseID()}})
	}
}

// compact compacts somewhere, at the newest revision, or again where the store is compacted.
func (h *hashHistory) compact() {
	h.t.Helper()
	before := h.pair.compact
	head, was := h.pair.head, max(before, 0)
	rev := head
	if n := h.g.r.IntN(10); n == 0 {
		rev = was
	} else if n < 8 && head > was {
		rev = was + 1 + h.g.r.Int64N(head-was)
	}
	h.do(operation{kind: opCompact, request: &pb.CompactionRequest{Revision: rev, Physical: true}})
	if now := h.pair.compact; now > before {
		h.remembered[0][now] = true
		// An etcd remembers a compaction at 0 too, and gives that for the newest revision, as which 0 is asked for.
		if now > 0 && !start.OnPostgres(h.t) {
			h.remembered[1][now] = true
		}
	}
}

// compare compares the hashes of all revisions that can be asked for, and the answers for some others.
func (h *hashHistory) compare() {
	h.t.Helper()
	head, compact := h.pair.head, h.pair.compact
	ask := []int64{0, -1, head + 1, head + 1000, max(compact-1, 1), 1}
	for rev := max(compact, 1); rev <= head; rev++ {
		ask = append(ask, rev)
	}
	for _, rev := range ask {
		if h.remembered[0][rev] != h.remembered[1][rev] {
			continue
		}
		o := operation{kind: opHashKV, request: &pb.HashKVRequest{Revision: rev}}
		err := h.pair.play(o)
		var d *difference
		if errors.As(err, &d) {
			h.t.Fatalf("at revision %d, compacted at %d: %s\n%v", head, compact, o, d)
		}
		if err != nil {
			h.t.Fatal(err)
		}
		h.compared++
	}
}
