package backend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// cluster is several replicas on one log, which is kept in memory: it is committed as soon as it is written, and never
// loses anything. Who leads is for the test to say.
type cluster struct {
	t *testing.T

	mu      sync.Mutex
	members []*clusterMember
	log     []clusterEntry
	term    uint64
	leader  *clusterMember // nil while it has not applied its first entry
	waiting []clusterProposal
	moved   chan struct{} // closed when there is something new
	delayed func(payload []byte) bool
	kept    []clusterProposal // what delayed has kept
}

type clusterEntry struct {
	Entry
	from    []*clusterMember // of each proposal
	leads   *clusterMember   // it is the first entry of a term
	members *Membership      // it changes the members
}

type clusterProposal struct {
	Proposal
	from *clusterMember
}

// clusterMember is the log as one member sees it.
type clusterMember struct {
	c       *cluster
	path    string
	o       Options
	db      *DB
	stop    chan struct{} // closed to end the process
	ended   chan struct{}
	applied uint64     // as of the last start: who had a ticket for these is gone
	paused  sync.Mutex // held while nothing is applied
	at      uint64     // applied, guarded by paused
}

func newCluster(t *testing.T, options ...Options) *cluster {
	t.Helper()
	c := &cluster{t: t, moved: make(chan struct{})}
	for _, o := range options {
		m := &clusterMember{c: c, path: testPath(t), o: o}
		c.members = append(c.members, m)
		m.start()
	}
	t.Cleanup(func() {
		for _, m := range c.members {
			if m.db != nil {
				m.close()
			}
		}
	})
	return c
}

func (m *clusterMember) start() {
	m.c.t.Helper()
	db, err := OpenReplica(m.c.t.Context(), m.path, m.o)
	if err != nil {
		m.c.t.Fatal(err)
	}
	db.Join(m)
	m.db, m.stop, m.ended = db, make(chan struct{}), make(chan struct{})
	m.applied, _ = db.Applied()
	m.at = m.applied
	go m.run()
}

func (m *clusterMember) close() {
	m.c.t.Helper()
	close(m.stop)
	<-m.ended
	closeAndCheck(m.c.t, m.db, m.path)
	m.db = nil
}

// changed wakes everybody. REQUIRES: c.mu is held.
func (c *cluster) changed() {
	close(c.moved)
	c.moved = make(chan struct{})
}

// run applies what is in the log.
func (m *clusterMember) run() {
	defer close(m.ended)
	for {
		moved, err := m.catchUp()
		if err != nil {
			m.c.t.Error(err)
			return
		}
		select {
		case <-m.stop:
			return
		case <-moved:
		}
	}
}

// catchUp applies what there is, and returns what is closed when there is more.
func (m *clusterMember) catchUp() (moved chan struct{}, err error) {
	for {
		m.paused.Lock()
		select {
		case <-m.stop:
			m.paused.Unlock()
			return nil, nil
		default:
		}
		m.c.mu.Lock()
		entries, moved := m.c.log[m.at:], m.c.moved
		m.c.mu.Unlock()
		n := 0
		if len(entries) > 0 {
			n, err = m.apply(entries)
			m.at += uint64(n)
		}
		m.paused.Unlock()
		if n == 0 || err != nil {
			return moved, err
		}
	}
}

// install gives a member, that is paused, the state of another.
func (m *clusterMember) install(s Snapshot) error {
	path := m.path + installSuffix
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, io.NewSectionReader(s, 0, s.Size()))
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := m.db.Install(m.c.t.Context(), path); err != nil {
		return err
	}
	m.at = s.Index()
	return nil
}

