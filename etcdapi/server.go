// Package etcdapi is the wire: etcd's v3 gRPC services and its HTTP endpoints, one file per service. A handler
// checks the request as etcd does, calls the backend, fills in the header and answers; it decides nothing about
// revisions, leases or durability, and speaks no SQL.
//
// Promises:
//
//  1. Requests that etcd refuses for their form are refused here with etcd's code and text (rpctypes), before the
//     backend sees them.
//  2. A backend error becomes a gRPC status in one table (errors.go), also when it is wrapped.
//  3. Every answer carries cluster id, member id, Raft term and revision, as etcd's does: the store's revision at
//     the read for a read, its own for a write.
//  4. Values never leave through errors, hooks or metrics. Keys may appear in the summary of a slow request.
//  5. A panic in a gRPC handler is a broken invariant and ends the process: no interceptor recovers it.
//
// All methods of Server may be called from several goroutines at once.
package etcdapi

import (
	"context"
	"errors"
	"math"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

// Writer takes every write as one value and answers when it is durable and visible.
type Writer interface {
	Write(ctx context.Context, cmd backend.Command) (proto.Message, error)
}

// View is the store at one revision; see backend.View. Release is called exactly once.
type View interface {
	Range(ctx context.Context, req *pb.RangeRequest) (*backend.RangeResult, error)
	Page(ctx context.Context, req *pb.RangeRequest) (*backend.RangeResult, error) // Range without Count
	Txn(ctx context.Context, req *pb.TxnRequest) (*pb.TxnResponse, error)
	Revision() int64
	Auth() *backend.Auth
	Release()
}

// Leases are the reads of leases; their writes go through Writer.
type Leases interface {
	Lease(id int64, withKeys bool) (status backend.LeaseStatus, ok bool)
	Leases() []int64
}

// State is what Status, the health checks and the metrics look at. The calls are cheap.
type State interface {
	Revision() int64
	Stats() backend.Stats
	Alarms() []*pb.AlarmMember
	Err() error
	// Ready returns when what is read from now on may be answered: holding everything that was committed, by whatever
	// process, when it was called; or, where the read is serializable, whatever this one has.
	Ready(ctx context.Context, serializable bool) error
	WaitCompacted(ctx context.Context, rev int64) error
}

// Auth is who may do what at present, and whose tokens are good.
type Auth interface {
	Auth() *backend.Auth
	TokenUser(hash string, auth *backend.Auth) (user string, ok bool)
}

// Hasher makes hashes of what this process holds. The calls read the whole store.
type Hasher interface {
	HashKV(ctx context.Context, rev int64) (backend.KVHash, error)
	Hash(ctx context.Context) (hash uint32, rev int64, err error)
}

// Keeper does what keeps the store in order. The calls take as long as the store is large, and hold nobody up.
type Keeper interface {
	EtcdSnapshot(ctx context.Context, s backend.EtcdSurroundings) (*backend.EtcdSnapshot, error)
	Defragment(ctx context.Context) error
}

// Backend is the store behind the services. *backend.DB is one.
type Backend interface {
	Writer
	Leases
	State
	Hasher
	Auth
	Keeper
}

// Watcher serves one watch stream. recv returns the client's next request, io.EOF when the client will send no
// more, and the context's error once ctx is done (it never blocks beyond that). send takes a *pb.WatchResponse or
// a message with WireBuffers (see codec.go); it is not called by two goroutines at once and blocks while the
// client's flow-control window is full. Serve returns when ctx is done or send fails.
type Watcher interface {
	Serve(ctx context.Context, recv func() (*pb.WatchRequest, error), send func(msg any) error) error
}

var (
	_ Backend = (*backend.DB)(nil)
	_ View    = (*backend.View)(nil)
)

// Identity is who answers; all but MemberID is for an only member.
type Identity struct {
	MemberID, ClusterID  uint64
	Name                 string
	PeerURLs, ClientURLs []string
}

// Keepalive are etcd's --grpc-keepalive-* flags. Zero switches the respective rule off (grpc's default applies).
type Keepalive struct {
	MinTime  time.Duration // clients that ping more often are disconnected
	Interval time.Duration // how often the server pings an idle connection
	Timeout  time.Duration // how long it waits for the answer
}

// Hooks report to the outside; any may be nil; none may block.
type Hooks struct {
	// SlowRequest is called after a unary request took longer than Options.SlowRequestAfter.
	SlowRequest func(SlowRequest)
	// SnapshotSent is called when a client has got a snapshot of so many bytes, or err says why it has not.
	SnapshotSent func(size int64, took time.Duration, err error)
	// Defragment is called when a defragmentation that a client asked for begins, and when it has ended.
	Defragment func(ended bool, err error)
	// AuthFailed is called when somebody has asked for a token with a user and a password that do not fit. The name, which
	// may be anything, is cut off.
	AuthFailed func(user string, err error)
}

// Options configure a Server. Backend, View and Watcher must be set.
type Options struct {
	Backend Backend
	// View returns the newest published state: func() etcdapi.View { return db.View() }.
	View    func() View
	Watcher Watcher
	// Cluster is nil where Identity is the only member.
	Cluster Cluster
	// ElectionTimeout is that of the cluster; 0: a second. It bounds how long streams outlive the leader, see
	// followLeader, and the read of /health.
	ElectionTimeout time.Duration
	Identity        Identity
	// ClientURLs returns those of all processes that serve the store of an only member; nil, or an empty answer: those
	// of Identity.
	ClientURLs func(ctx context.Context) []string
	Metrics    *Metrics     // nil: metrics with a registry of their own
	Tracer     trace.Tracer // nil: no spans
	// TraceRequests keeps the last calls for the pages of golang.org/x/net/trace.
	TraceRequests bool
	Hooks         Hooks

	EtcdVersion          string        // the etcd version answered with; empty: that of the api module
	MaxRequestBytes      uint          // --max-request-bytes; 0: 1.5 MiB
	MaxTxnOps            uint          // --max-txn-ops; 0: 128
	MaxConcurrentStreams uint32        // per connection; 0: no limit
	Tokens               Tokens        // --auth-token
	BcryptCost           int           // --bcrypt-cost; 0: DefaultBcryptCost
	ClientCertAuth       bool          // --client-cert-auth: certificates say who asks
	SlowRequestAfter     time.Duration // --warning-unary-request-duration; 0: 300 ms
	Keepalive            Keepalive
}

const (
	// etcdVersion is the version of the api module in go.mod.
	etcdVersion            = "3.7.3"
	defaultMaxRequestBytes = 1536 * 1024
	defaultMaxTxnOps       = 128
	defaultSlowRequest     = 300 * time.Millisecond
	defaultElectionTimeout = time.Second
	// grpcOverheadBytes is what etcd allows a message beyond --max-request-bytes, so that a request slightly too
	// large is answered with "request is too large" instead of grpc's own refusal.
	grpcOverheadBytes = 512 * 1024
	// streamWorkers is how many goroutines are kept for requests. A new one for each request grows its stack three
	// times on the way to the backend, which was a tenth of the CPU of a busy server. Streams take them too, for as long
	// as they are open; requests beyond this number get goroutines of their own.
	streamWorkers = 256
	// Fixed windows, in bytes, for what clients send. With grpc's growing ones the server sends a PING along with
	// nearly every request to measure the line, and the client an answer: that took a quarter of the time in which
	// an event reaches a thousand watchers. A stream's window holds most requests.
	streamWindow = 1 << 20
	connWindow   = 4 << 20
)

// Server holds the services. Make one with New.
type Server struct {
	opts    Options
	version versions
	metrics *Metrics
	health  *health.Server

	stopping context.Context // done once Close was called, or no stream can be served any more for another reason
	stop     context.CancelCauseFunc

	cluster    Cluster // never nil
	led        ledStreams
	background sync.WaitGroup // followLeader
}

// New returns a Server for o. It panics when Backend, View or Watcher is missing: that is a programming error.
func New(o Options) *Server {
	if o.Backend == nil || o.View == nil || o.Watcher == nil {
		panic("etcdapi: Options.Backend, Options.View and Options.Watcher must be set")
	}
	if o.ElectionTimeout == 0 {
		o.ElectionTimeout = defaultElectionTimeout
	}
	if o.Metrics == nil {
		o.Metrics = NewMetrics(MetricsOptions{})
	}
	if o.EtcdVersion == "" {
		o.EtcdVersion = etcdVersion
	}
	if o.MaxRequestBytes == 0 {
		o.MaxRequestBytes = defaultMaxRequestBytes
	}
	if o.MaxTxnOps == 0 {
		o.MaxTxnOps = defaultMaxTxnOps
	}
	if o.MaxConcurrentStreams == 0 {
		o.MaxConcurrentStreams = math.MaxUint32
	}
	if o.BcryptCost == 0 {
		o.BcryptCost = DefaultBcryptCost
	}
	if o.SlowRequestAfter == 0 {
		o.SlowRequestAfter = defaultSlowRequest
	}
	s := &Server{
		opts:    o,
		version: versionsOf(o.EtcdVersion),
		metrics: o.Metrics,
		health:  health.NewServer(),
	}
	s.stopping, s.stop = context.WithCancelCause(context.Background())
	if s.cluster = o.Cluster; s.cluster == nil {
		s.cluster = oneMember{&s.opts}
	}
	s.led.begin()
	s.background.Go(s.followLeader)
	s.metrics.attach(s)
	if err := o.Backend.Err(); err != nil {
		s.StorageFailed(err)
	} else {
		s.StorageHealed()
	}
	return s
}

// ServerOptions are what grpc.NewServer needs for these services; transport credentials are the caller's.
func (s *Server) ServerOptions() []grpc.ServerOption {
	opts := []grpc.ServerOption{
		grpc.ForceServerCodecV2(&codec{sent: s.metrics.sentBytes, received: s.metrics.receivedBytes}),
		grpc.ChainUnaryInterceptor(s.slowUnary, s.metrics.grpc.UnaryServerInterceptor(), s.admitUnary),
		grpc.ChainStreamInterceptor(s.metrics.grpc.StreamServerInterceptor(), s.admitStream),
		grpc.MaxRecvMsgSize(int(s.opts.MaxRequestBytes + grpcOverheadBytes)),
		grpc.MaxSendMsgSize(math.MaxInt32),
		grpc.MaxConcurrentStreams(s.opts.MaxConcurrentStreams),
		// Once Stop has returned the backend may be closed: no handler may be left that uses it.
		grpc.WaitForHandlers(true),
		grpc.NumStreamWorkers(streamWorkers),
		grpc.StaticStreamWindowSize(streamWindow),
		grpc.StaticConnWindowSize(connWindow),
	}
	if s.opts.TraceRequests {
		opts = append(opts, grpc.ChainUnaryInterceptor(traceUnary), grpc.ChainStreamInterceptor(traceStream))
	}
	if s.opts.Tracer != nil {
		opts = append(opts, grpc.ChainUnaryInterceptor(s.spanUnary), grpc.ChainStreamInterceptor(s.spanStream)) // after those above
	}
	k := s.opts.Keepalive
	if k.MinTime > 0 {
		opts = append(opts, grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: k.MinTime}))
	}
	if k.Interval > 0 && k.Timeout > 0 {
		opts = append(opts, grpc.KeepaliveParams(keepalive.ServerParameters{Time: k.Interval, Timeout: k.Timeout}))
	}
	return opts
}

