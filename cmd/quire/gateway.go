package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"

	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/quire-db/quire/etcdapi"
)

// gateway is the JSON gateway and its own connection to the gRPC server, which never leaves the process.
type gateway struct {
	http.Handler
	listener *bufconn.Listener
	conn     *grpc.ClientConn
}

// gatewayBuffer is what waits in each direction, in bytes.
const gatewayBuffer = 1 << 20

func newGateway(lg *zap.Logger) (*gateway, error) {
	g := &gateway{listener: bufconn.Listen(gatewayBuffer)}
	var err error
	g.conn, err = grpc.NewClient("passthrough:///gateway", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return g.listener.DialContext(ctx) }),
		// The server's limits are enough.
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32), grpc.MaxCallSendMsgSize(math.MaxInt32)))
	if err != nil {
		return nil, fmt.Errorf("the JSON gateway cannot connect: %w", err)
	}
	g.Handler, err = etcdapi.Gateway(g.conn, func(text string) { lg.Warn("websocket of the JSON gateway", zap.String("reason", text)) })
	if err != nil {
		return nil, errors.Join(err, g.conn.Close())
	}
	return g, nil
}

// close ends the connection. REQUIRES: the HTTP server has ended, and with it who uses it.
func (g *gateway) close() error { return g.conn.Close() }
