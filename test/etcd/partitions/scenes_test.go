//go:build linux

package partitions

import (
	"testing"
	"time"

	"github.com/quire-db/quire/test/etcd/partitions/cluster"
	"github.com/quire-db/quire/test/etcd/partitions/network"
)

// fault is how long most faults last: a few election timeouts.
const fault = 4 * time.Second

var cut = network.Line{Cut: true}

// What the checks complain of when nothing happens no fault has caused.
func TestNoFault(t *testing.T) {
	s := begin(t, setup{})
	s.during(fault)
	s.finish()
}

func TestLeaderCutOff(t *testing.T) {
	s := begin(t, setup{})
	leader := s.leader()
	s.note("cut %s, which leads, off", leader.Name)
	s.Split(group(leader), s.Others(leader))
	s.writesGoOn(s.Others(leader)...)
	s.during(fault)
	s.heal()
	s.writesGoOn(s.Members...)
	s.finish()
}

func TestFollowerCutOff(t *testing.T) {
	s := begin(t, setup{peerTLS: true})
	follower := s.follower()
	s.note("cut %s, which follows, off", follower.Name)
	s.Split(group(follower), s.Others(follower))
	s.writesGoOn(s.Others(follower)...)
	s.during(fault)
	s.heal()
	s.writesGoOn(s.Members...)
	s.finish()
}

// Two of five, the leader among them, are no majority.
func TestMinorityWithTheLeader(t *testing.T) {
	s := begin(t, setup{members: 5})
	leader := s.leader()
	few := append(s.draw(1, s.Others(leader)), leader)
	s.note("cut %s, with the leader %s, off", names(few), leader.Name)
	s.Split(few, s.Others(few...))
	s.writesGoOn(s.Others(few...)...)
	s.during(fault)
	s.heal()
	s.writesGoOn(s.Members...)
	s.finish()
}

// With everybody alone nothing is acknowledged, and what was is still there.
func TestEverybodyAlone(t *testing.T) {
	s := begin(t, setup{losesMajority: true})
	s.note("cut every line between members")
	s.SetAll(cut)
	time.Sleep(3 * time.Second) // until the last who led has noticed
	from := s.record.now()
	s.during(2 * fault)
	for _, o := range s.record.operations() {
		if o.called > from && o.err == nil && o.kind != stale {
			s.Errorf("answered by a member that is alone: %s", o)
		}
	}
	s.staleReadsGoOn(s.Members...)
	s.heal()
	s.writesGoOn(s.Members...)
	s.finish()
}

// Two of five see everybody; the others see only these two and one of their own.
func TestBridge(t *testing.T) {
	s := begin(t, setup{members: 5})
	all := s.draw(5, s.Members)
	bridge, left, right := all[0], all[1:3], all[3:5]
	s.note("%s and %s see each other only by way of %s; %s led", names(left), names(right), bridge.Name, s.leader().Name)
	s.Split(left, right)
	// Whoever led may be on the side that the others do not see; then they elect another.
	s.writesGoOn(bridge)
	s.during(fault)
	s.heal()
	s.writesGoOn(s.Members...)
	s.finish()
}

// The chain a–b–c: the leader at one end does not hear the other end.
func TestChain(t *testing.T) {
	s := begin(t, setup{})
	leader := s.leader()
	ends := s.draw(2, s.Others(leader))
	s.note("cut the lines between %s, which leads, and %s", leader.Name, ends[0].Name)
	s.Part(leader, ends[0])
	s.writesGoOn(leader, ends[1])
	s.during(fault)
	s.heal()
	s.writesGoOn(s.Members...)
	s.finish()
}

// The leader hears nobody, but everybody hears it.
func TestDeafLeader(t *testing.T) {
	s := begin(t, setup{})
	leader := s.leader()
	s.note("%s, which leads, hears nobody", leader.Name)
	s.lines(s.Others(leader), group(leader), cut)
	s.writesGoOn(s.Others(leader)...)
	s.during(fault)
	s.heal()
	s.writesGoOn(s.Members...)
	s.finish()
}

