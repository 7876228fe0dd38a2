package sqlraft

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quire-db/quire/backend"
)

// oneWay returns members 1 and 2, of which 1 does not reach 2 until the returned function is called.
func oneWay(t *testing.T, change ...func(*transportOptions)) (cut, open *testMember, mend func()) {
	t.Helper()
	soon := func(o *transportOptions) {
		o.offerAfter = 50 * time.Millisecond
		for _, c := range change {
			c(o)
		}
	}
	cut, open = newTestMember(t, 1, "127.0.0.1:0", soon), newTestMember(t, 2, "127.0.0.1:0", soon)
	p := listenProxy(t, open)
	p.set(func() { p.mu.refuse = true })
	introduceVia(open, cut, p)
	return cut, open, func() { p.set(func() { p.mu.refuse = false }) }
}

// oneWayTLS is the same where the certificate of 1 is not taken from who dials.
func oneWayTLS(t *testing.T) (cut, open *testMember, mend func()) {
	t.Helper()
	ca := newTestCA(t, "ca")
	var mended atomic.Bool
	strict := ca.config(t, "open")
	strict.VerifyConnection = func(tls.ConnectionState) error {
		if mended.Load() {
			return nil
		}
		return errors.New("the address is not that of the certificate")
	}
	soon := func(o *transportOptions) { o.offerAfter = 50 * time.Millisecond }
	same := func(c *tls.Config) func() *tls.Config { return func() *tls.Config { return c } }
	cut = newRotatingMember(t, 1, same(ca.config(t, "cut")), same(ca.config(t, "cut")), soon)
	open = newRotatingMember(t, 2, same(strict), same(ca.config(t, "open")), soon)
	introduce(cut, open)
	return cut, open, func() { mended.Store(true) }
}

// TestAMemberThatIsNotReachedOffers: all that members say to each other is said where only one reaches the other.
func TestAMemberThatIsNotReachedOffers(t *testing.T) {
	for name, pair := range map[string]func(*testing.T) (cut, open *testMember, mend func()){
		"plain": func(t *testing.T) (*testMember, *testMember, func()) { return oneWay(t) }, "TLS": oneWayTLS} {
		t.Run(name, func(t *testing.T) {
			cut, open, mend := pair(t)
			connectedToEachOther(t, cut, open)
			eventually(t, "it is told that the member cannot be dialled", func() bool { return with(cut, func() bool { return len(cut.mu.unreached) > 0 }) })

			const packets = 200
			for n := range uint64(packets) {
				cut.send([]packet{heartbeat(1, 2, n), entries(1, 2, n, 10<<10)})
				open.send([]packet{heartbeat(2, 1, n), entries(2, 1, n, 10)})
			}
			for _, m := range []*testMember{cut, open} {
				eventually(t, "all packets arrive", func() bool { return with(m, func() bool { return len(m.mu.got) == 2*packets }) })
				var next [lanes]uint64
				for _, p := range with(m, func() []packet { return m.mu.got }) {
					l := laneOf(&p)
					if want := map[lane]packet{prompt: heartbeat(p.from, m.id, next[l]), bulk: entries(p.from, m.id, next[l], map[uint64]int{1: 10 << 10, 2: 10}[p.from])}[l]; !samePacket(&p, &want) {
						t.Fatalf("packet %d of lane %s is another", next[l], laneNames[l])
					}
					next[l]++
				}
			}

			echo := func(_ context.Context, from uint64, path string, body []byte) ([]byte, error) {
				return fmt.Appendf(nil, "%x %s %s", from, path, body), nil
			}
			open.mu.Lock()
			open.mu.serve = echo
			open.mu.snapshots["copy"] = make([]byte, 3<<20)
			open.mu.Unlock()
			for range 10 { // more than wait
				eventually(t, "a connection for a request waits", cut.peer(2).hasOffer)
				if answer, err := cut.request(t.Context(), 2, "path", []byte("body")); err != nil || string(answer) != "1 path body" {
					t.Fatalf("%q, %v", answer, err)
				}
			}
			eventually(t, "a connection for a copy waits", cut.peer(2).hasOffer)
			if err := cut.fetchSnapshot(t.Context(), 2, "copy", 3<<20, sha256.Sum256(make([]byte, 3<<20)), filepath.Join(t.TempDir(), "c"), nil); err != nil {
				t.Errorf("fetching a copy: %v", err)
			}

			// Connections break.
			cut.peer(2).cutOut()
			connectedToEachOther(t, cut, open)

			mend()
			eventually(t, "the member is dialled again", func() bool {
				dialled := cut.peer(2).out[prompt].dialled() != "" && cut.peer(2).out[bulk].dialled() != ""
				if !dialled {
					cut.peer(2).cutOut() // which may have been dialled before
					time.Sleep(20 * time.Millisecond)
				}
				return dialled
			})
			connectedToEachOther(t, cut, open)
			eventually(t, "the last offers are withdrawn", func() bool { return !cut.peer(2).hasOffer() && !open.isOffering(1) })
		})
	}
}

