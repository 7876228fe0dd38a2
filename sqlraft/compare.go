package sqlraft

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

// All members have the same rows. The leader makes sure of it: from time to time it hashes a part of the history, has the
// others hash the same part, and where they differ, twice, it raises the alarm CORRUPT.
//
// Two things are compared at each check. The newest revisions, because what members make differently of the same entry
// (a mistake in apply) goes on making differences from then on. And the next part of a round through the whole history,
// from its beginning, that is with what compaction has left of it, because a disk may change what was written long ago.
// A part is bounded in rows and bytes, not in revisions.
//
// Most of the work is to tell a difference from a member that is elsewhere in the log:
//
//   - A question bears an index of the log that was committed before; a member answers once it has applied that.
//   - The hash of a part depends on the compaction revision. Answers with unequal ones are no answers: ask again.
//   - Whoever has applied the index knows every revision, and every compaction, that anybody had told of before the index was
//     asked for. Who does not, differs.

// History is what members compare: *backend.DB.
type History interface {
	Revision() int64
	CompactRevision() int64
	// HashSome hashes the first revisions of a part, as many as are read with about so many rows and bytes.
	HashSome(ctx context.Context, after, upTo int64, maxRows int, maxBytes int64) (reached int64, hash uint32, compact int64, err error)
	// Write is for the alarm.
	Write(ctx context.Context, cmd backend.Command) (proto.Message, error)
}

// Bounds of a part, in rows and in bytes of keys and values: 60 ms of one CPU, measured. When a member takes too long for
// it, parts are halved, at most five times; they are doubled again after so many that took nobody too long.
const (
	maxPartRows  = 128 << 10
	maxPartBytes = 64 << 20
	maxShrink    = 5
	growAfter    = 8
)

// roundRest is how many checks go by between two rounds when nothing was written since, no member was away, and none was
// started again: an hour with the usual check time. Meanwhile nothing is read.
const roundRest = 60

// maxLooks bounds how often one part is compared before it is left for the next check.
const maxLooks = 6

// Comparison is what one check of the leader has come to.
type Comparison struct {
	Peers int // other members that have answered
	// Skipped are members that did not, and why.
	Skipped map[uint64]error
	// ForCompactions: it was CompareOptions.Compactions that asked for it.
	ForCompactions bool
	// Whole: with it a round through the whole history has ended.
	Whole bool
}

// Difference is a part of the history that is not the same on all members.
type Difference struct {
	After, UpTo int64 // the revisions after one, up to and with another
	// Found is what members have, this one too, in the order of their ids.
	Found []Finding
	// Corrupt are those who differ from a majority of the members. If there is none: in a cluster of two the other one; else 0
	// alone, which as in etcd stands for not knowing who. It is empty if there was no difference when they were asked again.
	Corrupt []uint64
	agree   bool // this member is one of a majority
}

// Finding is what one member has of a part.
type Finding struct {
	ID              uint64
	Hash            uint32
	Revision        int64
	CompactRevision int64
}

// ErrInconsistent: see Node.CompareAll. The text is etcd's.
var ErrInconsistent = errors.New("found data inconsistency with peers")

// part is the question for one part of the history; an empty one asks only how far a member is.
type part struct {
	Index uint64 `json:"index"` // that must be applied before the answer
	After int64  `json:"after"`
	UpTo  int64  `json:"upTo"`
}

// partAnswer is what a member has of it. Hash is 0 where the member does not have all of the part.
type partAnswer struct {
	Life     uint64 `json:"life"` // drawn when the process was started
	Hash     uint32 `json:"hash"`
	Revision int64  `json:"revision"`
	Compact  int64  `json:"compact"` // 0: never
}

// answerPart answers for a member that has applied the index.
func answerPart(ctx context.Context, h History, life uint64, q part) (a partAnswer, err error) {
	a = partAnswer{Life: life, Revision: h.Revision(), Compact: h.CompactRevision()}
	if q.UpTo <= q.After || q.UpTo > a.Revision {
		return a, nil
	}
	_, a.Hash, a.Compact, err = h.HashSome(ctx, q.After, q.UpTo, math.MaxInt, math.MaxInt64)
	a.Compact = max(a.Compact, 0)
	return a, err
}

