package sqlraft

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/quire-db/quire/backend"
)

const simDir = "raft"

// simMember is what Node is in a process: it drives a core, a log on a memory disk and a model of a state machine.
type simMember struct {
	w        *world
	id       uint64
	disk     *memoryDisk
	log      *raftLog
	identity logIdentity
	machine  *modelMachine
	core     *core
	out      output
	initial  backend.Membership // of the cluster that it founds; empty when it joins
	started  bool               // it was up once, so that others know of it
	lostDisk bool               // its disk was replaced since

	up      bool
	gone    bool // removed from the cluster for good
	life    int
	tickLen int64
	paused  bool // stopped by SIGSTOP

	busy  bool // waiting for its disk
	write func()
	inbox []func(*core)

	queue    []operation
	applying bool
	waiting  []*simRead

	copies map[string]modelState
	next   int // name of the next copy

	belonged bool // it was a member once
}

type simRead struct {
	index uint64
	done  func()
}

func (m *simMember) start() {
	w := m.w
	m.life++
	m.machine.finishInstall()
	m.machine.leading, m.machine.leadTerm = false, 0
	l, rec, err := openLog(m.disk, simDir)
	if err != nil {
		w.violate("%x cannot open its log: %v", m.id, err)
		return
	}
	b, err := begin(l, rec, m.machine, startOptions{id: m.id, initial: m.initial, lost: m.lostDisk})
	if err != nil {
		w.violate("%x cannot start: %v", m.id, err)
		return
	}
	m.lostDisk = false
	m.tickLen = w.plan.tick + w.rand.Int64N(w.plan.tick/10+1)
	m.core, err = newCore(coreOptions{
		id: m.id, storage: b.storage, members: b.members, applied: b.applied,
		lost:          b.identity.Lost || b.identity.Unconfirmed,
		electionTicks: w.plan.electionTicks, preVote: w.plan.preVote,
		requestTicks: uint64(w.plan.requestTicks), retryTicks: 5,
		catchUpEntries: w.plan.catchUp, catchUpBytes: 1 << 20,
		stamp: m.machine.Stamp, random: w.rand.Uint64,
		connectedSince: func(uint64, uint64) bool { return true },
		logger:         &raftLogger{tell: m.raftSays(), info: m.raftSays()},
	})
	if err != nil {
		w.violate("%x cannot start: %v", m.id, err)
		return
	}
	m.log, m.identity = l, b.identity
	m.up, m.started, m.busy, m.applying, m.paused = true, true, false, false, false
	m.inbox, m.queue, m.waiting, m.copies = nil, nil, nil, map[string]modelState{}
	w.say("%x starts: applied %d, log %d to %d, %+v, lost %t", m.id, b.applied, b.storage.first(), b.storage.last(), m.core.hard, b.identity.Lost)
	w.note(3, m.id, b.applied, b.storage.last())
	m.tick(m.life)
	if slices.Contains(b.members.Removed, m.id) {
		m.leave(m.life)
	}
	switch {
	case b.identity.Lost:
		m.askReadmission(m.life)
	case b.identity.Unconfirmed:
		m.confirm(m.life)
	case b.identity.Rejoining:
		m.askPromotion(m.life)
	}
	m.input(func(c *core) { c.campaign() })
}

// confirm is confirmFounding: nobody knows this member, as long as as many are there as elect a leader.
func (m *simMember) confirm(life int) {
	if m.life != life || !m.up {
		return
	}
	there := 0
	for _, o := range m.initial.Members {
		if s := m.w.member(o.ID); s != nil && s.up && !s.paused {
			there++
		}
	}
	if there < quorum(len(m.initial.Members)) {
		m.w.after(m.w.between(millisecond, 100*millisecond), func() { m.confirm(life) })
		return
	}
	m.input(func(c *core) {
		m.identify(func(i *logIdentity) { i.Unconfirmed = false })
		if !m.up {
			return
		}
		if err := c.resume(); err != nil {
			m.w.violate("%x cannot take part: %v", m.id, err)
		}
	})
}

func (m *simMember) raftSays() func(string) {
	if m.w.tell == nil {
		return nil
	}
	return func(s string) { m.w.say("%x raft: %s", m.id, s) }
}

func (m *simMember) tick(life int) {
	if m.life != life || !m.up {
		return
	}
	if !m.paused { // a stopped process misses its ticks
		m.input(func(c *core) { c.tick() })
		if m.log != nil && m.up && !m.busy {
			if err := m.log.purge(min(m.machine.durable.applied, m.core.storage.first()-1)); err != nil {
				m.failed(err)
			}
		}
	}
	jitter := m.w.rand.Int64N(m.tickLen/2+1) - m.tickLen/4
	m.w.after(m.tickLen+jitter, func() { m.tick(life) })
}

