package differential

import (
	"fmt"
	"math/rand/v2"
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/test/etcd/model"
)

// keys is small, so that operations meet. It holds what sorts or ends awkwardly: NUL at the end, 0xff
// (a prefix without an end), keys that are prefixes of others, the smallest key.
var keys = []string{
	"a", "a\x00", "a\x00\x00", "a\xff", "aa", "ab", "abc", "b", "b/", "b/1", "b/2", "b/2/x", "c", "\x00", "\xff", "\xff\xff", "é", "z",
}

var values = []string{"", "", "0", "1", "2", "x", "\x00", "a longer value that a column may treat otherwise than a short one", "\xff\xfe not text"}

// leaseIDs are chosen by the client, so that both servers have the same. 99 is rarely granted.
var leaseIDs = []int64{1, 2, 3, 4, 5, 1 << 40, -7}

// Long enough that nothing expires during a run; far enough apart that the order by expiry is certain.
var leaseTTLs = []int64{100_000, 200_000, 3_000_000, 9_000_000_000}

const streams = 3

// generator makes random operations. Given the same seed and the same answers it makes the same ones.
type generator struct {
	r *rand.Rand
	// The state of the store as known from the answers.
	base, head, compacted int64
	watches               [streams]map[int64]bool // open watch ids
}

func newGenerator(seed uint64) *generator {
	g := &generator{r: rand.New(rand.NewPCG(seed, 0))}
	for i := range g.watches {
		g.watches[i] = make(map[int64]bool)
	}
	return g
}

func (g *generator) chance(percent float64) bool { return g.r.Float64()*100 < percent }

func pick[T any](g *generator, from []T) T { return from[g.r.IntN(len(from))] }

func (g *generator) next() operation {
	type choice struct {
		weight int
		make   func() operation
	}
	choices := []choice{
		{250, func() operation { return operation{kind: opPut, request: g.put()} }},
		{250, func() operation { return operation{kind: opRange, request: g.rangeRequest()} }},
		{20, func() operation { return operation{kind: opRangeStream, request: g.rangeStream()} }},
		{70, func() operation { return operation{kind: opDelete, request: g.deleteRange()} }},
		{220, func() operation { return operation{kind: opTxn, request: g.txn(0)} }},
		{8, func() operation { return operation{kind: opCompact, request: g.compact()} }},
		{24, func() operation { return operation{kind: opGrant, request: g.grant()} }},
		{12, func() operation { return operation{kind: opRevoke, request: &pb.LeaseRevokeRequest{ID: g.leaseID()}} }},
		{24, func() operation {
			return operation{kind: opKeepAlive, request: &pb.LeaseKeepAliveRequest{ID: g.leaseID()}}
		}},
		{24, func() operation {
			return operation{kind: opTimeToLive, request: &pb.LeaseTimeToLiveRequest{ID: g.leaseID(), Keys: g.chance(70)}}
		}},
		{8, func() operation { return operation{kind: opLeases, request: &pb.LeaseLeasesRequest{}} }},
		{30, g.watch},
		{22, g.cancel},
		{10, func() operation {
			return operation{kind: opProgress, request: &pb.WatchProgressRequest{}, stream: g.r.IntN(streams)}
		}},
		{2, func() operation { return operation{kind: opClose, stream: g.r.IntN(streams)} }},
	}
	total := 0
	for _, c := range choices {
		total += c.weight
	}
	n := g.r.IntN(total)
	for _, c := range choices {
		if n -= c.weight; n < 0 {
			return c.make()
		}
	}
	panic("unreachable: the weights add up to total")
}

func (g *generator) key() []byte {
	if g.chance(0.5) {
		return nil
	}
	return []byte(pick(g, keys))
}

// span is a key and a range end: one key, a prefix, from a key on, everything, any two keys (often
// inverted), the same key twice.
func (g *generator) span() (key, end []byte) {
	key = g.key()
	switch g.r.IntN(12) {
	case 0, 1, 2, 3:
		return key, nil
	case 4:
		return key, []byte{0}
	case 5, 6:
		return []byte{0}, []byte{0}
	case 7, 8:
		return key, prefixEnd(key)
	case 9:
		return key, append(append([]byte{}, key...), 0)
	case 10:
		return key, key
	default:
		return key, []byte(pick(g, keys))
	}
}

// prefixEnd is the end of the range of all keys that begin with key, as etcd's client works it out.
func prefixEnd(key []byte) []byte {
	end := append([]byte{}, key...)
	for i := len(end) - 1; i >= 0; i-- {
		if end[i] < 0xff {
			end[i]++
			return end[:i+1]
		}
	}
	return []byte{0}
}

// revision is mostly one that can be read, sometimes compacted, future or senseless.
func (g *generator) revision() int64 {
	switch g.r.IntN(16) {
	case 0:
		return g.head + 1
	case 1:
		return g.head + 1 + g.r.Int64N(1000)
	case 2:
		return -1 - g.r.Int64N(3)
	case 3:
		return g.compacted
	case 4:
		return max(g.compacted-1, 1)
	case 5:
		return g.compacted + 1
	case 6, 7:
		return g.head
	default:
		return g.head - g.r.Int64N(max(min(g.head-g.compacted, 60), 1))
	}
}

