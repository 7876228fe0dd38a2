package sqlraft

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quire-db/quire/backend"
)

// proxy sits between two members and is a bad network.
type proxy struct {
	t      testing.TB
	l      net.Listener
	url    string
	target string
	wg     sync.WaitGroup

	mu struct {
		sync.Mutex
		conns  map[net.Conn]bool // of either side
		total  int
		hole   bool          // bytes vanish, connections stand
		refuse bool          // connections are ended at once
		delay  time.Duration // of each portion
		rate   int           // bytes per second of each connection, 0: any
		after  int           // bytes from who dials after which a connection is cut, 0: never
	}
}

func newProxy(t testing.TB, l net.Listener, targetURL string) *proxy {
	t.Helper()
	to, err := targetOf(targetURL)
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{t: t, l: l, url: "http://" + l.Addr().String(), target: to.address}
	p.mu.conns = map[net.Conn]bool{}
	p.wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			p.wg.Go(func() { p.pass(conn) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		p.cut()
		p.wg.Wait()
	})
	return p
}

// listenProxy puts a proxy before m.
func listenProxy(t testing.TB, m *testMember) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return newProxy(t, l, m.url)
}

func (p *proxy) set(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
}

func (p *proxy) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mu.total
}

// cut ends all connections.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.mu.conns {
		c.Close()
	}
}

func (p *proxy) pass(in net.Conn) {
	p.mu.Lock()
	refuse := p.mu.refuse
	p.mu.Unlock()
	defer in.Close()
	if refuse {
		return
	}
	out, err := net.Dial("tcp", p.target)
	if err != nil {
		return
	}
	defer out.Close()
	p.mu.Lock()
	p.mu.conns[in], p.mu.conns[out] = true, true
	p.mu.total++
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.mu.conns, in)
		delete(p.mu.conns, out)
		p.mu.Unlock()
	}()
	var both sync.WaitGroup
	both.Go(func() { p.copy(out, in, true) })
	both.Go(func() { p.copy(in, out, false) })
	both.Wait()
}

