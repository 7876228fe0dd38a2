package sqlraft

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/quire-db/quire/backend"
)

// Node is a member of a cluster. It runs a core on two goroutines and a few that come and go:
//
//	loop     takes what has come in and ticks, lets the core decide, writes the log, sends
//	applier  owns the state machine
//
// What comes in waits in inbox, what is to be applied in queue. Neither is bounded by itself: Raft bounds what is under
// way, core what is proposed, and the transport what a peer may send.
//
// All methods may be called at any time from any goroutine. Errors are etcd's (rpctypes), as a client gets them.
type Node struct {
	o   Options
	sm  StateMachine
	log *raftLog
	t   *transport

	// Of loop.
	core     *core
	out      output
	took     inbox // what it is busy with
	identity logIdentity

	inbox struct {
		sync.Mutex
		inbox
		closed bool
		wake   chan struct{}
	}
	queue struct {
		sync.Mutex
		operations []operation
		wake       chan struct{}
	}
	done  atomic.Uint64 // number of the last operation that the applier has done
	hurry atomic.Bool   // loop wants to know at once

	mayLeave atomic.Bool // see core.mayLeave
	leaving  atomic.Bool // another member says that this one was removed, which is being looked into

	status    atomic.Pointer[Status]
	committed atomic.Uint64
	applied   atomic.Uint64
	members   atomic.Pointer[backend.Membership]
	changed   atomic.Pointer[chan struct{}] // closed when the leader changes
	waiters   appliedWaiters

	readmitting sync.Mutex // see serveRejoin

	copies   servedCopies
	life     uint64 // drawn at the start
	founding uint64 // index of the last founding entry; 0: this member has founded nothing
	purged   uint64 // index that the log was purged up to; of loop
	tidied   bool   // see tidy; of loop
	ctx      context.Context
	cancel   context.CancelFunc // ends loop, applier and everything else
	failed   chan error
	failOnce sync.Once
	wg       sync.WaitGroup // applier, copies, requests
	started  chan struct{}  // closed when everything above is there
	looping  chan struct{}  // closed when loop has ended
	stopOnce sync.Once
	stopped  error
}

// inbox is what has come in and the core has not seen.
type inbox struct {
	packets   []packet
	proposals []offered
	calls     []func(*core)
}

// offered is a proposal on its way to the core.
type offered struct {
	payload []byte
	conf    bool
	ticket  backend.Ticket
}

// Open starts a member and returns at once; whether there is a leader Status tells. It takes sm's database as it is: an
// unfinished Install is finished by whoever opened that.
//
// Errors say what to do; those of a damaged log wrap backend.ErrDamaged.
func Open(o Options, sm StateMachine) (*Node, error) {
	n, err := open(o, sm)
	if err != nil {
		for _, l := range o.Listeners {
			err = errors.Join(err, l.Close())
		}
		return nil, err
	}
	return n, nil
}

func open(o Options, sm StateMachine) (*Node, error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	if err := refuseOwnData(&o, sm); err != nil {
		return nil, err
	}
	n := &Node{o: o, sm: sm, failed: make(chan error, 1), started: make(chan struct{}), looping: make(chan struct{})}
	l, rec, err := openLog(osDisk{}, o.Dir)
	if err != nil {
		return nil, err
	}
	n.log = l
	if err := n.begin(rec); err != nil {
		return nil, errors.Join(err, l.close())
	}
	return n, nil
}

