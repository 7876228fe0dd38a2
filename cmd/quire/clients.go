package main

import (
	"context"
	"crypto/tls"
	"errors"
	"math"
	"net"
	"net/http"
	"sync"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// clients serves all endpoints: one gRPC server and one HTTP server for client traffic, one HTTP server for metrics,
// and a door per endpoint that sorts connections among them.
type clients struct {
	lg        *zap.Logger
	endpoints []*endpoint // that are served
	doors     []*door
	tls       *tlsStore
	grpc      *grpc.Server
	http      *http.Server
	metrics   *http.Server
	queues    []*connQueue
	gateway   *gateway // nil: none

	// failed receives the first error that ends one of the servers.
	failed chan error
	wg     sync.WaitGroup
}

// clientOptions: TLS is nil without a certificate; handler and metrics are the HTTP handlers.
type clientOptions struct {
	TLS                  *tlsStore
	GRPC                 *grpc.Server // made with doorCredentials
	Handler, Metrics     http.Handler
	Gateway              *gateway // is closed with the servers; nil: none
	MaxConcurrentStreams uint32
}

func newClients(lg *zap.Logger, o clientOptions) *clients {
	c := &clients{lg: lg, tls: o.TLS, grpc: o.GRPC, gateway: o.Gateway, failed: make(chan error, 1)}
	if c.gateway != nil {
		c.run(func() error { return c.grpc.Serve(c.gateway.listener) })
	}
	newHTTP := func(h http.Handler) *http.Server {
		s := &http.Server{
			Handler:           fillTLS(h),
			ReadHeaderTimeout: firstByteTimeout,
			ConnContext:       withTLSState,
			// net/http's complaints are about what clients send.
			ErrorLog:  stdLogger(lg),
			Protocols: new(http.Protocols),
			// Values above MaxInt32 would fall back to 250.
			HTTP2: &http.HTTP2Config{MaxConcurrentStreams: int(min(o.MaxConcurrentStreams, math.MaxInt32))},
		}
		s.Protocols.SetHTTP1(true)
		s.Protocols.SetUnencryptedHTTP2(true) // as the door hands it over, decrypted
		return s
	}
	c.http, c.metrics = newHTTP(o.Handler), newHTTP(o.Metrics)
	return c
}

// serve starts serving on endpoints that are open already. It may be called again with others.
func (c *clients) serve(endpoints []*endpoint) {
	queue := func(e *endpoint) *connQueue {
		q := newConnQueue(e.listener.Addr())
		c.queues = append(c.queues, q)
		return q
	}
	for _, e := range endpoints {
		d := &door{plain: e.plain, rejected: c.rejected, acceptFailed: c.acceptFailed}
		if e.secure {
			d.tlsConfig = c.tls.current
		}
		if e.grpc {
			d.grpc = queue(e)
			c.run(func() error { return c.grpc.Serve(d.grpc) })
		}
		if e.http {
			s := c.http
			if e.metrics {
				s = c.metrics
			}
			d.http = queue(e)
			c.run(func() error { return s.Serve(d.http) })
		}
		c.endpoints, c.doors = append(c.endpoints, e), append(c.doors, d)
		c.run(func() error { return d.serve(e.listener) })

		if e.metrics {
			c.lg.Info("serving metrics", zap.String("address", e.url))
			continue
		}
		// Both lines are etcd's; tools wait for them.
		c.lg.Info("ready to serve client requests")
		if e.plain {
			c.lg.Info("serving client traffic insecurely; this is strongly discouraged!",
				zap.String("traffic", e.traffic()), zap.String("address", e.listener.Addr().String()))
		}
		if e.secure {
			c.lg.Info("serving client traffic securely",
				zap.String("traffic", e.traffic()), zap.String("address", e.listener.Addr().String()))
		}
	}
}

func (c *clients) run(serve func() error) {
	c.wg.Go(func() {
		err := serve()
		if err == nil || errors.Is(err, http.ErrServerClosed) || errors.Is(err, grpc.ErrServerStopped) || errors.Is(err, net.ErrClosed) {
			return
		}
		select {
		case c.failed <- err:
		default:
		}
	})
}

// stopAccepting closes the listeners; connections stay.
func (c *clients) stopAccepting() {
	for _, e := range c.endpoints {
		if err := e.listener.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			c.lg.Warn("closing client listener", zap.String("address", e.url), zap.Error(err))
		}
	}
	for _, d := range c.doors {
		d.close()
	}
}

// close ends the requests that are running: those that are not answered within grace are cut off.
// REQUIRES: stopAccepting was called.
func (c *clients) close(grace time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	servers := []*http.Server{c.http, c.metrics}
	var wg, pages sync.WaitGroup
	for _, s := range servers {
		pages.Go(func() {
			if s.Shutdown(ctx) != nil {
				// Only because time is up. Close's error is about listeners, which are closed.
				_ = s.Close()
			}
		})
	}
	wg.Go(func() {
		pages.Wait()
		if c.gateway == nil {
			return
		}
		// The gRPC server waits for this connection to end.
		if err := c.gateway.close(); err != nil {
			c.lg.Warn("closing the connection of the JSON gateway", zap.Error(err))
		}
	})
	wg.Go(func() {
		stopped := make(chan struct{})
		go func() {
			c.grpc.GracefulStop()
			close(stopped)
		}()
		select {
		case <-stopped:
		case <-ctx.Done():
			c.grpc.Stop() // makes GracefulStop return
			<-stopped
		}
	})
	wg.Wait()
	for _, q := range c.queues {
		_ = q.Close() // never fails; the servers have closed those that they accepted from
	}
	c.wg.Wait()
}

func (c *clients) rejected(conn *tls.Conn, err error) {
	logRejected(c.lg, "rejected connection on client endpoint", conn, err)
}

func (c *clients) acceptFailed(err error, retryIn time.Duration) {
	c.lg.Warn("cannot accept connections; check the limit on open files", zap.Duration("retry-in", retryIn), zap.Error(err))
}
