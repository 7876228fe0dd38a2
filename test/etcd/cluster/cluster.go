// Package cluster starts clusters of processes on loopback, quire's or etcd's, so that a test can do the same to both and
// compare what they answer. It needs Linux, where all of 127.0.0.0/8 is loopback: every member has an address of its own, and
// keeps it over restarts.
package cluster

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	"github.com/quire-db/quire/test/etcd/start"
)

// Program is what the members run.
type Program string

// The programs: $QUIRE_BIN, else bin/quire, and the etcd that `make peers` has built.
const (
	Quire Program = "quire"
	Etcd  Program = "etcd"
)

func (p Program) path(t testing.TB) string {
	t.Helper()
	if p == Quire {
		return start.Binary(t)
	}
	return Peer(t, string(p))
}

// Peer is a program in bin/peers.
func Peer(t testing.TB, name string) string {
	t.Helper()
	_, file, _, ok := runtime.Caller(0)
	if !ok {
		t.Fatal("cannot find the repository")
	}
	path := filepath.Join(filepath.Dir(file), "..", "..", "..", "bin", "peers", name)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("no %s: %v; build it with `make bin/peers/%s`", name, err, name)
	}
	return path
}

// Cluster is a number of members and what they have in common.
type Cluster struct {
	Program Program
	// Flags of every member, besides those that make it one.
	Flags   []string
	Members []*Member

	t     testing.TB
	token string
}

// Member is one member of a cluster; it runs only between Start and its end.
type Member struct {
	Name, ClientURL, PeerURL string
	// DataDir goes away with the test.
	DataDir string
	// Process is the last one that was started.
	Process *start.Process

	c    *Cluster
	conn *grpc.ClientConn
	stubs
}

// stubs do not try again, and do not translate errors: a test sees what is on the wire.
type stubs struct {
	KV          pb.KVClient
	Watch       pb.WatchClient
	Lease       pb.LeaseClient
	Cluster     pb.ClusterClient
	Maintenance pb.MaintenanceClient
}

// readyTimeout is for a member under the race detector on a busy machine.
const readyTimeout = 60 * time.Second

// New starts a cluster of n members, called m0, m1 and so on, and waits until all are ready and agree on a leader.
func New(t testing.TB, p Program, n int, flags ...string) *Cluster {
	t.Helper()
	c := &Cluster{Program: p, Flags: flags, t: t, token: fmt.Sprintf("%x", rand.Uint64())}
	for range n {
		c.Add()
	}
	initial := c.Initial()
	for _, m := range c.Members {
		m.Start("--initial-cluster=" + initial)
	}
	for _, m := range c.Members {
		m.WaitReady()
	}
	c.Leader()
	return c
}

// Add makes up one more member, and does not start it.
func (c *Cluster) Add() *Member {
	c.t.Helper()
	scheme := "http"
	if slices.Contains(c.Flags, "--peer-auto-tls") {
		scheme = "https"
	}
	host := fmt.Sprintf("127.%d.%d.%d", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254))
	m := &Member{
		Name:      fmt.Sprintf("m%d", len(c.Members)),
		ClientURL: "http://" + host + ":2379",
		PeerURL:   scheme + "://" + host + ":2380",
		c:         c,
	}
	m.DataDir = filepath.Join(c.t.TempDir(), m.Name)
	conn, err := start.Dial(host+":2379", nil)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { conn.Close() })
	m.conn = conn
	m.stubs = stubs{pb.NewKVClient(conn), pb.NewWatchClient(conn), pb.NewLeaseClient(conn), pb.NewClusterClient(conn), pb.NewMaintenanceClient(conn)}
	c.Members = append(c.Members, m)
	return m
}

// Initial is --initial-cluster with all members that there are, or with those named.
func (c *Cluster) Initial(members ...*Member) string {
	if len(members) == 0 {
		members = c.Members
	}
	var parts []string
	for _, m := range members {
		parts = append(parts, m.Name+"="+m.PeerURL)
	}
	return strings.Join(parts, ",")
}

// Start starts the member's process, for the first time or again. flags come last, and so win.
func (m *Member) Start(flags ...string) {
	m.c.t.Helper()
	args := append([]string{
		"--name=" + m.Name,
		"--data-dir=" + m.DataDir,
		"--listen-client-urls=" + m.ClientURL,
		"--advertise-client-urls=" + m.ClientURL,
		"--listen-peer-urls=" + m.PeerURL,
		"--initial-advertise-peer-urls=" + m.PeerURL,
		"--initial-cluster-token=" + m.c.token,
	}, m.c.Flags...)
	m.Process = start.RunProgram(m.c.t, m.c.Program.path(m.c.t), nil, append(args, flags...)...)
}

// WaitReady waits until clients may come.
func (m *Member) WaitReady() {
	m.c.t.Helper()
	if err := m.Process.WaitReady(readyTimeout); err != nil {
		m.c.t.Fatalf("%s: %v\n%s", m.Name, err, m.Process.Output())
	}
	m.conn.ResetConnectBackoff()
}