func (n *Node) begin(rec *recovered) error {
	start := startOptions{id: n.o.ID, known: n.o.Membership, lost: n.o.Lost, forceNewCluster: n.o.ForceNewCluster}
	if !n.o.Joining {
		start.initial = n.o.Membership
	}
	b, err := begin(n.log, rec, n.sm, start)
	if err != nil {
		return err
	}
	if slices.Contains(b.members.Removed, n.o.ID) {
		return ErrRemoved
	}
	n.identity = b.identity
	if len(n.identity.Bootstrap.Members) > 0 {
		n.o.Membership = n.identity.Bootstrap
	}
	if n.identity.Founding {
		n.founding = uint64(1 + len(n.o.Membership.Members))
	}
	n.core, err = newCore(coreOptions{
		id: n.o.ID, storage: b.storage, members: b.members, applied: b.applied,
		lost:          b.identity.Lost || b.identity.Unconfirmed,
		electionTicks: n.o.ElectionTicks, preVote: n.o.PreVote,
		requestTicks: n.o.ticks(n.o.requestTimeout()), retryTicks: n.o.ticks(500 * time.Millisecond),
		catchUpEntries: n.o.CatchUpEntries, catchUpBytes: catchUpBytes,
		stamp: n.sm.Stamp, random: randomNumber, connectedSince: n.connectedSince,
		logger: &raftLogger{tell: n.o.Hooks.Raft, info: n.o.Hooks.RaftInfo},
	})
	if err != nil {
		return err
	}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	n.inbox.wake, n.queue.wake = make(chan struct{}, 1), make(chan struct{}, 1)
	n.life = randomNumber()
	changed := make(chan struct{})
	n.changed.Store(&changed)
	n.noteMembers()
	n.applied.Store(b.applied)
	n.noteStatus()
	n.t = startTransport(n.transportOptions())
	close(n.started)
	n.t.setPeers(n.members.Load().Members)

	n.core.campaign()
	n.wg.Go(n.applier)
	go n.loop()
	switch {
	case b.identity.Lost:
		n.o.Hooks.Lost()
		n.wg.Go(n.rejoin)
	case b.identity.Unconfirmed:
		n.wg.Go(n.confirmFounding)
	case b.identity.Rejoining:
		n.wg.Go(n.regainVote)
	}
	n.wg.Go(n.publish)
	if n.o.Compare.History != nil {
		n.wg.Go(n.compareLoop)
	}
	return nil
}

// randomNumber returns one that nobody else has drawn, except by a chance that is none.
func randomNumber() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // it never fails
	return binary.BigEndian.Uint64(b[:])
}

// Propose has payload, which must not be changed any more, put into the log; ticket hears of it. See
// backend.ReplicatedLog.
func (n *Node) Propose(payload []byte, ticket backend.Ticket) {
	n.offer(offered{payload: payload, ticket: ticket})
}

func (n *Node) offer(p offered) {
	n.inbox.Lock()
	closed := n.inbox.closed
	if !closed {
		n.inbox.proposals = append(n.inbox.proposals, p)
	}
	n.inbox.Unlock()
	if closed {
		p.ticket.Fail(rpctypes.ErrGRPCStopped)
		return
	}
	n.wake()
}

// call has f called by loop; never when the node has stopped.
func (n *Node) call(f func(*core)) {
	n.inbox.Lock()
	if !n.inbox.closed {
		n.inbox.calls = append(n.inbox.calls, f)
	}
	n.inbox.Unlock()
	n.wake()
}

// onLoop has f called by loop, and returns its error.
func (n *Node) onLoop(ctx context.Context, f func(*core) error) error {
	result := make(chan error, 1)
	n.call(func(c *core) { result <- f(c) })
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		return errorOf(ctx)
	case <-n.looping:
		return rpctypes.ErrGRPCStopped
	}
}

func (n *Node) wake() {
	select {
	case n.inbox.wake <- struct{}{}:
	default:
	}
}

// loop is the only one that touches core, out and the log.
func (n *Node) loop() {
	defer close(n.looping)
	ticker := time.NewTicker(n.o.Tick)
	defer ticker.Stop()
	err := n.work()
	for err == nil && n.ctx.Err() == nil {
		select {
		case <-n.ctx.Done():
		case <-n.inbox.wake:
		case err = <-n.o.Broken:
		case <-ticker.C:
			n.core.tick()
			err = errors.Join(n.purge(), n.tidy())
		}
		if err == nil {
			err = n.turn()
		}
	}
	if err != nil {
		n.fail(err)
	}
	n.inbox.Lock()
	n.inbox.closed = true
	left := n.inbox.inbox
	n.inbox.inbox = inbox{}
	n.inbox.Unlock()
	for _, f := range left.calls {
		f(n.core) // reads are among them, which failAll answers
	}
	for _, p := range left.proposals {
		p.ticket.Fail(rpctypes.ErrGRPCStopped)
	}
	n.core.failAll(rpctypes.ErrGRPCStopped)
}

