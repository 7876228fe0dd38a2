package etcdapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

// fakeCluster does what it is told, and writes down what it was told.
type fakeCluster struct {
	mu      sync.Mutex
	status  ClusterStatus
	changed chan struct{}
	members []backend.Member
	calls   []string
	err     error // of every call but Members and Status
}

// newFakeCluster is the leader of three.
func newFakeCluster() *fakeCluster {
	return &fakeCluster{
		status:  ClusterStatus{ClusterID: testCluster, ID: testMember, Leader: testMember, Term: 300, Committed: 90, Applied: 88},
		changed: make(chan struct{}),
		members: []backend.Member{
			{ID: 1, Name: "a", PeerURLs: []string{"http://a:2380"}, ClientURLs: []string{"http://a:2379"}},
			{ID: 2, PeerURLs: []string{"http://b:2380"}, Learner: true},
		},
	}
}

func (f *fakeCluster) set(change func(*ClusterStatus)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	before := f.status.Leader
	change(&f.status)
	if f.status.Leader != before {
		close(f.changed)
		f.changed = make(chan struct{})
	}
}

func (f *fakeCluster) call(format string, args ...any) ([]backend.Member, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, fmt.Sprintf(format, args...))
	if f.err != nil {
		return nil, f.err
	}
	return f.members, nil
}

func (f *fakeCluster) Members(_ context.Context, linearizable bool) ([]backend.Member, error) {
	return f.call("list %v", linearizable)
}

func (f *fakeCluster) AddMember(_ context.Context, urls []string, learner bool) (backend.Member, []backend.Member, error) {
	all, err := f.call("add %v %v", urls, learner)
	return backend.Member{ID: 3, PeerURLs: urls, Learner: learner}, all, err
}

func (f *fakeCluster) RemoveMember(_ context.Context, id uint64) ([]backend.Member, error) {
	return f.call("remove %x", id)
}

func (f *fakeCluster) UpdateMember(_ context.Context, id uint64, urls []string) ([]backend.Member, error) {
	return f.call("update %x %v", id, urls)
}

func (f *fakeCluster) PromoteMember(_ context.Context, id uint64) ([]backend.Member, error) {
	return f.call("promote %x", id)
}

func (f *fakeCluster) MoveLeader(_ context.Context, to uint64) error {
	_, err := f.call("move %x", to)
	return err
}

func (f *fakeCluster) Status() ClusterStatus {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.status
}

func (f *fakeCluster) LeaderChanged() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

// withCluster is for newTestServer.
func withCluster(f *fakeCluster) func(*Options) {
	return func(o *Options) { o.Cluster = f }
}

