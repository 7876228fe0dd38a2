package sqlraft

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/quire-db/quire/backend"
	"github.com/quire-db/quire/test/ports"
)

const testCluster = 0xc1

// testMember is a transport and what it has heard.
type testMember struct {
	*transport
	t   testing.TB
	id  uint64
	url string

	mu struct {
		sync.Mutex
		got         []packet
		refused     map[uint64]error
		unreachable map[uint64]int
		connected   map[uint64]int
		lost        map[uint64]error
		unreached   []string
		rejected    []error
		dropped     int
		roundTrips  int
		membership  backend.Membership
		snapshots   map[string][]byte
		readSnap    func(offset int64) // called before each read of a snapshot
		serve       func(ctx context.Context, from uint64, path string, body []byte) ([]byte, error)
		keep        bool           // got is kept
		seen        func(packet)   // called with mu held
		before      func([]packet) // called without, before anything else
	}
}

// newTestMember listens on address, of which a unix socket's begins with a slash. It knows nobody.
func newTestMember(t testing.TB, id uint64, address string, change func(*transportOptions)) *testMember {
	t.Helper()
	network := "tcp"
	if strings.HasPrefix(address, "/") {
		network = "unix"
	}
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	m := &testMember{t: t, id: id, url: "http://" + l.Addr().String()}
	if network == "unix" {
		m.url = "unix://" + address
	}
	m.mu.keep = true
	m.mu.refused, m.mu.unreachable, m.mu.connected, m.mu.lost = map[uint64]error{}, map[uint64]int{}, map[uint64]int{}, map[uint64]error{}
	m.mu.snapshots = map[string][]byte{}
	m.mu.membership = backend.Membership{ClusterID: testCluster, Members: []backend.Member{{ID: id, PeerURLs: []string{m.url}}}}
	o := transportOptions{
		id: id, clusterID: func() uint64 { return testCluster }, listeners: []net.Listener{l}, handler: m,
		readTimeout: time.Second,
		hooks: transportHooks{
			connected: func(id uint64) {
				m.mu.Lock()
				defer m.mu.Unlock()
				m.mu.connected[id]++
			},
			lost: func(id uint64, err error) {
				m.mu.Lock()
				defer m.mu.Unlock()
				m.mu.lost[id] = err
				if err == nil {
					t.Errorf("member %x lost %x for no reason", m.id, id)
				}
			},
			unreached: func(id uint64, url string, err error) {
				m.mu.Lock()
				defer m.mu.Unlock()
				m.mu.unreached = append(m.mu.unreached, fmt.Sprintf("%x %s %v", id, url, err))
			},
			rejected: func(remote string, from uint64, err error) {
				m.mu.Lock()
				defer m.mu.Unlock()
				m.mu.rejected = append(m.mu.rejected, err)
			},
			dropped: func(id uint64, n int) {
				m.mu.Lock()
				defer m.mu.Unlock()
				m.mu.dropped += n
			},
			roundTrip: func(uint64, time.Duration) {
				m.mu.Lock()
				defer m.mu.Unlock()
				m.mu.roundTrips++
			},
		},
		server: func(h http.Handler) *http.Server {
			return &http.Server{Handler: h, ErrorLog: log.New(io.Discard, "", 0)}
		},
	}
	if change != nil {
		change(&o)
	}
	m.transport = startTransport(o)
	t.Cleanup(func() {
		if err := m.close(); err != nil {
			t.Errorf("closing member %x: %v", id, err)
		}
	})
	return m
}

// newTestCluster returns members 1 to n that know each other.
func newTestCluster(t testing.TB, n int, change func(*transportOptions)) []*testMember {
	t.Helper()
	var all []*testMember
	for i := range n {
		all = append(all, newTestMember(t, uint64(i+1), "127.0.0.1:0", change))
	}
	introduce(all...)
	return all
}

// introduce makes all members know each other by their own URLs.
func introduce(all ...*testMember) {
	var members []backend.Member
	for _, m := range all {
		members = append(members, backend.Member{ID: m.id, Name: fmt.Sprint("n", m.id), PeerURLs: []string{m.url}})
	}
	for _, m := range all {
		m.know(backend.Membership{ClusterID: testCluster, Members: members})
	}
}