// near is a revision that keys are likely to have: for filters and compares.
func (g *generator) near() int64 {
	return max(g.head-g.r.Int64N(40)+2, 1)
}

func (g *generator) leaseID() int64 {
	if g.chance(4) {
		return 99
	}
	return pick(g, leaseIDs)
}

func (g *generator) grant() *pb.LeaseGrantRequest {
	ttl := pick(g, leaseTTLs)
	if g.chance(5) {
		ttl = 9_000_000_001
	}
	return &pb.LeaseGrantRequest{ID: g.leaseID(), TTL: ttl}
}

func (g *generator) put() *pb.PutRequest {
	r := &pb.PutRequest{Key: g.key(), Value: []byte(pick(g, values)), PrevKv: g.chance(30)}
	if g.chance(25) {
		r.Lease = g.leaseID()
	}
	if g.chance(8) {
		r.IgnoreValue = true
		if g.chance(80) {
			r.Value = nil
		}
	}
	if g.chance(8) {
		r.IgnoreLease = true
		if g.chance(80) {
			r.Lease = 0
		}
	}
	return r
}

func (g *generator) rangeRequest() *pb.RangeRequest {
	r := g.rangeStream()
	if g.chance(30) {
		r.SortOrder = pb.RangeRequest_SortOrder(g.r.IntN(3))
		r.SortTarget = pb.RangeRequest_SortTarget(g.r.IntN(5))
		if g.chance(3) {
			r.SortOrder = 7
		}
		if g.chance(3) {
			r.SortTarget = 7
		}
	}
	for _, f := range []*int64{&r.MinModRevision, &r.MaxModRevision, &r.MinCreateRevision, &r.MaxCreateRevision} {
		if g.chance(6) {
			*f = g.near()
		}
	}
	return r
}

// rangeStream is a Range as RangeStream takes it; a few with what it refuses.
func (g *generator) rangeStream() *pb.RangeRequest {
	r := &pb.RangeRequest{Serializable: g.chance(30), KeysOnly: g.chance(15), CountOnly: g.chance(12)}
	r.Key, r.RangeEnd = g.span()
	if g.chance(30) {
		r.Limit = g.r.Int64N(12) - 1
	}
	if g.chance(30) {
		r.Revision = g.revision()
	}
	if g.chance(2) {
		r.SortTarget, r.SortOrder = pb.RangeRequest_MOD, pb.RangeRequest_DESCEND
	}
	if g.chance(2) {
		r.MinModRevision = g.near()
	}
	return r
}

func (g *generator) deleteRange() *pb.DeleteRangeRequest {
	r := &pb.DeleteRangeRequest{PrevKv: g.chance(40)}
	r.Key, r.RangeEnd = g.span()
	// Everything at once leaves too little behind to be interesting.
	if len(r.Key) == 1 && r.Key[0] == 0 && g.chance(85) {
		r.RangeEnd = nil
	}
	return r
}

func (g *generator) compact() *pb.CompactionRequest {
	r := &pb.CompactionRequest{Revision: g.revision(), Physical: g.chance(50)}
	if g.chance(60) && g.head > g.compacted {
		r.Revision = g.compacted + 1 + g.r.Int64N(g.head-g.compacted)
	}
	return r
}

func (g *generator) txn(depth int) *pb.TxnRequest {
	t := &pb.TxnRequest{}
	for range g.r.IntN(4) {
		t.Compare = append(t.Compare, g.compare())
	}
	taken := make(map[string]bool)
	for range g.r.IntN(4) {
		t.Success = append(t.Success, g.requestOp(depth, taken))
	}
	clear(taken)
	for range g.r.IntN(4) {
		t.Failure = append(t.Failure, g.requestOp(depth, taken))
	}
	if depth == 0 {
		spareEtcd(t)
	}
	if depth == 0 && g.chance(0.5) {
		for i := range 120 + g.r.IntN(12) {
			t.Success = append(t.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{
				RequestPut: &pb.PutRequest{Key: fmt.Appendf(nil, "many/%03d", i), Value: []byte(pick(g, values))},
			}})
		}
	}
	return t
}

// spareEtcd changes a Txn that etcd 3.7.3 accepts and does not survive. It refuses a Txn that puts and
// deletes the same key, but not when the delete has the range end "\x00" or the two are in different nested
// Txns. Then a put with ignore_value or ignore_lease panics, because what it needs has just been deleted;
// and after a compaction at such a revision a read dies of "range failed to find revision pair". Such
// deletes are pointed at a key of their own; what etcd surely refuses stays.
func spareEtcd(t *pb.TxnRequest) {
	puts, deletes := make(map[*pb.PutRequest]bool), make(map[*pb.DeleteRangeRequest]bool) // true: not nested
	collectWrites(t, true, puts, deletes)
	for d, outer := range deletes {
		for p, alsoOuter := range puts {
			fromKeyOn := len(d.RangeEnd) == 1 && d.RangeEnd[0] == 0
			if model.Contains(d.Key, d.RangeEnd, p.Key) && (!outer || !alsoOuter || fromKeyOn) {
				d.Key, d.RangeEnd = []byte("never put"), nil
			}
		}
	}
	refused := false
	for d := range deletes {
		for p := range puts {
			refused = refused || model.Contains(d.Key, d.RangeEnd, p.Key)
		}
	}
	if refused {
		// A put in one branch and a delete in the other are no conflict, but this way nothing is at stake.
		for p := range puts {
			p.IgnoreValue, p.IgnoreLease = false, false
		}
	}
}

