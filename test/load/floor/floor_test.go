package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// start serves until the test ends. Puts go into the file.
func start(t *testing.T) (conn *grpc.ClientConn, file string) {
	file = filepath.Join(t.TempDir(), "puts")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(f)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	conn, err = grpc.NewClient("passthrough:///"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn, file
}

// Each acknowledged put has a revision of its own, was in the file before, and came to each watch of its key once and in order.
func TestPutsAreInTheFileAndOnWatches(t *testing.T) {
	const clients, each = 32, 50
	conn, file := start(t)
	client := pb.NewKVClient(conn)
	stream, err := pb.NewWatchClient(conn).Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ranges := [][2]string{{"/a/", "/a0"}, {"/a/", "/a0"}, {"/a/7/0", ""}, {"/b/", "/b0"}, {"/", "\x00"}}
	for id, r := range ranges {
		create := &pb.WatchCreateRequest{Key: []byte(r[0]), RangeEnd: []byte(r[1])}
		if err := stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: create}}); err != nil {
			t.Fatal(err)
		}
		if a, err := stream.Recv(); err != nil || !a.Created || a.WatchId != int64(id) {
			t.Fatalf("watch %d was not created: %v, %v", id, a, err)
		}
	}

	var mu sync.Mutex
	revs := map[int64]string{} // of acknowledged puts
	size := 0
	var writing sync.WaitGroup
	for c := range clients {
		writing.Go(func() {
			for i := range each {
				put := &pb.PutRequest{Key: fmt.Appendf(nil, "/a/%d/%d", c, i), Value: []byte("value")}
				var rev int64
				if i%2 == 0 {
					a, err := client.Put(t.Context(), put)
					if err != nil {
						t.Error(err)
						return
					}
					rev = a.Header.Revision
				} else {
					op := &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: put}}
					a, err := client.Txn(t.Context(), &pb.TxnRequest{Success: []*pb.RequestOp{op}})
					if err != nil || !a.Succeeded {
						t.Errorf("txn: %v, %v", a, err)
						return
					}
					rev = a.Header.Revision
				}
				mu.Lock()
				if other, twice := revs[rev]; twice {
					t.Errorf("revision %d was given to %q and to %q", rev, other, put.Key)
				}
				revs[rev] = string(put.Key)
				size += len(put.Key) + len(put.Value)
				mu.Unlock()
			}
		})
	}
	seen := make([][]*mvccpb.Event, len(ranges))
	want := []int{clients * each, clients * each, 1, 0, clients * each}
	for left := 3*clients*each + 1; left > 0; {
		a, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		seen[a.WatchId] = append(seen[a.WatchId], a.Events...)
		left -= len(a.Events)
	}
	writing.Wait()

	for id, events := range seen {
		if len(events) != want[id] {
			t.Errorf("%d events came to watch %d, want %d", len(events), id, want[id])
		}
		if !slices.IsSortedFunc(events, func(a, b *mvccpb.Event) int { return int(a.Kv.ModRevision - b.Kv.ModRevision) }) {
			t.Errorf("events came to watch %d out of order", id)
		}
		for _, e := range events {
			if revs[e.Kv.ModRevision] != string(e.Kv.Key) || string(e.Kv.Value) != "value" {
				t.Errorf("watch %d was given %v, revision %d is of %q", id, e.Kv, e.Kv.ModRevision, revs[e.Kv.ModRevision])
			}
		}
	}
	if info, err := os.Stat(file); err != nil || info.Size() != int64(size) {
		t.Errorf("the file has not the %d bytes that were put: %v, %v", size, info, err)
	}
	list, err := client.Range(t.Context(), &pb.RangeRequest{Key: []byte("/a/"), RangeEnd: []byte("/a0")})
	if err != nil || len(list.Kvs) != clients*each {
		t.Fatalf("a list has %d keys, want %d: %v", len(list.GetKvs()), clients*each, err)
	}
	for _, kv := range list.Kvs {
		if revs[kv.ModRevision] != string(kv.Key) {
			t.Errorf("%q is listed with revision %d, which is of %q", kv.Key, kv.ModRevision, revs[kv.ModRevision])
		}
	}
}

func TestGetAnswersOneReadyValue(t *testing.T) {
	conn, _ := start(t)
	a, err := pb.NewKVClient(conn).Range(t.Context(), &pb.RangeRequest{Key: []byte("any")})
	if err != nil || len(a.Kvs) != 1 || len(a.Kvs[0].Value) != 1024 {
		t.Fatalf("%v, %v: want one value of 1 KiB", a, err)
	}
}

// What this server cannot do is refused: a figure of it would mean nothing.
func TestWhatIsMissingIsRefused(t *testing.T) {
	conn, _ := start(t)
	if _, err := pb.NewKVClient(conn).Txn(t.Context(), &pb.TxnRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("a Txn without a put: %v", err)
	}
	stream, err := pb.NewWatchClient(conn).Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	create := &pb.WatchCreateRequest{Key: []byte("k"), StartRevision: 1}
	if err := stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: create}}); err != nil {
		t.Fatal(err)
	}
	if a, err := stream.Recv(); status.Code(err) != codes.Unimplemented {
		t.Errorf("a watch in the past: %v, %v", a, err)
	}
}