func (p *proxy) copy(to, from net.Conn, forth bool) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 4<<10)
	total := 0
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		p.mu.Lock()
		hole, delay, rate, after := p.mu.hole, p.mu.delay, p.mu.rate, p.mu.after
		p.mu.Unlock()
		if rate > 0 {
			delay += time.Duration(n) * time.Second / time.Duration(rate)
		}
		time.Sleep(delay) // is the slow network
		if total += n; forth && after > 0 && total > after {
			return
		}
		if hole {
			continue
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

// throughProxies makes members 1 and 2 that dial each other through proxies: the first is what 1 dials.
func throughProxies(t testing.TB, change func(*transportOptions)) (a, b *testMember, toB, toA *proxy) {
	t.Helper()
	a = newTestMember(t, 1, "127.0.0.1:0", change)
	b = newTestMember(t, 2, "127.0.0.1:0", change)
	toB, toA = listenProxy(t, b), listenProxy(t, a)
	ms := backend.Membership{ClusterID: testCluster, Members: []backend.Member{
		{ID: 1, PeerURLs: []string{toA.url}}, {ID: 2, PeerURLs: []string{toB.url}}}}
	a.know(ms)
	b.know(ms)
	connectedToEachOther(t, a, b)
	return a, b, toB, toA
}

// TestCutsLoseButNeverReorderOrDamage cuts connections at all kinds of places.
func TestCutsLoseButNeverReorderOrDamage(t *testing.T) {
	r := seeded(t)
	a, b, toB, _ := throughProxies(t, nil)
	last := [lanes]uint64{}
	bad := ""
	b.mu.Lock()
	b.mu.keep = false
	received := 0
	b.mu.seen = func(p packet) {
		l := laneOf(&p)
		received++
		if n := p.message.GetCommit(); n <= last[l] {
			bad = fmt.Sprintf("%s lane: %d after %d", laneNames[l], n, last[l])
		} else {
			last[l] = n
		}
		for _, e := range p.message.Entries {
			for _, c := range e.Data {
				if c != byte(e.GetIndex()) {
					bad = fmt.Sprintf("entry %d is damaged", e.GetIndex())
					return
				}
			}
		}
	}
	b.mu.Unlock()
	n := uint64(0)
	for cut := range 20 {
		toB.set(func() { toB.mu.after = 2000 + r.IntN(300<<10) })
		until := toB.count() + 2
		for deadline := time.Now().Add(5 * time.Second); toB.count() < until; {
			if time.Now().After(deadline) {
				t.Fatalf("cut %d: the members do not connect again", cut)
			}
			n++
			big := entries(1, 2, n, r.IntN(60<<10))
			data := big.message.Entries[0].Data
			for i := range data {
				data[i] = byte(n)
			}
			a.send([]packet{heartbeat(1, 2, n), big})
			time.Sleep(time.Millisecond) // a leader does not send without end either
		}
	}
	toB.set(func() { toB.mu.after = 0 })
	toB.cut()
	a.sendNewUntilThere(b, &n)
	b.mu.Lock()
	defer b.mu.Unlock()
	if bad != "" {
		t.Error(bad)
	}
	if received < 50 {
		t.Errorf("only %d of %d packets have arrived", received, 2*n)
	}
	if lost := with(a, func() int { return a.mu.unreachable[2] }); lost == 0 {
		t.Error("nobody was told that packets may be lost")
	}
	t.Logf("%d of %d packets have arrived", received, 2*n)
}

func (m *testMember) sendNewUntilThere(to *testMember, n *uint64) {
	m.t.Helper()
	arrived := make(chan struct{})
	var once sync.Once
	from := *n
	to.mu.Lock()
	seen := to.mu.seen
	to.mu.seen = func(p packet) {
		seen(p)
		if p.message.GetCommit() > from {
			once.Do(func() { close(arrived) })
		}
	}
	to.mu.Unlock()
	eventually(m.t, "packets arrive again", func() bool {
		*n++
		m.send([]packet{heartbeat(m.id, to.id, *n)})
		select {
		case <-arrived:
			return true
		default:
			return false
		}
	})
}

func TestABlackHoleIsNoticed(t *testing.T) {
	a, b, toB, toA := throughProxies(t, func(o *transportOptions) {
		o.readTimeout = 300 * time.Millisecond
	})
	since, _ := a.activeSince(2)
	// Quiet is not dead.
	time.Sleep(time.Second)
	if now, ok := a.activeSince(2); !ok || !now.Equal(since) {
		t.Fatal("a connection on which nothing was sent was given up")
	}
	if n := with(a, func() int { return a.mu.roundTrips }); n == 0 {
		t.Error("no round trip was measured")
	}
	for _, p := range []*proxy{toB, toA} {
		p.set(func() { p.mu.hole = true })
	}
	began := time.Now()
	for _, m := range []*testMember{a, b} {
		other := 3 - m.id
		eventually(t, "a dead connection is noticed", func() bool {
			_, ok := m.activeSince(other)
			return !ok && with(m, func() bool { return m.mu.lost[other] != nil && m.mu.unreachable[other] > 0 })
		})
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("a dead connection was noticed after %v", took)
	}
	for _, p := range []*proxy{toB, toA} {
		p.set(func() { p.mu.hole = false })
	}
	connectedToEachOther(t, a, b)
	if now, _ := a.activeSince(2); !now.After(began) {
		t.Error("activeSince has not noticed the interruption")
	}
}

// TestAWriteThatHangsEnds: the other side lets this one in and then reads nothing, as a process that is stopped.
func TestAWriteThatHangsEnds(t *testing.T) {
	var let atomic.Int32
	var open struct {
		sync.Mutex
		conns []net.Conn
	}
	stopped := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", streamUpgrade)
		if r.Header.Get(headerLane) == laneNames[bulk] {
			let.Add(1)
		}
		open.Lock()
		open.conns = append(open.conns, conn)
		open.Unlock()
	}))
	defer stopped.Close()
	a := newTestMember(t, 1, "127.0.0.1:0", func(o *transportOptions) { o.readTimeout = 300 * time.Millisecond })
	a.setPeers([]backend.Member{{ID: 2, PeerURLs: []string{stopped.URL}}})
	began := time.Now()
	for let.Load() < 3 {
		a.send([]packet{entries(1, 2, 1, 8<<20), entries(1, 2, 2, 8<<20)}) // more than the system's buffers hold
		time.Sleep(20 * time.Millisecond)                                  // polls
		if time.Since(began) > 10*time.Second {
			t.Fatalf("dialled %d times: a write that hangs is not given up", let.Load())
		}
	}
	open.Lock()
	defer open.Unlock()
	for _, conn := range open.conns {
		conn.Close()
	}
}

// TestOneWayIsNoConnection: packets leave, none can come.
func TestOneWayIsNoConnection(t *testing.T) {
	a, b, _, toA := throughProxies(t, nil)
	toA.set(func() { toA.mu.refuse = true })
	toA.cut()
	for _, m := range []*testMember{a, b} {
		eventually(t, "one way is not connected", func() bool { _, ok := m.activeSince(3 - m.id); return !ok })
	}
	a.sendUntilThere(b)
	toA.set(func() { toA.mu.refuse = false })
	connectedToEachOther(t, a, b)
}

// TestALargePacketOnASlowLine takes far longer than the timeouts, and gets there.
func TestALargePacketOnASlowLine(t *testing.T) {
	a, b, toB, _ := throughProxies(t, func(o *transportOptions) {
		o.readTimeout = 1500 * time.Millisecond
	})
	toB.set(func() { toB.mu.rate = 2 << 20 })
	began := time.Now()
	a.send([]packet{entries(1, 2, 1, 6<<20)})
	arrived := func() bool { return with(b, func() bool { return len(b.mu.got) == 1 }) }
	eventually(t, "six megabytes have arrived", arrived)
	if took := time.Since(began); took < 2*time.Second {
		t.Fatalf("the line is not slow: %v", took)
	}
	if err := with(a, func() error { return a.mu.lost[2] }); err != nil {
		t.Errorf("the connection was given up meanwhile: %v", err)
	}
}