// turn gives the core what has come in.
func (n *Node) turn() error {
	n.inbox.Lock()
	n.took, n.inbox.inbox = n.inbox.inbox, n.took
	n.inbox.Unlock()
	if done := n.done.Load(); len(n.core.pending) > 0 && n.core.pending[0].number <= done {
		n.core.done(done)
	}
	for i := range n.took.packets {
		n.core.receive(n.took.packets[i])
	}
	for _, p := range n.took.proposals {
		n.core.propose(p.payload, p.conf, p.ticket)
	}
	for _, f := range n.took.calls {
		f(n.core)
	}
	clear(n.took.packets)
	clear(n.took.proposals)
	clear(n.took.calls)
	n.took = inbox{n.took.packets[:0], n.took.proposals[:0], n.took.calls[:0]}
	return n.work()
}

// work does what the core wants, until it wants nothing.
func (n *Node) work() error {
	for {
		out := &n.out
		more, err := n.core.ready(out)
		if err != nil {
			return err
		}
		if !more {
			n.mayLeave.Store(n.core.mayLeave())
			n.hurry.Store(n.core.waitsForApply())
			if p := n.core.pending; len(p) > 0 && n.hurry.Load() && p[0].number <= n.done.Load() {
				n.wake() // the applier was faster than hurry
			}
			return nil
		}
		if out.voteTaken && !n.identity.Rejoining { // durably, before the state machine has it
			if err := n.identify(func(i *logIdentity) { i.Rejoining = true }); err != nil {
				return err
			}
			n.wg.Go(n.regainVote)
		}
		n.send(out.before)
		if !out.applyAfter {
			n.enqueue(out.apply)
		}
		n.committed.Store(n.core.hard.commit)
		if out.leaderChanged {
			n.noteStatus()
		}
		if err := n.attend(out); err != nil {
			return err
		}
		switch {
		case out.restart != nil:
			err = n.log.restart(out.restart.index, out.restart.term, out.hardState)
		case out.mustSync:
			before := n.log.takeWritten() // without a sync, which is no part of this one
			start := time.Now()
			if err = n.log.append(out.hardState, out.entries, true); err == nil {
				now := n.log.takeWritten()
				n.o.Hooks.LogSynced(time.Since(start) - now.took)
				n.o.Hooks.LogWritten(before.bytes+now.bytes, before.took+now.took)
			}
		case out.hardState != nil:
			err = n.log.append(out.hardState, out.entries, false)
		}
		if err != nil {
			return err
		}
		if err := n.core.persisted(out); err != nil {
			return err
		}
		n.send(out.after)
		if out.applyAfter {
			n.enqueue(out.apply)
		}
	}
}

func (n *Node) send(packets []packet) {
	if len(packets) > 0 {
		n.t.send(packets)
	}
}

// attend starts what takes its time.
func (n *Node) attend(out *output) error {
	if out.releaseSnapshot {
		n.copies.release()
	}
	if out.makeSnapshot {
		n.wg.Go(n.makeSnapshot)
	}
	if out.download != nil {
		notice := *out.download
		if err := n.identify(func(i *logIdentity) { i.Installing = notice.index }); err != nil {
			return err
		}
		n.wg.Go(func() { n.download(&notice) })
	}
	if out.silent {
		n.wg.Go(n.askMembership)
	}
	if out.lost {
		if err := n.identify(func(i *logIdentity) { i.Lost = true }); err != nil {
			return err
		}
		n.o.Hooks.Lost()
		n.wg.Go(n.rejoin)
	}
	return nil
}

// identify changes what the log says of itself, durably. REQUIRES: on loop.
func (n *Node) identify(change func(*logIdentity)) error {
	change(&n.identity)
	return setLogIdentity(n.log, n.identity)
}

