package crash

import (
	"fmt"
	"sync"
	"time"
)

// leaseTTLs: a short lease ends within the run, a long one must outlive it.
const (
	shortTTL = 2 * time.Second
	longTTL  = 2 * time.Hour
)

// lease is one lease that a client asked for, under an id that the client chose.
type lease struct {
	id      int64
	ttl     time.Duration
	sent    time.Time // of the grant or the newest acknowledged keepalive: the lease cannot end before sent + ttl
	latest  time.Time // when it can have been granted or renewed at the latest: it is due at latest + ttl
	granted outcome
	revoked bool    // a revoke was sent
	revoke  outcome // of that revoke
	gone    bool    // was rightly not listed after a restart: must never come back
}

// leaseBook knows all leases. It is safe for concurrent use.
type leaseBook struct {
	mu struct {
		sync.Mutex
		byID map[int64]*lease
	}
}

func newLeaseBook() *leaseBook {
	b := &leaseBook{}
	b.mu.byID = map[int64]*lease{}
	return b
}

// update runs f on the lease, which is made if it is new.
func (b *leaseBook) update(id int64, f func(*lease)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	l := b.mu.byID[id]
	if l == nil {
		l = &lease{id: id}
		b.mu.byID[id] = l
	}
	f(l)
}

// mayEnd says why the lease could not have ended at that time, nil if it could.
func (b *leaseBook) mayEnd(id int64, at time.Time) error {
	if id == 0 {
		return fmt.Errorf("the key had no lease")
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	l := b.mu.byID[id]
	switch {
	case l == nil:
		return fmt.Errorf("lease %d was never asked for", id)
	case l.revoked:
		return nil
	case at.Before(l.sent.Add(l.ttl)):
		return fmt.Errorf("lease %d of %s ended after %s", id, l.ttl, at.Sub(l.sent))
	}
	return nil
}

// verify compares the leases that the server lists after a restart with the book, and settles what was
// uncertain. It returns the long leases that must still be there.
func (b *leaseBook) verify(listed map[int64]bool) (alive []*lease, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for id := range listed {
		if b.mu.byID[id] == nil {
			return nil, fmt.Errorf("the server lists lease %d: it was never asked for", id)
		}
	}
	for id, l := range b.mu.byID {
		here := listed[id]
		switch {
		case l.gone && here:
			return nil, fmt.Errorf("lease %d is back after it was gone", id)
		case l.gone:
		case l.revoked && l.revoke == acknowledged:
			if here {
				return nil, fmt.Errorf("lease %d is back: its revoke was acknowledged", id)
			}
			l.gone = true
		case here:
			l.granted, l.revoked = acknowledged, false // settles a grant or revoke without an answer
			if l.ttl == longTTL {
				alive = append(alive, l)
			}
		case !l.revoked && l.granted == acknowledged && (l.ttl == longTTL || time.Since(l.sent) < l.ttl):
			return nil, fmt.Errorf("lease %d is lost: its grant of %s was acknowledged %s ago", id, l.ttl, time.Since(l.sent))
		default:
			l.gone = true // never granted, revoked, or ended in time
		}
	}
	return alive, nil
}

// overdue is how long a lease that is still there has been due.
func (b *leaseBook) overdue(listed map[int64]bool) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	var worst time.Duration
	for id := range listed {
		if l := b.mu.byID[id]; l != nil && !l.latest.IsZero() {
			worst = max(worst, time.Since(l.latest)-l.ttl)
		}
	}
	return worst
}

// short is how many short leases are not yet known to be gone.
func (b *leaseBook) short() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for _, l := range b.mu.byID {
		if l.ttl == shortTTL && !l.gone {
			n++
		}
	}
	return n
}
