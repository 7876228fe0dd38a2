package sqlraft

import (
	"errors"
	"fmt"
	"math"
	"slices"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"

	"github.com/quire-db/quire/backend"
)

// core is a member without its surroundings: no goroutine, no clock, no disk and no network of its own. It wraps Raft's
// own state machine and adds what is not Raft's: proposals of many members in one entry, put there at most once
// (forward.go), membership (member.go), copies of the state for those too far behind (snapshot.go), reads (read.go).
//
// Whoever drives it tells it what happens (tick, receive, propose, …) and then, until ready returns false, does what
// ready says and calls persisted. What it does next follows from that alone.
type core struct {
	o       coreOptions
	rn      *raft.RawNode
	storage *storage

	now   uint64 // ticks since the start
	hard  hardState
	stale bool // hard.commit is not on disk; it can wait for the next write
	flush bool // but not any longer

	lead        uint64 // 0: nobody
	leading     bool
	leaderSince uint64                      // tick in which the last leader was learnt of
	inStep      struct{ lead, term uint64 } // whose log this one had everything of, once, that was committed
	heard       uint64                      // tick in which a leader was last heard of
	silent      bool                        // that is long ago: tell
	gone        struct{ id, tick uint64 }   // who has no process any more, it seems, and since when
	givenUp     uint64                      // tick in which the leader was given up for that
	eager       bool                        // see campaign
	hastened    bool                        // see hasten
	responses   []*raftpb.Message

	// What was handed out to be applied, and what of that is not done yet.
	handed  struct{ index, term uint64 }
	members backend.Membership // as of handed.index
	pending []pendingOperation
	changes []uint64 // indexes of changes of the members that are not known to be committed
	number  uint64   // of the last operation
	applied uint64   // index that Raft was told of

	own    proposals
	queue  leaderQueue
	reads  readQueue
	copies copies
	rejoin rejoining
	say    []packet // to be sent with the next output, whatever is on disk
}

// coreOptions are what a core is made of. Times are in ticks.
type coreOptions struct {
	id            uint64
	storage       *storage
	members       backend.Membership // as of storage's hard state's commit or before: as of applied
	applied       uint64
	electionTicks int
	preVote       bool
	// requestTicks is how long a proposal or a read may take, retryTicks after how long a read is asked for again.
	requestTicks, retryTicks uint64
	// catchUpEntries are kept for followers that lag, at most catchUpBytes of them.
	catchUpEntries, catchUpBytes int
	lost                         bool // see rejoin.go

	// stamp is StateMachine.Stamp. random returns numbers that never come again, on whatever member.
	stamp  func() []byte
	random func() uint64
	// connectedSince says whether packets have gone to a member and back ever since a tick.
	connectedSince func(id, tick uint64) bool
	logger         raft.Logger
}

// output is what is to be done; slices are used again by the next ready. What says so waits until all that is to be written is
// durable, in the order of the fields; the rest may be done before.
type output struct {
	// before may be sent before anything is durable.
	before []packet
	// restart, if not nil, says that the log forgets everything and goes on after index. The state machine holds what
	// was before durably. Nothing else is to be persisted then.
	restart *logPosition
	// hardState, unless nil, and entries are to be appended to the log, synced if mustSync. Then persisted is called.
	hardState *raftpb.HardState
	entries   []*raftpb.Entry
	mustSync  bool
	// after may be sent once all that is durable.
	after []packet
	// apply is for the state machine, whenever it comes to it, in order; then done is called. It need not wait for
	// what is to be persisted, unless applyAfter says so.
	apply      []operation
	applyAfter bool

	makeSnapshot    bool            // a copy of the state is wanted; snapshotMade answers
	releaseSnapshot bool            // nobody needs the copy any more
	download        *snapshotNotice // another member's copy is to be fetched, its index kept durably; downloaded answers
	leaderChanged   bool            // another leader, another term, or none
	silent          bool            // no leader was heard of for long; said again from time to time
	lost            bool            // the log misses what it had acknowledged, which is to be kept durably: see rejoin.go
	voteTaken       bool            // this member was a voter, and was taken out to be let in again: it wants its vote back
}