// input gives the core something, at once or when its disk is done.
func (m *simMember) input(do func(*core)) {
	if !m.up {
		return
	}
	if m.busy || m.paused {
		m.inbox = append(m.inbox, do)
		return
	}
	do(m.core)
	m.pump()
}

func (m *simMember) pump() {
	for rounds := 0; m.up && !m.busy && m.w.broken == nil; rounds++ {
		if rounds > 100_000 {
			m.w.violate("%x does not come to an end", m.id)
		}
		more, err := m.core.ready(&m.out)
		if err != nil {
			m.w.violate("%x cannot go on: %v", m.id, err)
			return
		}
		if !more {
			if len(m.inbox) == 0 || m.paused {
				return
			}
			inbox := m.inbox
			m.inbox = nil
			for i, do := range inbox {
				do(m.core)
				// Now and then what comes together is taken one by one.
				if m.w.chance(0.3) {
					m.inbox = slices.Clone(inbox[i+1:])
					break
				}
			}
			continue
		}
		m.handle()
	}
}

// handle does what the core wants.
func (m *simMember) handle() {
	w, out := m.w, &m.out
	if m.core.leading {
		w.leads(m.id, m.core.hard.term)
	}
	if out.voteTaken && !m.identity.Rejoining {
		w.say("%x finds out that it was taken out", m.id)
		m.identify(func(i *logIdentity) { i.Rejoining = true })
		m.askPromotion(m.life)
	}
	m.send(out.before)
	if !out.applyAfter {
		m.enqueue(out.apply)
	}
	if out.makeSnapshot {
		m.makeSnapshot()
	}
	if out.releaseSnapshot {
		clear(m.copies)
	}
	if out.download != nil {
		m.identify(func(i *logIdentity) { i.Installing = out.download.index })
		m.download(out.download)
	}
	if out.silent {
		m.askMembership()
	}
	if out.lost {
		w.say("%x finds out that it has lost what it acknowledged", m.id)
		m.identify(func(i *logIdentity) { i.Lost = true })
		m.askReadmission(m.life)
	}
	if out.restart == nil && out.hardState == nil && len(out.entries) == 0 && !out.mustSync {
		m.persisted()
		return
	}
	m.write = func() {
		var err error
		if out.restart != nil {
			err = m.log.restart(out.restart.index, out.restart.term, out.hardState)
		} else {
			hs := out.hardState
			if w.mistakes.noHardState {
				hs = nil
			}
			err = m.log.append(hs, out.entries, out.mustSync && !w.mistakes.noSync)
		}
		if err != nil {
			m.failed(err)
		}
	}
	latency := w.between(w.plan.syncLow, w.plan.syncHigh)
	if !out.mustSync && out.restart == nil {
		latency = 0
	}
	if latency == 0 {
		m.written()
		return
	}
	m.busy = true
	life := m.life
	w.after(latency, func() { m.writeEnds(life) })
}

func (m *simMember) writeEnds(life int) {
	switch {
	case m.life != life || !m.up:
	case m.paused:
		m.w.after(20*millisecond, func() { m.writeEnds(life) })
	default:
		m.busy = false
		m.written()
		m.pump()
	}
}

func (m *simMember) written() {
	m.write()
	m.write = nil
	if m.up {
		m.persisted()
	}
}

func (m *simMember) persisted() {
	if err := m.core.persisted(&m.out); err != nil {
		m.w.violate("%x cannot go on: %v", m.id, err)
		return
	}
	m.send(m.out.after)
	if m.out.applyAfter {
		m.enqueue(m.out.apply)
	}
}

func (m *simMember) enqueue(operations []operation) {
	if len(operations) > 0 {
		m.queue = append(m.queue, operations...)
		m.applySoon()
	}
}

func (m *simMember) identify(change func(*logIdentity)) {
	change(&m.identity)
	if err := setLogIdentity(m.log, m.identity); err != nil {
		m.failed(err)
	}
}

func (m *simMember) send(packets []packet) {
	if m.w.tell != nil {
		for i := range packets {
			m.w.say("%x → %x %s", m.id, packets[i].to, describe(&packets[i]))
		}
	}
	m.w.network.send(packets)
}

// failed is an error of the log: the disk was cut off.
func (m *simMember) failed(err error) {
	if !errors.Is(err, errPowerCut) {
		m.w.violate("the log of %x: %v", m.id, err)
	}
	m.up = false
}

