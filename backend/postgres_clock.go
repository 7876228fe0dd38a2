package backend

import (
	"sync"
	"sync/atomic"
	"time"
)

// pgClock is the database's clock as this process knows it: leases of all processes run by it. It is estimated from the
// times that come with answers, and goes on with the monotonic clock of this machine in between, so that neither a clock
// that is set here nor one that differs between machines matters.
type pgClock struct {
	mu     sync.Mutex
	origin time.Time     // of this process's monotonic clock
	offset int64         // µs, from origin to the database's time
	error  time.Duration // by how much offset may be wrong: half a round trip
	at     time.Time     // when it was taken
}

// pgClockKeeps is how long an exact sample is preferred to newer ones that are less exact: clocks drift apart by
// some 100 µs in that time, and by less than pgClockDrift.
const (
	pgClockKeeps = 10 * time.Second
	pgClockDrift = 10 * time.Millisecond
)

// sample takes in that the database's clock showed now (µs) between two moments here.
func (c *pgClock) sample(sent, received time.Time, now int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.origin.IsZero() {
		c.origin = sent
	}
	half := received.Sub(sent) / 2
	offset := now - sent.Add(half).Sub(c.origin).Microseconds()
	// Two samples that cannot both be right mean that a clock has jumped: this machine slept, or it is another server.
	fits := max(offset-c.offset, c.offset-offset) <= (half + c.error + pgClockDrift).Microseconds()
	if !c.at.IsZero() && half > c.error && received.Sub(c.at) < pgClockKeeps && fits {
		return
	}
	c.offset, c.error, c.at = offset, half, received
}

// now is the database's time, µs since the epoch; 0 before the first sample.
func (c *pgClock) now() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.origin.IsZero() {
		return 0
	}
	return c.offset + time.Since(c.origin).Microseconds()
}

// pgContact notices when this process and the database had nothing to do with each other for a while: the database was
// away, or the network, or this process was stopped. Leases that ran out meanwhile could not be renewed.
type pgContact struct {
	limit int64        // µs, of silence that is usual
	last  atomic.Int64 // µs, the database's time
	grace atomic.Int64 // µs, when the last silence ended
}

// made notes an answer of the database at a time.
func (c *pgContact) made(now int64) {
	if last := c.last.Swap(now); last != 0 && now-last > c.limit {
		c.grace.Store(now)
	}
}

// lose notes that the database could not be asked: whatever comes next ends a silence.
func (c *pgContact) lose() {
	if c.last.Load() != 0 {
		c.last.Store(1)
	}
}

// silentUntil is the time up to which a lease that was due could not be renewed.
func (c *pgContact) silentUntil(now int64) int64 {
	if last := c.last.Load(); last != 0 && now-last > c.limit {
		return now
	}
	return c.grace.Load()
}
