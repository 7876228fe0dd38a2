// Package crash kills a real server process with SIGKILL, again and again, under concurrent load, and shows that
// nothing acknowledged is lost.
//
// What is checked after every kill:
//   - each client's own book of its keys against the state (client.settle);
//   - the watch history, collected over all crashes, against everything the clients sent and were told (model);
//   - the state against the watch history, now and at a random older revision;
//   - all watchers against each other: every event once, in order, whole revisions;
//   - leases: what was granted is there with its keys, what was revoked is not, none ended early;
//   - the revision never goes back, and an acknowledged compaction stays.
package crash

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/test/load/proc"
)

// How many clients of each kind work at the same time.
const (
	writers = 6
	leasers = 2
	readers = 2
)

// overdueLimit is how long a due lease may stay: some restarts, and a busy machine.
const overdueLimit = 8 * time.Second

// everything is the range of all keys in etcd's convention.
const everything = "\x00"

// manner is how the server dies in a cycle.
type manner string

const (
	underLoad    manner = "under load"
	inStart      manner = "during start-up" // after a kill under load
	inCompaction manner = "during a compaction"
	terminated   manner = "by SIGTERM" // for comparison: an orderly end under load
)

// options of a run.
type options struct {
	binary     string
	isEtcd     bool // the reference: has no check command, starts leases anew at a restart
	isMember   bool // of a cluster, the only one: its leases do not age while nobody leads
	cycles     int
	seed       uint64
	checkEvery int // run `check` on the database before every n-th restart
	logf       func(format string, args ...any)
}

// keepsDeadlines says whether a lease ends when it would have without the kills.
func (o *options) keepsDeadlines() bool { return !o.isEtcd && !o.isMember }

// run is one server, its clients and the model, over all cycles.
type run struct {
	o    options
	rng  *rand.Rand
	spec proc.Spec
	p    *proc.Process

	conns    []*grpc.ClientConn
	v3       *clientv3.Client
	load     *load
	clients  []*client
	acts     map[*client]func(*client, context.Context) error
	watchers []*watcher // the first one sees everything with prev_kv: its history is the one that is replayed
	stop     context.CancelFunc
	watching sync.WaitGroup

	model   *model
	died    map[manner]int
	written int           // acknowledged writes
	slowest time.Duration // from start to the first linearizable answer
	checked int
}

func newRun(o options) (*run, error) {
	dir, err := proc.WorkDir("crash-")
	if err != nil {
		return nil, err
	}
	spec := proc.Spec{Kind: "quire", Binary: o.binary, Dir: dir}
	if o.isEtcd {
		spec.Kind = "etcd"
	}
	// etcd waits for an election after each start and rewrites its log now and then: make both quick.
	spec.Env = []string{"ETCD_HEARTBEAT_INTERVAL=10", "ETCD_ELECTION_TIMEOUT=100", "ETCD_SNAPSHOT_COUNT=2000"}
	if spec.Addr, err = proc.FreeAddr(); err != nil {
		return nil, err
	}
	if spec.Peer, err = proc.FreeAddr(); err != nil {
		return nil, err
	}
	if o.isMember {
		spec.Cluster = "one=http://" + spec.Peer
	}
	r := &run{
		o: o, rng: rand.New(rand.NewPCG(o.seed, 0)), spec: spec, died: map[manner]int{},
		acts: map[*client]func(*client, context.Context) error{},
	}
	if err := r.dial(); err != nil {
		return nil, err
	}
	leases := newLeaseBook()
	r.model = newModel(leases)
	r.load.leases = leases
	r.load.newest.Store(1)
	r.makeClients()
	r.startWatchers()
	return r, nil
}

