package etcdapi

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	reflectpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

func TestLeases(t *testing.T) {
	f := newFakeStore()
	f.put("a", "1")
	c := pb.NewLeaseClient(dial(t, newTestServer(t, f, nil)))
	ctx := t.Context()

	own, err := c.LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: 7, TTL: 60})
	if err != nil || own.ID != 7 || own.TTL != 60 {
		t.Fatalf("grant: %v, %v", own, err)
	}
	checkHeader(t, own.Header, 2)
	drawn, err := c.LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: 30})
	if err != nil || drawn.ID <= 0 {
		t.Fatalf("grant without id: %v, %v", drawn, err)
	}

	list, err := c.LeaseLeases(ctx, &pb.LeaseLeasesRequest{})
	if err != nil || len(list.Leases) != 2 || list.Leases[0].ID != 7 {
		t.Errorf("list: %v, %v", list, err)
	}
	checkHeader(t, list.GetHeader(), 2)

	f.mu.Lock()
	f.leases[7] = backend.LeaseStatus{ID: 7, TTL: 55, GrantedTTL: 60, Keys: [][]byte{[]byte("a")}}
	f.mu.Unlock()
	for _, keys := range []bool{false, true} {
		ttl, err := c.LeaseTimeToLive(ctx, &pb.LeaseTimeToLiveRequest{ID: 7, Keys: keys})
		if err != nil || ttl.ID != 7 || ttl.TTL != 55 || ttl.GrantedTTL != 60 || (len(ttl.Keys) == 1) != keys {
			t.Errorf("time to live, keys %v: %v, %v", keys, ttl, err)
		}
		checkHeader(t, ttl.GetHeader(), 2)
	}
	ttl, err := c.LeaseTimeToLive(ctx, &pb.LeaseTimeToLiveRequest{ID: 99, Keys: true})
	if err != nil || ttl.ID != 99 || ttl.TTL != -1 || ttl.GrantedTTL != 0 {
		t.Errorf("time to live of an unknown lease: %v, %v; want TTL -1", ttl, err)
	}

	revoke, err := c.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: 7})
	if err != nil {
		t.Fatal(err)
	}
	checkHeader(t, revoke.Header, 2)
	_, err = c.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: 7})
	checkErr(t, "revoke twice", err, rpctypes.ErrGRPCLeaseNotFound)
}

func TestKeepAliveOfAnUnknownLeaseAnswersTTLZeroAndTheStreamGoesOn(t *testing.T) {
	f := newFakeStore()
	f.leases[1] = backend.LeaseStatus{ID: 1, GrantedTTL: 10}
	s := newTestServer(t, f, nil)
	stream, err := pb.NewLeaseClient(dial(t, s)).LeaseKeepAlive(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ id, ttl int64 }{{1, 10}, {99, 0}, {1, 10}} {
		if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: c.id}); err != nil {
			t.Fatal(err)
		}
		got, err := stream.Recv()
		if err != nil || got.ID != c.id || got.TTL != c.ttl {
			t.Errorf("lease %d: %v, %v; want TTL %d", c.id, got, err, c.ttl)
		}
		checkHeader(t, got.GetHeader(), 1)
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("after CloseSend: %v, want EOF", err)
	}
}

func TestKeepAliveHeaderIsOfBeforeTheRenewal(t *testing.T) {
	f := newFakeStore()
	f.onWrite = func(cmd backend.Command) (proto.Message, error) {
		f.rev = 50
		return &pb.LeaseKeepAliveResponse{TTL: 5, Header: &pb.ResponseHeader{Revision: 50}}, nil
	}
	stream, err := pb.NewLeaseClient(dial(t, newTestServer(t, f, nil))).LeaseKeepAlive(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: 1}); err != nil {
		t.Fatal(err)
	}
	got, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	checkHeader(t, got.Header, 1)
}

func TestKeepAliveEndsWithTheBackendsError(t *testing.T) {
	f := newFakeStore()
	f.onWrite = func(backend.Command) (proto.Message, error) { return nil, backend.ErrClosed }
	stream, err := pb.NewLeaseClient(dial(t, newTestServer(t, f, nil))).LeaseKeepAlive(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: 1}); err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	checkErr(t, "keepalive", err, rpctypes.ErrGRPCStopped)
}

