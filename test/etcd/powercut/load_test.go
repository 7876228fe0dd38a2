//go:build linux

package powercut

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// callTimeout is far above what any request needs.
const callTimeout = 15 * time.Second

// ownKeys is how many keys a writer has to itself, sharedKeys how many all fight for.
const (
	ownKeys    = 16
	sharedKeys = 3
)

// load is what clients do to a store over all its lives, and what they were told.
type load struct {
	cluster bool // a write without an answer may happen late
	workers []*worker
	told    atomic.Int64 // newest revision that anybody was told of
	settled atomic.Int64 // up to here the history is known, and may be compacted
	asked   atomic.Int64 // newest revision at which compaction was asked for
	compact atomic.Int64 // and at which it was acknowledged
	errors  atomic.Int64 // answers that leave it open whether a write has happened
	answers atomic.Int64 // acknowledged writes of this life

	mu struct {
		sync.Mutex
		writes []*write          // of this life
		events []*clientv3.Event // seen by a watcher in this life, in order
		leases map[int64]*lease
		alarm  map[bool]bool // whether the alarm may be raised, and may not be
		refuse map[string]int
	}
}

// lease is what the clients know of a lease. The ids are theirs.
type lease struct {
	ttl              time.Duration
	sent             time.Time // of the grant, or of its newest renewal that was acknowledged: it lives at least to sent + ttl
	granted, revoked outcome
	revoking         bool // a revoke was sent
	gone             bool // was rightly not there any more: must not come back
}

// mayEnd says why a lease cannot have ended.
func (l *load) mayEnd(id int64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch k := l.mu.leases[id]; {
	case k == nil:
		return fmt.Errorf("lease %d was never asked for", id)
	case !k.revoking && time.Since(k.sent) < k.ttl:
		return fmt.Errorf("lease %d of %s has ended after %s", id, k.ttl, time.Since(k.sent))
	}
	return nil
}

// worker is one client, which sends one request after the other.
type worker struct {
	l      *load
	number int64
	name   string
	rng    *rand.Rand
	act    func(w *worker, ctx context.Context) error
	seq    int
	revs   map[string]int64 // mod_revision of its own keys where it is certain
	held   []int64          // its leases that it has not revoked

	*clientv3.Client // of this life
	leases           pb.LeaseClient
	maintenance      pb.MaintenanceClient
}

func newLoad(r *rand.Rand, cluster bool) *load {
	l := &load{cluster: cluster}
	l.told.Store(1)
	l.settled.Store(1)
	l.mu.leases = make(map[int64]*lease)
	l.mu.alarm = map[bool]bool{false: true}
	l.mu.refuse = make(map[string]int)
	add := func(n int, name string, act func(*worker, context.Context) error) {
		for i := range n {
			w := &worker{l: l, number: int64(len(l.workers)), name: fmt.Sprintf("%s%d", name, i), act: act, revs: make(map[string]int64)}
			w.rng = rand.New(rand.NewPCG(r.Uint64(), 1))
			l.workers = append(l.workers, w)
		}
	}
	add(6, "w", (*worker).writeSomething)
	add(2, "l", (*worker).leaseSomething)
	add(2, "r", (*worker).readSomething)
	add(1, "compactor", (*worker).compactSomething)
	if !cluster { // an alarm that is raised late would stay
		add(1, "alarmist", (*worker).alarm)
	}
	return l
}

// run has all clients work until stop is closed, and then lets them finish what they have begun; a finding ends it early,
// and so does the end of the context. Errors are findings unless excused says that they are due.
func (l *load) run(ctx context.Context, client *clientv3.Client, stop <-chan struct{}, excused func() bool) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	l.answers.Store(0)
	var working, watching sync.WaitGroup
	for _, w := range l.workers {
		w.Client = client
		w.leases, w.maintenance = pb.NewLeaseClient(client.ActiveConnection()), pb.NewMaintenanceClient(client.ActiveConnection())
		clear(w.revs)
		working.Go(func() {
			if err := w.run(ctx, stop, excused); err != nil {
				cancel(fmt.Errorf("%s: %w", w.name, err))
			}
		})
	}
	watch, done := context.WithCancel(ctx)
	watching.Go(func() { l.watch(watch, client) })
	working.Wait()
	err := context.Cause(ctx)
	done()
	watching.Wait()
	if errors.Is(err, context.Canceled) && !isFinding(err) {
		return nil
	}
	return err
}

