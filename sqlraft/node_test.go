package sqlraft

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/quire-db/quire/backend"
	"github.com/quire-db/quire/test/ports"
)

// nodeCluster is a few nodes in this process that talk over real sockets.
type nodeCluster struct {
	t       testing.TB
	o       Options // of all of them
	initial backend.Membership
	members []*nodeMember
}

type nodeMember struct {
	c       *nodeCluster
	id      uint64
	name    string
	dir     string
	address string
	machine StateMachine
	list    *listMachine // machine, unless a test has its own
	node    *Node        // nil while it is down
	seen    struct {
		sync.Mutex
		lost, readmitted, installed int
	}
}

func newNodeCluster(t testing.TB, size int, o Options) *nodeCluster {
	o.Tick = 20 * time.Millisecond
	o.PreVote, o.InitialElectionTickAdvance, o.StrictReconfigCheck = true, true, true
	o.MaxLearners = 2
	c := &nodeCluster{t: t, o: o}
	var ids []uint64
	for i := range size {
		m := c.add(fmt.Sprint("n", i+1))
		m.id = MemberID(m.urls(), "token")
		ids = append(ids, m.id)
		c.initial.Members = append(c.initial.Members, backend.Member{ID: m.id, Name: m.name, PeerURLs: m.urls()})
	}
	c.initial.ClusterID = ClusterID(ids)
	sortByID(c.initial.Members)
	t.Cleanup(func() {
		for _, m := range c.members {
			m.stop()
		}
	})
	return c
}

func (c *nodeCluster) add(name string) *nodeMember {
	m := &nodeMember{c: c, name: name, dir: c.t.TempDir(), address: ports.FreeAddress(c.t), list: new(listMachine)}
	m.machine = m.list
	c.members = append(c.members, m)
	return m
}

func (m *nodeMember) urls() []string { return []string{"http://" + m.address} }

func (m *nodeMember) start(change func(*Options)) {
	m.c.t.Helper()
	if err := m.tryStart(change); err != nil {
		m.c.t.Fatal(err)
	}
}

func (m *nodeMember) tryStart(change func(*Options)) error {
	m.c.t.Helper()
	l, err := net.Listen("tcp", m.address)
	if err != nil {
		m.c.t.Fatal(err)
	}
	o := m.c.o
	o.Dir, o.InstallPath = filepath.Join(m.dir, "raft"), filepath.Join(m.dir, "quire.db.install")
	o.ID, o.Name, o.ClientURLs, o.Membership = m.id, m.name, []string{"http://client/" + m.name}, m.c.initial
	o.Listeners = []net.Listener{l}
	count := func(n *int) {
		m.seen.Lock()
		defer m.seen.Unlock()
		*n++
	}
	o.Hooks.Lost = func() { count(&m.seen.lost) }
	o.Hooks.Readmitted = func(err error) {
		if err == nil {
			count(&m.seen.readmitted)
		}
	}
	o.Hooks.SnapshotInstalled = func(uint64, time.Duration) { count(&m.seen.installed) }
	if change != nil {
		change(&o)
	}
	m.node, err = Open(o, m.machine)
	return err
}

func (m *nodeMember) stop() {
	if m.node == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := m.node.Stop(ctx); err != nil {
		m.c.t.Errorf("stopping %s: %v", m.name, err)
	}
	m.node = nil
}

func (c *nodeCluster) startAll() {
	for _, m := range c.members {
		m.start(nil)
	}
}

// until waits for something that has to come true.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("after 20 s still not: %s", what)
		}
		time.Sleep(2 * time.Millisecond) // nothing tells of this
	}
}

// leader waits for one, whom a majority of those that are up follow.
func (c *nodeCluster) leader() (found *nodeMember) {
	c.t.Helper()
	until(c.t, "a leader", func() bool {
		votes := map[uint64]int{}
		for _, m := range c.members {
			if m.node != nil {
				votes[m.node.Status().Leader]++
			}
		}
		for _, m := range c.members {
			if m.node != nil && votes[m.id] > len(c.initial.Members)/2 && m.node.Status().Leader == m.id {
				found = m
			}
		}
		return found != nil
	})
	return found
}

func (m *nodeMember) write(what string) listAnswer {
	ticket := newListTicket()
	m.node.Propose([]byte(what), ticket)
	return <-ticket.answer
}

func (m *nodeMember) mustWrite(what string) {
	m.c.t.Helper()
	if a := m.write(what); a.err != nil {
		m.c.t.Fatalf("writing %s at %s: %v", what, m.name, a.err)
	}
}