func TestWatchSendsEncodedAndPlainResponses(t *testing.T) {
	want := &pb.WatchResponse{WatchId: 3, Header: &pb.ResponseHeader{Revision: 9}, Events: []*mvccpb.Event{{Kv: kvOf(1, 6000)}}}
	encoded, err := proto.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	s := newTestServer(t, newFakeStore(), func(o *Options) {
		o.Watcher = &fakeWatcher{answer: func(r *pb.WatchRequest) any {
			if r.GetCreateRequest().GetPrevKv() {
				return parts{encoded[:5], encoded[5:]}
			}
			return want
		}}
	})
	stream, err := pb.NewWatchClient(dial(t, s)).Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, prev := range []bool{true, false} {
		req := &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("a"), PrevKv: prev}}}
		if err := stream.Send(req); err != nil {
			t.Fatal(err)
		}
		if got, err := stream.Recv(); err != nil || !proto.Equal(got, want) {
			t.Errorf("encoded %v: %v", prev, err)
		}
	}
}

// blockingWatcher serves until its context is done; entered tells that it does.
type blockingWatcher struct {
	entered chan struct{}
	ended   chan error
}

func (w *blockingWatcher) Serve(ctx context.Context, recv func() (*pb.WatchRequest, error), _ func(any) error) error {
	close(w.entered)
	_, err := recv() // the client says nothing: must still return when ctx is done
	w.ended <- err
	return err
}

func TestCloseEndsStreamsAsStoppedThoughTheClientIsSilent(t *testing.T) {
	w := &blockingWatcher{make(chan struct{}), make(chan error, 1)}
	s := newTestServer(t, newFakeStore(), func(o *Options) { o.Watcher = w })
	conn := dial(t, s)
	watch, err := pb.NewWatchClient(conn).Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	keepalive, err := pb.NewLeaseClient(conn).LeaseKeepAlive(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := keepalive.Send(&pb.LeaseKeepAliveRequest{ID: 1}); err != nil {
		t.Fatal(err)
	}
	if _, err := keepalive.Recv(); err != nil {
		t.Fatal(err)
	}
	<-w.entered
	s.Close()
	s.Close()
	_, err = watch.Recv()
	checkErr(t, "watch", err, rpctypes.ErrGRPCStopped)
	_, err = keepalive.Recv()
	checkErr(t, "keepalive", err, rpctypes.ErrGRPCStopped)
	got, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil || got.Status != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("health after Close: %v, %v", got, err)
	}
}

// After Stop the backend is closed: a handler that still reads it then would read a closed database.
func TestStopWaitsForHandlers(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	f := newFakeStore()
	f.onWrite = func(backend.Command) (proto.Message, error) {
		close(entered)
		<-leave
		return &pb.PutResponse{}, nil
	}
	s := newTestServer(t, f, nil)
	g := grpc.NewServer(s.ServerOptions()...)
	conn := dialOn(t, s, g)
	go pb.NewKVClient(conn).Put(t.Context(), &pb.PutRequest{Key: []byte("k")})
	<-entered
	stopped := make(chan struct{})
	go func() {
		g.Stop()
		close(stopped)
	}()
	select {
	case <-stopped:
		t.Error("Stop returned while a handler was in the backend")
	case <-time.After(100 * time.Millisecond):
	}
	close(leave)
	<-stopped
}

func TestWatchEndsWhenTheClientLeaves(t *testing.T) {
	w := &blockingWatcher{make(chan struct{}), make(chan error, 1)}
	s := newTestServer(t, newFakeStore(), func(o *Options) { o.Watcher = w })
	conn := dial(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := pb.NewWatchClient(conn).Watch(ctx); err != nil {
		t.Fatal(err)
	}
	<-w.entered
	cancel()
	if err := <-w.ended; err == nil {
		t.Error("recv returned no error")
	}
	const series = `grpc_server_handled_total{grpc_code="Canceled",grpc_method="Watch",grpc_service="etcdserverpb.Watch",grpc_type="bidi_stream"} 1`
	for deadline := time.Now().Add(10 * time.Second); !strings.Contains(scrape(t, s), series); time.Sleep(time.Millisecond) { // counted after Serve returned
		if time.Now().After(deadline) {
			t.Fatalf("no series %s", series)
		}
	}
}

func TestWatcherErrorBecomesAStatus(t *testing.T) {
	s := newTestServer(t, newFakeStore(), func(o *Options) { o.Watcher = failingWatcher{backend.ErrStorage} })
	stream, err := pb.NewWatchClient(dial(t, s)).Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("got %v", err)
	}
	if want := `etcd_network_server_stream_failures_total{API="watch",Type="receive"} 1`; !strings.Contains(scrape(t, s), want) {
		t.Errorf("no %s", want)
	}
}