func (w *worker) run(ctx context.Context, stop <-chan struct{}, excused func() bool) error {
	for {
		select {
		case <-stop:
			return nil
		case <-ctx.Done():
			return nil
		default:
		}
		call, done := context.WithTimeout(ctx, callTimeout)
		err := w.act(w, call)
		done()
		switch {
		case err == nil || ctx.Err() != nil:
		case isFinding(err) || !excused():
			return finding{err}
		default:
			w.l.errors.Add(1)
			time.Sleep(2 * time.Millisecond) // a client's pace when it is refused
		}
	}
}

// finding is an answer that no error excuses.
type finding struct{ error }

func isFinding(err error) bool { return errors.As(err, new(finding)) }

func findf(format string, args ...any) error { return finding{fmt.Errorf(format, args...)} }

// watch notes what a watcher sees: that must be there after a cut as well.
func (l *load) watch(ctx context.Context, client *clientv3.Client) {
	for ctx.Err() == nil {
		l.mu.Lock()
		next := l.settled.Load() + 1
		if n := len(l.mu.events); n > 0 {
			next = l.mu.events[n-1].Kv.ModRevision + 1
		}
		l.mu.Unlock()
		for r := range client.Watch(ctx, "", clientv3.WithPrefix(), clientv3.WithRev(next), clientv3.WithPrevKV()) {
			l.mu.Lock()
			l.mu.events = append(l.mu.events, r.Events...)
			l.mu.Unlock()
			if n := len(r.Events); n > 0 {
				raise(&l.told, r.Events[n-1].Kv.ModRevision)
			}
		}
	}
}

// raise sets the value if it is higher.
func raise(v *atomic.Int64, to int64) {
	for {
		old := v.Load()
		if to <= old || v.CompareAndSwap(old, to) {
			return
		}
	}
}

// settledBy says what an answer settles; the error is the part of it that is none of a healthy store.
func (l *load) settledBy(err error) (outcome, error) {
	for _, no := range []error{rpctypes.ErrNoSpace, rpctypes.ErrLeaseNotFound, rpctypes.ErrCompacted, rpctypes.ErrLeaseExist} {
		if errors.Is(rpctypes.Error(err), no) {
			l.mu.Lock()
			l.mu.refuse[no.Error()]++
			l.mu.Unlock()
			return refused, nil
		}
	}
	if err != nil {
		return unknown, err
	}
	return acknowledged, nil
}

func (w *worker) begin(steps ...step) *write {
	w.seq++
	return &write{
		id: fmt.Sprintf("%s-%d", w.name, w.seq), client: w.name, seq: w.seq, after: w.l.told.Load(), steps: steps,
	}
}

// end notes how a write has ended.
func (w *worker) end(x *write, header *pb.ResponseHeader, changed bool, err error) error {
	x.outcome, err = w.l.settledBy(err)
	if x.outcome == acknowledged {
		x.rev = header.GetRevision()
		raise(&w.l.told, x.rev)
		w.l.answers.Add(1)
		if !changed {
			x.outcome = refused
		}
	}
	for key := range w.revs {
		if x.outcome != refused && slices.ContainsFunc(x.steps, func(s step) bool { return s.covers(key) }) {
			delete(w.revs, key)
		}
	}
	if x.outcome == acknowledged {
		for _, s := range x.steps {
			if s.end == "" && !s.del && strings.HasPrefix(s.key, w.name+"/") {
				w.revs[s.key] = x.rev
			}
		}
	}
	w.l.mu.Lock()
	w.l.mu.writes = append(w.l.mu.writes, x)
	w.l.mu.Unlock()
	if x.outcome == unknown && w.l.cluster {
		// It may come between what this client does next: so go on as another one, with other keys.
		w.name, _, _ = strings.Cut(w.name, ".")
		w.name += fmt.Sprintf(".%d", w.seq)
		clear(w.revs)
	}
	return err
}

func (w *worker) writeSomething(ctx context.Context) error {
	switch n := w.rng.IntN(100); {
	case n < 45:
		return w.put(ctx, step{key: w.ownKey(), size: w.size()})
	case n < 55:
		return w.delete(ctx)
	case n < 75:
		return w.ownTxn(ctx)
	default:
		return w.sharedTxn(ctx)
	}
}

