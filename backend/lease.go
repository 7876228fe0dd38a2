package backend

import (
	"cmp"
	"container/heap"
	"slices"
	"sort"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// maxLeaseTTL is etcd's bound, in seconds (lease.MaxLeaseTTL).
const maxLeaseTTL = 9_000_000_000

// lease is one granted lease. Its deadline is absolute and kept in the database, so a restart neither
// forgets nor prolongs it.
type lease struct {
	id       int64
	ttl      int64 // seconds, as granted
	deadline int64 // µs since the epoch
	keys     map[string]struct{}
	at       int // place in the heap
}

// leaseTable holds the leases. The committer changes it, under mu from a batch's first change until
// that batch is durable or rolled back: so nobody is told of a lease that could still be lost.
type leaseTable struct {
	mu   sync.RWMutex
	byID map[int64]*lease
	due  leaseHeap
	// wake tells the expiry loop that the earliest deadline may have changed.
	wake chan struct{}
}

func (t *leaseTable) init() {
	t.byID = make(map[int64]*lease)
	t.wake = make(chan struct{}, 1)
}

func (t *leaseTable) insert(l *lease) {
	t.byID[l.id] = l
	heap.Push(&t.due, l)
}

func (t *leaseTable) remove(l *lease) {
	delete(t.byID, l.id)
	heap.Remove(&t.due, l.at)
}

func (t *leaseTable) setDeadline(l *lease, deadline int64) {
	l.deadline = deadline
	heap.Fix(&t.due, l.at)
}

// replace makes the leases those of another table, which is not used any more.
func (t *leaseTable) replace(o *leaseTable) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.byID, t.due = o.byID, o.due
}

// next returns the earliest deadline.
func (t *leaseTable) next() (deadline int64, ok bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if len(t.due) == 0 {
		return 0, false
	}
	return t.due[0].deadline, true
}

// tell wakes the loop that expires leases.
func (t *leaseTable) tell() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

type leaseHeap []*lease

func (h leaseHeap) Len() int { return len(h) }
func (h leaseHeap) Less(i, j int) bool {
	if h[i].deadline != h[j].deadline {
		return h[i].deadline < h[j].deadline
	}
	return h[i].id < h[j].id
}
func (h leaseHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].at, h[j].at = i, j
}
func (h *leaseHeap) Push(x any) {
	l := x.(*lease)
	l.at = len(*h)
	*h = append(*h, l)
}
func (h *leaseHeap) Pop() any {
	old := *h
	l := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return l
}

// leaseChanges is what one batch does to the leases: it holds the table from the first change on, and
// knows what to write and how to undo it.
type leaseChanges struct {
	table  *leaseTable
	locked bool
	undo   []func()
	dirty  map[int64]bool // ids whose row has to be written or deleted
}

func (c *leaseChanges) lock() {
	if !c.locked {
		c.table.mu.Lock()
		c.locked = true
		c.dirty = make(map[int64]bool)
	}
}

func (c *leaseChanges) unlock() {
	if c.locked {
		c.locked = false
		c.table.mu.Unlock()
		c.table.tell()
	}
}

// leaseChange is a lease as a batch leaves it; one without a TTL is gone.
type leaseChange struct{ id, ttl, deadline int64 }

func (l leaseChange) gone() bool { return l.ttl == 0 }

// list returns what has to be written, by id.
func (c *leaseChanges) list() []leaseChange {
	changes := make([]leaseChange, 0, len(c.dirty))
	for id := range c.dirty {
		change := leaseChange{id: id}
		if l := c.table.byID[id]; l != nil {
			change.ttl, change.deadline = l.ttl, l.deadline
		}
		changes = append(changes, change)
	}
	slices.SortFunc(changes, func(a, b leaseChange) int { return cmp.Compare(a.id, b.id) })
	return changes
}

func (c *leaseChanges) any() bool { return len(c.dirty) > 0 }

// exists needs no lock: only the committer changes the table.
func (c *leaseChanges) exists(id int64) bool {
	_, ok := c.table.byID[id]
	return ok
}

func (c *leaseChanges) grant(id, ttl, deadline int64) {
	c.lock()
	l := &lease{id: id, ttl: ttl, deadline: deadline, keys: make(map[string]struct{})}
	c.table.insert(l)
	c.dirty[id] = true
	c.undo = append(c.undo, func() { c.table.remove(l) })
}

func (c *leaseChanges) renew(l *lease, deadline int64) {
	c.lock()
	was := l.deadline
	c.table.setDeadline(l, deadline)
	c.dirty[l.id] = true
	c.undo = append(c.undo, func() { c.table.setDeadline(l, was) })
}

func (c *leaseChanges) revoke(l *lease) {
	c.lock()
	c.table.remove(l)
	c.dirty[l.id] = true
	c.undo = append(c.undo, func() { c.table.insert(l) })
}

// take makes a lease what another process has made it, and returns how many leases there are more.
func (c *leaseChanges) take(l leaseChange) (more int64) {
	have := c.table.byID[l.id]
	switch {
	case have == nil && !l.gone():
		c.grant(l.id, l.ttl, l.deadline)
		return 1
	case have != nil && l.gone():
		c.revoke(have)
		return -1
	case have != nil:
		c.renew(have, l.deadline)
		have.ttl = l.ttl // it may have been revoked and granted anew
	}
	return 0
}