// same waits until everybody who is up has the same list of that length.
func (c *nodeCluster) same(length int) {
	c.t.Helper()
	var first []string
	until(c.t, fmt.Sprintf("all have the same %d writes", length), func() bool {
		first = nil
		for _, m := range c.members {
			if m.node == nil {
				continue
			}
			list := m.list.list()
			if first == nil {
				first = list
			}
			if len(list) != length || !slices.Equal(first, list) {
				return false
			}
		}
		return true
	})
	seen := map[string]bool{}
	for _, w := range first {
		if seen[w] {
			c.t.Fatalf("%s was applied twice", w)
		}
		seen[w] = true
	}
}

func TestNodesTakeWritesAnywhere(t *testing.T) {
	c := newNodeCluster(t, 3, Options{})
	c.startAll()
	c.leader()
	var wg sync.WaitGroup
	const writers, each = 8, 50
	for _, m := range c.members {
		for w := range writers {
			wg.Go(func() {
				for i := range each {
					m.mustWrite(fmt.Sprint(m.name, " ", w, " ", i))
				}
			})
		}
	}
	wg.Wait()
	c.same(3 * writers * each)
	for _, m := range c.members {
		index, err := m.node.ReadIndex(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := m.node.waitApplied(t.Context(), index); err != nil {
			t.Fatal(err)
		}
		if n := len(m.list.list()); n != 3*writers*each {
			t.Errorf("%s: a linearizable read sees %d writes", m.name, n)
		}
	}
	until(t, "all are published", func() bool {
		all, err := c.members[0].node.Members(t.Context(), true)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range all {
			if len(m.ClientURLs) != 1 {
				return false
			}
		}
		return len(all) == 3
	})
}

func TestALeaderThatStopsHandsOver(t *testing.T) {
	c := newNodeCluster(t, 3, Options{})
	c.startAll()
	for range 3 {
		old := c.leader()
		old.mustWrite(fmt.Sprint("before ", time.Now()))
		term := old.node.Status().Term
		start := time.Now()
		old.stop()
		if took := time.Since(start); took > 1500*time.Millisecond {
			t.Errorf("the leader took %v to stop", took)
		}
		next := c.leader()
		if took := time.Since(start); took > 500*time.Millisecond {
			t.Errorf("the next leader was there after %v", took)
		}
		if got := next.node.Status().Term; got != term+1 {
			t.Errorf("term %d follows %d", got, term)
		}
		next.mustWrite(fmt.Sprint("after ", time.Now()))
		old.start(nil)
	}
	c.same(6)
}

// TestAllStopTogether: nobody waits for a successor that cannot be elected.
func TestAllStopTogether(t *testing.T) {
	c := newNodeCluster(t, 3, Options{})
	for range 5 {
		c.startAll()
		c.leader().mustWrite(fmt.Sprint(time.Now()))
		start := time.Now()
		var all sync.WaitGroup
		for _, m := range c.members {
			all.Go(m.stop)
		}
		all.Wait()
		if took := time.Since(start); took > time.Second {
			t.Errorf("stopping took %v", took)
		}
	}
}

// TestWritesOutliveLeaders: who writes while leaders come and go sees delays, and each write once.
func TestWritesOutliveLeaders(t *testing.T) {
	c := newNodeCluster(t, 3, Options{})
	c.startAll()
	c.leader()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var mu sync.Mutex
	written, unknown := 0, 0
	for w := range 4 {
		wg.Go(func() {
			m := c.members[w%2] // the third one is stopped and started
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				a := m.write(fmt.Sprint(w, " ", i))
				mu.Lock()
				if a.err == nil {
					written++
				} else {
					unknown++
				}
				mu.Unlock()
			}
		})
	}
	for range 5 {
		until(t, "the third leads", func() bool {
			lead := c.leader()
			if lead == c.members[2] {
				return true
			}
			_ = lead.node.MoveLeader(t.Context(), c.members[2].id) // again, if it did not work
			return false
		})
		// As if it crashed: nobody is asked to take over.
		c.members[2].node.cancel()
		<-c.members[2].node.looping
		c.members[2].stop()
		c.leader()
		c.members[2].start(nil)
	}
	close(stop)
	wg.Wait()
	if unknown > 0 {
		t.Errorf("%d writes failed, %d did not", unknown, written)
	}
	c.same(written)
}