type logPosition struct{ index, term uint64 }

type operationKind int

const (
	opApply   operationKind = iota // entries
	opMembers                      // one entry that changes the members, or nothing
	opLead                         // StateMachine.Lead(term)
	opFollow                       // StateMachine.Follow
	opInstall                      // StateMachine.Install
)

// operation is one thing for the goroutine that owns the state machine.
type operation struct {
	number      uint64 // for done
	kind        operationKind
	index, term uint64 // of the last entry in it
	entries     []backend.Entry
	members     *backend.Membership // nil: unchanged
	change      changeTicket        // who waits for the change, to be failed if it is not done; nil: nobody here
	install     *snapshotNotice
}

// pendingOperation is what core has to do once an operation is done.
type pendingOperation struct {
	number, index, term uint64
	kind                operationKind
	conf                *raftpb.ConfChange // for Raft
	change              changeTicket       // is answered, once Raft knows too; nil: nobody waits here
	members             backend.Membership
	refusal             error           // what is wrong with the change, which has no effect then
	applied             *raftpb.Message // for Raft
	install             *snapshotNotice
}

// Bounds of what Raft keeps under way; what does not fit waits in leaderQueue.
const (
	maxMessageBytes     = 1 << 20
	maxInflightMessages = 512
	maxInflightBytes    = 64 << 20
	maxUncommittedBytes = 128 << 20
	maxApplyingBytes    = 64 << 20
)

func newCore(o coreOptions) (*core, error) {
	c := &core{o: o, storage: o.storage, members: o.members}
	hs := o.storage.hardState
	c.hard = hardState{hs.GetTerm(), hs.GetVote(), hs.GetCommit()}
	c.reads.init(o.random())
	c.rejoin.lost = o.lost
	term, err := o.storage.Term(o.applied)
	if err != nil {
		return nil, fmt.Errorf("sqlraft: the state is that of index %d, the log goes from %d to %d: %w", o.applied, o.storage.first(), o.storage.last(), err)
	}
	return c, c.build(o.applied, term)
}

// build makes Raft anew, with everything up to index applied. REQUIRES: c.members and c.storage are as of there.
func (c *core) build(index, term uint64) error {
	c.hard.commit = max(c.hard.commit, index)
	c.storage.hardState, c.storage.conf = c.hard.message(), confStateOf(c.members)
	rn, err := raft.NewRawNode(&raft.Config{
		ID:                        c.o.id,
		ElectionTick:              c.o.electionTicks,
		HeartbeatTick:             1,
		Storage:                   c.storage,
		Applied:                   index,
		AsyncStorageWrites:        true,
		MaxSizePerMsg:             maxMessageBytes,
		MaxCommittedSizePerReady:  maxApplyingBytes,
		MaxUncommittedEntriesSize: maxUncommittedBytes,
		MaxInflightMsgs:           maxInflightMessages,
		MaxInflightBytes:          maxInflightBytes,
		CheckQuorum:               true,
		PreVote:                   c.o.preVote,
		ReadOnlyOption:            raft.ReadOnlySafe,
		DisableProposalForwarding: true, // a deposed leader could not take a proposal back: see forward.go
		Logger:                    c.o.logger,
	})
	if err != nil {
		return fmt.Errorf("sqlraft: starting Raft: %w", err)
	}
	c.rn = rn
	c.changes = nil
	c.noteChanges(c.storage.entries[1:])
	c.settleChanges(c.hard.commit)
	c.handed.index, c.handed.term = index, term
	c.applied = index
	c.failChanges(rpctypes.ErrGRPCTimeout) // a copy of the state may hold them
	c.pending = slices.DeleteFunc(c.pending, func(p pendingOperation) bool { return p.kind != opInstall })
	c.responses = nil
	return nil
}

// tick moves the clock.
func (c *core) tick() {
	c.now++
	c.tickElection()
	if c.leading {
		c.heard = c.now
	} else if ago := c.now - c.heard; ago > 0 && ago%uint64(10*c.o.electionTicks) == 0 {
		c.silent = true
	}
	c.flush = c.stale
	c.queue.blocked = false
	c.expireProposals()
	c.expireReads()
	c.resendForwards()
	c.tickSnapshots()
}

