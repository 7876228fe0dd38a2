package etcdapi

import (
	"context"
	"fmt"
	"net/http"
	"strings"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"github.com/tmc/grpc-websocket-proxy/wsproxy"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	gw "go.etcd.io/etcd/api/v3/etcdserverpb/gw"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	electiongw "go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb/gw"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
	lockgw "go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb/gw"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
)

// maxWebsocketMessage is the longest message on a websocket, in bytes (etcd: 0x7fffffff).
const maxWebsocketMessage = 1<<31 - 1

// Gateway serves the gRPC services as JSON below /v3/, with etcd's own mapping, streams as one JSON message per line or on a
// websocket. What comes in goes out again on conn, which leads to a gRPC server with these services: so the same interceptors
// see it. Who asks is not known from a client's certificate there, as in etcd. Warn is told what is wrong with a websocket.
func Gateway(conn grpc.ClientConnInterface, warn func(text string)) (http.Handler, error) {
	// Field names as in etcd's protobuf files, and nothing for fields that are not set.
	mux := runtime.NewServeMux(runtime.WithMarshalerOption(runtime.MIMEWildcard, &runtime.HTTPBodyMarshaler{Marshaler: &runtime.JSONPb{
		MarshalOptions:   protojson.MarshalOptions{UseProtoNames: true},
		UnmarshalOptions: protojson.UnmarshalOptions{DiscardUnknown: true},
	}}))
	ctx := context.Background()
	for _, err := range []error{
		gw.RegisterKVHandlerClient(ctx, mux, pb.NewKVClient(conn)),
		gw.RegisterWatchHandlerClient(ctx, mux, pb.NewWatchClient(conn)),
		gw.RegisterLeaseHandlerClient(ctx, mux, pb.NewLeaseClient(conn)),
		gw.RegisterClusterHandlerClient(ctx, mux, pb.NewClusterClient(conn)),
		gw.RegisterMaintenanceHandlerClient(ctx, mux, pb.NewMaintenanceClient(conn)),
		gw.RegisterAuthHandlerClient(ctx, mux, pb.NewAuthClient(conn)),
		lockgw.RegisterLockHandlerClient(ctx, mux, v3lockpb.NewLockClient(conn)),
		electiongw.RegisterElectionHandlerClient(ctx, mux, v3electionpb.NewElectionClient(conn)),
	} {
		if err != nil {
			return nil, fmt.Errorf("etcdapi: setting up the JSON gateway: %w", err)
		}
	}
	return wsproxy.WebsocketProxy(mux,
		// A websocket begins with a GET, the services are POSTs.
		wsproxy.WithRequestMutator(func(_, outgoing *http.Request) *http.Request {
			outgoing.Method = http.MethodPost
			return outgoing
		}),
		wsproxy.WithMaxRespBodyBufferSize(maxWebsocketMessage),
		wsproxy.WithLogger(websocketLogger{warn}),
	), nil
}

// websocketLogger is what wsproxy wants for a log.
type websocketLogger struct{ warn func(text string) }

func (l websocketLogger) Warnln(v ...any) { l.warn(strings.TrimSpace(fmt.Sprintln(v...))) }

// Debugln is said of each message that goes by.
func (l websocketLogger) Debugln(...any) {}