// cutOut ends the connections of the lanes to a peer.
func (p *peer) cutOut() {
	for _, out := range p.out {
		out.mu.Lock()
		if out.mu.conn != nil {
			out.mu.conn.Close()
		}
		out.mu.Unlock()
	}
}

func (m *testMember) isOffering(id uint64) bool {
	p := m.peer(id)
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mu.offering > 0
}

// countingOffers counts the offers that come to a member.
func countingOffers(n *atomic.Int32, after time.Duration) func(*transportOptions) {
	return func(o *transportOptions) {
		o.offerAfter = after
		o.server = func(h http.Handler) *http.Server {
			return &http.Server{ErrorLog: log.New(io.Discard, "", 0), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == offerPath {
					n.Add(1)
				}
				h.ServeHTTP(w, r)
			})}
		}
	}
}

func TestNothingIsOfferedToWhoDials(t *testing.T) {
	var offers atomic.Int32
	all := newTestCluster(t, 2, countingOffers(&offers, 300*time.Millisecond))
	connectedToEachOther(t, all...)
	time.Sleep(900 * time.Millisecond) // nothing tells of what does not happen
	if n := offers.Load(); n != 0 {
		t.Errorf("members that reach each other have made %d offers", n)
	}
}

// TestAnOfferThatDoesNotHelpIsNotTakenInALoop: the streams break as soon as they stand.
func TestAnOfferThatDoesNotHelpIsNotTakenInALoop(t *testing.T) {
	var offers atomic.Int32
	cut, open, _ := oneWay(t, countingOffers(&offers, 50*time.Millisecond))
	connectedToEachOther(t, cut, open)
	before := offers.Load()
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		cut.peer(2).cutOut()
	}
	if n := offers.Load() - before; n > 100 {
		t.Errorf("%d connections were offered in two seconds", n)
	}
	connectedToEachOther(t, cut, open)
}

// TestALaneThatBreaksCostsNoOffer: once it stands again, as many connections wait as before.
func TestALaneThatBreaksCostsNoOffer(t *testing.T) {
	cut, open, _ := oneWay(t)
	waiting := func() int {
		p := cut.peer(2)
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.mu.offers)
	}
	for range 3 {
		eventually(t, "all connections wait", func() bool { return waiting() == offersWaiting })
		out := open.peer(1).out[prompt]
		out.mu.Lock()
		out.mu.conn.Close()
		out.mu.Unlock()
		connectedToEachOther(t, cut, open)
		time.Sleep(1500 * time.Millisecond) // more than the time after which offers are looked at
	}
	eventually(t, "all connections wait", func() bool { return waiting() == offersWaiting })
}

// TestAnOlderMemberIsAskedSeldom: it has never heard of offers.
func TestAnOlderMemberIsAskedSeldom(t *testing.T) {
	var offers atomic.Int32
	older := func(o *transportOptions) {
		countingOffers(&offers, 20*time.Millisecond)(o)
		server := o.server
		o.server = func(h http.Handler) *http.Server {
			return server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == offerPath {
					http.NotFound(w, r)
					return
				}
				h.ServeHTTP(w, r)
			}))
		}
	}
	oneWay(t, older)
	eventually(t, "offers are made", func() bool { return offers.Load() > 0 })
	time.Sleep(400 * time.Millisecond)
	if n := int(offers.Load()); n > 3*offersWaiting {
		t.Errorf("%d offers were made to a member that does not know them", n)
	}
}

// TestNothingIsOfferedWithoutTLSByWhoAsksForIt: whoever is on the line could ask as the member.
func TestNothingIsOfferedWithoutTLSByWhoAsksForIt(t *testing.T) {
	var offers atomic.Int32
	cut, open, _ := oneWay(t, countingOffers(&offers, 20*time.Millisecond))
	ms := open.membership()
	ms.Members = slices.Clone(ms.Members)
	for i := range ms.Members {
		if ms.Members[i].ID == open.id {
			ms.Members[i].PeerURLs = []string{"https://127.0.0.1:1"}
		}
	}
	open.mu.Lock()
	open.mu.membership = ms
	open.mu.Unlock()
	before := offers.Load() // since oneWay
	eventually(t, "it is told", func() bool {
		return with(open, func() bool {
			return slices.ContainsFunc(open.mu.unreached, func(s string) bool { return strings.Contains(s, "has no TLS") })
		})
	})
	cut.peer(2).dropOffers()
	time.Sleep(100 * time.Millisecond)
	if n := int(offers.Load()); n > int(before)+offersWaiting {
		t.Errorf("%d connections were offered", n-int(before))
	}
}

