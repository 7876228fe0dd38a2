package sqlraft

import (
	"math"
	"time"

	"github.com/anishathalye/porcupine"
)

// simOp is what a client has asked for.
type simOp struct {
	client  int
	at      uint64       // a member, of a probe
	command modelCommand // of a write
	key     int
	read    bool
	begin   int64
	end     int64 // 0: no answer
	over    bool  // the client waits no more
	known   bool
	result  modelResult
	value   int64 // that was read
}

// simTicket answers a write.
type simTicket struct {
	op   *simOp
	done func()
}

func (t *simTicket) answer(r modelResult) {
	if !t.op.over {
		t.op.known, t.op.result = true, r
	}
	t.done()
}

func (t *simTicket) Fail(error) { t.done() }

// simClient asks one thing after the other of some member, and of another one when that does not answer.
type simClient struct {
	w    *world
	id   int
	at   *simMember
	left int
}

func (c *simClient) wait() {
	c.w.after(c.w.between(millisecond, c.w.plan.think), c.next)
}

func (c *simClient) next() {
	w := c.w
	if c.left == 0 {
		return
	}
	if c.at == nil || !c.at.up || w.chance(0.1) {
		c.at = w.anyMember()
	}
	if c.at == nil {
		c.wait()
		return
	}
	c.left--
	op := &simOp{client: c.id, key: w.rand.IntN(modelKeys), begin: w.now}
	w.ops = append(w.ops, op)
	end := func() {
		if op.over {
			return
		}
		op.over = true
		if op.known {
			op.end = w.now
			w.counts.acknowledged++
		} else {
			c.at = nil
		}
		w.note(5, uint64(c.id), uint64(op.result.revision), uint64(op.value))
		c.wait()
	}
	w.after(w.plan.patience, end)
	switch draw := w.rand.IntN(10); {
	case draw < 4:
		op.read = true
		c.at.readOld(op.key)
		c.at.read(op, end)
	default:
		w.unique++
		op.command = modelCommand{unique: w.unique, kind: modelPut, key: op.key, value: int64(w.unique)}
		if draw >= 8 && len(w.events) > 0 {
			op.command.kind = modelSwap
			op.command.expect = w.events[w.rand.IntN(len(w.events))].value
			if w.chance(0.7) {
				op.command.expect = c.at.machine.state.registers[op.key]
			}
		}
		ticket := &simTicket{op: op, done: end}
		m := c.at
		w.say("client %d: %+v at %x", c.id, op.command, m.id)
		m.input(func(c *core) { c.propose(op.command.encode(), false, ticket) })
	}
}

// anyMember returns one that is up and that somebody has let in; once there are no more faults, one that belongs to the
// cluster, as everything is to be answered soon.
func (w *world) anyMember() *simMember {
	for range 10 {
		m := w.members[w.rand.IntN(len(w.members))]
		if m.up && (m.belonged || w.newest == 0) && !(w.quiet && w.newest != 0 && memberOf(w.belongs, m.id) == nil) {
			return m
		}
	}
	return nil
}

// readOld is a serializable read: what the register was at some revision, which the member says.
func (m *simMember) readOld(key int) {
	s := &m.machine.state
	value := int64(0)
	for _, e := range m.w.events[:s.revision] {
		if e.key == key {
			value = e.value
		}
	}
	if s.registers[key] != value {
		m.w.violate("a serializable read of register %d at %x, as of revision %d, is %d and not %d", key, m.id, s.revision, s.registers[key], value)
	}
}

// read is a linearizable one.
func (m *simMember) read(op *simOp, end func()) {
	life := m.life
	m.input(func(c *core) {
		c.readIndex(func(index uint64, err error) {
			if err != nil || !m.up || m.life != life {
				end()
				return
			}
			if m.w.mistakes.readsDoNotWait {
				index = 0
			}
			m.waiting = append(m.waiting, &simRead{index: index, done: func() {
				if m.up && m.life == life && !op.over {
					op.known, op.value = true, m.machine.state.registers[op.key]
				}
				end()
			}})
			m.w.after(0, func() {
				if m.up && m.life == life {
					m.wakeReads()
				}
			})
		})
	})
}

// simWatcher sees the events of one member after the other.
type simWatcher struct {
	w    *world
	at   *simMember
	life int
	seen int64 // revision
}

func (s *simWatcher) look() {
	w := s.w
	w.after(w.between(5*millisecond, 200*millisecond), s.look)
	if s.at == nil || !s.at.up || s.at.life != s.life || w.chance(0.02) {
		if s.at = w.anyMember(); s.at == nil {
			return
		}
		s.life = s.at.life
	}
	s.take(s.at)
}

func (s *simWatcher) take(m *simMember) {
	events := m.machine.state.events
	for int64(len(events)) > s.seen {
		e := events[s.seen]
		if e.revision != s.seen+1 {
			s.w.violate("a watcher of %x sees revision %d after %d", m.id, e.revision, s.seen)
			return
		}
		if e != s.w.events[s.seen] {
			s.w.violate("a watcher of %x sees something else in revision %d than others", m.id, e.revision)
			return
		}
		s.seen++
	}
}

// registerModel is what porcupine checks histories of one key against.
var registerModel = porcupine.Model{
	Init: func() any { return int64(0) },
	Step: func(state, input, output any) (bool, any) {
		s, op := state.(int64), input.(*simOp)
		switch {
		case op.read:
			return op.value == s, s
		case op.command.kind == modelSwap && !op.result.done:
			return s != op.command.expect, s
		case op.command.kind == modelSwap:
			return s == op.command.expect, op.command.value
		default:
			return true, op.command.value
		}
	},
}

// check looks at what clients were told.
func (w *world) check() {
	if w.broken != nil {
		return
	}
	var histories [modelKeys][]porcupine.Operation
	for _, op := range w.ops {
		o := porcupine.Operation{ClientId: op.client, Input: op, Call: op.begin, Return: op.end}
		if !op.read {
			where, applied := w.positions[op.command.unique]
			switch {
			case op.known && !applied:
				w.violate("the write %d was acknowledged and never applied", op.command.unique)
				return
			case op.known && where.result != op.result:
				w.violate("the write %d was acknowledged with %+v and is %+v", op.command.unique, op.result, where.result)
				return
			case !applied:
				continue // nobody was told anything, and it did nothing
			case !op.known:
				op.result = where.result
			}
		} else if !op.known {
			continue
		}
		if !op.known {
			o.Return = math.MaxInt64
		}
		histories[op.key] = append(histories[op.key], o)
	}
	for key, h := range histories {
		switch porcupine.CheckOperationsTimeout(registerModel, h, 10*time.Second) {
		case porcupine.Illegal:
			w.violate("the history of register %d is not linearizable", key)
		case porcupine.Unknown:
			w.say("the history of register %d could not be checked in time", key)
		}
	}
}