// dial makes the connections. They outlive the server and find it again after each restart.
func (r *run) dial() error {
	again := grpc.WithConnectParams(grpc.ConnectParams{
		Backoff:           backoff.Config{BaseDelay: 5 * time.Millisecond, Multiplier: 1.2, Jitter: 0.2, MaxDelay: 30 * time.Millisecond},
		MinConnectTimeout: time.Second,
	})
	for range 3 {
		c, err := grpc.NewClient("passthrough:///"+r.spec.Addr, grpc.WithTransportCredentials(insecure.NewCredentials()), again,
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<30)))
		if err != nil {
			return err
		}
		r.conns = append(r.conns, c)
	}
	r.load = &load{kv: pb.NewKVClient(r.conns[0]), lease: pb.NewLeaseClient(r.conns[1])}
	var err error
	r.v3, err = clientv3.New(clientv3.Config{
		Endpoints: []string{r.spec.Addr}, DialOptions: []grpc.DialOption{again}, Logger: zap.NewNop(),
	})
	return err
}

func (r *run) makeClients() {
	add := func(c *client, act func(*client, context.Context) error) {
		r.clients = append(r.clients, c)
		r.acts[c] = act
	}
	for i := range writers {
		add(newWriter(r.load, fmt.Sprintf("w%d", i), r.child()), writeSomething)
	}
	for i := range leasers {
		c := &client{load: r.load, name: fmt.Sprintf("l%d", i), rng: r.child(), leaseBase: int64(i+1) << 32}
		add(c, leaseSomething)
	}
	for i := range readers {
		add(&client{load: r.load, name: fmt.Sprintf("r%d", i), rng: r.child()}, readSomething)
	}
	add(&client{load: r.load, name: "compactor", rng: r.child(), compacted: r.seenByAll}, compactSomething)
}

// child is a random source of its own for one client, so that a seed draws the same for it in every run.
func (r *run) child() *rand.Rand { return rand.New(rand.NewPCG(r.o.seed, r.rng.Uint64())) }

func (r *run) startWatchers() {
	all := newWatcher("all+prev", everything, everything)
	all.prevKV = true
	fragments := newWatcher("all+fragments", everything, everything)
	fragments.fragment = true
	prefix := newWatcher("prefix w1+progress", "w1/", "w10")
	prefix.progress = true
	single := newWatcher("key s/0+progress", "s/0", "")
	single.progress = true
	v3 := newWatcher("clientv3", everything, everything)
	r.watchers = []*watcher{all, fragments, prefix, single, v3}

	ctx, stop := context.WithCancel(context.Background())
	r.stop = stop
	api := pb.NewWatchClient(r.conns[2])
	for _, w := range r.watchers[:4] {
		r.watching.Go(func() { w.run(ctx, api) })
	}
	r.watching.Go(func() { v3.runClientV3(ctx, r.v3) })
}

// seenByAll is the newest revision that every watcher has seen.
func (r *run) seenByAll() int64 {
	low := int64(1 << 62)
	for _, w := range r.watchers {
		seen, _ := w.seen() // a finding of a watcher is reported by caughtUp
		low = min(low, seen)
	}
	return low
}

// close ends everything that the run started. The directory stays if keep is set.
func (r *run) close(keep bool) error {
	r.stop()
	r.watching.Wait()
	if r.p != nil {
		r.p.Kill()
	}
	for _, c := range r.conns {
		if err := c.Close(); err != nil {
			return err
		}
	}
	if err := r.v3.Close(); err != nil && status.Code(err) != codes.Canceled {
		return err
	}
	if keep {
		return nil
	}
	return os.RemoveAll(r.spec.Dir)
}

// all runs every cycle. The error is the first finding.
func (r *run) all() error {
	if err := r.start(); err != nil {
		return err
	}
	if err := r.verify(); err != nil {
		return fmt.Errorf("before the first cycle: %w", err)
	}
	for n := 1; n <= r.o.cycles; n++ {
		m := r.draw()
		r.died[m]++
		if err := r.cycle(n, m); err != nil {
			return fmt.Errorf("cycle %d, killed %s: %w", n, m, err)
		}
		if n%25 == 0 || n == r.o.cycles {
			r.o.logf("%d of %d cycles: revision %d, %d acknowledged writes, %d without an answer happened and %d did not, slowest restart %s",
				n, r.o.cycles, r.model.rev, r.written, r.model.applied, r.model.lost, r.slowest.Round(time.Millisecond))
		}
	}
	return r.finish()
}

