package backend

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// TestManyLeasesDueAtOnce: each expires in a revision of its own, the oldest deadline first, its keys in order; and a
// write that comes meanwhile is not kept waiting for all of them.
func TestManyLeasesDueAtOnce(t *testing.T) {
	rnd := seed(t)
	const leases = 2000
	expired := make(chan int64, leases)
	db := openTest(t, testPath(t), Options{Hooks: Hooks{LeaseExpired: func(id int64) { expired <- id }}})
	var wg sync.WaitGroup
	for worker := range int64(50) {
		wg.Go(func() {
			for id := worker + 1; id <= leases; id += 50 {
				mustWrite(t, db, &pb.LeaseGrantRequest{ID: id, TTL: 1000})
				mustWrite(t, db, &pb.TxnRequest{Success: []*pb.RequestOp{
					{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: fmt.Appendf(nil, "z%d", id), Lease: id}}},
					{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: fmt.Appendf(nil, "a%d", id), Lease: id}}},
				}})
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	// Time cannot be moved, so the deadlines are.
	type due struct{ deadline, id int64 }
	var order []due
	alone(t, db, func() error {
		db.leases.mu.Lock()
		defer db.leases.mu.Unlock()
		for id, l := range db.leases.byID {
			deadline := db.now() - 1 - rnd.Int64N(leases/4) // some the same
			order = append(order, due{deadline, id})
			db.leases.setDeadline(l, deadline)
		}
		return nil
	})
	slices.SortFunc(order, func(a, b due) int { return cmp.Or(cmp.Compare(a.deadline, b.deadline), cmp.Compare(a.id, b.id)) })
	rev := db.Revision()
	mustWrite(t, db, &pb.LeaseGrantRequest{ID: leases + 1, TTL: 1000}) // wakes the expiry loop
	for i, d := range order {
		if id := <-expired; id != d.id {
			t.Fatalf("lease %d expired as number %d, want lease %d", id, i, d.id)
		}
	}
	if got := db.Revision(); got != rev+leases {
		t.Fatalf("%d leases expired in %d revisions", leases, got-rev)
	}
	req := everything(rev + 1)
	req.MaxEvents = 3 * leases
	events := mustHistory(t, db, req).Events
	if len(events) != 2*leases {
		t.Fatalf("%d events, want %d", len(events), 2*leases)
	}
	for i, e := range events {
		want := fmt.Sprintf("%s%d", []string{"a", "z"}[i%2], order[i/2].id)
		if e.Rev != rev+1+int64(i/2) || e.Type != mvccpb.Event_DELETE || string(e.Key) != want {
			t.Fatalf("event %d is %s, want the delete of %s in revision %d", i, eventText(e), want, rev+1+int64(i/2))
		}
	}
	if s := db.Stats(); s.Keys != 0 || s.Leases != 1 {
		t.Errorf("%d keys and %d leases are left", s.Keys, s.Leases)
	}
}

// TestKeepAliveOrExpiry: keepalives that come when the lease is just due either renew it, and then it lives for its whole
// TTL from there on, or are refused. None is answered with success for a lease that then expires early.
func TestKeepAliveOrExpiry(t *testing.T) {
	rnd := seed(t)
	const leases = 60
	type fate struct {
		renewed, expired int64 // µs; when the last keepalive that succeeded was sent, and when the lease was gone
	}
	var mu sync.Mutex
	fates := make(map[int64]*fate)
	var db *DB
	opened := make(chan struct{})
	db = openTest(t, testPath(t), Options{MinLeaseTTL: 1, Hooks: Hooks{LeaseExpired: func(id int64) {
		<-opened
		mu.Lock()
		defer mu.Unlock()
		fates[id].expired = db.now()
	}}})
	close(opened)
	var wg sync.WaitGroup
	successes, refusals := 0, 0
	for id := int64(1); id <= leases; id++ {
		rnd := rand.New(rand.NewPCG(rnd.Uint64(), 0))
		wg.Go(func() {
			mu.Lock()
			f := &fate{renewed: db.now()}
			fates[id] = f
			mu.Unlock()
			mustWrite(t, db, &pb.LeaseGrantRequest{ID: id, TTL: 1})
			for range 3 {
				// As close to the deadline as can be.
				time.Sleep(time.Second - 3*time.Millisecond + time.Duration(rnd.Int64N(int64(6*time.Millisecond))))
				sent := db.now()
				_, err := db.Write(t.Context(), Command{Request: &pb.LeaseKeepAliveRequest{ID: id}})
				mu.Lock()
				switch {
				case err == nil && f.expired != 0 && f.expired < sent:
					t.Errorf("lease %d was renewed after it had expired", id)
				case err == nil:
					f.renewed = sent
					successes++
				case !errors.Is(err, ErrLeaseNotFound):
					t.Error(err)
				default:
					refusals++
				}
				mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	for deadline := time.Now().Add(20 * time.Second); db.Stats().Leases > 0; {
		if time.Now().After(deadline) {
			t.Fatalf("%d leases never expired", db.Stats().Leases)
		}
		time.Sleep(10 * time.Millisecond) // until the last TTL is over
	}
	mu.Lock()
	defer mu.Unlock()
	for id, f := range fates {
		if f.expired != 0 && f.expired < f.renewed+1e6 {
			t.Errorf("lease %d of one second expired %d µs after a keepalive that succeeded", id, f.expired-f.renewed)
		}
	}
	t.Logf("%d keepalives succeeded, %d were refused", successes, refusals)
}

// TestClockJumpsBackwards: the times of the history never run backwards, and leases do not live longer for it.
func TestClockJumpsBackwards(t *testing.T) {
	path := testPath(t)
	db, err := OpenSQLite(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	mustPut(t, db, "a", "1")
	const hour = int64(3600 * 1e6)
	execAlone(t, db, fmt.Sprintf("UPDATE revisions SET committed_at = committed_at + %d", hour))
	closeAndCheck(t, db, path)

	// What is there was written when the clock was an hour ahead.
	db = openTest(t, path, Options{})
	mustWrite(t, db, &pb.LeaseGrantRequest{ID: 7, TTL: 100})
	mustWrite(t, db, &pb.PutRequest{Key: []byte("a"), Lease: 7})
	mustPut(t, db, "b", "1")
	if s, ok := db.Lease(7, false); !ok || s.TTL > 100 || s.TTL < 50 {
		t.Errorf("a lease of 100 seconds has %d left: %+v", s.TTL, s)
	}
	alone(t, db, func() error {
		n, err := sqliteOf(db).w.queryInt64("SELECT count(*) FROM revisions AS r JOIN revisions AS p ON p.id = r.id - 1 WHERE r.committed_at < p.committed_at")
		if n != 0 {
			t.Errorf("%d rows were committed before the one in front of them", n)
		}
		first, e := sqliteOf(db).w.queryInt64("SELECT min(committed_at) FROM revisions")
		if ahead := first - db.now(); ahead < hour/2 {
			t.Errorf("the rows are %d µs ahead: the test tests nothing", ahead)
		}
		return errors.Join(err, e)
	})
	// And keepalive goes by the time that passes, too.
	mustWrite(t, db, &pb.LeaseKeepAliveRequest{ID: 7})
	if s, _ := db.Lease(7, false); s.TTL > 100 {
		t.Errorf("renewed, it has %d seconds left", s.TTL)
	}
}