type failingWatcher struct{ err error }

func (w failingWatcher) Serve(context.Context, func() (*pb.WatchRequest, error), func(any) error) error {
	return w.err
}

func TestReceiverRepeatsTheEnd(t *testing.T) {
	w := &endWatcher{errs: make(chan error, 3)}
	s := newTestServer(t, newFakeStore(), func(o *Options) { o.Watcher = w })
	stream, err := pb.NewWatchClient(dial(t, s)).Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := <-w.errs; !errors.Is(err, io.EOF) {
			t.Errorf("recv after CloseSend: %v, want EOF", err)
		}
	}
}

type endWatcher struct{ errs chan error }

func (w *endWatcher) Serve(_ context.Context, recv func() (*pb.WatchRequest, error), _ func(any) error) error {
	for range 3 {
		_, err := recv()
		w.errs <- err
	}
	return nil
}

func TestMemberListHasTheOneMemberAndNoRevision(t *testing.T) {
	c := pb.NewClusterClient(dial(t, newTestServer(t, newFakeStore(), nil)))
	got, err := c.MemberList(t.Context(), &pb.MemberListRequest{Linearizable: true})
	if err != nil {
		t.Fatal(err)
	}
	checkHeader(t, got.Header, 0)
	want := &pb.Member{ID: testMember, Name: "one", PeerURLs: []string{"http://localhost:2380"}, ClientURLs: []string{"http://localhost:2379"}}
	if len(got.Members) != 1 || !proto.Equal(got.Members[0], want) {
		t.Errorf("members: %v", got.Members)
	}
	urls := []string{"http://localhost:2390"}
	for name, call := range map[string]func() error{
		"add":    func() error { _, err := c.MemberAdd(t.Context(), &pb.MemberAddRequest{PeerURLs: urls}); return err },
		"remove": func() error { _, err := c.MemberRemove(t.Context(), &pb.MemberRemoveRequest{}); return err },
		"update": func() error {
			_, err := c.MemberUpdate(t.Context(), &pb.MemberUpdateRequest{PeerURLs: urls})
			return err
		},
		"promote": func() error { _, err := c.MemberPromote(t.Context(), &pb.MemberPromoteRequest{}); return err },
	} {
		checkErr(t, name, call(), errOneMember)
	}
}