// know is what a member does when the membership changes.
func (m *testMember) know(ms backend.Membership) {
	m.mu.Lock()
	m.mu.membership = ms
	m.mu.Unlock()
	m.setPeers(ms.Members)
}

func (m *testMember) receive(packets []packet) {
	if before := with(m, func() func([]packet) { return m.mu.before }); before != nil {
		before(packets)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.seen != nil {
		for _, p := range packets {
			m.mu.seen(p)
		}
	}
	if m.mu.keep {
		m.mu.got = append(m.mu.got, packets...)
	}
}

func (m *testMember) unreachable(id uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.unreachable[id]++
}

func (m *testMember) refused(id uint64, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.refused[id] = err
}

func (m *testMember) membership() backend.Membership {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.membership
}

func (m *testMember) openSnapshot(name string) (io.ReaderAt, int64, func(), error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	content, ok := m.mu.snapshots[name]
	if !ok {
		return nil, 0, nil, fmt.Errorf("no copy %q", name)
	}
	return &hookedReader{bytes.NewReader(content), m.mu.readSnap}, int64(len(content)), func() {}, nil
}

type hookedReader struct {
	*bytes.Reader
	before func(offset int64)
}

func (r *hookedReader) ReadAt(p []byte, offset int64) (int, error) {
	if r.before != nil {
		r.before(offset)
	}
	return r.Reader.ReadAt(p, offset)
}

func (m *testMember) serve(ctx context.Context, from uint64, path string, body []byte) ([]byte, error) {
	m.mu.Lock()
	serve := m.mu.serve
	m.mu.Unlock()
	if serve == nil {
		return nil, errors.New("nothing is served")
	}
	return serve(ctx, from, path, body)
}

// with looks at what m has heard.
func with[T any](m *testMember, f func() T) T {
	m.mu.Lock()
	defer m.mu.Unlock()
	return f()
}

// eventually waits for what another goroutine brings about.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("still not true: %s", what)
		}
		time.Sleep(2 * time.Millisecond) // polls what has no signal
	}
}

func connectedToEachOther(t testing.TB, all ...*testMember) {
	t.Helper()
	for _, a := range all {
		for _, b := range all {
			if a == b {
				continue
			}
			eventually(t, fmt.Sprintf("member %x and %x are connected", a.id, b.id), func() bool {
				_, ok := a.activeSince(b.id)
				return ok
			})
		}
	}
}

func heartbeat(from, to, n uint64) packet {
	return packet{from: from, to: to, message: &raftpb.Message{Type: raftpb.MsgHeartbeat.Enum(), From: &from, To: &to, Commit: &n}}
}

// entries is a MsgApp with one entry of a size that bears n.
func entries(from, to, n uint64, size int) packet {
	return packet{from: from, to: to, message: &raftpb.Message{Type: raftpb.MsgApp.Enum(), From: &from, To: &to, Commit: &n,
		Entries: []*raftpb.Entry{{Type: raftpb.EntryNormal.Enum(), Term: new(uint64(1)), Index: &n, Data: make([]byte, size)}}}}
}

