//go:build linux

package powercut

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// cluster is three machines, each with a disk of its own, and one book of what clients know.
type cluster struct {
	members []*machine
	book    book
	rng     *rand.Rand
	ends    map[string]int // how often what has happened to members
}

func newCluster(t *testing.T, r *rand.Rand) *cluster {
	t.Helper()
	c := &cluster{book: book{newLoad(r, true), newHistory()}, rng: r, ends: make(map[string]int)}
	var peers, all []string
	for i := range 3 {
		peers = append(peers, "http://"+lastingAddress(t))
		all = append(all, fmt.Sprintf("n%d=%s", i+1, peers[i]))
	}
	for i := range 3 {
		m := &machine{Mount: newDisk(t, r).Mount(t), rng: r, address: lastingAddress(t), book: c.book}
		m.args = []string{
			fmt.Sprintf("--name=n%d", i+1),
			"--initial-cluster=" + strings.Join(all, ","),
			"--listen-peer-urls=" + peers[i], "--initial-advertise-peer-urls=" + peers[i],
			"--listen-client-urls=http://" + m.address, "--advertise-client-urls=http://" + m.address,
			"--heartbeat-interval=30", "--election-timeout=300", // elections are what most of the time goes to
			"--snapshot-count=100", "--snapshot-catchup-entries=20", // who was away for a moment gets a copy of the database
		}
		c.members = append(c.members, m)
	}
	return c
}

// lastingAddress is a free address that no connection takes while its member is down: those have ports from 32768 on.
func lastingAddress(t *testing.T) string {
	t.Helper()
	for {
		address := fmt.Sprintf("127.0.0.1:%d", 10000+rand.IntN(20000))
		l, err := net.Listen("tcp", address)
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
		return address
	}
}

// start starts all members and waits until each serves.
func (c *cluster) start(t *testing.T) *clientv3.Client {
	t.Helper()
	var endpoints []string
	for _, m := range c.members {
		m.begin(t)
		endpoints = append(endpoints, m.address)
	}
	for i, m := range c.members {
		if err := m.WaitReady(40 * time.Second); err != nil {
			t.Fatalf("n%d: %v", i+1, err)
		}
	}
	return connect(t, endpoints...)
}

// verify compares the cluster with the book, and then each member.
func (c *cluster) verify(t *testing.T, client *clientv3.Client) {
	t.Helper()
	// All have ended since: a write that did not reach the log of a leader by now is gone.
	c.members[0].verify(t, client, true)
	for i, m := range c.members {
		if err := c.compareMember(t, m); err != nil {
			t.Fatalf("n%d: %v", i+1, err)
		}
	}
}

// compareMember reads what a member holds itself at the newest revision that the book knows.
func (c *cluster) compareMember(t *testing.T, m *machine) error {
	client := connect(t, m.address)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		got, err := client.Get(ctx, "", clientv3.WithPrefix(), clientv3.WithSerializable(), clientv3.WithRev(c.book.rev))
		switch {
		case err == nil:
			return c.book.compare(got.Kvs)
		case !errors.Is(err, rpctypes.ErrFutureRev):
			return fmt.Errorf("read at revision %d: %w", c.book.rev, err)
		}
		time.Sleep(5 * time.Millisecond) // it is still catching up
	}
}

// In a cluster the power goes for one member after the other, for two, and for all at once: an acknowledged write survives,
// no member differs from another, and as long as two have power and time to elect a leader, writes go on.
func TestNothingAcknowledgedIsLostInAClusterWithoutPower(t *testing.T) {
	c := newCluster(t, random(t))
	for i := range max(cuts(t)/5, 1) {
		if !t.Run(fmt.Sprint(i+1), c.live) {
			return
		}
	}
	t.Run("at last", func(t *testing.T) { c.verify(t, c.start(t)) })
	h := c.book.history
	t.Logf("%v: revision %d, %d acknowledged writes found, %d without an answer happened, %d did not",
		c.ends, h.rev, h.found, h.happened, h.never)
}

// live is one life of the cluster, in which members lose power, and which ends when all do at once.
func (c *cluster) live(t *testing.T) {
	client := c.start(t)
	c.verify(t, client)
	end := c.members[0].begins(t, client, func() bool { return true })
	for range 1 + c.rng.IntN(3) {
		at := c.rng.IntN(3)
		victims := []*machine{c.members[at]}
		if c.rng.IntN(4) == 0 {
			victims = append(victims, c.members[(at+1)%3])
		}
		switch n := c.rng.IntN(6); {
		case n < 2 && len(victims) == 1:
			c.failDisk(t, victims[0])
		case n == 2:
			c.end(t, "kill", victims, (*Mount).Kill)
		default:
			c.end(t, "cut", victims, (*Mount).Cut)
		}
		for _, m := range victims {
			for c.rng.IntN(3) == 0 { // and again, while it starts and catches up
				c.ends["cut in a start"]++
				m.FreezeAfter(int64(math.Exp(c.rng.Float64()*math.Log(1000))), Changes)
				m.begin(t)
				m.await(t, 2*time.Second)
				m.cut(t)
				c.noteCopy(m)
			}
			m.begin(t)
		}
		for _, m := range victims {
			if err := m.WaitReady(40 * time.Second); err != nil {
				t.Fatal(err)
			}
		}
		c.goesOn(t)
	}
	for _, m := range c.members {
		c.noteCopy(m)
	}
	c.end(t, "cut", c.members, (*Mount).Cut)
	end()
	for _, m := range c.members {
		m.check(t)
	}
}

// noteCopy counts the members that caught up with a copy of the database.
func (c *cluster) noteCopy(m *machine) {
	c.ends["a copy installed"] += len(m.Lines("installed a snapshot"))
}

// goesOn wants writes acknowledged.
func (c *cluster) goesOn(t *testing.T) {
	t.Helper()
	before := c.book.answers.Load()
	for deadline := time.Now().Add(30 * time.Second); c.book.answers.Load() < before+20; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("most members have been well for 30 s, and no write is acknowledged")
		}
	}
}

// failDisk has the disk of a member fail, which lives through it or ends; the others go on. Then its power goes.
func (c *cluster) failDisk(t *testing.T, m *machine) {
	t.Helper()
	c.ends["fault of 1"]++
	fault := Fault{On: Sync, Skip: c.rng.Int64N(30), Errno: syscall.EIO}
	switch c.rng.IntN(3) {
	case 0:
		fault.For = 1
	case 1:
		fault.On, fault.Errno = Write|Names, syscall.ENOSPC
	}
	f := m.Inject(fault)
	for deadline := time.Now().Add(2 * time.Second); f.Hits() == 0 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	c.goesOn(t)
	if code, err := m.Wait(0); err == nil && !isEtcd(t) {
		m.endedClearly(t, code)
	}
	m.cut(t)
}

// end has several members end, by Cut or by Kill, at the moment of some operation on the disk of one.
func (c *cluster) end(t *testing.T, name string, victims []*machine, by func(*Mount, ...Victim) error) {
	t.Helper()
	c.ends[fmt.Sprintf("%s of %d", name, len(victims))]++
	first := victims[c.rng.IntN(len(victims))]
	first.FreezeAfter(c.rng.Int64N(400), Changes)
	first.await(t, 2*time.Second)
	for _, m := range victims {
		m.Freeze()
	}
	var ending sync.WaitGroup
	for _, m := range victims {
		ending.Go(func() {
			if err := by(m.Mount, m.Process); err != nil {
				t.Error(err)
			}
		})
	}
	ending.Wait()
	if t.Failed() {
		t.FailNow()
	}
}