func TestStatus(t *testing.T) {
	f := newFakeStore()
	f.stats = backend.Stats{DBSize: 100, DBSizeInUse: 60, Quota: 1 << 31, AppliedIndex: 77}
	c := pb.NewMaintenanceClient(dial(t, newTestServer(t, f, nil)))
	got, err := c.Status(t.Context(), &pb.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	checkHeader(t, got.Header, 1)
	got.Header = nil
	want := &pb.StatusResponse{
		Version: "3.7.3", DbSize: 100, DbSizeInUse: 60, DbSizeQuota: 1 << 31, Leader: testMember, RaftIndex: 78, RaftAppliedIndex: 78,
		RaftTerm: testTerm, StorageVersion: "3.7.0", DowngradeInfo: &pb.DowngradeInfo{},
	}
	if !proto.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

func TestAlarms(t *testing.T) {
	f := newFakeStore()
	c := pb.NewMaintenanceClient(dial(t, newTestServer(t, f, nil)))
	call := func(action pb.AlarmRequest_AlarmAction, kind pb.AlarmType) []*pb.AlarmMember {
		t.Helper()
		got, err := c.Alarm(t.Context(), &pb.AlarmRequest{Action: action, Alarm: kind, MemberID: testMember})
		if err != nil {
			t.Fatal(err)
		}
		checkHeader(t, got.Header, 1)
		return got.Alarms
	}
	if got := call(pb.AlarmRequest_GET, pb.AlarmType_NONE); len(got) != 0 {
		t.Errorf("fresh: %v", got)
	}
	call(pb.AlarmRequest_ACTIVATE, pb.AlarmType_NOSPACE)
	call(pb.AlarmRequest_ACTIVATE, pb.AlarmType_CORRUPT)
	for kind, n := range map[pb.AlarmType]int{pb.AlarmType_NONE: 2, pb.AlarmType_NOSPACE: 1, pb.AlarmType_CORRUPT: 1} {
		if got := call(pb.AlarmRequest_GET, kind); len(got) != n {
			t.Errorf("get %v: %v, want %d", kind, got, n)
		}
	}
	if n := len(f.commands); n != 2 {
		t.Errorf("%d commands, want 2: a GET is no write", n)
	}
	if got := call(pb.AlarmRequest_DEACTIVATE, pb.AlarmType_NOSPACE); len(got) != 1 {
		t.Errorf("deactivate: %v", got)
	}
	if got := call(pb.AlarmRequest_GET, pb.AlarmType_NONE); len(got) != 1 || got[0].Alarm != pb.AlarmType_CORRUPT {
		t.Errorf("after clearing NOSPACE: %v", got)
	}
	if _, err := c.Alarm(t.Context(), &pb.AlarmRequest{Action: 9}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("unknown action: %v", err)
	}
}

func TestGRPCHealthFollowsTheStorage(t *testing.T) {
	f := newFakeStore()
	f.setErr(backend.ErrDiskFull)
	s := newTestServer(t, f, nil)
	stream, err := healthpb.NewHealthClient(dial(t, s)).Watch(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		do   func()
		want healthpb.HealthCheckResponse_ServingStatus
	}{
		{func() {}, healthpb.HealthCheckResponse_NOT_SERVING},
		{s.StorageHealed, healthpb.HealthCheckResponse_SERVING},
		{func() { s.StorageFailed(backend.ErrDiskFull) }, healthpb.HealthCheckResponse_NOT_SERVING},
		{s.StorageHealed, healthpb.HealthCheckResponse_SERVING},
	} {
		step.do()
		if got, err := stream.Recv(); err != nil || got.Status != step.want {
			t.Fatalf("got %v, %v; want %v", got, err, step.want)
		}
	}
}

func TestReflectionListsTheServices(t *testing.T) {
	stream, err := reflectpb.NewServerReflectionClient(dial(t, newTestServer(t, newFakeStore(), nil))).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ask := func(r *reflectpb.ServerReflectionRequest) *reflectpb.ServerReflectionResponse {
		t.Helper()
		if err := stream.Send(r); err != nil {
			t.Fatal(err)
		}
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	list := ask(&reflectpb.ServerReflectionRequest{MessageRequest: &reflectpb.ServerReflectionRequest_ListServices{}})
	var names []string
	for _, s := range list.GetListServicesResponse().GetService() {
		names = append(names, s.Name)
	}
	for _, want := range []string{"etcdserverpb.KV", "etcdserverpb.Watch", "etcdserverpb.Lease", "etcdserverpb.Cluster", "etcdserverpb.Maintenance", "grpc.health.v1.Health"} {
		if !slices.Contains(names, want) {
			t.Errorf("services %v: no %s", names, want)
		}
	}
	file := ask(&reflectpb.ServerReflectionRequest{MessageRequest: &reflectpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "etcdserverpb.KV"}})
	if len(file.GetFileDescriptorResponse().GetFileDescriptorProto()) == 0 {
		t.Errorf("no descriptor of etcdserverpb.KV: %v", file)
	}
}

func TestOurDescriptorsHaveAllMethodsOfTheGeneratedOnes(t *testing.T) {
	for _, pair := range []struct{ ours, generated []string }{
		{methods(kvServiceDesc()), methods(&pb.KV_ServiceDesc)},
		{methods(watchServiceDesc()), methods(&pb.Watch_ServiceDesc)},
	} {
		if !slices.Equal(pair.ours, pair.generated) {
			t.Errorf("ours %v, generated %v", pair.ours, pair.generated)
		}
	}
}

func TestClientVersionsAreCountedAndBounded(t *testing.T) {
	s := newTestServer(t, newFakeStore(), nil)
	kv := pb.NewKVClient(dial(t, s))
	call := func(version string) error {
		ctx := metadata.AppendToOutgoingContext(t.Context(), rpctypes.MetadataClientAPIVersionKey, version)
		_, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte("a")})
		return err
	}
	for range 2 {
		checkErr(t, "3.7", call("3.7"), nil)
	}
	for i := range 100 {
		checkErr(t, "made up", call("v"+strings.Repeat("x", i)), nil)
	}
	text := scrape(t, s)
	if !strings.Contains(text, `etcd_server_client_requests_total{client_api_version="3.7",type="unary"} 2`) {
		t.Error("calls of 3.7 not counted")
	}
	if !strings.Contains(text, `etcd_server_client_requests_total{client_api_version="other",type="unary"} 69`) {
		t.Error(`calls beyond 32 versions not counted as "other"`)
	}
	bad := metadata.NewIncomingContext(t.Context(), metadata.Pairs(rpctypes.MetadataClientAPIVersionKey, "\xff"))
	checkErr(t, "no text", second(s.admit(bad, func(clientCounters) {})), rpctypes.ErrGRPCInvalidClientAPIVersion)
}

