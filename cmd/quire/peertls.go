package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/pflag"
	"go.uber.org/zap"
)

// peerTLSFlags are the --peer-… flags about TLS. Versions and cipher suites are those of the flags for clients.
type peerTLSFlags struct {
	Files   tlsFiles
	AutoTLS bool
}

func addPeerTLSFlags(fs *pflag.FlagSet, f *peerTLSFlags) {
	f.Files.Peer = true
	fs.StringVar(&f.Files.CertFile, "peer-cert-file", "", "Path to the TLS certificate (PEM) towards other members. Reloaded when it changes.")
	fs.StringVar(&f.Files.KeyFile, "peer-key-file", "", "Path to its key (PEM). Reloaded when it changes.")
	fs.StringVar(&f.Files.ClientCertFile, "peer-client-cert-file", "", "Path to another certificate (PEM) for connections that this member makes (empty: --peer-cert-file).")
	fs.StringVar(&f.Files.ClientKeyFile, "peer-client-key-file", "", "Path to its key (PEM).")
	fs.StringVar(&f.Files.TrustedCAFile, "peer-trusted-ca-file", "", "Path to the CA certificates (PEM) that other members' certificates must be signed by; requires them.")
	fs.BoolVar(&f.Files.ClientCertAuth, "peer-client-cert-auth", false, "Require certificates of members that connect.")
	fs.Var((*commaList)(&f.Files.AllowedCNs), "peer-cert-allowed-cn", "Comma-separated common names, one of which other members' certificates must bear.")
	fs.Var((*commaList)(&f.Files.AllowedHostnames), "peer-cert-allowed-hostname", "Comma-separated host names, one of which other members' certificates must bear.")
	fs.StringVar(&f.Files.CRLFile, "peer-crl-file", "", "Path to the revocation list (DER or PEM) for other members' certificates.")
	fs.BoolVar(&f.Files.SkipClientSANVerify, "peer-skip-client-san-verification", false, "Do not compare the address that a member connects from with its certificate.")
	fs.BoolVar(&f.AutoTLS, "peer-auto-tls", false, "Speak TLS to other members with a certificate that is generated in the data directory; it proves nothing.")
}

// settle completes what the flags say, generating a certificate if they ask for one, and reads the files. The store's
// client configuration serves https URLs of others also when this member itself has no certificate.
func (f *peerTLSFlags) settle(c *config, listen urlList, lg *zap.Logger) (*tlsStore, error) {
	files := f.Files
	files.CipherSuites, files.MinVersion, files.MaxVersion = c.TLS.CipherSuites, c.TLS.MinVersion, c.TLS.MaxVersion
	if f.AutoTLS && !files.empty() {
		lg.Warn("ignoring peer auto TLS since certs given")
	} else if f.AutoTLS {
		var err error
		files.CertFile, files.KeyFile, err = selfCert(lg, filepath.Join(c.DataDir, "fixtures", "peer"), listen, c.SelfSignedCertValidity)
		if err != nil {
			return nil, err
		}
		files.SelfSigned = true
	}
	if err := files.check(); err != nil {
		return nil, err
	}
	if !files.empty() {
		lg.Info("starting with peer TLS", zap.String("tls-info", files.String()), zap.Strings("cipher-suites", files.CipherSuites))
	}
	return newTLSStore(files, lg)
}

// loadClient completes the configuration for connections that this side makes.
func (s *tlsStore) loadClient(config *tls.Config, ca *x509.CertPool) (*tls.Config, error) {
	f := &s.files
	config.RootCAs, config.ServerName, config.InsecureSkipVerify = ca, f.ServerName, f.SelfSigned
	certFile, keyFile, prefix := f.CertFile, f.KeyFile, ""
	if f.ClientCertFile != "" {
		certFile, keyFile, prefix = f.ClientCertFile, f.ClientKeyFile, "client-"
	}
	if certFile == "" {
		return config, nil
	}
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("%s %s, %s %s: %w", f.flag(prefix+"cert-file"), certFile, f.flag(prefix+"key-file"), keyFile, err)
	}
	// Whatever CAs the other side names: it can say what is wrong with a certificate, not with none.
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
	return config, nil
}

// checkingAddress makes each handshake compare the client's certificate with the address that it comes from, as etcd
// does among peers (client/pkg/v3/transport: checkCertSAN).
func (s *tlsStore) checkingAddress(config *tls.Config) func(*tls.ClientHelloInfo) (*tls.Config, error) {
	plain := config.Clone()
	return func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		c := plain.Clone()
		c.VerifyConnection = func(state tls.ConnectionState) error {
			if err := s.verify(state); err != nil || len(state.PeerCertificates) == 0 {
				return err
			}
			return checkAddress(hello.Context(), net.DefaultResolver, state.PeerCertificates[0], hello.Conn.RemoteAddr())
		}
		return c, nil
	}
}

// addressResolver is the part of *net.Resolver that checkAddress needs.
type addressResolver interface {
	LookupAddr(ctx context.Context, address string) (names []string, err error)
	LookupHost(ctx context.Context, host string) (addresses []string, err error)
}

