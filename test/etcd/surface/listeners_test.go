package surface

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/quire-db/quire/test/etcd/start"
	"github.com/quire-db/quire/test/ports"
)

// speaks says how an address can be used: HTTP and gRPC, without TLS and with it.
func speaks(t *testing.T, network, address string, config *tls.Config) string {
	t.Helper()
	var can []string
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, address)
	}
	for _, c := range []struct {
		scheme string
		creds  credentials.TransportCredentials
	}{{"http", insecure.NewCredentials()}, {"https", credentials.NewTLS(config)}} {
		for _, path := range []string{"/version", "/v3/kv/range"} {
			transport := &http.Transport{DialContext: dial, TLSClientConfig: config}
			client := &http.Client{Transport: transport, Timeout: 5 * time.Second}
			if resp, err := client.Post(c.scheme+"://127.0.0.1"+path, "application/json", strings.NewReader(`{"key":"AA=="}`)); err == nil {
				can = append(can, fmt.Sprintf("%s%s %d", c.scheme, path, resp.StatusCode))
				resp.Body.Close()
			}
			transport.CloseIdleConnections()
		}
		conn, err := grpc.NewClient("passthrough:///127.0.0.1", grpc.WithTransportCredentials(c.creds),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dial(ctx, "", "") }))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		if _, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte("k")}); err == nil {
			can = append(can, c.scheme+" gRPC")
		}
		cancel()
		conn.Close()
	}
	return strings.Join(can, ", ")
}

// TestListeners: what is spoken on each of the addresses that the flags name.
func TestListeners(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	p := a.pair(t, "server", "localhost")
	config := &tls.Config{RootCAs: a.pool}
	withTLS := []string{"--cert-file=" + p.certFile, "--key-file=" + p.keyFile}
	const (
		plain  = "http/version 405, http/v3/kv/range 200, http gRPC"
		secure = "https/version 405, https/v3/kv/range 200, https gRPC"
	)
	onBoth(t, func(t *testing.T, program program) {
		for _, c := range []struct {
			name  string
			flags func(one, other, socket string) []string
			one   string
			other string
			unix  string
		}{
			{name: "one port for both", one: plain + ", " + secure, flags: func(one, _, _ string) []string {
				return append(withTLS, "--listen-client-urls=http://"+one+",https://"+one)
			}},
			{name: "TLS alone", one: secure, flags: func(one, _, _ string) []string { return append(withTLS, "--listen-client-urls=https://"+one) }},
			{name: "HTTP apart from gRPC", one: "http gRPC", other: "http/version 405, http/v3/kv/range 200", flags: func(one, other, _ string) []string {
				return []string{"--listen-client-urls=http://" + one, "--listen-client-http-urls=http://" + other}
			}},
			{name: "HTTP apart from gRPC, with TLS", one: "https gRPC", other: "https/version 405, https/v3/kv/range 200", flags: func(one, other, _ string) []string {
				return append(withTLS, "--listen-client-urls=https://"+one, "--listen-client-http-urls=https://"+other)
			}},
			{name: "metrics with TLS", one: plain, other: "https/version 404, https/v3/kv/range 404", flags: func(one, other, _ string) []string {
				return append(withTLS, "--listen-client-urls=http://"+one, "--listen-metrics-urls=https://"+other)
			}},
			{name: "no gateway", one: "http/version 405, http/v3/kv/range 404, http gRPC", flags: func(one, _, _ string) []string {
				return []string{"--listen-client-urls=http://" + one, "--enable-grpc-gateway=false"}
			}},
			{name: "a socket file", unix: plain, one: plain, flags: func(one, _, socket string) []string {
				return []string{"--listen-client-urls=unix://" + socket + ",http://" + one}
			}},
			{name: "a socket file with TLS", unix: secure, one: plain, flags: func(one, _, socket string) []string {
				return append(withTLS, "--listen-client-urls=unixs://"+socket+",http://"+one)
			}},
		} {
			t.Run(c.name, func(t *testing.T) {
				one, other, socket := ports.FreeAddress(t), ports.FreeAddress(t), filepath.Join(t.TempDir(), "s")
				s := program.start(t, 1, c.flags(one, other, socket)...)[0]
				for _, x := range []struct{ network, address, want string }{{"tcp", one, c.one}, {"tcp", other, c.other}, {"unix", socket, c.unix}} {
					if got := speaks(t, x.network, x.address, config); got != x.want {
						t.Errorf("%s speaks %q, want %q", x.address, got, x.want)
					}
				}
				s.Stop(20 * time.Second)
			})
		}
	})
}

