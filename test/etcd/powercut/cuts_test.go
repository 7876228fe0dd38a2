//go:build linux

package powercut

import (
	"context"
	"fmt"
	"io"
	"math"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// manner is when the power goes.
type manner string

const (
	underLoad manner = "under load"
	inStart   manner = "in a start"
	inStop    manner = "in a stop"
	idle      manner = "after a stop"
	restarted manner = "after a kill and a start"
)

func (m *machine) draw() manner {
	switch n := m.rng.IntN(20); {
	case n < 10:
		return underLoad
	case n < 13:
		return inStart
	case n < 16:
		return inStop
	case n < 19:
		return restarted
	default:
		return idle
	}
}

// An acknowledged write survives every power cut, and nothing is there afterwards that nobody has sent.
func TestNothingAcknowledgedIsLostInAPowerCut(t *testing.T) {
	m := newMachine(t, random(t))
	when := make(map[manner]int)
	n := cuts(t)
	for i := range n {
		how := m.draw()
		if !t.Run(fmt.Sprintf("%d %s", i+1, how), func(t *testing.T) { m.live(t, how) }) {
			return
		}
		when[how]++
	}
	t.Run("at last", func(t *testing.T) {
		m.check(t)
		m.verify(t, m.start(t), true)
		if code, err := m.Stop(20 * time.Second); err != nil || code != 0 && !isEtcd(t) {
			t.Errorf("quire ended on SIGTERM with status %d (%v), want 0", code, err)
		}
		m.check(t)
	})
	h := m.book.history
	t.Logf("%d cuts %v: revision %d, %d acknowledged writes found, %d without an answer happened, %d did not; refused: %v",
		n, when, h.rev, h.found, h.happened, h.never, m.book.load.mu.refuse)
	if h.found < n {
		t.Errorf("only %d writes were acknowledged in %d lives: this has tested nothing", h.found, n)
	}
}

// The same from the first moment on, when directories, files and the schema are made: each cut is the first of a machine
// with an empty disk, at some step of the first start or a little later.
func TestTheFirstPowerCutOfADatabase(t *testing.T) {
	r := random(t)
	served := 0
	for i := range cuts(t) {
		n := r.Int64N(300) // a start makes some 100 changes
		if !t.Run(fmt.Sprintf("%d after %d changes", i+1, n), func(t *testing.T) {
			m := newMachine(t, r)
			m.FreezeAfter(n, Changes)
			m.begin(t)
			if m.ready(t) {
				served++
				m.work(t, connect(t, m.address), 3*time.Second)
			}
			m.cut(t)
			m.check(t)
			m.verify(t, m.start(t), true)
		}) {
			return
		}
	}
	t.Logf("%d of %d had served clients", served, cuts(t))
}

// ready waits until quire serves, and says whether it does; else the power has gone.
func (m *machine) ready(t *testing.T) bool {
	t.Helper()
	p, ready := m.Process, make(chan error, 1)
	go func() { ready <- p.WaitReady(30 * time.Second) }()
	select {
	case <-m.Frozen():
		return false
	case err := <-ready:
		if err != nil {
			t.Fatal(err)
		}
		return true
	}
}

// work has the clients work until the power goes, or for as long.
func (m *machine) work(t *testing.T, client *clientv3.Client, most time.Duration) {
	t.Helper()
	end := m.begins(t, client, m.powerGone())
	m.await(t, most)
	end()
}

// begins has the clients work until end is called, or the test ends. Errors are findings unless they are excused.
func (m *machine) begins(t *testing.T, client *clientv3.Client, excused func() bool) (end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	stop, ended := make(chan struct{}), make(chan error, 1)
	off := m.Frozen()
	go func() { ended <- m.book.run(ctx, client, stop, excused) }()
	return func() {
		t.Helper()
		close(stop)
		var err error
		select {
		case err = <-ended:
		case <-off:
			cancel() // no answer will come
			err = <-ended
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// live is one life: what the last cut has left is checked, clients work, and the power goes.
func (m *machine) live(t *testing.T, how manner) {
	m.check(t)
	if how == inStart {
		m.FreezeAfter(m.rng.Int64N(40), Changes)
		m.begin(t)
		m.await(t, 20*time.Millisecond)
		m.cut(t)
		m.check(t)
	}
	client := m.start(t)
	m.verify(t, client, true)
	switch how {
	case underLoad, inStart:
		m.FreezeAfter(int64(math.Exp(m.rng.Float64()*math.Log(4000))), Changes)
		m.work(t, client, 3*time.Second)
	case inStop, idle:
		m.work(t, client, time.Duration(m.rng.IntN(300))*time.Millisecond)
		if how == inStop {
			m.FreezeAfter(m.rng.Int64N(30), Changes)
		}
		if err := m.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		m.await(t, 20*time.Second)
	case restarted:
		// What a killed quire has written and not synced, the next one finds, and must not serve before it is durable.
		m.FreezeAfter(m.rng.Int64N(100), Sync)
		m.work(t, client, 3*time.Second)
		m.kill(t)
		m.verify(t, m.start(t), true)
	}
	m.cut(t)
}

// await returns when the power has gone or quire has ended, or after a limit.
func (m *machine) await(t *testing.T, limit time.Duration) {
	t.Helper()
	p, ended := m.Process, make(chan int, 1)
	go func() {
		code, err := p.Wait(limit)
		if err != nil {
			code = 0 // it works on
		}
		ended <- code
	}()
	select {
	case <-m.Frozen():
	case code := <-ended:
		if code != 0 && !isEtcd(t) { // which ends by the signal
			t.Errorf("quire has ended with status %d", code)
		}
	}
}

// The same where a person has looked at the database with a shell after quire was killed, and has not closed it.
func TestAShellThatReadsMakesNoDifference(t *testing.T) {
	r := random(t)
	for i := range cuts(t) {
		if !t.Run(fmt.Sprint(i+1), func(t *testing.T) {
			m := newMachine(t, r)
			client := m.start(t)
			m.FreezeAfter(m.rng.Int64N(40), Sync) // written, and not yet synced
			m.work(t, client, 3*time.Second)
			m.kill(t)
			shell := hold(t, "sqlite3", "-batch", filepath.Join(m.dataDir(), "quire.db"))
			if _, err := io.WriteString(shell.in, "SELECT count(*) FROM kv;\n"); err != nil {
				t.Fatal(err)
			}
			for shell.out.String() == "" {
				time.Sleep(time.Millisecond) // until it has read
				if _, err := shell.Wait(0); err == nil {
					t.Fatal("the shell has ended")
				}
			}
			m.verify(t, m.start(t), true)
			if err := m.Cut(m.Process, shell); err != nil {
				t.Fatal(err)
			}
			m.verify(t, m.start(t), true)
		}) {
			return
		}
	}
}
