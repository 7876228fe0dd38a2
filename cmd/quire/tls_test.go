package main

import (
	"crypto/tls"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap"
	"google.golang.org/grpc/credentials"
)

func TestTLSFilesAreReloaded(t *testing.T) {
	dir := t.TempDir()
	old, renewed := newAuthority(t, dir, "old"), newAuthority(t, dir, "renewed")
	certFile, keyFile, caFile := filepath.Join(dir, "c"), filepath.Join(dir, "k"), filepath.Join(dir, "ca")
	old.issue(2, "server", certFile, keyFile)
	copyFile(t, old.file, caFile)
	oldClient := old.issue(3, "alice", filepath.Join(dir, "cc"), filepath.Join(dir, "ck"))
	newClient := renewed.issue(3, "bob", filepath.Join(dir, "cc"), filepath.Join(dir, "ck"))

	f := startFront(t, &config{
		ListenClientURLs: urlsOf(t, "https://127.0.0.1:0"),
		TLS:              tlsFiles{CertFile: certFile, KeyFile: keyFile, TrustedCAFile: caFile},
	})
	dial := func(trust *authority, cert ...tls.Certificate) error {
		return checkHealth(t, f.address(0), credentials.NewTLS(&tls.Config{RootCAs: trust.pool(), Certificates: cert}))
	}
	if err := dial(old, oldClient); err != nil {
		t.Fatalf("client of the trusted CA: %v", err)
	}
	if cn := f.who.lastCN(); cn != "alice" {
		t.Errorf("handlers see the client as %q, want alice", cn)
	}
	if err := dial(old); err == nil {
		t.Error("--trusted-ca-file alone does not require client certificates")
	}
	f.log.waitFor(t, "rejected connection on client endpoint")
	f.log.waitFor(t, "client didn't provide a certificate")
	if err := dial(old, newClient); err == nil {
		t.Error("a certificate of a strange CA is let in")
	}

	// Half written: the old pair goes on serving.
	key, err := os.ReadFile(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, keyFile, []byte("garbage"))
	if err := dial(old, oldClient); err != nil {
		t.Errorf("with a broken key file: %v", err)
	}
	f.log.waitFor(t, "failed to reload TLS files")
	writeFile(t, keyFile, key)

	// All three renewed.
	renewed.issue(2, "server", certFile, keyFile)
	copyFile(t, renewed.file, caFile)
	if err := dial(renewed, newClient); err != nil {
		t.Errorf("after renewal: %v", err)
	}
	if cn := f.who.lastCN(); cn != "bob" {
		t.Errorf("handlers see the client as %q, want bob", cn)
	}
	if err := dial(renewed, oldClient); err == nil {
		t.Error("a client of the CA that is trusted no more is let in")
	}
}

func TestRevokedCertificates(t *testing.T) {
	dir := t.TempDir()
	ca := newAuthority(t, dir, "ca")
	certFile, keyFile, crl := filepath.Join(dir, "c"), filepath.Join(dir, "k"), filepath.Join(dir, "crl")
	ca.issue(2, "server", certFile, keyFile)
	good := ca.issue(3, "good", filepath.Join(dir, "cc"), filepath.Join(dir, "ck"))
	bad := ca.issue(4, "bad", filepath.Join(dir, "cc"), filepath.Join(dir, "ck"))
	ca.revoke(crl, 1)
	f := startFront(t, &config{
		ListenClientURLs: urlsOf(t, "https://127.0.0.1:0"),
		TLS:              tlsFiles{CertFile: certFile, KeyFile: keyFile, TrustedCAFile: ca.file, CRLFile: crl},
	})
	dial := func(cert tls.Certificate) error {
		return checkHealth(t, f.address(0), credentials.NewTLS(&tls.Config{RootCAs: ca.pool(), Certificates: []tls.Certificate{cert}}))
	}
	for _, cert := range []tls.Certificate{good, bad} {
		if err := dial(cert); err != nil {
			t.Fatalf("nothing is revoked: %v", err)
		}
	}
	ca.revoke(crl, 2, 4)
	if err := dial(good); err != nil {
		t.Errorf("the good certificate: %v", err)
	}
	if err := dial(bad); err == nil {
		t.Error("a revoked certificate is let in")
	}
	f.log.waitFor(t, "transport: certificate serial 04 revoked")

	der, err := os.ReadFile(crl)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, crl, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der}))
	if err := dial(good); err != nil {
		t.Errorf("list in PEM form: %v", err)
	}
	if err := dial(bad); err == nil {
		t.Error("a revoked certificate is let in, list in PEM form")
	}
	writeFile(t, crl, []byte("garbage"))
	if err := dial(good); err == nil {
		t.Error("clients are let in without a readable revocation list")
	}
}