// TestOffersOfTheDeadAreForgotten: by who keeps them, and by a transport that ends.
func TestOffersOfTheDeadAreForgotten(t *testing.T) {
	before := transportGoroutines()
	cut, open, _ := oneWay(t)
	eventually(t, "connections are offered", func() bool { return cut.peer(2).hasOffer() })
	if err := open.close(); err != nil {
		t.Error(err)
	}
	eventually(t, "the offers are forgotten", func() bool { return !cut.peer(2).hasOffer() })
	if err := cut.close(); err != nil {
		t.Error(err)
	}
	cut, open, _ = oneWay(t)
	eventually(t, "connections are offered", func() bool { return cut.peer(2).hasOffer() })
	began := time.Now()
	for _, m := range []*testMember{cut, open} {
		if err := m.close(); err != nil {
			t.Error(err)
		}
	}
	if took := time.Since(began); took > 4*time.Second {
		t.Errorf("closing takes %v while offers wait", took)
	}
	// The proxies' goroutines are none of these.
	eventually(t, "all goroutines have ended", func() bool { return transportGoroutines() <= before })
}

func TestAMemberThatLeavesOffersNothing(t *testing.T) {
	cut, open, _ := oneWay(t)
	connectedToEachOther(t, cut, open)
	cut.know(backend.Membership{ClusterID: testCluster, Members: []backend.Member{{ID: 1, PeerURLs: []string{cut.url}}}, Removed: []uint64{2}})
	eventually(t, "the removed member learns it", func() bool {
		return errors.Is(with(open, func() error { return open.mu.refused[1] }), ErrRemoved)
	})
	eventually(t, "it offers nothing any more", func() bool { return !open.isOffering(1) })
}

// TestAnOfferIsTakenWhileTheTransportCloses: whoever takes it does not wait for ever.
func TestAnOfferIsTakenWhileTheTransportCloses(t *testing.T) {
	a := newTestCluster(t, 2, nil)[0]
	p := a.peer(2)
	if err := a.close(); err != nil {
		t.Fatal(err)
	}
	stop, taken := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(taken)
		for {
			select {
			case <-stop:
				return
			default:
				if p.takeOffer() != nil {
					t.Error("an offer was taken of a member that is not spoken to any more")
				}
			}
		}
	}()
	for range 20000 {
		here, there := net.Pipe()
		p.keepOffer(&offer{conn: here, watched: make(chan error, 1)})
		there.Close()
	}
	close(stop)
	select {
	case <-taken:
	case <-time.After(10 * time.Second):
		t.Fatal("whoever takes an offer hangs")
	}
}

// TestOnlyMembersOffer: others are told so.
func TestOnlyMembersOffer(t *testing.T) {
	a := newTestCluster(t, 2, nil)[0]
	for _, c := range []struct {
		from    uint64
		upgrade string
		status  int
	}{
		{from: 9, upgrade: offerUpgrade, status: http.StatusServiceUnavailable},
		{from: 2, upgrade: "websocket", status: http.StatusBadRequest},
		{from: 1, upgrade: offerUpgrade, status: http.StatusPreconditionFailed},
		{from: 2, upgrade: offerUpgrade, status: http.StatusSwitchingProtocols},
	} {
		r, err := http.NewRequest(http.MethodGet, a.url+offerPath, strings.NewReader(""))
		if err != nil {
			t.Fatal(err)
		}
		for k, v := range map[string]string{headerCluster: hexID(testCluster), headerFrom: hexID(c.from), headerTo: hexID(1),
			headerProtocol: streamProtocol, "Connection": "Upgrade", "Upgrade": c.upgrade} {
			r.Header.Set(k, v)
		}
		answer, err := http.DefaultTransport.RoundTrip(r)
		if err != nil {
			t.Fatal(err)
		}
		if answer.StatusCode != c.status {
			t.Errorf("member %d with %s: %s", c.from, c.upgrade, answer.Status)
		}
		if c.status == http.StatusSwitchingProtocols {
			eventually(t, "what was offered waits", a.peer(2).hasOffer)
		}
		answer.Body.Close()
	}
	eventually(t, "what was offered by nobody real is forgotten", func() bool { return !a.peer(2).hasOffer() })
}