// crash ends the process, or cuts its power. What it was writing may be on disk in part.
func (m *simMember) crash(power bool) {
	w := m.w
	if !m.up {
		return
	}
	w.say("%x crashes, power cut: %t", m.id, power)
	w.note(4, m.id)
	w.counts.crashes++
	if m.busy && m.write != nil && w.chance(0.7) {
		m.disk.cutAfter(1 + w.rand.IntN(4))
		m.write()
	}
	m.up = false
	for _, o := range w.members {
		if o != m && w.chance(0.5) {
			w.after(w.between(millisecond, 50*millisecond), func() { o.input(func(c *core) { c.ended(m.id) }) })
		}
	}
	m.core.failAll(errSimulated)
	for i := range m.queue {
		failOperation(&m.queue[i], errSimulated)
	}
	for _, r := range m.waiting {
		r.done()
	}
	if power {
		w.counts.cuts++
		m.disk = m.disk.crash(w.rand)
		m.machine.cut()
	} else {
		m.disk = m.disk.kill()
	}
}

// leave ends a removed member once the others can do without it, or, unless it leads, after a while.
func (m *simMember) leave(life int) {
	end := m.w.now + 6*second
	var wait func()
	wait = func() {
		switch {
		case m.life != life || !m.up:
		case m.core.mayLeave() || m.w.now >= end && !m.core.leading:
			m.removed()
		default:
			m.w.after(100*millisecond, wait)
		}
	}
	wait()
}

// removed is what becomes of a member that hears that it does not belong to the cluster any more.
func (m *simMember) removed() {
	m.gone = true
	m.crash(false)
}

func (m *simMember) applySoon() {
	if m.applying || len(m.queue) == 0 || !m.up {
		return
	}
	m.applying = true
	life := m.life
	m.w.after(m.w.between(m.w.plan.applyLow, m.w.plan.applyHigh), func() { m.apply(life) })
}

// apply does some of the queue.
func (m *simMember) apply(life int) {
	if m.life != life || !m.up {
		return
	}
	if m.paused {
		m.w.after(20*millisecond, func() { m.apply(life) })
		return
	}
	m.applying = false
	n := 1 + m.w.rand.IntN(len(m.queue))
	ops := m.queue[:n:n]
	m.queue = m.queue[n:]
	for i := range ops {
		if err := m.operate(&ops[i]); err != nil {
			m.w.violate("%x cannot go on: %v", m.id, err)
		}
		if !m.up || m.w.broken != nil {
			return
		}
	}
	number := ops[n-1].number
	m.input(func(c *core) { c.done(number) })
	m.wakeReads()
	m.applySoon()
}

func (m *simMember) operate(op *operation) error {
	if op.kind == opInstall && op.index <= m.machine.state.applied {
		m.machine.install = nil // came too late
		return nil
	}
	changed, err := perform(context.Background(), m.machine, op)
	if err != nil {
		return err
	}
	if changed {
		now := m.machine.state.members
		for _, o := range m.w.members {
			if o.id != m.id && memberOf(now, o.id) == nil {
				m.w.network.breakLink(o.id, m.id)
				m.w.network.breakLink(m.id, o.id)
			}
		}
		if slices.Contains(now.Removed, m.id) {
			m.leave(m.life)
		}
	}
	return nil
}

func (m *simMember) wakeReads() {
	kept := m.waiting[:0]
	for _, r := range m.waiting {
		if r.index <= m.machine.state.applied {
			r.done()
		} else {
			kept = append(kept, r)
		}
	}
	m.waiting = kept
}

func (m *simMember) makeSnapshot() {
	life := m.life
	m.w.after(m.w.between(millisecond, 500*millisecond), func() {
		if m.life != life || !m.up {
			return
		}
		m.w.counts.snapshots++
		m.next++
		name := string(rune('a'+m.next%26)) + "." + string(rune('a'+m.next/26%26))
		s := m.machine.state
		s.events = slices.Clone(s.events)
		m.copies[name] = s
		n := &snapshotNotice{from: m.id, index: s.applied, term: s.term, Name: name, Size: 1, Members: s.members}
		failed := m.w.chance(0.1)
		m.input(func(c *core) {
			if failed {
				c.snapshotMade(nil, errSimulated)
				return
			}
			c.snapshotMade(n, nil)
		})
	})
}

func (m *simMember) download(n *snapshotNotice) {
	life := m.life
	m.w.after(m.w.between(10*millisecond, 2*second), func() {
		if m.life != life || !m.up {
			return
		}
		from := m.w.member(n.from)
		cut := m.w.network.link(m.id, n.from).cut || m.w.network.link(n.from, m.id).cut
		var err error
		if s, there := from.copies[n.Name]; from.up && there && !cut && !m.w.chance(0.2) {
			m.machine.install = &s
			from.input(func(c *core) { c.snapshotRead() })
		} else {
			err = errSimulated
		}
		m.w.say("%x has copy %s of %x: %v", m.id, n.Name, n.from, err)
		m.input(func(c *core) { c.downloaded(n.Name, err) })
	})
}