// The leader hears everybody, but nobody hears it.
func TestMuteLeader(t *testing.T) {
	s := begin(t, setup{})
	leader := s.leader()
	s.note("nobody hears %s, which leads", leader.Name)
	s.lines(group(leader), s.Others(leader), cut)
	s.writesGoOn(s.Others(leader)...)
	s.during(fault)
	s.heal()
	s.writesGoOn(s.Members...)
	s.finish()
}

// A follower that hears nothing must not disturb those who do.
func TestDeafFollower(t *testing.T) {
	s := begin(t, setup{})
	follower := s.follower()
	s.note("%s, which follows, hears nobody", follower.Name)
	s.lines(s.Others(follower), group(follower), cut)
	s.writesGoOn(s.Others(follower)...)
	s.during(fault)
	s.heal()
	s.writesGoOn(s.Members...)
	s.finish()
}

// A line that breaks and comes back faster than anybody can be elected, or just about as fast.
func TestFlappingLines(t *testing.T) {
	s := begin(t, setup{})
	for until := time.Now().Add(2 * fault); time.Now().Before(until); {
		one := s.draw(1, s.Members)
		s.Split(one, s.Others(one...))
		time.Sleep(time.Duration(50+s.random.IntN(1200)) * time.Millisecond)
		s.Heal()
		time.Sleep(time.Duration(50+s.random.IntN(600)) * time.Millisecond)
	}
	s.heal()
	s.writesGoOn(s.Members...)
	s.finish()
}

func TestLossyLines(t *testing.T) {
	s := begin(t, setup{})
	s.note("one packet in eight between members is lost")
	s.SetAll(network.Line{Loss: 0.125})
	s.writesGoOn(s.Members...)
	s.during(2 * fault)
	s.heal()
	s.finish()
}

// Members in different cities.
func TestSlowLines(t *testing.T) {
	s := begin(t, setup{members: 5})
	s.note("every packet between members takes 20 to 50 ms")
	s.SetAll(network.Line{Delay: 20 * time.Millisecond, Jitter: 30 * time.Millisecond})
	s.writesGoOn(s.Members...)
	s.during(fault)
	leader := s.leader()
	s.note("kill %s, which leads", leader.Name)
	s.must(leader.Kill())
	s.writesGoOn(s.Others(leader)...)
	s.must(leader.Start())
	s.ready(leader)
	s.finish()
}

// Leaders come and go while much is on its way to them: what was sent to the former one must be done once, not twice and
// not never.
func TestLeadersChangeUnderWay(t *testing.T) {
	s := begin(t, setup{pause: 5 * time.Millisecond})
	s.note("every packet between members takes 10 to 40 ms")
	s.SetAll(network.Line{Delay: 10 * time.Millisecond, Jitter: 30 * time.Millisecond})
	for range 3 {
		leader := s.leader()
		others := s.Others(leader)
		s.note("cut %s, which leads, off, for a moment", leader.Name)
		s.Split(group(leader), others)
		s.writesGoOn(others...)
		s.SetAll(network.Line{Delay: 10 * time.Millisecond, Jitter: 30 * time.Millisecond})
		s.ready(s.Members...)
		s.during(500 * time.Millisecond)
		s.move()
		s.during(500 * time.Millisecond)
		s.move()
		s.during(500 * time.Millisecond)
	}
	s.heal()
	s.finish()
}

// staleReadsGoOn wants serializable reads answered, whatever the state of the cluster.
func (s *stage) staleReadsGoOn(through ...*cluster.Member) {
	s.Helper()
	for _, m := range through {
		o := &operation{kind: stale, key: register(0)}
		if s.clients.client(m, s.seed).do(s.ctx, o, 5*time.Second); o.err != nil {
			s.Errorf("a serializable read, which needs no other member: %s", o)
		}
	}
}