func TestMembersComeAndGo(t *testing.T) {
	c := newNodeCluster(t, 1, Options{CatchUpEntries: 10})
	c.startAll()
	first := c.members[0]
	c.leader()
	for i := range 100 {
		first.mustWrite(fmt.Sprint(i))
	}
	ctx := t.Context()
	if _, err := first.node.RemoveMember(ctx, first.id); !errors.Is(err, rpctypes.ErrGRPCMemberNotEnoughStarted) {
		t.Errorf("removing the only member: %v", err)
	}
	learner := c.add("n2")
	added, all, err := first.node.AddMember(ctx, learner.urls(), true)
	if err != nil || len(all) != 2 || !added.Learner {
		t.Fatalf("adding a learner: %+v %+v %v", added, all, err)
	}
	if _, _, err := first.node.AddMember(ctx, append(learner.urls(), "http://another"), true); !errors.Is(err, rpctypes.ErrGRPCPeerURLExist) {
		t.Errorf("adding the same URLs again: %v", err)
	}
	if _, err := first.node.PromoteMember(ctx, added.ID); !errors.Is(err, rpctypes.ErrGRPCLearnerNotReady) {
		t.Errorf("promoting a learner that has never started: %v", err)
	}
	if _, err := first.node.PromoteMember(ctx, 12345); !errors.Is(err, rpctypes.ErrGRPCMemberNotFound) {
		t.Errorf("promoting nobody: %v", err)
	}
	learner.id = added.ID
	join := func(o *Options) {
		o.Joining, o.Membership = true, backend.Membership{ClusterID: c.initial.ClusterID, Members: all}
	}
	learner.start(join)
	c.same(100)
	if s := learner.node.Status(); !s.Learner {
		t.Errorf("the learner's status is %+v", s)
	}
	until(t, "the learner asks for its promotion and gets it", func() bool {
		_, err := learner.node.PromoteMember(ctx, learner.id)
		if err != nil && !errors.Is(err, rpctypes.ErrGRPCLearnerNotReady) {
			t.Fatal(err)
		}
		return err == nil
	})
	learner.mustWrite("as a voter")
	c.same(101)
	if _, _, err := first.node.AddMember(ctx, []string{"http://nobody"}, false); !errors.Is(err, rpctypes.ErrGRPCUnhealthy) {
		t.Errorf("adding a voter right after a promotion: %v", err)
	}
	if _, err := first.node.UpdateMember(ctx, learner.id, []string{"http://" + learner.address, "http://elsewhere"}); err != nil {
		t.Errorf("updating a member: %v", err)
	}
	if err := learner.node.MoveLeader(ctx, learner.id); !errors.Is(err, rpctypes.ErrGRPCNotLeader) {
		t.Errorf("a follower moves the leader: %v", err)
	}
	if err := first.node.MoveLeader(ctx, 12345); !errors.Is(err, rpctypes.ErrGRPCBadLeaderTransferee) {
		t.Errorf("moving the leader to nobody: %v", err)
	}
	if err := first.node.MoveLeader(ctx, learner.id); err != nil {
		t.Fatal(err)
	}
	learner.node.o.StrictReconfigCheck = false
	if _, err := learner.node.RemoveMember(ctx, first.id); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-first.node.Failed():
		if !errors.Is(err, ErrRemoved) {
			t.Errorf("the removed member fails with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the removed member does not notice")
	}
	first.stop()
	// It may have heard of its removal from the other one only.
	err = first.tryStart(nil)
	if err == nil {
		err = <-first.node.Failed()
	} else {
		first.node = nil
	}
	if !errors.Is(err, ErrRemoved) {
		t.Errorf("a removed member starts again: %v", err)
	}
	until(t, "the one that is left takes writes", func() bool { return learner.write("alone").err == nil })
}

