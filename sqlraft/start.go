package sqlraft

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/quire-db/quire/backend"
)

// What a member finds when it starts is a state, as of some applied index, and a log. The state may be ahead of the log
// (a copy was installed and the process ended before the log knew), and is behind it after a power cut. Index 1, of term
// 1, is nothing but the beginning of a cluster: whatever the database held by then. The founding entries follow it.

// logIdentity is what the log knows of itself, as JSON.
type logIdentity struct {
	Member uint64 `json:"member"`
	// Founding: the log was begun to found a cluster, which a crash may have interrupted.
	Founding bool `json:"founding,omitempty"`
	// Unconfirmed: it is one of several founders, and not certain yet that it is not one that was started before and has lost
	// its disk. See founding.go.
	Unconfirmed bool `json:"unconfirmed,omitempty"`
	// Bootstrap is what was known of the cluster when the log was begun, until the state machine knows more.
	Bootstrap backend.Membership `json:"bootstrap,omitzero"`
	// Lost: the log misses entries that this member has acknowledged. Rejoining: it did, or others thought so, and the member
	// was a voter then, which it is to become again. See rejoin.go.
	Lost      bool `json:"lost,omitempty"`
	Rejoining bool `json:"rejoining,omitempty"`
	// Installing is the index of the copy of the state that was fetched last, so that a state ahead of the log is known
	// from a log that was put back from an old copy.
	Installing uint64 `json:"installing,omitempty"`
}

// startOptions say what a member that has no log yet is to become.
type startOptions struct {
	id uint64
	// initial are the members of a new cluster; empty when this one joins another.
	initial backend.Membership
	// known is what is known of the cluster otherwise.
	known backend.Membership
	// lost: others say that this member has been started before, although it has nothing.
	lost bool
	// forceNewCluster leaves nobody but this member, and only what is known to be committed.
	forceNewCluster bool
}

// beginning is where core starts.
type beginning struct {
	storage *storage
	applied uint64
	members backend.Membership
	// identity is what the log says of itself now.
	identity logIdentity
}

// errNoState: see begin.
var errNoState = errors.New("the state is older than the log")

// begin brings log and state together, and makes a new log what it has to be. Errors are those of the log, or wrap
// backend.ErrDamaged.
func begin(l *raftLog, rec *recovered, sm StateMachine, o startOptions) (*beginning, error) {
	var identity logIdentity
	if len(rec.identity) > 0 {
		if err := json.Unmarshal(rec.identity, &identity); err != nil {
			return nil, fmt.Errorf("%w: the identity in the raft log: %w", backend.ErrDamaged, err)
		}
		if identity.Member != o.id {
			return nil, fmt.Errorf("sqlraft: this is the data of member %x, not of %x: look at --data-dir, --initial-advertise-peer-urls and --initial-cluster-token", identity.Member, o.id)
		}
	}
	applied, term := sm.Applied()
	members := sm.Members()
	hard := hardState{rec.hard.GetTerm(), rec.hard.GetVote(), rec.hard.GetCommit()}
	start, startTerm, entries := rec.start, rec.startTerm, rec.entries
	last := start + uint64(len(entries))
	voters := votersOf(members)
	alone := len(voters) == 1 && voters[0] == o.id
	switch {
	case identity.Lost || o.forceNewCluster:
	case len(rec.identity) == 0 && o.lost,
		// There is a state, but whom this member voted for and what it acknowledged is gone.
		applied > max(last, 1) && applied != identity.Installing && !alone:
		identity.Lost = true
	}
	b := &beginning{members: members}
	if len(rec.identity) == 0 || identity.Lost {
		if identity.Member = o.id; len(rec.identity) == 0 {
			identity.Founding = len(o.initial.Members) > 0 && !identity.Lost
			identity.Unconfirmed = identity.Founding && len(o.initial.Members) > 1
			if identity.Bootstrap = o.initial; len(o.initial.Members) == 0 {
				identity.Bootstrap = o.known
			}
		}
		if err := setLogIdentity(l, identity); err != nil {
			return nil, err
		}
	}
	restart := func(index, term uint64) error {
		if hard.term < term {
			hard.term, hard.vote = term, 0
		}
		hard.commit, start, startTerm, entries = index, index, term, nil
		return l.restart(index, term, hard.message())
	}
	switch {
	case applied > last,
		// A copy was installed over a log that had something else there, which nobody had committed.
		applied > hard.commit && applied == identity.Installing && (applied < start || applied > start && entries[applied-start-1].GetTerm() != term):
		if err := restart(applied, term); err != nil {
			return nil, err
		}
	case applied == 0 && start == 0 && identity.Founding:
		if err := restart(1, 1); err != nil {
			return nil, err
		}
	}
	if applied == 0 && start == 1 {
		applied, term = 1, 1
		if len(entries) == 0 { // also after a crash right here
			entries = foundingEntries(identity.Bootstrap)
			hard.commit = start + uint64(len(entries))
			if err := l.append(hard.message(), entries, true); err != nil {
				return nil, err
			}
		}
	}
	if applied < start {
		return nil, fmt.Errorf("%w: %w: the database is as of index %d, the log goes on after %d: replace this member, as docs/raft.md says", backend.ErrDamaged, errNoState, applied, start)
	}
	if hard.commit < applied {
		// Durable, like whatever is applied here: see settleChanges.
		hard.commit = applied
		if err := l.append(hard.message(), nil, true); err != nil {
			return nil, err
		}
	}
	b.storage, b.applied = newStorage(start, startTerm, entries), applied
	if !b.storage.has(applied, term) {
		return nil, fmt.Errorf("%w: the database is as of index %d in term %d, which the log does not have: they are not of the same member; replace it, as docs/raft.md says", backend.ErrDamaged, applied, term)
	}
	b.identity = identity
	if o.forceNewCluster {
		var err error
		if hard, err = b.leaveOthers(l, hard, o.id); err != nil {
			return nil, err
		}
	}
	b.storage.hardState = hard.message()
	return b, nil
}

