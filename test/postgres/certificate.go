package postgres

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// TLSMode says how clients get in over TCP. On the server's own socket the superuser needs neither TLS nor password.
type TLSMode int

const (
	// NoTLS trusts everybody.
	NoTLS TLSMode = iota
	// ServerTLS refuses plain connections and trusts everybody who speaks TLS.
	ServerTLS
	// ClientCertificates demands a certificate of the server's Authority that names the role.
	ClientCertificates
)

// clientAuthentication is the text of pg_hba.conf.
func (m TLSMode) clientAuthentication() string {
	const socket = "local all all trust\nlocal replication all trust\n"
	switch m {
	case ServerTLS:
		return socket + "hostssl all all 127.0.0.1/32 trust\n"
	case ClientCertificates:
		return socket + "hostssl all all 127.0.0.1/32 cert\n"
	default:
		return socket + "host all all 127.0.0.1/32 trust\nhost replication all 127.0.0.1/32 trust\n"
	}
}

// Authority signs certificates. Its files stay until the test process ends.
type Authority struct {
	// File is its own certificate, in PEM.
	File string

	dir         string
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func (w *workspace) newAuthority() (*Authority, error) {
	dir, err := w.newDir("tls")
	if err != nil {
		return nil, err
	}
	return NewAuthority(dir)
}

// NewAuthority makes an authority that nobody trusts yet, with its files in dir.
func NewAuthority(dir string) (*Authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template, err := certificateFor("quire's test authority")
	if err != nil {
		return nil, err
	}
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	a := &Authority{File: filepath.Join(dir, "ca.crt"), dir: dir, certificate: certificate, key: key}
	return a, writePEM(a.File, "CERTIFICATE", der, 0o644)
}

func certificateFor(name string) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
	}, nil
}

// serverCertificate writes server.crt and server.key, valid for 127.0.0.1 and localhost, which the account may read.
func (a *Authority) serverCertificate(dir string, reader account) (certificate, key string, err error) {
	template, err := certificateFor("localhost")
	if err != nil {
		return "", "", err
	}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	template.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
	template.DNSNames = []string{"localhost"}
	if certificate, key, err = a.issue(template, filepath.Join(dir, "server")); err != nil {
		return "", "", err
	}
	return certificate, key, reader.own(key)
}

// ClientParameters makes a certificate for a role and returns it as parameters of a DSN.
func (a *Authority) ClientParameters(role string) ([]string, error) {
	certificate, key, err := a.ClientCertificate(role)
	if err != nil {
		return nil, err
	}
	return []string{"sslcert=" + certificate, "sslkey=" + key}, nil
}

// ClientCertificate makes a certificate for a role and returns the files with it and with its key, in PEM.
func (a *Authority) ClientCertificate(role string) (certificate, key string, err error) {
	template, err := certificateFor(role)
	if err != nil {
		return "", "", err
	}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	return a.issue(template, filepath.Join(a.dir, "client-"+role))
}

func (a *Authority) issue(template *x509.Certificate, file string) (certificate, key string, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, private.Public(), a.key)
	if err != nil {
		return "", "", err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return "", "", err
	}
	certificate, key = file+".crt", file+".key"
	return certificate, key, errors.Join(writePEM(certificate, "CERTIFICATE", der, 0o644), writePEM(key, "PRIVATE KEY", secret, 0o600))
}

func writePEM(file, kind string, der []byte, mode os.FileMode) error {
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), mode); err != nil {
		return fmt.Errorf("writing a certificate: %w", err)
	}
	return nil
}
