package sqlraft

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"slices"
	"sync"

	"github.com/quire-db/quire/backend"
)

// listMachine is a state machine for tests of Node: a list of what was written. It outlives its node, as a database does.
type listMachine struct {
	mu      sync.Mutex
	state   listState
	leading bool
	delay   func() // called in Apply
}

type listState struct {
	Index, Term uint64
	Members     backend.Membership
	List        []string
}

// listTicket is told where in the list what it stands for came to lie.
type listTicket struct{ answer chan listAnswer }

type listAnswer struct {
	at  int
	err error
}

func newListTicket() *listTicket { return &listTicket{answer: make(chan listAnswer, 1)} }

func (t *listTicket) Fail(err error) { t.answer <- listAnswer{err: err} }

func (m *listMachine) Empty() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.state.List) == 0
}

func (m *listMachine) Applied() (index, term uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state.Index, m.state.Term
}

func (m *listMachine) Durable() uint64 {
	index, _ := m.Applied()
	return index
}

func (m *listMachine) Members() backend.Membership {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state.Members
}

func (m *listMachine) list() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.state.List)
}

func (m *listMachine) Stamp() []byte { return []byte("stamp") }

func (m *listMachine) Apply(entries []backend.Entry) error {
	if m.delay != nil {
		m.delay()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range entries {
		m.state.Index, m.state.Term = e.Index, e.Term
		for _, p := range e.Proposals {
			m.state.List = append(m.state.List, string(p.Payload))
			if p.Ticket != nil {
				p.Ticket.(*listTicket).answer <- listAnswer{at: len(m.state.List) - 1}
			}
		}
	}
	return nil
}

func (m *listMachine) ApplyMembers(index, term uint64, members *backend.Membership) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state.Index, m.state.Term = index, term
	if members != nil {
		m.state.Members = *members
	}
	return nil
}

func (m *listMachine) Lead(uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.leading = true
}

func (m *listMachine) Follow() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.leading = false
}

type listSnapshot struct {
	listState
	*bytes.Reader
}

func (s *listSnapshot) Index() uint64               { return s.listState.Index }
func (s *listSnapshot) Term() uint64                { return s.listState.Term }
func (s *listSnapshot) Members() backend.Membership { return s.listState.Members }
func (s *listSnapshot) Release() error              { return nil }

func (m *listMachine) Snapshot(context.Context) (backend.Snapshot, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	data, err := json.Marshal(m.state)
	if err != nil {
		return nil, err
	}
	state := m.state
	state.List = slices.Clone(state.List)
	return &listSnapshot{state, bytes.NewReader(data)}, nil
}

func (m *listMachine) Install(_ context.Context, path string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var state listState
	if err := json.Unmarshal(data, &state); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state = state
	return os.Remove(path)
}