// refuseOwnData returns an error for a database that was written to before it belonged to a cluster, unless its member is to
// found one alone: other founders start with nothing, and who joins takes over what the others have.
func refuseOwnData(o *Options, sm StateMachine) error {
	applied, _ := sm.Applied()
	alone := len(o.Membership.Members) == 1 && !o.Joining && !o.Lost
	if applied != 0 || alone || sm.Empty() {
		return nil
	}
	id, err := Initialized(o.Dir)
	if err != nil || id != 0 {
		return err
	}
	return errOwnData
}

var errOwnData = errors.New("sqlraft: the database holds data that the other members do not have; to keep it, found the cluster of this " +
	"member alone (with nobody else in --initial-cluster, and --initial-cluster-state new) and add the others with `etcdctl member add`; " +
	"else start with an empty data directory")

func setLogIdentity(l *raftLog, identity logIdentity) error {
	data, err := json.Marshal(identity)
	if err != nil {
		return fmt.Errorf("sqlraft: encoding the identity of the log: %w", err)
	}
	return l.setIdentity(data)
}

// leaveOthers drops what is not known to be committed, and appends entries that take everybody else out of the cluster,
// committed. It does nothing where nobody else is in it.
func (b *beginning) leaveOthers(l *raftLog, hard hardState, id uint64) (hardState, error) {
	members := b.members
	for i := b.applied + 1; i <= hard.commit; i++ {
		e := b.storage.entries[i-b.storage.entries[0].GetIndex()]
		if e.GetType() != raftpb.EntryConfChange {
			continue
		}
		_, ch, err := readChange(e)
		if err != nil {
			return hard, err
		}
		if next, err := ch.apply(members); err == nil {
			members = next
		}
	}
	var entries []*raftpb.Entry
	add := func(kind changeKind, member backend.Member) error {
		ch := memberChange{Kind: kind, Member: member}
		next, err := ch.apply(members)
		if err != nil {
			return fmt.Errorf("sqlraft: --force-new-cluster: %s of member %x: %w", kind, member.ID, err)
		}
		members = next
		entries = append(entries, changeEntry(&ch, hard.commit+uint64(len(entries))+1, hard.term))
		return nil
	}
	self := memberOf(members, id)
	if self == nil {
		return hard, fmt.Errorf("sqlraft: --force-new-cluster: %x is not a member of the cluster whose data this is, which has %x", id, votersOf(members))
	}
	if self.Learner {
		if err := add(changePromote, *self); err != nil {
			return hard, err
		}
	}
	for _, m := range slices.Clone(members.Members) {
		if m.ID != id {
			if err := add(changeRemove, m); err != nil {
				return hard, err
			}
		}
	}
	if len(entries) > 0 {
		hard.vote = id
		hard.commit += uint64(len(entries))
		if err := l.append(hard.message(), entries, true); err != nil {
			return hard, err
		}
		b.storage.append(entries)
	}
	if b.identity.Lost || b.identity.Rejoining || b.identity.Unconfirmed {
		b.identity = logIdentity{Member: id}
		return hard, setLogIdentity(l, b.identity)
	}
	return hard, nil
}