// comparedCluster is what a comparer needs of the cluster: Node.
type comparedCluster interface {
	membership() backend.Membership
	// barrier returns an index of the log that is applied here and that was committed after the call: what any member had
	// applied before is at or before it.
	barrier(ctx context.Context) (index uint64, err error)
	// askPart has a member answer, in bounded time.
	askPart(ctx context.Context, id uint64, q part) (partAnswer, error)
}

// comparer compares, and remembers how far it has come. A new leader begins with a new one. It belongs to one goroutine.
type comparer struct {
	self    uint64
	history History
	cluster comparedCluster
	timeout time.Duration    // of one part at one member
	differs func(Difference) // is told of every one

	round struct {
		at, to  int64 // compared up to at, and to be compared up to to
		running bool
		rested  int   // checks since the last one
		whole   int64 // the revision that the last one went to
		again   bool  // a member has to be compared from the beginning
	}
	newest int64 // the newest revision that was compared
	span   int64 // how many of the newest revisions are one part
	shrink uint  // parts are halved so many times
	quick  int   // parts since one took too long, or since they grew

	known   map[uint64]uint64     // members by their lives, as long as they miss no question
	before  map[uint64]partAnswer // what members have said last
	skipped map[uint64]error      // of the current check
}

func newComparer(self uint64, h History, c comparedCluster, timeout time.Duration, differs func(Difference)) *comparer {
	return &comparer{
		self: self, history: h, cluster: c, timeout: timeout, differs: differs,
		span: maxPartRows, known: map[uint64]uint64{}, before: map[uint64]partAnswer{},
	}
}

// check compares the next part of the round, and the newest revisions. It raises the alarm for who differs. After an
// error the next check goes on where this one began.
func (c *comparer) check(ctx context.Context) (done Comparison, err error) {
	defer func() { done.Skipped = c.skipped }()
	rev := c.history.Revision()
	present, err := c.roll(ctx)
	if done.Peers = len(present); err != nil || len(present) == 0 {
		return done, err
	}
	if c.beginRound(rev) {
		reached, err := c.judge(ctx, c.round.at, c.round.to, present)
		if err != nil {
			return done, err
		}
		if c.round.at = reached; reached == c.round.to {
			c.round.running, c.round.whole = false, reached
			done.Whole = true
		}
		if reached >= rev {
			c.newest = max(c.newest, rev)
		}
	}
	return done, c.compareNewest(ctx, rev, present)
}

// checkWhole compares everything, as of now, with all members that answer. It raises no alarm; it returns ErrInconsistent if
// this member differs from others and is not of a majority.
func (c *comparer) checkWhole(ctx context.Context) (done Comparison, err error) {
	defer func() { done.Skipped = c.skipped }()
	rev := c.history.Revision()
	present, err := c.roll(ctx)
	if done.Peers = len(present); err != nil || len(present) == 0 {
		return done, err
	}
	differs := false
	for at, unsettled := int64(0), 0; at < rev; {
		reached, d, err := c.compare(ctx, at, rev, present)
		if err != nil {
			return done, err
		}
		if d != nil {
			if !d.agree {
				d.Corrupt, differs = []uint64{c.self}, true
			}
			c.differs(*d)
		}
		if reached == at {
			if unsettled++; unsettled > maxShrink {
				return done, nil // nobody answers, or they compact all the time
			}
			continue
		}
		at, unsettled = reached, 0
	}
	if differs {
		return done, fmt.Errorf("%x %w", c.self, ErrInconsistent)
	}
	done.Whole = true
	return done, nil
}

// beginRound says whether there is a round to go on with.
func (c *comparer) beginRound(rev int64) bool {
	r := &c.round
	if r.running {
		return true
	}
	if r.rested++; rev == r.whole && !r.again && r.rested < roundRest {
		return false
	}
	r.running, r.again, r.rested = true, false, 0
	r.at, r.to = 0, rev
	return true
}

