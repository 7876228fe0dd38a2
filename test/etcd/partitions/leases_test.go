//go:build linux

package partitions

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/test/etcd/partitions/cluster"
)

// Each lease has two keys, which go together: "kept/<id>/a" and b of one that somebody renews, "left/<id>/…" of one that
// nobody does.
const keptTTL, leftTTL = 5, 2

// lease is one lease and what its client knows of it.
type lease struct {
	id   int64
	kept bool
	ttl  time.Duration // as the server granted it

	// under leases.mu:
	renewed  time.Duration // when the newest renewal was sent that was acknowledged, or the grant
	renewals int
	longest  time.Duration // between two such
	lost     error         // the server says that there is no such lease
	revoked  bool          // by the test, in the end
}

func (l *lease) key(part string) string {
	if l.kept {
		return fmt.Sprintf("kept/%d/%s", l.id, part)
	}
	return fmt.Sprintf("left/%d/%s", l.id, part)
}

// leases are those of a cluster, and their clients.
type leases struct {
	record  *record
	members func() []*cluster.Member // to try
	random  *rand.Rand
	stopped chan struct{} // no further leases are granted
	done    sync.WaitGroup

	mu struct {
		sync.Mutex
		all  []*lease
		next int64
	}
}

func newLeases(r *record, seed uint64, members func() []*cluster.Member) *leases {
	return &leases{record: r, members: members, random: rand.New(rand.NewPCG(seed, 1<<32)), stopped: make(chan struct{})}
}

// grant makes a lease with its keys, and returns it when the server has acknowledged both, or one that is to be looked
// at, if only the grant was.
func (ls *leases) grant(ctx context.Context, m *cluster.Member, kept bool) (*lease, error) {
	ls.mu.Lock()
	ls.mu.next++
	l := &lease{id: 1000 + ls.mu.next, kept: kept}
	ls.mu.Unlock()
	ttl := int64(leftTTL)
	if kept {
		ttl = keptTTL
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	sent := ls.record.now()
	granted, err := m.Lease.LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: l.id, TTL: ttl})
	if err != nil {
		return nil, err
	}
	l.ttl, l.renewed = time.Duration(granted.TTL)*time.Second, sent
	ls.mu.Lock()
	ls.mu.all = append(ls.mu.all, l)
	ls.mu.Unlock()
	_, err = m.KV.Txn(ctx, &pb.TxnRequest{Success: []*pb.RequestOp{putLeased(l, "a"), putLeased(l, "b")}})
	return l, err
}

func putLeased(l *lease, part string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(l.key(part)), Lease: l.id}}}
}

// keep grants a lease and renews it from now on, first through m, then through whoever answers.
func (ls *leases) keep(ctx context.Context, m *cluster.Member) error {
	l, err := ls.grant(ctx, m, true)
	if err != nil {
		return fmt.Errorf("grant a lease: %w", err)
	}
	ls.done.Go(func() {
		for ls.wait(ctx, time.Second) {
			ls.renewAnywhere(ctx, m, l)
		}
	})
	return nil
}

func (ls *leases) wait(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

func (ls *leases) renewAnywhere(ctx context.Context, first *cluster.Member, l *lease) {
	for _, m := range append([]*cluster.Member{first}, ls.members()...) {
		if ctx.Err() != nil || ls.renew(ctx, m, l) == nil {
			return
		}
	}
}

// renew renews a lease once. An error means that it is not known whether it has.
func (ls *leases) renew(ctx context.Context, m *cluster.Member, l *lease) error {
	ctx, cancel := context.WithTimeout(ctx, 700*time.Millisecond)
	defer cancel()
	stream, err := m.Lease.LeaseKeepAlive(ctx)
	if err != nil {
		return err
	}
	sent := ls.record.now()
	if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: l.id}); err != nil {
		return err
	}
	r, err := stream.Recv()
	if err != nil {
		return err
	}
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if r.TTL <= 0 {
		if l.lost == nil {
			l.lost = fmt.Errorf("at %v %s says that there is no such lease", ls.record.now().Round(time.Millisecond), m.Name)
		}
		return nil
	}
	l.longest = max(l.longest, sent-l.renewed)
	l.renewed = max(l.renewed, sent)
	l.renewals++
	return nil
}

// leave goes on granting leases that nobody renews, until stopGranting.
func (ls *leases) leave(ctx context.Context) {
	ls.done.Go(func() {
		for {
			members := ls.members()
			// A cluster that is broken at present grants none.
			_, _ = ls.grant(ctx, members[ls.random.IntN(len(members))], false)
			select {
			case <-ls.stopped:
				return
			case <-ctx.Done():
				return
			case <-time.After(1500 * time.Millisecond):
			}
		}
	})
}

// stopGranting has no further leases made. Those that are kept are kept on.
func (ls *leases) stopGranting() { close(ls.stopped) }

