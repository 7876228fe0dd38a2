package etcdapi

import (
	"context"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

// fakeStore is a small store behind the services: enough of etcd to see that requests arrive and answers leave
// unharmed. Writes it does not know itself are answered by onWrite.
type fakeStore struct {
	mu       sync.Mutex
	rev      int64
	kvs      map[string]*mvccpb.KeyValue
	commands []backend.Command
	onWrite  func(cmd backend.Command) (proto.Message, error)
	readErr  error
	err      error
	alarms   []*pb.AlarmMember
	leases   map[int64]backend.LeaseStatus
	stats    backend.Stats
	waited   []int64
	views    int // taken and not released
	afterGet func()
}

func newFakeStore() *fakeStore {
	return &fakeStore{rev: 1, kvs: map[string]*mvccpb.KeyValue{}, leases: map[int64]backend.LeaseStatus{}}
}

func (f *fakeStore) put(key, value string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.putLocked(&pb.PutRequest{Key: []byte(key), Value: []byte(value)})
}

func (f *fakeStore) putLocked(r *pb.PutRequest) {
	f.rev++
	kv := &mvccpb.KeyValue{Key: r.Key, Value: r.Value, Lease: r.Lease, CreateRevision: f.rev, ModRevision: f.rev, Version: 1}
	if old := f.kvs[string(r.Key)]; old != nil {
		kv.CreateRevision, kv.Version = old.CreateRevision, old.Version+1
	}
	f.kvs[string(r.Key)] = kv
}

func (f *fakeStore) Write(ctx context.Context, cmd backend.Command) (proto.Message, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.commands = append(f.commands, backend.Command{Request: proto.Clone(cmd.Request), Author: cmd.Author})
	if f.onWrite != nil {
		return f.onWrite(cmd)
	}
	switch r := cmd.Request.(type) {
	case *pb.PutRequest:
		f.putLocked(r)
		return &pb.PutResponse{Header: &pb.ResponseHeader{Revision: f.rev}}, nil
	case *pb.DeleteRangeRequest:
		_, had := f.kvs[string(r.Key)]
		delete(f.kvs, string(r.Key))
		if !had {
			return &pb.DeleteRangeResponse{Header: &pb.ResponseHeader{Revision: f.rev}}, nil
		}
		f.rev++
		return &pb.DeleteRangeResponse{Header: &pb.ResponseHeader{Revision: f.rev}, Deleted: 1}, nil
	case *pb.TxnRequest:
		f.rev++
		return &pb.TxnResponse{Header: &pb.ResponseHeader{Revision: f.rev}, Succeeded: true}, nil
	case *pb.CompactionRequest:
		return &pb.CompactionResponse{Header: &pb.ResponseHeader{Revision: 1}}, nil
	case *pb.LeaseGrantRequest:
		id := r.ID
		if id == 0 {
			id = 1000 + int64(len(f.leases)) // the backend draws it
		}
		f.leases[id] = backend.LeaseStatus{ID: id, TTL: r.TTL, GrantedTTL: r.TTL}
		return &pb.LeaseGrantResponse{ID: id, TTL: r.TTL}, nil
	case *pb.LeaseRevokeRequest:
		if _, ok := f.leases[r.ID]; !ok {
			return nil, backend.ErrLeaseNotFound
		}
		delete(f.leases, r.ID)
		return &pb.LeaseRevokeResponse{}, nil
	case *pb.LeaseKeepAliveRequest:
		l, ok := f.leases[r.ID]
		if !ok {
			return nil, backend.ErrLeaseNotFound
		}
		return &pb.LeaseKeepAliveResponse{ID: r.ID, TTL: l.GrantedTTL}, nil
	case *pb.AlarmRequest:
		a := &pb.AlarmMember{MemberID: r.MemberID, Alarm: r.Alarm}
		f.alarms = slices.DeleteFunc(f.alarms, func(b *pb.AlarmMember) bool { return proto.Equal(a, b) })
		if r.Action == pb.AlarmRequest_ACTIVATE {
			f.alarms = append(f.alarms, a)
		}
		return &pb.AlarmResponse{Alarms: []*pb.AlarmMember{a}}, nil
	}
	panic("fakeStore: unknown command")
}

func (f *fakeStore) Lease(id int64, withKeys bool) (backend.LeaseStatus, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l, ok := f.leases[id]
	if !withKeys {
		l.Keys = nil
	}
	return l, ok
}

func (f *fakeStore) Leases() []int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	var ids []int64
	for id := range f.leases {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

func (f *fakeStore) Revision() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.rev
}

func (f *fakeStore) Stats() backend.Stats {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.stats
	s.Revision, s.Keys = f.rev, int64(len(f.kvs))
	return s
}

func (f *fakeStore) Alarms() []*pb.AlarmMember {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.alarms)
}

func (f *fakeStore) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

func (f *fakeStore) Ready(context.Context, bool) error { return nil }