// TestASlowMemberHoldsUpNobody: neither other members nor what is urgent for itself.
func TestASlowMemberHoldsUpNobody(t *testing.T) {
	change := func(o *transportOptions) { o.queueBytes = 16 << 20 }
	a := newTestMember(t, 1, "127.0.0.1:0", change)
	slow := newTestMember(t, 2, "127.0.0.1:0", change)
	fast := newTestMember(t, 3, "127.0.0.1:0", change)
	p := listenProxy(t, slow)
	ms := backend.Membership{ClusterID: testCluster, Members: []backend.Member{
		{ID: 1, PeerURLs: []string{a.url}}, {ID: 2, PeerURLs: []string{p.url}}, {ID: 3, PeerURLs: []string{fast.url}}}}
	for _, m := range []*testMember{a, slow, fast} {
		m.know(ms)
	}
	connectedToEachOther(t, a, slow, fast)
	p.set(func() { p.mu.rate = 1 << 20 })
	var took []time.Duration
	heard := make(chan time.Time, 1000)
	slow.mu.Lock()
	slow.mu.keep = false
	slow.mu.seen = func(q packet) {
		if laneOf(&q) == prompt {
			heard <- time.Now()
		}
	}
	slow.mu.Unlock()
	for i := range uint64(40) {
		began := time.Now()
		a.send([]packet{entries(1, 2, i, 1<<20), entries(1, 3, i, 1<<20), heartbeat(1, 2, i), heartbeat(1, 3, i)})
		if sending := time.Since(began); sending > time.Second {
			t.Errorf("send has waited %v", sending)
		}
		select {
		case at := <-heard:
			took = append(took, at.Sub(began))
		case <-time.After(5 * time.Second):
			t.Fatal("a heartbeat is stuck behind entries")
		}
		eventually(t, "the fast member has everything", func() bool {
			return with(fast, func() bool { return len(fast.mu.got) == 2*int(i+1) })
		})
	}
	worst := time.Duration(0)
	for _, d := range took {
		worst = max(worst, d)
	}
	if worst > time.Second { // 16 MiB would take as many seconds
		t.Errorf("a heartbeat to a member on a slow line took %v", worst)
	}
	if n := with(a, func() int { return a.mu.dropped }); n == 0 {
		t.Error("40 MiB fit into a queue of 16 MiB")
	}
	eventually(t, "full queues are reported", func() bool { return with(a, func() bool { return a.mu.unreachable[2] > 0 }) })
	if n := with(a, func() int { return a.mu.unreachable[3] }); n > 0 {
		t.Error("the fast member was reported")
	}
	t.Logf("worst heartbeat %v", worst)
}

func TestAQueueThatIsFullDrops(t *testing.T) {
	o := &outgoing{p: &peer{t: &transport{}}}
	o.p.t.o.queueBytes, o.p.t.o.queuePackets = 1<<20, 10
	if !o.put(entries(1, 2, 1, 2<<20)) {
		t.Error("a packet larger than the queue never gets through")
	}
	if o.put(heartbeat(1, 2, 1)) {
		t.Error("the queue takes more bytes than it may")
	}
	o.take(nil)
	for i := range uint64(10) {
		if !o.put(heartbeat(1, 2, i)) {
			t.Fatalf("the queue is full after %d packets", i)
		}
	}
	if o.put(heartbeat(1, 2, 1)) {
		t.Error("the queue takes more packets than it may")
	}
}

// TestAMemberThatComesBackIsFoundAtOnce: whoever starts dials the others, and they do not wait for their next attempt.
func TestAMemberThatComesBackIsFoundAtOnce(t *testing.T) {
	all := newTestCluster(t, 2, nil)
	connectedToEachOther(t, all...)
	a, b := all[0], all[1]
	address := b.o.listeners[0].Addr().String()
	for range 2 {
		if err := b.close(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the dead member is noticed", func() bool { _, ok := a.activeSince(2); return !ok })
		time.Sleep(1500 * time.Millisecond) // until attempts are a second apart
		a.send([]packet{heartbeat(1, 2, 99)})
		b = newTestMember(t, 2, address, nil)
		began := time.Now()
		introduce(a, b)
		connectedToEachOther(t, a, b)
		if took := time.Since(began); took > 300*time.Millisecond {
			t.Errorf("connected %v after the member came back", took)
		}
		a.sendUntilThere(b)
		if stale := with(b, func() packet { return b.mu.got[0] }); stale.message.GetCommit() == 99 {
			t.Error("what was sent while the member was away was kept for it")
		}
	}
	if n := with(a, func() int { return a.mu.connected[2] }); n != 3 {
		t.Errorf("%d connections were told, not 3", n)
	}
	if err := with(a, func() error { return a.mu.lost[2] }); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("lost because of %v", err)
	}
}
