package crash

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// callTimeout is far above what any request needs: a server that runs into it while it is alive has failed.
const callTimeout = 20 * time.Second

// errCrashed ends a client's work in a cycle: its request got no answer because the server was killed.
var errCrashed = errors.New("the server was killed")

// load is what all clients of a run share.
type load struct {
	kv     pb.KVClient
	lease  pb.LeaseClient
	leases *leaseBook

	newest  atomic.Int64 // highest revision that any client was told of
	killing atomic.Bool  // set before the server is killed: from here on requests may stay without an answer
	asked   atomic.Int64 // highest revision at which any client asked to compact
	compact atomic.Int64 // highest revision whose compaction was acknowledged

	mu struct {
		sync.Mutex
		writes []*write // of this cycle, in no order
		checks []check
	}
}

// client sends one request after the other, on keys of its own and on shared ones. It lives through all cycles.
type client struct {
	load *load
	name string
	rng  *rand.Rand
	seq  int

	// What its own keys may hold now: ids of writes, "" for no such key; more than one if an answer is missing.
	// This book is kept apart from the model, which follows the watch history.
	book map[string][]string
	revs map[string]int64 // mod_revision of the own keys where it is certain, 0 for none

	held      []int64 // leases of this client that it has not revoked
	leaseSeq  int64
	leaseBase int64
	compacted func() int64 // up to which revision history may be dropped
}

// told notes the revision of an answer.
func (l *load) told(rev int64) { raise(&l.newest, rev) }

// raise sets the value if it is higher.
func raise(v *atomic.Int64, to int64) {
	for {
		old := v.Load()
		if to <= old || v.CompareAndSwap(old, to) {
			return
		}
	}
}

func (l *load) check(rev int64, what func(*model) error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mu.checks = append(l.mu.checks, check{rev: rev, what: what})
}

// take hands over what the clients did in this cycle.
func (l *load) take() ([]*write, []check) {
	l.mu.Lock()
	defer l.mu.Unlock()
	writes, checks := l.mu.writes, l.mu.checks
	l.mu.writes, l.mu.checks = nil, nil
	return writes, checks
}

// begin makes the record of a write that is about to be sent.
func (c *client) begin(steps ...step) *write {
	c.seq++
	return &write{
		id: fmt.Sprintf("%s-%d", c.name, c.seq), client: c.name, seq: c.seq, after: c.load.newest.Load(), steps: steps,
	}
}

// end notes how a write ended. The error is not nil if the client has to stop: errCrashed, or a finding.
func (c *client) end(w *write, header *pb.ResponseHeader, changed bool, err error) error {
	switch {
	case err == nil && changed:
		w.outcome, w.rev = acknowledged, header.GetRevision()
	case err == nil:
		w.outcome = refused
	default:
		w.outcome = unknown
	}
	if err == nil {
		c.load.told(header.GetRevision())
	}
	c.load.mu.Lock()
	c.load.mu.writes = append(c.load.mu.writes, w)
	c.load.mu.Unlock()
	c.note(w)
	return c.fault(err)
}

// fault turns an error of a call into errCrashed if the server was being killed, and into a finding otherwise.
func (c *client) fault(err error) error {
	if err == nil {
		return nil
	}
	if c.load.killing.Load() {
		return errCrashed
	}
	return fmt.Errorf("%s: a running server answered: %w", c.name, err)
}

// note keeps the client's own book.
func (c *client) note(w *write) {
	if w.outcome == refused {
		return
	}
	for _, s := range w.steps {
		for key := range c.book {
			if !s.covers(key) {
				continue
			}
			id, rev := w.id, w.rev
			if s.del {
				id, rev = "", 0
			}
			if w.outcome == acknowledged {
				c.book[key], c.revs[key] = []string{id}, rev
			} else {
				c.book[key] = append(c.book[key], id)
				delete(c.revs, key)
			}
		}
	}
}

// settle checks the own keys after a restart against the book and clears up what was uncertain.
func (c *client) settle(state map[string]*mvccpb.KeyValue) error {
	for key, may := range c.book {
		id, rev := "", int64(0)
		if kv := state[key]; kv != nil {
			id, rev = writeID(kv.Value), kv.ModRevision
		}
		found := false
		for _, m := range may {
			found = found || m == id
		}
		if !found {
			return fmt.Errorf("acknowledged write lost: after the restart key %q holds write %q, %s knows that it must be one of %q",
				key, id, c.name, may)
		}
		c.book[key], c.revs[key] = []string{id}, rev
	}
	return nil
}

