package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"go.uber.org/zap"
)

// tlsFiles is what the TLS flags for clients say, or those for other members.
type tlsFiles struct {
	CertFile         string
	KeyFile          string
	TrustedCAFile    string
	ClientCertAuth   bool
	CRLFile          string
	AllowedHostnames []string
	CipherSuites     []string
	MinVersion       string
	MaxVersion       string

	// Peer: the flags begin with --peer-, and connections are made as well as taken. The rest is for peers only.
	Peer                bool
	ClientCertFile      string // for connections that are made; empty: CertFile
	ClientKeyFile       string
	AllowedCNs          []string
	SkipClientSANVerify bool
	SelfSigned          bool   // --peer-auto-tls: nobody can check the others' certificates
	ServerName          string // that the others' certificates bear; empty: the hosts of their URLs
}

// empty tells that no certificate is configured, so that https cannot be served.
func (f *tlsFiles) empty() bool { return f.CertFile == "" && f.KeyFile == "" }

// flag is the name of a flag in messages.
func (f *tlsFiles) flag(name string) string {
	switch {
	case f.Peer:
		return "--peer-" + name
	case name == "crl-file":
		return "--client-crl-file"
	}
	return "--" + name
}

func (f *tlsFiles) String() string {
	return fmt.Sprintf("cert = %s, key = %s, client-cert=%s, client-key=%s, trusted-ca = %s, client-cert-auth = %v, crl-file = %s",
		f.CertFile, f.KeyFile, f.ClientCertFile, f.ClientKeyFile, f.TrustedCAFile, f.ClientCertAuth, f.CRLFile)
}

// check looks at the flags only, not into the files. Texts are etcd's.
func (f *tlsFiles) check() error {
	minVersion, err := tlsVersion(f.MinVersion)
	if err != nil {
		return err
	}
	maxVersion, err := tlsVersion(f.MaxVersion)
	if err != nil {
		return err
	}
	if maxVersion != 0 && minVersion > maxVersion {
		return fmt.Errorf("min version (%s) is greater than max version (%s)", f.MinVersion, f.MaxVersion)
	}
	if minVersion == tls.VersionTLS13 && len(f.CipherSuites) > 0 {
		return errors.New("cipher suites cannot be configured when only TLS1.3 is enabled")
	}
	if _, err := cipherSuites(f.CipherSuites); err != nil {
		return err
	}
	if !f.empty() && (f.CertFile == "" || f.KeyFile == "") {
		return fmt.Errorf("KeyFile and CertFile must both be present[key: %v, cert: %v]; give both %s and %s", f.KeyFile, f.CertFile, f.flag("cert-file"), f.flag("key-file"))
	}
	if (f.ClientCertFile == "") != (f.ClientKeyFile == "") {
		return fmt.Errorf("ClientKeyFile and ClientCertFile must both be present or both absent: key: %v, cert: %v; give both %s and %s", f.ClientKeyFile, f.ClientCertFile, f.flag("client-cert-file"), f.flag("client-key-file"))
	}
	if len(f.AllowedCNs) > 0 && len(f.AllowedHostnames) > 0 {
		return fmt.Errorf("AllowedCNs and AllowedHostnames are mutually exclusive (cns=%q, hostnames=%q)", f.AllowedCNs, f.AllowedHostnames)
	}
	if len(f.AllowedCNs)+len(f.AllowedHostnames) > 0 && f.TrustedCAFile == "" && !f.ClientCertAuth {
		return fmt.Errorf("which certificates are good is given (cns=%q, hostnames=%q), but nobody is asked for one; give %s too", f.AllowedCNs, f.AllowedHostnames, f.flag("trusted-ca-file"))
	}
	return nil
}

func tlsVersion(s string) (uint16, error) {
	switch s {
	case "":
		return 0, nil
	case "TLS1.2":
		return tls.VersionTLS12, nil
	case "TLS1.3":
		return tls.VersionTLS13, nil
	}
	return 0, fmt.Errorf("unexpected TLS version %q (must be one of: TLS1.2, TLS1.3)", s)
}

