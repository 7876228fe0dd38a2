package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spf13/pflag"
)

// peerPort is a member's port for others that answers every request, and its log.
type peerPort struct {
	url       string
	store     *tlsStore
	log       *syncBuffer
	listeners []net.Listener
}

// startPeerPort takes the flags as on the command line.
func startPeerPort(t *testing.T, listen string, args ...string) *peerPort {
	t.Helper()
	var f peerTLSFlags
	fs := pflag.NewFlagSet("test", pflag.ContinueOnError)
	addPeerTLSFlags(fs, &f)
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	p := &peerPort{log: &syncBuffer{}}
	c := &config{DataDir: t.TempDir(), SelfSignedCertValidity: 1, LogLevel: "debug", LogFormat: "json", LogOutputs: []string{"stderr"}}
	lg, _, err := newLogger(c, io.Discard, p.log)
	if err != nil {
		t.Fatal(err)
	}
	urls := urlsOf(t, listen)
	if p.store, err = f.settle(c, urls, lg); err != nil {
		t.Fatal(err)
	}
	if p.listeners, err = listenPeers(t.Context(), c, urls, p.store, lg); err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "member") }), ErrorLog: stdLogger(lg)}
	for _, l := range p.listeners {
		go func() { _ = server.Serve(l) }()
	}
	t.Cleanup(func() {
		server.Close()
		for _, l := range p.listeners {
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	p.url = strings.Replace(listen, "127.0.0.1:0", p.listeners[0].Addr().String(), 1)
	return p
}

// ask makes a request to other as a member does.
func (p *peerPort) ask(other *peerPort) error {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialTLSContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			config := p.store.client().Clone()
			if config.ServerName == "" {
				config.ServerName = "127.0.0.1"
			}
			return (&tls.Dialer{Config: config}).DialContext(ctx, network, address)
		},
	}}
	answer, err := client.Get(other.url)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err == nil && string(body) != "member" {
		err = fmt.Errorf("the answer is %q", body)
	}
	return err
}

func wantError(t *testing.T, what string, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%s: %v, want an error with %q", what, err, want)
	}
}

func TestPeerTLS(t *testing.T) {
	dir := t.TempDir()
	ca, other := newAuthority(t, dir, "ca"), newAuthority(t, dir, "other")
	file := func(name string) string { return filepath.Join(dir, name) }
	ca.issue(2, "one", file("c1"), file("k1"))
	ca.issue(3, "two", file("c2"), file("k2"))
	other.issue(4, "one", file("c3"), file("k3"))
	flags := func(n string, more ...string) []string {
		return append([]string{"--peer-cert-file", file("c" + n), "--peer-key-file", file("k" + n), "--peer-trusted-ca-file", ca.file}, more...)
	}
	const listen = "https://127.0.0.1:0"
	one, two, strange := startPeerPort(t, listen, flags("1")...), startPeerPort(t, listen, flags("2")...), startPeerPort(t, listen, flags("3")...)
	for _, err := range []error{one.ask(two), two.ask(one)} {
		if err != nil {
			t.Error(err)
		}
	}
	wantError(t, "a server of another CA", one.ask(strange), "certificate signed by unknown authority")
	wantError(t, "a client of another CA", strange.ask(one), "")
	one.log.waitFor(t, "rejected connection on peer endpoint")
	one.log.waitFor(t, "starting with peer TLS")
	one.log.waitFor(t, "serving peer traffic")
	// Who refuses a server lets its log know, too.
	strange.log.waitFor(t, "remote error: tls: bad certificate")

	// With a CA alone, certificates are required, as in etcd.
	nobody := startPeerPort(t, "http://127.0.0.1:0", "--peer-trusted-ca-file", ca.file)
	wantError(t, "a client without certificate", nobody.ask(one), "certificate required")

	// Only one common name is let in, and dialled.
	picky := startPeerPort(t, listen, flags("1", "--peer-cert-allowed-cn", "zero,one")...)
	if err := one.ask(picky); err != nil {
		t.Errorf("the allowed name: %v", err)
	}
	wantError(t, "another name", two.ask(picky), "remote error: tls: bad certificate")
	picky.log.waitFor(t, "client certificate authentication failed")
	wantError(t, "a server with another name", picky.ask(two), "client certificate authentication failed")
	two.log.waitFor(t, "remote error: tls: bad certificate")

	hosts := startPeerPort(t, listen, flags("1", "--peer-cert-allowed-hostname", "localhost")...)
	if err := two.ask(hosts); err != nil {
		t.Errorf("the allowed host: %v", err)
	}
	hosts = startPeerPort(t, listen, flags("1", "--peer-cert-allowed-hostname", "example.org")...)
	wantError(t, "another host", two.ask(hosts), "remote error: tls: bad certificate")
	hosts.log.waitFor(t, "client certificate authentication failed")

	// A certificate of its own for connections that are made.
	dialler := startPeerPort(t, listen, flags("1", "--peer-client-cert-file", file("c3"), "--peer-client-key-file", file("k3"))...)
	if err := one.ask(dialler); err != nil {
		t.Error(err)
	}
	wantError(t, "a client certificate of another CA", dialler.ask(one), "")

	// Revoked.
	crl := file("crl")
	ca.revoke(crl, 1, 3)
	revoking := startPeerPort(t, listen, flags("1", "--peer-crl-file", crl)...)
	if err := one.ask(revoking); err != nil {
		t.Error(err)
	}
	wantError(t, "a revoked certificate", two.ask(revoking), "remote error: tls: bad certificate")
	revoking.log.waitFor(t, "transport: certificate serial 03 revoked")

	// Rotated while everything runs: certificates on both sides, then the CA.
	other.issue(5, "one", file("c1"), file("k1"))
	other.issue(6, "two", file("c2"), file("k2"))
	copyFile(t, other.file, ca.file)
	if err := one.ask(two); err != nil {
		t.Errorf("after both certificates and the CA were renewed: %v", err)
	}
	if err := strange.ask(one); err != nil {
		t.Errorf("a member of what is the CA now: %v", err)
	}
}