func (w *worker) ownKey() string { return fmt.Sprintf("%s/%02d", w.name, w.rng.IntN(ownKeys)) }

// size is mostly small, sometimes some pages, seldom many.
func (w *worker) size() int {
	switch w.rng.IntN(40) {
	case 0:
		return w.rng.IntN(300_000)
	case 1, 2:
		return w.rng.IntN(30_000)
	case 3, 4, 5:
		return 0
	default:
		return w.rng.IntN(1500)
	}
}

func (w *worker) put(ctx context.Context, s step) error {
	x := w.begin(s)
	r, err := w.Put(ctx, s.key, string(value(x.id, s.size)), clientv3.WithLease(clientv3.LeaseID(s.lease)))
	if errors.Is(err, rpctypes.ErrLeaseNotFound) {
		w.held = slices.DeleteFunc(w.held, func(id int64) bool { return id == s.lease })
	}
	if err != nil {
		return w.end(x, nil, false, err)
	}
	return w.end(x, r.Header, true, nil)
}

func (w *worker) delete(ctx context.Context) error {
	s := step{del: true, key: w.ownKey()}
	if w.rng.IntN(2) == 0 {
		s.end = w.ownKey()
		s.key, s.end = min(s.key, s.end), max(s.key, s.end)+"0"
	}
	x := w.begin(s)
	r, err := w.Delete(ctx, s.key, clientv3.WithRange(s.end))
	if err != nil {
		return w.end(x, nil, false, err)
	}
	return w.end(x, r.Header, r.Deleted > 0, nil)
}

// ownTxn changes several of its own keys at once, on the condition that one is as it knows it.
func (w *worker) ownTxn(ctx context.Context) error {
	if len(w.revs) == 0 {
		return w.put(ctx, step{key: w.ownKey(), size: 10})
	}
	known := slices.Sorted(maps.Keys(w.revs))
	guard := known[w.rng.IntN(len(known))]
	steps := []step{{key: guard, size: w.rng.IntN(300)}}
	for i, first := 0, w.rng.IntN(ownKeys); i < 3; i++ {
		if key := fmt.Sprintf("%s/%02d", w.name, (first+i)%ownKeys); key != guard {
			steps = append(steps, step{del: w.rng.IntN(3) == 0, key: key, size: w.rng.IntN(300)})
		}
	}
	won, err := w.txn(ctx, map[string]int64{guard: w.revs[guard]}, steps)
	if err == nil && !won {
		return findf("lost a compare of key %q, which nobody else changes, with revision %d", guard, w.revs[guard])
	}
	return err
}

// sharedTxn replaces what it has read.
func (w *worker) sharedTxn(ctx context.Context) error {
	key := fmt.Sprintf("s/%d", w.rng.IntN(sharedKeys))
	r, err := w.get(ctx, key)
	if err != nil {
		return err
	}
	rev, s := int64(0), step{key: key, size: w.rng.IntN(200)}
	if len(r.Kvs) > 0 {
		rev = r.Kvs[0].ModRevision
		s.del = w.rng.IntN(8) == 0
	}
	_, err = w.txn(ctx, map[string]int64{key: rev}, []step{s})
	return err
}

// txn says whether it has won; if it was refused for another reason than its compares, that counts as won.
func (w *worker) txn(ctx context.Context, guards map[string]int64, steps []step) (won bool, err error) {
	x := w.begin(steps...)
	x.guards = guards
	var compares []clientv3.Cmp
	for key, rev := range guards {
		compares = append(compares, clientv3.Compare(clientv3.ModRevision(key), "=", rev))
	}
	var ops []clientv3.Op
	for _, s := range steps {
		ops = append(ops, x.op(s))
	}
	r, err := w.Txn(ctx).If(compares...).Then(ops...).Commit()
	if err != nil {
		return true, w.end(x, nil, false, err)
	}
	return r.Succeeded, w.end(x, r.Header, r.Succeeded, nil)
}

// get reads a key; a linearizable read is as new as all that anybody was told of before.
func (w *worker) get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	after := w.l.told.Load()
	r, err := w.Get(ctx, key, opts...)
	if err != nil {
		return nil, err
	}
	if len(opts) == 0 && r.Header.Revision < after {
		return nil, findf("a linearizable read was answered at revision %d after %d had been", r.Header.Revision, after)
	}
	raise(&w.l.told, r.Header.Revision)
	return r, nil
}

