package sqlraft

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

// memberChange is a change of the membership, as JSON the payload of a proposal and the context of a raftpb.ConfChange.
// Whether it has an effect is decided when it is applied, by the members at that point of the log alone.
type memberChange struct {
	Kind   changeKind     `json:"kind"`
	Member backend.Member `json:"member"`
	// ClusterID is set in the entries that found a cluster.
	ClusterID uint64 `json:"clusterID,omitempty"`
	// MaxLearners is the limit of the member that asks for an addition.
	MaxLearners int `json:"maxLearners,omitempty"`

	// The leader fills in whose proposal it is.
	Origin  uint64 `json:"origin,omitempty"`
	Session uint64 `json:"session,omitempty"`
	Number  uint64 `json:"number,omitempty"`
}

type changeKind string

const (
	changeAdd     changeKind = "add"     // Member, as it is
	changePromote changeKind = "promote" // a learner to a voter
	changeRemove  changeKind = "remove"  // for good
	changeUpdate  changeKind = "update"  // PeerURLs
	changePublish changeKind = "publish" // Name and ClientURLs
	// A member that lost its log is taken out, and comes back as a learner: see rejoin.go.
	changeForget  changeKind = "forget"
	changeReadmit changeKind = "readmit" // Member
)

// changeTicket stands for whoever waits for a memberChange.
type changeTicket interface {
	backend.Ticket
	// done says that the change is applied at index, or that it was refused; m are the members afterwards.
	done(m backend.Membership, index uint64, err error)
}

// apply returns the membership after the change. An error is etcd's, and m stays as it is.
func (ch *memberChange) apply(m backend.Membership) (backend.Membership, error) {
	id := ch.Member.ID
	if id == 0 || slices.Contains(m.Removed, id) {
		return m, rpctypes.ErrGRPCMemberNotFound
	}
	at := slices.IndexFunc(m.Members, func(o backend.Member) bool { return o.ID == id })
	if at < 0 && ch.Kind != changeAdd && ch.Kind != changeReadmit {
		return m, rpctypes.ErrGRPCMemberNotFound
	}
	next := backend.Membership{ClusterID: cmp.Or(m.ClusterID, ch.ClusterID), Members: slices.Clone(m.Members), Removed: slices.Clone(m.Removed)}
	switch ch.Kind {
	case changeAdd, changeReadmit:
		if at >= 0 {
			return m, rpctypes.ErrGRPCMemberExist
		}
		if urlTaken(m, id, ch.Member.PeerURLs) {
			return m, rpctypes.ErrGRPCPeerURLExist
		}
		if ch.Kind == changeAdd && ch.Member.Learner && len(learnersOf(m)) >= ch.MaxLearners {
			return m, rpctypes.ErrGRPCTooManyLearners
		}
		next.Members = append(next.Members, ch.Member)
		next.Members[len(next.Members)-1].Learner = ch.Member.Learner || ch.Kind == changeReadmit
	case changePromote:
		if !m.Members[at].Learner {
			return m, rpctypes.ErrGRPCMemberNotLearner
		}
		next.Members[at].Learner = false
	case changeRemove, changeForget:
		if lastVoter(m, id) {
			return m, rpctypes.ErrGRPCMemberNotEnoughStarted
		}
		next.Members = slices.Delete(next.Members, at, at+1)
		if ch.Kind == changeRemove {
			next.Removed = append(next.Removed, id)
		}
	case changeUpdate:
		if urlTaken(m, id, ch.Member.PeerURLs) {
			return m, rpctypes.ErrGRPCPeerURLExist
		}
		next.Members[at].PeerURLs = ch.Member.PeerURLs
	case changePublish:
		next.Members[at].Name, next.Members[at].ClientURLs = ch.Member.Name, ch.Member.ClientURLs
	default:
		return m, fmt.Errorf("%w: a change of the members is called %q", errBadEntry, ch.Kind)
	}
	sortByID(next.Members)
	slices.Sort(next.Removed)
	return next, nil
}

func urlTaken(m backend.Membership, by uint64, urls []string) bool {
	for _, o := range m.Members {
		if o.ID != by && slices.ContainsFunc(o.PeerURLs, func(u string) bool { return slices.Contains(urls, u) }) {
			return true
		}
	}
	return false
}

func lastVoter(m backend.Membership, id uint64) bool {
	voters := votersOf(m)
	return len(voters) == 1 && voters[0] == id
}

// votersOf and learnersOf are in the order of the ids.
func votersOf(m backend.Membership) (ids []uint64) {
	for _, o := range m.Members {
		if !o.Learner {
			ids = append(ids, o.ID)
		}
	}
	return ids
}

func learnersOf(m backend.Membership) (ids []uint64) {
	for _, o := range m.Members {
		if o.Learner {
			ids = append(ids, o.ID)
		}
	}
	return ids
}

// memberOf returns nil for somebody who is none.
func memberOf(m backend.Membership, id uint64) *backend.Member {
	for i := range m.Members {
		if m.Members[i].ID == id {
			return &m.Members[i]
		}
	}
	return nil
}

