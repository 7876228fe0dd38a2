package sqlraft

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/quire-db/quire/backend"
)

// threeMembers is a membership of members 1, 2 and 3.
func threeMembers() backend.Membership {
	m := backend.Membership{ClusterID: 77}
	for id := range uint64(3) {
		m.Members = append(m.Members, backend.Member{ID: id + 1, PeerURLs: []string{fmt.Sprint("http://", id+1)}})
	}
	return m
}

// startTest is a log on a disk and a state, which begin is to bring together.
type startTest struct {
	t     *testing.T
	disk  *memoryDisk
	state *listMachine
	o     startOptions
}

func newStartTest(t *testing.T) *startTest {
	return &startTest{t: t, disk: newMemoryDisk(4096), state: new(listMachine), o: startOptions{id: 1}}
}

func (s *startTest) begin() (*beginning, error) {
	s.t.Helper()
	l, rec, err := openLog(s.disk, "raft")
	if err != nil {
		s.t.Fatal(err)
	}
	b, err := begin(l, rec, s.state, s.o)
	if cerr := l.close(); cerr != nil {
		s.t.Error(cerr)
	}
	return b, err
}

func (s *startTest) mustBegin() *beginning {
	s.t.Helper()
	b, err := s.begin()
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

// log writes what a member that has run would have left.
func (s *startTest) log(write func(l *raftLog) error) {
	s.t.Helper()
	l, _, err := openLog(s.disk, "raft")
	if err == nil {
		err = errors.Join(write(l), l.close())
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *startTest) expect(b *beginning, applied, first, last, commit uint64, lost bool) {
	s.t.Helper()
	if b.applied != applied || b.storage.first() != first || b.storage.last() != last || b.storage.hardState.GetCommit() != commit || b.identity.Lost != lost {
		s.t.Errorf("applied %d, log %d to %d, committed %d, lost %t; want %d, %d to %d, %d, %t",
			b.applied, b.storage.first(), b.storage.last(), b.storage.hardState.GetCommit(), b.identity.Lost, applied, first, last, commit, lost)
	}
}

func TestANewClusterIsFoundedTheSameEverywhere(t *testing.T) {
	s := newStartTest(t)
	s.o.initial = threeMembers()
	first := s.mustBegin()
	s.expect(first, 1, 2, 4, 4, false)
	s.expect(s.mustBegin(), 1, 2, 4, 4, false)
	s.o.initial = backend.Membership{} // the flags may be gone by then
	s.expect(s.mustBegin(), 1, 2, 4, 4, false)
	other := newStartTest(t)
	other.o.id, other.o.initial = 2, threeMembers()
	if b := other.mustBegin(); !sameEntries(b.storage.entries, first.storage.entries) {
		t.Error("the founding entries of two members differ")
	}
	members := backend.Membership{}
	for _, e := range first.storage.entries[1:] {
		_, ch, err := readChange(e)
		if err != nil {
			t.Fatal(err)
		}
		if members, err = ch.apply(members); err != nil {
			t.Fatal(err)
		}
	}
	if fmt.Sprint(members) != fmt.Sprint(threeMembers()) {
		t.Errorf("the founding entries make %+v", members)
	}
}

// TestFoundingSurvivesAPowerCutAnywhere: whatever is left of it, the next start finishes it.
func TestFoundingSurvivesAPowerCutAnywhere(t *testing.T) {
	for cut := 1; ; cut++ {
		s := newStartTest(t)
		s.o.initial = threeMembers()
		s.disk.cutAfter(cut)
		l, rec, err := openLog(s.disk, "raft")
		if err == nil {
			_, err = begin(l, rec, s.state, s.o)
			err = errors.Join(err, l.close())
		}
		if err == nil {
			if cut < 10 {
				t.Errorf("founding a cluster takes only %d operations of the disk", cut)
			}
			return
		}
		s.disk = s.disk.crash(rand.New(rand.NewPCG(uint64(cut), 1)))
		if _, rec, err := openLog(s.disk, "raft"); err != nil {
			t.Fatal(err)
		} else if len(rec.identity) > 0 {
			s.o.initial = backend.Membership{} // the flags are not read any more
		}
		s.expect(s.mustBegin(), 1, 2, 4, 4, false)
	}
}

func TestAMemberThatJoinsHasNothing(t *testing.T) {
	s := newStartTest(t)
	s.expect(s.mustBegin(), 0, 1, 0, 0, false)
	s.o.initial = threeMembers() // flags that say otherwise later mean nothing
	s.expect(s.mustBegin(), 0, 1, 0, 0, false)
}

func TestAMemberThatOthersKnowIsLost(t *testing.T) {
	s := newStartTest(t)
	s.o.initial, s.o.lost = threeMembers(), true
	s.expect(s.mustBegin(), 0, 1, 0, 0, true)
	s.o.lost = false
	s.expect(s.mustBegin(), 0, 1, 0, 0, true)
}

func TestAStateWithoutALogIsALoss(t *testing.T) {
	s := newStartTest(t)
	s.state.state = listState{Index: 50, Term: 4, Members: threeMembers()}
	s.expect(s.mustBegin(), 50, 51, 50, 50, true)

	alone := newStartTest(t)
	alone.state.state = listState{Index: 50, Term: 4, Members: backend.Membership{Members: threeMembers().Members[:1]}}
	alone.expect(alone.mustBegin(), 50, 51, 50, 50, false)
}

func TestAStateAheadOfTheLog(t *testing.T) {
	write := func(l *raftLog) error {
		return errors.Join(l.restart(1, 1, nil), l.append(&raftpb.HardState{Term: new(uint64(3)), Vote: new(uint64(2)), Commit: new(uint64(9))}, entriesFrom(2, 2, 10, 5), true))
	}
	s := newStartTest(t)
	s.log(func(l *raftLog) error {
		return errors.Join(setLogIdentity(l, logIdentity{Member: 1, Installing: 50}), write(l))
	})
	s.state.state = listState{Index: 50, Term: 2, Members: threeMembers()}
	b := s.mustBegin()
	s.expect(b, 50, 51, 50, 50, false)
	if b.storage.hardState.GetTerm() != 3 || b.storage.hardState.GetVote() != 2 {
		t.Errorf("an installed copy makes the member forget its vote: %v", b.storage.hardState)
	}
	s.expect(s.mustBegin(), 50, 51, 50, 50, false)

	old := newStartTest(t)
	old.log(func(l *raftLog) error { return errors.Join(setLogIdentity(l, logIdentity{Member: 1}), write(l)) })
	old.state.state = listState{Index: 50, Term: 2, Members: threeMembers()}
	old.expect(old.mustBegin(), 50, 51, 50, 50, true)
}

func TestAStateBehindTheLogIsReplayed(t *testing.T) {
	s := newStartTest(t)
	s.log(func(l *raftLog) error {
		return errors.Join(setLogIdentity(l, logIdentity{Member: 1}), l.restart(20, 2, nil),
			l.append(&raftpb.HardState{Term: new(uint64(2)), Commit: new(uint64(22))}, entriesFrom(21, 2, 10, 5), true))
	})
	s.state.state = listState{Index: 25, Term: 2, Members: threeMembers()}
	s.expect(s.mustBegin(), 25, 21, 30, 25, false) // what is applied is committed
	s.state.state.Index = 21
	s.expect(s.mustBegin(), 21, 21, 30, 25, false) // as it was found
	s.state.state.Index = 20
	s.expect(s.mustBegin(), 20, 21, 30, 25, false)

	s.state.state.Index = 19
	if _, err := s.begin(); !errors.Is(err, errNoState) || !errors.Is(err, backend.ErrDamaged) {
		t.Errorf("a state older than the log: %v", err)
	}
	s.state.state.Index, s.state.state.Term = 25, 1
	if _, err := s.begin(); !errors.Is(err, backend.ErrDamaged) {
		t.Errorf("a state of another cluster: %v", err)
	}
	s.o.id = 2
	if _, err := s.begin(); err == nil || !strings.Contains(err.Error(), "--data-dir") {
		t.Errorf("the log of another member: %v", err)
	}
}

func TestForceNewClusterLeavesOnlyThisMember(t *testing.T) {
	s := newStartTest(t)
	joined := memberChange{Kind: changeAdd, Member: backend.Member{ID: 4, PeerURLs: []string{"http://4"}}}
	s.log(func(l *raftLog) error {
		entries := entriesFrom(21, 2, 10, 5) // 29 and 30 are not committed
		entries[3] = changeEntry(&joined, 24, 2)
		return errors.Join(setLogIdentity(l, logIdentity{Member: 1, Lost: true}), l.restart(20, 2, nil),
			l.append(&raftpb.HardState{Term: new(uint64(3)), Commit: new(uint64(28))}, entries, true))
	})
	members := threeMembers()
	members.Members[0].Learner = true
	s.state.state = listState{Index: 22, Term: 2, Members: members}
	s.o.forceNewCluster = true
	b := s.mustBegin()
	s.expect(b, 22, 21, 32, 32, false) // a promotion and three removals
	for _, e := range b.storage.entries[3:] {
		if e.GetType() == raftpb.EntryConfChange {
			_, ch, err := readChange(e)
			if err != nil {
				t.Fatal(err)
			}
			if members, err = ch.apply(members); err != nil {
				t.Fatal(err)
			}
		}
	}
	if len(members.Members) != 1 || members.Members[0].ID != 1 || members.Members[0].Learner || fmt.Sprint(members.Removed) != "[2 3 4]" {
		t.Errorf("the members are %+v then", members)
	}
	s.expect(s.mustBegin(), 22, 21, 32, 32, false) // with the flag again
	s.o.forceNewCluster = false
	s.expect(s.mustBegin(), 22, 21, 32, 32, false)
	s.o.forceNewCluster, s.o.id = true, 9
	if _, err := s.begin(); err == nil {
		t.Error("somebody who is no member forces a new cluster")
	}
}

// TestWhatIsFoundAppliedIsCommittedDurably: the state is ahead of the commit index on disk by a change of the members, and
// not durable. The process starts, tells member 2 that it is removed, and loses power: it has to know by itself, then, that
// 2's vote is not needed.
func TestWhatIsFoundAppliedIsCommittedDurably(t *testing.T) {
	members := backend.Membership{ClusterID: 77, Members: threeMembers().Members[:2]}
	removal := changeEntry(&memberChange{Kind: changeRemove, Member: backend.Member{ID: 2}}, 7, 2)
	s := newStartTest(t)
	s.log(func(l *raftLog) error {
		return errors.Join(setLogIdentity(l, logIdentity{Member: 1}), l.restart(3, 1, nil),
			l.append(&raftpb.HardState{Term: new(uint64(2)), Vote: new(uint64(1)), Commit: new(uint64(6))}, append(entriesFrom(4, 2, 3, 5), removal), true))
	})
	s.state.state = listState{Index: 7, Term: 2, Members: backend.Membership{ClusterID: 77, Members: members.Members[:1], Removed: []uint64{2}}}
	b := s.mustBegin() // kill -9 has left the state in the page cache
	if b.storage.hardState.GetCommit() != 7 {
		t.Fatal("not committed")
	}
	s.disk = s.disk.crash(rand.New(rand.NewPCG(1, 1))) // now the power goes, and the state is what it was before
	s.state.state = listState{Index: 6, Term: 2, Members: members}
	if b = s.mustBegin(); b.storage.hardState.GetCommit() < 7 {
		t.Errorf("after the power cut index %d is committed and %x are voters: 1 cannot lead any more without 2, which was told that it is removed",
			b.storage.hardState.GetCommit(), votersOf(b.members))
	}
}

// TestACopyReplacesWhatNobodyHasCommitted: the process ended between the installation of a copy and the restart of the log,
// which holds entries of a former leader that reach beyond the copy.
func TestACopyReplacesWhatNobodyHasCommitted(t *testing.T) {
	s := newStartTest(t)
	s.log(func(l *raftLog) error {
		return errors.Join(setLogIdentity(l, logIdentity{Member: 1, Installing: 50}), l.restart(1, 1, nil),
			l.append(&raftpb.HardState{Term: new(uint64(3)), Vote: new(uint64(2)), Commit: new(uint64(9))}, entriesFrom(2, 2, 70, 5), true))
	})
	s.state.state = listState{Index: 50, Term: 3, Members: threeMembers()} // what opInstall has left
	s.expect(s.mustBegin(), 50, 51, 50, 50, false)
}
