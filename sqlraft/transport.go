package sqlraft

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/quire-db/quire/backend"
)

// transport carries everything between this member and the others.
//
// To each of them it keeps two streams, which it dials, and accepts two, which the other dials (see lane); where only one
// of them reaches the other, it dials for both (see transport_offer.go). Packets of
// one lane arrive in the order in which they were sent, unchanged, or not at all: what was under way when a connection
// broke is lost, and nobody learns which packets those were. There is no order between the lanes.
//
// Everything else is plain HTTP on the same port: who the members are, copies of the state, small requests.
//
// All methods may be called at any time from any goroutine.
type transport struct {
	o       transportOptions
	started time.Time
	ctx     context.Context // done once close was called
	stop    context.CancelFunc
	server  *http.Server
	dialer  *dialer
	client  *http.Client
	offered *offeredListener

	mu struct {
		sync.RWMutex
		peers  map[uint64]*peer
		closed bool
	}
	wg sync.WaitGroup // every goroutine and every HTTP request; Add only under mu, while not closed

	// Who was turned away of late, so that those who keep coming are told of now and then only.
	refused struct {
		sync.Mutex
		at map[string]time.Time
	}

	// Members that a packet could not be sent to, on their way to handler.unreachable.
	lost struct {
		sync.Mutex
		ids  map[uint64]bool
		wake chan struct{}
	}
}

// transportOptions say who this member is and who wants to hear of it. What is 0 or nil below "defaults" is filled in.
type transportOptions struct {
	id uint64
	// clusterID may return 0 while it is not known yet: until then nobody is dialled or let in.
	clusterID func() uint64
	// listeners are what others dial; TLS, if any, is spoken inside them. The transport closes them.
	listeners []net.Listener
	handler   peerHandler

	// defaults
	clientTLS    func() *tls.Config              // for each connection to an https or unixs URL; nil: there are none
	localAddr    net.IP                          // that TCP connections come from; nil: the system's choice
	hooks        transportHooks                  //
	version      func() []byte                   // what GET /version answers, in JSON; nil: not found
	server       func(http.Handler) *http.Server // nil: a plain one
	dialTimeout  time.Duration                   // until a stream stands, 2 s
	readTimeout  time.Duration                   // of silence before a connection counts as dead, 5 s
	offerAfter   time.Duration                   // that a member is reached and does not dial, 2 s: see transport_offer.go
	queueBytes   int                             // waiting for one lane to one member, 64 MiB
	queuePackets int                             // the same, 16384
}

// peerHandler is what the transport works for. Only request may take its time; the others are in the way of packets.
type peerHandler interface {
	// receive gets packets in the order in which one lane of one member has sent them, and owns them. It is called by
	// a goroutine for each lane.
	receive(packets []packet)
	// unreachable says that packets to a member were dropped, or may have been lost with a connection. It is never
	// called from within send.
	unreachable(id uint64)
	// refused says that a member does not let this one in: ErrRemoved, errWrongCluster or errWrongMember, wrapped. It
	// is repeated as long as that is so.
	refused(id uint64, err error)
	// membership is who belongs to the cluster as far as this member has applied.
	membership() backend.Membership
	// openSnapshot finds the copy of the state that a MsgSnap has named; release is called once it has been read.
	openSnapshot(name string) (r io.ReaderAt, size int64, release func(), err error)
	// serve answers a request of another member. The text of an error reaches it.
	serve(ctx context.Context, from uint64, path string, body []byte) ([]byte, error)
}

// transportHooks tell what happens. Each may be nil; they must return soon.
type transportHooks struct {
	// connected: packets go both ways; what was sent before may be lost. lost: they do not any more, because of err.
	connected func(id uint64)
	lost      func(id uint64, err error)
	// unreached: a member cannot be dialled. Told when the reason is new, and every 30 s.
	unreached func(id uint64, url string, err error)
	// rejected: somebody was not let in.
	rejected func(remote string, from uint64, err error)
	// dropped: packets were not sent because too many waited already, or because the member is not connected.
	dropped func(id uint64, packets int)
	// sent and received count what went over streams; roundTrip is what a ping took.
	sent, received func(id uint64, bytes int)
	roundTrip      func(id uint64, took time.Duration)
	// serving and served: see Hooks.SnapshotServing.
	serving func(to uint64)
	served  func(to uint64, took time.Duration, err error)
}

