package sqlraft

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/quire-db/quire/backend"
)

// enqueue gives operations to the applier.
func (n *Node) enqueue(operations []operation) {
	if len(operations) == 0 {
		return
	}
	n.queue.Lock()
	n.queue.operations = append(n.queue.operations, operations...)
	n.queue.Unlock()
	select {
	case n.queue.wake <- struct{}{}:
	default:
	}
}

// applier is the goroutine that owns the state machine.
func (n *Node) applier() {
	var operations []operation
	for {
		n.queue.Lock()
		n.queue.operations, operations = operations[:0], n.queue.operations
		n.queue.Unlock()
		if len(operations) == 0 {
			select {
			case <-n.queue.wake:
			case <-n.ctx.Done():
				n.abandon(nil)
				return
			}
			continue
		}
		for i := 0; i < len(operations); {
			op := &operations[i]
			for i++; i < len(operations) && op.kind == opApply && operations[i].kind == opApply; i++ {
				op.merge(&operations[i])
			}
			err := n.ctx.Err()
			if err == nil {
				err = n.perform(op)
			}
			if err != nil {
				if n.ctx.Err() == nil {
					n.fail(err)
				}
				failOperation(op, rpctypes.ErrGRPCStopped)
				n.abandon(operations[i:])
				return
			}
		}
		clear(operations)
	}
}

// merge puts a later operation's entries behind those of op.
func (op *operation) merge(later *operation) {
	op.entries = append(op.entries, later.entries...)
	op.number, op.index, op.term = later.number, later.index, later.term
}

// abandon fails those who wait for what is not applied any more.
func (n *Node) abandon(operations []operation) {
	<-n.looping // nothing is added then
	n.queue.Lock()
	operations = append(operations, n.queue.operations...)
	n.queue.operations = nil
	n.queue.Unlock()
	for i := range operations {
		failOperation(&operations[i], rpctypes.ErrGRPCStopped)
	}
}

// perform does an operation and tells everybody whom it concerns.
func (n *Node) perform(op *operation) error {
	start := time.Now()
	if op.kind == opInstall {
		n.o.Hooks.SnapshotInstalling(1)
		defer n.o.Hooks.SnapshotInstalling(-1)
	}
	changed, err := perform(n.ctx, n.sm, op)
	if err != nil {
		return err
	}
	if op.kind == opInstall && changed {
		n.o.Hooks.SnapshotInstalled(op.index, time.Since(start))
	}
	if changed && op.index >= n.founding { // the founders come one by one, but nobody is cut off meanwhile
		n.noteMembers()
		n.t.setPeers(n.members.Load().Members)
		n.o.Hooks.MembersChanged(*n.members.Load())
		if slices.Contains(n.members.Load().Removed, n.o.ID) {
			n.wg.Go(n.leave)
		}
	}
	if applied, _ := n.sm.Applied(); applied > n.applied.Load() {
		n.applied.Store(applied)
		n.waiters.wake(applied)
	}
	n.done.Store(op.number)
	if op.kind != opApply || n.hurry.Load() {
		n.wake()
	}
	return nil
}

// noteMembers publishes who belongs to the cluster; as long as the state machine does not know, what Options say.
func (n *Node) noteMembers() {
	m := n.sm.Members()
	if applied, _ := n.sm.Applied(); len(m.Members) == 0 || applied < n.founding {
		m = n.o.Membership
	}
	n.members.Store(&m)
}

// leave ends a member that was removed: not before others have heard what it has to say, and once they can do without
// it. It does not wait for that for ever, as it may be the last to hear; but as long as it leads, it is not.
func (n *Node) leave() {
	const soonest, latest, step = time.Second, 6 * time.Second, 100 * time.Millisecond
	for waited := time.Duration(0); waited < soonest || (waited < latest || n.Status().Leader == n.o.ID) && !n.mayLeave.Load(); waited += step {
		select {
		case <-time.After(step):
		case <-n.ctx.Done():
			return
		}
	}
	n.fail(ErrRemoved)
}

// appliedWaiters are those who wait until an index is applied.
type appliedWaiters struct {
	mu      sync.Mutex
	waiting []appliedWaiter
}

type appliedWaiter struct {
	index uint64
	ready chan struct{}
}

func (w *appliedWaiters) wake(applied uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.waiting = slices.DeleteFunc(w.waiting, func(one appliedWaiter) bool {
		if one.index > applied {
			return false
		}
		close(one.ready)
		return true
	})
}

// waitApplied returns once index is applied.
func (n *Node) waitApplied(ctx context.Context, index uint64) error {
	n.waiters.mu.Lock()
	if n.applied.Load() >= index {
		n.waiters.mu.Unlock()
		return nil
	}
	ready := make(chan struct{})
	n.waiters.waiting = append(n.waiters.waiting, appliedWaiter{index, ready})
	n.waiters.mu.Unlock()
	select {
	case <-ready:
		return nil
	case <-ctx.Done():
		n.waiters.forget(ready)
		return errorOf(ctx)
	case <-n.ctx.Done():
		return rpctypes.ErrGRPCStopped
	}
}

func (w *appliedWaiters) forget(ready chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.waiting = slices.DeleteFunc(w.waiting, func(one appliedWaiter) bool { return one.ready == ready })
}

// perform does one operation. What a copy of the state has brought already is left out; whoever waits for it hears that
// it may have been done. Changed says that there are other members now.
func perform(ctx context.Context, sm StateMachine, op *operation) (changed bool, err error) {
	applied, _ := sm.Applied()
	switch op.kind {
	case opApply:
		skip := 0
		for ; skip < len(op.entries) && op.entries[skip].Index <= applied; skip++ {
			failEntry(&op.entries[skip], rpctypes.ErrGRPCTimeout)
		}
		if op.entries = op.entries[skip:]; len(op.entries) == 0 {
			return false, nil
		}
		return false, sm.Apply(op.entries)
	case opMembers:
		if op.index <= applied {
			return false, nil
		}
		if err := sm.ApplyMembers(op.index, op.term, op.members); err != nil {
			return false, err
		}
		return op.members != nil, nil
	case opLead:
		sm.Lead(op.term)
	case opFollow:
		sm.Follow()
	case opInstall:
		if op.index <= applied {
			if err := os.Remove(op.install.path); err != nil {
				return false, fmt.Errorf("sqlraft: a copy of the state that came too late: %w", err)
			}
			return false, nil
		}
		return true, sm.Install(ctx, op.install.path)
	default:
		panic(fmt.Sprintf("sqlraft: operation %d", op.kind))
	}
	return false, nil
}

func failEntry(e *backend.Entry, err error) {
	for _, p := range e.Proposals {
		if p.Ticket != nil {
			p.Ticket.Fail(err)
		}
	}
}

// failOperation fails whoever waits for an operation that will not be done.
func failOperation(op *operation, err error) {
	for i := range op.entries {
		failEntry(&op.entries[i], err)
	}
	if op.change != nil {
		op.change.Fail(err)
	}
}
