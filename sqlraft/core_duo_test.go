package sqlraft

import (
	"testing"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/quire-db/quire/backend"
)

// duo are two cores that talk through the test.
type duo struct {
	t    *testing.T
	c    map[uint64]*core
	net  []packet
	cut  bool
	last map[uint64][]backend.Entry
}

func newDuo(t *testing.T) *duo {
	d := &duo{t: t, c: map[uint64]*core{}, last: map[uint64][]backend.Entry{}}
	members := threeMembers()
	members.Members = members.Members[:2]
	n := uint64(100)
	for id := uint64(1); id <= 2; id++ {
		o := coreOptions{
			id: id, storage: newStorage(1, 1, foundingEntries(members)), members: members, applied: 3, electionTicks: testElection, preVote: true,
			requestTicks: testRequest, retryTicks: 5, catchUpEntries: 100, catchUpBytes: 1 << 20,
			stamp: func() []byte { return []byte("now") }, random: func() uint64 { n++; return n },
			connectedSince: func(uint64, uint64) bool { return true }, logger: &raftLogger{},
		}
		o.storage.hardState = hardState{term: 1, commit: 3}.message()
		c, err := newCore(o)
		if err != nil {
			t.Fatal(err)
		}
		d.c[id] = c
	}
	return d
}

func (d *duo) work(id uint64) {
	d.t.Helper()
	var out output
	for {
		more, err := d.c[id].ready(&out)
		if err != nil {
			d.t.Fatal(err)
		}
		if !more {
			return
		}
		d.net = append(d.net, out.before...)
		if err := d.c[id].persisted(&out); err != nil {
			d.t.Fatal(err)
		}
		d.net = append(d.net, out.after...)
		for _, op := range out.apply {
			d.last[id] = append(d.last[id], op.entries...)
			d.c[id].done(op.number)
		}
	}
}

// deliver delivers until nothing is under way; drop decides what is lost.
func (d *duo) deliver(drop func(p packet) bool) {
	for len(d.net) > 0 {
		p := d.net[0]
		d.net = d.net[1:]
		if d.c[p.to] == nil || d.cut || drop != nil && drop(p) {
			continue
		}
		d.c[p.to].receive(p)
		d.work(p.to)
	}
}

func (d *duo) ticks(n int, drop func(p packet) bool, ids ...uint64) {
	for range n {
		for _, id := range ids {
			d.c[id].tick()
			d.work(id)
		}
		d.deliver(drop)
	}
}

// TestARemovedLeaderOfTwoAnswersNoReads: it has just applied its own removal, and the one that is left leads already.
func TestARemovedLeaderOfTwoAnswersNoReads(t *testing.T) {
	for range 200 { // who campaigns when is drawn by Raft
		if removedLeaderOfTwo(t) {
			return
		}
	}
	t.Error("the situation has not come about")
}

func removedLeaderOfTwo(t *testing.T) (tested bool) {
	t.Helper()
	d := newDuo(t)
	for !d.c[2].leading {
		d.ticks(1, nil, 2)
	}
	d.ticks(2, nil, 2, 1)
	// 2 seals the removal of 1, which 1 gets; then the link is gone, long enough for 2 to step down.
	d.c[2].propose((&memberChange{Kind: changeRemove, Member: backend.Member{ID: 1}}).payload(), true, nil)
	d.work(2)
	d.deliver(func(p packet) bool { return p.from == 1 })
	for d.c[2].leading {
		d.ticks(1, func(packet) bool { return true }, 1, 2)
	}
	// Only 1 happens to campaign.
	for n := 0; !d.c[1].leading && n < 100; n++ {
		d.ticks(1, nil, 1)
	}
	d.ticks(2, nil, 1)
	if !d.c[1].leading || len(d.c[1].members.Members) != 1 {
		t.Fatal("not the situation that was wanted")
	}
	// One more exchange, then they are cut off from each other.
	d.ticks(1, func(p packet) bool { return p.message != nil && p.message.GetType() == raftpb.MsgTimeoutNow }, 1, 2)
	d.net, d.cut = nil, true
	for n := 0; !d.c[2].leading; n++ {
		if n > 100 {
			t.Fatal("2 does not lead")
		}
		d.ticks(1, nil, 1, 2)
		if !d.c[1].leading {
			return false
		}
	}
	before := d.c[2].handed.index
	d.c[2].propose([]byte("acknowledged"), false, nil)
	d.work(2)
	if len(d.last[2]) == 0 || d.c[2].handed.index == before {
		t.Fatal("2 does not commit alone")
	}
	d.c[1].readIndex(func(index uint64, err error) {
		if err == nil && index < d.c[2].handed.index {
			t.Errorf("a linearizable read at 1 gets index %d, %d was acknowledged before", index, d.c[2].handed.index)
		}
	})
	d.work(1)
	d.ticks(testRequest, nil, 1)
	return true
}