func TestAllowedHostname(t *testing.T) {
	dir := t.TempDir()
	ca := newAuthority(t, dir, "ca")
	certFile, keyFile := filepath.Join(dir, "c"), filepath.Join(dir, "k")
	pair := ca.issue(2, "server", certFile, keyFile)
	for name, want := range map[string]bool{"localhost": true, "example.org": false} {
		f := startFront(t, &config{ListenClientURLs: urlsOf(t, "https://127.0.0.1:0"), TLS: tlsFiles{
			CertFile: certFile, KeyFile: keyFile, TrustedCAFile: ca.file, AllowedHostnames: []string{name}}})
		err := checkHealth(t, f.address(0), credentials.NewTLS(&tls.Config{RootCAs: ca.pool(), Certificates: []tls.Certificate{pair}}))
		if (err == nil) != want {
			t.Errorf("--client-cert-allowed-hostname=%s: %v", name, err)
		}
		if !want {
			f.log.waitFor(t, "client certificate authentication failed")
		}
	}
}

func TestTLSVersionsAndCiphers(t *testing.T) {
	dir := t.TempDir()
	ca := newAuthority(t, dir, "ca")
	certFile, keyFile := filepath.Join(dir, "c"), filepath.Join(dir, "k")
	ca.issue(2, "server", certFile, keyFile)
	const suite = "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384"
	f := startFront(t, &config{ListenClientURLs: urlsOf(t, "https://127.0.0.1:0"), TLS: tlsFiles{
		CertFile: certFile, KeyFile: keyFile, CipherSuites: []string{suite}, MaxVersion: "TLS1.2"}})
	conn, err := tls.Dial("tcp", f.address(0), &tls.Config{RootCAs: ca.pool()})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	state := conn.ConnectionState()
	if state.Version != tls.VersionTLS12 || tls.CipherSuiteName(state.CipherSuite) != suite {
		t.Errorf("negotiated %s, %s", tls.VersionName(state.Version), tls.CipherSuiteName(state.CipherSuite))
	}
	if c, err := tls.Dial("tcp", f.address(0), &tls.Config{RootCAs: ca.pool(), MinVersion: tls.VersionTLS13}); err == nil {
		c.Close()
		t.Error("TLS 1.3 is spoken despite --tls-max-version=TLS1.2")
	}
}

func TestAutoTLS(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "fixtures", "client")
	certFile, keyFile, err := selfCert(zap.NewNop(), dir, urlsOf(t, "https://127.0.0.1:0,https://localhost:0"), 1)
	if err != nil {
		t.Fatal(err)
	}
	first, err := os.ReadFile(certFile)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(keyFile); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("key file: %v, %v", info.Mode(), err)
	}
	if _, _, err := selfCert(zap.NewNop(), dir, nil, 1); err != nil {
		t.Fatal(err)
	}
	if again, err := os.ReadFile(certFile); err != nil || string(again) != string(first) {
		t.Errorf("a second start made a new certificate (%v)", err)
	}
	f := startFront(t, &config{ListenClientURLs: urlsOf(t, "https://127.0.0.1:0"), TLS: tlsFiles{CertFile: certFile, KeyFile: keyFile}})
	ca := &authority{}
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	ca.cert = pair.Leaf
	for _, name := range []string{"127.0.0.1", "localhost"} {
		if err := checkHealth(t, f.address(0), credentials.NewTLS(&tls.Config{RootCAs: ca.pool(), ServerName: name})); err != nil {
			t.Errorf("as %s: %v", name, err)
		}
	}
}

func TestTLSStartMistakes(t *testing.T) {
	dir := t.TempDir()
	ca := newAuthority(t, dir, "ca")
	certFile, keyFile, garbage := filepath.Join(dir, "c"), filepath.Join(dir, "k"), filepath.Join(dir, "g")
	ca.issue(2, "server", certFile, keyFile)
	writeFile(t, garbage, []byte("garbage"))
	for _, x := range []struct {
		files tlsFiles
		want  string
	}{
		{tlsFiles{CertFile: certFile, KeyFile: filepath.Join(dir, "none")}, "--key-file"},
		{tlsFiles{CertFile: garbage, KeyFile: keyFile}, "--cert-file"},
		{tlsFiles{CertFile: certFile, KeyFile: keyFile, TrustedCAFile: garbage}, "--trusted-ca-file"},
		{tlsFiles{CertFile: certFile, KeyFile: keyFile, TrustedCAFile: ca.file, CRLFile: garbage}, "--client-crl-file"},
	} {
		if _, err := newTLSStore(x.files, zap.NewNop()); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%+v: error %v, want one that names %s", x.files, err, x.want)
		}
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, to, data)
}