func collectWrites(t *pb.TxnRequest, outer bool, puts map[*pb.PutRequest]bool, deletes map[*pb.DeleteRangeRequest]bool) {
	for _, o := range slices.Concat(t.Success, t.Failure) {
		switch r := o.Request.(type) {
		case *pb.RequestOp_RequestPut:
			puts[r.RequestPut] = outer
		case *pb.RequestOp_RequestDeleteRange:
			deletes[r.RequestDeleteRange] = outer
		case *pb.RequestOp_RequestTxn:
			collectWrites(r.RequestTxn, false, puts, deletes)
		}
	}
}

// requestOp is one operation of a Txn. A key that the branch has written already is mostly avoided:
// etcd refuses such a Txn as a whole, and most should pass.
func (g *generator) requestOp(depth int, taken map[string]bool) *pb.RequestOp {
	switch n := g.r.IntN(100); {
	case n < 40:
		p := g.put()
		for tries := 0; taken[string(p.Key)] && tries < 10; tries++ {
			p.Key = g.key()
		}
		taken[string(p.Key)] = true
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: p}}
	case n < 70:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: g.rangeRequest()}}
	case n < 85:
		d := g.deleteRange()
		for tries := 0; taken[string(d.Key)] && tries < 10; tries++ {
			d.Key = g.key()
		}
		if len(d.RangeEnd) == 0 {
			taken[string(d.Key)] = true
		}
		return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: d}}
	case n < 99 && depth < 3:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: g.txn(depth + 1)}}
	case g.chance(20):
		return &pb.RequestOp{}
	default:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: g.rangeStream()}}
	}
}

func (g *generator) compare() *pb.Compare {
	c := &pb.Compare{Key: g.key(), Result: pb.Compare_CompareResult(g.r.IntN(4)), Target: pb.Compare_CompareTarget(g.r.IntN(5))}
	if g.chance(20) {
		c.Key, c.RangeEnd = g.span()
	}
	target := c.Target
	if g.chance(3) {
		// A target and a value of another kind: proto allows it, etcd takes the value as zero.
		target = pb.Compare_CompareTarget(g.r.IntN(5))
	}
	switch target {
	case pb.Compare_VALUE:
		c.TargetUnion = &pb.Compare_Value{Value: []byte(pick(g, values))}
	case pb.Compare_CREATE:
		c.TargetUnion = &pb.Compare_CreateRevision{CreateRevision: pick(g, []int64{0, g.near(), g.near()})}
	case pb.Compare_MOD:
		c.TargetUnion = &pb.Compare_ModRevision{ModRevision: pick(g, []int64{0, g.near(), g.near()})}
	case pb.Compare_VERSION:
		c.TargetUnion = &pb.Compare_Version{Version: g.r.Int64N(4)}
	case pb.Compare_LEASE:
		c.TargetUnion = &pb.Compare_Lease{Lease: pick(g, []int64{0, 0, g.leaseID()})}
	}
	if g.chance(1) {
		c.Result = 9
	}
	if g.chance(1) {
		c.Target = 9
	}
	return c
}

func (g *generator) watch() operation {
	r := &pb.WatchCreateRequest{PrevKv: g.chance(50), ProgressNotify: g.chance(30), Fragment: g.chance(20)}
	r.Key, r.RangeEnd = g.span()
	if g.chance(45) {
		r.StartRevision = g.revision()
	}
	if g.chance(15) {
		r.Filters = append(r.Filters, pick(g, []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NOPUT, pb.WatchCreateRequest_NODELETE}))
	}
	if g.chance(2) {
		r.Filters = []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NOPUT, pb.WatchCreateRequest_NODELETE}
	}
	if g.chance(1) {
		r.Filters = []pb.WatchCreateRequest_FilterType{5}
	}
	if g.chance(40) {
		r.WatchId = pick(g, []int64{1, 2, 3, 4, 5, 17, 1 << 40, -9})
	}
	return operation{kind: opWatch, request: r, stream: g.r.IntN(streams)}
}

func (g *generator) cancel() operation {
	o := operation{kind: opCancel, stream: g.r.IntN(streams)}
	id := int64(g.r.IntN(8))
	if open := g.watches[o.stream]; len(open) > 0 && g.chance(90) {
		// In order of the ids: a map's own order would not replay.
		n := g.r.IntN(len(open))
		for _, id = range sortedIDs(open) {
			if n--; n < 0 {
				break
			}
		}
	}
	o.request = &pb.WatchCancelRequest{WatchId: id}
	return o
}