// apply applies the first entries, as many as go together.
func (m *clusterMember) apply(entries []clusterEntry) (n int, err error) {
	if e := entries[0]; e.leads != nil || e.members != nil {
		err := m.db.ApplyMembers(e.Index, e.Term, e.members)
		if err == nil && e.leads == m {
			m.c.ready(m, e.Term)
		}
		return 1, err
	}
	var group []Entry
	for _, e := range entries {
		if e.leads != nil || e.members != nil {
			break
		}
		mine := e.Entry
		mine.Proposals = slices.Clone(e.Proposals)
		for i := range mine.Proposals {
			if e.from[i] != m || e.Index <= m.applied {
				mine.Proposals[i].Ticket = nil
			}
		}
		group = append(group, mine)
	}
	return len(group), m.db.Apply(group)
}

// lead makes a member the leader.
func (c *cluster) lead(i int) {
	c.mu.Lock()
	old := c.leader
	c.leader = nil
	c.term++
	c.log = append(c.log, clusterEntry{Entry: Entry{Index: uint64(len(c.log) + 1), Term: c.term}, leads: c.members[i]})
	c.changed()
	c.mu.Unlock()
	if old != nil && old.db != nil {
		old.db.Follow()
	}
}

// silence leaves the cluster without a leader.
func (c *cluster) silence() {
	c.mu.Lock()
	old := c.leader
	c.leader = nil
	c.mu.Unlock()
	if old != nil {
		old.db.Follow()
	}
}

func (c *cluster) ready(m *clusterMember, term uint64) {
	c.mu.Lock()
	newest := c.term == term
	c.mu.Unlock()
	if !newest {
		return
	}
	m.db.Lead(term)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leader = m
	waiting := c.waiting
	c.waiting = nil
	c.commit(waiting)
}

// commit makes an entry of proposals, or keeps them until there is a leader. REQUIRES: c.mu is held.
func (c *cluster) commit(proposals []clusterProposal) {
	if c.leader == nil {
		c.waiting = append(c.waiting, proposals...)
		return
	}
	if len(proposals) == 0 {
		return
	}
	e := clusterEntry{Entry: Entry{Index: uint64(len(c.log) + 1), Term: c.term, Stamp: c.leader.db.Stamp()}}
	for _, p := range proposals {
		e.Proposals = append(e.Proposals, p.Proposal)
		e.from = append(e.from, p.from)
	}
	c.log = append(c.log, e)
	c.changed()
}

func (m *clusterMember) Propose(payload []byte, t Ticket) {
	m.c.mu.Lock()
	defer m.c.mu.Unlock()
	p := clusterProposal{Proposal{payload, t}, m}
	if m.c.delayed != nil && m.c.delayed(payload) {
		m.c.kept = append(m.c.kept, p)
		return
	}
	m.c.commit([]clusterProposal{p})
}

// release lets proposals go on that were kept.
func (c *cluster) release() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.delayed = nil
	kept := c.kept
	c.kept = nil
	c.commit(kept)
}

func (m *clusterMember) ReadIndex(context.Context) (uint64, error) {
	m.c.mu.Lock()
	defer m.c.mu.Unlock()
	return uint64(len(m.c.log)), nil
}

// same demands that all members have the same in their databases, once the log is quiet.
func (c *cluster) same() {
	c.t.Helper()
	end := func() uint64 { c.mu.Lock(); defer c.mu.Unlock(); return uint64(len(c.log)) }
	var got [][]string
	for before := uint64(0); before != end(); {
		before, got = end(), nil
		for _, m := range c.members {
			if err := m.db.replica.applied.wait(c.t.Context(), m.db.ctx, before); err != nil {
				c.t.Fatal(err)
			}
			got = append(got, dump(c.t, m.db))
		}
	}
	for i := range got {
		mustEqual(c.t, fmt.Sprintf("member %d", i), got[i], got[0])
	}
}

