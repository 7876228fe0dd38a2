//go:build linux

package partitions

import (
	"fmt"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/test/etcd/partitions/cluster"
)

// Leaders are killed, and come back, one after the other.
func TestKilledLeaders(t *testing.T) {
	s := begin(t, setup{})
	for range 3 {
		leader := s.leader()
		s.note("kill %s, which leads", leader.Name)
		s.must(leader.Kill())
		s.writesGoOn(s.Others(leader)...)
		s.must(leader.Start())
		s.ready(leader)
	}
	s.finish()
}

func TestKilledFollower(t *testing.T) {
	s := begin(t, setup{})
	follower := s.follower()
	s.note("kill %s, which follows", follower.Name)
	s.must(follower.Kill())
	s.writesGoOn(s.Others(follower)...)
	s.during(fault)
	s.must(follower.Start())
	s.ready(follower)
	s.finish()
}

// A machine that loses power says goodbye to nobody.
func TestCrashedLeader(t *testing.T) {
	s := begin(t, setup{})
	leader := s.leader()
	s.note("%s, which leads, is gone without a word", leader.Name)
	s.must(leader.Crash())
	s.writesGoOn(s.Others(leader)...)
	s.during(fault)
	s.Heal()
	s.must(leader.Start())
	s.ready(leader)
	s.finish()
}

// A leader that was stopped for longer than leases live must neither answer out of date nor end leases that others
// have renewed meanwhile.
func TestPausedLeader(t *testing.T) {
	s := begin(t, setup{})
	for _, d := range []time.Duration{fault, (keptTTL + 2) * time.Second} {
		leader := s.leader()
		s.note("stop %s, which leads, for %v", leader.Name, d)
		s.paused = true
		s.must(leader.Pause())
		s.writesGoOn(s.Others(leader)...)
		s.during(d)
		s.must(leader.Resume())
		s.ready(leader)
		s.writesGoOn(s.Members...)
		s.during(time.Second)
	}
	s.finish()
}

func TestPausedFollower(t *testing.T) {
	s := begin(t, setup{})
	follower := s.follower()
	s.note("stop %s, which follows", follower.Name)
	s.must(follower.Pause())
	s.writesGoOn(s.Others(follower)...)
	s.during(2 * fault)
	s.must(follower.Resume())
	s.ready(follower)
	s.finish()
}

// Every member is restarted, one after the other, as for an upgrade.
func TestRollingRestart(t *testing.T) {
	s := begin(t, setup{})
	for _, m := range s.Members {
		s.note("restart %s", m.Name)
		s.must(m.Terminate(patience))
		s.writesGoOn(s.Others(m)...)
		s.must(m.Start())
		s.ready(m)
	}
	s.finish()
}

// All members are killed at once, twice, the second time in the middle of their start.
func TestWholeClusterKilled(t *testing.T) {
	s := begin(t, setup{losesMajority: true})
	for _, wait := range []time.Duration{0, time.Second} {
		s.note("kill everybody")
		s.killAll()
		s.startAll()
		time.Sleep(wait)
	}
	s.killAll()
	s.startAll()
	s.ready(s.Members...)
	s.writesGoOn(s.Members...)
	s.finish()
}

// A majority is killed and comes back; the one that stayed, or was restarted alone, does not invent anything.
func TestMajorityKilled(t *testing.T) {
	s := begin(t, setup{losesMajority: true})
	two := s.draw(2, s.Members)
	s.note("kill %s", names(two))
	for _, m := range two {
		s.must(m.Kill())
	}
	s.during(fault)
	s.staleReadsGoOn(s.Others(two...)...)
	for _, m := range two {
		s.must(m.Start())
	}
	s.ready(s.Members...)
	s.writesGoOn(s.Members...)
	s.finish()
}

func (s *stage) killAll() {
	s.Helper()
	for _, m := range s.Members {
		s.must(m.Kill())
	}
}

func (s *stage) startAll() {
	s.Helper()
	for _, m := range s.Members {
		s.must(m.Start())
	}
}

