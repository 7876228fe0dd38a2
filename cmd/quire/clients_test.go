package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
)

// whoHealth answers health checks and keeps the common name of who asked last.
type whoHealth struct {
	*health.Server
	mu sync.Mutex
	cn string
}

func (h *whoHealth) Check(ctx context.Context, r *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	p, _ := peer.FromContext(ctx)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.cn = "none"
	if info, ok := p.AuthInfo.(credentials.TLSInfo); ok && len(info.State.VerifiedChains) > 0 {
		h.cn = info.State.VerifiedChains[0][0].Subject.CommonName
	}
	return h.Server.Check(ctx, r)
}

func (h *whoHealth) lastCN() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.cn
}

type front struct {
	*clients
	who *whoHealth
	log *syncBuffer
}

// syncBuffer is a log to look into while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// waitFor waits until the log has text; what is logged after an answer comes when it comes.
func (b *syncBuffer) waitFor(t *testing.T, text string) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if strings.Contains(b.String(), text) {
			return
		}
	}
	t.Fatalf("the log has no %q:\n%s", text, b)
}

// startFront serves health over gRPC, and over HTTP the request's protocol, TLS state and path.
func startFront(t *testing.T, c *config) *front {
	t.Helper()
	logged := &syncBuffer{}
	c.LogLevel, c.LogFormat, c.LogOutputs = "debug", "json", []string{"stderr"}
	lg, _, err := newLogger(c, io.Discard, logged)
	if err != nil {
		t.Fatal(err)
	}
	var store *tlsStore
	if !c.TLS.empty() {
		if store, err = newTLSStore(c.TLS, lg); err != nil {
			t.Fatal(err)
		}
	}
	endpoints, err := endpointsOf(c, store != nil, lg)
	if err != nil {
		t.Fatal(err)
	}
	if err := open(t.Context(), endpoints, c); err != nil {
		t.Fatal(err)
	}
	who := &whoHealth{Server: health.NewServer()}
	g := grpc.NewServer(grpc.Creds(doorCredentials{}))
	healthpb.RegisterHealthServer(g, who)
	f := &front{who: who, log: logged}
	f.clients = newClients(lg, clientOptions{
		TLS: store, GRPC: g,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				t.Error(err)
			}
			fmt.Fprintf(w, "%s tls=%v %s %d", r.Proto, r.TLS != nil, r.URL.Path, len(body))
		}),
		Metrics:              http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "metrics") }),
		MaxConcurrentStreams: 1<<32 - 1,
	})
	f.serve(endpoints)
	t.Cleanup(func() {
		f.stopAccepting()
		f.close(5 * time.Second)
	})
	return f
}

func (f *front) address(i int) string { return f.endpoints[i].listener.Addr().String() }

func urlsOf(t *testing.T, s string) urlList {
	t.Helper()
	var l urlList
	if err := l.Set(s); err != nil {
		t.Fatal(err)
	}
	return l
}

func checkHealth(t *testing.T, target string, creds credentials.TransportCredentials) error {
	t.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for range 3 {
		if _, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
			return err
		}
	}
	return nil
}

// httpClient speaks exactly one version of HTTP.
func httpClient(t *testing.T, tc *tls.Config, h2 bool) *http.Client {
	tr := &http.Transport{TLSClientConfig: tc, Protocols: new(http.Protocols)}
	tr.Protocols.SetHTTP1(!h2)
	tr.Protocols.SetHTTP2(h2)
	tr.Protocols.SetUnencryptedHTTP2(h2)
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 10 * time.Second}
}

