package quireonly

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/test/etcd/start"
	"github.com/quire-db/quire/test/ports"
)

// authority signs certificates for one test.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
	file string
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, key: newKey(t), pool: x509.NewCertPool(), file: filepath.Join(t.TempDir(), "ca.pem")}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &a.key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.pool.AddCert(a.cert)
	writePEM(t, a.file, "CERTIFICATE", der)
	return a
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func writePEM(t *testing.T, path, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// issue writes a certificate with its key to dir, over those of the same name.
func (a *authority) issue(dir, name string, serial int64) (certFile, keyFile string) {
	a.t.Helper()
	key := newKey(a.t)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a.cert, &key.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(dir, name+".pem"), filepath.Join(dir, name+".key")
	writePEM(a.t, certFile, "CERTIFICATE", der)
	writePEM(a.t, keyFile, "EC PRIVATE KEY", keyDER)
	return certFile, keyFile
}

func (a *authority) client(name string) *tls.Config {
	a.t.Helper()
	certFile, keyFile := a.issue(a.t.TempDir(), name, 100)
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		a.t.Fatal(err)
	}
	return &tls.Config{RootCAs: a.pool, Certificates: []tls.Certificate{pair}}
}

func putOver(t *testing.T, address string, config *tls.Config) error {
	t.Helper()
	conn, err := start.Dial(address, config)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, err = pb.NewKVClient(conn).Put(ctx, &pb.PutRequest{Key: []byte("a"), Value: []byte("v")})
	return err
}

func TestTLSWantsAClientCertificateOfItsAuthority(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	dir := t.TempDir()
	certFile, keyFile := ca.issue(dir, "server", 2)
	address := ports.FreeAddress(t)
	data := filepath.Join(t.TempDir(), "d")
	p := start.Run(t, nil, append(start.StorageFlags(t, data), "--data-dir="+data,
		"--listen-client-urls=https://"+address, "--advertise-client-urls=https://"+address,
		"--cert-file="+certFile, "--key-file="+keyFile, "--trusted-ca-file="+ca.file, "--client-cert-auth")...)
	if err := p.WaitReady(30 * time.Second); err != nil {
		t.Fatalf("%v\n%s", err, p.Output())
	}
	if err := putOver(t, address, ca.client("alice")); err != nil {
		t.Errorf("a client with a certificate: %v", err)
	}
	if err := putOver(t, address, &tls.Config{RootCAs: ca.pool}); err == nil {
		t.Error("a client without certificate was served")
	}
	stranger := newAuthority(t).client("mallory")
	stranger.RootCAs = ca.pool
	if err := putOver(t, address, stranger); err == nil {
		t.Error("a client with a certificate of another authority was served")
	}
	if err := putOver(t, address, nil); err == nil {
		t.Error("a client without TLS was served")
	}
	if p.Lines("rejected connection on client endpoint") == nil {
		t.Error("the refused clients are not in the log")
	}

	// The author of a change is the name in the certificate.
	if authors := column(t, data, "SELECT author FROM history WHERE key = 'a'"); !slices.Equal(authors, []string{"alice"}) {
		t.Errorf("the authors are %q, want alice", authors)
	}

	// HTTP is on the same port under the same rules.
	get := func(config *tls.Config) error {
		c := http.Client{Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}}
		r, err := c.Get("https://" + address + "/health")
		if err != nil {
			return err
		}
		return r.Body.Close()
	}
	if err := get(ca.client("alice")); err != nil {
		t.Errorf("HTTP with a certificate: %v", err)
	}
	if err := get(&tls.Config{RootCAs: ca.pool}); err == nil {
		t.Error("HTTP without certificate was served")
	}

	// A new certificate counts for the next connection, without a restart.
	serial := func() int64 {
		c, err := tls.Dial("tcp", address, ca.client("alice"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
	}
	if got := serial(); got != 2 {
		t.Fatalf("the server shows certificate %d, want 2", got)
	}
	ca.issue(dir, "server", 3)
	deadline := time.Now().Add(15 * time.Second)
	for serial() != 3 {
		if time.Now().After(deadline) {
			t.Fatal("the new certificate is not used")
		}
		time.Sleep(100 * time.Millisecond) // the server sends no signal when it has reloaded
	}
	if err := putOver(t, address, ca.client("alice")); err != nil {
		t.Errorf("after the change of certificates: %v", err)
	}
}

func TestAutoTLSServesWithACertificateOfItsOwn(t *testing.T) {
	t.Parallel()
	address := ports.FreeAddress(t)
	p := start.Run(t, nil, append(dataFlags(t), "--listen-client-urls=https://"+address, "--advertise-client-urls=https://"+address, "--auto-tls")...)
	if err := p.WaitReady(30 * time.Second); err != nil {
		t.Fatalf("%v\n%s", err, p.Output())
	}
	if err := putOver(t, address, &tls.Config{InsecureSkipVerify: true}); err != nil {
		t.Error(err)
	}
}
