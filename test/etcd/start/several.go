package start

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
)

// Several starts n quire processes on one Postgres database, which to their clients are one server: every call and
// every stream goes to one of them, drawn at random. Address and URL are those of the first. It needs
// QUIRE_STORAGE=postgres.
func Several(n int) Func {
	return func(t testing.TB, o Options) *Server {
		t.Helper()
		if !OnPostgres(t) {
			t.Fatal("several quires on one store need QUIRE_STORAGE=postgres")
		}
		dir := tempDir(t)
		s := &Server{spread: new(spread)}
		s.DrawFrom(1)
		database := filepath.Join(dir, "data")
		for range n {
			p := QuireIn(t, database, o)
			s.Processes = append(s.Processes, p)
			s.spread.processes = append(s.spread.processes, p)
		}
		first := s.Processes[0]
		s.Name, s.Address, s.Process = fmt.Sprintf("%d quires", n), first.Address, first.Process
		s.connect(s.spread)
		return s
	}
}

// DrawFrom begins a new series of draws: the same seed and the same calls one after the other meet the same processes.
// It is for a server made by Several, and does nothing to others.
func (s *Server) DrawFrom(seed uint64) {
	if s.spread != nil {
		s.spread.mu.Lock()
		defer s.spread.mu.Unlock()
		s.spread.r = rand.New(rand.NewPCG(seed, 1))
	}
}

// catchUp returns when the process knows everything that any process had answered before the call: that is what a
// linearizable read promises.
func (s *Server) catchUp(ctx context.Context) error {
	_, err := pb.NewKVClient(s.Conn).Range(ctx, &pb.RangeRequest{Key: []byte("x"), CountOnly: true})
	return err
}

// spread is a connection to several processes that serve the same data.
//
// Each answers linearizable requests as if it were the only one, and these are sent as they are. What it answers from
// its own memory it may know later than its neighbours, as a follower of etcd does: a serializable read, the beginning of
// a watch, its status. A test that has just written through a neighbour expects its write there, so the process is made
// to catch up first.
type spread struct {
	processes []*Server

	mu sync.Mutex
	r  *rand.Rand
}

func (s *spread) draw() *Server {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.processes[s.r.IntN(len(s.processes))]
}

// Invoke implements grpc.ClientConnInterface.
func (s *spread) Invoke(ctx context.Context, method string, request, response any, opts ...grpc.CallOption) error {
	p := s.draw()
	if fromMemory(request) {
		if err := p.catchUp(ctx); err != nil {
			return err
		}
	}
	return p.Conn.Invoke(ctx, method, request, response, opts...)
}

// NewStream implements grpc.ClientConnInterface. A stream stays with its process.
func (s *spread) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	p := s.draw()
	stream, err := p.Conn.NewStream(ctx, desc, method, opts...)
	if err != nil {
		return nil, err
	}
	return &spreadStream{ClientStream: stream, process: p}, nil
}

type spreadStream struct {
	grpc.ClientStream
	process *Server
}

// SendMsg implements grpc.ClientStream.
func (s *spreadStream) SendMsg(request any) error {
	if fromMemory(request) {
		if err := s.process.catchUp(s.Context()); err != nil {
			return err
		}
	}
	return s.ClientStream.SendMsg(request)
}

// fromMemory says whether a process may answer a request without asking what its neighbours have written.
func fromMemory(request any) bool {
	switch r := request.(type) {
	case *pb.RangeRequest:
		return r.Serializable
	case *pb.TxnRequest:
		return readsFromMemory(r)
	case *pb.WatchRequest, *pb.StatusRequest, *pb.HashRequest, *pb.HashKVRequest, *pb.SnapshotRequest:
		return true
	}
	return false
}

// readsFromMemory is true of a Txn that can do nothing but serializable reads, none of them in a nested Txn (etcd:
// txn.IsTxnSerializable).
func readsFromMemory(r *pb.TxnRequest) bool {
	for _, op := range slices.Concat(r.Success, r.Failure) {
		if read := op.GetRequestRange(); read == nil || !read.Serializable {
			return false
		}
	}
	return true
}
