//go:build linux

package powercut

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// A disk that fails under load, in one of these ways, for some operations: what was acknowledged holds, in the process that
// lives through it and after it was killed, and after a power cut. Writes are refused meanwhile, or quire ends and says why.
func TestAFailingDiskLosesNothing(t *testing.T) {
	r := random(t)
	for _, c := range []struct {
		name  string
		fault Fault // its Skip is drawn, up to the given
	}{
		{"fsync of the WAL: EIO", Fault{On: Sync, File: "-wal", Skip: 60, Errno: syscall.EIO}},
		{"fsync of the WAL: ENOSPC", Fault{On: Sync, File: "-wal", Skip: 60, Errno: syscall.ENOSPC}},
		{"fsync of the database: EIO", Fault{On: Sync, File: ".db", Errno: syscall.EIO}},
		{"write of the WAL: EIO", Fault{On: Write, File: "-wal", Skip: 300, Errno: syscall.EIO}},
		{"write of the WAL: ENOSPC", Fault{On: Write, File: "-wal", Skip: 300, Errno: syscall.ENOSPC}},
		{"write of the database: EIO", Fault{On: Write, File: ".db", Skip: 100, Errno: syscall.EIO}},
		{"every change: EIO", Fault{On: Changes, Skip: 300, Errno: syscall.EIO}},
		{"every write and name: ENOSPC", Fault{On: Write | Names, Skip: 300, Errno: syscall.ENOSPC}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine(t, r)
			hits, refused, ended := int64(0), int64(0), 0
			for i := range max(cuts(t)/5, 2) {
				if !t.Run(fmt.Sprint(i+1), func(t *testing.T) {
					f := c.fault
					f.Skip, f.For = r.Int64N(f.Skip+1), 1+r.Int64N(8)
					if r.IntN(3) == 0 {
						f.For = 0
					}
					met, alive := m.failing(t, f)
					hits += met
					if !alive {
						ended++
					}
					refused += m.book.load.errors.Swap(0)
				}) {
					return
				}
			}
			m.verify(t, m.start(t), true)
			h := m.book.history
			t.Logf("%d operations failed, %d requests; quire ended %d times; %d acknowledged writes found, %d without an answer happened, %d did not",
				hits, refused, ended, h.found, h.happened, h.never)
			if hits == 0 {
				t.Error("the disk did not fail: this has tested nothing")
			}
		})
	}
}

// failing is a life with a fault. It says how often that was met, and whether quire has lived through it.
func (m *machine) failing(t *testing.T, fault Fault) (hits int64, alive bool) {
	m.check(t)
	client := m.start(t)
	m.verify(t, client, true)
	f := m.Inject(fault)
	end := m.begins(t, client, func() bool { return f.Hits() > 0 })
	for deadline := time.Now().Add(5 * time.Second); f.Hits() == 0 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(time.Duration(m.rng.IntN(300)) * time.Millisecond) // how long they go on, drawn
	if m.rng.IntN(3) == 0 {
		// The end comes before the disk is well again.
		m.Freeze()
		end()
		m.endOne(t)
		return f.Hits(), true
	}
	m.Heal()
	alive = m.heals(t, client)
	end()
	if alive {
		m.verify(t, client, false)
	}
	m.endOne(t)
	return f.Hits(), alive
}

// endOne ends a life: the power goes, or quire is killed and started again; what it finds then may be in the memory of the
// machine alone, and the power goes a little later.
func (m *machine) endOne(t *testing.T) {
	t.Helper()
	if m.rng.IntN(2) == 0 {
		m.kill(t)
		m.Heal()
		client := m.start(t)
		m.verify(t, client, true)
		m.FreezeAfter(m.rng.Int64N(100), Changes)
		m.work(t, client, time.Second)
	}
	m.cut(t)
}

// heals waits until a write succeeds on a disk that is well again; it is false if quire has ended, with an error for a person.
func (m *machine) heals(t *testing.T, client *clientv3.Client) bool {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	before := m.book.answers.Load()
	for m.book.answers.Load() == before {
		if code, err := m.Wait(5 * time.Millisecond); err == nil {
			m.endedClearly(t, code)
			return false
		}
		if time.Now().After(deadline) {
			t.Fatal("the disk has been well for 10 s, and no write is acknowledged")
		}
	}
	return true
}