// TestReplicaModel is TestModel with three members, of which each operation goes to one drawn at random; a restart is that
// of one beside the others, and may change who leads.
func TestReplicaModel(t *testing.T) {
	rnd := seed(t)
	c := newCluster(t, Options{ValueCacheBytes: 1}, Options{}, Options{ValueCacheBytes: 3 << 20})
	c.lead(0)
	next := 0
	playModel(t, rnd, modelStore{
		operations: 600,
		processes:  3,
		open: func() *DB {
			for i, m := range c.members {
				if m.db == nil {
					m.start()
					if rnd.IntN(2) == 0 {
						c.lead(i)
					}
					return m.db
				}
			}
			next++
			return c.members[next-1].db
		},
		close: func(db *DB) {
			for i, m := range c.members {
				if m.db != db {
					continue
				}
				if c.members[0].db != nil && c.members[1].db != nil && c.members[2].db != nil {
					c.same()
				}
				c.mu.Lock()
				leads := c.leader == m
				c.mu.Unlock()
				m.close()
				if other := c.members[(i+1)%3]; leads && other.db != nil {
					c.lead((i + 1) % 3)
				}
			}
		},
	})
}

// TestReplicaReadersDuringWrites is TestReadersDuringWrites with three members, one of them leading after the other.
func TestReplicaReadersDuringWrites(t *testing.T) {
	c := newCluster(t, Options{ValueCacheBytes: 2 << 20}, Options{}, Options{})
	c.lead(0)
	done := make(chan struct{})
	var turns sync.WaitGroup
	turns.Go(func() {
		for i := 1; ; i++ {
			select {
			case <-done:
				return
			case <-time.After(20 * time.Millisecond):
				c.lead(i % 3)
			}
		}
	})
	readDuringWrites(t, 100, c.members[0].db, c.members[1].db, c.members[2].db)
	close(done)
	turns.Wait()
	c.same()
}

// TestReplicaLinearizable: a read waits until what was committed when it came is applied where it is answered, and those
// that wait together ask once. A serializable one does not wait.
func TestReplicaLinearizable(t *testing.T) {
	c := newCluster(t, Options{}, Options{})
	c.lead(0)
	a, b := c.members[0].db, c.members[1].db
	mustPut(t, a, "k", "1")
	if got := mustGet(t, b, "k").Kvs; len(got) != 1 || string(got[0].Value) != "1" {
		t.Fatalf("the other member reads %v", got)
	}
	c.members[1].paused.Lock()
	mustPut(t, a, "k", "2")
	if err := b.Ready(t.Context(), true); err != nil {
		t.Errorf("a serializable read: %v", err)
	}
	read := make(chan error, 100)
	for range cap(read) {
		go func() { read <- b.Ready(t.Context(), false) }()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := b.Ready(ctx, false); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a read of a member that is behind: %v", err)
	}
	select {
	case err := <-read:
		t.Errorf("a read was answered before its member was there: %v", err)
	default:
	}
	c.members[1].paused.Unlock()
	for range cap(read) {
		if err := <-read; err != nil {
			t.Error(err)
		}
	}
	if got := mustGet(t, b, "k").Kvs; string(got[0].Value) != "2" {
		t.Errorf("after that it reads %v", got)
	}
}

func grantAll(t *testing.T, db *DB, ttl int64, ids ...int64) {
	t.Helper()
	for _, id := range ids {
		mustWrite(t, db, &pb.LeaseGrantRequest{ID: id, TTL: ttl})
		mustWrite(t, db, &pb.PutRequest{Key: fmt.Appendf(nil, "leased%d", id), Lease: id})
	}
}

// hurry lets the clock of a leader, which time cannot be moved for, jump ahead.
func hurry(db *DB, d time.Duration) {
	c := &db.replica.clock
	c.mu.Lock()
	c.base += d.Microseconds()
	c.mu.Unlock()
	db.leases.tell()
}

// eventually waits for what another goroutine is about to do.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for start := time.Now(); !ok(); time.Sleep(time.Millisecond) {
		if time.Since(start) > 10*time.Second {
			t.Fatalf("in vain waited for: %s", what)
		}
	}
}

