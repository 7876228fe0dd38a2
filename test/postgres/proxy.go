package postgres

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/quire-db/quire/test/ports"
)

// Proxy is the network between clients and a server. It passes everything on until it is told otherwise; each
// disturbance lasts until Heal. Its methods may be called from any goroutine.
type Proxy struct {
	// Address is host:port for the clients; it never changes. See Server.DSNAt.
	Address string

	running sync.WaitGroup
	mu      struct {
		sync.Mutex
		upstream string
		closed   bool
		listener net.Listener // nil while connections are refused
		links    map[*link]bool
		hung     chan struct{} // nil unless hung; closed when that ends
		delay    time.Duration
		trap     *trap // nil unless one is set
	}
}

// StartProxy starts a proxy in front of the address of a server, of a PgBouncer or of another proxy.
func StartProxy(upstream string) (*Proxy, error) {
	p := &Proxy{}
	p.mu.upstream = upstream
	p.mu.links = map[*link]bool{}
	for attempt := 1; ; attempt++ {
		port, err := ports.Free()
		if err != nil {
			return nil, err
		}
		p.Address = ports.Loopback(port)
		p.mu.Lock()
		err = p.listenLocked()
		p.mu.Unlock()
		if err == nil {
			return p, nil
		}
		if attempt == 5 {
			return nil, err
		}
	}
}

// SetUpstream makes new connections go to another server, as an address that moves with a failover does.
func (p *Proxy) SetUpstream(address string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mu.upstream = address
}

// Cut resets all connections, on both sides, and refuses new ones.
func (p *Proxy) Cut() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cutLocked()
}

// DropConnections resets all connections, on both sides; new ones are welcome.
func (p *Proxy) DropConnections() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dropLocked()
}

// Hang keeps all connections open and passes nothing on, in either direction, not even that one was closed. New
// connections are accepted and hear nothing either. Heal delivers what was sent meanwhile.
func (p *Proxy) Hang() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.hung == nil {
		p.mu.hung = make(chan struct{})
	}
}

// Delay makes everything that is sent from now on arrive later by d: a round trip takes 2d longer.
func (p *Proxy) Delay(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mu.delay = d
}

// CutBeforeRequest sets a trap for the next request that contains match ("" is any): its connection is reset
// and the server never sees it. The channel is closed when that has happened.
//
// There is one trap at a time, and it springs once. Matching needs a connection without TLS, and a request whose
// text travels in it: one that names a prepared statement does not.
func (p *Proxy) CutBeforeRequest(match string) <-chan struct{} {
	return p.set(&trap{kind: beforeRequest, match: match})
}

// CutBeforeAnswer is CutBeforeRequest after the fact: the server gets the request and has done it (it is ready
// for the next query) when the client's connection is reset, without a byte of the answer. With TLS the first bytes
// of the answer stand for all of it. Answers to earlier requests that were still under way are lost too.
func (p *Proxy) CutBeforeAnswer(match string) <-chan struct{} {
	return p.set(&trap{kind: beforeAnswer, match: match})
}

// CutAfterBytes passes n further bytes from the clients on, counted over all connections, and resets the connection
// that sends the last of them. The server may have half a request then, or a whole one and be doing it.
func (p *Proxy) CutAfterBytes(n int) <-chan struct{} {
	return p.set(&trap{kind: afterBytes, left: n})
}

func (p *Proxy) set(t *trap) <-chan struct{} {
	t.sprung = make(chan struct{})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mu.trap = t
	return t.sprung
}

// Heal ends every disturbance.
func (p *Proxy) Heal() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.unhangLocked()
	p.mu.delay = 0
	p.mu.trap = nil
	if p.mu.listener != nil || p.mu.closed {
		return nil
	}
	return p.listenLocked()
}

// Close resets all connections and ends the proxy.
func (p *Proxy) Close() error {
	p.mu.Lock()
	p.mu.closed = true
	err := p.cutLocked()
	p.unhangLocked()
	p.mu.Unlock()
	p.running.Wait()
	return err
}

func (p *Proxy) listenLocked() error {
	l, err := net.Listen("tcp", p.Address)
	if err != nil {
		return fmt.Errorf("the proxy to PostgreSQL: %w", err)
	}
	p.mu.listener = l
	p.running.Go(func() { p.accept(l) })
	return nil
}

func (p *Proxy) cutLocked() error {
	var err error
	if p.mu.listener != nil {
		err = p.mu.listener.Close()
		p.mu.listener = nil
	}
	p.dropLocked()
	return err
}

func (p *Proxy) dropLocked() {
	for l := range p.mu.links {
		l.reset()
	}
}

func (p *Proxy) unhangLocked() {
	if p.mu.hung != nil {
		close(p.mu.hung)
		p.mu.hung = nil
	}
}

// accept takes connections until the listener is closed.
func (p *Proxy) accept(listener net.Listener) {
	for {
		client, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // a connection that was gone before it was taken
		}
		l := &link{proxy: p, client: client.(*net.TCPConn), done: make(chan struct{})}
		p.mu.Lock()
		// Cut closes the listener first: what is accepted after it must not live.
		if p.mu.listener != listener {
			l.reset()
		} else {
			p.mu.links[l] = true
			p.running.Go(l.run)
		}
		p.mu.Unlock()
	}
}

// passing waits while the proxy hangs; false when the link ended meanwhile.
func (p *Proxy) passing(l *link) bool {
	for {
		p.mu.Lock()
		hung := p.mu.hung
		p.mu.Unlock()
		if hung == nil {
			return !l.ended()
		}
		select {
		case <-hung:
		case <-l.done:
			return false
		}
	}
}

// trap is a disturbance that waits for a request.
type trap struct {
	kind   trapKind
	match  string
	left   int // bytes, for afterBytes
	sprung chan struct{}
	once   sync.Once
}

func (t *trap) spring() { t.once.Do(func() { close(t.sprung) }) }

type trapKind int

const (
	beforeRequest trapKind = iota
	beforeAnswer
	afterBytes
)

// springs looks whether a chunk of requests, which follows the bytes before, springs the trap. It returns the
// trap if so (nobody else gets it then) and how many bytes of the chunk may still pass.
func (p *Proxy) springs(before, chunk []byte) (*trap, int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	t := p.mu.trap
	switch {
	case t == nil:
		return nil, len(chunk)
	case t.kind == afterBytes:
		if t.left > len(chunk) {
			t.left -= len(chunk)
			return nil, len(chunk)
		}
		p.mu.trap = nil
		return t, t.left
	case !contains(before, chunk, t.match):
		return nil, len(chunk)
	}
	p.mu.trap = nil
	if t.kind == beforeRequest {
		return t, 0
	}
	return t, len(chunk)
}