func TestPacketsArriveInOrderAndUnchanged(t *testing.T) {
	r := seeded(t)
	all := newTestCluster(t, 3, func(o *transportOptions) { o.readTimeout = 10 * time.Second }) // no connection may break
	connectedToEachOther(t, all...)
	defer func() {
		for _, m := range all {
			if lost := with(m, func() int { return len(m.mu.lost) + m.mu.dropped }); lost > 0 && t.Failed() {
				t.Log(m.id, "has lost", with(m, func() string { return fmt.Sprint(m.mu.lost, m.mu.dropped, m.mu.unreached) }))
			}
		}
	}()
	sent := map[[2]uint64][]packet{}
	for round := range 50 {
		for _, a := range all {
			var packets []packet
			for _, b := range all {
				for range r.IntN(6) {
					if b != a {
						packets = append(packets, randomPacket(r, a.id, b.id, 1<<r.IntN(18)))
					}
				}
				if round%20 == 7 && b.id == a.id+1 {
					packets = append(packets, entries(a.id, b.id, uint64(round), 20<<20))
				}
			}
			a.send(packets)
			for _, p := range packets {
				sent[[2]uint64{p.from, p.to}] = append(sent[[2]uint64{p.from, p.to}], p)
			}
		}
		// Else the queues would be full.
		for _, b := range all {
			want := 0
			for pair, packets := range sent {
				if pair[1] == b.id {
					want += len(packets)
				}
			}
			eventually(t, "everything has arrived", func() bool { return with(b, func() bool { return len(b.mu.got) >= want }) })
		}
	}
	total := 0
	for pair, packets := range sent {
		b := all[pair[1]-1]
		for l := range lanes {
			of := func(all []packet) (some []packet) {
				for _, p := range all {
					if p.from == pair[0] && laneOf(&p) == l {
						some = append(some, p)
					}
				}
				return some
			}
			want, got := of(packets), of(with(b, func() []packet { return b.mu.got }))
			if len(want) != len(got) {
				t.Fatalf("from %x to %x, %s lane: %d packets were sent, %d arrived", pair[0], pair[1], laneNames[l], len(want), len(got))
			}
			for i := range want {
				if !samePacket(&want[i], &got[i]) {
					t.Fatalf("from %x to %x, %s lane: packet %d is another", pair[0], pair[1], laneNames[l], i)
				}
			}
			total += len(want)
		}
	}
	t.Logf("%d packets", total)
}

func TestWhatIsSentWhileTheFirstConnectionIsMadeArrives(t *testing.T) {
	all := newTestCluster(t, 2, nil)
	all[0].send([]packet{heartbeat(1, 2, 7), entries(1, 2, 8, 100)}) // at once
	eventually(t, "both have arrived", func() bool { return with(all[1], func() bool { return len(all[1].mu.got) == 2 }) })
}

func TestSocketFiles(t *testing.T) {
	dir := t.TempDir()
	a := newTestMember(t, 1, filepath.Join(dir, "a"), nil)
	b := newTestMember(t, 2, filepath.Join(dir, "b"), nil)
	introduce(a, b)
	connectedToEachOther(t, a, b)
	a.send([]packet{heartbeat(1, 2, 7)})
	eventually(t, "a heartbeat through a socket file", func() bool { return with(b, func() bool { return len(b.mu.got) == 1 }) })
	b.mu.Lock()
	b.mu.serve = func(context.Context, uint64, string, []byte) ([]byte, error) { return []byte("yes"), nil }
	b.mu.Unlock()
	if answer, err := a.request(t.Context(), 2, "ask", nil); err != nil || string(answer) != "yes" {
		t.Errorf("a request through a socket file: %q, %v", answer, err)
	}
}

func TestAnotherClusterIsRefused(t *testing.T) {
	a := newTestMember(t, 1, "127.0.0.1:0", nil)
	b := newTestMember(t, 2, "127.0.0.1:0", func(o *transportOptions) { o.clusterID = func() uint64 { return 0xc2 } })
	introduce(a, b)
	for _, pair := range [][2]*testMember{{a, b}, {b, a}} {
		eventually(t, "the reason is known on either side", func() bool {
			return with(pair[0], func() bool { return errors.Is(pair[0].mu.refused[pair[1].id], errWrongCluster) }) &&
				with(pair[1], func() bool {
					return slices.ContainsFunc(pair[1].mu.rejected, func(err error) bool { return errors.Is(err, errWrongCluster) })
				})
		})
	}
	a.send([]packet{heartbeat(1, 2, 7)})
	eventually(t, "the packet is reported", func() bool { return with(a, func() bool { return a.mu.unreachable[2] > 0 }) })
	if n := with(b, func() int { return len(b.mu.got) }); n > 0 {
		t.Errorf("%d packets from another cluster were taken", n)
	}
	if _, err := a.request(t.Context(), 2, "ask", nil); !errors.Is(err, errWrongCluster) {
		t.Errorf("a request to another cluster: %v", err)
	}
}