// compareNewest compares what was written since the last check, the newest of it if it is more than one part.
func (c *comparer) compareNewest(ctx context.Context, rev int64, present []uint64) error {
	for range 4 {
		if rev <= c.newest {
			return nil
		}
		after := max(c.newest, rev-c.span)
		reached, err := c.judge(ctx, after, rev, present)
		switch {
		case err != nil:
			return err
		case reached == after:
			return nil // not yet
		case reached < rev:
			c.span = max((reached-after)*3/4, 1) // so much fits into one part; now that at the end
			continue
		case after > c.newest:
			c.span = min(2*c.span, maxPartRows)
		}
		break
	}
	c.newest = rev
	return nil
}

// roll asks who is there. Who is there for the first time, or has been away, or was started again since, has to be compared
// from the beginning; and so has everybody when somebody is not as far as the others.
func (c *comparer) roll(ctx context.Context) (present []uint64, err error) {
	c.skipped = map[uint64]error{}
	var others []uint64
	for _, m := range c.cluster.membership().Members {
		if m.ID != c.self {
			others = append(others, m.ID)
		}
	}
	maps.DeleteFunc(c.known, func(id, _ uint64) bool { return !slices.Contains(others, id) })
	if len(others) == 0 {
		return nil, nil
	}
	told := c.standing()
	index, err := c.cluster.barrier(ctx)
	if err != nil {
		return nil, err
	}
	c.before, _ = c.ask(ctx, others, part{Index: index})
	for _, id := range others {
		a, here := c.before[id]
		if !here {
			continue
		}
		present = append(present, id)
		now := c.standing()
		if c.known[id] != a.Life || a.Revision < told.Revision || a.Compact < told.Compact || a.Revision > now.Revision || a.Compact > now.Compact {
			c.known[id] = a.Life
			c.round.again = true
		}
	}
	return present, nil
}

// standing is how far this member is.
func (c *comparer) standing() partAnswer {
	return partAnswer{Revision: c.history.Revision(), Compact: c.history.CompactRevision()}
}

// ask asks members at the same time. Who does not answer is skipped; slow says that it took too long.
func (c *comparer) ask(ctx context.Context, ids []uint64, q part) (all map[uint64]partAnswer, slow bool) {
	answers := make([]partAnswer, len(ids))
	failed := make([]error, len(ids))
	var wg sync.WaitGroup
	for i, id := range ids {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, c.timeout)
			defer cancel()
			answers[i], failed[i] = c.cluster.askPart(ctx, id, q)
		})
	}
	wg.Wait()
	all = map[uint64]partAnswer{}
	for i, id := range ids {
		if failed[i] != nil {
			c.skipped[id] = failed[i]
			delete(c.known, id)
			slow = slow || errors.Is(failed[i], context.DeadlineExceeded)
			continue
		}
		all[id] = answers[i]
	}
	return all, slow
}

// judge compares a part and raises the alarm for who differs. It goes up to reached; that is after if there is no saying
// yet.
func (c *comparer) judge(ctx context.Context, after, upTo int64, present []uint64) (reached int64, err error) {
	reached, d, err := c.compare(ctx, after, upTo, present)
	if err != nil || d == nil {
		return reached, err
	}
	c.differs(*d)
	for _, id := range d.Corrupt {
		alarm := &pb.AlarmRequest{MemberID: id, Action: pb.AlarmRequest_ACTIVATE, Alarm: pb.AlarmType_CORRUPT}
		if _, err := c.history.Write(ctx, backend.Command{Request: alarm, AuthRevision: backend.ByItself}); err != nil {
			return after, fmt.Errorf("sqlraft: raising the alarm CORRUPT for member %x: %w", id, err)
		}
	}
	return reached, nil
}

// vote is what a member has of a part, as far as it has to be the same on all.
type vote struct {
	kind    voteKind
	hash    uint32
	compact int64
}

type voteKind int

const (
	hashed voteKind = iota
	ahead           // it knows more than the one who compares can
	behind          // it does not have what it must have applied
)

