package sqlraft

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"
)

// dialer connects to peer URLs: http, https, unix (a socket file) and unixs (the same with TLS).
type dialer struct {
	tls       func() *tls.Config // nil: no https, no unixs
	localAddr net.IP
	timeout   time.Duration // for connection and TLS handshake, each
}

// dialError says that there was no connection, so that a request cannot have arrived.
type dialError struct{ error }

func (e *dialError) Unwrap() error { return e.error }

// target says how to reach a URL.
type target struct {
	network, address string
	secure           bool
	name             string // that the other's certificate must bear
}

func targetOf(peerURL string) (target, error) {
	u, err := url.Parse(peerURL)
	if err != nil {
		return target{}, fmt.Errorf("sqlraft: peer URL: %w", err)
	}
	switch u.Scheme {
	case "http", "https":
		return target{network: "tcp", address: u.Host, secure: u.Scheme == "https", name: u.Hostname()}, nil
	case "unix", "unixs":
		// unix://localhost:20000 is a socket file of that relative name, as in etcd.
		t := target{network: "unix", address: u.Host + u.Path, secure: u.Scheme == "unixs", name: u.Hostname()}
		if t.name == "" {
			t.name = "localhost"
		}
		return t, nil
	}
	return target{}, fmt.Errorf("sqlraft: peer URL %s: the scheme must be http, https, unix or unixs", peerURL)
}

// dial returns a connection on which TLS, if there is any, has been agreed on. A wrap that is not nil gets the
// connection before TLS does.
func (d *dialer) dial(ctx context.Context, to target, wrap func(net.Conn) net.Conn) (net.Conn, error) {
	nd := net.Dialer{Timeout: d.timeout}
	if d.localAddr != nil && to.network == "tcp" {
		nd.LocalAddr = &net.TCPAddr{IP: d.localAddr}
	}
	conn, err := nd.DialContext(ctx, to.network, to.address)
	if err != nil {
		return nil, err
	}
	if wrap != nil {
		conn = wrap(conn)
	}
	if !to.secure {
		return conn, nil
	}
	if d.tls == nil {
		return nil, errors.Join(fmt.Errorf("sqlraft: %s wants TLS, which is not configured; give --peer-cert-file or --peer-trusted-ca-file", to.address), conn.Close())
	}
	config := d.tls().Clone()
	if config.ServerName == "" {
		config.ServerName = to.name
	}
	config.NextProtos = []string{"http/1.1"}
	config.DynamicRecordSizingDisabled = true // small records would make large entries expensive
	secure := tls.Client(conn, config)
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	if err := secure.HandshakeContext(ctx); err != nil {
		_ = conn.Close() // the error that matters is known
		return nil, err
	}
	return secure, nil
}

// httpClient returns a client for the URLs that httpURL makes. It follows no redirects: who answers must be the one
// that was asked.
func (d *dialer) httpClient() *http.Client {
	dial := func(ctx context.Context, address string, secure bool) (net.Conn, error) {
		to := target{network: "tcp", address: address, secure: secure}
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			return nil, err
		}
		if to.name = host; strings.HasSuffix(host, socketSuffix) {
			if to, err = socketOf(host); err != nil {
				return nil, err
			}
		}
		to.secure = secure
		conn, err := d.dial(ctx, to, nil)
		if err != nil {
			return nil, &dialError{err}
		}
		return conn, nil
	}
	return &http.Client{
		Transport: &http.Transport{
			DialContext:         func(ctx context.Context, _, a string) (net.Conn, error) { return dial(ctx, a, false) },
			DialTLSContext:      func(ctx context.Context, _, a string) (net.Conn, error) { return dial(ctx, a, true) },
			MaxIdleConnsPerHost: 2,
			IdleConnTimeout:     30 * time.Second,
			DisableCompression:  true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// socketSuffix marks a host name that stands for a socket file.
const socketSuffix = ".unix-socket"

// httpURL returns the URL of path at a member, for the client that httpClient makes. Go's client takes no socket files
// for hosts, so their names are packed into one.
func httpURL(peerURL, path string) (string, error) {
	to, err := targetOf(peerURL)
	if err != nil {
		return "", err
	}
	scheme, host := "http", to.address
	if to.secure {
		scheme = "https"
	}
	if to.network == "unix" {
		host = hex.EncodeToString([]byte(peerURL)) + socketSuffix
	}
	return scheme + "://" + host + path, nil
}

func socketOf(host string) (target, error) {
	peerURL, err := hex.DecodeString(strings.TrimSuffix(host, socketSuffix))
	if err != nil {
		return target{}, fmt.Errorf("sqlraft: %s is not a socket file: %w", host, err)
	}
	return targetOf(string(peerURL))
}

// timedConn gives up when nothing has come for a time. What comes slowly may take as long as it likes.
//
// Writes have no such limit: when what has been written moves on shows late and in leaps, because the system has
// buffers of megabytes. That the other side lives shows in its answers.
type timedConn struct {
	net.Conn
	timeout time.Duration
}

func (c *timedConn) Read(p []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(c.timeout)); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}

// gatheringConn sits below TLS, which writes each of its records by itself, and writes them together.
type gatheringConn struct {
	net.Conn
	// The lock is for what TLS answers by itself, on the goroutine that reads.
	mu struct {
		sync.Mutex
		w      *bufio.Writer
		gather bool // else every write goes out at once, as a handshake needs it
	}
}

func newGatheringConn(conn net.Conn) *gatheringConn {
	c := &gatheringConn{Conn: conn}
	c.mu.w = bufio.NewWriterSize(conn, streamBuffer)
	return c
}

func (c *gatheringConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n, err := c.mu.w.Write(p)
	if err == nil && !c.mu.gather {
		err = c.mu.w.Flush()
	}
	return n, err
}

// flush writes what was gathered; from the first call on, writes are gathered.
func (c *gatheringConn) flush() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.gather = true
	return c.mu.w.Flush()
}