// endedClearly wants an error for a person, and no panic.
func (m *machine) endedClearly(t *testing.T, code int) {
	t.Helper()
	out := m.Output()
	for _, bad := range []string{"panic:", "goroutine ", "SIGBUS", "SIGSEGV"} {
		if strings.Contains(out, bad) {
			t.Errorf("quire panicked: %q in its output", bad)
			return
		}
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if code != 1 || !slices.ContainsFunc(lines, func(l string) bool { return strings.Contains(l, m.Dir) }) {
		t.Errorf("quire has ended with status %d and does not name what is wrong", code)
	}
}

// While every fsync fails, no write is acknowledged, reads are answered, and the reason is told.
func TestWithoutFsyncNothingIsAcknowledged(t *testing.T) {
	m := newMachine(t, random(t))
	client := m.start(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := client.Put(ctx, "before", "x"); err != nil {
		t.Fatal(err)
	}
	m.Inject(Fault{On: Sync, Errno: syscall.EIO})
	for i := range 20 {
		r, err := client.Put(ctx, fmt.Sprint("during", i), "x")
		if err == nil {
			t.Fatalf("a write was acknowledged at revision %d although it cannot be durable", r.Header.Revision)
		}
		if text := err.Error(); !strings.Contains(text, "disk") || !strings.Contains(text, m.Dir) {
			t.Errorf("the error does not say what is wrong, and where: %v", err)
		}
		got, err := client.Get(ctx, "", clientv3.WithPrefix())
		if err != nil || len(got.Kvs) != 1 || string(got.Kvs[0].Key) != "before" {
			t.Fatalf("a read while writes fail: %v, %v", got, err)
		}
	}
	m.Heal()
	r, err := client.Put(ctx, "after", "x")
	if err != nil || r.Header.Revision != 3 {
		t.Fatalf("a write on a disk that is well again: %v, %v, want revision 3", r, err)
	}
	m.cut(t)
	got, err := m.start(t).Get(ctx, "", clientv3.WithPrefix())
	if err != nil || len(got.Kvs) != 2 {
		t.Errorf("after a power cut: %v, %v, want the two writes that were acknowledged", got, err)
	}
}

// A slow disk makes writes slow, and nothing else: no write fails, no lease is lost, and reads do not wait.
func TestASlowDiskSlowsWritesAlone(t *testing.T) {
	m := newMachine(t, random(t))
	client := m.start(t)
	const delay = 200 * time.Millisecond
	m.Inject(Fault{On: Sync, Delay: delay})
	end := m.begins(t, client, func() bool { return false })
	var took []time.Duration
	for began := time.Now(); time.Since(began) < 4*time.Second; time.Sleep(10 * time.Millisecond) { // a client's pace
		at := time.Now()
		if _, err := client.Get(t.Context(), "s/0"); err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Since(at))
	}
	end()
	slices.Sort(took)
	median := took[len(took)/2]
	if median > delay/4 {
		t.Errorf("the median of %d reads is %s while an fsync takes %s: reads wait for writes", len(took), median, delay)
	}
	// Eight writers in 20 fsyncs: they share them.
	if n := m.book.answers.Load(); n < 25 {
		t.Errorf("%d writes were acknowledged in 4 s", n)
	} else {
		t.Logf("%d writes in 4 s, median of the reads %s", n, median)
	}
	m.verify(t, client, false)
	m.cut(t)
	m.verify(t, m.start(t), true)
}

// A start that meets a fault serves, or ends and says why; it damages nothing, and the next one has everything. So with
// each operation of a start, of every kind.
func TestAStartOnAFailingDisk(t *testing.T) {
	r := random(t)
	faults := []Fault{
		{On: Changes, Errno: syscall.EIO},
		{On: Write | Names, Errno: syscall.ENOSPC},
		{On: Read, Errno: syscall.EIO},
	}
	for _, fresh := range []bool{true, false} {
		t.Run(map[bool]string{true: "without a database", false: "with a database"}[fresh], func(t *testing.T) {
			served, ended := 0, 0
			for i := range cuts(t) {
				f := faults[i%len(faults)]
				f.Skip, f.For = r.Int64N(120), 1
				if !fresh {
					f.Skip = r.Int64N(25)
				}
				if i%2 == 0 {
					f.For = 0
				}
				if !t.Run(fmt.Sprintf("%d %v after %d", i+1, f.Errno, f.Skip), func(t *testing.T) {
					m := newMachine(t, r)
					if !fresh {
						client := m.start(t)
						m.FreezeAfter(100+m.rng.Int64N(300), Changes)
						m.work(t, client, 3*time.Second)
						m.cut(t)
					}
					m.Inject(f)
					m.begin(t)
					if m.servesOrEnds(t) {
						served++
					} else {
						ended++
					}
					m.cut(t)
					m.check(t)
					m.verify(t, m.start(t), true)
				}) {
					return
				}
			}
			t.Logf("%d served, %d did not", served, ended)
		})
	}
}

func (m *machine) servesOrEnds(t *testing.T) (serves bool) {
	t.Helper()
	if m.WaitReady(30*time.Second) == nil {
		return true
	}
	code, err := m.Wait(time.Second)
	if err != nil {
		t.Fatalf("quire neither serves nor ends: %v", err)
	}
	m.endedClearly(t, code)
	return false
}

// A bit that is read wrong once, somewhere in a start: quire serves, or ends and says why. (What is in a value nothing
// protects: SQLite keeps no checksums of its pages.)
func TestAStartThatReadsAFlippedBit(t *testing.T) {
	r := random(t)
	m := newMachine(t, r)
	for range 3 {
		client := m.start(t)
		m.verify(t, client, true)
		m.FreezeAfter(500+m.rng.Int64N(500), Changes)
		m.work(t, client, 5*time.Second)
		m.cut(t)
	}
	whole := m.disk
	hits, served, ended := int64(0), 0, 0
	for i := range cuts(t) {
		n := r.Int64N(15)
		t.Run(fmt.Sprintf("%d after %d reads", i+1, n), func(t *testing.T) {
			m := &machine{Mount: whole.Clone(r.Uint64()).Mount(t), rng: r}
			flip := m.Inject(Fault{On: Read, Skip: n, For: 1, Flip: true})
			defer func() { hits += flip.Hits() }()
			m.begin(t)
			if !m.servesOrEnds(t) {
				ended++
				return
			}
			served++
			client := connect(t, m.address)
			if _, err := client.Put(t.Context(), "a", "x"); err != nil && flip.Hits() == 0 {
				t.Errorf("a write on a sound disk: %v", err)
			}
			if _, err := client.Get(t.Context(), "", clientv3.WithPrefix()); err != nil && flip.Hits() == 0 {
				t.Errorf("a read on a sound disk: %v", err)
			}
			code, err := m.Stop(20 * time.Second)
			if err != nil {
				t.Fatal(err)
			}
			if code != 0 {
				m.endedClearly(t, code)
			}
		})
	}
	t.Logf("%d bits were wrong; %d starts served, %d did not", hits, served, ended)
	if hits == 0 {
		t.Error("no bit was wrong: this has tested nothing")
	}
}
