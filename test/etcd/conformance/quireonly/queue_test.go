package quireonly

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/test/etcd/start"
)

// The cases of this file are those in which an etcd lets two have what one is to have, or nobody: its Lock and Election
// services know their place in the queue by its key alone, which others may have taken meanwhile.

// line is a queue for the locks or the leadership "name". Lease 1 is its head.
type line struct {
	*testing.T
	*start.Server
}

func newLine(t *testing.T, leases int64) line {
	t.Helper()
	l := line{t, start.Quire(t, start.Options{})}
	for id := int64(1); id <= leases; id++ {
		if _, err := l.Lease.LeaseGrant(t.Context(), &pb.LeaseGrantRequest{ID: id, TTL: 100}); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

// lock asks in the background, and returns once somebody stands in the queue with the lease.
func (l line) lock(ctx context.Context, lease int64) <-chan error {
	l.Helper()
	done := make(chan error, 1)
	go func() {
		_, err := v3lockpb.NewLockClient(l.Conn).Lock(ctx, &v3lockpb.LockRequest{Name: []byte("name"), Lease: lease})
		done <- err
	}()
	l.stands(lease, true)
	return done
}

func (l line) campaign(ctx context.Context, lease int64) <-chan error {
	l.Helper()
	done := make(chan error, 1)
	go func() {
		_, err := v3electionpb.NewElectionClient(l.Conn).Campaign(ctx, &v3electionpb.CampaignRequest{Name: []byte("name"), Lease: lease})
		done <- err
	}()
	l.stands(lease, true)
	return done
}

func (l line) stands(lease int64, want bool) {
	l.Helper()
	for deadline := time.Now().Add(10 * time.Second); len(get(l.T, l.Server, fmt.Sprintf("name/%x", lease)).Kvs) > 0 != want; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			l.Fatalf("lease %d stands in the queue: %v, want %v", lease, !want, want)
		}
	}
}

// leaves takes the place of a lease away.
func (l line) leaves(lease int64) {
	l.Helper()
	if _, err := l.KV.DeleteRange(l.Context(), &pb.DeleteRangeRequest{Key: fmt.Appendf(nil, "name/%x", lease)}); err != nil {
		l.Fatal(err)
	}
}

// ends demands that a call ends, with the error want or, if that is empty, without.
func (l line) ends(what string, done <-chan error, want string) {
	l.Helper()
	select {
	case err := <-done:
		if got := status.Convert(err).Message(); got != want {
			l.Errorf("%s ends with %q, want %q", what, got, want)
		}
	case <-time.After(10 * time.Second):
		l.Fatalf("%s does not end within 10 s", what)
	}
}

func (l line) waits(what string, done <-chan error) {
	l.Helper()
	select {
	case err := <-done:
		l.Errorf("%s has ended with %v, and should wait", what, err)
	case <-time.After(100 * time.Millisecond):
	}
}

const (
	lockExpired = "mutex: session is expired"
	notLeader   = "election: not leader"
)

// Who was taken out of the queue does not lead when those before him have gone, whether his lease has ended or not.
func TestACampaignThatWasTakenOutDoesNotLead(t *testing.T) {
	t.Parallel()
	l := newLine(t, 3)
	l.ends("the first campaign", l.campaign(t.Context(), 1), "")
	second, third := l.campaign(t.Context(), 2), l.campaign(t.Context(), 3)
	if _, err := l.Lease.LeaseRevoke(t.Context(), &pb.LeaseRevokeRequest{ID: 2}); err != nil {
		t.Fatal(err)
	}
	l.leaves(3)
	l.leaves(1)
	l.ends("a campaign without lease", second, notLeader)
	l.ends("a campaign without place", third, notLeader)
}

// A place that was lost is not found again in a later one of the same lease: somebody may stand between them.
func TestALostPlaceIsNotALaterOne(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		enter func(line, context.Context, int64) <-chan error
		lost  string
	}{"lock": {line.lock, lockExpired}, "campaign": {line.campaign, notLeader}} {
		t.Run(name, func(t *testing.T) {
			l := newLine(t, 3)
			l.ends("the first", c.enter(l, t.Context(), 1), "")
			lost := c.enter(l, t.Context(), 2)
			l.leaves(2)
			between := c.enter(l, t.Context(), 3)
			again := c.enter(l, t.Context(), 2)
			l.leaves(1)
			l.ends("who stands between", between, "")
			l.ends("who has lost his place", lost, c.lost)
			l.waits("who stands at the end", again)
			l.leaves(3)
			l.ends("who stands at the end", again, "")
		})
	}
}

// Who goes away after he has lost his place takes nobody's with him.
func TestWhoGoesTakesHisOwnPlaceOnly(t *testing.T) {
	t.Parallel()
	for name, enter := range map[string]func(line, context.Context, int64) <-chan error{"lock": line.lock, "campaign": line.campaign} {
		t.Run(name, func(t *testing.T) {
			l := newLine(t, 2)
			l.ends("the first", enter(l, t.Context(), 1), "")
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			lost := enter(l, ctx, 2)
			l.leaves(2)
			again := enter(l, t.Context(), 2)
			cancel()
			l.ends("who goes", lost, context.Canceled.Error())
			l.waits("who stands there now", again)
			l.stands(2, true)
			l.leaves(1)
			l.ends("who stands there now", again, "")
		})
	}
}

// At whatever moment a client goes away that does not have its turn, it leaves nothing in the queue, where it would keep
// the others from having theirs for as long as its lease lives.
func TestWhoGoesWhileEnteringLeavesNothing(t *testing.T) {
	t.Parallel()
	for name, call := range map[string]func(line, context.Context, int64){
		"lock": func(l line, ctx context.Context, lease int64) {
			_, _ = v3lockpb.NewLockClient(l.Conn).Lock(ctx, &v3lockpb.LockRequest{Name: []byte("name"), Lease: lease})
		},
		"campaign": func(l line, ctx context.Context, lease int64) {
			_, _ = v3electionpb.NewElectionClient(l.Conn).Campaign(ctx, &v3electionpb.CampaignRequest{Name: []byte("name"), Lease: lease})
		},
	} {
		t.Run(name, func(t *testing.T) {
			const clients, times = 20, 30
			l := newLine(t, 1+clients*times)
			l.ends("the first", l.lock(t.Context(), 1), "")
			var all sync.WaitGroup
			for client := range int64(clients) {
				all.Go(func() {
					for i := range int64(times) {
						ctx, cancel := context.WithTimeout(context.Background(), rand.N(10*time.Millisecond))
						call(l, ctx, 2+client*times+i)
						cancel()
					}
				})
			}
			all.Wait()
			var left []*mvccpb.KeyValue
			for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
				r, err := l.KV.Range(t.Context(), &pb.RangeRequest{Key: []byte("name/"), RangeEnd: []byte("name0")})
				if err != nil {
					t.Fatal(err)
				}
				if left = r.Kvs; len(left) == 1 {
					return
				}
			}
			t.Errorf("%d stand in the queue, want the first alone: %v", len(left), left)
		})
	}
}
