package backend

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// Bounds of one batch. A batch takes what is waiting, up to these; what is left goes into the next.
const (
	maxBatchCommands = 1024
	maxBatchBytes    = 8 << 20
)

// pending is one entry of the commit queue: a Command, or one of our own kinds.
type pending struct {
	cmd    Command
	expire *expireLeases
	// step is background work of the committer (compaction, vacuum): it runs alone, between batches.
	step func() error

	size    int
	encoded []byte // as the log of a replica carries it
	resp    proto.Message
	expired []int64
	err     error
	done    chan struct{} // closed when the entry is done; nil when its own goroutine commits it
}

// queue is where writes wait. Its length is bounded by the number of callers: each has one entry in it
// and is blocked until that is done, and the API bounds how many calls are open.
//
// Whoever holds the commit token commits. A write that finds the queue idle while few write takes the token
// and commits itself, without a hand-over to another goroutine: that is the latency of one client. What
// arrives meanwhile, or while many write, is committed by the committer goroutine, which keeps the token
// until the queue is empty: that is the throughput of many.
type queue struct {
	mu     sync.Mutex
	items  []*pending
	steps  []*pending
	recent int  // the size of the largest of the last batches, which fades: how many write at present
	busy   bool // somebody holds the commit token
	closed bool
	idle   sync.Cond     // signalled when the token is put down
	wake   chan struct{} // hands the token to the committer goroutine
}

func (q *queue) init() {
	q.idle.L = &q.mu
	q.wake = make(chan struct{}, 1)
}

// whenIdle waits until nobody holds the commit token. REQUIRES: the queue is closed, so it stays so.
func (q *queue) whenIdle() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.busy {
		q.idle.Wait()
	}
}

// putDown gives the commit token up. REQUIRES: q.mu is held and the queue is empty.
func (q *queue) putDown() {
	q.busy = false
	q.idle.Broadcast()
}

// Write commits cmd with the next batch. It returns when cmd is durable, as durable as the storage mode
// promises (sqlite: synced to the disk), and visible to every View taken from then on. The answer is the
// pb response of the request, its header holding the revision alone; it belongs to the caller.
//
// Commands take effect in the order in which they enter the queue, and that order is the order of their
// revisions. When ctx ends while cmd waits in the queue, cmd is withdrawn; when it is being committed, Write
// returns ctx's error and cmd takes effect or not, as after any lost answer. ErrDiskFull means that nothing
// was changed, ErrStorage that it is not known whether the write will be there after a restart.
//
// In a replica a batch goes through the log, and Commands that are under way at the same time have no order. Errors of the
// log are etcd's (rpctypes); the request must not be changed even after Write has returned one.
func (db *DB) Write(ctx context.Context, cmd Command) (proto.Message, error) {
	if cmd.AuthRevision == ByItself && !db.Auth().Enabled() {
		cmd.AuthRevision = 0 // members of a cluster that do not know auth must understand it
	}
	if g, ok := cmd.Request.(*pb.LeaseGrantRequest); ok && (g.ID == 0 || g.TTL < db.opts.MinLeaseTTL) {
		raised := &pb.LeaseGrantRequest{ID: g.ID, TTL: max(g.TTL, db.opts.MinLeaseTTL)}
		if g.ID == 0 {
			return db.grantDrawn(ctx, cmd, raised)
		}
		cmd.Request = raised
	}
	if db.shared != nil {
		// Nobody waits in the queue for a database that is not there.
		if err := db.shared.usable(); err != nil {
			return nil, err
		}
	}
	p := &pending{cmd: cmd, size: proto.Size(cmd.Request)}
	if err := db.submit(ctx, p); err != nil {
		return nil, err
	}
	return p.resp, nil
}

// grantDrawn draws the id of a lease that the client leaves to us: apply may not. An id that is taken is drawn again.
func (db *DB) grantDrawn(ctx context.Context, cmd Command, g *pb.LeaseGrantRequest) (proto.Message, error) {
	for {
		cmd.Request = &pb.LeaseGrantRequest{ID: db.drawLeaseID(), TTL: g.TTL}
		resp, err := db.Write(ctx, cmd)
		if !errors.Is(err, ErrLeaseExists) {
			return resp, err
		}
	}
}

// drawLeaseID returns a positive number, as etcd's lease ids are.
func drawLeaseID() int64 { return 1 + rand.Int64N(math.MaxInt64) }

// fewWriters is up to how many writes at a time each commits for itself.
const fewWriters = 4

// submit queues an entry and waits for it.
func (db *DB) submit(ctx context.Context, p *pending) error {
	if db.replica != nil && p.step == nil {
		return db.propose(ctx, p)
	}
	q := &db.queue
	q.mu.Lock()
	if q.closed {
		q.mu.Unlock()
		return ErrClosed
	}
	idle := !q.busy
	q.busy = true
	if idle && q.recent <= fewWriters {
		q.note(1)
		q.mu.Unlock()
		db.commit([]*pending{p})
		db.handOver()
		return p.err
	}
	p.done = make(chan struct{})
	if p.step != nil {
		q.steps = append(q.steps, p)
	} else {
		q.items = append(q.items, p)
	}
	q.mu.Unlock()
	if idle {
		q.wake <- struct{}{}
	}
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if i := slices.Index(q.items, p); i >= 0 {
		q.items = slices.Delete(q.items, i, i+1)
	}
	return ctx.Err()
}