func (w *worker) readSomething(ctx context.Context) error {
	var opts []clientv3.OpOption
	if w.rng.IntN(3) == 0 {
		opts = append(opts, clientv3.WithSerializable())
	}
	_, err := w.get(ctx, fmt.Sprintf("s/%d", w.rng.IntN(sharedKeys)), opts...)
	time.Sleep(2 * time.Millisecond) // readers that never pause would leave the writers no processor
	return err
}

func (w *worker) compactSomething(ctx context.Context) error {
	time.Sleep(time.Duration(5+w.rng.IntN(60)) * time.Millisecond) // the pace of the compactions
	newest, old := w.l.settled.Load(), w.l.asked.Load()
	if newest <= old {
		return nil
	}
	at := old + 1 + w.rng.Int64N(newest-old)
	raise(&w.l.asked, at)
	var opts []clientv3.CompactOption
	if w.rng.IntN(4) == 0 {
		opts = append(opts, clientv3.WithCompactPhysical())
	}
	_, err := w.Compact(ctx, at, opts...)
	o, err := w.l.settledBy(err)
	if o == acknowledged {
		raise(&w.l.compact, at)
	}
	return err
}

const (
	shortTTL = 3 * time.Second // ends within a run
	longTTL  = 2 * time.Hour   // outlives it
)

func (w *worker) leaseSomething(ctx context.Context) error {
	switch n := w.rng.IntN(100); {
	case len(w.held) == 0 || n < 15:
		return w.grant(ctx)
	case n < 28:
		return w.revoke(ctx)
	default:
		id := w.held[w.rng.IntN(len(w.held))]
		return w.put(ctx, step{key: fmt.Sprintf("%s/%d", w.name, w.rng.IntN(ownKeys)), size: w.rng.IntN(200), lease: id})
	}
}

func (w *worker) note(id int64, f func(*lease)) {
	w.l.mu.Lock()
	defer w.l.mu.Unlock()
	f(w.l.mu.leases[id])
}

func (w *worker) grant(ctx context.Context) error {
	w.seq++
	id := int64(w.seq)<<8 | w.number
	k := &lease{ttl: longTTL, sent: time.Now()}
	if w.rng.IntN(3) == 0 {
		k.ttl = shortTTL
	}
	w.l.mu.Lock()
	w.l.mu.leases[id] = k
	w.l.mu.Unlock()
	_, err := w.leases.LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: id, TTL: int64(k.ttl / time.Second)})
	o, err := w.l.settledBy(err)
	w.note(id, func(k *lease) { k.granted = o })
	if o == acknowledged {
		w.held = append(w.held, id)
	}
	return err
}

func (w *worker) revoke(ctx context.Context) error {
	i := w.rng.IntN(len(w.held))
	id := w.held[i]
	w.held = slices.Delete(w.held, i, i+1)
	w.note(id, func(k *lease) { k.revoking = true })
	_, err := w.leases.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: id})
	o, err := w.l.settledBy(err)
	w.note(id, func(k *lease) {
		if k.revoked = o; o == refused { // it is not there, so it was short
			k.revoking = false
		}
	})
	return err
}

// alarmed is a member that there is not: its alarm is never cleared but by us.
const alarmed = 0xa1a2

// alarm raises NOSPACE for a moment, in which puts are refused.
func (w *worker) alarm(ctx context.Context) error {
	time.Sleep(time.Duration(20+w.rng.IntN(150)) * time.Millisecond) // most of the time there is none
	if err := w.setAlarm(ctx, true); err != nil {
		return err
	}
	time.Sleep(time.Duration(w.rng.IntN(3)) * time.Millisecond)
	return w.setAlarm(ctx, false)
}

func (w *worker) setAlarm(ctx context.Context, raised bool) error {
	w.l.mu.Lock()
	w.l.mu.alarm[raised] = true
	w.l.mu.Unlock()
	action := pb.AlarmRequest_DEACTIVATE
	if raised {
		action = pb.AlarmRequest_ACTIVATE
	}
	_, err := w.maintenance.Alarm(ctx, &pb.AlarmRequest{Action: action, MemberID: alarmed, Alarm: pb.AlarmType_NOSPACE})
	if err == nil {
		w.l.mu.Lock()
		w.l.mu.alarm[!raised] = false
		w.l.mu.Unlock()
	}
	return err
}
