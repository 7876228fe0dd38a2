package postgres

import (
	"context"
	"strings"
	"testing"
	"time"
)

func TestASynchronousStandbyLosesNothing(t *testing.T) {
	t.Parallel()
	primary := New(t, Options{})
	exec1(t, primary, "CREATE TABLE t (a int)")
	standby := newStandby(t, primary, true)
	exec1(t, primary, "INSERT INTO t VALUES (1)")
	if err := primary.WaitCaughtUp(t.Context(), standby); err != nil {
		t.Fatal(err)
	}
	if got := query(t, standby, "SELECT a FROM t"); got != "1" {
		t.Errorf("the standby shows %q, want 1", got)
	}
	if err := standby.Exec(t.Context(), Superuser, "INSERT INTO t VALUES (9)"); err == nil || !strings.Contains(err.Error(), "read-only transaction") {
		t.Errorf("a write on the standby: %v, want it refused", err)
	}

	if err := standby.Pause(); err != nil {
		t.Fatal(err)
	}
	c := openSession(t, primary, primary.DSN(Superuser, Superuser))
	c.send("INSERT INTO t VALUES (2) RETURNING a")
	// The row is printed before the commit is over; the next statement waits for it.
	c.send("SELECT 'committed'")
	if got := c.answer(time.Second); got == "committed" || c.answer(300*time.Millisecond) == "committed" {
		t.Error("a commit did not wait for the synchronous standby, which is frozen")
	}
	if err := standby.Resume(); err != nil {
		t.Fatal(err)
	}
	for c.answer(20*time.Second) != "committed" {
	}

	address := standby.Address
	if err := primary.StopImmediate(); err != nil {
		t.Fatal(err)
	}
	if err := standby.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := query(t, standby, "SELECT count(*) FROM t"); got != "2" {
		t.Errorf("the promoted standby has %s rows, want both", got)
	}
	exec1(t, standby, "INSERT INTO t VALUES (3)")
	// It stays a primary.
	if err := standby.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := query(t, standby, "SELECT pg_is_in_recovery()::text || count(*) FROM t"); got != "false3" || standby.Address != address {
		t.Errorf("after a restart at %s: %s, want false3 at %s", standby.Address, got, address)
	}
}

func TestAPromotionMayLoseCommits(t *testing.T) {
	t.Parallel()
	primary := New(t, Options{})
	exec1(t, primary, "CREATE TABLE t (a int)", "INSERT INTO t VALUES (1)")
	newStandby(t, primary, true) // has what the other one loses
	standby := newStandby(t, primary, false)
	if err := standby.StopFollowing(t.Context()); err != nil {
		t.Fatal(err)
	}
	exec1(t, primary, "INSERT INTO t VALUES (2)")
	if err := primary.StopImmediate(); err != nil {
		t.Fatal(err)
	}
	if err := standby.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := query(t, standby, "SELECT string_agg(a::text, ',') FROM t"); got != "1" {
		t.Errorf("the promoted standby has the rows %s, want only the first", got)
	}
	// Waits for ever if it wants a synchronous standby as the old primary did.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := standby.Exec(ctx, Superuser, "INSERT INTO t VALUES (3)"); err != nil {
		t.Errorf("a write on the promoted standby: %v", err)
	}
}

func newStandby(t *testing.T, primary *Server, synchronous bool) *Server {
	t.Helper()
	standby, err := primary.Standby(t.Context(), synchronous)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := standby.Stop(); err != nil {
			t.Error(err)
		}
	})
	return standby
}