func post(c *http.Client, url string, size int) (string, error) {
	resp, err := c.Post(url, "application/json", bytes.NewReader(make([]byte, size)))
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

func TestOnePortServesEverything(t *testing.T) {
	dir := t.TempDir()
	ca := newAuthority(t, dir, "ca")
	certFile, keyFile := filepath.Join(dir, "c"), filepath.Join(dir, "k")
	ca.issue(2, "server", certFile, keyFile)

	c := &config{ListenClientURLs: urlsOf(t, "http://127.0.0.1:0,https://127.0.0.1:0"), TLS: tlsFiles{CertFile: certFile, KeyFile: keyFile}}
	f := startFront(t, c)
	if len(f.endpoints) != 1 {
		t.Fatalf("http and https of one port made %d listeners", len(f.endpoints))
	}
	addr := f.address(0)
	tc := &tls.Config{RootCAs: ca.pool()}
	if err := checkHealth(t, addr, insecure.NewCredentials()); err != nil {
		t.Errorf("gRPC without TLS: %v", err)
	}
	if err := checkHealth(t, addr, credentials.NewTLS(tc.Clone())); err != nil {
		t.Errorf("gRPC with TLS: %v", err)
	}
	for _, x := range []struct {
		scheme string
		h2     bool
		want   string
	}{
		{"http", false, "HTTP/1.1 tls=false /a"},
		{"http", true, "HTTP/2.0 tls=false /a"},
		{"https", false, "HTTP/1.1 tls=true /a"},
		{"https", true, "HTTP/2.0 tls=true /a"},
	} {
		client := httpClient(t, tc.Clone(), x.h2)
		// Several requests over one connection, with bodies beyond the initial window: it stays healthy.
		for _, size := range []int{0, 10, 200_000} {
			got, err := post(client, x.scheme+"://"+addr+"/a", size)
			if want := fmt.Sprintf("%s %d", x.want, size); err != nil || got != want {
				t.Errorf("%s, HTTP/2 %v: got %q, %v; want %q", x.scheme, x.h2, got, err, want)
			}
		}
	}
	// HTTP/1.0, which curl --http1.0 offers alone.
	old, err := tls.Dial("tcp", addr, &tls.Config{RootCAs: ca.pool(), NextProtos: []string{"http/1.0"}})
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	if _, err := io.WriteString(old, "GET /a HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(old); err != nil || !strings.HasSuffix(string(got), "HTTP/1.0 tls=true /a 0") {
		t.Errorf("HTTP/1.0: got %q, %v", got, err)
	}
	// Both protocols negotiable, as curl offers them.
	both := &http.Client{Transport: &http.Transport{TLSClientConfig: tc.Clone(), ForceAttemptHTTP2: true}, Timeout: 10 * time.Second}
	t.Cleanup(both.CloseIdleConnections)
	if got, err := post(both, "https://"+addr+"/a", 1); err != nil || got != "HTTP/2.0 tls=true /a 1" {
		t.Errorf("https with ALPN: got %q, %v", got, err)
	}
	for _, want := range []string{"ready to serve client requests", "serving client traffic insecurely; this is strongly discouraged!",
		"serving client traffic securely", `"traffic":"grpc+http"`} {
		f.log.waitFor(t, want)
	}
}

// A gRPC client that connects early and stays silent is served when it speaks at last.
func TestIdleGRPCConnection(t *testing.T) {
	f := startFront(t, &config{ListenClientURLs: urlsOf(t, "http://127.0.0.1:0")})
	conn, err := grpc.NewClient(f.address(0), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.Connect()
	time.Sleep(requestTimeout + 200*time.Millisecond) // the point: longer than the door waits for a request
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
		t.Error(err)
	}
}

func TestSilentConnectionsDoNotHoldUpStopping(t *testing.T) {
	f := startFront(t, &config{ListenClientURLs: urlsOf(t, "http://127.0.0.1:0")})
	var conns []net.Conn
	for range 3 {
		c, err := net.Dial("tcp", f.address(0))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
	}
	begin := time.Now()
	f.stopAccepting()
	f.close(time.Second)
	if took := time.Since(begin); took > 3*time.Second {
		t.Errorf("stopping took %v", took)
	}
	for _, c := range conns {
		if err := c.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a connection is left open: %v", err)
		}
	}
}

