package sqlraft

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// A member may reach another one that does not reach it: there is a firewall between them, or the other comes from an
// address that its certificate does not name. (In etcd it is the receiver who dials a stream, so that packets pass
// where either member reaches the other.) It offers the other connections then, which it dials, and on which the other
// asks as if it had dialled:
//
//	GET /raft/offer HTTP/1.1
//	Connection: Upgrade
//	Upgrade: quire-raft-offer
//	(who asks whom, as for a stream)
//
// After "101 Switching Protocols" the one that was dialled sends HTTP requests, and the dialler serves them like those
// that come to its own port. A few connections wait at the other; what it takes is replaced.
const (
	offerPath    = "/raft/offer"
	offerUpgrade = "quire-raft-offer"

	offersWaiting = int(lanes) + 1 // one more, for a request
	offersKept    = 2 * offersWaiting
)

// offerNow starts to offer connections if the peer needs them.
func (p *peer) offerNow() {
	p.mu.Lock()
	start := !p.mu.offering && p.needsOffersLocked()
	p.mu.offering = p.mu.offering || start
	p.mu.Unlock()
	if !start {
		return
	}
	if !p.t.run(p.offer) {
		p.mu.Lock()
		p.mu.offering = false
		p.mu.Unlock()
	}
}

// offerSoon looks whether the peer needs offers once it has had the time to dial by itself.
func (p *peer) offerSoon() { time.AfterFunc(p.t.o.offerAfter, p.offerNow) }

// offer keeps connections waiting at the peer as long as it needs them.
func (p *peer) offer() {
	var all sync.WaitGroup
	for range offersWaiting {
		all.Go(func() {
			for p.needsOffers() {
				if err := p.offerOne(); err != nil {
					if url := p.out[prompt].dialled(); url != "" && p.ctx.Err() == nil {
						p.noteFailure(url, fmt.Errorf("sqlraft: offering a connection to a member that cannot reach this one: %w", err))
					}
					p.pause(p.t.o.offerAfter)
				}
			}
		})
	}
	all.Wait()
	p.mu.Lock()
	p.mu.offering = false
	p.mu.Unlock()
	p.offerNow() // in case that it has become needed since
}

func (p *peer) needsOffers() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.needsOffersLocked()
}

// needsOffersLocked tells whether the peer has been reached for a while and does not reach this member by itself.
func (p *peer) needsOffersLocked() bool {
	if !p.mu.member || p.ctx.Err() != nil {
		return false
	}
	needed := false
	for l := range lanes {
		since := p.out[l].upSince()
		// One that has been offered says that it reaches this member no other way.
		if since.IsZero() || time.Since(since) < p.t.o.offerAfter || p.out[l].dialled() == "" {
			return false
		}
		needed = needed || p.mu.in[l] == nil || p.mu.in[l].offered
	}
	return needed
}

// offerOne dials the peer, waits until it asks something or offers are not needed any more, and has it served.
func (p *peer) offerOne() error {
	t := p.t
	to, err := targetOf(p.out[prompt].dialled())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(p.ctx, t.o.dialTimeout)
	defer cancel()
	conn, err := t.dialer.dial(ctx, to, nil)
	if err != nil {
		return err
	}
	defer context.AfterFunc(p.ctx, func() { _ = conn.Close() })()
	r := bufio.NewReader(conn)
	err = conn.SetDeadline(time.Now().Add(t.o.dialTimeout))
	if err == nil {
		err = p.introduceOffer(conn, r)
	}
	if err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	for err == nil {
		if err = conn.SetReadDeadline(time.Now().Add(t.o.readTimeout)); err != nil {
			break
		}
		_, err = r.Peek(1)
		if err == nil {
			// net/http sets deadlines of its own.
			if err = conn.SetReadDeadline(time.Time{}); err == nil && t.offered.push(&offeredConn{Conn: conn, r: r}) {
				return nil
			}
			break
		}
		if errors.Is(err, os.ErrDeadlineExceeded) && p.needsOffers() {
			err = nil
		}
	}
	_ = conn.Close() // nothing was asked on it
	if !p.needsOffers() {
		return nil
	}
	return err
}

func (p *peer) introduceOffer(conn net.Conn, r *bufio.Reader) error {
	cluster := p.t.o.clusterID()
	request, err := p.t.newRequest(p.ctx, http.MethodGet, "http://"+offerUpgrade+offerPath, nil, p.id, cluster)
	if err != nil {
		return err
	}
	request.Header.Set("Connection", "Upgrade")
	request.Header.Set("Upgrade", offerUpgrade)
	if err := request.Write(conn); err != nil {
		return err
	}
	answer, err := http.ReadResponse(r, request)
	if err != nil {
		return err
	}
	if answer.StatusCode != http.StatusSwitchingProtocols || answer.Header.Get("Upgrade") != offerUpgrade {
		return refusalOf(answer, p.id, cluster)
	}
	return nil
}

func (p *peer) pause(d time.Duration) {
	select {
	case <-time.After(d):
	case <-p.ctx.Done():
	}
}