func TestClusterServiceSaysWhatTheClusterSays(t *testing.T) {
	f := newFakeCluster()
	c := pb.NewClusterClient(dial(t, newTestServer(t, newFakeStore(), withCluster(f))))
	ctx := t.Context()
	all := []*pb.Member{
		{ID: 1, Name: "a", PeerURLs: []string{"http://a:2380"}, ClientURLs: []string{"http://a:2379"}},
		{ID: 2, PeerURLs: []string{"http://b:2380"}, IsLearner: true},
	}
	added := &pb.Member{ID: 3, PeerURLs: []string{"http://c:2380", "unix://d"}, IsLearner: true}
	header := &pb.ResponseHeader{ClusterId: testCluster, MemberId: testMember, RaftTerm: 300} // and no revision
	for _, x := range []struct {
		told string
		call func() (proto.Message, error)
		want proto.Message
	}{
		{"list true", func() (proto.Message, error) {
			return c.MemberList(ctx, &pb.MemberListRequest{Linearizable: true})
		}, &pb.MemberListResponse{Header: header, Members: all}},
		{"list false", func() (proto.Message, error) {
			return c.MemberList(ctx, &pb.MemberListRequest{})
		}, &pb.MemberListResponse{Header: header, Members: all}},
		{"add [http://c:2380 unix://d] true", func() (proto.Message, error) {
			return c.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{"unix://d", " http://c:2380"}, IsLearner: true})
		}, &pb.MemberAddResponse{Header: header, Member: added, Members: all}},
		{"remove 2", func() (proto.Message, error) {
			return c.MemberRemove(ctx, &pb.MemberRemoveRequest{ID: 2})
		}, &pb.MemberRemoveResponse{Header: header, Members: all}},
		{"update 2 [https://d:1 http://e:1]", func() (proto.Message, error) {
			return c.MemberUpdate(ctx, &pb.MemberUpdateRequest{ID: 2, PeerURLs: []string{"https://d:1", "http://e:1"}})
		}, &pb.MemberUpdateResponse{Header: header, Members: all}},
		{"promote 2", func() (proto.Message, error) {
			return c.MemberPromote(ctx, &pb.MemberPromoteRequest{ID: 2})
		}, &pb.MemberPromoteResponse{Header: header, Members: all}},
		{"move 1", func() (proto.Message, error) {
			return pb.NewMaintenanceClient(dial(t, newTestServer(t, newFakeStore(), withCluster(f)))).MoveLeader(ctx, &pb.MoveLeaderRequest{TargetID: 1})
		}, &pb.MoveLeaderResponse{}},
	} {
		f.calls = nil
		got, err := x.call()
		if err != nil || !slices.Equal(f.calls, []string{x.told}) {
			t.Errorf("%s: the cluster was told %q; %v", x.told, f.calls, err)
		} else if !proto.Equal(got, x.want) {
			t.Errorf("%s: %v, want %v", x.told, got, x.want)
		}
		f.err = rpctypes.ErrGRPCUnhealthy
		_, err = x.call()
		checkErr(t, x.told+" that fails", err, rpctypes.ErrGRPCUnhealthy)
		f.err = nil
	}
}

func TestPeerURLsAreCheckedAsEtcdChecksThem(t *testing.T) {
	f := newFakeCluster()
	c := pb.NewClusterClient(dial(t, newTestServer(t, newFakeStore(), withCluster(f))))
	for _, urls := range [][]string{
		nil, {""}, {"localhost:2380"}, {"http://localhost"}, {"http://localhost:2380/path"}, {"ftp://localhost:2380"}, {"http://a:2380", "b"}, {"http://[::1:2380"},
	} {
		_, err := c.MemberAdd(t.Context(), &pb.MemberAddRequest{PeerURLs: urls})
		checkErr(t, fmt.Sprintf("add %q", urls), err, rpctypes.ErrGRPCMemberBadURLs)
		_, err = c.MemberUpdate(t.Context(), &pb.MemberUpdateRequest{ID: 1, PeerURLs: urls})
		checkErr(t, fmt.Sprintf("update to %q", urls), err, rpctypes.ErrGRPCMemberBadURLs)
	}
	if len(f.calls) != 0 {
		t.Errorf("the cluster was told %q", f.calls)
	}
}

func TestOnlyTheLeaderMovesLeadership(t *testing.T) {
	f := newFakeCluster()
	f.status.Leader = 1
	c := pb.NewMaintenanceClient(dial(t, newTestServer(t, newFakeStore(), withCluster(f))))
	_, err := c.MoveLeader(t.Context(), &pb.MoveLeaderRequest{TargetID: 1})
	checkErr(t, "on a follower", err, rpctypes.ErrGRPCNotLeader)

	c = pb.NewMaintenanceClient(dial(t, newTestServer(t, newFakeStore(), nil)))
	_, err = c.MoveLeader(t.Context(), &pb.MoveLeaderRequest{TargetID: testMember})
	checkErr(t, "an only member to itself", err, nil)
	_, err = c.MoveLeader(t.Context(), &pb.MoveLeaderRequest{TargetID: 1})
	checkErr(t, "an only member to another", err, rpctypes.ErrGRPCBadLeaderTransferee)
}