// run sends requests until the server is killed; it returns nil then, and a finding otherwise.
func (c *client) run(act func(*client, context.Context) error) error {
	for {
		ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
		err := act(c, ctx)
		cancel()
		if errors.Is(err, errCrashed) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// size draws the size of a value: mostly small, sometimes some pages.
func (c *client) size() int {
	switch c.rng.IntN(20) {
	case 0:
		return c.rng.IntN(30_000)
	case 1, 2, 3:
		return 0
	default:
		return c.rng.IntN(1500)
	}
}

func (c *client) ownKey() string { return fmt.Sprintf("%s/%02d", c.name, c.rng.IntN(ownKeys)) }

// ownKeys is how many keys a writer has to itself, sharedKeys how many all fight for.
const (
	ownKeys    = 20
	sharedKeys = 4
)

func newWriter(l *load, name string, rng *rand.Rand) *client {
	c := &client{load: l, name: name, rng: rng, book: map[string][]string{}, revs: map[string]int64{}}
	for i := range ownKeys {
		c.book[fmt.Sprintf("%s/%02d", name, i)] = []string{""}
		c.revs[fmt.Sprintf("%s/%02d", name, i)] = 0
	}
	return c
}

// writeSomething is one step of a writer.
func writeSomething(c *client, ctx context.Context) error {
	switch n := c.rng.IntN(100); {
	case n < 45:
		return c.put(ctx)
	case n < 55:
		return c.deleteRange(ctx)
	case n < 75:
		return c.ownTxn(ctx)
	default:
		return c.sharedCAS(ctx)
	}
}

func (c *client) put(ctx context.Context) error {
	s := step{key: c.ownKey(), size: c.size()}
	w := c.begin(s)
	askPrev := c.rng.IntN(4) == 0
	r, err := c.load.kv.Put(ctx, &pb.PutRequest{Key: []byte(s.key), Value: value(w.id, s.size), PrevKv: askPrev})
	if err == nil && askPrev {
		w.prev = &prev{rev: r.PrevKv.GetModRevision()}
	}
	return c.end(w, r.GetHeader(), true, err)
}

func (c *client) deleteRange(ctx context.Context) error {
	s := step{del: true, key: c.ownKey()}
	if c.rng.IntN(2) == 0 {
		s.end = s.key + "\xff"
		if c.rng.IntN(3) == 0 {
			s.end = c.name + "/99"
		}
	}
	w := c.begin(s)
	r, err := c.load.kv.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: []byte(s.key), RangeEnd: []byte(s.end)})
	if err == nil && r.Deleted == 0 {
		c.load.check(r.Header.Revision, func(m *model) error {
			if n := len(m.sorted(func(kv *mvccpb.KeyValue) bool { return s.covers(string(kv.Key)) })); n != 0 {
				return fmt.Errorf("%s deleted nothing, but its range held %d keys", w, n)
			}
			return nil
		})
	}
	return c.end(w, r.GetHeader(), r.GetDeleted() > 0, err)
}

// ownTxn compares one own key, whose revision is certain, and changes several at once: all or nothing.
func (c *client) ownTxn(ctx context.Context) error {
	first := c.rng.IntN(ownKeys - 4)
	guarded := fmt.Sprintf("%s/%02d", c.name, first)
	rev, certain := c.revs[guarded]
	if !certain {
		return c.put(ctx)
	}
	var steps []step
	for i := range 2 + c.rng.IntN(3) {
		s := step{key: fmt.Sprintf("%s/%02d", c.name, first+i), size: c.rng.IntN(300)}
		// The first one puts, so that the Txn always changes something.
		s.del = i > 0 && c.rng.IntN(3) == 0
		steps = append(steps, s)
	}
	want := rev
	if c.rng.IntN(5) == 0 {
		want++ // must lose
	}
	w := c.begin(steps...)
	w.guard = []guard{{key: guarded, rev: want}}
	r, err := c.load.kv.Txn(ctx, txn(w))
	if err == nil && r.Succeeded != (want == rev) {
		return fmt.Errorf("%s compared mod_revision with %d, it was %d: succeeded is %v", w, want, rev, r.Succeeded)
	}
	return c.end(w, r.GetHeader(), r.GetSucceeded(), err)
}

