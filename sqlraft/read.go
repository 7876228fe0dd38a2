package sqlraft

import (
	"encoding/binary"
	"slices"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/raft/v3"
)

// readQueue holds the reads that wait to hear up to where they must see. Those that come together are asked for
// together. A question bears a number that is never used again, on no member and in no other life of this one, so that
// an answer that was long under way answers nobody else.
type readQueue struct {
	fresh []*read // not asked for yet
	asked []readRound
	next  uint64
}

// readContext is how many bytes Raft is given for a question: its number.
const readContext = 8

type readRound struct {
	id     uint64
	reads  []*read
	resend uint64 // tick
}

// read is one who waits. Answer is called once, and must not block.
type read struct {
	answer   func(index uint64, err error)
	deadline uint64 // tick
}

func (q *readQueue) init(first uint64) { q.next = first }

// readIndex has answer called with an index that was committed after the call.
func (c *core) readIndex(answer func(index uint64, err error)) {
	c.reads.fresh = append(c.reads.fresh, &read{answer: answer, deadline: c.now + c.o.requestTicks})
}

// issueReads asks for what is new, as soon as there is a leader.
func (c *core) issueReads() {
	q := &c.reads
	if len(q.fresh) == 0 || c.lead == 0 || c.rejoin.lost || c.leading && !c.answersReads() {
		return
	}
	q.next++
	q.asked = append(q.asked, readRound{id: q.next, reads: q.fresh})
	q.fresh = nil
	c.ask(&q.asked[len(q.asked)-1])
}

// answersReads says whether Raft may be asked, on the leader. Where only one member has a vote it answers at once: even a
// leader that does not know yet what is committed, and one that was removed, while the one with the vote may lead already.
func (c *core) answersReads() bool {
	return c.handed.term >= c.hard.term && slices.Contains(votersOf(c.members), c.o.id)
}

func (c *core) ask(r *readRound) {
	r.resend = c.now + c.o.retryTicks
	if c.leading && !c.answersReads() {
		return
	}
	c.rn.ReadIndex(binary.BigEndian.AppendUint64(nil, r.id))
}

// answerReads takes what Raft has found out.
func (c *core) answerReads(states []raft.ReadState) {
	q := &c.reads
	for _, s := range states {
		id := binary.BigEndian.Uint64(s.RequestCtx)
		for i := range q.asked {
			if q.asked[i].id != id {
				continue
			}
			for _, r := range q.asked[i].reads {
				r.answer(s.Index, nil)
			}
			q.asked = append(q.asked[:i], q.asked[i+1:]...)
			break
		}
	}
}

// reissueReads starts over: what the former leader was asked it will not answer.
func (c *core) reissueReads() {
	q := &c.reads
	for _, r := range q.asked {
		q.fresh = append(q.fresh, r.reads...)
	}
	q.asked = nil
}

// expireReads fails those that have waited too long, and asks again for the others from time to time.
func (c *core) expireReads() {
	q := &c.reads
	q.fresh = c.stillWaiting(q.fresh)
	kept := q.asked[:0]
	for _, r := range q.asked {
		if r.reads = c.stillWaiting(r.reads); len(r.reads) == 0 {
			continue
		}
		if r.resend <= c.now {
			c.ask(&r)
		}
		kept = append(kept, r)
	}
	clear(q.asked[len(kept):])
	q.asked = kept
}

func (c *core) stillWaiting(reads []*read) []*read {
	kept := reads[:0]
	for _, r := range reads {
		if r.deadline > c.now {
			kept = append(kept, r)
		} else {
			r.answer(0, rpctypes.ErrGRPCTimeout)
		}
	}
	clear(reads[len(kept):])
	return kept
}

func (q *readQueue) failAll(err error) {
	for _, r := range q.fresh {
		r.answer(0, err)
	}
	for _, round := range q.asked {
		for _, r := range round.reads {
			r.answer(0, err)
		}
	}
	q.fresh, q.asked = nil, nil
}
