package start

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/quire-db/quire/test/ports"
)

// Several starts n quire processes on one Postgres database, or as one cluster, which to their clients are one server: every
// call and every stream goes to one of them, drawn at random. Address and URL are those of the first. It needs
// QUIRE_STORAGE=postgres or sqlraft.
func Several(n int) Func {
	return func(t testing.TB, o Options) *Server {
		t.Helper()
		s := &Server{spread: new(spread)}
		s.DrawFrom(1)
		switch {
		case OnPostgres(t):
			database := filepath.Join(tempDir(t), "data")
			for range n {
				s.Processes = append(s.Processes, QuireIn(t, database, o))
			}
		case OnRaft(t):
			s.Processes = members(t, n, o)
		default:
			t.Fatal("several quires with the same data need QUIRE_STORAGE=postgres or sqlraft")
		}
		s.spread.processes = s.Processes
		if OnRaft(t) {
			status, err := pb.NewMaintenanceClient(s.Processes[0].Conn).Status(t.Context(), &pb.StatusRequest{})
			if err != nil {
				t.Fatal(err)
			}
			s.spread.member = status.Header.MemberId
		}
		first := s.Processes[0]
		s.Name, s.Address, s.Process = fmt.Sprintf("%d quires", n), first.Address, first.Process
		s.connect(s.spread)
		return s
	}
}

// members starts a cluster, again where another program took one of its addresses meanwhile.
func members(t testing.TB, n int, o Options) []*Server {
	t.Helper()
	const attempts = 5
	for attempt := 1; ; attempt++ {
		all, failed := tryMembers(t, n, o)
		if failed == nil {
			for _, s := range all {
				t.Cleanup(func() { s.Process.stopCleanly(t) })
				s.dial(t, nil)
			}
			return all
		}
		taken := false
		for _, s := range all {
			s.Process.Kill()
			taken = taken || strings.Contains(s.Process.Output(), "address already in use")
		}
		if !taken || attempt == attempts {
			t.Fatalf("start a cluster of quires: %v", failed)
		}
	}
}

func tryMembers(t testing.TB, n int, o Options) (all []*Server, err error) {
	t.Helper()
	name := func(i int) string { return fmt.Sprintf("n%d", i+1) }
	var peers, cluster []string
	for i := range n {
		peers = append(peers, ports.FreeAddress(t))
		cluster = append(cluster, name(i)+"=http://"+peers[i])
	}
	dir := tempDir(t)
	for i := range n {
		address := ports.FreeAddress(t)
		args := append([]string{
			"--data-dir=" + filepath.Join(dir, name(i)),
			"--listen-client-urls=http://" + address,
			"--advertise-client-urls=http://" + address,
		}, quireFlags(o)...)
		p := Run(t, nil, append(args, memberFlags(name(i), peers[i], strings.Join(cluster, ","))...)...)
		all = append(all, &Server{Name: "quire", Address: address, Process: p})
	}
	for _, s := range all {
		// Only a majority is ready.
		if err := s.Process.WaitReady(60 * time.Second); err != nil {
			return all, fmt.Errorf("%w\n%s", err, s.Process.Output())
		}
	}
	return all, nil
}

// memberFlags make a quire a member; an empty cluster is that of this member alone.
func memberFlags(name, peer, cluster string) []string {
	url := "http://" + peer
	return []string{
		"--name=" + name, "--listen-peer-urls=" + url, "--initial-advertise-peer-urls=" + url,
		"--initial-cluster=" + cmp.Or(cluster, name+"="+url),
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
// linearizable read promises. It asks for what is told to everybody, whoever the test is.
func (s *Server) catchUp(ctx context.Context) error {
	_, err := pb.NewAuthClient(s.Conn).AuthStatus(metadata.NewOutgoingContext(ctx, nil), &pb.AuthStatusRequest{})
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
	// member stands in every header, whoever of a cluster has answered; 0: as it was answered.
	member uint64

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
	err := p.Conn.Invoke(ctx, method, request, response, opts...)
	s.name(response)
	return err
}

// name puts the one member id into a header.
func (s *spread) name(response any) {
	if r, ok := response.(interface{ GetHeader() *pb.ResponseHeader }); ok && s.member != 0 {
		if h := r.GetHeader(); h.GetMemberId() != 0 {
			h.MemberId = s.member
		}
	}
	if r, ok := response.(*pb.RangeStreamResponse); ok {
		s.name(r.GetRangeResponse())
	}
}

// NewStream implements grpc.ClientConnInterface. A stream stays with its process.
func (s *spread) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	p := s.draw()
	if method == pb.Maintenance_Snapshot_FullMethodName {
		// Whether auth is on is looked up before the request is there.
		if err := p.catchUp(ctx); err != nil {
			return nil, err
		}
	}
	stream, err := p.Conn.NewStream(ctx, desc, method, opts...)
	if err != nil {
		return nil, err
	}
	return &spreadStream{ClientStream: stream, process: p, spread: s}, nil
}

type spreadStream struct {
	grpc.ClientStream
	process *Server
	spread  *spread
}

// RecvMsg implements grpc.ClientStream.
func (s *spreadStream) RecvMsg(response any) error {
	err := s.ClientStream.RecvMsg(response)
	if err == nil {
		s.spread.name(response)
	}
	return err
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