// sharedCAS reads a shared key and replaces what it read: exactly one client wins each revision.
func (c *client) sharedCAS(ctx context.Context) error {
	key := fmt.Sprintf("s/%d", c.rng.IntN(sharedKeys))
	kv, err := c.read(ctx, key, false)
	if err != nil {
		return err
	}
	w := c.begin(step{key: key, size: c.rng.IntN(200)})
	if kv != nil && c.rng.IntN(8) == 0 {
		w.steps[0] = step{del: true, key: key}
	}
	g := guard{key: key, rev: kv.GetModRevision()}
	w.guard = []guard{g}
	r, err := c.load.kv.Txn(ctx, txn(w))
	if err == nil && !r.Succeeded {
		c.load.check(r.Header.Revision, func(m *model) error {
			if m.modRev(g.key) == g.rev {
				return fmt.Errorf("%s compared mod_revision(%q) with %d and lost, but it was that", w, g.key, g.rev)
			}
			return nil
		})
	}
	return c.end(w, r.GetHeader(), r.GetSucceeded(), err)
}

// txn is the request of a write with guards.
func txn(w *write) *pb.TxnRequest {
	r := &pb.TxnRequest{}
	for _, g := range w.guard {
		r.Compare = append(r.Compare, &pb.Compare{
			Target: pb.Compare_MOD, Result: pb.Compare_EQUAL, Key: []byte(g.key),
			TargetUnion: &pb.Compare_ModRevision{ModRevision: g.rev},
		})
	}
	for _, s := range w.steps {
		op := &pb.RequestOp{}
		if s.del {
			op.Request = &pb.RequestOp_RequestDeleteRange{
				RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(s.key), RangeEnd: []byte(s.end)},
			}
		} else {
			op.Request = &pb.RequestOp_RequestPut{
				RequestPut: &pb.PutRequest{Key: []byte(s.key), Value: value(w.id, s.size), Lease: s.lease},
			}
		}
		r.Success = append(r.Success, op)
	}
	return r
}

// read gets one key. What was read must later be found in the history at the revision of the answer; a
// linearizable read must also be at least as new as all that was acknowledged before.
func (c *client) read(ctx context.Context, key string, serializable bool) (*mvccpb.KeyValue, error) {
	after := c.load.newest.Load()
	r, err := c.load.kv.Range(ctx, &pb.RangeRequest{Key: []byte(key), Serializable: serializable})
	if err != nil {
		return nil, c.fault(err)
	}
	rev := r.Header.Revision
	if rev < after && !serializable {
		return nil, fmt.Errorf("%s: a linearizable read was answered at revision %d, %d had been acknowledged before", c.name, rev, after)
	}
	c.load.told(rev)
	var kv *mvccpb.KeyValue
	if len(r.Kvs) > 0 {
		kv = r.Kvs[0]
	}
	got := kv.GetModRevision()
	c.load.check(rev, func(m *model) error {
		if want := m.modRev(key); want != got {
			return fmt.Errorf("%s read key %q at mod_revision %d (0: absent), it was %d", c.name, key, got, want)
		}
		return nil
	})
	return kv, nil
}

// readSomething is one step of a reader.
func readSomething(c *client, ctx context.Context) error {
	key := fmt.Sprintf("s/%d", c.rng.IntN(sharedKeys))
	if c.rng.IntN(2) == 0 {
		key = fmt.Sprintf("w%d/%02d", c.rng.IntN(writers), c.rng.IntN(ownKeys))
	}
	if _, err := c.read(ctx, key, c.rng.IntN(3) == 0); err != nil {
		return err
	}
	time.Sleep(time.Millisecond) // a reader that never pauses would take the processor from the writers
	return nil
}

// leaseSomething is one step of a client that works with leases.
func leaseSomething(c *client, ctx context.Context) error {
	switch n := c.rng.IntN(100); {
	case n < 15 || len(c.held) == 0:
		return c.grant(ctx)
	case n < 30 && len(c.held) > 8:
		return c.revoke(ctx)
	case n < 40:
		return c.keepAlive(ctx)
	default:
		return c.putLeased(ctx)
	}
}

func (c *client) grant(ctx context.Context) error {
	c.leaseSeq++
	id, ttl, sent := c.leaseBase+c.leaseSeq, longTTL, time.Now()
	if c.rng.IntN(3) == 0 {
		ttl = shortTTL
	}
	c.load.leases.update(id, func(l *lease) { l.ttl, l.sent = ttl, sent })
	r, err := c.load.lease.LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: id, TTL: int64(ttl / time.Second)})
	c.load.leases.update(id, func(l *lease) { l.latest = time.Now() })
	if err != nil {
		return c.fault(err)
	}
	c.load.told(r.Header.Revision)
	c.load.leases.update(id, func(l *lease) { l.granted = acknowledged })
	c.held = append(c.held, id)
	return nil
}