func TestPeerAutoTLS(t *testing.T) {
	a, b := startPeerPort(t, "https://127.0.0.1:0", "--peer-auto-tls"), startPeerPort(t, "https://127.0.0.1:0", "--peer-auto-tls")
	for _, err := range []error{a.ask(b), b.ask(a)} {
		if err != nil {
			t.Error(err)
		}
	}
	dir := t.TempDir()
	ca := newAuthority(t, dir, "ca")
	ca.issue(2, "one", filepath.Join(dir, "c"), filepath.Join(dir, "k"))
	c := startPeerPort(t, "https://127.0.0.1:0", "--peer-auto-tls", "--peer-cert-file", filepath.Join(dir, "c"), "--peer-key-file", filepath.Join(dir, "k"))
	c.log.waitFor(t, "ignoring peer auto TLS since certs given")
	if err := c.ask(a); err == nil {
		t.Error("a generated certificate is taken for a real one")
	}
}

func TestPeersWithoutTLS(t *testing.T) {
	dir := t.TempDir()
	ca := newAuthority(t, dir, "ca")
	ca.issue(2, "one", filepath.Join(dir, "c"), filepath.Join(dir, "k"))
	p := startPeerPort(t, "http://127.0.0.1:0", "--peer-cert-file", filepath.Join(dir, "c"), "--peer-key-file", filepath.Join(dir, "k"), "--peer-client-cert-auth")
	if err := p.ask(p); err != nil {
		t.Error(err)
	}
	p.log.waitFor(t, "scheme is HTTP while key and cert files are present; ignoring key and cert files")
	p.log.waitFor(t, "scheme is HTTP while --peer-client-cert-auth is enabled; ignoring client cert auth for this URL")
}

