package backend

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Bounds of what is applied in one transaction.
const (
	maxApplyCommands = 4096
	maxApplyBytes    = 8 << 20
)

// How long Apply waits before it writes again what could not be written: at first, and at most.
const (
	applyRetry    = 50 * time.Millisecond
	applyRetryMax = time.Second
)

// logged is an entry on its way through apply.
type logged struct {
	index, term uint64
	stamp       *stamp      // nil: it moves the position, and may change the members, but nothing else
	members     *Membership // nil: they stay
	proposals   []proposed
}

// proposed is one proposal of an entry.
type proposed struct {
	items   []*pending
	ticket  *ticket  // nil: nobody here waits for it
	answers []answer // one for each item; only with a ticket
}

// Apply implements sqlraft.StateMachine: entries take effect one after the other, in as few transactions as their bounds
// allow, become visible, and then their tickets are answered. While the storage cannot be written it tries again; reads go
// on meanwhile. It is not durable when Apply returns: see Durable.
//
// An error says that this member must stop: ErrDamaged, ErrNewerSchema, a storage of which it is not known what is in it.
func (db *DB) Apply(entries []Entry) error {
	group := make([]logged, 0, len(entries))
	commands, bytes := 0, 0
	for i := range entries {
		e, err := decodeEntry(&entries[i])
		if err != nil {
			return db.replica.fail(err)
		}
		group = append(group, e)
		for j := range e.proposals {
			commands += len(e.proposals[j].items)
			bytes += len(entries[i].Proposals[j].Payload)
		}
		if commands >= maxApplyCommands || bytes >= maxApplyBytes || i == len(entries)-1 {
			if err := db.applyAll(group); err != nil {
				return err
			}
			group, commands, bytes = group[:0], 0, 0
		}
	}
	return nil
}

// ApplyMembers makes m the membership, together with the applied index. Entries that change neither the store nor the
// members come here too, with m nil. It is like Apply in everything else. m belongs to the DB from now on.
func (db *DB) ApplyMembers(index, term uint64, m *Membership) error {
	return db.applyAll([]logged{{index: index, term: term, members: m}})
}

func decodeEntry(e *Entry) (l logged, err error) {
	l = logged{index: e.Index, term: e.Term, proposals: make([]proposed, len(e.Proposals))}
	if l.stamp, err = decodeStamp(e.Stamp); err != nil {
		return l, fmt.Errorf("entry %d of the log: %w", e.Index, err)
	}
	for i := range e.Proposals {
		p := &l.proposals[i]
		if t, ours := e.Proposals[i].Ticket.(*ticket); ours && t != nil {
			p.ticket, p.items = t, t.items
			p.answers = make([]answer, len(t.items))
		} else if p.items, err = decodePayload(e.Proposals[i].Payload); err != nil {
			return l, fmt.Errorf("entry %d of the log: %w", e.Index, err)
		}
	}
	return l, nil
}

// applyAll applies entries in one transaction, however often that has to be tried.
func (db *DB) applyAll(group []logged) error {
	refused := make(map[*pending]error)
	for wait := applyRetry; ; wait = min(2*wait, applyRetryMax) {
		var err error
		apply := &pending{step: func() error { err = db.applyOnce(group, refused); return nil }}
		if closed := db.submit(context.Background(), apply); closed != nil {
			return closed
		}
		if err == nil || db.replica.failure() != nil {
			return err
		}
		if !db.pause(wait) {
			return ErrClosed
		}
	}
}

// mendable says whether it helps to write again later.
func mendable(err error) bool {
	e := asSQLiteError(err)
	return !errors.Is(err, ErrDamaged) && !errors.Is(err, errCommittedAfterAll) && (e == nil || !e.syncFailed())
}

