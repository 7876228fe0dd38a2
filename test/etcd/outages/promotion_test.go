package outages

import (
	"context"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/test/postgres"
)

// bothHosts names the primary and its standby, in that order.
func (s *store) bothHosts(standby *postgres.Server) string {
	return s.DSNAt(s.Address+","+standby.Address, s.database, postgres.Superuser)
}

// A synchronous standby is promoted while writes go on: everything that was acknowledged is there, and the quires find the
// new primary by themselves.
func TestASynchronousStandbyIsPromoted(t *testing.T) {
	t.Parallel()
	s := newStore(t, postgres.Options{})
	standby := standbyOf(t, s, true)
	quires := beginAll(t, 3, s.bothHosts(standby))
	w := quires[2].watchAll(t, loadPrefix)
	ids := quires[0].grant(t, 50, 5, 1000)
	k := quires[0].keep(t, ids)
	l := write(t, 4, quires...)
	l.more(200)

	if err := s.StopImmediate(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(6 * time.Second) // until somebody has noticed, and longer than the leases live
	if err := standby.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, q := range quires {
		if took := eventually(t, "a write", patience, q.tryPut); took > 5*time.Second {
			t.Errorf("quire %d writes only %v after the promotion", i, took)
		}
	}
	l.more(200)
	l.stop()
	l.onlyUnavailable()
	now := &store{Server: standby, database: s.database}
	l.account(now)
	agree(t, quires...)
	w.complete(now.rows(t, loadPrefix))
	time.Sleep(6 * time.Second)
	if n := k.gone(); n > 0 {
		t.Errorf("%d renewals found no lease", n)
	}
	if n := quires[1].leased(t); n != int64(len(ids)) {
		t.Errorf("%d leases are left, want %d", n, len(ids))
	}
}

const historyLost = "the database has lost revisions"

// An asynchronous standby is promoted that lacks the newest transactions: the quires that have served them refuse everything
// from then on, and serve what there is when they are started again.
func TestAnAsynchronousStandbyIsPromoted(t *testing.T) {
	t.Parallel()
	s := newStore(t, postgres.Options{})
	standby := standbyOf(t, s, false)
	url := s.bothHosts(standby)
	quires := beginAll(t, 2, url)
	quires[0].put(t, "tried", "kept")
	if err := s.WaitCaughtUp(t.Context(), standby); err != nil {
		t.Fatal(err)
	}
	if err := standby.StopFollowing(t.Context()); err != nil {
		t.Fatal(err)
	}
	last := int64(0)
	for range 5 {
		last = quires[0].put(t, "tried", "lost").Header.Revision
	}
	if got := quires[1].get(t, "tried"); got != "lost" {
		t.Fatalf("quire 1 reads %q", got)
	}
	var watches []*watching
	for _, q := range quires {
		watches = append(watches, q.watchAll(t, "any/"))
	}
	if err := s.StopImmediate(); err != nil {
		t.Fatal(err)
	}
	if err := standby.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, w := range watches {
		select {
		case <-w.ended:
			if err := w.why(); !isUnavailable(err) || !strings.Contains(err.Error(), historyLost) {
				t.Errorf("the watch on quire %d has ended with %v, want Unavailable with %q", i, err, historyLost)
			}
		case <-time.After(patience):
			t.Errorf("the watch on quire %d goes on %v after the database has lost revisions", i, patience)
		}
	}
	for _, q := range quires {
		for what, call := range map[string]func(context.Context) error{
			"a write": q.tryPut, "a linearizable read": q.tryGet, "a serializable read": q.trySerializableGet,
			"a lease": func(ctx context.Context) error {
				_, err := q.lease.LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: 10})
				return err
			},
			"a list of leases": func(ctx context.Context) error {
				_, err := q.lease.LeaseLeases(ctx, &pb.LeaseLeasesRequest{})
				return err
			},
			"a compaction": func(ctx context.Context) error {
				_, err := q.kv.Compact(ctx, &pb.CompactionRequest{Revision: 2})
				return err
			},
			"a new watch": func(ctx context.Context) error {
				stream, err := q.watch.Watch(ctx)
				if err == nil {
					_, err = stream.Recv()
				}
				return err
			},
		} {
			refused(t, what, time.Second, historyLost, call)
		}
		if code, body := q.ready(t); code != 503 || !strings.Contains(body, historyLost) {
			t.Errorf("/readyz: %d %q, want 503 with %q", code, body, historyLost)
		}
		if len(q.Lines(historyLost)) == 0 {
			t.Error("the log does not say it")
		}
		q.stop(t)()
	}
	// The way out.
	for i, q := range beginAll(t, 2, url) {
		if got := q.get(t, "tried"); i == 0 && got != "kept" {
			t.Errorf("after the restart: %q, want kept", got)
		}
		q.put(t, "tried", "new")
		if code, body := q.ready(t); code != 200 {
			t.Errorf("/readyz after the restart: %d %q", code, body)
		}
	}
	now := &store{Server: standby, database: s.database}
	if rev := number(t, now.value(t, "SELECT max(rev) FROM quire.revisions")); rev >= last {
		t.Errorf("the newest revision is %d, want one before %d: nothing was lost, the test shows nothing", rev, last)
	}
}

// A quire that has not seen what was lost has nothing to take back, and goes on.
func TestWhoHasSeenNothingOfItGoesOn(t *testing.T) {
	t.Parallel()
	s := newStore(t, postgres.Options{})
	standby := standbyOf(t, s, false)
	far := proxy(t, s.Address)
	here := begin(t, s.bothHosts(standby))
	there := begin(t, s.DSNAt(far.Address+","+standby.Address, s.database, postgres.Superuser))
	here.put(t, "tried", "kept")
	if got := there.get(t, "tried"); got != "kept" {
		t.Fatalf("reads %q", got)
	}
	if err := s.WaitCaughtUp(t.Context(), standby); err != nil {
		t.Fatal(err)
	}
	if err := standby.StopFollowing(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := far.Cut(); err != nil {
		t.Fatal(err)
	}
	here.put(t, "tried", "lost")
	if err := s.StopImmediate(); err != nil {
		t.Fatal(err)
	}
	if err := standby.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a write of the quire that was cut off", patience, there.tryPut)
	refusedBy := time.Now()
	for !strings.Contains(errorText(here.tryPut(within(t, patience))), historyLost) {
		if time.Since(refusedBy) > patience {
			t.Fatal("the quire that has served what is lost does not notice")
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