// Restart starts the member again as it was, without the flags of its first start, and waits until it is ready.
func (m *Member) Restart() {
	m.c.t.Helper()
	m.Start()
	m.WaitReady()
}

// Stop ends the member as an operator would, and returns how long that took.
func (m *Member) Stop() time.Duration {
	m.c.t.Helper()
	begin := time.Now()
	code, err := m.Process.Stop(20 * time.Second)
	if err != nil {
		m.c.t.Fatalf("%s does not stop on SIGTERM: %v", m.Name, err)
	}
	if code != 0 && m.c.Program == Quire { // etcd ends itself with the signal
		m.c.t.Errorf("%s ended with status %d on SIGTERM, want 0\n%s", m.Name, code, m.Process.Output())
	}
	return time.Since(begin)
}

// Kill is SIGKILL.
func (m *Member) Kill() { m.Process.Kill() }

// Pause stops the process; Resume lets it go on.
func (m *Member) Pause() { m.signal(syscall.SIGSTOP) }

// Resume is for what Pause has stopped.
func (m *Member) Resume() { m.signal(syscall.SIGCONT) }

func (m *Member) signal(s syscall.Signal) {
	m.c.t.Helper()
	if err := m.Process.Signal(s); err != nil {
		m.c.t.Fatal(err)
	}
}

// ID is the member's id, as it says itself.
func (m *Member) ID() uint64 {
	m.c.t.Helper()
	return m.status().Header.MemberId
}

// status waits for the answer of a member that is only about to serve.
func (m *Member) status() *pb.StatusResponse {
	m.c.t.Helper()
	var resp *pb.StatusResponse
	m.c.Eventually(fmt.Sprintf("the status of %s", m.Name), func(ctx context.Context) (err error) {
		resp, err = m.Maintenance.Status(ctx, &pb.StatusRequest{})
		return err
	})
	return resp
}

// Eventually calls do until it returns nil, with a context for one attempt. Other members may have to notice first what
// one of them knows.
func (c *Cluster) Eventually(what string, do func(ctx context.Context) error) {
	c.t.Helper()
	deadline := time.Now().Add(readyTimeout)
	for {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		err := do(ctx)
		cancel()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("%s: not within %v: %v", what, readyTimeout, err)
		}
		time.Sleep(20 * time.Millisecond) // between two looks at other processes
	}
}

// running are the members that have a process, or those named.
func (c *Cluster) running(members []*Member) []*Member {
	if len(members) > 0 {
		return members
	}
	for _, m := range c.Members {
		if m.Process == nil {
			continue
		}
		if _, err := m.Process.Wait(time.Millisecond); err != nil {
			members = append(members, m)
		}
	}
	return members
}

// Leader is the member that all running ones, or those named, take for the leader.
func (c *Cluster) Leader(members ...*Member) (leader *Member) {
	c.t.Helper()
	c.Eventually("one leader", func(ctx context.Context) error {
		leader = nil
		ids := map[uint64]*Member{}
		said := map[uint64][]string{}
		for _, m := range c.running(members) {
			st, err := m.Maintenance.Status(ctx, &pb.StatusRequest{})
			if err != nil {
				return fmt.Errorf("%s: %w", m.Name, err)
			}
			ids[st.Header.MemberId] = m
			said[st.Leader] = append(said[st.Leader], m.Name)
		}
		for id := range said {
			leader = ids[id]
		}
		if len(said) != 1 || leader == nil {
			return fmt.Errorf("leaders by who says so: %v", said)
		}
		return nil
	})
	return leader
}

// Followers are the running members that do not lead.
func (c *Cluster) Followers() []*Member {
	c.t.Helper()
	leader := c.Leader()
	return slices.DeleteFunc(slices.Clone(c.running(nil)), func(m *Member) bool { return m == leader })
}

// Get is a page of the member's HTTP.
func (m *Member) Get(path string) (code int, body string) {
	m.c.t.Helper()
	req, err := http.NewRequest(http.MethodGet, m.ClientURL+path, nil)
	if err != nil {
		m.c.t.Fatal(err)
	}
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		m.c.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		m.c.t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

// Etcdctl runs the real etcdctl on the members named, and returns what it prints.
func (c *Cluster) Etcdctl(members []*Member, args ...string) (output string, err error) {
	c.t.Helper()
	var endpoints []string
	for _, m := range members {
		endpoints = append(endpoints, m.ClientURL)
	}
	cmd := exec.Command(Peer(c.t, "etcdctl"), append([]string{"--endpoints=" + strings.Join(endpoints, ",")}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("etcdctl %s: %w: %s", strings.Join(args, " "), err, &stderr)
	}
	return string(out), nil
}

// MustEtcdctl is Etcdctl that has to succeed.
func (c *Cluster) MustEtcdctl(members []*Member, args ...string) string {
	c.t.Helper()
	out, err := c.Etcdctl(members, args...)
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}