func (f *fakeStore) setErr(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

func (f *fakeStore) WaitCompacted(_ context.Context, rev int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.waited = append(f.waited, rev)
	return nil
}

func (f *fakeStore) View() View {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.views++
	return &fakeView{f: f, rev: f.rev}
}

type fakeView struct {
	f   *fakeStore
	rev int64
}

func (v *fakeView) Revision() int64 { return v.rev }

// Auth is off here: the conformance tests have it on, before a store that keeps users.
func (v *fakeView) Auth() *backend.Auth { return v.f.Auth() }

func (*fakeStore) Auth() *backend.Auth { return new(backend.Auth) }

func (*fakeStore) TokenUser(string, *backend.Auth) (string, bool) { return "", false }

func (v *fakeView) Release() {
	v.f.mu.Lock()
	defer v.f.mu.Unlock()
	v.f.views--
}

// Range answers with what is at req.Revision or before; it keeps no history, so a key changed later is missing.
// Page leaves a Count behind that nobody may use.
func (v *fakeView) Page(ctx context.Context, r *pb.RangeRequest) (*backend.RangeResult, error) {
	res, err := v.Range(ctx, r)
	if err == nil {
		res.Count = -1
	}
	return res, err
}

func (v *fakeView) Range(_ context.Context, r *pb.RangeRequest) (*backend.RangeResult, error) {
	f := v.f
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.readErr != nil {
		return nil, f.readErr
	}
	at := v.rev
	if r.Revision > 0 {
		at = r.Revision
	}
	if at > v.rev {
		return nil, backend.ErrFutureRev
	}
	var keys []string
	for k, kv := range f.kvs {
		end := string(r.RangeEnd)
		in := k == string(r.Key)
		if end != "" {
			in = k >= string(r.Key) && (end == "\x00" || k < end)
		}
		if in && kv.ModRevision <= at {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	res := &backend.RangeResult{Count: int64(len(keys)), Revision: v.rev}
	if r.CountOnly {
		return res, nil
	}
	for _, k := range keys {
		if r.Limit > 0 && int64(len(res.KVs)) == r.Limit {
			res.More = true
			break
		}
		kv := proto.CloneOf(f.kvs[k])
		if r.KeysOnly {
			kv.Value = nil
		}
		res.KVs = append(res.KVs, frameOf(kv))
	}
	if f.afterGet != nil {
		f.mu.Unlock()
		f.afterGet()
		f.mu.Lock()
	}
	return res, nil
}

func (v *fakeView) Txn(context.Context, *pb.TxnRequest) (*pb.TxnResponse, error) {
	return &pb.TxnResponse{Header: &pb.ResponseHeader{Revision: v.rev}}, nil
}

func frameOf(kv *mvccpb.KeyValue) backend.Frame {
	b, err := proto.Marshal(kv)
	if err != nil {
		panic(err)
	}
	return protowire.AppendBytes(protowire.AppendTag(nil, rangeKVs, protowire.BytesType), b)
}

// fakeWatcher answers each create request with what answer makes of it.
type fakeWatcher struct {
	answer func(req *pb.WatchRequest) any
}

func (w *fakeWatcher) Serve(ctx context.Context, recv func() (*pb.WatchRequest, error), send func(any) error) error {
	for {
		req, err := recv()
		if err != nil {
			return err
		}
		if err := send(w.answer(req)); err != nil {
			return err
		}
	}
}

// parts is a message with WireBuffers.
type parts [][]byte

func (p parts) WireBuffers() [][]byte { return p }

const (
	testCluster = 0xc0ffee0000000001
	testMember  = 0xdead00000000beef
	testTerm    = OneMemberTerm
)

func newTestServer(t *testing.T, f *fakeStore, change func(*Options)) *Server {
	t.Helper()
	o := Options{
		Backend: f,
		View:    f.View,
		Watcher: &fakeWatcher{answer: func(*pb.WatchRequest) any { return &pb.WatchResponse{Created: true} }},
		Identity: Identity{
			ClusterID: testCluster, MemberID: testMember,
			Name: "one", PeerURLs: []string{"http://localhost:2380"}, ClientURLs: []string{"http://localhost:2379"},
		},
	}
	if change != nil {
		change(&o)
	}
	s := New(o)
	t.Cleanup(func() {
		s.Close()
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.views != 0 {
			t.Errorf("%d Views were taken and not released", f.views)
		}
	})
	return s
}

// dial serves s on a connection in memory.
func dial(t *testing.T, s *Server) *grpc.ClientConn {
	t.Helper()
	return dialOn(t, s, grpc.NewServer(s.ServerOptions()...))
}

// dialOn is dial with the gRPC server of the test, made with ServerOptions.
func dialOn(t *testing.T, s *Server, g *grpc.Server) *grpc.ClientConn {
	t.Helper()
	l := bufconn.Listen(1 << 20)
	s.RegisterGRPC(g)
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:///memory",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<30)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		g.Stop()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return conn
}

func checkHeader(t *testing.T, h *pb.ResponseHeader, rev int64) {
	t.Helper()
	want := &pb.ResponseHeader{ClusterId: testCluster, MemberId: testMember, RaftTerm: testTerm, Revision: rev}
	if !proto.Equal(h, want) {
		t.Errorf("header is <%v>, want <%v>", h, want)
	}
}

func checkErr(t *testing.T, what string, got, want error) {
	t.Helper()
	if got == nil || want == nil {
		if got != want {
			t.Errorf("%s: got %v, want %v", what, got, want)
		}
		return
	}
	if got.Error() != want.Error() {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

var big = strings.Repeat("v", 5000)