func TestARemovedMemberLearnsIt(t *testing.T) {
	all := newTestCluster(t, 3, nil)
	connectedToEachOther(t, all...)
	ms := all[0].membership()
	ms.Members = slices.Clone(ms.Members[:2])
	ms.Removed = []uint64{3}
	all[0].know(ms)
	all[1].know(ms)
	gone := all[2]
	for _, id := range []uint64{1, 2} {
		eventually(t, "the removed member is told by each", func() bool {
			return with(gone, func() bool { return errors.Is(gone.mu.refused[id], ErrRemoved) })
		})
		if _, ok := gone.activeSince(id); ok {
			t.Errorf("the removed member is connected to %x", id)
		}
	}
	before := with(all[0], func() int { return len(all[0].mu.got) })
	gone.send([]packet{heartbeat(3, 1, 1)})
	eventually(t, "packets of the removed member go nowhere", func() bool { return with(gone, func() bool { return gone.mu.unreachable[1] > 0 }) })
	if after := with(all[0], func() int { return len(all[0].mu.got) }); after != before {
		t.Error("a packet of the removed member was taken")
	}
	if _, ok := all[0].activeSince(2); !ok {
		t.Error("the other two lost each other")
	}
}

// TestOnlyTheMemberItselfMaySayRemoved: URLs may lead to somebody else by now.
func TestOnlyTheMemberItselfMaySayRemoved(t *testing.T) {
	a := newTestMember(t, 1, "127.0.0.1:0", nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	stranger := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set(headerRefusal, refusedRemoved)
		w.Header().Set(headerFrom, "2")
		w.Header().Set(headerCluster, "c2")
		http.Error(w, "removed", http.StatusGone)
	})}
	go func() { _ = stranger.Serve(l) }()
	defer stranger.Close()
	a.setPeers([]backend.Member{{ID: 2, PeerURLs: []string{"http://" + l.Addr().String()}}})
	eventually(t, "the stranger was dialled", func() bool { return with(a, func() bool { return len(a.mu.unreached) > 0 }) })
	if err := with(a, func() error { return a.mu.refused[2] }); err != nil {
		t.Errorf("a member of another cluster made this one believe %v", err)
	}
}

func TestTheWrongMemberIsRefused(t *testing.T) {
	a := newTestMember(t, 1, "127.0.0.1:0", nil)
	b := newTestMember(t, 2, "127.0.0.1:0", nil)
	c := newTestMember(t, 3, "127.0.0.1:0", nil)
	a.setPeers([]backend.Member{{ID: 2, PeerURLs: []string{c.url}}})
	eventually(t, "member 3 says that it is not member 2", func() bool {
		return with(a, func() bool { return errors.Is(a.mu.refused[2], errWrongMember) })
	})
	// The second URL is the right one.
	a.setPeers([]backend.Member{{ID: 2, PeerURLs: []string{c.url, b.url}}})
	a.sendUntilThere(b)
}

// sendUntilThere repeats a heartbeat, as raft does, until it has arrived.
func (m *testMember) sendUntilThere(to *testMember) {
	m.t.Helper()
	before := with(to, func() int { return len(to.mu.got) })
	eventually(m.t, fmt.Sprintf("a packet from %x has reached %x", m.id, to.id), func() bool {
		m.send([]packet{heartbeat(m.id, to.id, 1)})
		return with(to, func() bool { return len(to.mu.got) > before })
	})
}

func TestOneself(t *testing.T) {
	a := newTestMember(t, 1, "127.0.0.1:0", nil)
	twin := newTestMember(t, 1, "127.0.0.1:0", nil)
	req, err := http.NewRequest(http.MethodPost, a.url+requestPath+"x", nil)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range map[string]string{headerFrom: "1", headerTo: "1", headerCluster: hexID(testCluster), headerProtocol: streamProtocol} {
		req.Header.Set(k, v)
	}
	answer, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if err := refusalOf(answer, 1, testCluster); !errors.Is(err, errWrongMember) || !strings.Contains(err.Error(), "two servers") {
		t.Errorf("a second server with the same id: %v", err)
	}
	twin.setPeers([]backend.Member{{ID: 1, PeerURLs: []string{twin.url}}}) // one does not dial oneself
	if twin.peer(1) != nil {
		t.Error("a member dials itself")
	}
}

