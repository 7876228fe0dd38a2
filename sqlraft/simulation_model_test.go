package sqlraft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/quire-db/quire/backend"
)

// The state machine of the simulation: a few registers, and each write is an event of its own revision.

const modelKeys = 3

type modelKind byte

const (
	modelPut modelKind = iota
	modelSwap
)

// modelCommand is what a client writes.
type modelCommand struct {
	unique        uint64
	kind          modelKind
	key           int
	value, expect int64 // values are never written twice
}

func (m modelCommand) encode() []byte {
	b := binary.LittleEndian.AppendUint64(nil, m.unique)
	b = append(b, byte(m.kind), byte(m.key))
	b = binary.LittleEndian.AppendUint64(b, uint64(m.value))
	return binary.LittleEndian.AppendUint64(b, uint64(m.expect))
}

func decodeModelCommand(b []byte) modelCommand {
	le := binary.LittleEndian
	return modelCommand{unique: le.Uint64(b), kind: modelKind(b[8]), key: int(b[9]), value: int64(le.Uint64(b[10:])), expect: int64(le.Uint64(b[18:]))}
}

// modelResult is what apply makes of one.
type modelResult struct {
	done     bool // a swap may fail
	revision int64
}

type modelEvent struct {
	revision int64
	key      int
	value    int64
}

// modelState is copied by assignment: events are only ever appended.
type modelState struct {
	applied, term uint64
	members       backend.Membership
	registers     [modelKeys]int64
	revision      int64
	events        []modelEvent
	hash          uint64
	clock         uint64
}

func mix(h uint64, vs ...uint64) uint64 {
	for _, v := range vs {
		h ^= v
		h *= 0x9e3779b97f4a7c15
		h ^= h >> 29
	}
	return h
}

func (s *modelState) apply(m modelCommand) modelResult {
	if m.kind == modelSwap && s.registers[m.key] != m.expect {
		return modelResult{revision: s.revision}
	}
	s.revision++
	s.registers[m.key] = m.value
	s.events = append(s.events[:len(s.events):cap(s.events)], modelEvent{s.revision, m.key, m.value})
	s.hash = mix(s.hash, uint64(s.revision), uint64(m.key), uint64(m.value))
	return modelResult{done: true, revision: s.revision}
}

// modelMachine is the state machine of one member on one disk.
type modelMachine struct {
	m        *simMember
	state    modelState
	durable  modelState
	since    []modelState // after durable, what a power cut may leave
	install  *modelState  // a downloaded copy that lies in the file system
	leading  bool
	leadTerm uint64
}

var errSimulated = errors.New("broken")

func (s *modelMachine) Applied() (index, term uint64) { return s.state.applied, s.state.term }
func (s *modelMachine) Empty() bool                   { return s.state.revision == 0 }
func (s *modelMachine) Durable() uint64               { return s.durable.applied }
func (s *modelMachine) Members() backend.Membership   { return s.state.members }

func (s *modelMachine) Stamp() []byte {
	if !s.leading {
		s.m.w.violate("%x stamps an entry without leading", s.m.id)
	}
	return binary.LittleEndian.AppendUint64(nil, uint64(s.m.w.now))
}

// next moves the applied index.
func (s *modelMachine) next(index, term uint64) {
	if index != s.state.applied+1 && !(index == 2 && s.state.applied == 0) || term < s.state.term {
		s.m.w.violate("%x applies entry %d of term %d after %d of term %d", s.m.id, index, term, s.state.applied, s.state.term)
	}
	s.state.applied, s.state.term = index, term
}

// keep is the end of a transaction; from time to time SQLite makes a checkpoint.
func (s *modelMachine) keep() {
	s.m.w.sameState(s.m.id, &s.state)
	s.since = append(s.since, s.state)
	if s.m.w.rand.Float64() < 0.2 {
		s.durable, s.since = s.state, nil
	}
}

// cut is a power cut: what is left is a state between durable and the newest.
func (s *modelMachine) cut() {
	if n := s.m.w.rand.IntN(len(s.since) + 1); n > 0 {
		s.durable = s.since[n-1]
	}
	s.state, s.since = s.durable, nil
}

func (s *modelMachine) Apply(entries []backend.Entry) error {
	for i := range entries {
		e := &entries[i]
		s.next(e.Index, e.Term)
		identity := mix(e.Term, uint64(len(e.Stamp)))
		if len(e.Stamp) == 8 {
			s.state.clock = max(s.state.clock, binary.LittleEndian.Uint64(e.Stamp))
			s.state.hash = mix(s.state.hash, s.state.clock)
		}
		for j, p := range e.Proposals {
			c := decodeModelCommand(p.Payload)
			r := s.state.apply(c)
			s.m.w.applied(s.m.id, e.Index, j, c, r)
			identity = mix(identity, c.unique)
			if p.Ticket != nil {
				p.Ticket.(*simTicket).answer(r)
			}
		}
		s.m.w.sameEntry(s.m.id, e.Index, identity)
	}
	s.keep()
	return nil
}

func (s *modelMachine) ApplyMembers(index, term uint64, m *backend.Membership) error {
	s.next(index, term)
	if m != nil {
		s.state.members = *m
		s.state.hash = mix(s.state.hash, membersHash(*m))
	}
	s.m.w.sameEntry(s.m.id, index, mix(term, 1))
	s.keep()
	return nil
}

func membersHash(m backend.Membership) uint64 {
	h := m.ClusterID
	for _, o := range m.Members {
		h = mix(h, o.ID, uint64(len(o.Name)))
		if o.Learner {
			h = mix(h, 1)
		}
	}
	return mix(h, m.Removed...)
}

func (s *modelMachine) Lead(term uint64) {
	if s.leading || term <= s.leadTerm {
		s.m.w.violate("%x is told to lead term %d, it led %d", s.m.id, term, s.leadTerm)
	}
	if s.state.term != term {
		s.m.w.violate("%x is told to lead term %d before it has applied an entry of it", s.m.id, term)
	}
	s.leading, s.leadTerm = true, term
}

func (s *modelMachine) Follow() {
	if !s.leading {
		s.m.w.violate("%x is told to follow twice", s.m.id)
	}
	s.leading = false
}

func (s *modelMachine) Snapshot(context.Context) (backend.Snapshot, error) {
	return nil, fmt.Errorf("%w: the simulation copies states itself", errSimulated)
}

func (s *modelMachine) Install(context.Context, string) error {
	if s.install.applied <= s.state.applied {
		s.m.w.violate("%x installs a state as of %d over one as of %d", s.m.id, s.install.applied, s.state.applied)
	}
	s.state = *s.install
	s.state.events = slices.Clone(s.state.events)
	s.durable, s.since, s.install = s.state, nil, nil
	return nil
}

// finishInstall is what a start does with a copy that it finds.
func (s *modelMachine) finishInstall() {
	if s.install != nil && s.install.applied > s.state.applied {
		if err := s.Install(context.Background(), ""); err != nil {
			s.m.w.violate("%x: %v", s.m.id, err)
		}
	}
	s.install = nil
}