func (r *run) draw() manner {
	switch n := r.rng.IntN(20); {
	case n < 11:
		return underLoad
	case n < 15:
		return inStart
	case n < 19:
		return inCompaction
	default:
		return terminated
	}
}

// cycle lets the clients work, kills the server, starts it again and checks everything.
func (r *run) cycle(n int, m manner) error {
	if err := r.work(m); err != nil {
		return err
	}
	if m == inStart {
		for range 1 + r.rng.IntN(3) {
			p, err := proc.Start(r.spec)
			if err != nil {
				return err
			}
			// Anywhere between the first instruction and some moments of service.
			time.Sleep(time.Duration(r.rng.Int64N(int64(250 * time.Millisecond))))
			p.Kill()
		}
	}
	if r.o.checkEvery > 0 && n%r.o.checkEvery == 0 {
		if err := r.check(); err != nil {
			return err
		}
	}
	if err := r.start(); err != nil {
		return err
	}
	return r.verify()
}

// work lets all clients send until the server has been killed.
func (r *run) work(m manner) error {
	r.load.killing.Store(false)
	findings := make(chan error, len(r.clients)+1)
	var working sync.WaitGroup
	for _, c := range r.clients {
		working.Go(func() { findings <- c.run(r.acts[c]) })
	}
	time.Sleep(30*time.Millisecond + time.Duration(r.rng.Int64N(int64(300*time.Millisecond))))
	var early error
	select {
	case <-r.p.Done():
		early = fmt.Errorf("the server ended by itself:\n%s", r.p.LogTail(3000))
	default:
	}
	if m == inCompaction {
		last := &client{load: r.load, name: "last compactor", rng: r.child()}
		working.Go(func() {
			findings <- last.run(func(c *client, ctx context.Context) error {
				if err := c.compactAt(ctx, r.seenByAll()); err != nil {
					return err
				}
				return errCrashed // once is enough
			})
		})
		time.Sleep(time.Duration(r.rng.Int64N(int64(8 * time.Millisecond))))
	}
	r.load.killing.Store(true)
	if m == terminated {
		if err := r.p.Stop(20 * time.Second); err != nil {
			early = err
		}
	} else {
		r.p.Kill()
	}
	working.Wait()
	close(findings)
	for err := range findings {
		if err != nil && early == nil {
			early = err
		}
	}
	return early
}

// start starts the server and waits until it answers a linearizable read.
func (r *run) start() error {
	p, err := proc.Start(r.spec)
	if err != nil {
		return err
	}
	r.p = p
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := p.Wait(ctx, func(ctx context.Context) error {
		_, err := r.load.kv.Range(ctx, &pb.RangeRequest{Key: []byte("s/0")})
		return err
	}); err != nil {
		return err
	}
	r.slowest = max(r.slowest, time.Since(p.Started))
	return nil
}

// verify checks the restarted server. No client is at work; leases may end meanwhile.
func (r *run) verify() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	full, err := r.load.kv.Range(ctx, &pb.RangeRequest{Key: []byte(everything), RangeEnd: []byte(everything)})
	if err != nil {
		return fmt.Errorf("reading everything: %w", err)
	}
	rev := full.Header.Revision
	if newest := r.load.newest.Load(); rev < newest {
		return fmt.Errorf("the revision went back: %d had been served, now it is %d", newest, rev)
	}
	r.load.told(rev)
	state := map[string]*mvccpb.KeyValue{}
	for _, kv := range full.Kvs {
		state[string(kv.Key)] = kv
	}
	for _, c := range r.clients {
		if err := c.settle(state); err != nil {
			return err
		}
	}
	if err := r.caughtUp(ctx, rev); err != nil {
		return err
	}
	old, err := r.replay(rev)
	if err != nil {
		return err
	}
	if err := r.model.compare(full.Kvs); err != nil {
		return fmt.Errorf("at revision %d: %w", rev, err)
	}
	if old != nil {
		if err := r.verifyOld(ctx, old); err != nil {
			return err
		}
	}
	if err := r.verifyCompaction(ctx); err != nil {
		return err
	}
	return r.verifyLeases(ctx)
}