// What another member may have against this one; peerHandler.refused gets them wrapped. The texts are etcd's.
var (
	// ErrRemoved is also what Open and Node.Failed say: the member's data is of no use any more.
	ErrRemoved      = errors.New("the member has been permanently removed from the cluster")
	errWrongCluster = errors.New("cluster ID mismatch")
	errWrongMember  = errors.New("member ID mismatch")
)

// rejectionsEvery is how often it is told that the same one was turned away for the same reason.
const rejectionsEvery = 30 * time.Second

var errTransportClosed = errors.New("sqlraft: the transport is closed")

// startTransport serves the listeners. It knows nobody before setPeers is called.
func startTransport(o transportOptions) *transport {
	o.dialTimeout = cmp.Or(o.dialTimeout, 2*time.Second)
	o.readTimeout = cmp.Or(o.readTimeout, 5*time.Second)
	o.offerAfter = cmp.Or(o.offerAfter, 2*time.Second)
	o.queueBytes = cmp.Or(o.queueBytes, 64<<20)
	o.queuePackets = cmp.Or(o.queuePackets, 16384)
	o.hooks.fill()
	t := &transport{o: o, started: time.Now(), offered: newOfferedListener()}
	t.ctx, t.stop = context.WithCancel(context.Background())
	t.dialer = &dialer{tls: o.clientTLS, localAddr: o.localAddr, timeout: o.dialTimeout}
	t.client = t.dialer.httpClient()
	t.mu.peers = map[uint64]*peer{}
	t.lost.ids, t.lost.wake = map[uint64]bool{}, make(chan struct{}, 1)

	handler := http.HandlerFunc(t.serveHTTP)
	if t.server = (&http.Server{Handler: handler}); o.server != nil {
		t.server = o.server(handler)
	}
	t.server.ReadHeaderTimeout = cmp.Or(t.server.ReadHeaderTimeout, 10*time.Second)
	t.server.IdleTimeout = cmp.Or(t.server.IdleTimeout, time.Minute)
	t.server.Protocols = new(http.Protocols) // HTTP/2 has no upgrade
	t.server.Protocols.SetHTTP1(true)
	t.server.BaseContext = func(net.Listener) context.Context { return t.ctx }
	t.run(t.reportLost)
	for _, l := range append(slices.Clone(o.listeners), net.Listener(t.offered)) {
		t.run(func() {
			if err := t.server.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) && t.ctx.Err() == nil {
				t.o.hooks.rejected(l.Addr().String(), 0, fmt.Errorf("sqlraft: no member can reach this one on %s any more; start it again: %w", l.Addr(), err))
			}
		})
	}
	return t
}

func (h *transportHooks) fill() {
	if h.connected == nil {
		h.connected = func(uint64) {}
	}
	if h.lost == nil {
		h.lost = func(uint64, error) {}
	}
	if h.unreached == nil {
		h.unreached = func(uint64, string, error) {}
	}
	if h.rejected == nil {
		h.rejected = func(string, uint64, error) {}
	}
	if h.dropped == nil {
		h.dropped = func(uint64, int) {}
	}
	if h.sent == nil {
		h.sent = func(uint64, int) {}
	}
	if h.received == nil {
		h.received = func(uint64, int) {}
	}
	if h.serving == nil {
		h.serving = func(uint64) {}
	}
	if h.served == nil {
		h.served = func(uint64, time.Duration, error) {}
	}
	if h.roundTrip == nil {
		h.roundTrip = func(uint64, time.Duration) {}
	}
}

// run starts a goroutine that close waits for; false once the transport is closed.
func (t *transport) run(f func()) bool {
	if !t.begin() {
		return false
	}
	go func() {
		defer t.wg.Done()
		f()
	}()
	return true
}

// begin counts a goroutine that exists already; t.wg.Done ends it.
func (t *transport) begin() bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.mu.closed {
		return false
	}
	t.wg.Add(1)
	return true
}