// cipherSuites knows Go's names, the insecure suites' too, and the two short ones that etcd has kept from older Go.
func cipherSuites(names []string) ([]uint16, error) {
	byName := map[string]uint16{
		"TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305":   tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
		"TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305": tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
	}
	for _, s := range append(tls.CipherSuites(), tls.InsecureCipherSuites()...) {
		byName[s.Name] = s.ID
	}
	var ids []uint16
	for _, n := range names {
		id, ok := byName[n]
		if !ok {
			return nil, fmt.Errorf("unexpected TLS cipher suite %q", n)
		}
		ids = append(ids, id)
	}
	return ids, nil
}

// tlsStore keeps the TLS configuration up to date with its files. A handshake costs one stat a file; only
// when one of them changed are they read again. A certificate, key or CA that cannot be read or does not fit (half
// written, say) leaves the last good ones in use and is logged once; a revocation list that cannot be read refuses
// the handshake, as in etcd: better no client than a revoked one.
//
// Each change makes a new *tls.Config, hence new session ticket keys: a session begun under an old CA is not resumed.
type tlsStore struct {
	files tlsFiles
	lg    *zap.Logger

	mu struct {
		sync.Mutex
		configs tlsConfigs
		seen    []os.FileInfo // of the files, when they were last read; nil entries: not there

		crlSeen os.FileInfo
		revoked map[string]bool // by serial number
	}
}

// tlsConfigs are made of the files as they are at one time.
type tlsConfigs struct {
	server *tls.Config // nil without a certificate
	client *tls.Config // nil unless for peers
}