func TestStatusIsTheClustersToo(t *testing.T) {
	f, store := newFakeCluster(), newFakeStore()
	store.stats = backend.Stats{DBSize: 100, DBSizeInUse: 60, Quota: 7, AppliedIndex: 5}
	f.status = ClusterStatus{ClusterID: testCluster, ID: testMember, Leader: 1, Term: 300, Committed: 90, Applied: 88, Learner: true}
	s := newTestServer(t, store, withCluster(f))
	c := pb.NewMaintenanceClient(dial(t, s))
	want := &pb.StatusResponse{
		Header:  &pb.ResponseHeader{ClusterId: testCluster, MemberId: testMember, RaftTerm: 300, Revision: 1},
		Version: "3.7.3", DbSize: 100, DbSizeInUse: 60, DbSizeQuota: 7, Leader: 1, RaftIndex: 90, RaftAppliedIndex: 88, RaftTerm: 300,
		IsLearner: true, StorageVersion: "3.7.0", DowngradeInfo: &pb.DowngradeInfo{},
	}
	if got, err := c.Status(t.Context(), &pb.StatusRequest{}); err != nil || !proto.Equal(got, want) {
		t.Errorf("got  %v, %v\nwant %v", got, err, want)
	}
	metrics := func(want ...string) {
		t.Helper()
		text := scrape(t, s)
		for _, line := range want {
			if !strings.Contains(text, "\n"+line+"\n") {
				t.Errorf("the metrics have no line %q", line)
			}
		}
	}
	metrics("etcd_server_has_leader 1", "etcd_server_is_leader 0", "etcd_server_is_learner 1",
		"etcd_server_proposals_committed_total 90", "etcd_server_proposals_applied_total 88")

	f.set(func(st *ClusterStatus) { st.Leader, st.Learner = 0, false })
	alarm := &pb.AlarmMember{MemberID: testMember, Alarm: pb.AlarmType_NOSPACE}
	store.alarms = []*pb.AlarmMember{alarm}
	got, err := c.Status(t.Context(), &pb.StatusRequest{})
	if err != nil || got.Leader != 0 || !slices.Equal(got.Errors, []string{"etcdserver: no leader", alarm.String()}) {
		t.Errorf("with an alarm and no leader: %v, %v", got, err)
	}
	metrics("etcd_server_has_leader 0", "etcd_server_is_leader 0", "etcd_server_is_learner 0")
	f.set(func(st *ClusterStatus) { st.Leader = testMember })
	metrics("etcd_server_has_leader 1", "etcd_server_is_leader 1")
}

// A learner may be far behind: it answers what says so, and reads that ask for no more than what it has.
func TestALearnerServesWhatEtcdsDoes(t *testing.T) {
	f := newFakeCluster()
	f.status.Learner = true
	store := newFakeStore()
	s := newTestServer(t, store, withCluster(f))
	conn := dial(t, s)
	ctx := t.Context()
	kv, leases := pb.NewKVClient(conn), pb.NewLeaseClient(conn)

	if _, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte("k"), Serializable: true}); err != nil {
		t.Errorf("a serializable Range: %v", err)
	}
	if _, err := pb.NewMaintenanceClient(conn).Status(ctx, &pb.StatusRequest{}); err != nil {
		t.Errorf("Status: %v", err)
	}
	store.setReadErr(backend.ErrUnavailable) // it has no snapshots
	snapshot, err := pb.NewMaintenanceClient(conn).Snapshot(ctx, &pb.SnapshotRequest{})
	if err == nil {
		_, err = snapshot.Recv()
	}
	if errors.Is(err, rpctypes.ErrGRPCNotSupportedForLearner) {
		t.Errorf("Snapshot: %v", err)
	}
	store.setReadErr(nil)
	receive := func(stream interface{ RecvMsg(any) error }, err error) error {
		if err != nil {
			return err
		}
		return stream.RecvMsg(&pb.WatchResponse{})
	}
	for name, err := range map[string]error{
		"Range":          second(kv.Range(ctx, &pb.RangeRequest{Key: []byte("k")})),
		"Put":            second(kv.Put(ctx, &pb.PutRequest{Key: []byte("k")})),
		"Txn":            second(kv.Txn(ctx, &pb.TxnRequest{})),
		"Compact":        second(kv.Compact(ctx, &pb.CompactionRequest{Revision: 1})),
		"LeaseGrant":     second(leases.LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: 5})),
		"LeaseLeases":    second(leases.LeaseLeases(ctx, &pb.LeaseLeasesRequest{})),
		"MemberList":     second(pb.NewClusterClient(conn).MemberList(ctx, &pb.MemberListRequest{})),
		"Alarm":          second(pb.NewMaintenanceClient(conn).Alarm(ctx, &pb.AlarmRequest{})),
		"MoveLeader":     second(pb.NewMaintenanceClient(conn).MoveLeader(ctx, &pb.MoveLeaderRequest{})),
		"Watch":          receive(pb.NewWatchClient(conn).Watch(ctx)),
		"LeaseKeepAlive": receive(leases.LeaseKeepAlive(ctx)),
		"RangeStream":    receive(kv.RangeStream(ctx, &pb.RangeRequest{Key: []byte("k"), Serializable: true})),
	} {
		checkErr(t, name, err, rpctypes.ErrGRPCNotSupportedForLearner)
	}

	if code, body, _ := get(t, s, "/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "[-]non_learner failed: not supported for learner\n") {
		t.Errorf("/readyz: %d %q", code, body)
	}
	if code, body, _ := get(t, s, "/readyz?exclude=non_learner"); code != http.StatusOK {
		t.Errorf("/readyz?exclude=non_learner: %d %q", code, body)
	}
}