// A member is removed, and one with an empty disk takes its place: its address, then a machine of its own.
func TestReplacedMember(t *testing.T) {
	s := begin(t, setup{spare: 1})
	follower := s.follower()
	s.replace(follower, true)
	s.during(time.Second)
	s.replace(s.leader(), false)
	s.during(time.Second)
	s.finish()
}

// replace removes a member and adds another.
func (s *stage) replace(m *cluster.Member, sameHost bool) {
	s.Helper()
	through := s.draw(1, s.Others(m))[0]
	s.note("remove %s through %s", m.Name, through.Name)
	s.must(s.Remove(s.within(patience), m, through))
	s.know()
	// It finds out and ends by itself, as etcd does.
	s.must(m.Exit(patience))
	s.detach(m)
	s.must(m.Wipe())
	s.writesGoOn(s.Members...)
	instead := m
	if !sameHost {
		instead = nil
	}
	name := fmt.Sprintf("n%d", s.record.now()/time.Millisecond)
	s.note("add %s, promote it", name)
	added, err := s.Add(s.within(patience), name, instead, s.draw(1, s.Members)[0])
	s.must(err)
	s.know()
	s.note("%s votes", added.Name)
	s.attach(added)
	s.writesGoOn(s.Members...)
}

// A member that was away while the log went on beyond what is kept for those who lag comes back by a snapshot.
func TestSnapshotAfterACutLine(t *testing.T) {
	s := begin(t, lagging)
	follower := s.follower()
	s.note("cut %s off", follower.Name)
	s.Split(group(follower), s.Others(follower))
	s.fill(1000, s.Others(follower)[0])
	s.heal()
	s.snapshotReceived(follower)
	s.finish()
}

func TestSnapshotAfterAKill(t *testing.T) {
	s := begin(t, lagging)
	follower := s.follower()
	s.note("kill %s", follower.Name)
	s.must(follower.Kill())
	s.fill(1000, s.Others(follower)[0])
	s.must(follower.Start())
	s.ready(follower)
	s.snapshotReceived(follower)
	s.finish()
}

// lagging is a cluster that keeps few entries for those who lag.
var lagging = setup{flags: []string{"--snapshot-count=50", "--snapshot-catchup-entries=20"}, pause: 10 * time.Millisecond}

// fill writes so many entries through a member, beside what the clients do.
func (s *stage) fill(entries int, m *cluster.Member) {
	s.Helper()
	s.note("%d entries", entries)
	for range entries {
		_, err := m.KV.Put(s.within(patience), &pb.PutRequest{Key: []byte("filling"), Value: make([]byte, 4<<10)})
		s.must(err)
	}
}

// snapshotReceived wants the member to have caught up by a snapshot since its process began.
func (s *stage) snapshotReceived(m *cluster.Member) {
	s.Helper()
	received, err := m.Metric(s.within(patience), "etcd_network_snapshot_receive_success")
	s.must(err)
	if received == 0 {
		s.Errorf("%s has received no snapshot: was this no test of snapshots?", m.Name)
	}
}

// The leader is moved around while everybody works.
func TestMovedLeader(t *testing.T) {
	s := begin(t, setup{})
	for range 4 {
		s.move()
		s.during(time.Second)
	}
	s.finish()
}

// move has another member lead.
func (s *stage) move() {
	s.Helper()
	leader := s.leader()
	to := s.draw(1, s.Others(leader))[0]
	s.note("move the leader from %s to %s", leader.Name, to.Name)
	_, err := leader.Maintenance.MoveLeader(s.within(patience), &pb.MoveLeaderRequest{TargetID: to.ID()})
	s.must(err)
	s.writesGoOn(s.Members...)
	if now := s.leader(); now != to {
		s.Errorf("%s leads, want %s", now.Name, to.Name)
	}
}

// An operator who stops all members at the same moment gets them stopped.
func TestEverybodyTerminated(t *testing.T) {
	s := begin(t, setup{losesMajority: true})
	ended := make(chan error)
	for _, m := range s.Members {
		go func() { ended <- m.Terminate(20 * time.Second) }()
	}
	for range s.Members {
		s.must(<-ended)
	}
	s.startAll()
	s.ready(s.Members...)
	s.finish()
}