// tickElection moves Raft's clock. Raft waits for a leader for one to two election timeouts, so that members do not all
// campaign at once. Here the second one passes twice as fast, and where the leader's process has ended, the first one passes at once.
func (c *core) tickElection() {
	if c.rejoin.lost {
		return
	}
	c.rn.Tick()
	if c.leading {
		return
	}
	election := uint64(c.o.electionTicks)
	if g := c.gone; g.id != 0 && g.id == c.lead && c.heard <= g.tick && c.now >= g.tick+2 { // heartbeats come with every tick
		for waited := c.now - c.heard; waited+1 < election; waited++ {
			c.rn.Tick()
		}
		c.gone.id, c.givenUp = 0, c.now
	}
	if c.now-c.heard > election || c.givenUp > c.heard {
		c.rn.Tick()
	}
}

// ended says that a member's machine lets nobody connect: it is there, its process is not.
func (c *core) ended(id uint64) { c.gone.id, c.gone.tick = id, c.now }

// receive takes a packet of another member.
func (c *core) receive(p packet) {
	if p.to != c.o.id || slices.Contains(c.members.Removed, p.from) {
		return
	}
	switch {
	case p.forward != nil:
		c.receiveForward(p.from, p.forward)
	case p.taken != nil:
		c.receiveTaken(p.from, p.taken)
	case p.message != nil && !c.rejoin.lost:
		c.receiveMessage(p.from, p.message)
	}
}

func (c *core) receiveMessage(from uint64, m *raftpb.Message) {
	switch m.GetType() {
	case raftpb.MsgSnap:
		c.receiveSnapshotNotice(from, m)
		return
	case raftpb.MsgSnapStatus: // Raft has it for local, here it is the follower's word
		c.receiveSnapshotStatus(from, m.GetReject(), len(m.GetContext()) > 0)
		return
	case raftpb.MsgProp, raftpb.MsgTransferLeader, raftpb.MsgForgetLeader:
		return // members forward by other means, and ask for the others on the leader itself
	case raftpb.MsgApp:
		for i, e := range m.GetEntries() {
			if e.GetIndex() != m.GetIndex()+1+uint64(i) {
				return // Raft would fall over
			}
		}
		c.heard = c.now
		c.heardLeader(m)
		if end := m.GetIndex() + uint64(len(m.GetEntries())); m.GetCommit() <= end && c.storage.has(m.GetIndex(), m.GetLogTerm()) {
			c.inStep.lead, c.inStep.term = from, m.GetTerm()
		}
	case raftpb.MsgReadIndex:
		if c.leading && !c.answersReads() {
			return // it is asked again
		}
	case raftpb.MsgHeartbeat:
		c.heard = c.now
		if m.GetCommit() > c.storage.last() && !c.mayStep(m) {
			return
		}
		c.heardLeader(m)
	}
	// Errors: a message that makes sense only to the machine itself, or of a member that is not known here.
	if err := c.rn.Step(m); err != nil && !errors.Is(err, raft.ErrStepLocalMsg) && !errors.Is(err, raft.ErrStepPeerNotFound) {
		panic(fmt.Sprintf("sqlraft: Raft refuses a %v from %x: %v", m.GetType(), from, err))
	}
}

// follows says whether the log goes on from what is here, without a copy of the state.
func (c *core) follows() bool {
	return c.copies.fetching == nil && (c.leading || c.lead != 0 && c.inStep.lead == c.lead && c.inStep.term == c.hard.term)
}

// campaign starts an election as soon as possible, without waiting for anybody, where only this member has a vote.
func (c *core) campaign() { c.eager = true }

func (c *core) tryCampaign() {
	if !c.eager || c.rejoin.lost || c.applied < c.hard.commit {
		return // before everything committed is applied, Raft does not
	}
	c.eager = false
	if voters := votersOf(c.members); len(voters) == 1 && voters[0] == c.o.id {
		if err := c.rn.Campaign(); err != nil {
			panic(fmt.Sprintf("sqlraft: Raft refuses to campaign: %v", err))
		}
	}
}