func second[T any](_ T, err error) error { return err }

func TestUnaryRequestsAndNewStreamsThatRequireALeaderAreRefusedWithoutOne(t *testing.T) {
	f := newFakeCluster()
	conn := dial(t, newTestServer(t, newFakeStore(), withCluster(f)))
	required := metadata.AppendToOutgoingContext(t.Context(), rpctypes.MetadataRequireLeaderKey, rpctypes.MetadataHasLeader)
	read := func(ctx context.Context) error {
		return second(pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte("a")}))
	}
	watch := func(ctx context.Context) error {
		stream, err := pb.NewWatchClient(conn).Watch(ctx)
		if err != nil {
			return err
		}
		if err := stream.Send(&pb.WatchRequest{}); err != nil && !errors.Is(err, io.EOF) { // EOF: Recv knows why
			return err
		}
		return second(stream.Recv())
	}
	f.set(func(st *ClusterStatus) { st.Leader = 0 })
	checkErr(t, "unary", read(required), rpctypes.ErrGRPCNoLeader)
	checkErr(t, "stream", watch(required), rpctypes.ErrGRPCNoLeader)
	checkErr(t, "unary that does not require one", read(t.Context()), nil)
	checkErr(t, "stream that does not require one", watch(t.Context()), nil)
	f.set(func(st *ClusterStatus) { st.Leader = 1 })
	checkErr(t, "unary with a leader", read(required), nil)
	checkErr(t, "stream with a leader", watch(required), nil)
}

// handlerStream is the server's side of a stream whose client says nothing.
type handlerStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (h *handlerStream) Context() context.Context { return h.ctx }
func (h *handlerStream) RecvMsg(any) error        { <-h.ctx.Done(); return h.ctx.Err() }