// applyOnce is the batch of a replica. An error leaves everything as it was. REQUIRES: the commit token.
func (db *DB) applyOnce(group []logged, refused map[*pending]error) error {
	r, start := db.replica, time.Now()
	if err := r.failure(); err != nil {
		return err
	}
	if first, at := group[0].index, db.st.replica.index; first <= at {
		return r.fail(fmt.Errorf("entry %d of the log is applied again, after entry %d: stop this member and keep its data directory, this is a bug", first, at))
	}
	var b *batch
	err := error(nil)
	if db.suspect {
		if err = db.log.resume(&db.st); err == nil {
			db.suspect = false
		}
	}
	if err == nil {
		b = db.runLogged(group, refused)
		if err = b.unread; err == nil {
			err = db.log.write(b)
		}
		if err != nil {
			b.rollback()
			db.publish()
		}
	}
	if err != nil {
		db.fail(nil, err)
		if !mendable(db.broken) {
			return r.fail(db.broken)
		}
		return db.broken
	}
	written := time.Now()
	db.noteStorage(nil)
	db.show(b)
	st := &db.st.replica
	r.members.Store(st.members)
	r.clock.take(st.clock, st.clockTerm, written)
	r.applied.move(st.index, st.term)
	b.tell()
	commands := db.answerAll(group)
	if f := db.opts.Hooks.BatchCommitted; f != nil && commands > 0 {
		f(commands, len(b.rows), b.applied.Sub(start), written.Sub(b.applied), time.Since(start))
	}
	if err := db.settleSome(); err != nil {
		return err
	}
	return nil
}

// runLogged makes rows and answers of entries, in memory. A Command that fails when it has written already, which should
// not be possible, is refused as a whole, on every member alike: the batch begins anew without it. A row that cannot be
// read is no answer: it ends the batch, see batch.unread.
func (db *DB) runLogged(group []logged, refused map[*pending]error) *batch {
	for {
		b := db.newBatch(db.st.replica.clock, db.st.clock)
		failed := b.run(group, refused)
		if failed == nil {
			b.applied = time.Now()
			return b
		}
		refused[failed] = b.failure
		b.rollback()
		db.publish()
	}
}

// run returns the Command that failed after it had written.
func (b *batch) run(group []logged, refused map[*pending]error) (failed *pending) {
	for i := range group {
		b.enter(&group[i])
		for j := range group[i].proposals {
			p := &group[i].proposals[j]
			b.unheard = p.ticket == nil
			for k, item := range p.items {
				var a answer
				if err := refused[item]; err != nil {
					a.err = err
				} else if item.expire != nil {
					a.expired = b.applyExpiry()
				} else {
					a.resp, a.err = b.apply(item.cmd)
				}
				b.ran(item.cmd, a.resp, a.expired, a.err)
				switch {
				case b.unread != nil:
					return nil
				case b.failure != nil:
					return item
				case p.answers != nil:
					p.answers[k] = a
				}
			}
		}
	}
	return nil
}

// enter begins an entry.
func (b *batch) enter(l *logged) {
	r := &b.st.replica
	r.index, r.term = l.index, l.term
	if l.members != nil {
		r.members, b.membersChanged = l.members, true
	}
	if l.stamp == nil {
		return
	}
	s := *l.stamp // a batch may be run more than once
	b.stamp = &s
	clock := max(r.clock, s.clock)
	passed := clock - r.clock
	if r.clockTerm == 0 {
		passed = 0 // there was no such clock before
	}
	b.now, b.at = clock, max(b.st.clock, s.wall)
	if l.term > r.clockTerm {
		b.resumeLeases(passed)
	}
	r.clock, r.clockTerm = clock, l.term
}

// answerAll answers who waits, and says how many Commands there were.
func (db *DB) answerAll(group []logged) (commands int) {
	answered := false
	for i := range group {
		for j := range group[i].proposals {
			p := &group[i].proposals[j]
			commands += len(p.items)
			if p.ticket == nil || !p.ticket.answer(p.answers) {
				continue
			}
			answered = true
			if f := db.opts.Hooks.LeaseExpired; f != nil {
				for _, a := range p.answers {
					for _, id := range a.expired {
						f(id)
					}
				}
			}
		}
	}
	if answered {
		db.proposeNext()
	}
	return commands
}
