// Package start brings up the servers that the black-box tests talk to: a real etcd inside the test
// process, or the built quire binary as a process of its own. A test takes a Func and never knows which.
package start

import (
	"context"
	"crypto/tls"
	"net/http"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// Options are the settings that both servers know. Zero values are etcd's defaults.
type Options struct {
	MaxTxnOps               uint
	MaxRequestBytes         uint
	QuotaBytes              int64
	WatchProgressNotify     time.Duration
	AutoCompactionMode      string // "periodic" or "revision"
	AutoCompactionRetention string
	AuthToken               string // "simple", or "jwt" with its options
	AuthTokenTTL            uint   // seconds
	BcryptCost              uint
}

// Func starts one fresh server, which is stopped when the test ends.
type Func func(t testing.TB, o Options) *Server

// Server is a running server and the raw stubs of its services. The stubs do not retry, do not hide
// fields and do not translate errors, so a test sees what is on the wire.
type Server struct {
	Name    string // "etcd" or "quire"
	Address string // host:port of the client listener
	Conn    grpc.ClientConnInterface

	KV          pb.KVClient
	Watch       pb.WatchClient
	Lease       pb.LeaseClient
	Cluster     pb.ClusterClient
	Maintenance pb.MaintenanceClient
	Health      healthpb.HealthClient

	// Process is the quire process; nil for etcd.
	Process *Process
	stop    func() // of etcd

	// Processes are the servers that Several has made one of; nil for others.
	Processes []*Server
	spread    *spread
}

// URL is the address of an HTTP endpoint of the server.
func (s *Server) URL(path string) string { return "http://" + s.Address + path }

// Get fetches an HTTP endpoint. The connection is closed with the answer.
func (s *Server) Get(ctx context.Context, path string) (*http.Response, error) {
	if s.spread != nil {
		if err := s.Processes[0].catchUp(ctx); err != nil {
			return nil, err
		}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL(path), nil)
	if err != nil {
		return nil, err
	}
	req.Close = true
	return http.DefaultClient.Do(req)
}

// Client is etcd's own client on this server, closed when the test ends.
func (s *Server) Client(t testing.TB) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{s.Address}, DialTimeout: 10 * time.Second})
	if err != nil {
		t.Fatalf("connect etcd's client to %s: %v", s.Name, err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// Stop ends the server as its operator would, before the test ends. It is not for one made by Several.
func (s *Server) Stop(t testing.TB) {
	t.Helper()
	if s.stop != nil {
		s.stop()
		return
	}
	s.Process.stopCleanly(t)
}

// dial connects the stubs. A nil config is plain text. It does not wait for the connection.
func (s *Server) dial(t testing.TB, config *tls.Config) {
	t.Helper()
	conn, err := Dial(s.Address, config)
	if err != nil {
		t.Fatalf("dial %s at %s: %v", s.Name, s.Address, err)
	}
	t.Cleanup(func() { conn.Close() })
	s.connect(conn)
}

// connect makes the stubs.
func (s *Server) connect(conn grpc.ClientConnInterface) {
	s.Conn = conn
	s.KV = pb.NewKVClient(conn)
	s.Watch = pb.NewWatchClient(conn)
	s.Lease = pb.NewLeaseClient(conn)
	s.Cluster = pb.NewClusterClient(conn)
	s.Maintenance = pb.NewMaintenanceClient(conn)
	s.Health = healthpb.NewHealthClient(conn)
}

// Dial opens a gRPC connection with the limits of etcd's own client (answers up to 2 GiB) and without
// its retries. A nil config is plain text.
func Dial(address string, config *tls.Config) (*grpc.ClientConn, error) {
	creds := insecure.NewCredentials()
	if config != nil {
		creds = credentials.NewTLS(config)
	}
	return grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(creds),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<31-1), grpc.MaxCallSendMsgSize(1<<31-1)),
		grpc.WithDisableRetry(),
	)
}
