package backend

import (
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// stamp is all that apply may know of the world outside the log: as the leader saw it when it put the entry into the log.
type stamp struct {
	clock  int64  // µs; what leases expire by
	wall   int64  // µs; the time that rows get
	space  int64  // bytes left of the quota; negative: there is none
	member uint64 // the leader's id, for the NOSPACE alarm
}

const stampVersion = 1

func (s *stamp) encode() []byte {
	b := append(make([]byte, 0, 1+4*binary.MaxVarintLen64), stampVersion)
	b = binary.AppendVarint(b, s.clock)
	b = binary.AppendVarint(b, s.wall)
	b = binary.AppendVarint(b, s.space)
	return binary.AppendUvarint(b, s.member)
}

func decodeStamp(b []byte) (*stamp, error) {
	if len(b) == 0 || b[0] != stampVersion {
		return nil, errNewerPayload
	}
	b = b[1:]
	s := &stamp{}
	for _, to := range []*int64{&s.clock, &s.wall, &s.space} {
		v, used := binary.Varint(b)
		if used <= 0 {
			return nil, fmt.Errorf("%w: a stamp is cut off", errBadPayload)
		}
		*to, b = v, b[used:]
	}
	member, used := binary.Uvarint(b)
	if used <= 0 || used != len(b) {
		return nil, fmt.Errorf("%w: a stamp does not end where it should", errBadPayload)
	}
	s.member = member
	return s, nil
}

// Stamp is what the leader puts in front of an entry. REQUIRES: between Lead and Follow.
func (db *DB) Stamp() []byte {
	clock, _ := db.replica.clock.mine()
	s := stamp{clock: clock, wall: time.Now().UnixMicro(), space: -1, member: db.opts.MemberID}
	if quota := db.opts.QuotaBytes; quota >= 0 {
		s.space = max(0, quota-db.logical.Load())
	}
	return s.encode()
}

// clusterClock is the clock of the cluster as this member knows it. Leases expire by it. It stands in the stamps of the
// log, never goes back, and stands still while nobody leads.
//
// The leader's goes on from the newest stamp, or from its wall clock if that is ahead, with its monotonic clock. In the
// first entry of its term the deadlines of all leases move by as much as the clock has: see batch.resumeLeases.
type clusterClock struct {
	mu   sync.Mutex
	at   int64     // of the newest stamp that is applied
	term uint64    // its entry's
	seen time.Time // when it was applied here; zero: at some time before the start
	// leads is the term in which this member leads, 0 when it does not; its clock was base at the time since.
	leads uint64
	base  int64
	since time.Time
}

// take notes a stamp that is applied.
func (c *clusterClock) take(at int64, term uint64, seen time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at, c.term, c.seen = at, term, seen
}

// lead begins a term. Until an entry of it is applied, leases are seen as they were.
func (c *clusterClock) lead(term uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leads, c.since = term, time.Now()
	c.base = max(c.at, c.since.UnixMicro())
}

func (c *clusterClock) follow() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leads = 0
}

// mine is the clock of this member as the leader, and whether it leads.
func (c *clusterClock) mine() (now int64, leads bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.base + time.Since(c.since).Microseconds(), c.leads != 0
}

// clockEvery is how old the newest stamp may become while there are leases: how much longer than it should a lease may
// live when the leader is lost.
const clockEvery = 5 * time.Second

// now is what the clock shows, as far as can be told: where another member leads, the newest stamp and the time since.
// While there is none it stands still, so it does not run on for long without a stamp.
func (c *clusterClock) now() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.leads != 0 && c.leads == c.term:
		return c.base + time.Since(c.since).Microseconds()
	case c.term == 0:
		return time.Now().UnixMicro() // a database that never was a cluster's: its leases are as they were
	case c.seen.IsZero() || c.leads != 0:
		return c.at
	}
	return c.at + min(time.Since(c.seen), 2*clockEvery).Microseconds()
}

// untilStamp is how long the newest stamp is still good for, 0 when the log needs a new one; ok is false where this
// member does not lead.
func (c *clusterClock) untilStamp() (d time.Duration, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.leads == 0 || c.leads != c.term {
		return 0, c.leads != 0
	}
	return max(0, clockEvery-time.Since(c.seen)), true
}

// Lead is called when this member leads the term, and everything up to that term's first entry is applied.
func (db *DB) Lead(term uint64) {
	db.replica.clock.lead(term)
	db.leases.tell()
	db.compactor.wake() // the NOSPACE alarm of a former leader may have to go
}

// Follow is called when this member does not lead any more.
func (db *DB) Follow() {
	db.replica.clock.follow()
	db.leases.tell()
}

// resumeLeases begins the term of another leader: nobody could renew a lease while nobody led, so none has aged. Those that
// were about to expire get a little more, as after a restart.
func (b *batch) resumeLeases(passed int64) {
	for _, l := range b.db.leases.byID {
		deadline := max(l.deadline+passed, b.now+min(l.ttl*1e6, restartGrace.Microseconds()))
		if deadline != l.deadline {
			b.leases.renew(l, deadline)
		}
	}
}

// leaseLoop proposes, while this member leads, to revoke leases that are due, and an entry with a stamp when the log's clock
// has become old: the Command is the same. Whether a lease is due is decided by apply: a keepalive that came first wins,
// and so does one that a newer leader has taken.
func (db *DB) leaseLoop() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		wait := db.untilLeaseWork()
		if wait <= 0 {
			if err := db.submit(db.ctx, &pending{expire: &expireLeases{}}); err != nil && !db.pause(expiryRetry) {
				return
			}
			continue
		}
		timer.Reset(wait)
		select {
		case <-timer.C:
		case <-db.leases.wake:
		case <-db.ctx.Done():
			return
		}
	}
}

// untilLeaseWork is how long leaseLoop may sleep.
func (db *DB) untilLeaseWork() time.Duration {
	wait, leads := db.replica.clock.untilStamp()
	deadline, some := db.leases.next()
	if !leads || !some {
		return time.Hour
	}
	if wait == 0 || db.alarms.current().has(pb.AlarmType_CORRUPT) { // then nothing expires
		return wait
	}
	return min(wait, time.Duration(deadline-db.now())*time.Microsecond)
}
