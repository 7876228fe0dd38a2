package surface

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/quire-db/quire/test/etcd/start"
	"github.com/quire-db/quire/test/ports"
)

// program is what the tests start.
type program struct{ name, path string }

func etcd(t *testing.T) program {
	t.Helper()
	path := os.Getenv("ETCD_BIN")
	if path == "" {
		path = filepath.Join("..", "..", "..", "bin", "peers", "etcd")
	}
	path, err := filepath.Abs(path)
	if err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		t.Fatalf("no etcd: %v; build it with `make bin/peers/etcd` or set ETCD_BIN", err)
	}
	return program{"etcd", path}
}

func quire(t *testing.T) program {
	t.Helper()
	return program{"quire", start.Binary(t)}
}

// onBoth runs a test on a real etcd and on quire.
func onBoth(t *testing.T, run func(t *testing.T, p program)) {
	for _, p := range []program{etcd(t), quire(t)} {
		t.Run(p.name, func(t *testing.T) { run(t, p) })
	}
}

// server is one running member.
type server struct {
	*start.Process
	address string // of clients, without TLS
	dir     string // its data directory, not the tests' own
}

func (s *server) url(path string) string { return "http://" + s.address + path }

func (s *server) client(t *testing.T) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{s.address}, DialTimeout: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// start runs n members of one cluster, all with the same additional flags, and waits until they are ready.
func (p program) start(t *testing.T, n int, flags ...string) []*server {
	t.Helper()
	const attempts = 5
	for attempt := 1; ; attempt++ {
		all, err := p.try(t, n, flags)
		if err == nil {
			return all
		}
		taken := false
		for _, s := range all {
			s.Kill()
			taken = taken || strings.Contains(s.Output(), "address already in use")
		}
		if !taken || attempt == attempts {
			t.Fatal(err)
		}
	}
}

func (p program) try(t *testing.T, n int, flags []string) (all []*server, err error) {
	t.Helper()
	peers, cluster := make([]string, n), make([]string, n)
	for i := range n {
		peers[i] = "http://" + ports.FreeAddress(t)
		cluster[i] = fmt.Sprintf("n%d=%s", i, peers[i])
	}
	for i := range n {
		s := &server{address: ports.FreeAddress(t), dir: filepath.Join(t.TempDir(), "data")}
		args := []string{
			fmt.Sprintf("--name=n%d", i), "--data-dir=" + s.dir,
			"--listen-client-urls=http://" + s.address, "--advertise-client-urls=http://" + s.address,
			"--listen-peer-urls=" + peers[i], "--initial-advertise-peer-urls=" + peers[i], "--initial-cluster=" + strings.Join(cluster, ","),
		}
		s.Process = start.RunProgram(t, p.path, nil, append(args, flags...)...)
		all = append(all, s)
	}
	for _, s := range all {
		if err := s.WaitReady(60 * time.Second); err != nil {
			return all, fmt.Errorf("%w\n%s", err, s.Output())
		}
	}
	return all, nil
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// eventually fails the test unless ok comes true in time. What is asked for has no signal.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for began := time.Now(); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Since(began) > 30*time.Second {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

// pbLeases asks for leases with ids of the caller's choice.
func pbLeases(c *clientv3.Client) pb.LeaseClient { return pb.NewLeaseClient(c.ActiveConnection()) }

func grant(id, ttl int64) *pb.LeaseGrantRequest { return &pb.LeaseGrantRequest{ID: id, TTL: ttl} }
