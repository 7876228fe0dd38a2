package sqlraft

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"

	"github.com/quire-db/quire/backend"
)

// A follower that needs entries which are not kept any more gets a copy of the state:
//
//	leader    Raft wants a snapshot → makeSnapshot → snapshotMade: a MsgSnap goes out, which says what the copy is called
//	follower  download → downloaded: the state machine installs it → the log goes on after it → MsgAppResp
//
// Raft on the follower never sees the MsgSnap. It is made anew on the installed state, exactly as when the process
// starts with a state that is ahead of its log: so a copy is of use however long it took to arrive and whoever leads by
// then. As long as the follower is busy with it, it says so (MsgSnapStatus); a leader that hears nothing tries again.

// snapshotNotice says what a copy of the state is.
type snapshotNotice struct {
	from        uint64 // who has it
	index, term uint64
	path        string // where it is, once downloaded

	Name    string             `json:"name"`
	Size    int64              `json:"size"`
	SHA256  []byte             `json:"sha256"`
	Members backend.Membership `json:"members"`
}

// copies is what core knows of copies of the state.
type copies struct {
	// on the leader
	sending []sendingTo
	making  bool
	floor   uint64 // the log is kept behind here for the copy that is being made
	retry   uint64 // tick from which another may be made
	current *snapshotNotice
	used    uint64 // tick in which current was last of use

	// on the follower
	fetching  *snapshotNotice // until it is installed
	wanted    bool            // it is to be downloaded
	arrived   bool            // it is there, to be installed
	status    uint64          // tick of the next MsgSnapStatus
	pause     uint64          // ticks to wait after a download that has failed
	again     uint64          // tick from which on another may be begun; 0: now
	installed *snapshotNotice // by the state machine, the log does not know
	teller    uint64          // who is told that the log goes on there
	tell      uint64          // index that the leader has not taken note of yet
}

type sendingTo struct{ id, heard uint64 } // heard of in that tick

func (c *core) silenceTicks() uint64 { return 4 * uint64(c.o.electionTicks) }
func (c *core) keepTicks() uint64    { return 30 * uint64(c.o.electionTicks) }

// snapshotFloor is the index that the log has to go on after for the sake of a copy; 0 when there is none.
func (c *core) snapshotFloor() uint64 {
	switch {
	case c.copies.making:
		return c.copies.floor
	case c.copies.current != nil:
		return c.copies.current.index
	}
	return 0
}

// snapshotWork asks for what Raft wants.
func (c *core) snapshotWork(out *output) {
	cp := &c.copies
	if c.storage.wanted && (!c.leading || !cp.making && c.now >= cp.retry) {
		c.storage.wanted = false
		if c.leading {
			c.dropSnapshot(out) // it is too old
			cp.making, cp.floor = true, c.applied
			out.makeSnapshot = true
		}
	}
	if cp.current != nil && len(cp.sending) == 0 && c.now > cp.used+c.keepTicks() {
		c.dropSnapshot(out)
	}
	if cp.wanted {
		cp.wanted = false
		out.download = cp.fetching
	}
	if cp.arrived {
		cp.arrived = false
		n := cp.fetching
		c.operate(out, operation{kind: opInstall, index: n.index, term: n.term, install: n}, pendingOperation{install: n})
	}
}

func (c *core) dropSnapshot(out *output) {
	if c.copies.current != nil {
		c.copies.current, c.storage.snapshot = nil, nil
		out.releaseSnapshot = true
	}
}

// snapshotMade answers output.makeSnapshot. With an error Raft will ask again.
func (c *core) snapshotMade(n *snapshotNotice, err error) {
	cp := &c.copies
	cp.making = false
	if err != nil {
		cp.retry = c.now + uint64(c.o.electionTicks)
		return
	}
	data, err := json.Marshal(n)
	if err != nil {
		panic(fmt.Sprintf("sqlraft: encoding what a snapshot is: %v", err)) // strings and numbers
	}
	cp.current, cp.used = n, c.now
	c.storage.wanted = false // Raft has asked again meanwhile
	c.storage.snapshot = &raftpb.Snapshot{Data: data, Metadata: &raftpb.SnapshotMetadata{
		Index: new(n.index), Term: new(n.term), ConfState: confStateOf(n.Members),
	}}
}

// snapshotRead says that somebody reads the copy.
func (c *core) snapshotRead() { c.copies.used = c.now }

// sendingSnapshot notes that a MsgSnap goes out.
func (c *core) sendingSnapshot(to uint64) {
	cp := &c.copies
	cp.used = c.now
	cp.sending = slices.DeleteFunc(cp.sending, func(s sendingTo) bool { return s.id == to })
	cp.sending = append(cp.sending, sendingTo{id: to, heard: c.now})
}

func (c *core) forgetSending() { c.copies.sending = nil }

// receiveSnapshotStatus hears how a follower gets on.
func (c *core) receiveSnapshotStatus(from uint64, failed, underWay bool) {
	cp := &c.copies
	at := slices.IndexFunc(cp.sending, func(s sendingTo) bool { return s.id == from })
	switch {
	case at < 0:
	case failed:
		cp.sending = slices.Delete(cp.sending, at, at+1)
		c.rn.ReportSnapshot(from, raft.SnapshotFailure)
	case underWay:
		cp.sending[at].heard, cp.used = c.now, c.now
	}
}

