package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"

	"go.uber.org/zap"
)

// endpoint is one address that is listened on, with all URLs that name it: http and https may share a port.
type endpoint struct {
	network, address string
	plain, secure    bool
	grpc, http       bool
	metrics          bool // only metrics and health are served
	url              string
	listener         net.Listener
}

// traffic is the word that etcd logs for what is served.
func (e *endpoint) traffic() string {
	switch {
	case e.grpc && e.http:
		return "grpc+http"
	case e.grpc:
		return "grpc"
	default:
		return "http"
	}
}

// errNoMetricsTLS has the text of etcd's ErrMissingClientTLSInfoForMetricsURL, which its tests look for.
var errNoMetricsTLS = errors.New("client TLS key/cert (--cert-file, --key-file) must be provided for metrics secure url")

// endpointsOf groups the URLs by address. haveTLS tells whether there is a certificate.
func endpointsOf(c *config, haveTLS bool, lg *zap.Logger) ([]*endpoint, error) {
	var all []*endpoint
	add := func(u url.URL) *endpoint {
		network, address := socket(u)
		for _, e := range all {
			if e.network == network && e.address == address {
				return e
			}
		}
		e := &endpoint{network: network, address: address, url: u.String()}
		all = append(all, e)
		return e
	}
	for _, u := range slices.Concat(c.ListenClientURLs, c.ListenClientHTTPURLs) {
		if secure(u) && !haveTLS {
			return nil, fmt.Errorf("TLS key/cert (--cert-file, --key-file) must be provided for client url %s with HTTPS scheme", u.String())
		}
		if !secure(u) && haveTLS {
			lg.Warn("scheme is http or unix while key and cert files are present; ignoring key and cert files", zap.String("client-url", u.String()))
		}
		if !secure(u) && c.TLS.ClientCertAuth {
			lg.Warn("scheme is http or unix while --client-cert-auth is enabled; ignoring client cert auth for this URL", zap.String("client-url", u.String()))
		}
	}
	split := len(c.ListenClientHTTPURLs) > 0
	for _, u := range c.ListenClientURLs {
		e := add(u)
		e.grpc, e.http = true, !split
		e.secure, e.plain = e.secure || secure(u), e.plain || !secure(u)
	}
	for _, u := range c.ListenClientHTTPURLs {
		e := add(u)
		if e.grpc {
			return nil, fmt.Errorf("cannot bind both --listen-client-urls and --listen-client-http-urls on the same url %s", u.String())
		}
		e.http = true
		e.secure, e.plain = e.secure || secure(u), e.plain || !secure(u)
	}
	for _, u := range c.ListenMetricsURLs {
		if secure(u) && !haveTLS {
			return nil, errNoMetricsTLS
		}
		e := add(u)
		if e.grpc || (e.http && !e.metrics) {
			return nil, fmt.Errorf("cannot bind --listen-metrics-urls on the same url as client traffic: %s", u.String())
		}
		e.metrics, e.http = true, true
		e.secure, e.plain = e.secure || secure(u), e.plain || !secure(u)
	}
	return all, nil
}

// open listens on every endpoint, or on none when one fails.
func open(ctx context.Context, endpoints []*endpoint, c *config) error {
	lc := net.ListenConfig{Control: socketControl(c.SocketReusePort, c.SocketReuseAddress)}
	for i, e := range endpoints {
		err := error(nil)
		if e.network == "unix" {
			err = removeStaleSocket(e.address)
		}
		if err == nil {
			e.listener, err = lc.Listen(ctx, e.network, e.address)
		}
		if err != nil {
			for _, opened := range endpoints[:i] {
				err = errors.Join(err, opened.listener.Close())
			}
			return fmt.Errorf("cannot listen on %s: %w", e.url, err)
		}
	}
	return nil
}

// removeStaleSocket removes the socket file that a killed process left behind, and nothing that is not a socket.
func removeStaleSocket(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s exists and is not a socket; remove it or listen elsewhere", path)
	}
	return os.Remove(path)
}

// clientHandler adds to api what is not etcd's API.
func clientHandler(api http.Handler, gate *gateway, debug debugPages) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", api)
	if gate != nil {
		mux.Handle("/v3/", gate)
	}
	debug.install(mux)
	return mux
}

// metricsHandler is the part of api that --listen-metrics-urls serves.
func metricsHandler(api http.Handler) http.Handler {
	mux := http.NewServeMux()
	for _, path := range []string{"/metrics", "/health", "/livez", "/livez/", "/readyz", "/readyz/"} {
		mux.Handle(path, api)
	}
	return mux
}
