package sqlraft

import (
	"fmt"
	"math"
	"slices"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

	"github.com/quire-db/quire/backend"
)

// A proposal goes to the leader, and into the log at most once, whatever the network does:
//
//   - For each leader and term that it sends to, a member draws a session and numbers its proposals from 1. The leader
//     takes of a session exactly the next number, and says up to which it has (packet taken). What it does not confirm is
//     sent again (go-back-N). Sessions are never drawn twice, so that packets of a member's earlier life are told apart.
//   - The leader puts what it took into entries of that term and of no other: it drops the rest when it is deposed.
//   - So a proposal that was sent to the leader of term t stands in entries of term t only. Terms never fall within the
//     log. Once a member has handed out an entry of a later term, every entry of term t that will ever be committed lies
//     before it; a proposal that was in none of them never will be, and is proposed anew to the present leader.
//
// A member that installs a copy of the state cannot see which proposals are in it: those that may be fail.

// Bounds. What does not fit waits where it is; a member that has too much waiting refuses.
const (
	maxForwardBytes  = 1 << 20 // of payload in a packet; one proposal may be larger
	maxForwardCount  = 1024
	maxFlightBytes   = 8 << 20 // sent and not yet taken
	maxEntryBytes    = 8 << 20 // of payload in an entry; one proposal may be larger
	maxEntryCount    = 1024
	maxQueueBytes    = 64 << 20 // taken and not yet in the log
	maxProposalBytes = 256 << 20
	maxProposals     = 1 << 16
)

// proposal is something that this member wants in the log.
type proposal struct {
	payload        []byte
	conf           bool           // payload is a memberChange
	ticket         backend.Ticket // nil: nobody waits
	failed         bool           // ticket was told so
	born, deadline uint64         // ticks
}

// proposals are those of this member that are not handed out yet.
type proposals struct {
	fresh    []*proposal // not sent to anybody
	sessions []*session  // oldest first
	count    int
	bytes    int
	again    int // how many were proposed anew
}

// session is what was sent to the leader of one term.
type session struct {
	id, leader, term uint64
	first            uint64 // number of sent[0], the oldest that is not handed out
	sent             []*proposal
	taken            uint64 // the leader has everything up to here
	next             uint64 // is sent next; everything before was sent at least once
	flight           int    // bytes after taken
	resend           uint64 // tick in which next goes back
	refused          bool
}

func (s *session) end() uint64 { return s.first + uint64(len(s.sent)) } // behind the last number

func (s *session) at(number uint64) *proposal { return s.sent[number-s.first] }

// propose has payload put into the log, or ticket, unless it is nil, failed.
func (c *core) propose(payload []byte, conf bool, ticket backend.Ticket) {
	p := &proposal{payload: payload, conf: conf, ticket: ticket, born: c.now, deadline: c.now + c.o.requestTicks}
	if c.own.count >= maxProposals || c.own.bytes+len(payload) > maxProposalBytes && c.own.count > 0 {
		p.fail(rpctypes.ErrGRPCRequestTooManyRequests)
		return
	}
	c.own.count++
	c.own.bytes += len(payload)
	c.own.fresh = append(c.own.fresh, p)
}

// leave counts a proposal out.
func (p *proposals) leave(one *proposal) {
	p.count--
	p.bytes -= len(one.payload)
}

// session finds the one to the present leader, nil if there is none yet.
func (c *core) session() *session {
	if n := len(c.own.sessions); n > 0 {
		if s := c.own.sessions[n-1]; s.leader == c.lead && s.term == c.hard.term {
			return s
		}
	}
	return nil
}