// checkAddress returns nil when the certificate bears no name or address, or that of remote: the address itself, a name
// that it has, or one that leads to it. Socket files have no address. Texts are etcd's.
func checkAddress(ctx context.Context, r addressResolver, cert *x509.Certificate, remote net.Addr) error {
	if len(cert.IPAddresses)+len(cert.DNSNames) == 0 || remote.Network() == "unix" {
		return nil
	}
	host, _, err := net.SplitHostPort(remote.String())
	if err != nil {
		return err
	}
	if len(cert.IPAddresses) > 0 {
		err := cert.VerifyHostname(host)
		if err == nil || len(cert.DNSNames) == 0 {
			return err
		}
	}
	names, failed := r.LookupAddr(ctx, host)
	for _, name := range names {
		name = strings.TrimSuffix(name, ".")
		for _, allowed := range cert.DNSNames {
			suffix, wildcard := strings.CutPrefix(allowed, "*")
			if name == allowed || wildcard && strings.HasPrefix(suffix, ".") && strings.HasSuffix(name, suffix) {
				return nil
			}
		}
	}
	for _, allowed := range cert.DNSNames {
		if strings.HasPrefix(allowed, "*.") {
			continue
		}
		addresses, err := r.LookupHost(ctx, allowed)
		if err != nil {
			failed = err
		}
		if slices.Contains(addresses, host) {
			return nil
		}
	}
	reason := ""
	if failed != nil {
		reason = " (" + failed.Error() + ")"
	}
	return fmt.Errorf("tls: %q does not match any of DNSNames %q%s", host, cert.DNSNames, reason)
}

// listenPeers listens on the URLs for other members, or on none when one fails. Connections come out of the listeners
// once TLS is agreed on; those that are refused are logged, as in etcd.
func listenPeers(ctx context.Context, c *config, urls urlList, store *tlsStore, lg *zap.Logger) ([]net.Listener, error) {
	var endpoints []*endpoint
	for _, u := range urls {
		e := &endpoint{url: u.String(), secure: secure(u), plain: !secure(u)}
		e.network, e.address = socket(u)
		switch files := &store.files; {
		case e.secure && files.empty():
			return nil, fmt.Errorf("cannot listen on TLS for %s: KeyFile and CertFile are not presented; give --peer-cert-file and --peer-key-file, or --peer-auto-tls", u.String())
		case !e.secure && !files.empty():
			lg.Warn("scheme is HTTP while key and cert files are present; ignoring key and cert files", zap.String("peer-url", u.String()))
		}
		if f := &store.files; !e.secure && (f.ClientCertAuth || f.TrustedCAFile != "") {
			lg.Warn("scheme is HTTP while --peer-client-cert-auth is enabled; ignoring client cert auth for this URL", zap.String("peer-url", u.String()))
		}
		endpoints = append(endpoints, e)
	}
	if err := open(ctx, endpoints, c); err != nil {
		return nil, err
	}
	var all []net.Listener
	for _, e := range endpoints {
		l := &peerListener{connQueue: newConnQueue(e.listener.Addr()), below: e.listener}
		l.door = &door{http: l.connQueue, plain: e.plain,
			rejected: func(conn *tls.Conn, err error) { logRejected(lg, "rejected connection on peer endpoint", conn, err) },
			acceptFailed: func(err error, retryIn time.Duration) {
				lg.Warn("cannot accept connections of members; check the limit on open files", zap.Duration("retry-in", retryIn), zap.Error(err))
			}}
		if e.secure {
			l.door.tlsConfig = store.current
		}
		l.wg.Go(func() {
			if err := l.door.serve(e.listener); err != nil {
				lg.Warn("listening for members has ended", zap.String("peer-url", e.url), zap.Error(err))
			}
		})
		lg.Info("serving peer traffic", zap.String("address", e.listener.Addr().String()))
		all = append(all, l)
	}
	return all, nil
}

// peerListener is what connections come out of on the other side of a door.
type peerListener struct {
	*connQueue
	below net.Listener
	door  *door
	wg    sync.WaitGroup
}

// Close may be called again.
func (l *peerListener) Close() error {
	err := l.below.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	_ = l.connQueue.Close() // never fails; before the door, which would wait for somebody to take what it has sorted
	l.door.close()
	l.wg.Wait()
	return err
}

// localAddress is where connections to other members are to come from with the feature gate SetMemberLocalAddr: the
// first address of its own that this member advertises, nil when there is none (server/v3/embed: InferLocalAddr).
func localAddress(advertised urlList) net.IP {
	for _, u := range advertised {
		if ip := net.ParseIP(u.Hostname()); ip != nil && !ip.IsLoopback() && !ip.IsUnspecified() {
			return ip
		}
	}
	return nil
}

// logRejected logs what etcd logs, with its fields, so that what watches its log for intruders goes on working.
func logRejected(lg *zap.Logger, msg string, conn *tls.Conn, err error) {
	log := lg.Warn
	if errors.Is(err, io.EOF) {
		log = lg.Debug // port scanners and load balancers connect and leave
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
	log(msg, append(fields, zap.Error(err))...)
}
