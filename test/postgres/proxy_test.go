package postgres

import (
	"context"
	"errors"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"
)

// proxied is a shared server behind a proxy of the test's own, with a table t (a int).
type proxied struct {
	*Proxy
	t        *testing.T
	server   *Server
	database string
	dsn      string // through the proxy
}

func newProxied(t *testing.T) *proxied {
	t.Helper()
	s := Shared(t)
	p, err := StartProxy(s.Address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	database := Database(t, s)
	if err := s.Exec(t.Context(), database, "CREATE TABLE t (a int)"); err != nil {
		t.Fatal(err)
	}
	return &proxied{Proxy: p, t: t, server: s, database: database, dsn: s.DSNAt(p.Address, database, Superuser)}
}

// rows are the values in t, asked past the proxy.
func (p *proxied) rows() string {
	p.t.Helper()
	rows, err := p.server.Query(p.t.Context(), p.database, "SELECT coalesce(string_agg(a::text, ',' ORDER BY a), 'none') FROM t")
	if err != nil {
		p.t.Fatal(err)
	}
	return rows[0][0]
}

func (p *proxied) open() *session { return openSession(p.t, p.server, p.dsn) }

func (p *proxied) heal() {
	p.t.Helper()
	if err := p.Heal(); err != nil {
		p.t.Fatal(err)
	}
}

func awaitTrap(t *testing.T, sprung <-chan struct{}) {
	t.Helper()
	select {
	case <-sprung:
	case <-time.After(20 * time.Second):
		t.Fatal("the trap has not sprung within 20 s")
	}
}

func TestProxyPassesEverythingOn(t *testing.T) {
	t.Parallel()
	p := newProxied(t)
	c := p.open()
	// Larger than what is under way at once, in both directions.
	const size = 20 << 20
	if got := c.ask("SELECT length('" + strings.Repeat("x", 1<<20) + "')"); got != "1048576" {
		t.Errorf("the server got %s bytes, want 1 MiB", got)
	}
	c.send("\\pset footer off\nSELECT md5(repeat('y', 10)), repeat('z', 50000) FROM generate_series(1, 400)")
	bytes := 0
	for range 400 {
		bytes += len(c.answer(20 * time.Second))
	}
	if bytes < size/2 {
		t.Errorf("the client got %d bytes, want at least %d", bytes, size/2)
	}
}

func TestProxyCut(t *testing.T) {
	t.Parallel()
	p := newProxied(t)
	c := p.open()
	if err := p.Cut(); err != nil {
		t.Fatal(err)
	}
	c.send("SELECT 1")
	c.mustBreak()
	if conn, err := net.Dial("tcp", p.Address); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("connecting through a cut: %v, %v, want connection refused", conn, err)
	}
	p.heal()
	if got := p.open().ask("SELECT 2"); got != "2" {
		t.Errorf("after healing the answer is %q", got)
	}
}

func TestProxyDropConnections(t *testing.T) {
	t.Parallel()
	p := newProxied(t)
	c := p.open()
	p.DropConnections()
	if got := p.open().ask("SELECT 2"); got != "2" {
		t.Errorf("a new connection answers %q", got)
	}
	c.send("SELECT 1")
	c.mustBreak()
}

func TestProxyHang(t *testing.T) {
	t.Parallel()
	p := newProxied(t)
	c := p.open()
	p.Hang()
	c.send("INSERT INTO t VALUES (1) RETURNING a")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := p.server.QueryAt(ctx, p.dsn, "SELECT 1"); err == nil || !strings.Contains(err.Error(), context.DeadlineExceeded.Error()) {
		t.Errorf("a new connection while the network hangs: %v, want no answer", err)
	}
	if got := c.answer(time.Millisecond); got != "" {
		t.Errorf("while the network hangs the answer is %q", got)
	}
	if got := p.rows(); got != "none" {
		t.Errorf("while the network hangs the server got %s", got)
	}
	p.heal()
	if got := c.answer(20 * time.Second); got != "1" {
		t.Errorf("after healing the answer is %q, want 1", got)
	}
}

func TestProxyDelay(t *testing.T) {
	t.Parallel()
	p := newProxied(t)
	c := p.open()
	const delay = 150 * time.Millisecond
	p.Delay(delay)
	began := time.Now()
	c.ask("SELECT 1")
	if took := time.Since(began); took < 2*delay {
		t.Errorf("a round trip took %s, want at least %s", took, 2*delay)
	}
	p.heal()
	// Other tests run beside this one: the fastest of some.
	fastest := time.Hour
	for range 20 {
		began = time.Now()
		c.ask("SELECT 1")
		fastest = min(fastest, time.Since(began))
	}
	if fastest >= 2*delay {
		t.Errorf("after healing the fastest round trip took %s", fastest)
	}
}