// gone waits until no key of a lease that nobody renews is left.
func (ls *leases) gone(ctx context.Context, m *cluster.Member) error {
	for {
		r, err := m.KV.Range(ctx, &pb.RangeRequest{Key: []byte("left/"), RangeEnd: []byte("left0"), KeysOnly: true})
		if err == nil && len(r.Kvs) == 0 {
			return nil
		}
		if !ls.wait(ctx, 50*time.Millisecond) {
			return fmt.Errorf("keys of leases that nobody renews are still there: %v %v", r.GetKvs(), err)
		}
	}
}

// listed says what is wrong with what a member knows of the leases, when only those that are kept can be left.
func (ls *leases) listed(ctx context.Context, m *cluster.Member) error {
	r, err := m.Lease.LeaseLeases(ctx, &pb.LeaseLeasesRequest{})
	if err != nil {
		return fmt.Errorf("list the leases of %s: %w", m.Name, err)
	}
	var got, want []int64
	for _, l := range r.Leases {
		got = append(got, l.ID)
	}
	slices.Sort(got)
	var wrong []error
	ls.mu.Lock()
	kept := slices.DeleteFunc(slices.Clone(ls.mu.all), func(l *lease) bool { return !l.kept || l.lost != nil })
	ls.mu.Unlock()
	for _, l := range kept {
		want = append(want, l.id)
		r, err := m.Lease.LeaseTimeToLive(ctx, &pb.LeaseTimeToLiveRequest{ID: l.id, Keys: true})
		if err != nil {
			return fmt.Errorf("the time to live of a lease on %s: %w", m.Name, err)
		}
		if r.TTL < 0 || len(r.Keys) != 2 || r.GrantedTTL != keptTTL {
			wrong = append(wrong, fmt.Errorf("lease %d on %s, renewed every second: %v", l.id, m.Name, r))
		}
	}
	if !slices.Equal(got, want) {
		wrong = append(wrong, fmt.Errorf("%s has the leases %v, want %v", m.Name, got, want))
	}
	return errors.Join(wrong...)
}

// revoke ends the leases that are kept.
func (ls *leases) revoke(ctx context.Context, m *cluster.Member) error {
	ls.mu.Lock()
	all := slices.Clone(ls.mu.all)
	ls.mu.Unlock()
	for _, l := range all {
		if !l.kept {
			continue
		}
		_, err := m.Lease.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: l.id})
		if err != nil && status.Code(err) != codes.NotFound {
			return fmt.Errorf("revoke lease %d: %w", l.id, err)
		}
		l.revoked = err == nil
	}
	return nil
}

// account compares the ends of the leases with what their clients know. Seen is when each revision was first seen. If there
// was a majority all the time, no kept lease may have ended at all. The others ended at most so long after their TTL, unless
// grace is 0.
func (ls *leases) account(events []*mvccpb.Event, seen map[int64]time.Duration, majority bool, grace time.Duration) (wrong []string) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	type life struct{ puts, deletes []int64 }
	lives := map[string]*life{}
	for _, e := range events {
		key := string(e.Kv.Key)
		if !strings.HasPrefix(key, "kept/") && !strings.HasPrefix(key, "left/") {
			continue
		}
		if lives[key] == nil {
			lives[key] = &life{}
		}
		if e.Type == mvccpb.Event_DELETE {
			lives[key].deletes = append(lives[key].deletes, e.Kv.ModRevision)
		} else {
			lives[key].puts = append(lives[key].puts, e.Kv.ModRevision)
		}
	}
	for _, l := range ls.mu.all {
		complain := func(format string, args ...any) {
			wrong = append(wrong, fmt.Sprintf("lease %d (TTL %v, renewed %d times, last at %v, longest without %v): ",
				l.id, l.ttl, l.renewals, l.renewed.Round(time.Millisecond), l.longest.Round(time.Millisecond))+fmt.Sprintf(format, args...))
		}
		a, b := lives[l.key("a")], lives[l.key("b")]
		if a == nil && b == nil {
			if l.kept {
				complain("its keys were never there")
			}
			continue // the put was not acknowledged, and the lease went without
		}
		if a == nil || b == nil || !slices.Equal(a.puts, b.puts) || !slices.Equal(a.deletes, b.deletes) {
			complain("its keys did not come and go together: %+v %+v", a, b)
			continue
		}
		if len(a.puts) != 1 || len(a.deletes) != 1 {
			complain("it was written at %v and went at %v, want each once", a.puts, a.deletes)
			continue
		}
		if l.revoked {
			continue
		}
		at, known := seen[a.deletes[0]]
		switch {
		case !known:
			complain("nobody saw it go at revision %d", a.deletes[0])
		case at < l.renewed+l.ttl:
			complain("it ended at %v already, revision %d", at.Round(time.Millisecond), a.deletes[0])
		case !l.kept && grace > 0 && at > l.renewed+l.ttl+grace:
			complain("it ended only at %v, revision %d", at.Round(time.Millisecond), a.deletes[0])
		}
		if l.kept && majority {
			complain("it ended at %v, revision %d, though its client reached a majority all the time: %v", at.Round(time.Millisecond), a.deletes[0], l.lost)
		}
	}
	return wrong
}
