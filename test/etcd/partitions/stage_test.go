//go:build linux

package partitions

import (
	"context"
	"flag"
	"fmt"
	"hash/fnv"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/test/etcd/partitions/cluster"
	"github.com/quire-db/quire/test/etcd/partitions/network"
)

// Default timers: a heartbeat every 100 ms, an election after 1 to 2 s without one.
const (
	// bound is how soon writes must go on after a fault that leaves a majority. It is generous, as several clusters
	// share the cores; the failover program beside this package measures.
	bound = 6 * time.Second
	// patience is for what takes as long as it takes, but hangs beyond.
	patience = 40 * time.Second
)

func TestMain(m *testing.M) {
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if !given {
		// The tests mostly wait, but a cluster is three to five processes.
		if err := flag.Set("test.parallel", "3"); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

// server is the binary under test.
func server(t *testing.T) string {
	t.Helper()
	for _, name := range []string{"QUIRE_TEST_SERVER", "QUIRE_BIN"} {
		if path := os.Getenv(name); path != "" {
			return path
		}
	}
	_, file, _, ok := runtime.Caller(0)
	if !ok {
		t.Fatal("cannot find the repository; set QUIRE_BIN")
	}
	path := filepath.Join(filepath.Dir(file), "..", "..", "..", "bin", "quire")
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("no quire binary: %v; build it with `make build` or set QUIRE_BIN", err)
	}
	return path
}

func isEtcd(t *testing.T) bool { return filepath.Base(server(t)) == "etcd" }

// newSeed is $QUIRE_SEED, or a new one.
func newSeed(t *testing.T) uint64 {
	t.Helper()
	seed := rand.Uint64()
	if text := os.Getenv("QUIRE_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("QUIRE_SEED: %v", err)
		}
	}
	return seed
}

// draws are those of a seed, which differ from test to test.
func draws(t *testing.T, seed uint64) uint64 {
	t.Helper()
	t.Logf("repeat with QUIRE_SEED=%d", seed)
	top, _, _ := strings.Cut(t.Name(), "/")
	name := fnv.New64a()
	name.Write([]byte(top))
	return seed ^ name.Sum64()
}

// setup is what a test wants. The zero setup is three members under load.
type setup struct {
	members int
	spare   int
	flags   []string
	peerTLS bool
	// majority is lost at some time, so that leases which are renewed may end.
	losesMajority bool
	pause         time.Duration // of a client between two requests
	weak          bool          // see clients
	learns        bool          // a member is a learner for a while
}

// stage is a cluster with all its clients, and what they know.
type stage struct {
	*testing.T
	*cluster.Cluster
	setup
	ctx     context.Context
	seed    uint64
	random  *rand.Rand
	record  *record
	clients *clients
	leases  *leases
	present atomic.Pointer[[]*cluster.Member] // Cluster.Members, for other goroutines
	watches []*watching
	slowest time.Duration // that writes took to go on after a fault
	lost    int64         // packets, until the last heal
	paused  bool          // a leader was
	term    uint64        // in which the clients began
}

const clientsPerMember = 3

// begin starts a cluster and its clients, beside those of other tests. The test ends with finish.
func begin(t *testing.T, o setup) *stage {
	t.Helper()
	needRoot(t)
	t.Parallel()
	return beginWith(t, o, newSeed(t))
}

// needRoot fails the test where it cannot run, unless QUIRE_NO_NAMESPACES=1 allows to skip it.
func needRoot(t *testing.T) {
	t.Helper()
	switch {
	case os.Geteuid() == 0:
	case os.Getenv("QUIRE_NO_NAMESPACES") == "1":
		t.Skip("network namespaces need root")
	default:
		t.Fatal("network namespaces need root (QUIRE_NO_NAMESPACES=1 skips the test)")
	}
}

func beginWith(t *testing.T, o setup, seed uint64) *stage {
	t.Helper()
	seed = draws(t, seed)
	if o.members == 0 {
		o.members = 3
	}
	if o.pause == 0 {
		o.pause = 40 * time.Millisecond
	}
	s := &stage{T: t, setup: o, ctx: t.Context(), seed: seed, random: rand.New(rand.NewPCG(seed, 0)), record: newRecord()}
	dir := directory(t)
	c, err := cluster.Start(s.within(patience), cluster.Options{
		Binary: server(t), Dir: dir, Members: o.members, Spare: o.spare, Flags: o.flags, PeerTLS: o.peerTLS, Seed: seed,
	})
	if err != nil {
		t.Fatal(err)
	}
	s.Cluster = c
	t.Cleanup(func() { s.end(dir) })

	status, err := c.Members[0].Status(s.within(patience), patience)
	s.must(err)
	s.term = status.RaftTerm
	s.clients = newClients(s.ctx, s.record, o.pause)
	s.clients.weak = o.weak
	s.leases = newLeases(s.record, seed, func() []*cluster.Member { return *s.present.Load() })
	s.know()
	for _, m := range c.Members {
		s.attach(m)
		if err := s.leases.keep(s.ctx, m); err != nil {
			t.Fatal(err)
		}
	}
	s.leases.leave(s.ctx)
	s.during(time.Second)
	return s
}

