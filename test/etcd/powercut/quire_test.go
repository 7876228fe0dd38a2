//go:build linux

package powercut

import (
	"context"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/quire-db/quire/test/etcd/start"
	"github.com/quire-db/quire/test/ports"
)

// cuts is how many power cuts a test makes.
func cuts(t *testing.T) int {
	t.Helper()
	s := os.Getenv("QUIRE_CUTS")
	if s == "" {
		return 15
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("QUIRE_CUTS is %q; it must be a number from 1", s)
	}
	return n
}

// machine is a computer with a disk that quire runs on.
type machine struct {
	*Mount
	book book
	rng  *rand.Rand

	*start.Process // of this life
	address        string
	args           []string // beside the data directory; nil: an address of its own for each life
}

// newDisk is a disk for the binary under test. etcd does not sync the names of all directories that it makes.
func newDisk(t *testing.T, r *rand.Rand) *Disk {
	t.Helper()
	d := NewDisk(r.Uint64())
	d.Journal = isEtcd(t)
	return d
}

func newMachine(t *testing.T, r *rand.Rand) *machine {
	t.Helper()
	m := &machine{Mount: newDisk(t, r).Mount(t), rng: r}
	m.book = book{newLoad(r, false), newHistory()}
	return m
}

func (m *machine) dataDir() string { return filepath.Join(m.Dir, "data") }

// begin starts a quire and does not wait for it.
func (m *machine) begin(t *testing.T) {
	t.Helper()
	args := m.args
	if args == nil {
		m.address = ports.FreeAddress(t)
		args = []string{"--listen-client-urls=http://" + m.address, "--advertise-client-urls=http://" + m.address}
	}
	m.Process = start.Run(t, nil, append([]string{"--data-dir=" + m.dataDir()}, args...)...)
	t.Cleanup(func() {
		if t.Failed() {
			m.keep(t)
			m.Abandon() // or the process, which is killed now, could not end
		}
	})
}

// start waits until quire serves.
func (m *machine) start(t *testing.T) *clientv3.Client {
	t.Helper()
	m.begin(t)
	if err := m.WaitReady(30 * time.Second); err != nil {
		t.Fatal(err)
	}
	return connect(t, m.address)
}

func connect(t *testing.T, endpoints ...string) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: endpoints, DialTimeout: 5 * time.Second, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// cut is a power cut.
func (m *machine) cut(t *testing.T) {
	t.Helper()
	if err := m.Cut(m.Process); err != nil {
		t.Fatal(err)
	}
}

// kill ends quire, and not the machine.
func (m *machine) kill(t *testing.T) {
	t.Helper()
	if err := m.Mount.Kill(m.Process); err != nil {
		t.Fatal(err)
	}
}

// isEtcd says that the binary under test is etcd itself, to look at the tests.
func isEtcd(t *testing.T) bool { return filepath.Base(start.Binary(t)) == "etcd" }

// check runs `quire check` on a copy of what the disk holds. Without a database there is nothing to check.
func (m *machine) check(t *testing.T) {
	t.Helper()
	if isEtcd(t) {
		return // it has no such command
	}
	dir := t.TempDir()
	if err := m.disk.Export(dir); err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(dir, "data")
	if _, err := os.Stat(filepath.Join(dir, "quire.db")); err != nil {
		return
	}
	if out, err := exec.Command(start.Binary(t), "check", "--data-dir="+dir).CombinedOutput(); err != nil {
		t.Fatalf("quire check: %v\n%s", err, out)
	}
}

// verify compares the store with everything that is known of it.
func (m *machine) verify(t *testing.T, client *clientv3.Client, over bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := m.book.verify(ctx, client, over); err != nil {
		t.Fatal(err)
	}
}

// keep leaves a copy of the disk and of the log behind for whoever looks for the reason of a failure.
func (m *machine) keep(t *testing.T) {
	dir, err := os.MkdirTemp("", "powercut-")
	if err == nil {
		err = m.disk.Export(dir)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "quire.log"), []byte(m.Output()), 0o600)
	}
	if err != nil {
		t.Error(err)
		return
	}
	t.Logf("what the disk holds now, and what quire has printed, is kept in %s", dir)
}

// powerGone tells whether the power of this life has gone: an error of a call is due then.
func (m *machine) powerGone() func() bool {
	off := m.Frozen()
	return func() bool {
		select {
		case <-off:
			return true
		default:
			return false
		}
	}
}