// tickSnapshots gives up on followers that say nothing, and says something as a follower.
func (c *core) tickSnapshots() {
	cp := &c.copies
	if len(cp.sending) > 0 {
		waiting := map[uint64]bool{}
		c.rn.WithProgress(func(id uint64, _ raft.ProgressType, pr tracker.Progress) {
			waiting[id] = pr.State == tracker.StateSnapshot
		})
		var silent []uint64
		cp.sending = slices.DeleteFunc(cp.sending, func(s sendingTo) bool {
			if waiting[s.id] && c.now > s.heard+c.silenceTicks() {
				silent = append(silent, s.id)
			}
			return !waiting[s.id] || c.now > s.heard+c.silenceTicks()
		})
		for _, id := range silent {
			c.rn.ReportSnapshot(id, raft.SnapshotFailure)
		}
	}
	switch {
	case cp.fetching == nil:
	case cp.again != 0 && c.now >= cp.again:
		c.sayStatus(true)
		cp.fetching, cp.again = nil, 0
	case c.now >= cp.status:
		c.sayStatus(false)
	}
}

// receiveSnapshotNotice is a follower's answer to a MsgSnap.
func (c *core) receiveSnapshotNotice(from uint64, m *raftpb.Message) {
	cp := &c.copies
	n := &snapshotNotice{from: from, index: m.GetSnapshot().GetMetadata().GetIndex(), term: m.GetSnapshot().GetMetadata().GetTerm()}
	if m.GetTerm() < c.hard.term || c.leading {
		return // of a former leader
	}
	if n.index <= c.hard.commit {
		c.step(m) // Raft tells the leader how far it is
		return
	}
	if cp.fetching != nil || cp.installed != nil || cp.again != 0 {
		return // when that is done, or may be tried again, the leader hears of it
	}
	if err := json.Unmarshal(m.GetSnapshot().GetData(), n); err != nil || n.Name == "" {
		return // of another version; the leader tries again, and says that it cannot
	}
	cp.fetching, cp.wanted, cp.status = n, true, c.now
	c.noticeVote(n.Members) // now: whatever interrupts the installation, it is not found out later
}

// downloaded answers output.download: the copy lies at path, durably.
func (c *core) downloaded(path string, err error) {
	cp := &c.copies
	if err != nil {
		election := uint64(c.o.electionTicks)
		cp.pause = min(max(2*cp.pause, (election+9)/10), 10*election)
		cp.again = c.now + cp.pause
		return // fetching stays: the leader waits along
	}
	cp.fetching.path, cp.arrived, cp.pause = path, true, 0
}

// sayStatus tells the leader, or who was it, about the copy.
func (c *core) sayStatus(failed bool) {
	to := cmp.Or(c.lead, c.copies.fetching.from)
	m := &raftpb.Message{Type: raftpb.MsgSnapStatus.Enum(), To: new(to), From: new(c.o.id), Reject: new(failed)}
	if !failed {
		m.Context = []byte{1}
	}
	c.copies.status = c.now + uint64(c.o.electionTicks)
	c.say = append(c.say, packet{to: to, from: c.o.id, message: m})
}

// afterInstall brings Raft to the state that the state machine has. REQUIRES: everything Raft wanted is persisted.
func (c *core) afterInstall(out *output) error {
	n := c.copies.installed
	if c.handed.index >= n.index || c.storage.has(n.index, n.term) {
		// The log was faster, or gets there by itself: what the state machine has already is skipped then.
		c.copies.installed, c.copies.fetching = nil, nil
		if c.lead != c.o.id {
			c.sayInstalled(cmp.Or(c.lead, n.from), n.index, out)
		}
		return nil
	}
	out.restart = &logPosition{n.index, n.term}
	out.hardState = c.hard.message()
	out.leaderChanged = true
	c.copies.teller = cmp.Or(c.lead, n.from)
	c.turn(0, false, out)
	return nil
}

// restarted says that the log goes on after the installed state, durably.
func (c *core) restarted(at logPosition, out *output) error {
	n := c.copies.installed
	if c.hard.term < at.term {
		c.hard.term, c.hard.vote = at.term, 0
	}
	c.storage.restart(at.index, at.term)
	c.setMembers(n.Members)
	c.failUpTo(at.term, rpctypes.ErrGRPCTimeout)
	if err := c.build(at.index, at.term); err != nil {
		return err
	}
	c.stale, c.flush = false, false
	to := c.copies.teller
	c.copies.installed, c.copies.fetching = nil, nil
	c.sayInstalled(to, at.index, out)
	return nil
}

// sayInstalled tells the leader that the log holds what it does up to index, as Raft would.
func (c *core) sayInstalled(to, index uint64, out *output) {
	if !c.rejoin.lost {
		c.copies.tell = index
		out.after = append(out.after, c.installedMessage(to))
	}
}

func (c *core) installedMessage(to uint64) packet {
	return packet{to: to, from: c.o.id, message: &raftpb.Message{
		Type: raftpb.MsgAppResp.Enum(), To: new(to), From: new(c.o.id), Term: new(c.hard.term), Index: new(c.copies.tell),
	}}
}

// heardLeader repeats that until what the leader sends shows that it knows: as long as it waits, it sends no entries.
func (c *core) heardLeader(m *raftpb.Message) {
	switch {
	case c.copies.tell == 0 || m.GetTerm() != c.hard.term:
	case m.GetType() == raftpb.MsgApp || m.GetCommit() >= c.copies.tell || c.lead == c.o.id:
		c.copies.tell = 0
	default:
		c.say = append(c.say, c.installedMessage(m.GetFrom()))
	}
}
