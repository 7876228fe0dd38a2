package sqlraft

import (
	"slices"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/quire-db/quire/backend"
)

// A member whose log misses entries that it has acknowledged (its disk was lost, or an old copy of it was put back) is
// poison: the leader counts it among those that hold the entries, and it might vote for somebody who does not. It is
// found out by a heartbeat that calls something committed which it does not have, or when it starts with less than others
// or its own state know it to have. From then on it is lost: it votes for nobody, acknowledges nothing and proposes
// nothing, until the leader has taken it out of the cluster and let it in again as a learner (readmit.go).
//
// Why that is safe. Let M be lost, R the entry that lets it in again, and T the term of the leader who tells M that R is
// committed. The leader had applied before it made R that M is out, so M does not count for R.
//
//   - R is on a majority of the other voters, and with it everything before: what was committed with M's help does not
//     depend on M any more.
//   - A candidate that does not have R may still count M's vote, one that M gave before it was found out or since. It needs
//     half of the other voters beside it, at least one of which has R, and votes for no log without it. So each leader of a
//     term after T has R in its log, and M's mistakes made nobody lead.
//   - M comes back with term T at least, and its vote in T given to T's leader: it can help nobody else to lead T.
//   - Being taken out has the leader's Raft forget how far M had come. Until M's log reaches R, heartbeats that claim more
//     are from before and are ignored.
//
// What cannot be found out: a member put back from an old copy votes before it has heard from a leader that knew it
// better, and this vote decides. Two members put back together are not covered either: a majority has to be sound.
type rejoining struct {
	lost bool
	tell bool   // it has just been found out, or it was taken out although it lacks nothing
	upTo uint64 // index of the entry that let this member in again
	// voteTaken is told once.
	voteTaken bool
}

// mayStep says whether a heartbeat that calls more committed than this member has may be given to Raft: only if it is too
// old to be looked at, else Raft would panic. What it says makes the member lost, unless it is from before it was let in again.
func (c *core) mayStep(m *raftpb.Message) bool {
	if m.GetTerm() < c.rn.BasicStatus().HardState.GetTerm() {
		return true // Raft looks no further than the term
	}
	if c.storage.last() >= c.rejoin.upTo {
		c.lose()
	}
	return false
}

// lose makes this member lost.
func (c *core) lose() {
	if !c.rejoin.lost {
		c.rejoin.lost, c.rejoin.tell = true, true
	}
}

func (c *core) rejoinWork(out *output) {
	if c.rejoin.tell {
		c.rejoin.tell = false
		out.lost, out.leaderChanged = true, true
		c.turn(0, false, out)
	}
}

// setMembers notices when this member loses its vote and was not removed. Who has lost its log has asked for that and knows;
// but the leader that it asked may have lost its office, and its request may be put in the log by another one once this member
// is a voter again.
func (c *core) setMembers(next backend.Membership) {
	c.noticeVote(next)
	c.members = next
}

// noticeVote looks at what the members are about to be.
func (c *core) noticeVote(next backend.Membership) {
	if c.votes() && !hasVote(next, c.o.id) && !slices.Contains(next.Removed, c.o.id) {
		c.rejoin.voteTaken = true
	}
}

// votes says whether this member has a vote, as far as it knows.
func (c *core) votes() bool { return hasVote(c.members, c.o.id) }

func hasVote(m backend.Membership, id uint64) bool {
	self := memberOf(m, id)
	return self != nil && !self.Learner
}

// readmitted says that the leader of a term has let this member in again by the entry upTo. What it returns has to be
// durable before resume is called.
func (c *core) readmitted(term, leader, upTo uint64) *raftpb.HardState {
	if c.hard.term < term {
		c.hard.term, c.hard.vote = term, 0
	}
	if c.hard.term == term && c.hard.vote == 0 {
		c.hard.vote = leader
	}
	c.rejoin.upTo = upTo
	return c.hard.message()
}

// resume ends being lost.
func (c *core) resume() error {
	c.rejoin.lost = false
	return c.build(c.handed.index, c.handed.term)
}
