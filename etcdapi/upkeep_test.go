package etcdapi

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/backend"
)

// EtcdSnapshot takes as long as its caller's context, unless there is an error.
func (f *fakeStore) EtcdSnapshot(ctx context.Context, _ backend.EtcdSurroundings) (*backend.EtcdSnapshot, error) {
	return nil, f.Defragment(ctx)
}

// Defragment takes as long as its caller's context, unless there is an error.
func (f *fakeStore) Defragment(ctx context.Context) error {
	f.mu.Lock()
	err := f.readErr
	f.mu.Unlock()
	if err == nil {
		<-ctx.Done()
		err = ctx.Err()
	}
	return err
}

func (f *fakeStore) setReadErr(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.readErr = err
}

func TestSnapshotIsSentInPieces(t *testing.T) {
	db, err := backend.OpenSQLite(t.Context(), filepath.Join(t.TempDir(), "quire.db"), backend.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	sent := make(chan int64, 1)
	s := New(Options{
		Backend: db, View: func() View { return db.View() }, Watcher: failingWatcher{errors.New("not under test")},
		Hooks: Hooks{SnapshotSent: func(size int64, _ time.Duration, err error) {
			if err != nil {
				t.Error(err)
			}
			sent <- size
		}},
	})
	defer s.Close()
	conn := dial(t, s)
	for range 40 {
		if _, err := pb.NewKVClient(conn).Put(t.Context(), &pb.PutRequest{Key: []byte("k"), Value: []byte(big)}); err != nil {
			t.Fatal(err)
		}
	}
	stream, err := pb.NewMaintenanceClient(conn).Snapshot(t.Context(), &pb.SnapshotRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var pieces []*pb.SnapshotResponse
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		pieces = append(pieces, r)
	}
	size := <-sent
	var content []byte
	for i, p := range pieces[:len(pieces)-1] {
		content = append(content, p.Blob...)
		if p.Version != "3.7.0" || int64(p.RemainingBytes) != size-int64(len(content)) || len(p.Blob) > snapshotChunk {
			t.Errorf("piece %d: %d bytes of version %q, %d remain", i, len(p.Blob), p.Version, p.RemainingBytes)
		}
	}
	last := pieces[len(pieces)-1]
	if hash := sha256.Sum256(content); !bytes.Equal(last.Blob, hash[:]) || last.RemainingBytes != 0 || last.Version != "3.7.0" {
		t.Errorf("the last piece is %v, want the hash %x", last, hash)
	}
	if int64(len(content)) != size || size < 200_000 || size%512 != 0 {
		t.Errorf("%d bytes of %d", len(content), size)
	}
}

func TestSnapshotErrors(t *testing.T) {
	f := newFakeStore()
	s := newTestServer(t, f, nil)
	c := pb.NewMaintenanceClient(dial(t, s))
	snapshot := func() error {
		stream, err := c.Snapshot(t.Context(), &pb.SnapshotRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		return err
	}
	f.setReadErr(fmt.Errorf("%w: /data", backend.ErrDiskFull))
	if err := snapshot(); status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "no room for a snapshot") {
		t.Errorf("on a full disk: %v", err)
	}
	f.setReadErr(backend.ErrUnavailable)
	if err := snapshot(); status.Code(err) != codes.Unavailable {
		t.Errorf("of what cannot be read: %v", err)
	}
	f.setReadErr(nil)
	s.Close()
	checkErr(t, "of a server that stops", snapshot(), rpctypes.ErrGRPCStopped)
}

// TestDefragmentOutlivesItsClient, as etcd's does, but not the server.
func TestDefragmentOutlivesItsClient(t *testing.T) {
	f := newFakeStore()
	hooked := make(chan error, 10)
	s := newTestServer(t, f, func(o *Options) {
		o.Hooks.Defragment = func(ended bool, err error) {
			if ended {
				hooked <- err
			} else {
				hooked <- errors.New("it begins")
			}
		}
	})
	c := pb.NewMaintenanceClient(dial(t, s))
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan error, 1)
	go func() { _, err := c.Defragment(ctx, &pb.DefragmentRequest{}); left <- err }()
	if err := <-hooked; err == nil || err.Error() != "it begins" {
		t.Error(err)
	}
	cancel()
	if err := <-left; status.Code(err) != codes.Canceled {
		t.Errorf("the client that left got %v", err)
	}
	select {
	case err := <-hooked:
		t.Errorf("it has ended with its client: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	s.Close()
	if err := <-hooked; !errors.Is(err, context.Canceled) {
		t.Errorf("with the server it ended with %v", err)
	}
	_, err := c.Defragment(t.Context(), &pb.DefragmentRequest{})
	checkErr(t, "of a server that stops", err, rpctypes.ErrGRPCStopped)
}

func TestDefragmentErrors(t *testing.T) {
	f := newFakeStore()
	c := pb.NewMaintenanceClient(dial(t, newTestServer(t, f, nil)))
	f.setReadErr(backend.ErrUnavailable)
	if _, err := c.Defragment(t.Context(), &pb.DefragmentRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("a defragmentation that failed: %v", err)
	}
}

// TestDowngradeOfOtherVersions: what is refused follows the version that the server answers with.
func TestDowngradeOfOtherVersions(t *testing.T) {
	c := pb.NewMaintenanceClient(dial(t, newTestServer(t, newFakeStore(), func(o *Options) { o.EtcdVersion = "3.8.0-alpha.0" })))
	ask := func(version string) error {
		_, err := c.Downgrade(t.Context(), &pb.DowngradeRequest{Action: pb.DowngradeRequest_ENABLE, Version: version})
		return err
	}
	checkErr(t, "to 3.6", ask("3.6"), rpctypes.ErrGRPCInvalidDowngradeTargetVersion)
	if err := ask("3.7"); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "restore a snapshot") {
		t.Errorf("to 3.7: %v", err)
	}
	r, err := c.Downgrade(t.Context(), &pb.DowngradeRequest{Action: pb.DowngradeRequest_CANCEL})
	if err != nil || r.Version != "3.8" {
		t.Errorf("cancelled: %v, %v", r, err)
	}
}
