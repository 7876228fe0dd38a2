package quireonly

import (
	"context"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/test/etcd/start"
)

// queueUp has lease 1 hold the lock "name" and lease 2 wait for it.
func queueUp(t *testing.T, s *start.Server) (second <-chan error) {
	t.Helper()
	locks := v3lockpb.NewLockClient(s.Conn)
	for id := int64(1); id <= 2; id++ {
		if _, err := s.Lease.LeaseGrant(t.Context(), &pb.LeaseGrantRequest{ID: id, TTL: 100}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := locks.Lock(t.Context(), &v3lockpb.LockRequest{Name: []byte("name"), Lease: 1}); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := locks.Lock(context.Background(), &v3lockpb.LockRequest{Name: []byte("name"), Lease: 2})
		done <- err
	}()
	for len(get(t, s, "name/2").Kvs) == 0 {
		time.Sleep(5 * time.Millisecond)
	}
	return done
}

// Who waits for a lock keeps waiting when the history that it waits in is compacted. An etcd may answer with an error then.
func TestACompactionTakesNobodyOutOfTheQueue(t *testing.T) {
	t.Parallel()
	s := start.Quire(t, start.Options{})
	second := queueUp(t, s)
	for range 20 {
		rev := put(t, s, &pb.PutRequest{Key: []byte("other")})
		if _, err := s.KV.Compact(t.Context(), &pb.CompactionRequest{Revision: rev, Physical: true}); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case err := <-second:
		t.Fatalf("it has ended: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	if _, err := s.KV.DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte("name/1")}); err != nil {
		t.Fatal(err)
	}
	if err := <-second; err != nil {
		t.Error(err)
	}
}

// Nobody who waits for a lock keeps quire from stopping.
func TestAStopEndsThoseWhoWaitForALock(t *testing.T) {
	t.Parallel()
	s := start.Quire(t, start.Options{})
	second := queueUp(t, s)
	begin := time.Now()
	stop(t, s, syscall.SIGTERM)
	if took := time.Since(begin); took > 3*time.Second {
		t.Errorf("the stop took %v", took)
	}
	if err := <-second; status.Convert(err).Message() != rpctypes.ErrorDesc(rpctypes.ErrGRPCStopped) {
		t.Errorf("who waited got: %v", err)
	}
}