// dispatch sends what is fresh, and again what was lost.
func (c *core) dispatch(out *output) {
	if c.lead == 0 || c.rejoin.lost {
		return
	}
	if inStep := c.inStep.lead == c.lead && c.inStep.term == c.hard.term; !c.leading &&
		(c.copies.fetching != nil || !inStep && c.now < c.leaderSince+uint64(c.o.electionTicks)) {
		return // it may turn out that this member needs a copy of the state, which would fail what is on its way
	}
	s := c.session()
	if s == nil {
		if len(c.own.fresh) == 0 {
			return
		}
		s = &session{id: c.o.random(), leader: c.lead, term: c.hard.term, first: 1, next: 1}
		c.own.sessions = append(c.own.sessions, s)
	}
	if s.refused {
		return
	}
	n := 0
	for ; n < len(c.own.fresh); n++ {
		p := c.own.fresh[n]
		if c.leading {
			if c.queue.full() {
				break
			}
			c.queue.put(accepted{origin: c.o.id, session: s.id, number: s.end(), conf: p.conf, payload: p.payload})
			s.taken, s.next = s.end(), s.end()+1
		} else {
			if s.flight > 0 && s.flight+len(p.payload) > maxFlightBytes {
				break
			}
			s.flight += len(p.payload)
		}
		s.sent = append(s.sent, p)
	}
	c.own.fresh = slices.Delete(c.own.fresh, 0, n)
	for s.next < s.end() {
		if s.next == s.taken+1 {
			s.resend = c.now + uint64(c.o.electionTicks)
		}
		f := &forward{term: s.term, session: s.id, first: s.next}
		for size := 0; s.next < s.end(); s.next++ {
			p := s.at(s.next)
			if len(f.proposals) > 0 && (size+len(p.payload) > maxForwardBytes || len(f.proposals) == maxForwardCount) {
				break
			}
			size += len(p.payload)
			f.proposals = append(f.proposals, forwarded{conf: p.conf, payload: p.payload})
		}
		out.before = append(out.before, packet{to: s.leader, from: c.o.id, forward: f})
	}
}

// resendForwards goes back to what the leader should have taken by now.
func (c *core) resendForwards() {
	if s := c.session(); s != nil && s.taken+1 < s.end() && c.now >= s.resend {
		s.next = max(s.taken+1, s.first)
	}
}

// forwardsLost says that what was sent to a member may not have arrived.
func (c *core) forwardsLost(to uint64) {
	if s := c.session(); s != nil && s.leader == to {
		s.resend = c.now + 1
	}
}

// receiveTaken hears what the leader has.
func (c *core) receiveTaken(from uint64, t *taken) {
	for _, s := range c.own.sessions {
		if s.id != t.session || s.leader != from || s.term != t.term {
			continue
		}
		for ; s.taken < t.upTo && s.taken+1 < s.end(); s.taken++ {
			s.flight -= len(s.at(s.taken + 1).payload)
			s.resend = c.now + uint64(c.o.electionTicks)
		}
		s.next = max(s.next, s.taken+1)
		s.refused = s.refused || t.refused
		return
	}
}

// giveTickets puts the tickets of this member's proposals into an entry that is handed out.
func (c *core) giveTickets(d decodedEntry) {
	at := 0
	for _, g := range d.groups {
		if g.origin == c.o.id {
			if s := c.takeSession(g.session); s != nil {
				for i := range uint64(g.count) {
					d.proposals[at+int(i)].Ticket = c.handedOut(s, g.first+i)
				}
			}
		}
		at += g.count
	}
}

func (c *core) takeSession(id uint64) *session {
	for _, s := range c.own.sessions {
		if s.id == id {
			return s
		}
	}
	return nil // of an earlier life
}

// handedOut takes a proposal off the front of its session and returns its ticket, unless that has failed.
func (c *core) handedOut(s *session, number uint64) backend.Ticket {
	if len(s.sent) == 0 || number != s.first {
		panic(fmt.Sprintf("sqlraft: proposal %d of session %x is in the log where %d of %d to %d should be", number, s.id, s.first, s.first, s.end()))
	}
	p := s.sent[0]
	s.sent = s.sent[1:]
	s.first++
	if s.taken < number { // the confirmation is still on its way
		s.flight -= len(p.payload)
		s.taken = number
	}
	s.next = max(s.next, s.first)
	c.own.leave(p)
	if p.failed {
		return nil
	}
	return p.ticket
}

// termApplied says that an entry of a term is handed out next, the first of it: what was sent to leaders of earlier
// terms, and has not been handed out before it, never will be.
func (c *core) termApplied(term uint64) {
	var again []*proposal
	kept := c.own.sessions[:0]
	for _, s := range c.own.sessions {
		if s.term >= term {
			kept = append(kept, s)
			continue
		}
		for _, p := range s.sent {
			if p.failed {
				c.own.leave(p)
				continue
			}
			again = append(again, p)
		}
	}
	clear(c.own.sessions[len(kept):])
	c.own.sessions = kept
	if len(again) > 0 {
		c.own.again += len(again)
		c.own.fresh = append(again, c.own.fresh...)
	}
}

