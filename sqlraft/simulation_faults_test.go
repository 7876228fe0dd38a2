package sqlraft

import (
	"fmt"

	"github.com/quire-db/quire/backend"
)

// fault does something bad, or at least unusual, that the plan allows.
func (w *world) fault() {
	if w.quiet {
		return
	}
	var kinds []func()
	if w.plan.partitions && len(w.members) > 1 {
		kinds = append(kinds, w.partition, w.partition)
	}
	if w.plan.crashes {
		kinds = append(kinds, w.crashSome, w.crashSome, w.crashAll)
	}
	if w.plan.pauses {
		kinds = append(kinds, w.pause)
	}
	if w.plan.slowness {
		kinds = append(kinds, w.slowDown)
	}
	if w.plan.transfers {
		kinds = append(kinds, w.transfer)
	}
	if w.plan.changes {
		kinds = append(kinds, w.change, w.change)
	}
	if w.plan.wipes {
		kinds = append(kinds, w.wipe)
	}
	if len(kinds) > 0 {
		kinds[w.rand.IntN(len(kinds))]()
	}
}

// partition cuts some members off from the others, in one direction or both, for a while.
func (w *world) partition() {
	inside := map[uint64]bool{}
	for _, m := range w.members {
		inside[m.id] = w.chance(0.4)
	}
	oneWay := w.chance(0.3)
	var cut []*simLink
	for _, a := range w.members {
		for _, b := range w.members {
			if a.id != b.id && inside[a.id] != inside[b.id] && !(oneWay && inside[a.id]) {
				l := w.network.link(a.id, b.id)
				l.cut = true
				cut = append(cut, l)
			}
		}
	}
	w.say("partition: %v, one way %t", inside, oneWay)
	w.after(w.between(200*millisecond, 4*second), func() {
		for _, l := range cut {
			l.cut = false
		}
		w.say("partition ends")
	})
}

func (w *world) crashSome() {
	if m := w.anyMember(); m != nil {
		m.crash(w.chance(0.5))
		m.restartSoon()
	}
}

// crashAll is a power cut of the whole room.
func (w *world) crashAll() {
	for _, m := range w.members {
		if m.up {
			m.crash(true)
			m.restartSoon()
		}
	}
}

func (m *simMember) restartSoon() {
	life := m.life
	m.w.after(m.w.between(10*millisecond, 2*second), func() {
		if m.life == life && !m.up && !m.gone && m.started {
			m.start()
		}
	})
}

// pause stops a process for a while, as SIGSTOP does.
func (w *world) pause() {
	m := w.anyMember()
	if m == nil {
		return
	}
	w.say("%x is stopped", m.id)
	m.paused = true
	life := m.life
	w.after(w.between(100*millisecond, 4*second), func() {
		if m.life == life && m.paused {
			m.resume()
		}
	})
}

func (m *simMember) resume() {
	m.w.say("%x goes on", m.id)
	m.paused = false
	if m.up {
		m.pump()
	}
}

// slowDown makes the links of a member slow, or everybody's disk.
func (w *world) slowDown() {
	if w.chance(0.5) {
		w.plan.syncHigh += second
		w.after(w.between(second, 3*second), func() { w.plan.syncHigh = max(0, w.plan.syncHigh-second) })
		return
	}
	a, b := w.anyMember(), w.anyMember()
	if a == nil || b == nil {
		return
	}
	l := w.network.link(a.id, b.id)
	l.slow = w.between(50*millisecond, second)
	w.after(w.between(second, 3*second), func() { l.slow = 0 })
}

func (w *world) transfer() {
	for _, m := range w.members {
		if m.up && m.core.leading {
			to := w.members[w.rand.IntN(len(w.members))].id
			w.say("%x hands over to %x", m.id, to)
			w.counts.transfers++
			m.input(func(c *core) { c.transfer(to) })
		}
	}
}

// change has members come and go: it keeps at least one voter that is no new one.
func (w *world) change() {
	m := w.anyMember()
	if m == nil {
		return
	}
	now := m.machine.state.members
	var ch memberChange
	learners, voters := learnersOf(now), votersOf(now)
	if len(voters) == 0 {
		return // m does not know its cluster yet
	}
	switch draw := w.rand.IntN(4); {
	case draw == 0 && len(voters) > 1:
		ch = memberChange{Kind: changeRemove, Member: backend.Member{ID: voters[w.rand.IntN(len(voters))]}}
	case draw == 1 && len(learners) > 0:
		ch = memberChange{Kind: changePromote, Member: backend.Member{ID: learners[w.rand.IntN(len(learners))]}}
	case len(w.members) < 8:
		id := uint64(len(w.members) + 1)
		ch = memberChange{Kind: changeAdd, Member: backend.Member{ID: id, PeerURLs: []string{fmt.Sprint("http://", id)}, Learner: w.chance(0.7)}, MaxLearners: 2}
	default:
		ch = memberChange{Kind: changePublish, Member: backend.Member{ID: voters[0], Name: "new name"}}
	}
	w.say("%x asks to %s %x", m.id, ch.Kind, ch.Member.ID)
	if ch.Kind == changeAdd {
		// It starts whether or not it is let in: if it is, the cluster may need it.
		joiner := w.addMember(ch.Member.ID)
		w.after(w.between(0, second), func() { joiner.start() })
	}
	m.input(func(c *core) {
		c.propose(ch.payload(), true, &simChange{w, func(_ backend.Membership, _ uint64, err error) {
			w.say("%s %x: %v", ch.Kind, ch.Member.ID, err)
			if err == nil {
				w.counts.changes++
			}
		}})
	})
}

// wipe replaces the disk of a member, if all voters are sound: who lost its disk before has to be one again, and the
// others have to know.
func (w *world) wipe() {
	m := w.members[w.rand.IntN(len(w.members))]
	now := w.belongs
	if len(votersOf(now)) < 3 || m.gone || !m.started {
		return
	}
	if w.wiped != nil {
		for _, o := range w.members {
			if w.promotedAt == 0 || o.core.handed.index < w.promotedAt {
				return
			}
		}
	}
	w.say("%x loses its disk", m.id)
	m.crash(true)
	m.disk = newMemoryDisk(w.plan.segment)
	m.machine = &modelMachine{m: m}
	m.lostDisk = true
	w.wiped, w.isOut, w.promotedAt = m, false, 0
	m.restartSoon()
}