// newTLSStore reads the files once, so that a mistake stops the start.
func newTLSStore(files tlsFiles, lg *zap.Logger) (*tlsStore, error) {
	s := &tlsStore{files: files, lg: lg}
	configs, err := s.load()
	if err != nil {
		return nil, err
	}
	s.mu.configs, s.mu.seen = configs, s.stat()
	if files.CRLFile != "" {
		if _, err := s.revokedSerials(); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// current returns the configuration for the next handshake that somebody else begins. It must not be changed.
func (s *tlsStore) current() *tls.Config { return s.upToDate().server }

// client returns the configuration for the next handshake with a peer that this side begins. It must not be changed.
func (s *tlsStore) client() *tls.Config { return s.upToDate().client }

func (s *tlsStore) upToDate() tlsConfigs {
	s.mu.Lock()
	defer s.mu.Unlock()
	// Looked at before reading: a file that changes in between is read again next time.
	now := s.stat()
	if !changed(s.mu.seen, now) {
		return s.mu.configs
	}
	configs, err := s.load()
	s.mu.seen = now
	if err != nil {
		s.lg.Warn("failed to reload TLS files; serving with the previous ones", zap.String("cert-file", s.files.CertFile),
			zap.String("key-file", s.files.KeyFile), zap.String("trusted-ca-file", s.files.TrustedCAFile), zap.Error(err))
		return s.mu.configs
	}
	s.lg.Info("reloaded TLS files", zap.String("cert-file", s.files.CertFile), zap.String("trusted-ca-file", s.files.TrustedCAFile))
	s.mu.configs = configs
	return configs
}

func (s *tlsStore) stat() []os.FileInfo {
	f := &s.files
	infos := make([]os.FileInfo, 0, 5)
	for _, f := range []string{f.CertFile, f.KeyFile, f.TrustedCAFile, f.ClientCertFile, f.ClientKeyFile} {
		var info os.FileInfo
		if f != "" {
			if i, err := os.Stat(f); err == nil { // a missing file shows when it is read
				info = i
			}
		}
		infos = append(infos, info)
	}
	return infos
}

func changed(before, after []os.FileInfo) bool {
	for i := range before {
		if fileChanged(before[i], after[i]) {
			return true
		}
	}
	return false
}

func fileChanged(a, b os.FileInfo) bool {
	if a == nil || b == nil {
		return a != b
	}
	return !os.SameFile(a, b) || a.Size() != b.Size() || !a.ModTime().Equal(b.ModTime())
}

func (s *tlsStore) load() (tlsConfigs, error) {
	f := &s.files
	minVersion, err := tlsVersion(f.MinVersion)
	if err != nil {
		return tlsConfigs{}, err
	}
	if minVersion == 0 {
		minVersion = tls.VersionTLS12
	}
	maxVersion, err := tlsVersion(f.MaxVersion)
	if err != nil {
		return tlsConfigs{}, err
	}
	suites, err := cipherSuites(f.CipherSuites)
	if err != nil {
		return tlsConfigs{}, err
	}
	var ca *x509.CertPool // nil: the system's
	if f.TrustedCAFile != "" {
		data, err := os.ReadFile(f.TrustedCAFile)
		if err != nil {
			return tlsConfigs{}, fmt.Errorf("%s: %w", f.flag("trusted-ca-file"), err)
		}
		ca = x509.NewCertPool()
		if !ca.AppendCertsFromPEM(data) {
			return tlsConfigs{}, fmt.Errorf("%s %s holds no certificate in PEM form", f.flag("trusted-ca-file"), f.TrustedCAFile)
		}
	}
	config := &tls.Config{MinVersion: minVersion, MaxVersion: maxVersion, CipherSuites: suites, VerifyConnection: s.verify}
	var configs tlsConfigs
	if f.Peer {
		if configs.client, err = s.loadClient(config.Clone(), ca); err != nil {
			return tlsConfigs{}, err
		}
		if f.empty() {
			return configs, nil
		}
	}
	cert, err := tls.LoadX509KeyPair(f.CertFile, f.KeyFile)
	if err != nil {
		return tlsConfigs{}, fmt.Errorf("%s %s, %s %s: %w", f.flag("cert-file"), f.CertFile, f.flag("key-file"), f.KeyFile, err)
	}
	config.Certificates = []tls.Certificate{cert}
	config.NextProtos = []string{"h2", "http/1.1", "http/1.0"} // the last for curl --http1.0, which insists
	if f.Peer {
		config.NextProtos = config.NextProtos[1:]
	}
	// etcd: a CA alone already makes client certificates required; --client-cert-auth without one means the
	// system's CAs.
	if f.TrustedCAFile != "" || f.ClientCertAuth {
		config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, ca
	}
	if f.Peer && !f.SkipClientSANVerify {
		config.GetConfigForClient = s.checkingAddress(config)
	}
	configs.server = config
	return configs, nil
}

// verify is called at the end of every handshake, resumed ones too. As in etcd, among peers it goes for both sides.
func (s *tlsStore) verify(state tls.ConnectionState) error {
	if len(state.PeerCertificates) == 0 {
		return nil
	}
	if len(s.files.AllowedHostnames)+len(s.files.AllowedCNs) > 0 {
		cert := state.PeerCertificates[0]
		allowed := slices.Contains(s.files.AllowedCNs, cert.Subject.CommonName)
		for _, h := range s.files.AllowedHostnames {
			allowed = allowed || cert.VerifyHostname(h) == nil
		}
		if !allowed {
			return errors.New("client certificate authentication failed")
		}
	}
	if s.files.CRLFile == "" {
		return nil
	}
	revoked, err := s.revokedSerials()
	if err != nil {
		return err
	}
	for _, cert := range state.PeerCertificates {
		if revoked[string(cert.SerialNumber.Bytes())] {
			return fmt.Errorf("transport: certificate serial %x revoked", cert.SerialNumber.Bytes())
		}
	}
	return nil
}

// revokedSerials reads the revocation list, DER as etcd wants it or PEM, when it changed.
func (s *tlsStore) revokedSerials() (map[string]bool, error) {
	info, err := os.Stat(s.files.CRLFile)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.files.flag("crl-file"), err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.revoked != nil && !fileChanged(s.mu.crlSeen, info) {
		return s.mu.revoked, nil
	}
	data, err := os.ReadFile(s.files.CRLFile)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.files.flag("crl-file"), err)
	}
	if block, _ := pem.Decode(bytes.TrimSpace(data)); block != nil {
		data = block.Bytes
	}
	list, err := x509.ParseRevocationList(data)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", s.files.flag("crl-file"), s.files.CRLFile, err)
	}
	revoked := make(map[string]bool, len(list.RevokedCertificateEntries))
	for _, e := range list.RevokedCertificateEntries {
		revoked[string(e.SerialNumber.Bytes())] = true
	}
	s.mu.revoked, s.mu.crlSeen = revoked, info
	return revoked, nil
}
