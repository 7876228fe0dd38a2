package conformance

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
)

// compactWaiting compacts all that was before somebody entered a queue. Whether he watches already does not matter: he begins at
// his entry or later.
func (x *exam) compactWaiting(key string) {
	x.Helper()
	entered := x.get(key)
	if entered == nil {
		x.Fatalf("nobody waits as %s", key)
	}
	x.put("k", "")
	x.compact(entered.CreateRevision)
}

// sessionCases are those of etcd's client/v3/concurrency but for its STM.
var sessionCases = []testCase{
	{name: "a session keeps a lease alive until it is closed", run: func(x *exam) {
		c := x.client()
		s := x.session(c, concurrency.WithTTL(7))
		equal(x, "the granted time", x.timeToLive(int64(s.Lease())).GrantedTTL, 7)
		equal(x, "its client", s.Client(), c)
		equal(x, "its context", s.Ctx().Err(), nil)
		x.set(c, "k", "", clientv3.WithLease(s.Lease()))
		x.done("close", s.Close())
		closes(x, "a closed session", s.Done())
		equal(x, "its context", s.Ctx().Err(), context.Canceled)
		equal(x, "leases left", len(x.leases()), 0)
		if x.get("k") != nil {
			x.Error("a key has outlived its session")
		}

		x.grant(77, 100)
		ctx, cancel := context.WithCancel(x.ctx)
		s = x.session(c, concurrency.WithLease(77), concurrency.WithContext(ctx))
		equal(x, "the lease", s.Lease(), 77)
		cancel()
		closes(x, "a session whose context is over", s.Done())
		s = x.session(c, concurrency.WithLease(77))
		s.Orphan()
		closes(x, "an orphaned session", s.Done())
		if got := x.leases(); !slices.Equal(got, []int64{77}) {
			x.Errorf("leases are %v: who only stops renewing does not revoke", got)
		}
	}},

	{name: "a session learns that its lease is gone", run: func(x *exam) {
		c := x.client()
		s := x.session(c, concurrency.WithTTL(2))
		_, err := x.Lease.LeaseRevoke(x.ctx, &pb.LeaseRevokeRequest{ID: int64(s.Lease())})
		x.done("revoke", err)
		closes(x, "a session without lease", s.Done())
		closes(x, "a session of a lease that never was", x.session(c, concurrency.WithLease(404)).Done())
	}},

	{name: "of many mutexes one has the lock, and its fence holds", run: func(x *exam) {
		const each, owners = 5, 6
		clients := x.clients(owners)
		x.set(clients[0], "counter", "0")
		var all sync.WaitGroup
		for _, c := range clients {
			s := x.session(c)
			all.Go(func() {
				m := concurrency.NewMutex(s, "lock")
				for range each {
					if err := m.Lock(x.ctx); err != nil {
						x.Errorf("lock: %v", err)
						return
					}
					n, err := strconv.Atoi(x.value(c, "counter"))
					if err != nil {
						x.Errorf("counter: %v", err)
					}
					r, err := c.Txn(x.ctx).If(m.IsOwner()).Then(clientv3.OpPut("counter", strconv.Itoa(n+1))).Commit()
					if err != nil || !r.Succeeded {
						x.Errorf("a write under the lock: %v, %v", r, err)
					}
					if err := m.Unlock(x.ctx); err != nil {
						x.Errorf("unlock: %v", err)
					}
				}
			})
		}
		all.Wait()
		equal(x, "the counter", x.value(clients[0], "counter"), strconv.Itoa(each*owners))
		x.waiting(clients[0], "lock/", 0)
	}},

	{name: "a mutex: its key, its errors, another try", run: func(x *exam) {
		clients := x.clients(2)
		first, second := x.session(clients[0]), x.session(clients[1])
		m, other := concurrency.NewMutex(first, "lock"), concurrency.NewMutex(second, "lock")
		x.refused("an unlock before the lock", m.Unlock(x.ctx), concurrency.ErrLockReleased)
		x.done("try", m.TryLock(x.ctx))
		equal(x, "the key", m.Key(), fmt.Sprintf("lock/%x", first.Lease()))
		created := x.get(m.Key()).CreateRevision
		equal(x, "the header's revision", m.Header().Revision, created)
		x.done("the same session again", concurrency.NewMutex(first, "lock").Lock(x.ctx))
		equal(x, "created", x.get(m.Key()).CreateRevision, created)

		x.refused("a try of another session", other.TryLock(x.ctx), concurrency.ErrLocked)
		x.waiting(clients[0], "lock/", 1)
		watching := watches(clients[1])
		ctx, cancel := context.WithCancel(x.ctx)
		waits := begin(func() error { return other.Lock(ctx) })
		next(x, "the waiter's watch", watching) // so it has the answer to its entry
		cancel()
		x.refused("who stops waiting", next(x, "the waiter", waits), context.Canceled)
		x.waiting(clients[0], "lock/", 1)

		locked := make(chan error, 1)
		go func() {
			defer close(locked)
			l := concurrency.NewLocker(second, "lock")
			l.Lock()
			defer l.Unlock()
			locked <- nil
		}()
		x.waiting(clients[0], "lock/", 2)
		x.compactWaiting(fmt.Sprintf("lock/%x", second.Lease()))
		blocked(x, "a sync.Locker", locked)
		x.done("unlock", m.Unlock(x.ctx))
		next(x, "the sync.Locker", locked)
		closes(x, "the sync.Locker", locked) // its client must outlive it
		x.refused("a second unlock", m.Unlock(x.ctx), concurrency.ErrLockReleased)
	}},

	{name: "a mutex is lost with its session, whether that waits or has crashed", run: func(x *exam) {
		clients := x.clients(3)
		crashing := x.session(clients[0], concurrency.WithTTL(2))
		ending, lasting := x.session(clients[1]), x.session(clients[2])
		m := concurrency.NewMutex(crashing, "lock")
		x.done("lock", m.Lock(x.ctx))
		expired := concurrency.NewMutex(ending, "lock")
		loses := begin(func() error { return expired.Lock(x.ctx) })
		x.waiting(clients[2], "lock/", 2)
		_, err := clients[2].Revoke(x.ctx, ending.Lease())
		x.done("revoke", err)
		last := concurrency.NewMutex(lasting, "lock")
		gets := begin(func() error { return last.Lock(x.ctx) })
		x.waiting(clients[2], "lock/", 2)
		clients[0].Close() // as if its process had ended
		x.refused("a waiter without session", next(x, "the waiter", loses), concurrency.ErrSessionExpired)
		x.done("lock after the crash", next(x, "the next owner", gets))
		for owner, want := range map[*concurrency.Mutex]bool{m: false, expired: false, last: true} {
			r, err := clients[2].Txn(x.ctx).If(owner.IsOwner()).Commit()
			x.done("a fenced txn", err)
			equal(x, "the owner of "+owner.Key(), r.Succeeded, want)
		}
	}},

	{name: "the Lock service and mutexes of clients stand in one queue", run: func(x *exam) {
		c := x.client()
		s := x.session(c)
		x.grant(1, 100)
		x.grant(2, 100)
		x.lock("lock", 1)
		m := concurrency.NewMutex(s, "lock")
		second := begin(func() error { return m.Lock(x.ctx) })
		x.waiting(c, "lock/", 2)
		third := x.lockLater(x.ctx, "lock", 2)
		blocked(x, "the mutex", second)
		_, err := x.locks().Unlock(x.ctx, &v3lockpb.UnlockRequest{Key: []byte("lock/1")})
		x.done("unlock", err)
		x.done("lock", next(x, "the mutex", second))
		x.waits(third)
		x.done("unlock", m.Unlock(x.ctx))
		x.ends(third, "lock/2")
	}},

	{name: "an election: who leads, proclaims, resigns and takes over", run: func(x *exam) {
		clients := x.clients(3)
		first, second := x.session(clients[0]), x.session(clients[1], concurrency.WithTTL(2))
		e, rival := concurrency.NewElection(first, "vote"), concurrency.NewElection(second, "vote")
		_, err := e.Leader(x.ctx)
		x.refused("a leader before the vote", err, concurrency.ErrElectionNoLeader)
		x.refused("a proclamation before the vote", e.Proclaim(x.ctx, ""), concurrency.ErrElectionNotLeader)
		x.done("resigning before the vote", e.Resign(x.ctx))

		ctx, cancel := context.WithCancel(x.ctx)
		defer cancel()
		observed := concurrency.NewElection(x.session(clients[2]), "vote").Observe(ctx)
		sees := func(who *concurrency.Election, value string) {
			x.Helper()
			r := next(x, "the observer", observed)
			equal(x, "observed", pairs(r), who.Key()+"="+value)
			if r.Header.Revision < r.Kvs[0].ModRevision {
				x.Errorf("revision %d is observed with the header of %d", r.Kvs[0].ModRevision, r.Header.Revision)
			}
		}

		x.done("campaign", e.Campaign(x.ctx, "one"))
		sees(e, "one")
		equal(x, "the key", e.Key(), fmt.Sprintf("vote/%x", first.Lease()))
		equal(x, "the revision", e.Rev(), x.get(e.Key()).CreateRevision)
		equal(x, "the header's revision", e.Header().Revision, e.Rev())
		r, err := rival.Leader(x.ctx)
		x.done("leader", err)
		equal(x, "who leads", pairs(r), e.Key()+"=one")
		x.done("campaign of the leader with another value", e.Campaign(x.ctx, "uno"))
		sees(e, "uno")
		resumed := concurrency.ResumeElection(first, "vote/", e.Key(), e.Rev())
		x.done("proclaim", resumed.Proclaim(x.ctx, "eins"))
		sees(e, "eins")

		watching := watches(clients[1])
		canceled, cancelCampaign := context.WithCancel(x.ctx)
		campaign := begin(func() error { return rival.Campaign(canceled, "two") })
		next(x, "the campaign's watch", watching) // so it has the answer to its entry
		cancelCampaign()
		x.refused("a campaign given up", next(x, "the campaign", campaign), context.Canceled)
		x.waiting(clients[0], "vote/", 1)

		campaign = begin(func() error { return rival.Campaign(x.ctx, "two") })
		x.waiting(clients[0], "vote/", 2)
		x.compactWaiting(fmt.Sprintf("vote/%x", second.Lease()))
		blocked(x, "the campaign", campaign)
		x.done("resign", resumed.Resign(x.ctx))
		x.done("campaign", next(x, "the campaign", campaign))
		sees(rival, "two")
		x.refused("a proclamation of who has resigned", e.Proclaim(x.ctx, ""), concurrency.ErrElectionNotLeader)

		heir := concurrency.NewElection(first, "vote")
		campaign = begin(func() error { return heir.Campaign(x.ctx, "three") })
		x.waiting(clients[0], "vote/", 2)
		second.Orphan() // and expires
		x.done("campaign", next(x, "the campaign", campaign))
		sees(heir, "three")
		cancel()
		closes(x, "an observer that goes", observed)
	}},

	{name: "an observer and many who follow each other", run: func(x *exam) {
		clients := x.clients(4)
		observed := concurrency.NewElection(x.session(clients[0]), "vote").Observe(x.ctx)
		var all sync.WaitGroup
		for i, c := range clients {
			s := x.session(c)
			all.Go(func() {
				e := concurrency.NewElection(s, "vote")
				if err := e.Campaign(x.ctx, strconv.Itoa(i)); err != nil {
					x.Errorf("campaign: %v", err)
				}
				if err := e.Resign(x.ctx); err != nil {
					x.Errorf("resign: %v", err)
				}
			})
		}
		all.Wait()
		last := concurrency.NewElection(x.session(clients[1]), "vote")
		x.done("campaign", last.Campaign(x.ctx, "last"))
		revision := int64(0)
		for {
			r := next(x, "the observer", observed)
			if r.Header.Revision <= revision {
				x.Fatalf("revision %d observed after %d", r.Header.Revision, revision)
			}
			revision = r.Header.Revision
			if strings.HasSuffix(pairs(r), "=last") {
				return
			}
		}
	}},
}