func (c *client) revoke(ctx context.Context) error {
	i := c.rng.IntN(len(c.held))
	id := c.held[i]
	c.held = append(c.held[:i], c.held[i+1:]...)
	c.load.leases.update(id, func(l *lease) { l.revoked, l.revoke = true, unknown })
	r, err := c.load.lease.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: id})
	if status.Code(err) == codes.NotFound {
		// A short lease that was due: mayEnd would accept its end from now on, so take the mark back.
		c.load.leases.update(id, func(l *lease) { l.revoked = false })
		return c.missing(id)
	}
	if err != nil {
		return c.fault(err)
	}
	c.load.leases.update(id, func(l *lease) { l.revoke = acknowledged })
	c.load.told(r.Header.Revision)
	c.load.check(r.Header.Revision, func(m *model) error {
		if n := len(m.sorted(func(kv *mvccpb.KeyValue) bool { return kv.Lease == id })); n != 0 {
			return fmt.Errorf("revoke of lease %d was acknowledged, %d keys are still attached", id, n)
		}
		return nil
	})
	return nil
}

// missing judges the answer that there is no such lease.
func (c *client) missing(id int64) error {
	if err := c.load.leases.mayEnd(id, time.Now()); err != nil {
		return fmt.Errorf("%s was told that lease %d is not there: %w", c.name, id, err)
	}
	for i, h := range c.held {
		if h == id {
			c.held = append(c.held[:i], c.held[i+1:]...)
			break
		}
	}
	return nil
}

func (c *client) putLeased(ctx context.Context) error {
	id := c.held[c.rng.IntN(len(c.held))]
	s := step{key: fmt.Sprintf("%s/%d/%d", c.name, id, c.rng.IntN(3)), size: c.rng.IntN(200), lease: id}
	w := c.begin(s)
	r, err := c.load.kv.Put(ctx, &pb.PutRequest{Key: []byte(s.key), Value: value(w.id, s.size), Lease: id})
	if status.Code(err) == codes.NotFound {
		return c.missing(id)
	}
	return c.end(w, r.GetHeader(), true, err)
}

// keepAlive renews a lease: from the moment this was sent it has its whole TTL again, also after a crash.
func (c *client) keepAlive(ctx context.Context) error {
	id := c.held[c.rng.IntN(len(c.held))]
	sent := time.Now()
	r, err := c.keepAliveOnce(ctx, id)
	// Without an answer it may have been renewed up to now.
	c.load.leases.update(id, func(l *lease) { l.latest = time.Now() })
	if err != nil {
		return c.fault(err)
	}
	c.load.told(r.Header.GetRevision())
	if r.TTL <= 0 {
		return c.missing(id)
	}
	c.load.leases.update(id, func(l *lease) { l.sent = sent })
	return nil
}

func (c *client) keepAliveOnce(ctx context.Context, id int64) (*pb.LeaseKeepAliveResponse, error) {
	ctx, cancel := context.WithCancel(ctx) // ends the stream
	defer cancel()
	stream, err := c.load.lease.LeaseKeepAlive(ctx)
	if err != nil {
		return nil, err
	}
	if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: id}); err != nil {
		return nil, err
	}
	return stream.Recv()
}

// compactSomething is one step of the client that compacts.
func compactSomething(c *client, ctx context.Context) error {
	time.Sleep(time.Duration(10+c.rng.IntN(100)) * time.Millisecond) // the pace of the compactions, drawn
	if c.load.killing.Load() {
		return errCrashed
	}
	return c.compactAt(ctx, c.compacted()-c.rng.Int64N(50))
}

// compactAt asks to drop the history below rev, which every watcher has seen.
func (c *client) compactAt(ctx context.Context, rev int64) error {
	if rev <= c.load.asked.Load() {
		return nil
	}
	raise(&c.load.asked, rev)
	r, err := c.load.kv.Compact(ctx, &pb.CompactionRequest{Revision: rev, Physical: c.rng.IntN(4) == 0})
	if status.Code(err) == codes.OutOfRange && c.load.asked.Load() > rev {
		return nil // another compaction, at a higher revision, was first
	}
	if err != nil {
		return c.fault(err)
	}
	raise(&c.load.compact, rev)
	c.load.told(r.Header.GetRevision())
	return nil
}