// step gives Raft a message of our own, which it does not refuse.
func (c *core) step(m *raftpb.Message) {
	if err := c.rn.Step(m); err != nil && !errors.Is(err, raft.ErrStepPeerNotFound) {
		panic(fmt.Sprintf("sqlraft: Raft refuses its own %v: %v", m.GetType(), err))
	}
}

// transfer hands leadership to another member, if it can.
func (c *core) transfer(to uint64) {
	if c.leading {
		c.rn.TransferLeader(to)
	}
}

// unreachable says that packets to a member were lost.
func (c *core) unreachable(id uint64) {
	if !c.rejoin.lost {
		c.rn.ReportUnreachable(id)
	}
	c.forwardsLost(id)
}

// connected says that a member can be sent to again.
func (c *core) connected(id uint64) { c.forwardsLost(id) }

// hasten shortens the first wait for a leader: those who could elect one are there.
func (c *core) hasten() {
	if c.hastened || c.lead != 0 || c.rejoin.lost {
		return
	}
	c.hastened = true
	for range c.o.electionTicks - 2 {
		c.rn.Tick()
	}
}

// waitsForApply says whether something waits for operations to be done.
func (c *core) waitsForApply() bool {
	return c.eager || c.queue.blocked || len(c.pending) > 32 || len(c.queue.waiting) > 0 && c.queue.waiting[0].conf
}

// done says that all operations up to number are done.
func (c *core) done(number uint64) {
	n := 0
	for ; n < len(c.pending) && c.pending[n].number <= number; n++ {
		p := &c.pending[n]
		switch p.kind {
		case opMembers:
			if p.conf != nil {
				c.rn.ApplyConfChange(p.conf)
				c.leaveOffice()
			}
			if p.change != nil {
				p.change.done(p.members, p.index, p.refusal)
			}
		case opLead:
			c.queue.stamping = c.leading && c.hard.term == p.term
		case opInstall:
			c.copies.installed = p.install
		}
		if p.applied != nil {
			c.step(p.applied)
			c.applied = p.index
			c.queue.blocked = false
		}
	}
	c.pending = slices.Delete(c.pending, 0, n)
	if n > 0 {
		c.compact()
	}
}

// leaveOffice hands over when this member leads a cluster that it does not belong to any more. Until somebody takes
// over it goes on: without its heartbeats the others might not hear that its removal is committed.
func (c *core) leaveOffice() {
	if !c.leading || memberOf(c.members, c.o.id) != nil {
		return
	}
	if to := c.successor(); to != 0 {
		c.rn.TransferLeader(to)
	}
}

// mayLeave says whether the others can do without this member, which was removed: somebody leads who has committed
// something since, and so knows.
func (c *core) mayLeave() bool {
	return c.lead != 0 && c.lead != c.o.id && c.handed.term == c.hard.term
}

// successor is the voter that has most of the log, of those that answer; 0 when none does.
func (c *core) successor() (best uint64) {
	var match uint64
	c.rn.WithProgress(func(id uint64, kind raft.ProgressType, pr tracker.Progress) {
		if id != c.o.id && kind == raft.ProgressTypePeer && c.o.connectedSince(id, c.now) && (best == 0 || pr.Match > match) {
			best, match = id, pr.Match
		}
	})
	return best
}

// compact forgets what no follower that keeps up needs any more.
func (c *core) compact() {
	upTo := c.applied
	if floor := c.snapshotFloor(); floor != 0 && c.storage.bytes < 4*c.o.catchUpBytes {
		upTo = min(upTo, floor)
	}
	c.storage.keep(upTo, c.o.catchUpEntries, c.o.catchUpBytes)
}

