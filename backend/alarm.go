package backend

import (
	"cmp"
	"maps"
	"slices"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// alarmKey is one raised alarm.
type alarmKey struct {
	member uint64
	alarm  pb.AlarmType
}

// alarmSet is an immutable set of alarms.
type alarmSet map[alarmKey]struct{}

func (s alarmSet) has(t pb.AlarmType) bool {
	for k := range s {
		if k.alarm == t {
			return true
		}
	}
	return false
}

func (s alarmSet) with(k alarmKey) alarmSet {
	next := make(alarmSet, len(s)+1)
	for o := range s {
		next[o] = struct{}{}
	}
	next[k] = struct{}{}
	return next
}

func (s alarmSet) without(k alarmKey) alarmSet {
	next := make(alarmSet, len(s))
	for o := range s {
		if o != k {
			next[o] = struct{}{}
		}
	}
	return next
}

// alarms holds the current set; the committer replaces it when a change of it is durable.
type alarms struct {
	mu  sync.RWMutex
	now alarmSet
}

func (a *alarms) current() alarmSet {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.now
}

func (a *alarms) set(s alarmSet) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.now = s
}

type alarmChange struct {
	key    alarmKey
	raised bool
}

// sorted lists the alarms in order of member and type.
func (s alarmSet) sorted() []alarmKey {
	return slices.SortedFunc(maps.Keys(s), func(a, b alarmKey) int {
		return cmp.Or(cmp.Compare(a.member, b.member), cmp.Compare(a.alarm, b.alarm))
	})
}

// Alarms lists the raised alarms in order of member and type.
func (db *DB) Alarms() []*pb.AlarmMember {
	var all []*pb.AlarmMember
	for _, k := range db.alarms.current().sorted() {
		all = append(all, &pb.AlarmMember{MemberID: k.member, Alarm: k.alarm})
	}
	return all
}

// changeAlarm raises or clears an alarm as part of the batch.
func (b *batch) changeAlarm(k alarmKey, raise bool) {
	if _, standing := b.alarms[k]; standing == raise {
		return
	}
	if raise {
		b.alarms = b.alarms.with(k)
	} else {
		b.alarms = b.alarms.without(k)
	}
	b.alarmChanges = append(b.alarmChanges, alarmChange{k, raise})
}

// Charges against the quota, in bytes, beside keys and values: etcd's own estimates
// (server/storage/quota.go).
const (
	putCharge   = 256
	leaseCharge = 64
)

// charge is what a request may add to the database.
func charge(req any) int64 {
	switch r := req.(type) {
	case *pb.PutRequest:
		return putCharge + int64(len(r.Key)+len(r.Value))
	case *pb.TxnRequest:
		return max(chargeOps(r.Success), chargeOps(r.Failure))
	case *pb.LeaseGrantRequest:
		return leaseCharge
	}
	return 0
}

func chargeOps(ops []*pb.RequestOp) (sum int64) {
	for _, op := range ops {
		switch o := op.Request.(type) {
		case *pb.RequestOp_RequestPut:
			sum += charge(o.RequestPut)
		case *pb.RequestOp_RequestTxn:
			sum += charge(o.RequestTxn)
		}
	}
	return sum
}

// checkAlarms refuses what may not be done while an alarm stands: under CORRUPT everything about keys and leases but
// keepalives, under NOSPACE what would grow the database.
func (b *batch) checkAlarms(req any) error {
	if len(b.alarms) == 0 {
		return nil
	}
	if b.alarms.has(pb.AlarmType_CORRUPT) {
		switch req.(type) {
		case *pb.PutRequest, *pb.DeleteRangeRequest, *pb.TxnRequest, *pb.CompactionRequest, *pb.LeaseGrantRequest, *pb.LeaseRevokeRequest:
			return ErrCorrupt
		}
	}
	if _, _, limited := b.space(); limited && charge(req) > 0 && b.alarms.has(pb.AlarmType_NOSPACE) {
		return ErrNoSpace
	}
	return nil
}

// space is how much may be written before the quota is used up, and who raises the alarm then. In a replica it is the
// leader's quota, and the alarm is the leader's.
func (b *batch) space() (left int64, raiser uint64, limited bool) {
	if b.stamp != nil {
		return b.stamp.space, b.stamp.member, b.stamp.space >= 0
	}
	return b.db.opts.QuotaBytes - b.st.logical, b.db.opts.MemberID, b.db.opts.QuotaBytes >= 0
}

// checkSpace refuses what would grow the database past its quota, and raises the NOSPACE alarm then. What only deletes or
// reads always goes through. In a replica as much as the leader has seen to be left is used up by the Commands of an entry,
// one after the other.
func (b *batch) checkSpace(req any) error {
	c := charge(req)
	left, raiser, limited := b.space()
	if c == 0 || !limited {
		return nil
	}
	if c > left {
		b.changeAlarm(alarmKey{raiser, pb.AlarmType_NOSPACE}, true)
		return ErrNoSpace
	}
	if b.stamp != nil {
		b.stamp.space -= c
	}
	return nil
}

// roomAgain is the share of the quota below which a NOSPACE alarm of our own clears itself, in percent:
// far enough from the quota that it does not come back with the next write.
const roomAgain = 95

// outlived lists the NOSPACE alarms that should go: our own when there is room again, and where this replica leads,
// those of former leaders too. REQUIRES: the commit token.
func (db *DB) outlived() (gone []alarmKey) {
	if q := float64(db.opts.QuotaBytes); q >= 0 && float64(db.st.logical) >= q*roomAgain/100 {
		return nil
	}
	if db.replica != nil {
		if _, leads := db.replica.clock.mine(); !leads {
			return nil
		}
	}
	for _, k := range db.alarms.current().sorted() {
		if k.alarm == pb.AlarmType_NOSPACE && (db.replica != nil || k.member == db.opts.MemberID) {
			gone = append(gone, k)
		}
	}
	return gone
}