func confStateOf(m backend.Membership) *raftpb.ConfState {
	return &raftpb.ConfState{Voters: votersOf(m), Learners: learnersOf(m)}
}

// payload is how a change is proposed.
func (ch *memberChange) payload() []byte {
	data, err := json.Marshal(ch)
	if err != nil {
		panic(fmt.Sprintf("sqlraft: encoding a change of the members: %v", err)) // strings and numbers
	}
	return data
}

// confChange is what Raft makes of a change.
func (ch *memberChange) confChange() *raftpb.ConfChange {
	cc := &raftpb.ConfChange{NodeId: new(ch.Member.ID), Context: ch.payload()}
	switch {
	case ch.Kind == changeAdd && ch.Member.Learner || ch.Kind == changeReadmit:
		cc.Type = raftpb.ConfChangeAddLearnerNode.Enum()
	case ch.Kind == changeAdd || ch.Kind == changePromote:
		cc.Type = raftpb.ConfChangeAddNode.Enum()
	case ch.Kind == changeRemove || ch.Kind == changeForget:
		cc.Type = raftpb.ConfChangeRemoveNode.Enum()
	default:
		cc.Type = raftpb.ConfChangeUpdateNode.Enum()
	}
	return cc
}

// confChangeOf is for the log. A payload that makes no sense becomes a change of no member, which is refused: it has a number.
func confChangeOf(a *accepted) *raftpb.ConfChange {
	var ch memberChange
	if err := json.Unmarshal(a.payload, &ch); err != nil {
		ch = memberChange{Kind: "unreadable"}
	}
	ch.Origin, ch.Session, ch.Number = a.origin, a.session, a.number
	return ch.confChange()
}

// foundingEntries are the log of a new cluster after index 1: they make its members, on each of them the same.
func foundingEntries(m backend.Membership) []*raftpb.Entry {
	entries := make([]*raftpb.Entry, len(m.Members))
	for i, member := range m.Members {
		ch := memberChange{Kind: changeAdd, Member: member, ClusterID: m.ClusterID, MaxLearners: len(m.Members)}
		entries[i] = changeEntry(&ch, uint64(i)+2, 1)
	}
	return entries
}

func changeEntry(ch *memberChange, index, term uint64) *raftpb.Entry {
	data, err := proto.Marshal(ch.confChange())
	if err != nil {
		panic(fmt.Sprintf("sqlraft: encoding a change of the members: %v", err))
	}
	return &raftpb.Entry{Type: raftpb.EntryConfChange.Enum(), Index: new(index), Term: new(term), Data: data}
}

// readChange reads what changeEntry, or Raft with confChangeOf, has made.
func readChange(e *raftpb.Entry) (*raftpb.ConfChange, *memberChange, error) {
	cc, ch := new(raftpb.ConfChange), new(memberChange)
	if err := proto.Unmarshal(e.GetData(), cc); err != nil {
		return nil, nil, fmt.Errorf("%w: entry %d: %w", errBadEntry, e.GetIndex(), err)
	}
	if err := json.Unmarshal(cc.GetContext(), ch); err != nil {
		return nil, nil, fmt.Errorf("%w: entry %d: %w", errBadEntry, e.GetIndex(), err)
	}
	return cc, ch, nil
}

// handOutChange gives a change to the state machine.
func (c *core) handOutChange(e *raftpb.Entry, out *output) error {
	cc, ch, err := readChange(e)
	if err != nil {
		return err
	}
	op := operation{kind: opMembers, index: e.GetIndex(), term: e.GetTerm()}
	var p pendingOperation
	if ch.Origin == c.o.id {
		if s := c.takeSession(ch.Session); s != nil {
			op.change, _ = c.handedOut(s, ch.Number).(changeTicket)
			p.change = op.change
		}
	}
	next, err := ch.apply(c.members)
	if errors.Is(err, errBadEntry) {
		return err // who passes it over has other members than those who know it
	} else if err != nil {
		p.refusal = err
	} else {
		c.setMembers(next)
		op.members, p.conf = &next, cc
	}
	p.members = c.members
	c.operate(out, op, p)
	return nil
}

// readyShare is how much of the leader's log a learner must have to be promoted on request, as in etcd.
const readyShare = 0.9

// mayPromote says whether a learner has caught up. Errors are etcd's.
func (c *core) mayPromote(id uint64) error {
	if !c.leading {
		return rpctypes.ErrGRPCNotLeader
	}
	found, match, own := false, uint64(0), uint64(0)
	c.rn.WithProgress(func(of uint64, _ raft.ProgressType, pr tracker.Progress) {
		if of == id {
			found, match = true, pr.Match
		}
		if of == c.o.id {
			own = pr.Match
		}
	})
	switch {
	case !found:
		return rpctypes.ErrGRPCMemberNotFound
	case float64(match) < float64(own)*readyShare:
		return rpctypes.ErrGRPCLearnerNotReady
	}
	return nil
}