func TestProxyCutBeforeAnswer(t *testing.T) {
	t.Parallel()
	p := newProxied(t)
	c := p.open()
	sprung := p.CutBeforeAnswer("INSERT INTO t VALUES (2)")
	if got := c.ask("INSERT INTO t VALUES (1) RETURNING a"); got != "1" {
		t.Errorf("a request that does not match answers %q", got)
	}
	c.send("INSERT INTO t VALUES (2) RETURNING a")
	c.mustBreak()
	awaitTrap(t, sprung)
	if line, ok := <-c.lines; ok {
		t.Errorf("the client heard %q of the answer", line)
	}
	if got := p.rows(); got != "1,2" {
		t.Errorf("the server has the rows %s, want 1,2: the second was committed, though its client does not know", got)
	}
	if got := p.open().ask("SELECT count(*) FROM t"); got != "2" {
		t.Errorf("a trap springs once, but the next client hears %q", got)
	}
}

func TestProxyCutBeforeRequest(t *testing.T) {
	t.Parallel()
	p := newProxied(t)
	c := p.open()
	sprung := p.CutBeforeRequest("INSERT")
	c.send("INSERT INTO t VALUES (1) RETURNING a")
	c.mustBreak()
	awaitTrap(t, sprung)
	if got := p.rows(); got != "none" {
		t.Errorf("the server has the rows %s, want none", got)
	}
}

func TestProxyCutAfterBytes(t *testing.T) {
	t.Parallel()
	p := newProxied(t)
	const statement = "INSERT INTO t VALUES (%);"
	// The message on the wire: a letter, four bytes of length, the text, a zero.
	whole := 1 + 4 + len(statement) + 1
	c := p.open()
	sprung := p.CutAfterBytes(whole - 1)
	c.send(strings.TrimSuffix(strings.Replace(statement, "%", "1", 1), ";"))
	c.mustBreak()
	awaitTrap(t, sprung)

	c = p.open()
	sprung = p.CutAfterBytes(whole)
	c.send(strings.TrimSuffix(strings.Replace(statement, "%", "2", 1), ";"))
	c.mustBreak()
	awaitTrap(t, sprung)
	// It may still be at it.
	if err := p.server.WaitFor(t.Context(), p.database, "SELECT count(*) > 0 FROM t"); err != nil {
		t.Fatal(err)
	}
	if got := p.rows(); got != "2" {
		t.Errorf("the rows are %s, want 2: of the first a byte was missing", got)
	}
}

func TestProxyWithTLS(t *testing.T) {
	t.Parallel()
	s := New(t, Options{NoFsync: true, TLS: ServerTLS})
	p, err := StartProxy(s.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	exec1(t, s, "CREATE TABLE t (a int)")
	c := openSession(t, s, s.DSNAt(p.Address, Superuser, Superuser))
	sprung := p.CutBeforeAnswer("")
	c.send("INSERT INTO t VALUES (1)")
	c.mustBreak()
	awaitTrap(t, sprung)
	if got := query(t, s, "SELECT count(*) FROM t"); got != "1" {
		t.Errorf("the server has %s rows, want the one whose answer was cut off", got)
	}
}

func TestProxySetUpstream(t *testing.T) {
	t.Parallel()
	p := newProxied(t)
	c := p.open()
	p.SetUpstream("127.0.0.1:1") // nobody is there
	if _, err := p.server.QueryAt(t.Context(), p.dsn, "SELECT 1"); err == nil {
		t.Error("a new connection reached the old server")
	}
	if got := c.ask("SELECT 1"); got != "1" {
		t.Errorf("the connection to the old server answers %q", got)
	}
	p.SetUpstream(p.server.Address)
	p.open()
}

func TestMatchesAcrossChunks(t *testing.T) {
	for _, c := range []struct {
		before, chunk, text string
		want                bool
	}{
		{"", "abc", "", true},
		{"", "abc", "bc", true},
		{"ab", "cd", "bc", true},
		{"abc", "d", "bc", false}, // it was passed on already
		{"ab", "cd", "abcd", true},
		{"b", "cd", "abcd", false},
	} {
		if got := contains([]byte(c.before), []byte(c.chunk), c.text); got != c.want {
			t.Errorf("%q in %q after %q: %t, want %t", c.text, c.chunk, c.before, got, c.want)
		}
	}
}