// close ends all connections and waits for all goroutines, so that the handler is not called any more.
func (t *transport) close() error {
	t.mu.Lock()
	t.mu.closed = true
	peers := t.mu.peers
	t.mu.peers = map[uint64]*peer{}
	t.mu.Unlock()
	t.stop()
	err := t.server.Close()
	for _, l := range t.o.listeners { // those that Serve had not been called with yet
		if cerr := l.Close(); !errors.Is(cerr, net.ErrClosed) {
			err = errors.Join(err, cerr)
		}
	}
	for _, p := range peers {
		p.end(errTransportClosed)
	}
	t.client.CloseIdleConnections()
	t.wg.Wait()
	return err
}

// setPeers makes members, without this one, those that are dialled and sent to. Who is not among them any more is cut
// off; whether it may come back is up to handler.membership.
func (t *transport) setPeers(members []backend.Member) {
	t.mu.Lock()
	if t.mu.closed {
		t.mu.Unlock()
		return
	}
	var gone []*peer
	for id, p := range t.mu.peers {
		if p.isMember() && !slices.ContainsFunc(members, func(m backend.Member) bool { return m.ID == id }) {
			gone = append(gone, p)
			delete(t.mu.peers, id)
		}
	}
	for _, m := range members {
		if m.ID == t.o.id {
			continue
		}
		if p := t.mu.peers[m.ID]; p != nil {
			p.update(m.PeerURLs)
		} else {
			t.addPeer(m.ID, m.PeerURLs, true)
		}
	}
	t.mu.Unlock()
	for _, p := range gone {
		p.end(errNoMember)
	}
}

// send hands packets over and returns at once. What cannot be kept, because the member is not connected or does not
// keep up, is dropped and reported. The packets must not be changed any more.
func (t *transport) send(packets []packet) {
	var touched []*outgoing
	var dropped []uint64
	t.mu.RLock()
	for i := range packets {
		to := packets[i].to
		if p := t.mu.peers[to]; p == nil {
			dropped = append(dropped, to)
		} else if out := p.out[laneOf(&packets[i])]; !out.put(packets[i]) {
			dropped = append(dropped, to)
		} else if !slices.Contains(touched, out) {
			touched = append(touched, out)
		}
	}
	t.mu.RUnlock()
	for _, out := range touched { // only now: what was sent together is written together
		out.signal()
	}
	for _, id := range dropped {
		t.reportDropped(id, 1)
	}
}

// activeSince tells since when packets have been able to go both ways without interruption.
func (t *transport) activeSince(id uint64) (time.Time, bool) {
	p := t.peer(id)
	if p == nil {
		return time.Time{}, false
	}
	return p.activeSince()
}

func (t *transport) peer(id uint64) *peer {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.mu.peers[id]
}

func (t *transport) reportDropped(id uint64, packets int) {
	t.o.hooks.dropped(id, packets)
	t.reportUnreachable(id)
}

// reject tells that somebody was not let in, unless that was told of late.
func (t *transport) reject(remote string, from uint64, why error) {
	host, _, err := net.SplitHostPort(remote)
	if err != nil {
		host = remote // a socket file has no port
	}
	who, now := fmt.Sprintf("%s %x %v", host, from, why), time.Now()
	t.refused.Lock()
	last, told := t.refused.at[who]
	if told = told && now.Sub(last) < rejectionsEvery; !told {
		if len(t.refused.at) >= maxStrangers {
			t.refused.at = nil
		}
		if t.refused.at == nil {
			t.refused.at = map[string]time.Time{}
		}
		t.refused.at[who] = now
	}
	t.refused.Unlock()
	if !told {
		t.o.hooks.rejected(remote, from, why)
	}
}

func (t *transport) reportUnreachable(id uint64) {
	t.lost.Lock()
	t.lost.ids[id] = true
	t.lost.Unlock()
	select {
	case t.lost.wake <- struct{}{}:
	default:
	}
}

// reportLost calls handler.unreachable on a goroutine of its own: whoever sends may hold what the handler needs.
func (t *transport) reportLost() {
	for {
		select {
		case <-t.ctx.Done():
			return
		case <-t.lost.wake:
		}
		t.lost.Lock()
		ids := t.lost.ids
		t.lost.ids = map[uint64]bool{}
		t.lost.Unlock()
		for id := range ids {
			t.o.handler.unreachable(id)
		}
	}
}
