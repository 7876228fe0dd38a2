package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// How long a new connection may take. A TLS handshake has etcd's ten seconds (client/pkg/v3/transport). The first byte
// may come late: browsers and load balancers connect ahead of need; five minutes is etcd's ReadHeaderTimeout.
// An HTTP/2 client that has sent no request after the last delay is taken for gRPC: those connect early and wait,
// while every HTTP client sends its request along with the preface.
const (
	handshakeTimeout = 10 * time.Second
	firstByteTimeout = 5 * time.Minute
	requestTimeout   = time.Second
)

// maxSniffBytes bounds what is kept of a client that sends frame after frame and no request.
const maxSniffBytes = 128 << 10

// door lets connections in and shows each to the right server: TLS or not on the same port, then gRPC to grpc-go's own
// HTTP/2 server (twice as fast as through net/http, which is where etcd sends gRPC when TLS is on) and everything
// else, HTTP/1.1 and HTTP/2 alike, to net/http.
//
// cmux, which etcd uses, tells gRPC from HTTP/2 only by answering the client with SETTINGS of its own, whose
// acknowledgement net/http then takes for a protocol error; so "curl --http2-prior-knowledge" fails there. Here the
// acknowledgement is taken out of what net/http reads (ackFilter).
//
// A connection is sorted by its first request: one that carries gRPC and plain HTTP both ends up with one server, and
// the other kind of request is refused there. No known client does that.
type door struct {
	grpc *connQueue // nil: no gRPC here
	http *connQueue // nil: no HTTP here
	// tlsConfig is asked for each handshake; nil: no TLS here.
	tlsConfig func() *tls.Config
	plain     bool // connections without TLS are let in
	// rejected is told of failed handshakes; it may be called from several goroutines at once.
	rejected func(conn *tls.Conn, err error)
	// acceptFailed is told why no connection could be taken, out of file descriptors for instance.
	acceptFailed func(err error, retryIn time.Duration)

	ctx    context.Context // of handshakes; made with the first connection
	cancel context.CancelFunc
	mu     struct {
		sync.Mutex
		sorting map[net.Conn]struct{} // let in, not handed over yet
		closed  bool
	}
	wg sync.WaitGroup
}

// serve lets connections of l in until l is closed, which is not an error.
func (d *door) serve(l net.Listener) error {
	var delay time.Duration
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			// Mostly EMFILE or ECONNABORTED: they pass. Never give up serving because of them.
			delay = min(max(2*delay, 5*time.Millisecond), time.Second)
			d.acceptFailed(err, delay)
			time.Sleep(delay)
			continue
		}
		delay = 0
		if !d.hold(conn) {
			return errors.Join(conn.Close())
		}
		go func() {
			defer d.wg.Done()
			sorted, to, err := d.sort(conn)
			d.mu.Lock()
			delete(d.mu.sorting, conn)
			d.mu.Unlock()
			if err != nil || !to.put(sorted) {
				// The reason was told to rejected, or the client left before it said anything.
				_ = conn.Close()
			}
		}()
	}
}

func (d *door) hold(conn net.Conn) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mu.closed {
		return false
	}
	if d.mu.sorting == nil {
		d.mu.sorting = map[net.Conn]struct{}{}
		d.ctx, d.cancel = context.WithCancel(context.Background())
	}
	d.mu.sorting[conn] = struct{}{}
	d.wg.Add(1)
	return true
}

// close drops the connections that are still being sorted and waits for their goroutines. The listener is to be
// closed first.
func (d *door) close() {
	d.mu.Lock()
	d.mu.closed = true
	if d.cancel != nil {
		d.cancel()
	}
	for conn := range d.mu.sorting {
		_ = conn.Close() // wakes its reader, which is the point
	}
	d.mu.Unlock()
	d.wg.Wait()
}

// errNobody: the client speaks something that is not served on this port.
var errNobody = errors.New("protocol is not served on this port")

// sort reads as little of conn as it takes to know who must serve it.
func (d *door) sort(conn net.Conn) (net.Conn, *connQueue, error) {
	if err := conn.SetReadDeadline(time.Now().Add(firstByteTimeout)); err != nil {
		return nil, nil, err
	}
	c := &doorConn{Conn: conn}
	if d.tlsConfig != nil {
		secure := true
		if d.plain {
			first := make([]byte, 1)
			if _, err := io.ReadFull(conn, first); err != nil {
				return nil, nil, err
			}
			const handshakeRecord = 0x16 // RFC 8446, section 5.1: what a TLS connection begins with
			secure = first[0] == handshakeRecord
			c.rest = bytes.NewReader(first)
		}
		if secure {
			tc := tls.Server(c, d.tlsConfig())
			if err := conn.SetDeadline(time.Now().Add(handshakeTimeout)); err != nil {
				return nil, nil, err
			}
			ctx, cancel := context.WithTimeout(d.ctx, handshakeTimeout) // of looking up names too
			err := tc.HandshakeContext(ctx)
			cancel()
			if err != nil {
				d.rejected(tc, err)
				return nil, nil, err
			}
			if err := conn.SetDeadline(time.Now().Add(firstByteTimeout)); err != nil {
				return nil, nil, err
			}
			state := tc.ConnectionState()
			c = &doorConn{Conn: tc, state: &state}
		}
	}
	to, read, h2, err := d.sniff(c)
	if err != nil {
		return nil, nil, err
	}
	if to == nil {
		return nil, nil, errNobody
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return nil, nil, err
	}
	out := &doorConn{Conn: c, state: c.state, rest: bytes.NewReader(read)}
	if h2 && to == d.http && d.grpc != nil {
		out.rest = &ackFilter{src: io.MultiReader(bytes.NewReader(read), c), pass: len(http2.ClientPreface)}
		out.onlyRest = true
	}
	return out, to, nil
}

