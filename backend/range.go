package backend

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"sort"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// index is what readers and the committer share.
type index struct {
	recs  *records
	slots *slots
	vals  *values
}

// at returns slot's newest record that is not newer than rev, tombstones included; 0 for none.
func (ix *index) at(slot uint32, rev int64) (uint32, *record) {
	for n := ix.slots.head(slot); n != 0; {
		r := ix.recs.at(n)
		if r.rev <= rev {
			return n, r
		}
		n = r.prev
	}
	return 0, nil
}

// keyOrder is the ordered set of keys: a *tree, or the committer's *treeEdit.
type keyOrder interface {
	get(key []byte) (slot uint32, live, ok bool)
	countLive(from, end []byte, unboundedEnd bool) int64
	ascend(from, end []byte, unboundedEnd bool, fn func(key []byte, slot uint32, live bool) bool)
	descend(from, end []byte, unboundedEnd bool, fn func(key []byte, slot uint32, live bool) bool)
}

// reader answers reads over one state: a View's, or the committer's own inside a batch.
type reader struct {
	index   *index
	keys    keyOrder // exact at rev: an entry is live when its key exists at rev
	rev     int64    // newest revision visible
	compact int64    // -1: never compacted
	// row reads the Frame of a row whose value is not resident, rows those of many, in any order.
	row  func(ctx context.Context, id int64) (Frame, error)
	rows func(ctx context.Context, ids []int64, each func(i int, f Frame)) error
	// ring holds the newest events, those up to rev and maybe later ones, for counting at revisions shortly before it; nil inside a batch.
	ring *eventRing
}

// keyRange is etcd's key and range_end: no end is the one key, "\x00" is every key from key on.
type keyRange struct {
	from, end []byte
	single    bool
	unbounded bool
}

func newKeyRange(key, rangeEnd []byte) keyRange {
	return keyRange{
		from:      key,
		end:       rangeEnd,
		single:    len(rangeEnd) == 0,
		unbounded: len(rangeEnd) == 1 && rangeEnd[0] == 0,
	}
}

func (k keyRange) contains(key []byte) bool {
	if k.single {
		return bytes.Equal(key, k.from)
	}
	return bytes.Compare(key, k.from) >= 0 && (k.unbounded || bytes.Compare(key, k.end) < 0)
}

// RangeResult is the answer to a Range. Its Frames are shared: they must not be changed.
type RangeResult struct {
	KVs      []Frame // in the order asked for
	More     bool
	Count    int64 // keys in the range, whatever the limit
	Revision int64 // of the store when it was read
}

// found is one key of an answer on its way.
type found struct {
	r     *record
	frame Frame
	key   []byte // only where the frame is not read
}

// visit calls fn for each key that exists at rev, in key order; key is valid during the call only.
func (rd *reader) visit(k keyRange, rev int64, down bool, fn func(key []byte, n uint32, r *record) bool) {
	if k.single {
		slot, _, ok := rd.keys.get(k.from)
		if !ok {
			return
		}
		if n, r := rd.index.at(slot, rev); r != nil && !r.tombstone() {
			fn(k.from, n, r)
		}
		return
	}
	current := rev == rd.rev
	each := func(key []byte, slot uint32, live bool) bool {
		if current && !live {
			return true
		}
		n, r := rd.index.at(slot, rev)
		if r == nil || r.tombstone() {
			return true
		}
		return fn(key, n, r)
	}
	if down {
		rd.keys.descend(k.from, k.end, k.unbounded, each)
	} else {
		rd.keys.ascend(k.from, k.end, k.unbounded, each)
	}
}

// count returns how many keys of k exist at rev.
func (rd *reader) count(k keyRange, rev int64) int64 {
	if c, ok := rd.quickCount(k, rev); ok {
		return c
	}
	var c int64
	rd.visit(k, rev, false, func([]byte, uint32, *record) bool { c++; return true })
	return c
}

// quickCount is count without walking the keys, where that is possible: the tree knows how many there are at the
// newest revision, and the ring which ones have come and gone since rev.
func (rd *reader) quickCount(k keyRange, rev int64) (c int64, ok bool) {
	if k.single {
		return 0, false
	}
	c = rd.keys.countLive(k.from, k.end, k.unbounded)
	if rev == rd.rev {
		return c, true
	}
	if rd.ring == nil {
		return 0, false
	}
	// Looking at an event costs about as much as walking past a key.
	since, ok := rd.ring.liveChange(k, rev, rd.rev, int(c)+64)
	return c - since, ok
}