// handOver gives the commit token to the committer goroutine if anything waits, and else puts it down.
func (db *DB) handOver() {
	q := &db.queue
	q.mu.Lock()
	more := len(q.items)+len(q.steps) > 0
	if !more {
		q.putDown()
	}
	q.mu.Unlock()
	if more {
		q.wake <- struct{}{}
	}
}

// commitLoop commits batches while the queue has any. After each batch one background step may run, so
// that neither can keep the other waiting.
func (db *DB) commitLoop() {
	defer close(db.committerDone)
	q := &db.queue
	for range q.wake {
		for {
			q.gather()
			q.mu.Lock()
			items, step := q.take()
			if len(items) == 0 && step == nil {
				q.putDown()
				q.mu.Unlock()
				break
			}
			q.mu.Unlock()
			if len(items) > 0 {
				db.commit(items)
			}
			if step != nil {
				db.commit([]*pending{step})
			}
		}
	}
}

// gatherFor is how long a commit is put off for the sake of those who are about to write: a fraction of what the
// commit itself takes. On an idle machine the Go runtime may make a millisecond of it.
const gatherFor = 50 * time.Microsecond

// gather waits for the writes that are on their way, while many write: a commit costs the same for one as for
// fifty, and the clients that the last batch answered come back together. It lets the goroutines go first that
// are ready to run, as long as that makes the queue longer, and sleeps once if it is still short.
func (q *queue) gather() {
	for n, slept := 0, false; ; runtime.Gosched() {
		q.mu.Lock()
		now, recent := len(q.items), q.recent
		q.mu.Unlock()
		enough := recent / 2
		switch {
		case recent <= fewWriters:
			return
		case now > n:
			n = now
		case now == 0 || now >= enough || slept:
			return
		default:
			time.Sleep(gatherFor)
			slept = true
		}
	}
}

// note keeps the size of a batch. REQUIRES: q.mu is held.
func (q *queue) note(n int) { q.recent = max(n, q.recent-q.recent/4-1) }

// take removes the next batch and at most one step. REQUIRES: q.mu is held.
func (q *queue) take() (items []*pending, step *pending) {
	n, bytes := 0, 0
	for n < len(q.items) && n < maxBatchCommands && (n == 0 || bytes+q.items[n].size <= maxBatchBytes) {
		bytes += q.items[n].size
		n++
	}
	if n == len(q.items) {
		items, q.items = q.items, nil
	} else {
		items = append([]*pending(nil), q.items[:n]...)
		q.items = append(q.items[:0], q.items[n:]...)
	}
	q.note(n)
	if len(q.steps) > 0 {
		step = q.steps[0]
		q.steps = append(q.steps[:0], q.steps[1:]...)
	}
	return items, step
}

// commit makes one batch of items durable, visible and answered, in this order. A panic in here must end the process:
// the token would never be put down. REQUIRES: the commit token.
func (db *DB) commit(items []*pending) {
	if items[0].step != nil {
		items[0].err = items[0].step()
		db.suspect = db.suspect || items[0].err != nil
	} else {
		db.commitBatch(items)
	}
	for _, p := range items {
		if p.done != nil {
			close(p.done)
		}
	}
}

func (db *DB) commitBatch(items []*pending) {
	start := time.Now()
	if db.suspect {
		// Something could not be written. Before the next batch, make sure that the database is where we left it.
		if err := db.log.resume(&db.st); err != nil {
			db.fail(items, err)
			return
		}
		db.suspect = false
	}
	if db.shared != nil {
		defer db.shared.end()
		if err := db.shared.begin(db.replay); err != nil {
			db.fail(items, err)
			return
		}
	}
	b := db.applyBatch(items, start)
	for b != nil {
		err := error(nil)
		if b.dirty() || db.shared != nil {
			err = db.log.write(b)
		}
		if errors.Is(err, errBehind) {
			// Once more, on top of what others wrote; while that is done they wait.
			b.rollback()
			if err = db.shared.catchUp(db.replay); err == nil {
				b = db.applyBatch(items, start)
				continue
			}
			db.publish()
			db.fail(items, err)
			return
		}
		if err != nil {
			db.undo(b, items, err)
			return
		}
		break
	}
	if b == nil {
		return
	}
	synced := time.Now()
	if b.dirty() {
		db.noteStorage(nil)
		if b.others() {
			db.st.others++
		}
	}
	db.graceBefore = 0 // whom it was for has got it
	if b.graced != 0 {
		db.graced = b.graced // an earlier time than before, where the database's clock was set back
	}
	db.show(b)

	b.tell()
	h := &db.opts.Hooks
	if h.BatchCommitted != nil {
		h.BatchCommitted(len(items), len(b.rows), b.applied.Sub(start), synced.Sub(b.applied), time.Since(start))
	}
	for _, p := range items {
		for _, id := range p.expired {
			if h.LeaseExpired != nil {
				h.LeaseExpired(id)
			}
		}
	}
}