// sniff returns who serves the connection (nil: nobody here), the bytes read to find out, and whether it is HTTP/2.
func (d *door) sniff(c net.Conn) (to *connQueue, read []byte, h2 bool, err error) {
	buf := make([]byte, len(http2.ClientPreface))
	n := 0
	for n < len(buf) {
		m, err := c.Read(buf[n:])
		n += m
		if !strings.HasPrefix(http2.ClientPreface, string(buf[:n])) {
			return d.http, buf[:n], false, nil
		}
		if err != nil {
			return nil, nil, false, err
		}
	}
	if d.grpc == nil || d.http == nil {
		if d.grpc != nil {
			return d.grpc, buf, true, nil
		}
		return d.http, buf, true, nil
	}

	// gRPC clients wait for the server's SETTINGS before their first request (RFC 9113, section 3.4: any may).
	// Empty ones promise nothing; the real ones follow from whoever serves the connection.
	if err := c.SetDeadline(time.Now().Add(requestTimeout)); err != nil {
		return nil, nil, true, err
	}
	if err := http2.NewFramer(c, nil).WriteSettings(); err != nil {
		return nil, nil, true, err
	}
	seen := bytes.NewBuffer(buf)
	framer := http2.NewFramer(nil, io.TeeReader(c, seen))
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	framer.MaxHeaderListSize = maxSniffBytes / 2
	framer.SetMaxReadFrameSize(16 << 10) // what empty SETTINGS allow
	for {
		if seen.Len() > maxSniffBytes {
			return d.grpc, seen.Bytes(), true, nil
		}
		frame, err := framer.ReadFrame()
		if err != nil {
			var timeout net.Error
			var broken http2.ConnectionError
			var stream http2.StreamError
			if (errors.As(err, &timeout) && timeout.Timeout()) || errors.As(err, &broken) || errors.As(err, &stream) ||
				errors.Is(err, http2.ErrFrameTooLarge) {
				// Silent so far, or not HTTP/2 after all, which grpc-go answers as it should be.
				return d.grpc, seen.Bytes(), true, nil
			}
			return nil, nil, true, err
		}
		switch f := frame.(type) {
		case *http2.MetaHeadersFrame:
			for _, field := range f.RegularFields() {
				if field.Name == "content-type" && isGRPC(field.Value) {
					return d.grpc, seen.Bytes(), true, nil
				}
			}
			return d.http, seen.Bytes(), true, nil
		case *http2.PingFrame:
			// Before any request: a gRPC client that keeps its connection alive, and wants its answer soon.
			return d.grpc, seen.Bytes(), true, nil
		}
	}
}

// isGRPC leaves application/grpc-web, which is another protocol, to HTTP.
func isGRPC(contentType string) bool {
	rest, ok := strings.CutPrefix(contentType, "application/grpc")
	return ok && (rest == "" || rest[0] == '+' || rest[0] == ';')
}

// doorConn is a connection of which the first bytes have been read already.
type doorConn struct {
	net.Conn
	rest     io.Reader            // read before Conn; nil once it is used up
	onlyRest bool                 // rest reads Conn itself
	state    *tls.ConnectionState // nil: no TLS
}

// Read is called by one goroutine at a time, as on any net.Conn that a server reads.
func (c *doorConn) Read(p []byte) (int, error) {
	if c.rest != nil {
		n, err := c.rest.Read(p)
		if c.onlyRest || n > 0 || !errors.Is(err, io.EOF) {
			return n, err
		}
		c.rest = nil
	}
	return c.Conn.Read(p)
}

// ackFilter drops the first acknowledgement of SETTINGS from an HTTP/2 client: it belongs to those that sniff sent.
type ackFilter struct {
	src    io.Reader
	pass   int // bytes that go through unseen: the preface, then payloads
	header [9]byte
	have   int    // bytes of header read so far
	ready  []byte // a header that must go out
	done   bool
}

func (f *ackFilter) Read(p []byte) (int, error) {
	for {
		if len(f.ready) > 0 {
			n := copy(p, f.ready)
			f.ready = f.ready[n:]
			return n, nil
		}
		if f.done {
			return f.src.Read(p)
		}
		if f.pass > 0 {
			n, err := f.src.Read(p[:min(len(p), f.pass)])
			f.pass -= n
			return n, err
		}
		if len(p) == 0 {
			return 0, nil
		}
		n, err := f.src.Read(f.header[f.have:])
		f.have += n
		if f.have < len(f.header) {
			if err != nil {
				return 0, err
			}
			continue
		}
		f.have = 0
		length := int(f.header[0])<<16 | int(f.header[1])<<8 | int(f.header[2])
		if http2.FrameType(f.header[3]) == http2.FrameSettings && http2.Flags(f.header[4]).Has(http2.FlagSettingsAck) && length == 0 {
			f.done = true
		} else {
			f.ready, f.pass = f.header[:], length
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
	}
}

// connQueue is the net.Listener that a server behind the door accepts from.
type connQueue struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
	addr   net.Addr
}

func newConnQueue(addr net.Addr) *connQueue {
	return &connQueue{conns: make(chan net.Conn), closed: make(chan struct{}), addr: addr}
}

// put hands conn to the server; false when the server is gone.
func (q *connQueue) put(conn net.Conn) bool {
	select {
	case q.conns <- conn:
		return true
	case <-q.closed:
		return false
	}
}

func (q *connQueue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.closed:
		return nil, net.ErrClosed
	}
}

func (q *connQueue) Close() error {
	q.once.Do(func() { close(q.closed) })
	return nil
}

func (q *connQueue) Addr() net.Addr { return q.addr }