// TestAMemberThatWasAwayHearsThatItWasRemoved: from the others, as no entry reaches it any more.
func TestAMemberThatWasAwayHearsThatItWasRemoved(t *testing.T) {
	c := newNodeCluster(t, 3, Options{StrictReconfigCheck: false})
	c.o.StrictReconfigCheck = false
	c.startAll()
	c.leader()
	away := c.members[1]
	away.stop()
	if _, err := c.leader().node.RemoveMember(t.Context(), away.id); err != nil {
		t.Fatal(err)
	}
	away.start(nil)
	select {
	case err := <-away.node.Failed():
		if !errors.Is(err, ErrRemoved) {
			t.Errorf("it fails with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("it does not notice")
	}
}

func TestWhoLagsGetsACopyOfTheState(t *testing.T) {
	c := newNodeCluster(t, 3, Options{CatchUpEntries: 10})
	c.startAll()
	c.leader()
	away := c.members[2]
	away.stop()
	lead := c.leader()
	for i := range 300 {
		lead.mustWrite(fmt.Sprint(i))
	}
	away.start(nil)
	c.same(300)
	until(t, "a copy of the state is installed", func() bool { // which is told after it can be seen
		away.seen.Lock()
		defer away.seen.Unlock()
		return away.seen.installed > 0
	})
	away.mustWrite("after")
	c.same(301)
}

// TestAMemberThatLostItsDiskComesBack: as a learner first, and as a voter once it has caught up.
func TestAMemberThatLostItsDiskComesBack(t *testing.T) {
	c := newNodeCluster(t, 3, Options{CatchUpEntries: 10})
	c.startAll()
	lead := c.leader()
	for i := range 50 {
		lead.mustWrite(fmt.Sprint(i))
	}
	for _, how := range []string{"it knows that it has lost everything", "it is put back from an old copy"} {
		lost := c.members[0]
		if lost == c.leader() {
			lost = c.members[1]
		}
		lost.stop()
		lost.dir = t.TempDir()
		lost.list = new(listMachine)
		lost.machine = lost.list
		before := lost.seen.readmitted
		if how[3] == 'k' {
			lost.start(func(o *Options) { o.Joining, o.Lost = true, true })
		} else {
			// A log that founds the cluster once more is as old as a copy can be.
			lost.start(nil)
		}
		until(t, how+": it is a voter again", func() bool {
			all, err := c.leader().node.Members(t.Context(), false)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range all {
				if m.ID == lost.id {
					lost.seen.Lock()
					defer lost.seen.Unlock()
					return !m.Learner && lost.seen.readmitted > before
				}
			}
			return false
		})
		lost.mustWrite(how)
	}
	c.same(52)
}

func TestForceNewCluster(t *testing.T) {
	c := newNodeCluster(t, 3, Options{})
	c.startAll()
	c.leader()
	last := c.members[0]
	for i := range 10 {
		last.mustWrite(fmt.Sprint(i))
	}
	for _, m := range c.members {
		m.stop()
	}
	last.start(func(o *Options) { o.ForceNewCluster = true })
	last.mustWrite("alone")
	all, err := last.node.Members(t.Context(), true)
	if err != nil || len(all) != 1 || all[0].ID != last.id {
		t.Fatalf("the members are %+v, %v", all, err)
	}
	last.stop()
	last.start(nil)
	last.mustWrite("and again")
	if list := last.list.list(); len(list) != 12 || list[11] != "and again" {
		t.Errorf("%d writes are left: %q", len(list), list)
	}
}

// TestStopFailsWhatWaits: nobody waits for ever.
func TestStopFailsWhatWaits(t *testing.T) {
	c := newNodeCluster(t, 3, Options{})
	m := c.members[0]
	m.start(nil) // alone of three
	ticket := newListTicket()
	m.node.Propose([]byte("x"), ticket)
	read := make(chan error, 1)
	go func() {
		_, err := m.node.ReadIndex(context.Background())
		read <- err
	}()
	time.Sleep(50 * time.Millisecond) // both are waiting then, or nearly
	node := m.node
	m.stop()
	if a := <-ticket.answer; !errors.Is(a.err, rpctypes.ErrGRPCStopped) {
		t.Errorf("the proposal fails with %v", a.err)
	}
	if err := <-read; !errors.Is(err, rpctypes.ErrGRPCStopped) {
		t.Errorf("the read fails with %v", err)
	}
	node.Propose([]byte("y"), ticket)
	if a := <-ticket.answer; !errors.Is(a.err, rpctypes.ErrGRPCStopped) {
		t.Errorf("a proposal to a stopped node fails with %v", a.err)
	}
	if _, err := node.ReadIndex(context.Background()); !errors.Is(err, rpctypes.ErrGRPCStopped) {
		t.Errorf("a read of a stopped node fails with %v", err)
	}
}

// BenchmarkSingleMember is a put of one client on a cluster of one: about a sync of the log.
func BenchmarkSingleMember(b *testing.B) {
	c := newNodeCluster(b, 1, Options{})
	c.startAll()
	c.leader()
	payload := string(make([]byte, 1024))
	for b.Loop() {
		c.members[0].mustWrite(payload)
	}
}

// BenchmarkThreeMembers writes at the leader and at a follower, one client or 64.
func BenchmarkThreeMembers(b *testing.B) {
	payload := string(make([]byte, 1024))
	for _, clients := range []int{1, 64} {
		for _, at := range []string{"leader", "follower"} {
			b.Run(fmt.Sprintf("clients=%d/at=%s", clients, at), func(b *testing.B) {
				c := newNodeCluster(b, 3, Options{})
				c.startAll()
				m := c.leader()
				if at == "follower" {
					m = c.members[(slices.Index(c.members, m)+1)%3]
				}
				m.mustWrite("the first")
				b.SetParallelism(max(1, clients/2)) // of two processors
				if clients == 1 {
					for b.Loop() {
						m.mustWrite(payload)
					}
					return
				}
				b.ResetTimer()
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						m.mustWrite(payload)
					}
				})
			})
		}
	}
}