// ready fills out with what is to be done next; false when there is nothing.
func (c *core) ready(out *output) (bool, error) {
	*out = output{before: out.before[:0], after: out.after[:0], apply: out.apply[:0]}
	c.tryCampaign()
	c.issueReads()
	c.dispatch(out)
	c.seal()
	c.acknowledge(out)
	c.snapshotWork(out)
	c.rejoinWork(out)
	out.silent, c.silent = c.silent, false
	out.before = append(out.before, c.say...)
	clear(c.say)
	c.say = c.say[:0]
	switch {
	case c.rn.HasReady():
		if err := c.take(out); err != nil {
			return false, err
		}
	case c.copies.installed != nil:
		if err := c.afterInstall(out); err != nil {
			return false, err
		}
	}
	out.voteTaken, c.rejoin.voteTaken = c.rejoin.voteTaken, false
	if c.stale && (out.mustSync || c.flush) && out.restart == nil {
		out.hardState = c.hard.message()
		c.stale, c.flush = false, false
	}
	return len(out.before)+len(out.after)+len(out.apply)+len(out.entries) > 0 || out.hardState != nil || out.restart != nil ||
		out.mustSync || c.responses != nil || out.makeSnapshot || out.releaseSnapshot || out.download != nil || out.leaderChanged || out.silent || out.lost || out.voteTaken, nil
}

// take turns what Raft wants done into out.
func (c *core) take(out *output) error {
	rd := c.rn.Ready()
	out.mustSync = rd.MustSync
	c.noteChanges(rd.Entries)
	settled := c.settleChanges(rd.HardState.GetCommit())
	if !raft.IsEmptyHardState(rd.HardState) {
		term := c.hard.term
		c.hard = hardState{rd.HardState.GetTerm(), rd.HardState.GetVote(), rd.HardState.GetCommit()}
		c.stale = true
		out.leaderChanged = c.hard.term != term
	}
	out.mustSync, out.applyAfter = out.mustSync || settled, settled
	if rd.SoftState != nil {
		out.leaderChanged = out.leaderChanged || rd.SoftState.Lead != c.lead
		c.turn(rd.SoftState.Lead, rd.SoftState.RaftState == raft.StateLeader, out)
	}
	c.noteEntries(rd.Entries)
	c.answerReads(rd.ReadStates)
	for _, m := range rd.Messages {
		switch m.GetTo() {
		case raft.LocalAppendThread:
			if m.GetSnapshot() != nil {
				panic("sqlraft: Raft wants to restore a snapshot, which it was not given")
			}
			out.entries = m.GetEntries()
			c.responses = m.GetResponses()
		case raft.LocalApplyThread:
			if err := c.handOut(m.GetEntries(), m.GetResponses()[0], out); err != nil {
				return err
			}
		default:
			if m.GetType() == raftpb.MsgSnap {
				c.sendingSnapshot(m.GetTo())
			}
			// What a leader sends rests on a term and a vote that are durable, and its entries count as its own only once
			// they are: it may write them while the others do. A candidate's message may rest on what it has not written.
			switch {
			case c.rejoin.lost:
			case c.leading && !settled:
				out.before = append(out.before, packet{to: m.GetTo(), from: c.o.id, message: m})
			default:
				out.after = append(out.after, packet{to: m.GetTo(), from: c.o.id, message: m})
			}
		}
	}
	for i, m := range c.responses {
		if m.GetTo() != c.o.id && !c.rejoin.lost && !superseded(m, c.responses[i+1:]) {
			out.after = append(out.after, packet{to: m.GetTo(), from: c.o.id, message: m})
		}
	}
	return nil
}

// noteChanges sees what is about to be written, in place of what has the same indexes and all that follows.
func (c *core) noteChanges(entries []*raftpb.Entry) {
	if len(entries) > 0 && len(c.changes) > 0 {
		c.changes = slices.DeleteFunc(c.changes, func(i uint64) bool { return i >= entries[0].GetIndex() })
	}
	for _, e := range entries {
		if e.GetType() == raftpb.EntryConfChange {
			c.changes = append(c.changes, e.GetIndex())
		}
	}
}

// settleChanges says whether a change of the members is committed now. That it is committed is made durable before anybody
// hears of it: a member that is removed may be gone for good as soon as it knows, and whoever stays behind must not come back
// from a power cut in doubt whether it still needs its vote.
func (c *core) settleChanges(commit uint64) (settled bool) {
	for len(c.changes) > 0 && c.changes[0] <= commit {
		c.changes, settled = c.changes[1:], true
	}
	return settled
}