// offeredConn is a connection that this member has offered, once the other one asks something on it.
type offeredConn struct {
	net.Conn
	r *bufio.Reader // of Conn
}

func (c *offeredConn) Read(b []byte) (int, error) { return c.r.Read(b) }

// offeredListener is where the server accepts connections that this member has offered.
type offeredListener struct {
	conns  chan net.Conn
	closed chan struct{}
	close  func()
}

func newOfferedListener() *offeredListener {
	l := &offeredListener{conns: make(chan net.Conn), closed: make(chan struct{})}
	l.close = sync.OnceFunc(func() { close(l.closed) })
	return l
}

// push returns false once the listener is closed.
func (l *offeredListener) push(c net.Conn) bool {
	select {
	case l.conns <- c:
		return true
	case <-l.closed:
		return false
	}
}

func (l *offeredListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *offeredListener) Close() error {
	l.close()
	return nil
}

func (l *offeredListener) Addr() net.Addr { return &net.UnixAddr{Name: "offered", Net: "offered"} }

// serveOffer takes a connection that another member offers.
func (t *transport) serveOffer(w http.ResponseWriter, r *http.Request, from uint64) {
	if !strings.EqualFold(r.Header.Get("Upgrade"), offerUpgrade) {
		http.Error(w, "not an offer of a member", http.StatusBadRequest)
		return
	}
	p := t.peer(from)
	if p == nil || !p.isMember() {
		http.Error(w, errUnknownMember.Error(), http.StatusServiceUnavailable)
		return
	}
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	if buffered.Reader.Buffered() > 0 {
		err = errors.New("sqlraft: a member that offers a connection speaks on it")
	}
	if err == nil {
		err = conn.SetDeadline(time.Now().Add(t.o.dialTimeout))
	}
	if err == nil {
		_, err = fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n%s: %s\r\n%s: %s\r\n\r\n",
			offerUpgrade, headerCluster, hexID(t.o.clusterID()), headerFrom, hexID(t.o.id))
	}
	if err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	if err != nil {
		_ = conn.Close() // it offers another
		return
	}
	p.keepOffer(&offer{conn: conn, watched: make(chan error, 1)})
}

// offer is a connection that another member has offered and that waits to be taken.
type offer struct {
	conn    net.Conn
	watched chan error // why watching it has ended
}

// keepOffer has o wait to be taken. The oldest one goes when there are too many.
func (p *peer) keepOffer(o *offer) {
	if !p.t.run(func() { p.watchOffer(o) }) {
		_ = o.conn.Close() // nothing was asked on it
		return
	}
	var oldest *offer
	p.mu.Lock()
	p.mu.offers = append(p.mu.offers, o)
	if len(p.mu.offers) > offersKept {
		oldest, p.mu.offers = p.mu.offers[0], slices.Delete(p.mu.offers, 0, 1)
	}
	p.mu.Unlock()
	if oldest != nil {
		_ = oldest.conn.Close()
	}
	if p.ctx.Err() != nil {
		p.dropOffers()
	}
	for _, out := range p.out {
		out.retryNow()
	}
}

// watchOffer forgets o when the other side closes it. Until it is taken nothing comes on it.
func (p *peer) watchOffer(o *offer) {
	_, err := o.conn.Read(make([]byte, 1))
	if err == nil {
		err = errors.New("sqlraft: a member that offers a connection speaks on it")
	}
	p.mu.Lock()
	i := slices.Index(p.mu.offers, o)
	if i >= 0 {
		p.mu.offers = slices.Delete(p.mu.offers, i, i+1)
	}
	p.mu.Unlock()
	if i >= 0 {
		_ = o.conn.Close() // it is closed there already
	}
	o.watched <- err
}

// takeOffer returns the newest connection that waits, nil without one.
func (p *peer) takeOffer() net.Conn {
	for {
		p.mu.Lock()
		last := len(p.mu.offers) - 1
		if last < 0 {
			p.mu.Unlock()
			return nil
		}
		o := p.mu.offers[last]
		p.mu.offers = slices.Delete(p.mu.offers, last, last+1)
		p.mu.Unlock()
		err := o.conn.SetReadDeadline(time.Unix(1, 0)) // ends watchOffer
		if why := <-o.watched; err == nil && errors.Is(why, os.ErrDeadlineExceeded) {
			if err = o.conn.SetReadDeadline(time.Time{}); err == nil {
				return o.conn
			}
		}
		_ = o.conn.Close() // it was closed while it waited
	}
}

func (p *peer) hasOffer() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.mu.offers) > 0
}

func (p *peer) dropOffers() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, o := range p.mu.offers {
		_ = o.conn.Close() // wakes watchOffer
	}
	p.mu.offers = nil
}

var errNoOffer = &dialError{errors.New("sqlraft: the member offers no connection")}

// offerClient makes each request on a connection that the peer has offered.
func (p *peer) offerClient() *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialContext: func(context.Context, string, string) (net.Conn, error) {
				if conn := p.takeOffer(); conn != nil {
					return conn, nil
				}
				return nil, errNoOffer
			},
			DisableKeepAlives: true, DisableCompression: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}
