package postgres

import (
	"errors"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
)

func TestPgBouncerPoolsTransactions(t *testing.T) {
	t.Parallel()
	s := New(t, Options{NoFsync: true})
	b := newPgBouncer(t, s, PgBouncerOptions{Settings: map[string]string{"default_pool_size": "1"}})
	// The pooler does not know her; the server does.
	exec1(t, s, "CREATE ROLE alice LOGIN")
	dsn := b.DSN(Superuser, "alice")
	first, second := openSession(t, s, dsn), openSession(t, s, dsn)
	// Both stay connected and share the only connection to the server.
	const backend = "SELECT pg_backend_pid()"
	if a, b := first.ask(backend), second.ask(backend); a != b {
		t.Errorf("two clients run on the connections %s and %s, want one", a, b)
	}
	first.send("BEGIN")
	if got := first.ask("SELECT 'inside'"); got != "inside" {
		t.Errorf("in a transaction: %q", got)
	}
	second.send("SELECT 'outside'")
	if got := first.ask("SELECT 'still inside'"); got != "still inside" {
		t.Errorf("in a transaction: %q", got)
	}
	if len(second.lines) != 0 {
		t.Error("the second client got the connection in the middle of the first one's transaction")
	}
	first.send("COMMIT")
	if got := second.answer(stopLimit); got != "outside" {
		t.Errorf("after the transaction: %q, want outside", got)
	}

	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	if conn, err := net.Dial("tcp", b.Address); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("connecting to a stopped pooler: %v, %v, want connection refused", conn, err)
	}
	if _, err := os.Stat(b.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Stop left %s: %v", b.dir, err)
	}
}

func TestPgBouncerBehindItAProxy(t *testing.T) {
	t.Parallel()
	p := newProxied(t)
	b := newPgBouncer(t, p.server, PgBouncerOptions{Upstream: p.Address})
	c := openSession(t, p.server, b.DSN(p.database, Superuser))
	sprung := p.CutBeforeAnswer("INSERT")
	c.send("INSERT INTO t VALUES (1)")
	if said := c.mustBreak(); !strings.Contains(said, "server conn crashed") {
		t.Errorf("the client hears %q", said)
	}
	awaitTrap(t, sprung)
	if got := p.rows(); got != "1" {
		t.Errorf("the server has the rows %s, want 1", got)
	}
}

func newPgBouncer(t *testing.T, s *Server, o PgBouncerOptions) *PgBouncer {
	t.Helper()
	b, err := StartPgBouncer(t.Context(), s, o)
	if err != nil {
		skipOrFail(t, err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of PgBouncer's log:\n%s", b.LogTail(4000))
		}
		if err := b.Stop(); err != nil {
			t.Error(err)
		}
	})
	return b
}