// frame returns the Frame of record n, from memory or from its row.
func (rd *reader) frame(ctx context.Context, n uint32, r *record) (Frame, error) {
	if f := rd.index.vals.get(r); f != nil {
		return f, nil
	}
	f, err := rd.row(ctx, r.id)
	if err != nil {
		return nil, fmt.Errorf("reading the value of revision %d: %w", r.rev, err)
	}
	return rd.index.vals.fill(n, f), nil
}

// wanted is a Frame that is not resident, and where it goes.
type wanted struct {
	at int
	n  uint32
	r  *record
}

// fetchRows is how many rows are asked for at once, and fetchBytes what their keys and values may come to.
const (
	fetchRows  = 1024
	fetchBytes = 4 << 20
)

// fetch reads Frames that are not resident and passes each with its place.
func (rd *reader) fetch(ctx context.Context, all []wanted, put func(at int, f Frame)) error {
	var ids []int64
	for len(all) > 0 {
		n, bytes := 0, 0
		ids = ids[:0]
		for n < len(all) && n < fetchRows && (n == 0 || bytes < fetchBytes) {
			ids = append(ids, all[n].r.id)
			bytes += int(all[n].r.size)
			n++
		}
		part := all[:n]
		all = all[n:]
		err := rd.rows(ctx, ids, func(i int, f Frame) {
			put(part[i].at, rd.index.vals.fill(part[i].n, f))
		})
		if err != nil {
			return fmt.Errorf("reading %d values: %w", n, err)
		}
	}
	return nil
}

// revision resolves a request's revision against the state (0 and less: the newest).
func (rd *reader) revision(rev int64) (int64, error) {
	switch {
	case rev > rd.rev:
		return 0, ErrFutureRev
	case rev <= 0:
		return rd.rev, nil
	case rev < rd.compact:
		return 0, &CompactedError{CompactRevision: rd.compact}
	}
	return rev, nil
}

// maxRoomAhead bounds the keys for which an answer makes room before it has found them.
const maxRoomAhead = 64 << 10

// contextEvery is how many keys are read between two looks at the request's context.
const contextEvery = 256