// caughtUp waits until every watcher has seen the revision.
func (r *run) caughtUp(ctx context.Context, rev int64) error {
	for _, w := range r.watchers {
		for {
			seen, err := w.seen()
			if err != nil {
				return err
			}
			if seen >= rev {
				break
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("watcher %s does not catch up: it has seen revision %d, the store is at %d", w.name, seen, rev)
			case <-r.p.Done():
				return fmt.Errorf("the server ended by itself:\n%s", r.p.LogTail(3000))
			case <-time.After(time.Millisecond):
			}
		}
	}
	return nil
}

// replay feeds the model with what the first watcher received up to rev, and compares the others with it. It returns
// the state at a random revision on the way that is not compacted, if there is one.
func (r *run) replay(rev int64) (*model, error) {
	writes, checks := r.load.take()
	for _, w := range writes {
		if err := r.model.sent(w); err != nil {
			return nil, err
		}
		if w.outcome == acknowledged {
			r.written++
		}
	}
	r.model.checks = append(r.model.checks, checks...)

	events := r.watchers[0].take(rev)
	for _, w := range r.watchers[1:] {
		if err := sameHistory(events, w, w.take(rev)); err != nil {
			return nil, err
		}
	}
	var old *model
	if from := max(r.model.rev, r.seenByAll()-100); from < rev {
		at := from + 1 + r.rng.Int64N(rev-from)
		r.model.checks = append(r.model.checks, check{rev: at, what: func(m *model) error {
			old = m.clone()
			return nil
		}})
	}
	if err := r.model.replay(events, rev); err != nil {
		return nil, err
	}
	return old, nil
}

// sameHistory compares a watcher's events with those of the first watcher that concern it.
func sameHistory(all []event, w *watcher, got []event) error {
	for _, e := range all {
		if !w.matches(e.key) {
			continue
		}
		if len(got) == 0 {
			return fmt.Errorf("watcher %s lost %s", w.name, e)
		}
		if !got[0].same(e) {
			return fmt.Errorf("watcher %s received %s where %s was due", w.name, got[0], e)
		}
		got = got[1:]
	}
	if len(got) > 0 {
		return fmt.Errorf("watcher %s received %s, another one did not", w.name, got[0])
	}
	return nil
}

// verifyOld reads the state at an older revision. A compaction that had no answer may have taken it away.
func (r *run) verifyOld(ctx context.Context, old *model) error {
	past, err := r.load.kv.Range(ctx, &pb.RangeRequest{Key: []byte(everything), RangeEnd: []byte(everything), Revision: old.rev})
	if status.Code(err) == codes.OutOfRange && old.rev < r.load.asked.Load() {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading at revision %d: %w", old.rev, err)
	}
	if err := old.compare(past.Kvs); err != nil {
		return fmt.Errorf("read at the older revision %d: %w", old.rev, err)
	}
	return nil
}

// verifyCompaction asks for a revision below an acknowledged compaction: it must stay gone.
func (r *run) verifyCompaction(ctx context.Context) error {
	done := r.load.compact.Load()
	if done < 2 {
		return nil
	}
	_, err := r.load.kv.Range(ctx, &pb.RangeRequest{Key: []byte("s/0"), Revision: done - 1})
	if status.Code(err) != codes.OutOfRange || !strings.Contains(status.Convert(err).Message(), "compacted") {
		return fmt.Errorf("compaction at %d was acknowledged, but a read at %d is answered with: %v", done, done-1, err)
	}
	return nil
}