// TestAStrangerIsAnswered: a member that was away does not know who joined meanwhile, among them perhaps the leader.
func TestAStrangerIsAnswered(t *testing.T) {
	old := newTestMember(t, 1, "127.0.0.1:0", nil)
	leader := newTestMember(t, 2, "127.0.0.1:0", nil)
	leader.know(backend.Membership{ClusterID: testCluster, Members: []backend.Member{
		{ID: 1, PeerURLs: []string{old.url}}, {ID: 2, PeerURLs: []string{leader.url}}}})
	connectedToEachOther(t, old, leader)
	leader.sendUntilThere(old)
	old.sendUntilThere(leader)
	// It stays when the member learns that it is one, and goes when it leaves without.
	introduce(old, leader)
	if _, ok := old.activeSince(2); !ok {
		t.Error("the connection was ended when the stranger became a member")
	}
	visitor := newTestMember(t, 3, "127.0.0.1:0", nil)
	visitor.know(backend.Membership{ClusterID: testCluster, Members: []backend.Member{
		{ID: 1, PeerURLs: []string{old.url}}, {ID: 3, PeerURLs: []string{visitor.url}}}})
	connectedToEachOther(t, old, visitor)
	introduce(old, leader)
	if _, ok := old.activeSince(3); !ok {
		t.Error("a stranger was cut off because the membership changed")
	}
	visitor.know(backend.Membership{ClusterID: testCluster})
	eventually(t, "a stranger that has left is forgotten", func() bool { return old.peer(3) == nil })
}

// TestStrangersDoNotKeepEachOther: who dials only because it is dialled is no news.
func TestStrangersDoNotKeepEachOther(t *testing.T) {
	a := newTestMember(t, 1, "127.0.0.1:0", nil)
	req, err := http.NewRequest(http.MethodGet, a.url+streamPath, nil)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range map[string]string{headerFrom: "7", headerTo: "1", headerCluster: hexID(testCluster), headerProtocol: streamProtocol,
		headerLane: "bulk", headerPeerURLs: "http://127.0.0.1:1", headerBack: "1", "Connection": "Upgrade", "Upgrade": streamUpgrade} {
		req.Header.Set(k, v)
	}
	answer, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusServiceUnavailable || a.peer(7) != nil {
		t.Errorf("%s, peer %v", answer.Status, a.peer(7))
	}
	// The other way round it says so.
	b := newTestMember(t, 2, "127.0.0.1:0", nil)
	b.setPeers([]backend.Member{{ID: 1, PeerURLs: []string{a.url}}})
	b.know(backend.Membership{ClusterID: testCluster, Members: b.membership().Members}) // a is none
	eventually(t, "both have forgotten each other", func() bool { return a.peer(2) == nil && b.peer(1) == nil })
}

func TestStrangersAreBounded(t *testing.T) {
	a := newTestMember(t, 1, "127.0.0.1:0", nil)
	for i := range uint64(maxStrangers + 5) {
		m := newTestMember(t, 100+i, "127.0.0.1:0", nil)
		m.setPeers([]backend.Member{{ID: 1, PeerURLs: []string{a.url}}})
	}
	eventually(t, "those who are too many are turned away", func() bool {
		return with(a, func() bool {
			return slices.ContainsFunc(a.mu.rejected, func(err error) bool { return strings.Contains(err.Error(), "not heard of") })
		})
	})
	a.transport.mu.RLock()
	n := len(a.transport.mu.peers)
	a.transport.mu.RUnlock()
	if n > maxStrangers {
		t.Errorf("%d strangers", n)
	}
}

func TestPeersFollowTheirURLs(t *testing.T) {
	all := newTestCluster(t, 2, nil)
	connectedToEachOther(t, all...)
	a, b := all[0], all[1]
	moved, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := newProxy(t, moved, b.url)
	a.setPeers([]backend.Member{{ID: 2, PeerURLs: []string{p.url}}})
	eventually(t, "the member is dialled at its new URL, in both lanes", func() bool { return p.count() == 2 })
	connectedToEachOther(t, a, b)
	a.sendUntilThere(b)
	// A further URL changes nothing.
	since, _ := a.activeSince(2)
	a.setPeers([]backend.Member{{ID: 2, PeerURLs: []string{b.url, p.url}}})
	a.sendUntilThere(b)
	if now, ok := a.activeSince(2); !ok || !now.Equal(since) {
		t.Error("a connection was given up although its URL is still one of the member's")
	}
}

