package outages

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/test/postgres"
)

// Any connection of any quire is killed at any moment, again and again. Clients may be told to try again, for as long as it
// takes to connect; what they are told is true.
func TestConnectionsAreKilledUnderLoad(t *testing.T) {
	t.Parallel()
	r := random(t)
	s := newStore(t, postgres.Options{})
	quires := beginAll(t, 3, s.url())
	w := quires[0].watchAll(t, loadPrefix)
	l := write(t, 4, quires...)
	l.more(50)
	killed := 0
	for began := time.Now(); time.Since(began) < 12*time.Second; {
		n, err := s.TerminateBackends(t.Context(), fmt.Sprintf("application_name = 'quire' AND random() < %f", 0.02+0.2*r.Float64()))
		if err != nil {
			t.Fatal(err)
		}
		killed += n
		time.Sleep(time.Duration(r.IntN(30)) * time.Millisecond)
	}
	t.Logf("%d connections were killed", killed)
	if killed < 30 {
		t.Errorf("only %d connections were killed", killed)
	}
	l.more(100)
	l.stop()
	l.onlyUnavailable()
	l.account(s)
	agree(t, quires...)
	w.complete(s.rows(t, loadPrefix))
}

// Only connections that commit are killed, mostly while they do; by the time the signal comes, the same connection may be
// asking for something else. (That clients see nothing of a lost commit, traps show that spring at the commit: see below.)
func TestCommitsAreKilled(t *testing.T) {
	t.Parallel()
	r := random(t)
	s := newStore(t, postgres.Options{})
	q := begin(t, s.url())
	w := q.watchAll(t, loadPrefix)
	l := write(t, 6, q)
	l.more(50)
	killed := 0
	for began := time.Now(); time.Since(began) < 6*time.Second; {
		n, err := s.TerminateBackends(t.Context(), "application_name = 'quire' AND state = 'active' AND query LIKE '%commit_batch%'")
		if err != nil {
			t.Fatal(err)
		}
		killed += n
		time.Sleep(time.Duration(r.IntN(20)) * time.Millisecond)
	}
	t.Logf("%d commits were killed", killed)
	if killed < 5 {
		t.Errorf("only %d commits were killed", killed)
	}
	l.more(50)
	l.stop()
	l.onlyUnavailable()
	l.account(s)
	w.complete(s.rows(t, loadPrefix))
}

// The connection of a commit ends before the server has seen it, half way through it, or after it is done: the client of an
// only quire sees nothing, and neither do those of two that write at once.
func TestTheAnswerToACommitIsLost(t *testing.T) {
	for _, n := range []int{1, 2} {
		t.Run(fmt.Sprintf("%d quires", n), func(t *testing.T) {
			t.Parallel()
			r := random(t)
			s := newStore(t, postgres.Options{})
			p := proxy(t, s.Address)
			quires := []*quire{begin(t, s.through(p.Address))}
			if n == 2 {
				quires = append(quires, begin(t, s.url()))
			}
			w := quires[0].watchAll(t, loadPrefix)
			l := write(t, 4, quires...)
			l.more(20)
			for i := range 60 {
				switch {
				case i%2 == 0:
					spring(t, p, p.CutBeforeAnswer("commit_batch"))
				case n == 1 || i%3 == 0:
					spring(t, p, p.CutBeforeRequest("commit_batch"))
				default:
					// It may be another connection's turn, whose end is an outage to all for a moment.
					spring(t, p, p.CutAfterBytes(1+r.IntN(4000)))
				}
			}
			l.more(20)
			l.stop()
			if n == 1 {
				l.noError()
			}
			l.onlyUnavailable()
			l.account(s)
			agree(t, quires...)
			w.complete(s.rows(t, loadPrefix))
		})
	}
}

// spring waits until a trap has caught something, and puts everything in order again.
func spring(t *testing.T, p *postgres.Proxy, trap <-chan struct{}) {
	t.Helper()
	select {
	case <-trap:
	case <-time.After(patience):
		t.Fatalf("no request came into the trap within %v", patience)
	}
	if err := p.Heal(); err != nil {
		t.Fatal(err)
	}
}

// The answer to the question what became of a commit is lost as well, once or several times.
func TestTheAnswerAboutACommitIsLostToo(t *testing.T) {
	t.Parallel()
	r := random(t)
	s := newStore(t, postgres.Options{})
	p := proxy(t, s.Address)
	quires := []*quire{begin(t, s.through(p.Address)), begin(t, s.url())}
	w := quires[1].watchAll(t, loadPrefix)
	l := write(t, 3, quires...)
	l.more(20)
	for range 20 {
		trap := p.CutBeforeAnswer("commit_batch")
		select {
		case <-trap:
		case <-time.After(patience):
			t.Fatalf("no commit within %v", patience)
		}
		for range 1 + r.IntN(3) {
			// It is asked for within milliseconds; set too late, the trap waits for the next one.
			next := p.CutBeforeAnswer("resolve_commit")
			if r.IntN(2) == 0 {
				next = p.CutBeforeRequest("resolve_commit")
			}
			select {
			case <-next:
			case <-time.After(time.Second):
			}
		}
		if err := p.Heal(); err != nil {
			t.Fatal(err)
		}
		l.more(3)
	}
	l.stop()
	l.onlyUnavailable()
	l.account(s)
	agree(t, quires...)
	w.complete(s.rows(t, loadPrefix))
	// What shows that the traps have caught something: each question leaves an empty batch.
	empty := number(t, s.value(t, `SELECT count(*) FROM (SELECT last_id = lag(last_id) OVER (ORDER BY seq) AND lease_ids IS NULL AND compacted IS NULL AS empty FROM quire.commits) AS c WHERE empty`))
	if empty < 20 {
		t.Errorf("only %d empty batches, want one for each commit whose answer was lost", empty)
	}
}