// leader is one that this member can ask.
func (m *simMember) leader() *simMember {
	for _, l := range m.w.members {
		if l.up && l.core.leading && l.id != m.id && !m.w.network.link(m.id, l.id).cut && !m.w.network.link(l.id, m.id).cut {
			return l
		}
	}
	return nil
}

// askReadmission is what a lost member does until it is let in again.
func (m *simMember) askReadmission(life int) {
	if m.life != life || !m.up || !m.core.rejoin.lost {
		return
	}
	m.w.after(m.w.between(300*millisecond, 700*millisecond), func() { m.askReadmission(life) })
	if l := m.leader(); l != nil {
		m.w.after(m.w.between(m.w.plan.delayLow, m.w.plan.delayHigh), func() { l.readmit(m, life) })
	}
}

// readmit is the leader's part: out, in, and an answer.
func (l *simMember) readmit(m *simMember, life int) {
	leaderLife := l.life
	self := backend.Member{ID: m.id, PeerURLs: []string{fmt.Sprint("http://", m.id)}}
	if known := memberOf(l.machine.state.members, m.id); known != nil {
		self = *known
	}
	propose := func(ch memberChange, then func(index uint64, err error)) {
		l.input(func(c *core) {
			c.propose(ch.payload(), true, &simChange{l.w, func(_ backend.Membership, index uint64, err error) {
				l.w.say("%s %x at %d: %v", ch.Kind, m.id, index, err)
				if l.life == leaderLife && l.up {
					then(index, err)
				}
			}})
		})
	}
	propose(memberChange{Kind: changeForget, Member: backend.Member{ID: m.id}}, func(_ uint64, err error) {
		if err != nil && !errors.Is(err, rpctypes.ErrGRPCMemberNotFound) {
			return
		}
		propose(memberChange{Kind: changeReadmit, Member: self}, func(index uint64, err error) {
			if l.core.leading && (err == nil || errors.Is(err, rpctypes.ErrGRPCMemberExist)) {
				term := l.core.hard.term
				l.w.after(l.w.between(l.w.plan.delayLow, l.w.plan.delayHigh), func() { m.readmitted(life, term, l.id, index) })
			}
		})
	})
}

func (m *simMember) readmitted(life int, term, leader, index uint64) {
	if m.life != life || !m.up || !m.core.rejoin.lost {
		return
	}
	m.input(func(c *core) {
		if !c.rejoin.lost {
			return
		}
		hs := c.readmitted(term, leader, index)
		if err := m.log.append(hs, nil, true); err != nil {
			m.failed(err)
			return
		}
		m.identify(func(i *logIdentity) { i.Lost, i.Rejoining = false, true })
		m.w.say("%x is back", m.id)
		m.w.counts.rejoined++
		if err := c.resume(); err != nil {
			m.w.violate("%x cannot go on: %v", m.id, err)
		}
		m.askPromotion(life)
	})
}

// askPromotion is what a member that has come back does until it is a voter again.
func (m *simMember) askPromotion(life int) {
	if m.life != life || !m.up {
		return
	}
	m.w.after(m.w.between(300*millisecond, 700*millisecond), func() { m.askPromotion(life) })
	l := m.leader()
	if m.core.leading {
		l = m
	}
	self := memberOf(m.machine.state.members, m.id)
	if l == nil || self == nil || !m.identity.Rejoining || m.machine.state.applied < l.core.hard.commit {
		return // what it knows of itself may be from before it lost its log
	}
	if !self.Learner {
		m.input(func(c *core) {
			if c.votes() { // else it was taken out again meanwhile
				m.identify(func(i *logIdentity) { i.Rejoining = false })
			}
		})
		return
	}
	l.input(func(c *core) {
		if c.mayPromote(m.id) == nil {
			c.propose((&memberChange{Kind: changePromote, Member: backend.Member{ID: m.id}}).payload(), true, nil)
		}
	})
}

// askMembership finds out whether this member was forgotten: taken out to be let in again by a leader that did not get
// to the second part.
func (m *simMember) askMembership() {
	l := m.leader()
	if l != nil && m.belonged && memberOf(l.machine.state.members, m.id) == nil && !slices.Contains(l.machine.state.members.Removed, m.id) {
		m.w.say("%x was forgotten", m.id)
		m.w.after(0, func() { m.input(func(c *core) { c.lose() }) })
	}
}

// simChange is the ticket of a change of the members.
type simChange struct {
	w    *world
	then func(backend.Membership, uint64, error)
}

func (t *simChange) Fail(error) {}

func (t *simChange) done(m backend.Membership, index uint64, err error) {
	t.w.after(0, func() { t.then(m, index, err) })
}