// superseded says whether a later acknowledgement says all that m says.
func superseded(m *raftpb.Message, later []*raftpb.Message) bool {
	if m.GetType() != raftpb.MsgAppResp || m.GetReject() {
		return false
	}
	for _, l := range later {
		if l.GetType() == raftpb.MsgAppResp && !l.GetReject() && l.GetTo() == m.GetTo() && l.GetTerm() == m.GetTerm() && l.GetIndex() >= m.GetIndex() {
			return true
		}
	}
	return false
}

// persisted says that what out wanted on disk is there.
func (c *core) persisted(out *output) error {
	if out.restart != nil {
		return c.restarted(*out.restart, out)
	}
	c.storage.append(out.entries)
	responses := c.responses
	c.responses = nil
	for _, m := range responses {
		if m.GetTo() == c.o.id {
			c.step(m)
		}
	}
	return nil
}

// turn notes who leads.
func (c *core) turn(lead uint64, leading bool, out *output) {
	if lead != 0 && lead != c.lead {
		c.leaderSince = c.now
	}
	if c.leading {
		c.queue.reset()
		if c.queue.asked {
			c.queue.asked = false
			c.operate(out, operation{kind: opFollow, index: c.handed.index, term: c.handed.term}, pendingOperation{})
		}
		c.forgetSending()
	}
	c.lead, c.leading = lead, leading
	if leading {
		c.queue.barrier = math.MaxUint64 // until noteEntries has seen its first entry
	}
	c.reissueReads()
}

// handOut gives committed entries to the state machine.
func (c *core) handOut(entries []*raftpb.Entry, done *raftpb.Message, out *output) error {
	for _, e := range entries {
		if e.GetIndex() != c.handed.index+1 {
			panic(fmt.Sprintf("sqlraft: entry %d is committed after %d", e.GetIndex(), c.handed.index))
		}
		if e.GetTerm() > c.handed.term {
			c.termApplied(e.GetTerm())
		}
		c.handed.index, c.handed.term = e.GetIndex(), e.GetTerm()
		switch {
		case e.GetType() == raftpb.EntryConfChange:
			if err := c.handOutChange(e, out); err != nil {
				return err
			}
		case e.GetType() != raftpb.EntryNormal:
			return fmt.Errorf("%w: entry %d is of type %v", errBadEntry, e.GetIndex(), e.GetType())
		case len(e.GetData()) == 0:
			c.operate(out, operation{kind: opMembers, index: e.GetIndex(), term: e.GetTerm()}, pendingOperation{})
		default:
			d, err := decodeEntry(e.GetData())
			if err != nil {
				return fmt.Errorf("entry %d: %w", e.GetIndex(), err)
			}
			c.giveTickets(d)
			entry := backend.Entry{Index: e.GetIndex(), Term: e.GetTerm(), Stamp: d.stamp, Proposals: d.proposals}
			if n := len(out.apply); n > 0 && out.apply[n-1].kind == opApply {
				last := &out.apply[n-1]
				last.entries = append(last.entries, entry)
				last.index, last.term = entry.Index, entry.Term
				p := &c.pending[len(c.pending)-1]
				p.index, p.term = entry.Index, entry.Term
			} else {
				c.operate(out, operation{kind: opApply, index: entry.Index, term: entry.Term, entries: []backend.Entry{entry}}, pendingOperation{})
			}
		}
		if c.leading && !c.queue.asked && e.GetTerm() == c.hard.term {
			c.queue.asked = true
			c.operate(out, operation{kind: opLead, index: e.GetIndex(), term: e.GetTerm()}, pendingOperation{})
		}
	}
	c.pending[len(c.pending)-1].applied = done
	return nil
}

func (c *core) operate(out *output, op operation, p pendingOperation) {
	c.number++
	op.number = c.number
	p.number, p.kind, p.index, p.term = op.number, op.kind, op.index, op.term
	out.apply = append(out.apply, op)
	c.pending = append(c.pending, p)
}
