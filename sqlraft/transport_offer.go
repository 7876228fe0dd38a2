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
// that come to its own port. A few connections wait at the other; what it takes is replaced. A stream stays on such a
// connection until that breaks; then dialling is tried first.
const (
	offerPath    = "/raft/offer"
	offerUpgrade = "quire-raft-offer"

	offersWaiting = int(lanes) + 1 // one more, for a request
	offersKept    = 2 * offersWaiting
)

// offerSoon looks whether the peer needs offers once it has had the time to dial by itself.
func (p *peer) offerSoon() { time.AfterFunc(p.t.o.offerAfter, p.offerIfNeeded) }

// offerIfNeeded has connections wait at the peer as long as it needs them.
func (p *peer) offerIfNeeded() {
	for {
		p.mu.Lock()
		start := p.mu.offering < offersWaiting && p.needsOffersLocked()
		if start {
			p.mu.offering++
		}
		p.mu.Unlock()
		if !start || !p.t.run(p.keepOffering) {
			return // closed: nobody counts any more
		}
	}
}

// keepOffering offers one connection after the other.
func (p *peer) keepOffering() {
	for p.goesOnOffering() {
		err := p.offerOne()
		if err == nil {
			continue
		}
		wait := p.t.o.offerAfter
		var r *refusal
		if errors.As(err, &r) {
			wait *= 15 // an older quire, or one that has not heard of this member
		}
		if url := p.out[prompt].dialled(); url != "" && p.ctx.Err() == nil {
			p.noteFailure(url, fmt.Errorf("sqlraft: offering a connection to a member that does not reach this one: %w", err))
		}
		select {
		case <-time.After(wait):
		case <-p.ctx.Done():
		}
	}
}

// goesOnOffering is false for who ends: it is not counted any more.
func (p *peer) goesOnOffering() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.needsOffersLocked() {
		return true
	}
	p.mu.offering--
	return false
}

func (p *peer) needsOffers() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.needsOffersLocked()
}

// needsOffersLocked tells whether this member has reached the peer for a while, by dialling, and is not dialled by it.
func (p *peer) needsOffersLocked() bool {
	if !p.mu.member || p.ctx.Err() != nil {
		return false
	}
	needed := false
	for l := range lanes {
		since := p.out[l].upSince()
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
	url, cluster := p.out[prompt].dialled(), t.o.clusterID()
	if url == "" {
		return nil // the lane has just broken
	}
	to, err := targetOf(url)
	if err != nil {
		return err
	}
	if self := memberOf(t.o.handler.membership(), t.o.id); self != nil && !to.secure && slices.ContainsFunc(self.PeerURLs, isSecure) {
		// Whoever can change what passes there could ask as the member.
		return fmt.Errorf("sqlraft: %s has no TLS, which this member asks of those that dial it", url)
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
		err = t.askUpgrade(conn, r, offerPath, offerUpgrade, p.id, cluster, nil)
	}
	if err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	for err == nil {
		if err = conn.SetReadDeadline(time.Now().Add(t.o.readTimeout)); err != nil {
			break
		}
		if _, err = r.Peek(1); err == nil {
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

func isSecure(peerURL string) bool {
	to, err := targetOf(peerURL)
	return err == nil && to.secure
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
		err = t.welcome(conn, offerUpgrade)
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
	var tooMany *offer
	p.mu.Lock()
	first := len(p.mu.offers) == 0
	p.mu.offers = append(p.mu.offers, o)
	if len(p.mu.offers) > offersKept {
		tooMany, p.mu.offers = p.mu.offers[0], slices.Delete(p.mu.offers, 0, 1)
	}
	p.mu.Unlock()
	if tooMany != nil {
		_ = tooMany.conn.Close()
	}
	if !p.t.run(func() { p.watchOffer(o) }) {
		o.watched <- errTransportClosed // to who has taken it already
		p.forgetOffer(o)
		return
	}
	if p.ctx.Err() != nil {
		p.dropOffers()
	}
	if first { // those that follow what was taken are no reason to be quick
		for _, out := range p.out {
			out.retryNow()
		}
	}
}

// forgetOffer closes o, unless it was taken.
func (p *peer) forgetOffer(o *offer) {
	p.mu.Lock()
	i := slices.Index(p.mu.offers, o)
	if i >= 0 {
		p.mu.offers = slices.Delete(p.mu.offers, i, i+1)
	}
	p.mu.Unlock()
	if i >= 0 {
		_ = o.conn.Close() // nothing was asked on it
	}
}

// watchOffer forgets o when the other side closes it. Until it is taken nothing comes on it.
func (p *peer) watchOffer(o *offer) {
	_, err := o.conn.Read(make([]byte, 1))
	if err == nil {
		err = errors.New("sqlraft: a member that offers a connection speaks on it")
	}
	p.forgetOffer(o)
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

// dropOffers closes all connections that wait.
func (p *peer) dropOffers() {
	p.mu.Lock()
	offers := p.mu.offers
	p.mu.offers = nil
	p.mu.Unlock()
	for _, o := range offers {
		_ = o.conn.Close() // wakes watchOffer
	}
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
