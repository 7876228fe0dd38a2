package backend

import (
	"context"
	"sync"
)

// appliedMark says how far the log is applied, and lets readers wait for it.
type appliedMark struct {
	mu          sync.Mutex
	index, term uint64
	moved       chan struct{} // closed when the index moves; nil while nobody waits
}

// move says that readers see everything up to index.
func (m *appliedMark) move(index, term uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.index, m.term = index, term
	if m.moved != nil {
		close(m.moved)
		m.moved = nil
	}
}

func (m *appliedMark) position() (index, term uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.index, m.term
}

// wait returns when readers see everything up to index.
func (m *appliedMark) wait(ctx, closed context.Context, index uint64) error {
	for {
		m.mu.Lock()
		if m.index >= index {
			m.mu.Unlock()
			return nil
		}
		if m.moved == nil {
			m.moved = make(chan struct{})
		}
		moved := m.moved
		m.mu.Unlock()
		select {
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		case <-closed.Done():
			return ErrClosed
		}
	}
}

// Applied is the index and the term of the newest entry of the log that is applied and visible; 0 before the first. It is
// written in one transaction with what the entry has changed.
func (db *DB) Applied() (index, term uint64) { return db.replica.applied.position() }

// Members is the membership as of Applied, or a little newer. It must not be changed.
func (db *DB) Members() Membership { return *db.replica.members.Load() }

// readIndex asks the log on behalf of all who wait for the answer.
func (r *replica) readIndex(ctx context.Context) (uint64, error) {
	if err := r.failure(); err != nil {
		return 0, err
	}
	log, err := r.joined()
	if err != nil {
		return 0, err
	}
	return log.ReadIndex(ctx)
}
