//go:build linux

package partitions

import (
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// An etcd that has lost what it had acknowledged ends, and has to be replaced by hand. A quire comes back by itself; for a
// while it is a learner.
func beginForQuire(t *testing.T, o setup) *stage {
	t.Helper()
	if isEtcd(t) {
		t.Skip("etcd does not take such a member back")
	}
	o.learns = true
	return begin(t, o)
}

func TestLostDisk(t *testing.T) {
	s := beginForQuire(t, setup{})
	m := s.draw(1, s.Members)[0]
	s.note("kill %s, whose disk is lost", m.Name)
	s.must(m.Kill())
	s.must(m.Wipe())
	m.Rejoins()
	s.writesGoOn(s.Others(m)...)
	s.must(m.Start())
	s.writesGoOn(s.Others(m)...)
	s.ready(m)
	s.writesGoOn(s.Members...)
	s.finish()
}

// A member is put back to what it was a while ago, which it and everybody else had moved on from.
func TestOldCopy(t *testing.T) {
	s := beginForQuire(t, setup{})
	m := s.draw(1, s.Members)[0]
	s.note("kill %s, and keep a copy of its data", m.Name)
	s.must(m.Kill())
	s.must(m.Copy("copy"))
	s.must(m.Start())
	s.ready(m)
	s.during(2 * time.Second)
	s.note("kill %s, and put the copy back", m.Name)
	s.must(m.Kill())
	s.writesGoOn(s.Others(m)...) // whoever is put back first does not have a say in who leads
	s.must(m.Restore("copy"))
	s.must(m.Start())
	s.writesGoOn(s.Others(m)...)
	s.ready(m)
	s.writesGoOn(s.Members...)
	s.finish()
}

// The same, for a copy that is older than the entries that members keep for those who lag.
func TestOldCopyBehindTheLog(t *testing.T) {
	s := beginForQuire(t, lagging)
	m := s.follower()
	s.note("kill %s, and keep a copy of its data", m.Name)
	s.must(m.Kill())
	s.must(m.Copy("copy"))
	s.must(m.Start())
	s.ready(m)
	s.fill(500, m)
	s.note("kill %s, and put the copy back", m.Name)
	s.must(m.Kill())
	s.writesGoOn(s.Others(m)...)
	s.must(m.Restore("copy"))
	s.must(m.Start())
	s.ready(m)
	s.writesGoOn(s.Members...)
	s.finish()
}

// Leases keep the time they have left when their leader dies; they do not begin anew, as with etcd. (When little is left
// they get ten seconds, so that their clients find the new leader in time.)
func TestLeasesKeepTheirRemainingTime(t *testing.T) {
	s := beginForQuire(t, setup{})
	const ttl = 60
	granted := time.Now()
	_, err := s.leader().Lease.LeaseGrant(s.within(patience), &pb.LeaseGrantRequest{ID: 77, TTL: ttl})
	s.must(err)
	for range 2 {
		s.during(2 * time.Second)
		leader := s.leader()
		s.note("kill %s, which leads", leader.Name)
		s.must(leader.Kill())
		s.writesGoOn(s.Others(leader)...)
		s.must(leader.Start())
		s.ready(leader)
	}
	left := ttl - int64(time.Since(granted).Seconds())
	for _, m := range s.Members {
		r, err := m.Lease.LeaseTimeToLive(s.within(patience), &pb.LeaseTimeToLiveRequest{ID: 77})
		s.must(err)
		// While nobody led the lease did not age: at most two seconds, twice.
		if r.TTL < left-1 || r.TTL > left+4 {
			s.Errorf("%s gives the lease %d s, of %d s without the time that nobody led", m.Name, r.TTL, left)
		}
	}
	_, err = s.leader().Lease.LeaseRevoke(s.within(patience), &pb.LeaseRevokeRequest{ID: 77})
	s.must(err)
	s.finish()
}
