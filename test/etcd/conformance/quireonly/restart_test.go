package quireonly

import (
	"context"
	"fmt"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/test/etcd/start"
)

func put(t *testing.T, s *start.Server, r *pb.PutRequest) int64 {
	t.Helper()
	resp, err := s.KV.Put(context.Background(), r)
	if err != nil {
		t.Fatalf("put %q: %v", r.Key, err)
	}
	return resp.Header.Revision
}

func get(t *testing.T, s *start.Server, key string) *pb.RangeResponse {
	t.Helper()
	r, err := s.KV.Range(context.Background(), &pb.RangeRequest{Key: []byte(key)})
	if err != nil {
		t.Fatalf("get %q: %v", key, err)
	}
	return r
}

func stop(t *testing.T, s *start.Server, sig syscall.Signal) {
	t.Helper()
	if err := s.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
	code, err := s.Process.Wait(20 * time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if sig != syscall.SIGKILL && code != 0 {
		t.Fatalf("the exit status after %v is %d, want 0", sig, code)
	}
}

// Durability: what was acknowledged is there after any end of the process.
func TestAcknowledgedWritesSurviveEveryEnd(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "data")
			s := start.QuireIn(t, dir, start.Options{})
			var last int64
			for i := range 50 {
				last = put(t, s, &pb.PutRequest{Key: fmt.Appendf(nil, "k%02d", i), Value: []byte("v")})
			}
			ids := get(t, s, "k00").Header
			if _, err := s.KV.Compact(context.Background(), &pb.CompactionRequest{Revision: 20}); err != nil {
				t.Fatal(err)
			}
			stop(t, s, sig)

			s = start.QuireIn(t, dir, start.Options{})
			r, err := s.KV.Range(context.Background(), &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
			if err != nil {
				t.Fatal(err)
			}
			if r.Count != 50 || r.Header.Revision != last {
				t.Errorf("%d keys at revision %d are left of 50 at %d", r.Count, r.Header.Revision, last)
			}
			if r.Header.ClusterId != ids.ClusterId || r.Header.MemberId != ids.MemberId {
				t.Errorf("cluster and member were %d and %d, now %d and %d", ids.ClusterId, ids.MemberId, r.Header.ClusterId, r.Header.MemberId)
			}
			if _, err := s.KV.Range(context.Background(), &pb.RangeRequest{Key: []byte("k"), Revision: 19}); err == nil {
				t.Error("a compacted revision can be read again after the restart")
			}
			w, err := s.Watch.Watch(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := w.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte{0}, RangeEnd: []byte{0}, StartRevision: 20}}}); err != nil {
				t.Fatal(err)
			}
			for next := int64(20); next <= last; {
				r, err := w.Recv()
				if err != nil {
					t.Fatal(err)
				}
				for _, e := range r.Events {
					if e.Kv.ModRevision != next {
						t.Fatalf("broke Resumable - revision %d came after the restart, want %d", e.Kv.ModRevision, next)
					}
					next++
				}
			}
		})
	}
}

// A restart neither forgets nor prolongs a lease.
func TestLeaseDeadlinesSurviveARestart(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := filepath.Join(t.TempDir(), "data")
	s := start.QuireIn(t, dir, start.Options{})
	began := time.Now()
	for id, ttl := range map[int64]int64{1: 8, 2: 3, 3: 1000} {
		if _, err := s.Lease.LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: id, TTL: ttl}); err != nil {
			t.Fatal(err)
		}
		put(t, s, &pb.PutRequest{Key: fmt.Appendf(nil, "k%d", id), Lease: id})
	}
	stop(t, s, syscall.SIGKILL)
	time.Sleep(4 * time.Second) // lease 2 ends while nobody serves

	s = start.QuireIn(t, dir, start.Options{})
	l, err := s.Lease.LeaseTimeToLive(ctx, &pb.LeaseTimeToLiveRequest{ID: 3, Keys: true})
	if err != nil {
		t.Fatal(err)
	}
	if l.GrantedTTL != 1000 || l.TTL > 997 || l.TTL < 900 || len(l.Keys) != 1 {
		t.Errorf("after the restart the long lease is %v, want about 996 of 1000 seconds and its key", l)
	}
	waitGone := func(key string, from, to time.Duration) {
		for get(t, s, key).Count > 0 {
			if time.Since(began) > to {
				t.Fatalf("%s still lives after %v", key, time.Since(began))
			}
			time.Sleep(20 * time.Millisecond) // expiry sends this reader no signal
		}
		if d := time.Since(began); d < from {
			t.Errorf("%s was gone after %v, before its lease ended", key, d)
		}
	}
	waitGone("k2", 0, 14*time.Second)
	waitGone("k1", 8*time.Second, 14*time.Second)
	if get(t, s, "k3").Count != 1 {
		t.Error("the key of the long lease is gone")
	}
}