// know tells the other goroutines who is there.
func (s *stage) know() {
	members := s.Members
	s.present.Store(&members)
}

// attach gives a member its clients and watchers.
func (s *stage) attach(m *cluster.Member) {
	s.clients.begin(m, clientsPerMember, s.seed)
	s.watches = append(s.watches, watch(s.ctx, s.record, m, false), watch(s.ctx, s.record, m, true))
}

// detach ends the clients and watchers of a member that is none any more.
func (s *stage) detach(m *cluster.Member) {
	s.clients.leave(m)
	for _, w := range s.watches {
		if w.member == m {
			w.stop()
		}
	}
}

// end takes the cluster down, also that of a test that has failed.
func (s *stage) end(dir string) {
	s.clients.stop()
	for _, w := range s.watches {
		w.stop()
	}
	s.Heal()
	if s.Failed() {
		s.Logf("%s", summary(s.record.operations()))
		s.Log(s.Logs())
	}
	if err := s.Complaints(); err != nil {
		s.Error(err)
	}
	if err := s.Stop(); err != nil {
		s.Errorf("stop the cluster: %v", err)
	}
	if to := artifacts(s.T); to != "" {
		s.keep(dir, to)
	}
}

// keep copies the logs, and of a test that has failed the data too.
func (s *stage) keep(dir, to string) {
	files := os.DirFS(dir)
	if s.Failed() {
		if err := os.CopyFS(to, files); err != nil {
			s.Errorf("keep the data and logs: %v", err)
		}
		s.Logf("data and logs are in %s", to)
		return
	}
	logs, err := fs.Glob(files, "*.log")
	if err != nil {
		s.Error(err)
	}
	for _, name := range logs {
		log, err := fs.ReadFile(files, name)
		if err == nil {
			err = os.WriteFile(filepath.Join(to, name), log, 0o600)
		}
		if err != nil {
			s.Errorf("keep the logs: %v", err)
		}
	}
}

// artifacts is where this test leaves what it has to show; "" is nowhere.
func artifacts(t *testing.T) string {
	t.Helper()
	to := os.Getenv("QUIRE_ARTIFACTS")
	if to == "" {
		return ""
	}
	to = filepath.Join(to, fmt.Sprintf("%s-%d", t.Name(), os.Getpid()))
	if err := os.MkdirAll(to, 0o700); err != nil {
		t.Error(err)
	}
	return to
}

// directory goes away with the test. It is in memory where that is possible: the machine does not crash here.
func directory(t *testing.T) string {
	t.Helper()
	base := os.Getenv("TMPDIR")
	if base == "" {
		if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() {
			base = "/dev/shm"
		}
	}
	dir, err := os.MkdirTemp(base, "partitions-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove the test's directory: %v", err)
		}
	})
	return dir
}

func (s *stage) within(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(s.ctx, d)
	s.Cleanup(cancel)
	return ctx
}

// must ends the test on an error.
func (s *stage) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatalf("at %v: %v", s.record.now().Round(time.Millisecond), err)
	}
}

// note writes what was done into the test's log, and when.
func (s *stage) note(format string, args ...any) {
	s.Helper()
	s.Logf("%6.2f s: %s", s.record.now().Seconds(), fmt.Sprintf(format, args...))
}

// during lets the clients work for a while.
func (s *stage) during(d time.Duration) {
	s.Helper()
	from := s.record.now()
	time.Sleep(d)
	writes, failed := acknowledged(s.record.operations(), from, s.record.now())
	s.note("in %v: %d writes acknowledged, %d operations failed", d, writes, failed)
}

func (s *stage) leader() *cluster.Member {
	s.Helper()
	m, err := s.Leader(s.within(patience))
	s.must(err)
	return m
}

// draw picks n of the members.
func (s *stage) draw(n int, of []*cluster.Member) []*cluster.Member {
	all := slices.Clone(of)
	s.random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all[:n]
}

func (s *stage) follower() *cluster.Member { return s.draw(1, s.Others(s.leader()))[0] }