// failUpTo fails the proposals that may be in a state which was taken over from another member.
func (c *core) failUpTo(term uint64, err error) {
	kept := c.own.sessions[:0]
	for _, s := range c.own.sessions {
		if s.term > term {
			kept = append(kept, s)
			continue
		}
		for _, p := range s.sent {
			p.fail(err)
			c.own.leave(p)
		}
	}
	clear(c.own.sessions[len(kept):])
	c.own.sessions = kept
}

// failAll fails everything that waits, because this member stops.
func (c *core) failAll(err error) {
	c.failUpTo(math.MaxUint64, err)
	for _, p := range c.own.fresh {
		p.fail(err)
		c.own.leave(p)
	}
	c.own.fresh = nil
	c.failChanges(err)
	c.reads.failAll(err)
}

// failChanges fails the changes of the members that are handed out and not done.
func (c *core) failChanges(err error) {
	for i := range c.pending {
		if p := &c.pending[i]; p.change != nil {
			p.change.Fail(err)
		}
	}
}

func (p *proposal) fail(err error) {
	if p.ticket != nil && !p.failed {
		p.ticket.Fail(err)
	}
	p.failed = true
}

// expireProposals fails those that have waited too long. Those that were sent stay, without their ticket: they may
// still be applied, and their numbers are needed.
func (c *core) expireProposals() {
	kept := c.own.fresh[:0]
	for _, p := range c.own.fresh {
		if p.deadline > c.now {
			kept = append(kept, p)
			continue
		}
		p.fail(c.timeout(p.born))
		c.own.leave(p)
	}
	clear(c.own.fresh[len(kept):])
	c.own.fresh = kept
	for _, s := range c.own.sessions {
		for _, p := range s.sent {
			if !p.failed && p.deadline <= c.now {
				p.fail(c.timeout(p.born))
			}
		}
	}
}

// timeout says, as etcd does, why something that began in tick born has not come to an end.
func (c *core) timeout(born uint64) error {
	if before := 2 * uint64(c.o.electionTicks); born < c.leaderSince && born+before > c.leaderSince {
		return rpctypes.ErrGRPCTimeoutDueToLeaderFail
	}
	switch c.lead {
	case 0:
	case c.o.id:
		connected := 0
		for _, m := range c.members.Members {
			if m.ID == c.o.id || c.o.connectedSince(m.ID, born) {
				connected++
			}
		}
		if connected < quorum(len(c.members.Members)) {
			return rpctypes.ErrGRPCTimeoutDueToConnectionLost
		}
	default:
		if !c.o.connectedSince(c.lead, born) {
			return rpctypes.ErrGRPCTimeoutDueToConnectionLost
		}
	}
	return rpctypes.ErrGRPCTimeout
}

// leaderQueue is what a leader has taken, its own proposals among it.
type leaderQueue struct {
	waiting []accepted
	bytes   int
	upTo    map[sessionKey]uint64 // the last number taken
	answers []packet              // taken, to be sent

	asked    bool   // StateMachine.Lead was or is being called
	stamping bool   // it was: entries may be made
	barrier  uint64 // no conf change before this index is applied: Raft would swallow it
	blocked  bool   // Raft has taken as much as it does
}

type sessionKey struct{ origin, session uint64 }

func (q *leaderQueue) full() bool { return q.bytes >= maxQueueBytes }

func (q *leaderQueue) put(a accepted) {
	q.waiting = append(q.waiting, a)
	q.bytes += len(a.payload)
}

// reset forgets what waits: what was taken can only come into the log by this leadership, which is over.
func (q *leaderQueue) reset() {
	q.waiting, q.bytes, q.upTo, q.stamping, q.blocked = nil, 0, nil, false, false
}

// receiveForward takes what comes next in the session.
func (c *core) receiveForward(from uint64, f *forward) {
	answer := &taken{term: f.term, session: f.session}
	if !c.leading || f.term != c.hard.term {
		answer.refused = true
		c.queue.answer(from, c.o.id, answer)
		return
	}
	key := sessionKey{from, f.session}
	upTo := c.queue.upTo[key]
	for i := range f.proposals {
		if f.first+uint64(i) != upTo+1 {
			continue
		}
		if c.queue.full() {
			break
		}
		upTo++
		c.queue.put(accepted{origin: from, session: f.session, number: upTo, conf: f.proposals[i].conf, payload: f.proposals[i].payload})
	}
	if c.queue.upTo == nil {
		c.queue.upTo = map[sessionKey]uint64{}
	}
	c.queue.upTo[key] = upTo
	answer.upTo = upTo
	c.queue.answer(from, c.o.id, answer)
}