// compare compares a part, the first revisions of it if it is large, until all members that answer agree, or differ for
// the second time. Reached is after if that does not come about.
func (c *comparer) compare(ctx context.Context, after, upTo int64, present []uint64) (reached int64, d *Difference, err error) {
	rows, bytes := maxPartRows>>c.shrink, int64(maxPartBytes>>c.shrink)
	for range maxLooks {
		told := c.standing()
		index, err := c.cluster.barrier(ctx)
		if err != nil {
			return after, nil, err
		}
		mine, err := c.hash(ctx, after, &upTo, rows, bytes)
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			c.resize(true)
			return after, nil, nil
		}
		if err != nil {
			return after, nil, err
		}
		rows, bytes = math.MaxInt, math.MaxInt64 // where it ends is settled
		before := c.before
		answers, slow := c.ask(ctx, present, part{Index: index, After: after, UpTo: upTo})
		c.before = answers
		c.resize(slow)
		if len(answers) == 0 {
			break
		}
		votes, settled := votesOf(c.self, told, mine, before, answers)
		if !settled {
			continue
		}
		if !differ(votes) {
			if d != nil {
				d.Corrupt, d.agree = nil, true
			}
			return upTo, d, nil
		}
		answers[c.self] = mine
		again := d != nil
		d = &Difference{After: after, UpTo: upTo, Found: findings(answers)}
		d.Corrupt, d.agree = verdict(c.self, len(c.cluster.membership().Members), votes)
		if again {
			return upTo, d, nil
		}
	}
	return after, nil, nil
}

// hash is this member's answer. It moves upTo to where it ends.
func (c *comparer) hash(ctx context.Context, after int64, upTo *int64, rows int, bytes int64) (a partAnswer, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	a.Revision = c.history.Revision()
	*upTo, a.Hash, a.Compact, err = c.history.HashSome(ctx, after, *upTo, rows, bytes)
	a.Compact = max(a.Compact, 0)
	return a, err
}

// resize has the next parts be smaller when this one took a member too long, and larger again when several did not.
func (c *comparer) resize(slow bool) {
	if slow {
		c.shrink, c.quick = min(c.shrink+1, maxShrink), 0
	} else if c.quick++; c.quick >= growAfter && c.shrink > 0 {
		c.shrink, c.quick = c.shrink-1, 0
	}
}

// votesOf says what each has, and whether that can be compared. Told is what this member could tell of before the others
// had to know everything; before is what they had said when this member had to.
func votesOf(self uint64, told, mine partAnswer, before, answers map[uint64]partAnswer) (votes map[uint64]vote, settled bool) {
	votes = map[uint64]vote{self: {hash: mine.Hash, compact: mine.Compact}}
	settled = true
	for id, a := range answers {
		v := vote{hash: a.Hash, compact: a.Compact}
		b := before[id]
		switch {
		case a.Revision < told.Revision || a.Compact < told.Compact:
			v = vote{kind: behind}
		case b.Revision > mine.Revision || b.Compact > mine.Compact:
			v = vote{kind: ahead}
		default:
			settled = settled && v.compact == votes[self].compact
		}
		votes[id] = v
	}
	return votes, settled
}

func differ(votes map[uint64]vote) bool {
	kinds := map[vote]bool{}
	for _, v := range votes {
		kinds[v] = true
	}
	return len(kinds) > 1
}

// verdict says who is corrupt in a cluster of so many members, and whether self is of the majority.
func verdict(self uint64, members int, votes map[uint64]vote) (corrupt []uint64, agree bool) {
	count := map[vote]int{}
	for _, v := range votes {
		count[v]++
	}
	for v, n := range count {
		if n < quorum(members) {
			continue
		}
		for id, other := range votes {
			if other != v {
				corrupt = append(corrupt, id)
			}
		}
		slices.Sort(corrupt)
		return corrupt, votes[self] == v
	}
	if members > 2 {
		return []uint64{0}, false
	}
	for id := range votes {
		if id != self {
			corrupt = append(corrupt, id)
		}
	}
	return corrupt, false
}

func findings(answers map[uint64]partAnswer) (all []Finding) {
	for id, a := range answers {
		all = append(all, Finding{ID: id, Hash: a.Hash, Revision: a.Revision, CompactRevision: a.Compact})
	}
	slices.SortFunc(all, func(a, b Finding) int { return cmp.Compare(a.ID, b.ID) })
	return all
}