func (r *run) verifyLeases(ctx context.Context) error {
	list, err := r.load.lease.LeaseLeases(ctx, &pb.LeaseLeasesRequest{})
	if err != nil {
		return fmt.Errorf("listing leases: %w", err)
	}
	listed := map[int64]bool{}
	for _, l := range list.Leases {
		listed[l.ID] = true
	}
	alive, err := r.model.leases.verify(listed)
	if err != nil {
		return err
	}
	// etcd gives every lease its whole TTL again when it starts; here the deadline counts.
	if late := r.model.leases.overdue(listed); r.o.keepsDeadlines() && late > overdueLimit {
		return fmt.Errorf("a lease has been due for %s and is still there", late)
	}
	for _, l := range alive {
		if r.rng.IntN(4) != 0 {
			continue
		}
		if err := r.verifyLease(ctx, l); err != nil {
			return fmt.Errorf("lease %d of %s: %w", l.id, l.ttl, err)
		}
	}
	return nil
}

func (r *run) verifyLease(ctx context.Context, l *lease) error {
	asked := time.Now()
	ttl, err := r.load.lease.LeaseTimeToLive(ctx, &pb.LeaseTimeToLiveRequest{ID: l.id, Keys: true})
	if err != nil {
		return err
	}
	granted := int64(l.ttl / time.Second)
	if ttl.GrantedTTL != granted || ttl.TTL <= 0 || ttl.TTL > granted {
		return fmt.Errorf("it was granted for %d s, the server says %d s and %d s left", granted, ttl.GrantedTTL, ttl.TTL)
	}
	// A second for rounding. etcd begins anew at a restart, see above.
	if most := l.ttl - asked.Sub(l.latest) + time.Second; r.o.keepsDeadlines() && time.Duration(ttl.TTL)*time.Second > most {
		return fmt.Errorf("its deadline did not survive the restart: %d s left, %s at most are right", ttl.TTL, most)
	}
	want := r.model.sorted(func(kv *mvccpb.KeyValue) bool { return kv.Lease == l.id })
	got := map[string]bool{}
	for _, k := range ttl.Keys {
		got[string(k)] = true
	}
	if len(got) != len(want) || len(ttl.Keys) != len(want) {
		return fmt.Errorf("it has %d keys, the server says %d", len(want), len(ttl.Keys))
	}
	for _, k := range want {
		if !got[k] {
			return fmt.Errorf("the server does not say that key %q is attached", k)
		}
	}
	return nil
}

// check runs `quire check` on the database of the killed server.
func (r *run) check() error {
	out, err := exec.Command(r.o.binary, "check", "--data-dir="+r.spec.DataDir()).CombinedOutput()
	if err != nil {
		return fmt.Errorf("check of the database: %w\n%s", err, out)
	}
	r.checked++
	return nil
}

// finish waits until every short lease has ended with its keys, stops the server in order and checks once more.
func (r *run) finish() error {
	deadline := time.Now().Add(30 * time.Second)
	for {
		if err := r.verify(); err != nil {
			return fmt.Errorf("at the end: %w", err)
		}
		left := r.model.leases.short()
		if left == 0 {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d leases of %s have not ended 30 s after the last restart", left, shortTTL)
		}
		time.Sleep(200 * time.Millisecond) // leases end by the clock
	}
	if err := r.p.Stop(20 * time.Second); err != nil {
		return err
	}
	if r.o.checkEvery > 0 {
		return r.check()
	}
	return nil
}

func (r *run) summary() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: revision %d, %d acknowledged writes found, %d without an answer happened, %d did not; killed",
		filepath.Base(r.o.binary), r.model.rev, r.written, r.model.applied, r.model.lost)
	for _, m := range []manner{underLoad, inStart, inCompaction, terminated} {
		fmt.Fprintf(&b, " %d× %s,", r.died[m], m)
	}
	fmt.Fprintf(&b, " %d database checks, slowest restart %s; streams of the watchers:", r.checked, r.slowest.Round(time.Millisecond))
	for _, w := range r.watchers[:4] { // clientv3 does not tell
		fmt.Fprintf(&b, " %s %d,", w.name, w.streams())
	}
	return strings.TrimSuffix(b.String(), ",")
}