func TestPeerTLSMistakes(t *testing.T) {
	dir := t.TempDir()
	ca := newAuthority(t, dir, "ca")
	file := func(name string) string { return filepath.Join(dir, name) }
	ca.issue(2, "one", file("c"), file("k"))
	writeFile(t, file("garbage"), []byte("garbage"))
	for _, x := range []struct {
		files tlsFiles
		want  string
	}{
		{tlsFiles{CertFile: file("c")}, "give both --peer-cert-file and --peer-key-file"},
		{tlsFiles{CertFile: file("c"), KeyFile: file("k"), ClientCertFile: file("c")}, "ClientKeyFile and ClientCertFile must both be present or both absent"},
		{tlsFiles{AllowedCNs: []string{"a"}, AllowedHostnames: []string{"b"}}, "AllowedCNs and AllowedHostnames are mutually exclusive"},
		{tlsFiles{CertFile: file("c"), KeyFile: file("k"), AllowedCNs: []string{"one"}}, "nobody is asked for one; give --peer-trusted-ca-file too"},
		{tlsFiles{CertFile: file("c"), KeyFile: file("none")}, "--peer-key-file"},
		{tlsFiles{CertFile: file("c"), KeyFile: file("k"), ClientCertFile: file("garbage"), ClientKeyFile: file("k")}, "--peer-client-cert-file"},
		{tlsFiles{TrustedCAFile: file("garbage")}, "--peer-trusted-ca-file"},
		{tlsFiles{CertFile: file("c"), KeyFile: file("k"), CRLFile: file("garbage")}, "--peer-crl-file"},
	} {
		x.files.Peer = true
		_, err := (&peerTLSFlags{Files: x.files}).settle(&config{}, nil, fallbackLogger(io.Discard))
		wantError(t, x.files.String(), err, x.want)
	}
	store, err := newTLSStore(tlsFiles{Peer: true}, fallbackLogger(io.Discard))
	if err != nil {
		t.Fatal(err)
	}
	_, err = listenPeers(t.Context(), &config{}, urlsOf(t, "https://127.0.0.1:0"), store, fallbackLogger(io.Discard))
	wantError(t, "https without certificate", err, "KeyFile and CertFile are not presented")
}

// TestPeerListenersClose while somebody is on the doorstep, and when nobody takes what they let in.
func TestPeerListenersClose(t *testing.T) {
	store, err := newTLSStore(tlsFiles{Peer: true}, fallbackLogger(io.Discard))
	if err != nil {
		t.Fatal(err)
	}
	all, err := listenPeers(t.Context(), &config{}, urlsOf(t, "http://127.0.0.1:0,unix://"+filepath.Join(t.TempDir(), "s")), store, fallbackLogger(io.Discard))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range all {
		for _, says := range []string{"", "GET / HTTP/1.1\r\n"} {
			conn, err := net.Dial(l.Addr().Network(), l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := io.WriteString(conn, says); err != nil {
				t.Fatal(err)
			}
		}
	}
	time.Sleep(50 * time.Millisecond) // they are let in; closing earlier is no test
	closed := make(chan error, len(all))
	for _, l := range all {
		go func() { closed <- errors.Join(l.Close(), l.Close()) }()
	}
	for range all {
		select {
		case err := <-closed:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(5 * time.Second):
			t.Fatal("closing hangs")
		}
	}
	for _, l := range all {
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("after closing: %v", err)
		}
	}
}

// reverse is an addressResolver.
type reverse struct {
	names map[string][]string
	hosts map[string][]string
}

func (r *reverse) LookupAddr(_ context.Context, address string) ([]string, error) {
	if n, ok := r.names[address]; ok {
		return n, nil
	}
	return nil, errors.New("no name")
}

func (r *reverse) LookupHost(_ context.Context, host string) ([]string, error) {
	if a, ok := r.hosts[host]; ok {
		return a, nil
	}
	return nil, errors.New("no host")
}

