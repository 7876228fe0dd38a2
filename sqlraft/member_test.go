package sqlraft

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/quire-db/quire/backend"
)

func TestChangesOfTheMembers(t *testing.T) {
	member := func(id uint64, learner bool) backend.Member {
		return backend.Member{ID: id, Name: "n", PeerURLs: []string{fmt.Sprint("http://", id)}, Learner: learner}
	}
	three := backend.Membership{ClusterID: 1, Members: []backend.Member{member(1, false), member(2, false), member(3, true)}, Removed: []uint64{9}}
	one := backend.Membership{Members: []backend.Member{member(1, false), member(3, true)}}
	without := func(m backend.Membership, id uint64) backend.Membership {
		m.Members = slices.DeleteFunc(slices.Clone(m.Members), func(o backend.Member) bool { return o.ID == id })
		return m
	}
	removed := func(m backend.Membership, id uint64) backend.Membership {
		m = without(m, id)
		m.Removed = append(slices.Clone(m.Removed), id)
		slices.Sort(m.Removed)
		return m
	}
	with := func(m backend.Membership, o backend.Member) backend.Membership {
		m = without(m, o.ID)
		m.Members = append(m.Members, o)
		slices.SortFunc(m.Members, func(a, b backend.Member) int { return int(a.ID) - int(b.ID) })
		return m
	}
	renamed := member(2, false)
	renamed.Name, renamed.ClientURLs = "x", []string{"c"}
	moved := member(2, false)
	moved.PeerURLs = []string{"http://elsewhere"}

	for _, c := range []struct {
		name   string
		before backend.Membership
		change memberChange
		after  backend.Membership // as before when there is an error
		err    error
	}{
		{"a voter comes", three, memberChange{Kind: changeAdd, Member: member(4, false)}, with(three, member(4, false)), nil},
		{"a learner comes", three, memberChange{Kind: changeAdd, Member: member(4, true), MaxLearners: 2}, with(three, member(4, true)), nil},
		{"one learner too many", three, memberChange{Kind: changeAdd, Member: member(4, true), MaxLearners: 1}, three, rpctypes.ErrGRPCTooManyLearners},
		{"twice", three, memberChange{Kind: changeAdd, Member: member(2, false)}, three, rpctypes.ErrGRPCMemberExist},
		{"a URL twice", three, memberChange{Kind: changeAdd, Member: backend.Member{ID: 4, PeerURLs: member(2, false).PeerURLs}}, three, rpctypes.ErrGRPCPeerURLExist},
		{"one that was removed", three, memberChange{Kind: changeAdd, Member: member(9, false)}, three, rpctypes.ErrGRPCMemberNotFound},
		{"a promotion", three, memberChange{Kind: changePromote, Member: member(3, false)}, with(three, member(3, false)), nil},
		{"a promotion of a voter", three, memberChange{Kind: changePromote, Member: member(2, false)}, three, rpctypes.ErrGRPCMemberNotLearner},
		{"a promotion of nobody", three, memberChange{Kind: changePromote, Member: member(4, false)}, three, rpctypes.ErrGRPCMemberNotFound},
		{"a removal", three, memberChange{Kind: changeRemove, Member: member(2, false)}, removed(three, 2), nil},
		{"a removal of a learner", three, memberChange{Kind: changeRemove, Member: member(3, false)}, removed(three, 3), nil},
		{"a removal of nobody", three, memberChange{Kind: changeRemove, Member: member(4, false)}, three, rpctypes.ErrGRPCMemberNotFound},
		{"a removal of the last voter", one, memberChange{Kind: changeRemove, Member: member(1, false)}, one, rpctypes.ErrGRPCMemberNotEnoughStarted},
		{"other URLs", three, memberChange{Kind: changeUpdate, Member: moved}, with(three, moved), nil},
		{"somebody else's URLs", three, memberChange{Kind: changeUpdate, Member: backend.Member{ID: 2, PeerURLs: member(1, false).PeerURLs}}, three, rpctypes.ErrGRPCPeerURLExist},
		{"other URLs of nobody", three, memberChange{Kind: changeUpdate, Member: member(4, false)}, three, rpctypes.ErrGRPCMemberNotFound},
		{"a name", three, memberChange{Kind: changePublish, Member: renamed}, with(three, renamed), nil},
		{"taken out", three, memberChange{Kind: changeForget, Member: member(2, false)}, without(three, 2), nil},
		{"taken out twice", without(three, 2), memberChange{Kind: changeForget, Member: member(2, false)}, without(three, 2), rpctypes.ErrGRPCMemberNotFound},
		{"the last voter taken out", one, memberChange{Kind: changeForget, Member: member(1, false)}, one, rpctypes.ErrGRPCMemberNotEnoughStarted},
		{"a voter let in again", without(three, 2), memberChange{Kind: changeReadmit, Member: member(2, false)}, with(three, member(2, true)), nil},
		{"one let in again who is there", three, memberChange{Kind: changeReadmit, Member: member(2, false)}, three, rpctypes.ErrGRPCMemberExist},
		{"one let in again who was removed", three, memberChange{Kind: changeReadmit, Member: member(9, false)}, three, rpctypes.ErrGRPCMemberNotFound},
		{"something new", three, memberChange{Kind: "dance", Member: member(2, false)}, three, errBadEntry},
	} {
		text := fmt.Sprintf("%+v", c.before)
		got, err := c.change.apply(c.before)
		if !errors.Is(err, c.err) {
			t.Errorf("%s: %v, want %v", c.name, err, c.err)
		}
		if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", c.after) {
			t.Errorf("%s:\n%+v, want\n%+v", c.name, got, c.after)
		}
		if fmt.Sprintf("%+v", c.before) != text {
			t.Errorf("%s: what was before has changed", c.name)
		}
	}
}

func TestStrictChecksCount(t *testing.T) {
	cluster := func(names ...string) (m backend.Membership) {
		for i, n := range names {
			m.Members = append(m.Members, backend.Member{ID: uint64(i + 1), Name: n})
		}
		return m
	}
	for _, c := range []struct {
		members backend.Membership
		may     bool
	}{
		{cluster("a"), true},
		{cluster(""), false},
		{cluster("a", ""), false},
		{cluster("a", "b"), true},
		{cluster("a", "b", ""), false},
		{cluster("a", "b", "c"), true},
		{cluster("a", "b", "c", ""), true},
		{cluster("a", "b", "", ""), false},
	} {
		if got := mayAddVoter(c.members); got != c.may {
			t.Errorf("%+v: adding a voter is allowed: %t, want %t", c.members.Members, got, c.may)
		}
	}
}