// purge removes what nobody needs any more from the disk: the state has it durably, and no follower may ask for it.
func (n *Node) purge() error {
	upTo := min(n.sm.Durable(), n.core.storage.first()-1)
	if upTo < n.purged+n.o.SnapshotEntries {
		return nil
	}
	n.purged = upTo
	return n.log.purge(upTo)
}

// tidy removes what is left of copies that were on their way when the process ended, once the log goes on without them.
func (n *Node) tidy() error {
	if n.tidied || !n.core.follows() {
		return nil
	}
	n.tidied = true
	return removeParts(n.o.InstallPath, "")
}

// noteStatus publishes who leads.
func (n *Node) noteStatus() {
	c := n.core
	s := &Status{ID: n.o.ID, Leader: c.lead, Term: c.hard.term}
	before := n.status.Load()
	if before != nil && *before == *s {
		return
	}
	n.status.Store(s)
	if before != nil && before.Leader != s.Leader {
		changed := make(chan struct{})
		close(*n.changed.Swap(&changed))
	}
	n.o.Hooks.LeaderChanged(n.Status())
}

// Status is cheap.
func (n *Node) Status() Status {
	s := *n.status.Load()
	s.Committed, s.Applied = n.committed.Load(), n.applied.Load()
	if m := memberOf(*n.members.Load(), n.o.ID); m != nil {
		s.Learner = m.Learner
	}
	return s
}

// LeaderChanged returns a channel that is closed when another member leads, or nobody.
func (n *Node) LeaderChanged() <-chan struct{} { return *n.changed.Load() }

// Failed gives at most one error: the member cannot go on, and the process has to end. It was removed from the cluster,
// its log or its state machine has failed.
func (n *Node) Failed() <-chan error { return n.failed }

func (n *Node) fail(err error) {
	n.failOnce.Do(func() {
		n.failed <- err
		n.cancel()
	})
}

// Stop hands leadership over, if it can within 1.5 s, and ends everything. What waits fails with ErrGRPCStopped. With an
// error of ctx the state machine is still busy with what it was given.
func (n *Node) Stop(ctx context.Context) error {
	n.stopOnce.Do(func() {
		n.handOver(ctx)
		n.cancel()
		<-n.looping
		n.stopped = n.t.close()
		ended := make(chan struct{})
		go func() {
			n.wg.Wait()
			close(ended)
		}()
		select {
		case <-ended:
		case <-ctx.Done():
			n.stopped = errors.Join(n.stopped, fmt.Errorf("sqlraft: the state machine does not end: %w", ctx.Err()))
		}
		n.copies.release()
		n.stopped = errors.Join(n.stopped, n.log.close())
	})
	return n.stopped
}

// handOver has somebody else lead, if this member does.
func (n *Node) handOver(ctx context.Context) {
	others := func(id uint64) bool { return id != n.o.ID }
	if n.Status().Leader != n.o.ID || !slices.ContainsFunc(votersOf(*n.members.Load()), others) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 1500*time.Millisecond)
	defer cancel()
	again := time.NewTicker(max(n.o.electionTimeout()/4, 10*time.Millisecond))
	defer again.Stop()
	for {
		changed := n.LeaderChanged() // before Status, so that no change is missed
		switch n.Status().Leader {
		case n.o.ID:
			// Again and again: what was sent may be lost, and Raft gives up after an election timeout.
			somebody := make(chan bool, 1)
			n.call(func(c *core) {
				to := c.successor()
				if to != 0 {
					c.transfer(to)
				}
				somebody <- to != 0 || !c.leading
			})
			select {
			case ok := <-somebody:
				if !ok {
					return
				}
			case <-n.looping:
				return
			}
		case 0: // the one who takes over may need this member's vote
			if n.connectedVoters(time.Now()) < quorum(len(votersOf(*n.members.Load()))) {
				return // as when all stop together: it helps nobody
			}
		default:
			return
		}
		select {
		case <-changed:
		case <-again.C:
		case <-ctx.Done():
			return
		case <-n.looping:
			return
		}
	}
}