// A large commit is cut off in the middle of what it sends.
func TestALargeCommitIsCutOff(t *testing.T) {
	t.Parallel()
	r := random(t)
	s := newStore(t, postgres.Options{})
	p := proxy(t, s.Address)
	q := begin(t, s.through(p.Address))
	const size = 1 << 20
	for i := range 10 {
		value := randomBytes(r, size)
		cut := p.CutAfterBytes(1000 + r.IntN(size))
		answer, err := q.kv.Put(within(t, patience), &pb.PutRequest{Key: fmt.Appendf(nil, "large/%d", i), Value: value})
		if err != nil {
			t.Fatalf("write %d: %v", i, err)
		}
		select {
		case <-cut:
		default:
			t.Errorf("write %d was not cut off", i)
		}
		if err := p.Heal(); err != nil {
			t.Fatal(err)
		}
		got, err := q.kv.Range(within(t, patience), &pb.RangeRequest{Key: fmt.Appendf(nil, "large/%d", i)})
		if err != nil {
			t.Fatal(err)
		}
		if kv := got.Kvs[0]; kv.Version != 1 || kv.ModRevision != answer.Header.Revision || string(kv.Value) != string(value) {
			t.Errorf("write %d is version %d at revision %d with %d bytes, want version 1 at revision %d", i, kv.Version, kv.ModRevision, len(kv.Value), answer.Header.Revision)
		}
	}
}

func randomBytes(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// While a synchronous standby is away a commit waits for it. Killed there, it is on the primary alone: it must not be
// acknowledged before the standby has it.
func TestACommitIsKilledWhileItWaitsForTheStandby(t *testing.T) {
	t.Parallel()
	s := newStore(t, postgres.Options{})
	standby := standbyOf(t, s, true)
	q := begin(t, s.url())
	q.put(t, "k", "before")
	if err := standby.Pause(); err != nil {
		t.Fatal(err)
	}
	answer := make(chan error, 1)
	go func() {
		_, err := q.kv.Put(within(t, patience), &pb.PutRequest{Key: []byte("k"), Value: []byte("after")})
		answer <- err
	}()
	ctx := within(t, patience)
	if err := s.WaitFor(ctx, s.database, "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE '%commit_batch%'"); err != nil {
		t.Fatal(err)
	}
	// Others may wait for it too, such as a report that the process lives.
	if n, err := s.TerminateBackends(ctx, "wait_event = 'SyncRep'"); err != nil || n == 0 {
		t.Fatalf("%d commits were killed (%v), want 1 at least", n, err)
	}
	select {
	case err := <-answer:
		t.Fatalf("answered (%v) while the standby does not have it", err)
	case <-time.After(2 * time.Second):
	}
	if err := standby.Resume(); err != nil {
		t.Fatal(err)
	}
	if err := <-answer; err != nil {
		t.Errorf("the standby is back: %v", err)
	}
	r, err := q.kv.Range(ctx, &pb.RangeRequest{Key: []byte("k")})
	if err != nil {
		t.Fatal(err)
	}
	if kv := r.Kvs[0]; string(kv.Value) != "after" || kv.Version != 2 {
		t.Errorf("the key is %q in version %d, want after in version 2", kv.Value, kv.Version)
	}
}

// A synchronous standby that stays away: writes are refused with the truth, which is that they may have been kept.
func TestTheStandbyStaysAway(t *testing.T) {
	t.Parallel()
	s := newStore(t, postgres.Options{})
	standby := standbyOf(t, s, true)
	quires := beginAll(t, 2, s.url())
	l := write(t, 2, quires...)
	l.more(20)
	if err := standby.Pause(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(14 * time.Second)
	if err := standby.Resume(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a write", patience, quires[0].tryPut)
	l.more(20)
	l.stop()
	l.onlyUnavailable()
	l.account(s)
	agree(t, quires...)
	doubtful := 0
	for text, n := range l.errors() {
		if strings.Contains(text, "may or may not have been kept") {
			doubtful += n
		}
	}
	if doubtful == 0 {
		t.Error("nobody was told that a write may have been kept")
	}
}

// standbyOf starts a standby that is stopped when the test ends.
func standbyOf(t *testing.T, s *store, synchronous bool) *postgres.Server {
	t.Helper()
	standby, err := s.Standby(t.Context(), synchronous)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of the standby's log:\n%s", standby.LogTail(3000))
		}
		if err := standby.Stop(); err != nil {
			t.Errorf("stop the standby: %v", err)
		}
	})
	return standby
}
