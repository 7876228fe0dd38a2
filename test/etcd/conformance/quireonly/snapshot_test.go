package quireonly

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/test/etcd/start"
)

// snapshotFiles are the files of snapshots that a process has open.
func snapshotFiles(t *testing.T, p *start.Process) (open []string) {
	t.Helper()
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		// A file that is closed meanwhile is none.
		if name, err := os.Readlink(l); err == nil && strings.Contains(name, ".snapshot-") {
			open = append(open, name)
		}
	}
	return open
}

// A client that does not read its snapshot, or leaves, holds nothing up and leaves nothing behind.
func TestSnapshotOfASlowClient(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	dir := filepath.Join(t.TempDir(), "data")
	s := start.QuireIn(t, dir, start.Options{})
	for i := range 64 {
		put(t, s, &pb.PutRequest{Key: fmt.Appendf(nil, "k%02d", i), Value: make([]byte, 1<<20)})
	}

	leaving, leave := context.WithCancel(ctx)
	defer leave()
	stream, err := s.Maintenance.Snapshot(leaving, &pb.SnapshotRequest{})
	if err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil || first.RemainingBytes < 64<<20-uint64(len(first.Blob)) {
		t.Fatalf("the first message: %d bytes remain, %v", first.GetRemainingBytes(), err)
	}
	if open := snapshotFiles(t, s.Process); len(open) != 1 || !strings.HasSuffix(open[0], " (deleted)") {
		t.Errorf("files of snapshots: %q", open)
	}
	// What was compacted after the snapshot was taken is deleted at once, although not much of it is sent.
	head := put(t, s, &pb.PutRequest{Key: []byte("k00")})
	if _, err := s.KV.Compact(ctx, &pb.CompactionRequest{Revision: head, Physical: true}); err != nil {
		t.Fatal(err)
	}
	// Another one, by somebody who waits for nothing.
	hasty, cancelHasty := context.WithTimeout(ctx, time.Millisecond)
	defer cancelHasty()
	if other, err := s.Maintenance.Snapshot(hasty, &pb.SnapshotRequest{}); err == nil {
		if _, err := other.Recv(); err != nil && status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("a snapshot that was not waited for: %v", err)
		}
	}
	leave()
	for open := snapshotFiles(t, s.Process); len(open) > 0; open = snapshotFiles(t, s.Process) {
		if ctx.Err() != nil {
			t.Fatalf("the client has left, and %q are open still", open)
		}
		time.Sleep(10 * time.Millisecond)
	}
	left, err := filepath.Glob(filepath.Join(dir, "*.snapshot-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
}

// A snapshot that is being sent does not keep quire from stopping; the cleanup of QuireIn waits for that.
func TestSnapshotEndsWithTheServer(t *testing.T) {
	t.Parallel()
	s := start.QuireIn(t, filepath.Join(t.TempDir(), "data"), start.Options{})
	for i := range 16 {
		put(t, s, &pb.PutRequest{Key: fmt.Appendf(nil, "k%02d", i), Value: make([]byte, 1<<20)})
	}
	stream, err := s.Maintenance.Snapshot(t.Context(), &pb.SnapshotRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	s.Stop(t)
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("it took %v to stop", took)
	}
}

// --bootstrap-defrag-threshold-megabytes, with the lines that etcd writes.
func TestDefragmentAtTheStart(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "data")
	logs := func(p *start.Process, line string) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); len(p.Lines(line)) == 0; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%q is not in the log:\n%s", line, p.Output())
			}
		}
	}
	s := start.QuireIn(t, dir, start.Options{}, "--bootstrap-defrag-threshold-megabytes=1000")
	logs(s.Process, "Skipping defragmentation")
	if start.OnPostgres(t) {
		return // a process that has just started does not know the size there
	}
	// Every second row goes: the pages are half empty then, and compaction alone gives little back.
	txn := func(from int, op func(key []byte) *pb.RequestOp) {
		t.Helper()
		r := &pb.TxnRequest{}
		for i := from; i < from+200; i += 2 {
			r.Success = append(r.Success, op(fmt.Appendf(nil, "k%05d", i)))
		}
		if _, err := s.KV.Txn(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	for i := 0; i < 4000; i += 200 {
		for k := i; k < i+200; k++ {
			put(t, s, &pb.PutRequest{Key: fmt.Appendf(nil, "k%05d", k), Value: make([]byte, 1500)})
		}
		txn(i, func(key []byte) *pb.RequestOp {
			return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: key}}}
		})
	}
	if _, err := s.KV.Compact(t.Context(), &pb.CompactionRequest{Revision: put(t, s, &pb.PutRequest{Key: []byte("a")}), Physical: true}); err != nil {
		t.Fatal(err)
	}
	s.Stop(t)
	s = start.QuireIn(t, dir, start.Options{}, "--bootstrap-defrag-threshold-megabytes=1")
	logs(s.Process, `"starting defragment"`)
	logs(s.Process, `"finished defragment"`)
	r, err := s.Maintenance.Status(t.Context(), &pb.StatusRequest{})
	if err != nil || r.DbSize != r.DbSizeInUse || r.DbSize > 4<<20 {
		t.Errorf("after it %d bytes of %d are in use, %v", r.GetDbSizeInUse(), r.GetDbSize(), err)
	}
}