// applyBatch turns Commands into rows and answers, in memory; nil when the batch has failed.
func (db *DB) applyBatch(items []*pending, start time.Time) *batch {
	b := db.newBatch(db.now(), db.wall(start))
	b.applyGrace()
	for _, p := range items {
		if p.expire != nil {
			p.expired = b.applyExpiry()
		} else {
			p.resp, p.err = b.apply(p.cmd)
		}
		b.ran(p.cmd, p.resp, p.expired, p.err)
		if b.failure != nil {
			db.undo(b, items, b.failure)
			return nil
		}
	}
	b.applied = time.Now()
	return b
}

// show makes a durable batch visible, to readers and then to watchers. REQUIRES: the commit token.
func (db *DB) show(b *batch) {
	moved := len(b.rows) > 0 || b.compacted
	db.tokens.keep(b.tokens)
	if len(b.rows) > 0 {
		db.ring.add(b.events())
		for i := range b.rows {
			db.marks.add(b.rows[i].rev, b.rows[i].id)
		}
	}
	if b.physical != nil {
		db.keepForHash(*b.physical)
	}
	if moved || b.authChanged() {
		db.publish()
	}
	b.leases.unlock()
	if len(b.alarmChanges) > 0 {
		db.alarms.set(b.alarms)
	}
	db.storeCounters()
	if db.shared != nil {
		db.shared.show()
	}
	if moved {
		db.notify(db.st.rev)
	}
	if b.compacted {
		db.compactor.wake()
	}
	for _, c := range b.alarmChanges {
		if f := db.opts.Hooks.Alarm; f != nil {
			f(&pb.AlarmMember{MemberID: c.key.member, Alarm: c.key.alarm}, c.raised)
		}
	}
}

// undo puts everything back that a batch has changed, and fails it. What it leaves to be freed is freed with the View
// that is replaced here, since no other batch may ever succeed.
func (db *DB) undo(b *batch, items []*pending, err error) {
	b.rollback()
	db.publish()
	db.fail(items, err)
}

// fail answers every entry of a batch that could not be written.
func (db *DB) fail(items []*pending, err error) {
	db.suspect = true
	if db.shared != nil {
		// Others must not wait for a lock that is of no use any more.
		err = errors.Join(err, db.shared.release())
	}
	err = db.log.explain(err)
	db.noteStorage(err)
	for _, p := range items {
		p.resp, p.expired, p.err = nil, nil, err
	}
}

// noteStorage keeps whether the storage takes writes, for Err and the hooks.
func (db *DB) noteStorage(err error) {
	was := db.broken
	if err == nil && was == nil {
		return
	}
	db.broken = err
	if err == nil {
		db.err.Store(nil)
	} else {
		db.err.Store(&err)
	}
	h := &db.opts.Hooks
	switch {
	case err != nil && h.StorageError != nil:
		h.StorageError(err)
	case err == nil && h.StorageHealed != nil:
		h.StorageHealed()
	}
}

// Err says why the storage does not take writes at present, nil when it does. Every write tries again, so
// the error goes away by itself when its cause does.
func (db *DB) Err() error {
	if p := db.err.Load(); p != nil {
		return *p
	}
	return nil
}

// notify tells the subscribers that there is a new revision.
func (db *DB) notify(rev int64) {
	if subs := db.subscribers.Load(); subs != nil {
		for _, s := range *subs {
			s.f(rev)
		}
	}
}

type subscriber struct{ f func(rev int64) }

// Subscribe has f called with the newest revision after each batch that raised it, or the compaction
// revision, once that is visible. It is a hint, not an event: f must not block and must not write. cancel
// ends it; a call that is under way may still finish.
func (db *DB) Subscribe(f func(rev int64)) (cancel func()) {
	db.subscribeMu.Lock()
	defer db.subscribeMu.Unlock()
	s := &subscriber{f}
	db.setSubscribers(func(all []*subscriber) []*subscriber { return append(all, s) })
	return func() {
		db.subscribeMu.Lock()
		defer db.subscribeMu.Unlock()
		db.setSubscribers(func(all []*subscriber) []*subscriber {
			var rest []*subscriber
			for _, o := range all {
				if o != s {
					rest = append(rest, o)
				}
			}
			return rest
		})
	}
}

func (db *DB) setSubscribers(change func([]*subscriber) []*subscriber) {
	var all []*subscriber
	if p := db.subscribers.Load(); p != nil {
		all = append(all, *p...)
	}
	all = change(all)
	db.subscribers.Store(&all)
}