// TestAMembersAddressMustFitItsCertificate: the cases of etcd's checkCertSAN.
func TestAMembersAddressMustFitItsCertificate(t *testing.T) {
	dns := &reverse{
		names: map[string][]string{"10.0.0.2": {"two.example."}, "10.0.0.3": {"three.sub.example."}},
		hosts: map[string][]string{"four.example": {"10.0.0.9", "10.0.0.4"}},
	}
	from := func(ip string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: 1234} }
	ips := func(all ...string) (out []net.IP) {
		for _, ip := range all {
			out = append(out, net.ParseIP(ip))
		}
		return out
	}
	for _, x := range []struct {
		name string
		cert x509.Certificate
		addr net.Addr
		want string
	}{
		{"no names", x509.Certificate{}, from("10.0.0.1"), ""},
		{"its address", x509.Certificate{IPAddresses: ips("10.0.0.7", "10.0.0.1")}, from("10.0.0.1"), ""},
		{"another address", x509.Certificate{IPAddresses: ips("127.0.0.1")}, from("10.0.0.1"), "x509: certificate is valid for 127.0.0.1, not 10.0.0.1"},
		{"its name", x509.Certificate{DNSNames: []string{"two.example"}}, from("10.0.0.2"), ""},
		{"its name beside another address", x509.Certificate{IPAddresses: ips("127.0.0.1"), DNSNames: []string{"two.example"}}, from("10.0.0.2"), ""},
		{"a wildcard", x509.Certificate{DNSNames: []string{"*.example"}}, from("10.0.0.3"), ""},
		{"a name that leads to it", x509.Certificate{DNSNames: []string{"one.example", "four.example"}}, from("10.0.0.4"), ""},
		{"another name", x509.Certificate{DNSNames: []string{"two.example", "*.other"}}, from("10.0.0.4"), `tls: "10.0.0.4" does not match any of DNSNames ["two.example" "*.other"] (no host)`},
		{"a socket file", x509.Certificate{IPAddresses: ips("127.0.0.1")}, &net.UnixAddr{Name: "@", Net: "unix"}, ""},
	} {
		err := checkAddress(t.Context(), dns, &x.cert, x.addr)
		if (err == nil) != (x.want == "") || err != nil && err.Error() != x.want {
			t.Errorf("%s: %v, want %q", x.name, err, x.want)
		}
	}
}

// TestTheAddressIsChecked in a real handshake, unless a flag says otherwise.
func TestTheAddressIsChecked(t *testing.T) {
	dir := t.TempDir()
	ca := newAuthority(t, dir, "ca")
	file := func(name string) string { return filepath.Join(dir, name) }
	ca.issue(2, "here", file("c"), file("k"))
	ca.issueFor(3, file("c2"), file("k2"), net.IPv4(127, 0, 0, 9))
	flags := []string{"--peer-cert-file", file("c"), "--peer-key-file", file("k"), "--peer-trusted-ca-file", ca.file}
	elsewhere := startPeerPort(t, "https://127.0.0.1:0", append(flags, "--peer-client-cert-file", file("c2"), "--peer-client-key-file", file("k2"))...)
	strict := startPeerPort(t, "https://127.0.0.1:0", flags...)
	wantError(t, "a certificate for another address", elsewhere.ask(strict), "remote error: tls: bad certificate")
	strict.log.waitFor(t, "x509: certificate is valid for 127.0.0.9, not 127.0.0.1")
	lenient := startPeerPort(t, "https://127.0.0.1:0", append(flags, "--peer-skip-client-san-verification")...)
	if err := elsewhere.ask(lenient); err != nil {
		t.Error(err)
	}
}

// TestClosingWaitsForNoNames: a member's certificate has a name that no DNS server says anything about.
func TestClosingWaitsForNoNames(t *testing.T) {
	dir := t.TempDir()
	ca := newAuthority(t, dir, "ca")
	crt, key := filepath.Join(dir, "c"), filepath.Join(dir, "k")
	cert := ca.write(&x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: []string{"m1.example.org"}}, crt, key)
	asked, once := make(chan struct{}), sync.Once{}
	before := net.DefaultResolver
	t.Cleanup(func() { net.DefaultResolver = before })
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		once.Do(func() { close(asked) })
		<-ctx.Done()
		return nil, ctx.Err()
	}}
	p := startPeerPort(t, "https://127.0.0.1:0", "--peer-cert-file", crt, "--peer-key-file", key, "--peer-trusted-ca-file", ca.file)
	conn, err := net.Dial("tcp", p.listeners[0].Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	client := tls.Client(conn, &tls.Config{Certificates: []tls.Certificate{cert}, InsecureSkipVerify: true})
	if err := client.Handshake(); err != nil {
		t.Fatal(err)
	}
	<-asked
	start := time.Now()
	if err := p.listeners[0].Close(); err != nil {
		t.Error(err)
	}
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("closing took %v", took)
	}
}

func TestLocalAddress(t *testing.T) {
	for urls, want := range map[string]string{
		"http://127.0.0.1:1,http://0.0.0.0:1,http://host:1,http://10.0.0.7:1": "10.0.0.7", "http://localhost:1": "<nil>", "http://[fd00::1]:1": "fd00::1",
	} {
		if got := localAddress(urlsOf(t, urls)); got.String() != want {
			t.Errorf("%s: %v, want %s", urls, got, want)
		}
	}
}