// TestMetricsWithTLSNeedACertificate, and say so as etcd does.
func TestMetricsWithTLSNeedACertificate(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, p program) {
		address := ports.FreeAddress(t)
		s := start.RunProgram(t, p.path, nil, "--data-dir="+filepath.Join(t.TempDir(), "d"), "--listen-client-urls=http://"+address,
			"--advertise-client-urls=http://"+address, "--listen-peer-urls=http://127.0.0.1:0", "--listen-metrics-urls=https://"+ports.FreeAddress(t))
		code, err := s.Wait(30 * time.Second)
		if err != nil || code == 0 {
			t.Fatalf("status %d (%v)", code, err)
		}
		if want := "client TLS key/cert (--cert-file, --key-file) must be provided for metrics secure url"; len(s.Lines(want)) == 0 {
			t.Errorf("the log does not say %q:\n%s", want, s.Output())
		}
	})
}

// TestClientCertificates: who is let in, under each of the flags about it.
func TestClientCertificates(t *testing.T) {
	t.Parallel()
	a, stranger := newAuthority(t), newAuthority(t)
	server := a.pair(t, "server", "localhost")
	good, bad, foreign := a.pair(t, "good", "good.example"), a.pair(t, "bad", "bad.example"), stranger.pair(t, "good", "good.example")
	files := []string{"--cert-file=" + server.certFile, "--key-file=" + server.keyFile}
	onBoth(t, func(t *testing.T, p program) {
		for _, c := range []struct {
			name  string
			flags []string
			want  string // of those let in
		}{
			{"nobody is asked", nil, "nobody good bad foreign TLS1.2 TLS1.3"},
			{"a CA alone", []string{"--trusted-ca-file=" + a.file}, "good bad"},
			{"client-cert-auth", []string{"--trusted-ca-file=" + a.file, "--client-cert-auth"}, "good bad"},
			{"a host name", []string{"--trusted-ca-file=" + a.file, "--client-cert-auth", "--client-cert-allowed-hostname=other.example,good.example"}, "good"},
			{"a revocation list", []string{"--trusted-ca-file=" + a.file, "--client-cert-auth", "--client-crl-file=" + a.revoke(t, bad)}, "good"},
			{"an old version", []string{"--tls-max-version=TLS1.2"}, "nobody good bad foreign TLS1.2"},
			{"a new version", []string{"--tls-min-version=TLS1.3"}, "nobody good bad foreign TLS1.3"},
			{"a cipher suite", []string{"--tls-max-version=TLS1.2", "--cipher-suites=TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"}, "nobody good bad foreign TLS1.2"},
			{"a cipher suite that the certificate does not fit", []string{"--tls-max-version=TLS1.2", "--cipher-suites=TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"}, ""},
		} {
			t.Run(c.name, func(t *testing.T) {
				address := ports.FreeAddress(t)
				s := p.start(t, 1, slices.Concat(files, []string{"--listen-client-urls=http://" + ports.FreeAddress(t) + ",https://" + address}, c.flags)...)[0]
				var in []string
				for _, client := range []struct {
					name   string
					config *tls.Config
				}{
					{"nobody", &tls.Config{}}, {"good", holding(good)}, {"bad", holding(bad)}, {"foreign", holding(foreign)},
					{"TLS1.2", &tls.Config{MaxVersion: tls.VersionTLS12}}, {"TLS1.3", &tls.Config{MinVersion: tls.VersionTLS13}},
				} {
					client.config.RootCAs = a.pool
					transport := &http.Transport{TLSClientConfig: client.config}
					if resp, err := (&http.Client{Transport: transport, Timeout: 5 * time.Second}).Get("https://" + address + "/version"); err == nil {
						if _, err := io.Copy(io.Discard, resp.Body); err == nil && resp.StatusCode == http.StatusOK {
							in = append(in, client.name)
						}
						resp.Body.Close()
					}
					transport.CloseIdleConnections()
				}
				if got := strings.Join(in, " "); got != c.want {
					t.Errorf("let in are %q, want %q", got, c.want)
				}
				if !strings.HasPrefix(c.want, "nobody") {
					eventually(t, "the rejection is logged", func() bool { return len(s.Lines("rejected connection on client endpoint")) > 0 })
				}
				s.Stop(20 * time.Second)
			})
		}
	})
}

func holding(p pair) *tls.Config {
	return &tls.Config{GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &p.Certificate, nil }}
}

// TestAutoTLS: the generated certificate lasts as long as asked for.
func TestAutoTLS(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, p program) {
		address := ports.FreeAddress(t)
		s := p.start(t, 1, "--auto-tls", "--self-signed-cert-validity=2", "--listen-client-urls=https://"+address)[0]
		conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		cert := conn.ConnectionState().PeerCertificates[0]
		if years := time.Until(cert.NotAfter).Hours() / 24 / 365; years < 1.9 || years > 2.1 {
			t.Errorf("the certificate lasts for %.1f years, want 2", years)
		}
		if err := cert.VerifyHostname("127.0.0.1"); err != nil {
			t.Error(err)
		}
		if cert.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
			t.Errorf("its key is for %v", cert.KeyUsage)
		}
		s.Stop(20 * time.Second)
	})
}
