package main

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
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
	endpoints []*endpoint
	doors     []*door
	grpc      *grpc.Server
	http      *http.Server
	metrics   *http.Server
	queues    []*connQueue

	// failed receives the first error that ends one of the servers.
	failed chan error
	wg     sync.WaitGroup
}

// clientOptions: store is nil without a certificate; handler and metrics are the HTTP handlers.
type clientOptions struct {
	Endpoints            []*endpoint // opened
	TLS                  *tlsStore
	GRPC                 *grpc.Server // made with doorCredentials
	Handler, Metrics     http.Handler
	MaxConcurrentStreams uint32
}

// serveClients starts serving on endpoints that are open already.
func serveClients(lg *zap.Logger, o clientOptions) *clients {
	c := &clients{lg: lg, endpoints: o.Endpoints, grpc: o.GRPC, failed: make(chan error, 1)}
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
	queue := func(e *endpoint) *connQueue {
		q := newConnQueue(e.listener.Addr())
		c.queues = append(c.queues, q)
		return q
	}
	c.http, c.metrics = newHTTP(o.Handler), newHTTP(o.Metrics)
	for _, e := range o.Endpoints {
		d := &door{plain: e.plain, rejected: c.rejected, acceptFailed: c.acceptFailed}
		if e.secure {
			d.tlsConfig = o.TLS.current
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
		c.doors = append(c.doors, d)
		c.run(func() error { return d.serve(e.listener) })

		if e.metrics {
			lg.Info("serving metrics", zap.String("address", e.url))
			continue
		}
		// Both lines are etcd's; tools wait for them.
		lg.Info("ready to serve client requests")
		if e.plain {
			lg.Info("serving client traffic insecurely; this is strongly discouraged!",
				zap.String("traffic", e.traffic()), zap.String("address", e.listener.Addr().String()))
		}
		if e.secure {
			lg.Info("serving client traffic securely",
				zap.String("traffic", e.traffic()), zap.String("address", e.listener.Addr().String()))
		}
	}
	return c
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
	var wg sync.WaitGroup
	for _, s := range []*http.Server{c.http, c.metrics} {
		wg.Go(func() {
			if s.Shutdown(ctx) != nil {
				// Only because time is up. Close's error is about listeners, which are closed.
				_ = s.Close()
			}
		})
	}
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

// rejected logs what etcd logs, with its fields, so that what watches its log for intruders goes on working.
func (c *clients) rejected(conn *tls.Conn, err error) {
	log := c.lg.Warn
	if errors.Is(err, io.EOF) {
		log = c.lg.Debug // port scanners and load balancers connect and leave
	}
	state := conn.ConnectionState()
	fields := []zap.Field{zap.String("remote-addr", conn.RemoteAddr().String()), zap.String("server-name", state.ServerName)}
	if len(state.PeerCertificates) > 0 {
		cert := state.PeerCertificates[0]
		ips := make([]string, len(cert.IPAddresses))
		for i, ip := range cert.IPAddresses {
			ips[i] = ip.String()
		}
		fields = append(fields, zap.Strings("ip-addresses", ips), zap.Strings("dns-names", cert.DNSNames))
	}
	log("rejected connection on client endpoint", append(fields, zap.Error(err))...)
}

func (c *clients) acceptFailed(err error, retryIn time.Duration) {
	c.lg.Warn("cannot accept connections; check the limit on open files", zap.Duration("retry-in", retryIn), zap.Error(err))
}