// "A deposed leader can't revoke": its proposal, whenever it reaches the log, does nothing to a lease that was renewed
// under the next leader, nor to one that had no time left when there was no leader who could have renewed it.
func TestReplicaADeposedLeaderDoesNotRevoke(t *testing.T) {
	c := newCluster(t, Options{}, Options{})
	c.lead(0)
	a, b := c.members[0].db, c.members[1].db
	grantAll(t, b, 100, 7, 8)
	c.mu.Lock()
	c.delayed = func(payload []byte) bool { return len(payload) > 1 && payload[1] == kindExpire }
	c.mu.Unlock()
	hurry(a, 200*time.Second) // to a, both are due
	eventually(t, "the leader proposes to revoke", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.kept) > 0
	})
	c.lead(1)
	mustWrite(t, b, &pb.LeaseKeepAliveRequest{ID: 7})
	c.release()
	mustPut(t, b, "after", "that") // in the log behind the proposal
	for _, db := range []*DB{a, b} {
		if err := db.Ready(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		for _, id := range []int64{7, 8} {
			if s, ok := db.Lease(id, true); !ok || s.TTL < 90 || len(s.Keys) != 1 {
				t.Errorf("lease %d: %v, %+v", id, ok, s)
			}
		}
	}
	// When they are due to b, they go.
	hurry(b, 101*time.Second)
	eventually(t, "the leases expire", func() bool { return len(b.Leases()) == 0 })
	c.same()
	if n := len(mustGet(t, a, "leased7").Kvs); n != 0 {
		t.Error("the key of a lease that has expired is there")
	}
}

// TestReplicaLeasesDoNotAgeWithoutALeader: and those that were about to expire get a little time. A member of which the
// clock is behind leads as well.
func TestReplicaLeasesDoNotAgeWithoutALeader(t *testing.T) {
	c := newCluster(t, Options{}, Options{})
	c.lead(0)
	a, b := c.members[0].db, c.members[1].db
	hurry(a, time.Hour) // of which b knows by the stamps alone
	grantAll(t, a, 100, 7)
	grantAll(t, a, 100, 8)
	hurry(a, 95*time.Second)
	mustWrite(t, a, &pb.LeaseKeepAliveRequest{ID: 8})
	for i := 1; i < 6; i++ {
		c.silence()
		c.mu.Lock()
		c.delayed = func([]byte) bool { return true } // the first entry of the term has to wait
		c.mu.Unlock()
		c.lead(i % 2)
		db := c.members[i%2].db
		eventually(t, "a member leads", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.leader != nil })
		hurry(db, 1000*time.Second) // so long nobody led
		c.release()
		mustPut(t, db, "k", fmt.Sprint(i))
		for _, db := range []*DB{a, b} {
			if err := db.Ready(t.Context(), false); err != nil {
				t.Fatal(err)
			}
			if s, _ := db.Lease(8, false); s.TTL < 95 || s.TTL > 100 {
				t.Errorf("after %d changes a lease that was just renewed has %d s", i, s.TTL)
			}
			if s, ok := db.Lease(7, true); !ok || s.TTL > 10 || s.TTL < 5 {
				t.Errorf("after %d changes the lease that had 5 s left: %v, %+v", i, ok, s)
			}
		}
	}
	c.same()
	hurry(b, 11*time.Second)
	eventually(t, "the lease expires", func() bool { return len(a.Leases()) == 1 })
}

