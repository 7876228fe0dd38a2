package outages

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quire-db/quire/test/postgres"
)

// outage is a way for the database to be away.
type outage struct {
	leave, comeBack func() error
	// read is how long a read may take that was under way, or is the first one; later ones are refused at once.
	read time.Duration
}

func TestTheDatabaseCrashes(t *testing.T) {
	t.Parallel()
	s := newStore(t, postgres.Options{})
	awayAndBack(t, s, s.url(), outage{
		leave:    s.StopImmediate,
		comeBack: func() error { return s.Restart(t.Context()) },
		read:     time.Second,
	})
}

func TestTheNetworkIsCut(t *testing.T) {
	t.Parallel()
	s := newStore(t, postgres.Options{})
	p := proxy(t, s.Address)
	awayAndBack(t, s, s.through(p.Address), outage{leave: p.Cut, comeBack: p.Heal, read: time.Second})
}

// When the network is back it delivers what was sent before, so a commit may arrive that nobody waits for any more.
func TestTheNetworkHangs(t *testing.T) {
	t.Parallel()
	s := newStore(t, postgres.Options{})
	p := proxy(t, s.Address)
	awayAndBack(t, s, s.through(p.Address), outage{leave: func() error { p.Hang(); return nil }, comeBack: p.Heal, read: 6 * time.Second})
}

func TestTheDatabaseIsFrozen(t *testing.T) {
	t.Parallel()
	s := newStore(t, postgres.Options{})
	awayAndBack(t, s, s.url(), outage{leave: s.Pause, comeBack: s.Resume, read: 6 * time.Second})
}

// lastWord is how long a write may take that was under way when the database left, or came while such a one was looked into.
const lastWord = 7 * time.Second

const (
	awayLeases = 200
	awayTTL    = 5
	// awayFor is longer than the leases live.
	awayFor = 10 * time.Second
)

// awayAndBack takes the database away from two quires under load, for longer than their leases live, and gives it back.
func awayAndBack(t *testing.T, s *store, url string, o outage) {
	quires := beginAll(t, 2, url)
	var watches []*watching
	for _, q := range quires {
		watches = append(watches, q.watchAll(t, loadPrefix))
	}
	ids := quires[0].grant(t, awayLeases, awayTTL, 1000)
	keepers := []*keeper{quires[0].keep(t, ids[:awayLeases/2]), quires[1].keep(t, ids[awayLeases/2:])}
	abandoned := quires[0].grant(t, 3, awayTTL, 5000)
	l := write(t, 2, quires...)
	l.more(100)

	if err := o.leave(); err != nil {
		t.Fatal(err)
	}
	left := time.Now()
	// The first ones find out that it is away.
	var firsts sync.WaitGroup
	for i, q := range quires {
		for _, first := range []struct {
			what  string
			call  func(context.Context) error
			limit time.Duration
		}{{"a first read", q.tryGet, o.read}, {"a first write", q.tryPut, lastWord}} {
			firsts.Go(func() {
				err := first.call(within(t, patience))
				took := time.Since(left).Round(time.Millisecond)
				if !isUnavailable(err) || took > first.limit {
					t.Errorf("%s through quire %d ended %v after the database had left: %v, want Unavailable within %v", first.what, i, took, err, first.limit)
				}
			})
		}
	}
	firsts.Wait()
	rounds := 0
	for ; time.Since(left) < awayFor; time.Sleep(250 * time.Millisecond) {
		for _, q := range quires {
			at := time.Since(left).Round(time.Millisecond)
			refused(t, fmt.Sprint("a write after ", at), time.Second, "", q.tryPut)
			refused(t, fmt.Sprint("a linearizable read after ", at), time.Second, "", q.tryGet)
			if err := q.trySerializableGet(within(t, time.Second)); err != nil {
				t.Errorf("a serializable read while the database is away: %v", err)
			}
			if code, body := q.ready(t); code != 503 || !strings.Contains(body, "the database is not available") {
				t.Errorf("/readyz while the database is away: %d %q, want 503 with the reason", code, body)
			}
		}
		rounds++
	}
	for _, w := range watches {
		if !w.open() {
			t.Errorf("the watch on %s has ended while the database was away: %v", w.of, w.why())
		}
	}
	if rounds < 3 {
		t.Errorf("only %d rounds of requests while the database was away", rounds)
	}

	if err := o.comeBack(); err != nil {
		t.Fatal(err)
	}
	for i, q := range quires {
		took := max(eventually(t, "a write", patience, q.tryPut), eventually(t, "a read", patience, q.tryGet))
		if took > 5*time.Second {
			t.Errorf("quire %d serves only %v after the database is back", i, took.Round(time.Millisecond))
		}
	}
	l.more(100)
	// All leases were due while the database was away, and nobody could renew them.
	time.Sleep((awayTTL + 3) * time.Second)
	for i, k := range keepers {
		if n := k.gone(); n > 0 {
			t.Errorf("%d renewals through quire %d found no lease, want none", n, i)
		}
	}
	n := quires[1].leased(t)
	for began := time.Now(); n > awayLeases && time.Since(began) < patience; n = quires[1].leased(t) {
		time.Sleep(50 * time.Millisecond)
	}
	if n != awayLeases {
		t.Errorf("%d keys on leases are left, want those of %d that are renewed, and not those of %d that are not", n, awayLeases, len(abandoned))
	}
	l.stop()
	for _, q := range quires {
		if code, body := q.ready(t); code != 200 {
			t.Errorf("/readyz after the database is back: %d %q", code, body)
		}
	}
	l.account(s)
	l.onlyUnavailable()
	if took := l.slowestRefusal(); took > lastWord {
		t.Errorf("a writer was refused only after %v, want within %v", took, lastWord)
	}
	agree(t, quires...)
	for _, w := range watches {
		w.complete(s.rows(t, loadPrefix))
	}
}

// A slow network makes everything slower, and nothing else.
func TestTheNetworkIsSlow(t *testing.T) {
	t.Parallel()
	s := newStore(t, postgres.Options{})
	p := proxy(t, s.Address)
	quires := beginAll(t, 2, s.through(p.Address))
	w := quires[1].watchAll(t, loadPrefix)
	const delay = 100 * time.Millisecond
	p.Delay(delay)
	l := write(t, 4, quires...)
	l.more(40)
	took := time.Now()
	quires[0].put(t, "slow", "x")
	if took := time.Since(took); took < 2*delay {
		t.Errorf("a write took %v, want a round trip of %v at least", took, 2*delay)
	}
	if got := quires[1].get(t, "slow"); got != "x" {
		t.Errorf("a linearizable read through the other quire: %q", got)
	}
	l.stop()
	if err := p.Heal(); err != nil {
		t.Fatal(err)
	}
	l.noError()
	l.account(s)
	agree(t, quires...)
	w.complete(s.rows(t, loadPrefix))
}