// rangeKeys answers req; Count is left out where counted is false.
func (rd *reader) rangeKeys(ctx context.Context, req *pb.RangeRequest, counted bool) (*RangeResult, error) {
	rev, err := rd.revision(req.Revision)
	if err != nil {
		return nil, err
	}
	k := newKeyRange(req.Key, req.RangeEnd)
	if req.CountOnly {
		return &RangeResult{Count: rd.count(k, rev), Revision: rd.rev}, nil
	}
	res := &RangeResult{Revision: rd.rev}
	keysOnly := req.KeysOnly && req.SortTarget != pb.RangeRequest_VALUE
	order := orderOf(req)
	filtered := req.MinModRevision != 0 || req.MaxModRevision != 0 || req.MinCreateRevision != 0 || req.MaxCreateRevision != 0

	// In key order without filters a limit bounds the work; else everything has to be looked at. A target
	// without an order is a quirk of etcd's: it takes one key more than the limit in key order and sorts those.
	limit := math.MaxInt
	if req.Limit > 0 && req.Limit < math.MaxInt && !filtered {
		switch {
		case order.byKey():
			limit = int(req.Limit)
		case req.SortOrder == pb.RangeRequest_NONE:
			limit = int(req.Limit) + 1
		}
	}
	// Where the count is not to be had otherwise, the keys behind the limit are walked too.
	var quick int64
	countAlong := false
	if counted {
		var ok bool
		quick, ok = rd.quickCount(k, rev)
		countAlong = !ok
	}
	// In key order the Frames go straight into the answer; else what is found has to be sorted first.
	direct := order.byKey() && !req.KeysOnly
	if direct && !filtered && quick > 0 {
		res.KVs = make([]Frame, 0, min(int64(limit), quick, maxRoomAhead))
	}
	var all []found
	var missing []wanted // their places in all, or in res.KVs
	seen := 0
	rd.visit(k, rev, order == keyDescending, func(key []byte, n uint32, r *record) bool {
		seen++
		if seen%contextEvery == 0 && ctx.Err() != nil {
			err = ctx.Err()
			return false
		}
		if len(all)+len(res.KVs) >= limit {
			res.More = true
			return countAlong
		}
		if filtered && !revisionsMatch(req, r) {
			return true
		}
		f := found{r: r}
		if keysOnly {
			f.key = append([]byte(nil), key...)
		} else if f.frame = rd.index.vals.get(r); f.frame == nil {
			missing = append(missing, wanted{len(all) + len(res.KVs), n, r})
		}
		if direct {
			res.KVs = append(res.KVs, f.frame)
		} else {
			all = append(all, f)
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	err = rd.fetch(ctx, missing, func(at int, f Frame) {
		if direct {
			res.KVs[at] = f
		} else {
			all[at].frame = f
		}
	})
	if err != nil {
		return nil, err
	}
	switch {
	case countAlong:
		res.Count = int64(seen)
	case counted:
		res.Count = quick
	}
	if direct {
		if req.Limit > 0 && int64(len(res.KVs)) > req.Limit {
			res.KVs, res.More = res.KVs[:req.Limit], true
		}
		return res, nil
	}
	order.sort(all, keysOnly)
	if req.Limit > 0 && int64(len(all)) > req.Limit {
		all, res.More = all[:req.Limit], true
	}
	if len(all) > 0 {
		res.KVs = make([]Frame, len(all))
	}
	for i, f := range all {
		switch {
		case keysOnly:
			kv := keyValue{key: f.key, create: f.r.create, mod: f.r.rev, version: f.r.version}
			res.KVs[i] = kv.appendFrame(make([]byte, 0, kv.frameSize()))
		case req.KeysOnly:
			kv := keyValue{key: f.frame.Key(), create: f.r.create, mod: f.r.rev, version: f.r.version, lease: f.r.lease}
			res.KVs[i] = kv.appendFrame(make([]byte, 0, kv.frameSize()))
		default:
			res.KVs[i] = f.frame
		}
	}
	return res, nil
}

func revisionsMatch(req *pb.RangeRequest, r *record) bool {
	return (req.MaxModRevision == 0 || r.rev <= req.MaxModRevision) &&
		(req.MinModRevision == 0 || r.rev >= req.MinModRevision) &&
		(req.MaxCreateRevision == 0 || r.create <= req.MaxCreateRevision) &&
		(req.MinCreateRevision == 0 || r.create >= req.MinCreateRevision)
}

// resultOrder says how a Range's keys are ordered.
type resultOrder struct {
	target     pb.RangeRequest_SortTarget
	descending bool
}

var (
	keyAscending  = resultOrder{target: pb.RangeRequest_KEY}
	keyDescending = resultOrder{target: pb.RangeRequest_KEY, descending: true}
)

// orderOf: a target other than KEY without an order means ascending; KEY without an order is key order.
func orderOf(req *pb.RangeRequest) resultOrder {
	return resultOrder{target: req.SortTarget, descending: req.SortOrder == pb.RangeRequest_DESCEND}
}

func (o resultOrder) byKey() bool { return o == keyAscending || o == keyDescending }

// sort orders what was found in key order. Ties are left as sort.Sort leaves them, because etcd sorts
// the same sequence with it, and so clients see the same order from both.
func (o resultOrder) sort(all []found, keysOnly bool) {
	if o.byKey() {
		return
	}
	var less func(a, b *found) bool
	switch o.target {
	case pb.RangeRequest_VERSION:
		less = func(a, b *found) bool { return a.r.version < b.r.version }
	case pb.RangeRequest_CREATE:
		less = func(a, b *found) bool { return a.r.create < b.r.create }
	case pb.RangeRequest_MOD:
		less = func(a, b *found) bool { return a.r.rev < b.r.rev }
	case pb.RangeRequest_VALUE:
		less = func(a, b *found) bool { return bytes.Compare(a.frame.Value(), b.frame.Value()) < 0 }
	default:
		panic(fmt.Sprintf("backend: sort target %d", o.target))
	}
	var s sort.Interface = &foundSort{all, less}
	if o.descending {
		s = sort.Reverse(s)
	}
	sort.Sort(s)
}

type foundSort struct {
	all  []found
	less func(a, b *found) bool
}

func (s *foundSort) Len() int           { return len(s.all) }
func (s *foundSort) Less(i, j int) bool { return s.less(&s.all[i], &s.all[j]) }
func (s *foundSort) Swap(i, j int)      { s.all[i], s.all[j] = s.all[j], s.all[i] }

// response turns the result into etcd's message, for a Txn's answer.
func (r *RangeResult) response() *pb.RangeResponse {
	resp := &pb.RangeResponse{
		Header: &pb.ResponseHeader{Revision: r.Revision},
		More:   r.More,
		Count:  r.Count,
	}
	if len(r.KVs) > 0 {
		resp.Kvs = make([]*mvccpb.KeyValue, len(r.KVs))
		for i, f := range r.KVs {
			resp.Kvs[i] = f.KeyValue()
		}
	}
	return resp
}