func TestTheClusterMayBecomeKnownLate(t *testing.T) {
	var known sync.Map
	late := func(o *transportOptions) {
		o.clusterID = func() uint64 {
			if id, ok := known.Load("id"); ok {
				return id.(uint64)
			}
			return 0
		}
	}
	a := newTestMember(t, 1, "127.0.0.1:0", late)
	b := newTestMember(t, 2, "127.0.0.1:0", nil)
	introduce(a, b)
	eventually(t, "a member without a cluster is refused", func() bool { return with(b, func() bool { return len(b.mu.unreached) > 0 }) })
	if _, ok := b.activeSince(1); ok {
		t.Error("connected without knowing the cluster")
	}
	known.Store("id", uint64(testCluster))
	connectedToEachOther(t, a, b)
}

func TestMembersAndVersionAsEtcdServesThem(t *testing.T) {
	a := newTestMember(t, 1, "127.0.0.1:0", func(o *transportOptions) {
		o.version = func() []byte { return []byte(`{"etcdserver":"3.7.3"}`) }
	})
	a.know(backend.Membership{ClusterID: testCluster, Members: []backend.Member{
		{ID: 0x8e9e05c52164694d, Name: "n1", PeerURLs: []string{"http://a:1"}, ClientURLs: []string{"http://a:2"}},
		{ID: 0xfedcba9876543210, PeerURLs: []string{"http://b:1"}, Learner: true},
	}})
	get := func(path string) (string, *http.Response) {
		answer, err := http.Get(a.url + path)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		body, err := io.ReadAll(answer.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(body), answer
	}
	body, answer := get("/members")
	const want = `[{"id":10276657743932975437,"name":"n1","peerURLs":["http://a:1"],"clientURLs":["http://a:2"]},` +
		`{"id":18364758544493064720,"peerURLs":["http://b:1"],"isLearner":true}]` + "\n"
	if body != want || answer.Header.Get("X-Etcd-Cluster-ID") != "c1" || answer.Header.Get("Content-Type") != "application/json" {
		t.Errorf("GET /members: %s, %v", body, answer.Header)
	}
	if body, _ := get("/version"); body != `{"etcdserver":"3.7.3"}` {
		t.Errorf("GET /version: %s", body)
	}
	if _, answer := get("/nothing"); answer.StatusCode != http.StatusNotFound {
		t.Errorf("GET /nothing: %s", answer.Status)
	}
	// Whatever concerns raft wants to know who asks.
	for _, path := range []string{streamPath, snapshotPath + "x"} {
		if _, answer := get(path); answer.StatusCode != http.StatusBadRequest {
			t.Errorf("GET %s by nobody: %s", path, answer.Status)
		}
	}
	answer, err := http.Post(a.url+"/members", "application/json", nil)
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	if answer.StatusCode != http.StatusMethodNotAllowed || answer.Header.Get("Allow") != "GET" {
		t.Errorf("POST /members: %s", answer.Status)
	}
}

func TestRequests(t *testing.T) {
	all := newTestCluster(t, 2, nil)
	a, b := all[0], all[1]
	b.mu.Lock()
	b.mu.serve = func(ctx context.Context, from uint64, path string, body []byte) ([]byte, error) {
		switch path {
		case "hang":
			<-ctx.Done()
			return nil, ctx.Err()
		case "fail":
			return nil, errors.New("etcdserver: unhealthy cluster")
		case "large":
			return make([]byte, maxRequestBody+1), nil
		}
		return fmt.Appendf(nil, "%x asked %s with %d bytes", from, path, len(body)), nil
	}
	b.mu.Unlock()
	if answer, err := a.request(t.Context(), 2, "hash/kv now?", make([]byte, 100<<10)); err != nil || string(answer) != "1 asked hash/kv now? with 102400 bytes" {
		t.Errorf("%q, %v", answer, err)
	}
	var remote *remoteError
	if _, err := a.request(t.Context(), 2, "fail", nil); !errors.As(err, &remote) || err.Error() != "etcdserver: unhealthy cluster" {
		t.Errorf("an error came back as %v", err)
	}
	if _, err := a.request(t.Context(), 2, "large", nil); err == nil {
		t.Error("an answer of any size is taken")
	}
	if _, err := a.request(t.Context(), 2, "x", make([]byte, maxRequestBody+1)); err == nil {
		t.Error("a request of any size is taken")
	}
	if _, err := a.request(t.Context(), 9, "x", nil); err == nil {
		t.Error("an unknown member has answered")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := a.request(ctx, 2, "hang", nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a request that was given up: %v", err)
	}
	// The first URL is dead: the second one is asked.
	a.setPeers([]backend.Member{{ID: 2, PeerURLs: []string{"http://" + ports.FreeAddress(t), b.url}}})
	if _, err := a.request(t.Context(), 2, "x", nil); err != nil {
		t.Errorf("the first of two URLs is dead: %v", err)
	}
}

// TestDamageEndsTheConnection: whatever gets past the network's own checksums is not decoded.
func TestDamageEndsTheConnection(t *testing.T) {
	for name, bytes := range map[string][]byte{
		"wrong sum":      {1, 0, 0, 0, 1, 2, 3, 4, framePing},
		"far too large":  {255, 255, 255, 255, 0, 0, 0, 0},
		"another member": frameFor(t, heartbeat(7, 3, 1)),
		"unknown kind":   sealed(99, 1, 2),
		"no kind":        sealed(),
	} {
		a := newTestMember(t, 1, "127.0.0.1:0", nil)
		conn := dialStream(t, a, 7, "bulk")
		if _, err := conn.Write(bytes); err != nil {
			t.Fatal(err)
		}
		if err := conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if rest, err := io.ReadAll(conn); err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: the connection stays open (%x)", name, rest)
		}
		eventually(t, name+" is told", func() bool {
			return with(a, func() bool { return len(a.mu.rejected) == 1 && errors.Is(a.mu.rejected[0], errDamaged) })
		})
		if n := with(a, func() int { return len(a.mu.got) }); n > 0 {
			t.Errorf("%s: %d packets were taken", name, n)
		}
	}
}

func sealed(body ...byte) []byte {
	f := frame{buf: append(make([]byte, frameHeader), body...)}
	if err := f.seal(); err != nil {
		panic(err)
	}
	return f.buf
}

func frameFor(t *testing.T, p packet) []byte {
	t.Helper()
	var f frame
	var b bytes.Buffer
	if err := f.encode(&p); err != nil {
		t.Fatal(err)
	}
	if err := f.write(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// dialStream opens a stream to a by hand.
func dialStream(t *testing.T, a *testMember, from uint64, l string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(a.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: %s\r\n%s: %s\r\n%s: %x\r\n%s: %x\r\n%s: %x\r\n%s: %s\r\n\r\n",
		streamPath, streamUpgrade, headerLane, l, headerCluster, testCluster, headerFrom, from, headerTo, a.id, headerProtocol, streamProtocol)
	answer := make([]byte, 12)
	if _, err := io.ReadFull(conn, answer); err != nil || string(answer) != "HTTP/1.1 101" {
		t.Fatalf("%q, %v", answer, err)
	}
	return conn
}

// TestANewConnectionFollowsTheOldOne: what it brings is received after what the old one has brought.
func TestANewConnectionFollowsTheOldOne(t *testing.T) {
	a := newTestMember(t, 1, "127.0.0.1:0", nil)
	busy, goOn := make(chan struct{}), make(chan struct{})
	a.mu.before = func(packets []packet) {
		if packets[0].message.GetCommit() == 1 {
			close(busy)
			<-goOn
		}
	}
	old := dialStream(t, a, 7, "bulk")
	if _, err := old.Write(frameFor(t, entries(7, 1, 1, 10))); err != nil {
		t.Fatal(err)
	}
	<-busy
	fresh := dialStream(t, a, 7, "bulk")
	if _, err := fresh.Write(frameFor(t, entries(7, 1, 2, 10))); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond) // the new connection would be received from by now
	close(goOn)
	eventually(t, "both are received from", func() bool { return with(a, func() bool { return len(a.mu.got) == 2 }) })
	if got := with(a, func() []packet { return a.mu.got }); got[0].message.GetCommit() != 1 {
		t.Error("the new connection's packet came before the old one's")
	}
	if _, err := io.ReadAll(old); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the old connection stays open")
	}
}

func TestLanes(t *testing.T) {
	for kind := range raftpb.MessageType_name {
		p := packet{message: &raftpb.Message{Type: raftpb.MessageType(kind).Enum()}}
		want := prompt
		if t := raftpb.MessageType(kind); t == raftpb.MsgApp || t == raftpb.MsgSnap {
			want = bulk
		}
		if l := laneOf(&p); l != want {
			t.Errorf("%v goes by the %s lane", raftpb.MessageType(kind), laneNames[l])
		}
	}
	if laneOf(&packet{forward: &forward{}}) != bulk || laneOf(&packet{taken: &taken{}}) != prompt {
		t.Error("proposals and their answers are in the wrong lanes")
	}
}

// TestAnotherProtocolIsRefused: an older or newer quire learns what is the matter.
func TestAnotherProtocolIsRefused(t *testing.T) {
	a := newTestMember(t, 1, "127.0.0.1:0", nil)
	req, err := http.NewRequest(http.MethodGet, a.url+streamPath, nil)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range map[string]string{headerFrom: "7", headerTo: "1", headerCluster: hexID(testCluster), headerProtocol: "2"} {
		req.Header.Set(k, v)
	}
	answer, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if err := refusalOf(answer, 1, testCluster); answer.StatusCode != http.StatusPreconditionFailed || !strings.Contains(err.Error(), "upgrade") {
		t.Errorf("%s: %v", answer.Status, err)
	}
}

// TestCloseEndsEverything: no goroutine, no connection, no call of the handler afterwards.
func TestCloseEndsEverything(t *testing.T) {
	before := transportGoroutines()
	all := newTestCluster(t, 3, nil)
	connectedToEachOther(t, all...)
	b := all[1]
	b.mu.Lock()
	b.mu.serve = func(ctx context.Context, _ uint64, _ string, _ []byte) ([]byte, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	b.mu.Unlock()
	asked := make(chan error, 2)
	go func() {
		_, err := all[0].request(context.Background(), 2, "hang", nil)
		asked <- err
	}()
	go func() {
		_, err := all[2].request(context.Background(), 2, "hang", nil)
		asked <- err
	}()
	for _, m := range all {
		for i := range uint64(100) {
			m.send([]packet{entries(m.id, m.id%3+1, i, 100<<10)})
		}
	}
	for _, m := range []*testMember{all[0], b, all[2]} {
		began := time.Now()
		if err := m.close(); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("close took %v", took)
		}
	}
	for range 2 {
		if err := <-asked; err == nil {
			t.Error("a request was answered by a member that is closed")
		}
	}
	b.send([]packet{heartbeat(2, 1, 1)})
	b.setPeers([]backend.Member{{ID: 1, PeerURLs: []string{all[0].url}}})
	if _, err := b.request(context.Background(), 1, "x", nil); !errors.Is(err, errTransportClosed) {
		t.Errorf("a request after close: %v", err)
	}
	if err := b.fetchSnapshot(context.Background(), 1, "x", 1, [32]byte{}, filepath.Join(t.TempDir(), "x"), nil); !errors.Is(err, errTransportClosed) {
		t.Errorf("a fetch after close: %v", err)
	}
	if err := b.close(); err != nil {
		t.Errorf("closing twice: %v", err)
	}
	// net/http's own goroutines end by themselves soon after.
	eventually(t, "all goroutines have ended", func() bool { return transportGoroutines() <= before })
}

// transportGoroutines counts the goroutines that a transport has started, in whatever package they are.
func transportGoroutines() int {
	buf := make([]byte, 4<<20)
	n := 0
	for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if strings.Contains(g, "sqlraft.(*") && !strings.Contains(g, "testing.tRunner") || strings.Contains(g, "net/http.") {
			n++
		}
	}
	return n
}