// writesGoOn makes sure that writes through each of these members are acknowledged again, within the bound, and counts from
// now on.
func (s *stage) writesGoOn(through ...*cluster.Member) {
	s.Helper()
	began := s.record.now()
	took := make(chan time.Duration, len(through))
	for _, m := range through {
		one := s.clients.client(m, s.seed)
		go func() {
			ctx, cancel := context.WithTimeout(s.ctx, patience)
			defer cancel()
			for ctx.Err() == nil {
				// It is tried again all the time, and what takes long is not waited for.
				o := &operation{kind: put, key: register(one.random.IntN(numRegisters))}
				if one.do(ctx, o, 500*time.Millisecond); o.err == nil {
					break
				}
				time.Sleep(20 * time.Millisecond)
			}
			took <- s.record.now() - began
		}()
	}
	first, last := patience, time.Duration(0)
	for range through {
		d := <-took
		first, last = min(first, d), max(last, d)
	}
	s.slowest = max(s.slowest, last)
	s.note("writes go on through %s after %v to %v", names(through), first.Round(time.Millisecond), last.Round(time.Millisecond))
	if last > bound {
		s.Errorf("writes through %s go on after %v, want within %v", names(through), last.Round(time.Millisecond), bound)
	}
}

// ready waits until members serve linearizable reads.
func (s *stage) ready(members ...*cluster.Member) {
	s.Helper()
	began := time.Now()
	s.must(s.Ready(s.within(patience), members...))
	s.note("%s serve after %v", names(members), time.Since(began).Round(time.Millisecond))
}

// heal makes the network whole after a fault, which must have been one, and waits until everybody serves.
func (s *stage) heal() {
	s.Helper()
	lost := s.Network.Lost()
	s.note("heal; %d packets were lost", lost-s.lost)
	if lost == s.lost {
		s.Error("no packet was lost: there was no fault")
	}
	s.lost = lost
	s.Heal()
	s.ready(s.Members...)
}

func names(members []*cluster.Member) string {
	var all []string
	for _, m := range members {
		all = append(all, m.Name)
	}
	return strings.Join(all, ", ")
}

// lines sets every line between two groups of members, one way.
func (s *stage) lines(from, to []*cluster.Member, l network.Line) {
	for _, a := range from {
		for _, b := range to {
			if a != b {
				s.Set(a, b, l)
			}
		}
	}
}

func group(members ...*cluster.Member) []*cluster.Member { return members }

// finish heals, lets the clients work on for a moment, ends them, and compares everything with everything.
func (s *stage) finish() {
	s.Helper()
	history, last := s.settle()
	s.complain(account(s.record.operations(), history, last)...)
	if err := linear(s.record.operations(), history, time.Minute, artifacts(s.T)); err != nil {
		s.Error(err)
	}
	s.note("revision %d; %s; %d leases; writes went on after at most %v; the network lost %d packets", last,
		summary(s.record.operations()), len(s.leases.mu.all), s.slowest.Round(time.Millisecond), s.Network.Lost())
}

// settle is finish without the checks of what clients read and wrote. It returns the history of the store.
func (s *stage) settle() (history []*mvccpb.Event, last int64) {
	s.Helper()
	s.Heal()
	s.ready(s.Members...)
	s.during(time.Second)
	s.leases.stopGranting()
	s.clients.stop()
	s.must(s.leases.gone(s.within(patience), s.Members[0]))
	s.sameLeases()
	s.must(s.leases.revoke(s.within(patience), s.draw(1, s.Members)[0]))
	last = s.sameRevision()
	history = s.sameEvents(last)
	s.sameMembers()
	for _, w := range s.watches {
		if !slices.Contains(s.Members, w.member) {
			continue // it was removed
		}
		if err := w.wait(s.within(patience), last); err != nil {
			s.Error(err)
		}
		w.stop()
		s.complain(w.complete(history)...)
	}
	s.sameHashes(last)
	var expected []string
	if isEtcd(s.T) {
		// By one that was removed, and by one that hands over.
		expected = append(expected, "raft: stopped", "raft proposal dropped")
	}
	if s.learns {
		expected = append(expected, status.Convert(rpctypes.ErrGRPCNotSupportedForLearner).Message())
	}
	s.complain(misnamed(s.record.operations(), expected...)...)
	wrong := s.leases.account(history, earliest(s.watches), !s.losesMajority, s.grace())
	if isEtcd(s.T) && s.paused {
		// EtcdServer.ensureLeadership trusts the tick that comes before the news of a newer leader.
		s.note("etcd does that, now and then: %q", wrong)
	} else {
		s.complain(wrong...)
	}
	return history, last
}

// grace is how long after its TTL a lease may still be there; 0 is any time. In each new term it gets its time again, or ten
// seconds of it, besides the time that nobody led.
func (s *stage) grace() time.Duration {
	s.Helper()
	if s.losesMajority {
		return 0
	}
	status, err := s.Members[0].Status(s.within(patience), patience)
	s.must(err)
	return 3*time.Second + time.Duration(status.RaftTerm-s.term)*(leftTTL*time.Second+bound)
}

// complain fails the test with what is wrong, but does not flood its log.
func (s *stage) complain(wrong ...string) {
	s.Helper()
	const most = 10
	for i, w := range wrong {
		if i == most {
			s.Errorf("… and %d complaints more", len(wrong)-most)
			return
		}
		s.Error(w)
	}
}