// RegisterGRPC adds the services to g, which must have been made with ServerOptions and not serve yet.
func (s *Server) RegisterGRPC(g *grpc.Server) {
	g.RegisterService(kvServiceDesc(), &kvServer{s: s})
	g.RegisterService(watchServiceDesc(), &watchServer{s: s})
	pb.RegisterLeaseServer(g, &leaseServer{s: s})
	pb.RegisterClusterServer(g, &clusterServer{s: s})
	pb.RegisterMaintenanceServer(g, &maintenanceServer{s: s})
	pb.RegisterAuthServer(g, newAuthServer(s))
	v3lockpb.RegisterLockServer(g, &lockServer{s: s})
	v3electionpb.RegisterElectionServer(g, &electionServer{s: s})
	healthpb.RegisterHealthServer(g, s.health)
	reflection.Register(g)
	s.metrics.grpc.InitializeMetrics(g)
}

// Close ends the watch and keepalive streams with ErrGRPCStopped and reports NOT_SERVING, so that a following
// grpc.Server.GracefulStop waits for unary requests only. It may be called more than once.
func (s *Server) Close() {
	s.stop(backend.ErrClosed)
	s.health.Shutdown()
	s.background.Wait()
}

// ready is Backend.Ready.
func (s *Server) ready(ctx context.Context, serializable bool) error {
	err := s.opts.Backend.Ready(ctx, serializable)
	if err != nil && !serializable {
		s.metrics.peers.failedReadIndexes.Inc()
	}
	return err
}

// streamContext is ctx, cancelled also when s.stopping is. The caller must call cancel.
func (s *Server) streamContext(ctx context.Context) (_ context.Context, cancel context.CancelFunc) {
	ctx, cancelCause := context.WithCancelCause(ctx)
	unlink := context.AfterFunc(s.stopping, func() { cancelCause(context.Cause(s.stopping)) })
	return ctx, func() { unlink(); cancelCause(nil) }
}

// streamEnd is the status of a stream that ended because its context did: stopped by us, or left by the client.
func streamEnd(ctx context.Context) error {
	cause := context.Cause(ctx)
	for _, ours := range [...]error{backend.ErrClosed, backend.ErrHistoryLost, rpctypes.ErrGRPCNoLeader} {
		if errors.Is(cause, ours) {
			return toStatus(cause)
		}
	}
	return ctx.Err()
}