// TestAnErrorIsNoExpulsion: a sound member asks the leader whether it is still one, in the moment in which that cannot tell,
// because it loses its majority.
func TestAnErrorIsNoExpulsion(t *testing.T) {
	c := newNodeCluster(t, 3, Options{})
	c.startAll()
	lead := c.leader()
	lead.mustWrite("one")
	c.same(1)
	var asks, other *nodeMember
	for _, m := range c.members {
		switch {
		case m == lead:
		case asks == nil:
			asks = m
		default:
			other = m
		}
	}
	other.node.cancel() // it crashes
	<-other.node.looping
	other.stop()
	asked := make(chan struct{})
	// The one that asks hears no heartbeats, and answers none, for 8 s; what it asks goes another way.
	asks.node.call(func(*core) { time.Sleep(8 * time.Second) })
	go func() {
		defer close(asked)
		asks.node.askMembership()
	}()
	<-asked
	lost := make(chan bool, 1)
	asks.node.call(func(c *core) { lost <- c.rejoin.lost })
	if <-lost {
		t.Error("a member of the cluster, whose log lacks nothing, takes itself for lost")
	}
	// Two of three are there and sound.
	until(t, "two of three members can write", func() bool { return lead.write("two").err == nil })
}

// TestAnEmptyDiskElectsNobody: two members are there, of which one has lost its disk and the other was away. Together they
// would be a majority that knows nothing of what was acknowledged.
func TestAnEmptyDiskElectsNobody(t *testing.T) {
	c := newNodeCluster(t, 3, Options{})
	c.startAll()
	c.leader().mustWrite("all know this")
	c.same(1)
	empty, away, knows := c.members[0], c.members[1], c.members[2]
	until(t, "it is known that all were started", func() bool {
		return !slices.ContainsFunc(away.list.Members().Members, func(m backend.Member) bool { return len(m.ClientURLs) == 0 })
	})
	away.stop()
	c.leader().mustWrite("two know this")
	c.same(2)
	empty.stop()
	knows.stop()
	empty.dir, empty.list = t.TempDir(), new(listMachine)
	empty.machine = empty.list
	empty.start(nil)
	away.start(nil)
	time.Sleep(2 * time.Second) // ten election timeouts: nothing happens
	for _, m := range []*nodeMember{empty, away} {
		if s := m.node.Status(); s.Leader != 0 {
			t.Errorf("%s follows %x", m.name, s.Leader)
		}
	}
	knows.start(nil)
	c.leader().mustWrite("all know this too")
	c.same(3)
	until(t, "the one with the empty disk is let in again", func() bool {
		empty.seen.Lock()
		defer empty.seen.Unlock()
		return empty.seen.lost == 1 && empty.seen.readmitted == 1
	})
}

// TestAMemberThatJoinsIsStartedAgain before it has heard anything: it knows whom to ask, without its first flags.
func TestAMemberThatJoinsIsStartedAgain(t *testing.T) {
	c := newNodeCluster(t, 1, Options{})
	c.startAll()
	c.leader().mustWrite("one")
	joins := c.add("n2")
	added, all, err := c.members[0].node.AddMember(t.Context(), joins.urls(), true)
	if err != nil {
		t.Fatal(err)
	}
	joins.id = added.ID
	known := backend.Membership{ClusterID: c.initial.ClusterID, Members: all}
	c.members[0].stop()
	joins.start(func(o *Options) { o.Joining, o.Membership = true, known })
	joins.stop()
	c.members[0].start(nil)
	joins.start(func(o *Options) { o.Membership = backend.Membership{} })
	c.leader().mustWrite("two")
	c.same(2)
}

// TestWhatIsLeftOfACopyGoes once the log goes on without it.
func TestWhatIsLeftOfACopyGoes(t *testing.T) {
	c := newNodeCluster(t, 3, Options{})
	var parts []string
	for _, m := range c.members {
		parts = append(parts, filepath.Join(m.dir, "quire.db.install.0123456789abcdef.part"))
		if err := os.WriteFile(parts[len(parts)-1], nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c.startAll()
	c.leader().mustWrite("one")
	until(t, "no part is left", func() bool {
		return !slices.ContainsFunc(parts, func(p string) bool { _, err := os.Stat(p); return err == nil })
	})
}
