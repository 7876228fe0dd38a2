package outages

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/test/postgres"
)

// A quire is stopped (SIGSTOP) while others write, renew leases that it knew as due soon, and compact. When it goes on it must
// expire nothing on old knowledge, answer nothing old, and its watchers miss nothing.
func TestAQuireIsPaused(t *testing.T) {
	t.Parallel()
	s := newStore(t, postgres.Options{})
	quires := beginAll(t, 3, s.url())
	paused, others := quires[0], quires[1:]
	w := paused.watchAll(t, loadPrefix)
	beside := others[0].watchAll(t, loadPrefix)
	kept := others[0].grant(t, 50, 5, 1000)
	k := others[0].keep(t, kept)
	own := paused.grant(t, 20, 60, 2000)
	ownKeeper := paused.keep(t, own)
	l := write(t, 2, others...)
	l.more(50)

	if err := paused.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stopped := time.Now()
	const pause = 15 * time.Second
	late := make(chan error, 1) // a request that waits for the paused one
	go func() {
		r, err := paused.kv.Range(within(t, pause+patience), &pb.RangeRequest{Key: []byte("during")})
		if err == nil && (len(r.Kvs) != 1 || string(r.Kvs[0].Value) != "x") {
			err = fmt.Errorf("it found %v", r.Kvs)
		}
		late <- err
	}()
	time.Sleep(pause / 3)
	l.more(20)
	during := others[0].put(t, "during", "x").Header.Revision
	// Physical answers when the rows are gone, which waits for the paused process; so this is only the mark.
	if _, err := others[0].kv.Compact(within(t, patience), &pb.CompactionRequest{Revision: during - 5}); err != nil {
		t.Fatal(err)
	}
	l.more(20)
	time.Sleep(pause - time.Since(stopped))
	if err := paused.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}

	// Its own time limits may have ended while it was stopped: then it says so, and finds out that they mean nothing.
	if err := <-late; err != nil && !isUnavailable(err) {
		t.Errorf("a linearizable read that had waited: %v, want the truth or Unavailable", err)
	}
	eventually(t, "a write through the one that was paused", patience, paused.tryPut)
	l.more(50)
	time.Sleep(6 * time.Second)
	if n := k.gone(); n > 0 {
		t.Errorf("%d renewals found no lease: it expired leases that others had renewed", n)
	}
	if n := ownKeeper.gone(); n > 0 {
		t.Errorf("%d renewals through the one that was paused found no lease", n)
	}
	if n := others[1].leased(t); n != int64(len(kept)+len(own)) {
		t.Errorf("%d leases are left, want %d", n, len(kept)+len(own))
	}
	l.stop()
	l.noError()
	agree(t, quires...)
	// The rows are gone that were compacted; what the other watcher was sent is the account then.
	last := others[0].get(t, "tried")
	if last == "" {
		t.Error("the write through the one that was paused is not there")
	}
	all := s.rows(t, loadPrefix)
	for deadline := time.Now().Add(patience); len(beside.seen()) == 0 || beside.seen()[len(beside.seen())-1].revision < all[len(all)-1].revision; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the watch on a quire that was not paused is late")
		}
	}
	w.complete(beside.seen())
	if n := l.acknowledged(); len(beside.seen()) != n {
		t.Errorf("%d events, want %d", len(beside.seen()), n)
	}
}

// Leases run by the clock of the database. Other clocks do not come into it: here the database is an hour ahead of the
// machine on which both quires run, as a quire would find it whose own machine is an hour late. (Two processes on one machine
// cannot have different clocks without help like faketime, which a static binary does not load.)
func TestLeasesRunByTheClockOfTheDatabase(t *testing.T) {
	t.Parallel()
	s := newStore(t, postgres.Options{})
	begin(t, s.url()).stop(t)() // makes the schema
	const ahead = `CREATE OR REPLACE FUNCTION quire.now_us() RETURNS bigint LANGUAGE sql VOLATILE AS
		$$ SELECT (extract(epoch FROM clock_timestamp() + interval '%s') * 1000000)::bigint $$`
	s.sql(t, fmt.Sprintf(ahead, "1 hour"))
	quires := beginAll(t, 2, s.url())
	kept := quires[0].grant(t, 5, 3, 1000)
	k := quires[1].keep(t, kept)
	quires[0].grant(t, 5, 3, 2000)
	granted := time.Now()
	left := s.value(t, "SELECT max(deadline - quire.now_us()) BETWEEN 0 AND 3000000 FROM quire.lease")
	if left != "t" {
		t.Error("the deadlines in the table are not those of the database's clock")
	}
	for quires[1].leased(t) != int64(len(kept)) {
		if time.Since(granted) > patience {
			t.Fatalf("leases with a TTL of 3 s are there after %v", patience)
		}
		time.Sleep(20 * time.Millisecond)
	}
	if took := time.Since(granted); took < 2*time.Second || took > 8*time.Second {
		t.Errorf("leases with a TTL of 3 s expired after %v", took)
	}
	// The clock jumps, as it does when a standby whose clock is wrong is promoted: nobody loses a lease that is renewed.
	s.sql(t, fmt.Sprintf(ahead, "3 hours"))
	time.Sleep(5 * time.Second)
	if n := k.gone(); n > 0 {
		t.Errorf("%d renewals found no lease after the database's clock has jumped", n)
	}
	if n := quires[0].leased(t); n != int64(len(kept)) {
		t.Errorf("%d leases are left, want %d", n, len(kept))
	}
}