func TestSlowRequestsAreReportedWithoutValues(t *testing.T) {
	var mu sync.Mutex
	reported := map[string]string{}
	f := newFakeStore()
	s := newTestServer(t, f, func(o *Options) {
		o.SlowRequestAfter = 1
		o.Hooks.SlowRequest = func(r SlowRequest) {
			mu.Lock()
			defer mu.Unlock()
			reported[r.Method] = fmt.Sprintf("%s remote:%s counts:%d,%d sizes:%t,%t error:%v", r.Content, r.Remote, r.RequestCount, r.ResponseCount, r.RequestSize > 0, r.ResponseSize > 0, r.Err)
		}
	})
	kv := pb.NewKVClient(dial(t, s))
	const secret = "topsecretvalue"
	put := &pb.PutRequest{Key: []byte("mykey"), Value: []byte(secret)}
	txn := &pb.TxnRequest{
		Compare: []*pb.Compare{{Key: []byte("mykey"), Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte(secret)}}},
		Success: ops(opTxn(ops(&pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: put}}), nil)),
		Failure: ops(&pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: put}}),
	}
	if _, err := kv.Put(t.Context(), put); err != nil {
		t.Fatal(err)
	}
	if _, err := kv.Txn(t.Context(), txn); err != nil {
		t.Fatal(err)
	}
	if _, err := kv.Range(t.Context(), &pb.RangeRequest{Key: []byte("mykey")}); err != nil {
		t.Fatal(err)
	}
	if _, err := kv.DeleteRange(t.Context(), &pb.DeleteRangeRequest{}); err == nil {
		t.Fatal("no error")
	}
	mu.Lock()
	defer mu.Unlock()
	for method, want := range map[string]string{
		pb.KV_Put_FullMethodName: "mykey", pb.KV_Txn_FullMethodName: "counts:1,0 sizes:true,true", pb.KV_Range_FullMethodName: "counts:0,1 sizes:true,true",
		pb.KV_DeleteRange_FullMethodName: "key is not provided",
	} {
		if !strings.Contains(reported[method], want) || !strings.Contains(reported[method], "remote:") {
			t.Errorf("%s: reported %q, want it to contain %q", method, reported[method], want)
		}
	}
	for method, text := range reported {
		if strings.Contains(text, secret) {
			t.Errorf("%s: the value was reported: %s", method, text)
		}
	}
}

func TestSummariesAreBoundedAndSayNothingOfUnknownRequests(t *testing.T) {
	text := loggable(&pb.RangeRequest{Key: []byte(strings.Repeat("é", 10_000))})
	if len(text) > summaryBytes+100 {
		t.Errorf("%d bytes", len(text))
	}
	text = loggable(&pb.AuthenticateRequest{Name: "root", Password: "hunter2"})
	if strings.Contains(text, "hunter2") {
		t.Errorf("reported a password: %s", text)
	}
}

func TestAuthorIsTheCommonNameOfAVerifiedCertificate(t *testing.T) {
	cert := &x509.Certificate{Subject: pkix.Name{CommonName: "kube-apiserver"}}
	with := func(state tls.ConnectionState) context.Context {
		return peer.NewContext(t.Context(), &peer.Peer{AuthInfo: credentials.TLSInfo{State: state}})
	}
	for name, c := range map[string]struct {
		ctx  context.Context
		want string
	}{
		"no peer":      {t.Context(), ""},
		"no TLS":       {peer.NewContext(t.Context(), &peer.Peer{}), ""},
		"no cert":      {with(tls.ConnectionState{}), ""},
		"verified":     {with(tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}, VerifiedChains: [][]*x509.Certificate{{cert}}}), "kube-apiserver"},
		"not verified": {with(tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}}), ""},
	} {
		if got, verified := commonName(c.ctx); got != c.want || verified != (c.want != "") {
			t.Errorf("%s: got %q, want %q", name, got, c.want)
		}
	}
}

func TestNewRefusesMissingParts(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	New(Options{})
}