// TestReplicaStampsTheLogWhileThereAreLeases: the clock is in the log at least every few seconds, if it matters.
func TestReplicaStampsTheLogWhileThereAreLeases(t *testing.T) {
	c := newCluster(t, Options{}, Options{})
	c.lead(0)
	a := c.members[0].db
	end := func() int { c.mu.Lock(); defer c.mu.Unlock(); return len(c.log) }
	age := func() {
		for _, m := range c.members {
			m.db.replica.clock.mu.Lock()
			m.db.replica.clock.seen = m.db.replica.clock.seen.Add(-clockEvery)
			m.db.replica.clock.mu.Unlock()
			m.db.leases.tell()
		}
	}
	mustPut(t, a, "k", "v")
	quiet := end()
	age()
	time.Sleep(50 * time.Millisecond) // for what should not come
	if n := end(); n != quiet {
		t.Errorf("%d entries without leases", n-quiet)
	}
	grantAll(t, a, 1000, 7)
	for range 5 {
		before := end()
		age()
		eventually(t, "an entry with the time", func() bool { return end() > before })
		eventually(t, "it is applied", func() bool { index, _ := a.Applied(); return index > uint64(before) })
	}
	c.same()
	if s, _ := c.members[1].db.Lease(7, false); s.TTL < 990 {
		t.Errorf("the other member believes that %d s are left", s.TTL)
	}
	// It does not count on for ever while nobody leads.
	c.silence()
	other := c.members[1].db
	other.replica.clock.mu.Lock()
	other.replica.clock.seen = other.replica.clock.seen.Add(-time.Hour)
	other.replica.clock.mu.Unlock()
	if s, _ := other.Lease(7, false); s.TTL < 980 {
		t.Errorf("after an hour without a leader it believes that %d s are left", s.TTL)
	}
	c.lead(0)
	c.same()
}

// TestReplicaNoSpace: it is the leader's quota that counts, on every member, and the leader who lets the alarm go, whoever
// has raised it.
func TestReplicaNoSpace(t *testing.T) {
	c := newCluster(t, Options{MemberID: 1, QuotaBytes: 64 << 10, NoSpaceHold: 1}, Options{MemberID: 2, QuotaBytes: 1 << 10, NoSpaceHold: 1},
		Options{MemberID: 3, QuotaBytes: -1, NoSpaceHold: 1})
	c.lead(0)
	small := c.members[1].db
	var err error
	puts := 0
	for ; err == nil && puts < 1000; puts++ {
		_, err = small.Write(t.Context(), Command{Request: &pb.PutRequest{Key: []byte("k"), Value: make([]byte, 1<<10)}})
	}
	if !errors.Is(err, ErrNoSpace) || puts < 40 {
		t.Fatalf("put %d: %v", puts, err)
	}
	for i, m := range c.members {
		eventually(t, "the alarm is everywhere", func() bool { return len(m.db.Alarms()) > 0 })
		if a := m.db.Alarms(); len(a) != 1 || a[0].MemberID != 1 {
			t.Errorf("member %d has alarms %v", i, a)
		}
	}
	// Half a batch has room.
	c.same()
	mustWrite(t, small, &pb.CompactionRequest{Revision: small.Revision()})
	eventually(t, "compaction clears it", func() bool { return len(small.Alarms()) == 0 })
	// To the second member there is no room at all; to the third there is, as soon as it leads.
	c.lead(1)
	if _, err := small.Write(t.Context(), Command{Request: putReq("k", "v")}); !errors.Is(err, ErrNoSpace) {
		t.Errorf("with a leader that has no room: %v", err)
	}
	time.Sleep(20 * time.Millisecond) // for what should not come
	if a := small.Alarms(); len(a) != 1 || a[0].MemberID != 2 {
		t.Errorf("alarms %v", a)
	}
	c.lead(2)
	eventually(t, "the next leader clears it", func() bool { return len(small.Alarms()) == 0 })
	mustPut(t, small, "k", "v")
	c.same()
}

// TestReplicaRaisesShortTTLs: each member raises what is asked of it.
func TestReplicaRaisesShortTTLs(t *testing.T) {
	c := newCluster(t, Options{MinLeaseTTL: 60}, Options{MinLeaseTTL: 5})
	c.lead(1)
	for i, want := range []int64{60, 5} {
		for _, id := range []int64{0, int64(i) + 1} {
			var req proto.Message = &pb.LeaseGrantRequest{ID: id, TTL: 1}
			if got := mustWrite(t, c.members[i].db, req).(*pb.LeaseGrantResponse).TTL; got != want {
				t.Errorf("member %d grants %d s, want %d", i, got, want)
			}
		}
	}
	c.same()
}
