package sqlraft

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quire-db/quire/backend"
)

// testCA signs certificates.
type testCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newTestCA(t testing.TB, name string) *testCA {
	t.Helper()
	ca := &testCA{pool: x509.NewCertPool()}
	ca.cert, ca.key = ca.sign(t, &x509.Certificate{Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotAfter: time.Now().Add(time.Hour)})
	ca.pool.AddCert(ca.cert)
	return ca
}

func (ca *testCA) sign(t testing.TB, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber, template.NotBefore = big.NewInt(time.Now().UnixNano()), time.Now().Add(-2*time.Hour)
	parent, signer := ca.cert, ca.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// config is for servers and for clients: the certificate is valid for 127.0.0.1 and localhost.
func (ca *testCA) config(t testing.TB, cn string) *tls.Config {
	return ca.configUntil(t, cn, time.Now().Add(time.Hour))
}

func (ca *testCA) configUntil(t testing.TB, cn string, end time.Time) *tls.Config {
	t.Helper()
	cert, key := ca.sign(t, &x509.Certificate{Subject: pkix.Name{CommonName: cn}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		DNSNames: []string{"localhost"}, NotAfter: end, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}})
	return &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{cert.Raw}, PrivateKey: key}},
		RootCAs:      ca.pool, ClientCAs: ca.pool, ClientAuth: tls.RequireAndVerifyClientCert,
	}
}

// newSecureMember listens with TLS.
func newSecureMember(t testing.TB, id uint64, server, client *tls.Config) *testMember {
	t.Helper()
	return newRotatingMember(t, id, func() *tls.Config { return server }, func() *tls.Config { return client })
}

func newRotatingMember(t testing.TB, id uint64, server, client func() *tls.Config, change ...func(*transportOptions)) *testMember {
	t.Helper()
	m := newTestMember(t, id, "127.0.0.1:0", func(o *transportOptions) {
		for _, c := range change {
			c(o)
		}
		o.clientTLS = client
		o.listeners[0] = tls.NewListener(o.listeners[0], &tls.Config{
			GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return server(), nil }})
	})
	m.url = strings.Replace(m.url, "http://", "https://", 1)
	return m
}

func TestTLS(t *testing.T) {
	ca := newTestCA(t, "ca")
	var all []*testMember
	for id := range uint64(3) {
		all = append(all, newSecureMember(t, id+1, ca.config(t, "n"), ca.config(t, "n")))
	}
	introduce(all...)
	connectedToEachOther(t, all...)
	big := entries(1, 2, 1, 20<<20)
	for i := range big.message.Entries[0].Data {
		big.message.Entries[0].Data[i] = byte(i * 7)
	}
	all[0].send([]packet{heartbeat(1, 2, 1), big, entries(1, 2, 2, 10), heartbeat(1, 2, 2)})
	eventually(t, "everything arrives through TLS", func() bool { return with(all[1], func() bool { return len(all[1].mu.got) == 4 }) })
	got := with(all[1], func() []packet { return all[1].mu.got })
	if i := slices.IndexFunc(got, func(p packet) bool { return laneOf(&p) == bulk }); !samePacket(&got[i], &big) {
		t.Error("20 MiB came out differently")
	}
	all[1].mu.serve = nil
	var remote *remoteError
	if _, err := all[0].request(t.Context(), 2, "x", nil); !errors.As(err, &remote) {
		t.Errorf("a request through TLS: %v", err)
	}
}

func TestTLSThroughASocketFile(t *testing.T) {
	ca := newTestCA(t, "ca")
	dir := t.TempDir()
	var all []*testMember
	for id, name := range []string{"a", "b"} {
		config := ca.config(t, "n")
		m := newTestMember(t, uint64(id+1), filepath.Join(dir, name), func(o *transportOptions) {
			o.listeners[0] = tls.NewListener(o.listeners[0], config)
			o.clientTLS = func() *tls.Config { return config }
		})
		m.url = strings.Replace(m.url, "unix://", "unixs://", 1)
		all = append(all, m)
	}
	introduce(all...)
	connectedToEachOther(t, all...)
	var remote *remoteError
	if _, err := all[0].request(t.Context(), 2, "x", nil); !errors.As(err, &remote) {
		t.Errorf("a request through TLS on a socket file: %v", err)
	}
}

// TestTLSMistakes: nobody gets in, and the log says why.
func TestTLSMistakes(t *testing.T) {
	ca, other := newTestCA(t, "ca"), newTestCA(t, "other")
	good := ca.config(t, "n")
	expired := ca.configUntil(t, "n", time.Now().Add(-time.Minute))
	nobody := ca.config(t, "n")
	nobody.Certificates = nil
	cn := ca.config(t, "n")
	cn.VerifyConnection = func(s tls.ConnectionState) error {
		if s.PeerCertificates[0].Subject.CommonName != "member" {
			return errors.New("client certificate authentication failed")
		}
		return nil
	}
	name := ca.config(t, "n")
	name.ServerName = "elsewhere.example"
	for what, x := range map[string]struct {
		server, client *tls.Config
		want           string
	}{
		"server of another CA":     {other.config(t, "n"), good, "certificate signed by unknown authority"},
		"client of another CA":     {good, &tls.Config{RootCAs: ca.pool, Certificates: other.config(t, "n").Certificates}, "remote error: tls: "},
		"expired server":           {expired, good, "certificate has expired"},
		"expired client":           {good, expired, "remote error: tls: "},
		"client without":           {good, nobody, "remote error: tls: certificate required"},
		"client with another name": {cn, good, "remote error: tls: bad certificate"},
		"server with another name": {good, name, "certificate is valid for localhost, not elsewhere.example"},
		"no TLS configured":        {good, nil, "--peer-cert-file"},
	} {
		server := newSecureMember(t, 2, x.server, good)
		var client *testMember
		if x.client == nil {
			client = newTestMember(t, 1, "127.0.0.1:0", nil)
		} else {
			client = newSecureMember(t, 1, good, x.client)
		}
		client.setPeers([]backend.Member{{ID: 2, PeerURLs: []string{server.url}}})
		eventually(t, what+" is told", func() bool {
			return with(client, func() bool {
				return slices.ContainsFunc(client.mu.unreached, func(s string) bool { return strings.Contains(s, x.want) })
			})
		})
		if n := with(client, func() int { return len(client.mu.unreached) }); n > 3 {
			t.Errorf("%s is told %d times: %q", what, n, client.mu.unreached)
		}
		if _, err := client.request(t.Context(), 2, "x", nil); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: a request ended with %v", what, err)
		}
		client.send([]packet{heartbeat(1, 2, 1)})
		eventually(t, "what was sent is reported", func() bool { return with(client, func() bool { return client.mu.unreachable[2] > 0 }) })
	}
}

// TestCertificatesRotate while the cluster runs: each new connection has what is valid then.
func TestCertificatesRotate(t *testing.T) {
	before, after := newTestCA(t, "before"), newTestCA(t, "after")
	var now atomic.Pointer[tls.Config]
	now.Store(before.config(t, "n"))
	a := newRotatingMember(t, 1, now.Load, now.Load)
	b := newRotatingMember(t, 2, now.Load, now.Load)
	introduce(a, b)
	connectedToEachOther(t, a, b)
	now.Store(after.config(t, "n"))
	a.sendUntilThere(b) // connections outlive certificates
	if err := b.close(); err != nil {
		t.Fatal(err)
	}
	c := newRotatingMember(t, 2, now.Load, now.Load)
	introduce(a, c)
	connectedToEachOther(t, a, c)
}