func TestSplitHTTPAndUnixSockets(t *testing.T) {
	t.Chdir(t.TempDir())
	c := &config{
		ListenClientURLs:     urlsOf(t, "unix://localhost:20000"),
		ListenClientHTTPURLs: urlsOf(t, "http://127.0.0.1:0"),
		ListenMetricsURLs:    urlsOf(t, "http://localhost:0"),
	}
	f := startFront(t, c)
	if err := checkHealth(t, "unix:localhost:20000", insecure.NewCredentials()); err != nil {
		t.Errorf("gRPC over a socket file: %v", err)
	}
	if got, err := post(httpClient(t, nil, false), "http://"+f.address(1)+"/a", 0); err != nil || got != "HTTP/1.1 tls=false /a 0" {
		t.Errorf("HTTP on its own port: %q, %v", got, err)
	}
	if got, err := post(httpClient(t, nil, true), "http://"+f.address(1)+"/a", 70000); err != nil || got != "HTTP/2.0 tls=false /a 70000" {
		t.Errorf("HTTP/2 on the HTTP port: %q, %v", got, err)
	}
	if got, err := post(httpClient(t, nil, false), "http://"+f.address(2)+"/a", 0); err != nil || got != "metrics" {
		t.Errorf("metrics port: %q, %v", got, err)
	}
	if err := checkHealth(t, f.address(1), insecure.NewCredentials()); err == nil {
		t.Error("gRPC is served on --listen-client-http-urls")
	}
	over := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", "localhost:20000")
	}}}
	if got, err := post(over, "http://x/a", 0); err == nil {
		t.Errorf("HTTP is served on --listen-client-urls although it has a port of its own: %q", got)
	}
}

func TestEndpointMistakes(t *testing.T) {
	for _, x := range []struct {
		c    config
		tls  bool
		want string
	}{
		{c: config{ListenClientURLs: urlsOf(t, "https://127.0.0.1:1")}, want: "TLS key/cert (--cert-file, --key-file) must be provided for client url https://127.0.0.1:1 with HTTPS scheme"},
		{c: config{ListenMetricsURLs: urlsOf(t, "https://127.0.0.1:1")}, want: "client TLS key/cert (--cert-file, --key-file) must be provided for metrics secure url"},
		{c: config{ListenClientURLs: urlsOf(t, "http://127.0.0.1:1"), ListenClientHTTPURLs: urlsOf(t, "http://127.0.0.1:1")}, want: "cannot bind both"},
		{c: config{ListenClientURLs: urlsOf(t, "http://127.0.0.1:1"), ListenMetricsURLs: urlsOf(t, "http://127.0.0.1:1")}, want: "cannot bind --listen-metrics-urls"},
	} {
		if _, err := endpointsOf(&x.c, x.tls, zap.NewNop()); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("error %v, want %q", err, x.want)
		}
	}
	// A file that is no socket is not ours to remove.
	path := filepath.Join(t.TempDir(), "precious")
	writeFile(t, path, []byte("data"))
	c := &config{ListenClientURLs: urlsOf(t, "unix://"+path)}
	endpoints, err := endpointsOf(c, false, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	if err := open(t.Context(), endpoints, c); err == nil || !strings.Contains(err.Error(), "is not a socket") {
		t.Errorf("listening on a regular file: %v", err)
	}
	if data, err := os.ReadFile(path); err != nil || string(data) != "data" {
		t.Errorf("the file is gone: %q, %v", data, err)
	}
}

func TestPortInUse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := &config{ListenClientURLs: urlsOf(t, "http://127.0.0.1:0,http://"+l.Addr().String())}
	endpoints, err := endpointsOf(c, false, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	err = open(t.Context(), endpoints, c)
	if err == nil || !strings.Contains(err.Error(), "cannot listen on http://"+l.Addr().String()) {
		t.Fatalf("error %v", err)
	}
}