// move detaches key from one lease and attaches it to another; 0 is no lease.
func (c *leaseChanges) move(keyBytes []byte, from, to int64) {
	if from == to {
		return
	}
	key := string(keyBytes)
	c.lock()
	if l := c.table.byID[from]; l != nil {
		delete(l.keys, key)
		c.undo = append(c.undo, func() { l.keys[key] = struct{}{} })
	}
	if l := c.table.byID[to]; l != nil {
		l.keys[key] = struct{}{}
		c.undo = append(c.undo, func() { delete(l.keys, key) })
	}
}

func (c *leaseChanges) rollback() {
	for i := len(c.undo) - 1; i >= 0; i-- {
		c.undo[i]()
	}
	c.unlock()
}

func (l *lease) sortedKeys() []string {
	keys := make([]string, 0, len(l.keys))
	for k := range l.keys {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}

// LeaseStatus is what LeaseTimeToLive reports. Times are in whole seconds.
type LeaseStatus struct {
	ID         int64
	TTL        int64 // left; 0 when the deadline has passed and the revocation is on its way
	GrantedTTL int64
	Keys       [][]byte // sorted; only when asked for
}

// Lease reports on one lease; ok is false where there is none.
func (db *DB) Lease(id int64, withKeys bool) (status LeaseStatus, ok bool) {
	t := &db.leases
	t.mu.RLock()
	defer t.mu.RUnlock()
	l := t.byID[id]
	if l == nil {
		return LeaseStatus{}, false
	}
	status = LeaseStatus{ID: id, GrantedTTL: l.ttl}
	if left := l.deadline - db.now(); left > 0 {
		status.TTL = left / 1e6
	}
	if withKeys {
		for _, k := range l.sortedKeys() {
			status.Keys = append(status.Keys, []byte(k))
		}
	}
	return status, true
}

// Leases lists the ids of all leases, the one that expires first at the front.
func (db *DB) Leases() []int64 {
	type due struct{ deadline, id int64 }
	t := &db.leases
	t.mu.RLock()
	all := make([]due, len(t.due))
	for i, l := range t.due {
		all[i] = due{l.deadline, l.id}
	}
	t.mu.RUnlock()
	slices.SortFunc(all, func(a, b due) int {
		return cmp.Or(cmp.Compare(a.deadline, b.deadline), cmp.Compare(a.id, b.id))
	})
	ids := make([]int64, len(all))
	for i, l := range all {
		ids[i] = l.id
	}
	return ids
}

// Bounds of what one Command revokes, so that a write waits for no more than that when thousands of leases, or
// leases with thousands of keys, are due at once. A lease that was begun is finished.
const (
	expiredPerCommand     = 500
	expiredRowsPerCommand = 2000
)

// restartGrace is how long a lease that ran out while quire was down is kept after the start, so that its client,
// which could not renew it, can. etcd gives such a lease its whole TTL again.
const restartGrace = 10 * time.Second

// applyGrace prolongs the leases that ran out while nobody could renew them. The batch writes it down: a server that
// restarts again and again must not keep them for ever.
func (b *batch) applyGrace() {
	// The clock of a database may have been set back since: what is not due any more is left alone.
	before := min(b.db.graceBefore, b.now)
	for due := &b.db.leases.due; len(*due) > 0 && (*due)[0].deadline <= before; {
		l := (*due)[0]
		b.leases.renew(l, b.now+min(l.ttl*1e6, restartGrace.Microseconds()))
	}
	if b.db.shared == nil {
		return
	}
	// After a silence also those that are due so soon that their clients, who notice only now that it is over, may be late.
	graced := b.db.shared.contact.silentUntil(b.now)
	if since := graced - b.db.graced; max(since, -since) <= time.Second.Microseconds() {
		return // the end of the same silence, as the batch before noticed it
	}
	b.graced = graced
	for _, l := range b.db.leases.byID {
		if until := b.graced + min(l.ttl*1e6, restartGrace.Microseconds()); l.deadline < until {
			b.leases.renew(l, until)
		}
	}
}

// expiryRetry is how long the expiry loop waits after its Command could not be written.
const expiryRetry = 500 * time.Millisecond

// expireLoop revokes leases when they are due, by an ordinary Command. It sleeps until the earliest
// deadline; there is no tick.
func (db *DB) expireLoop() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		wait := time.Hour
		if deadline, ok := db.leases.next(); ok {
			wait = time.Duration(deadline-db.now()) * time.Microsecond
			if wait <= 0 {
				p := &pending{expire: &expireLeases{}}
				err := db.submit(db.ctx, p)
				if err == nil && !db.alarms.current().has(pb.AlarmType_CORRUPT) {
					continue // with nothing revoked too: then a keepalive came first
				}
				// It could not be written, or the CORRUPT alarm forbids it. Every change of a lease would wake
				// us, a rolled back one too: so do not listen.
				if !db.pause(expiryRetry) {
					return
				}
				continue
			}
		}
		timer.Reset(min(wait, time.Hour))
		select {
		case <-timer.C:
		case <-db.leases.wake:
		case <-db.ctx.Done():
			return
		}
	}
}