// Three election timeouts: a client that only has to wait for an election keeps its watches.
func TestStreamsThatRequireALeaderEndThreeElectionsAfterItIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const election = 500 * time.Millisecond
		f := newFakeCluster()
		w := &silentWatcher{}
		s := newTestServer(t, newFakeStore(), func(o *Options) { o.Cluster, o.Watcher, o.ElectionTimeout = f, w, election })
		defer s.Close()

		type ended struct {
			err   error
			after time.Duration
		}
		serve := func(name string, required bool) <-chan ended {
			begin := time.Now()
			md := metadata.MD{}
			if required {
				md.Set(rpctypes.MetadataRequireLeaderKey, rpctypes.MetadataHasLeader)
			}
			ctx, cancel := context.WithCancel(metadata.NewIncomingContext(t.Context(), md))
			t.Cleanup(cancel)
			out := make(chan ended, 1)
			go func() {
				err := s.admitStream(nil, &handlerStream{ctx: ctx}, &grpc.StreamServerInfo{FullMethod: name}, func(_ any, stream grpc.ServerStream) error {
					switch name {
					case "watch":
						return (&watchServer{s}).watch(stream)
					default:
						return (&leaseServer{s: s}).LeaseKeepAlive(&grpc.GenericServerStream[pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse]{ServerStream: stream})
					}
				})
				out <- ended{err, time.Since(begin)}
			}()
			synctest.Wait()
			return out
		}
		stillOpen := func(what string, streams ...<-chan ended) {
			t.Helper()
			synctest.Wait()
			for i, c := range streams {
				select {
				case e := <-c:
					t.Fatalf("%s: stream %d ended after %v with %v", what, i, e.after, e.err)
				default:
				}
			}
		}
		watch, keepalive, free := serve("watch", true), serve("keepalive", true), serve("watch", false)

		// An election, as it ought to be: lost, and found again in time.
		f.set(func(st *ClusterStatus) { st.Leader = 0 })
		time.Sleep(leaderlessElections*election - time.Millisecond)
		stillOpen("before the time is over", watch, keepalive, free)
		f.set(func(st *ClusterStatus) { st.Leader = 2 })
		time.Sleep(time.Hour)
		stillOpen("under a new leader", watch, keepalive, free)

		f.set(func(st *ClusterStatus) { st.Leader = 0 })
		time.Sleep(leaderlessElections*election + time.Millisecond)
		synctest.Wait()
		for name, c := range map[string]<-chan ended{"watch": watch, "keepalive": keepalive} {
			select {
			case e := <-c:
				checkErr(t, name, e.err, rpctypes.ErrGRPCNoLeader)
			default:
				t.Errorf("%s: still open long after the leader was lost", name)
			}
		}
		stillOpen("a stream that requires none", free)

		f.set(func(st *ClusterStatus) { st.Leader = testMember })
		again := serve("watch", true)
		time.Sleep(time.Hour)
		stillOpen("a stream of the next leader's time", again, free)
		if text := scrape(t, s); !strings.Contains(text, "\netcd_server_leader_changes_seen_total 3\n") {
			t.Error("three leaders were seen, and not counted")
		}
	})
}

// silentWatcher serves until the stream ends.
type silentWatcher struct{}

func (*silentWatcher) Serve(ctx context.Context, _ func() (*pb.WatchRequest, error), _ func(any) error) error {
	<-ctx.Done()
	return ctx.Err()
}

func TestPromotionsAreCountedByTheLeader(t *testing.T) {
	f := newFakeCluster()
	s := newTestServer(t, newFakeStore(), withCluster(f))
	c := pb.NewClusterClient(dial(t, s))
	promote := func() { _, _ = c.MemberPromote(t.Context(), &pb.MemberPromoteRequest{ID: 2}) } // its answer is not under test
	promote()
	f.err = rpctypes.ErrGRPCLearnerNotReady
	promote()
	f.status.Leader = 1
	promote()
	text := scrape(t, s)
	for _, want := range []string{
		"etcd_server_learner_promote_successes 1\n",
		`etcd_server_learner_promote_failures{Reason="etcdserver: can only promote a learner member which is in sync with leader"} 1` + "\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q", want)
		}
	}
}

// Clients know etcd's errors by their texts, so nothing may be put in front of them.
func TestErrorsOfTheClusterPassThrough(t *testing.T) {
	for _, err := range []error{
		rpctypes.ErrGRPCTimeout, rpctypes.ErrGRPCTimeoutDueToLeaderFail, rpctypes.ErrGRPCTimeoutDueToConnectionLost,
		rpctypes.ErrGRPCLeaderChanged, rpctypes.ErrGRPCMemberNotFound, rpctypes.ErrGRPCPeerURLExist,
	} {
		checkErr(t, "wrapped", toStatus(fmt.Errorf("proposing: %w", err)), err)
	}
}