func (q *leaderQueue) answer(to, from uint64, t *taken) {
	for i := range q.answers {
		if a := q.answers[i].taken; q.answers[i].to == to && a.session == t.session && a.term == t.term {
			a.upTo, a.refused = max(a.upTo, t.upTo), a.refused || t.refused
			return
		}
	}
	q.answers = append(q.answers, packet{to: to, from: from, taken: t})
}

// acknowledge sends the answers.
func (c *core) acknowledge(out *output) {
	out.before = append(out.before, c.queue.answers...)
	clear(c.queue.answers)
	c.queue.answers = c.queue.answers[:0]
}

// seal puts as much as fits of what waits into one entry. What Raft does not take now stays.
func (c *core) seal() {
	q := &c.queue
	if !q.stamping || q.blocked || len(q.waiting) == 0 {
		return
	}
	// What Raft has gone through since its last Ready is not known here yet; the term is what everything rests on.
	if st := c.rn.BasicStatus(); st.RaftState != raft.StateLeader || st.HardState.GetTerm() != c.hard.term {
		return
	}
	if !q.bringForward(c.removesSelf) {
		q.blocked = true
		c.makeRoom()
		return
	}
	n := 0
	var err error
	if q.waiting[0].conf {
		if c.applied < q.barrier {
			return
		}
		n = 1
		cc := confChangeOf(&q.waiting[0])
		if err = c.rn.ProposeConfChange(cc); err == nil {
			q.barrier = math.MaxUint64 // until noteEntries has seen it
		}
	} else {
		for size := 0; n < len(q.waiting) && n < maxEntryCount && !q.waiting[n].conf; n++ {
			if size += len(q.waiting[n].payload); size > maxEntryBytes && n > 0 {
				break
			}
		}
		err = c.rn.Propose(encodeEntry(c.o.stamp(), q.waiting[:n]))
	}
	if err != nil {
		q.blocked = true // too much is under way, or leadership is being handed over: tried again when that may be over
		return
	}
	for i := range q.waiting[:n] {
		q.bytes -= len(q.waiting[i].payload)
	}
	q.waiting = slices.Delete(q.waiting, 0, n)
}

// removesSelf says whether a proposal takes this leader out of the cluster. Nobody does that to himself: of two voters the
// other one would not hear whether it has the only vote left.
func (c *core) removesSelf(a *accepted) bool {
	if !a.conf || lastVoter(c.members, c.o.id) {
		return false
	}
	cc := confChangeOf(a)
	return cc.GetType() == raftpb.ConfChangeRemoveNode && cc.GetNodeId() == c.o.id
}

// makeRoom has somebody else lead, who gets what is waiting again and can take this member out. Two who are both to be
// removed would hand over to each other for ever: so each leads for a while first, in which it takes the other one out.
func (c *core) makeRoom() {
	if c.now < c.leaderSince+uint64(c.o.electionTicks) {
		return
	}
	if to := c.successor(); to != 0 {
		c.rn.TransferLeader(to)
	}
}

// bringForward makes the first session that does not begin with what has to wait the first of all; false if there is
// none. Between sessions there is no order.
func (q *leaderQueue) bringForward(waits func(*accepted) bool) bool {
	if !waits(&q.waiting[0]) {
		return true
	}
	var seen []sessionKey
	for i := range q.waiting {
		a := &q.waiting[i]
		key := sessionKey{a.origin, a.session}
		if slices.Contains(seen, key) {
			continue
		}
		if seen = append(seen, key); waits(a) {
			continue
		}
		var first, rest []accepted
		for _, a := range q.waiting {
			if a.origin == key.origin && a.session == key.session {
				first = append(first, a)
			} else {
				rest = append(rest, a)
			}
		}
		q.waiting = append(first, rest...)
		return true
	}
	return false
}

// noteEntries sees what a leader is about to write.
func (c *core) noteEntries(entries []*raftpb.Entry) {
	if !c.leading || c.queue.barrier != math.MaxUint64 {
		return
	}
	for _, e := range entries {
		if e.GetTerm() == c.hard.term && (e.GetType() == raftpb.EntryConfChange || !c.queue.stamping) {
			c.queue.barrier = e.GetIndex()
		}
	}
	if c.queue.barrier == math.MaxUint64 && len(entries) > 0 && c.queue.stamping {
		panic(fmt.Sprintf("sqlraft: Raft has swallowed a change of the members, in entries %d to %d", entries[0].GetIndex(), entries[len(entries)-1].GetIndex()))
	}
}
