//go:build linux

package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/quire-db/quire/test/etcd/partitions/network"
)

// Member is one member. Its stubs call it from the clients' host; they do not try again, so that a test sees every answer.
type Member struct {
	Name string
	Host *network.Host
	Log  string // the file with everything that its processes have printed

	KV          pb.KVClient
	Watch       pb.WatchClient
	Lease       pb.LeaseClient
	Maintenance pb.MaintenanceClient
	Membership  pb.ClusterClient

	cluster        *Cluster
	conn           *grpc.ClientConn
	web            *http.Client
	state, initial string // --initial-cluster-state and --initial-cluster

	mu struct {
		sync.Mutex
		id      uint64
		process *process // nil before the first start
		starts  int
		ended   []error // of processes that nobody had ended
	}
}

// process is one run of a member.
type process struct {
	command *exec.Cmd
	told    bool // to end; under the member's lock
	exited  chan struct{}
}

const clientPort, peerPort = "2379", "2380"

func newMember(c *Cluster, name string, host *network.Host) (*Member, error) {
	m := &Member{Name: name, Host: host, Log: c.path(name + ".log"), cluster: c}
	conn, err := m.Dial()
	if err != nil {
		return nil, err
	}
	m.conn = conn
	m.KV, m.Watch, m.Lease = pb.NewKVClient(conn), pb.NewWatchClient(conn), pb.NewLeaseClient(conn)
	m.Maintenance, m.Membership = pb.NewMaintenanceClient(conn), pb.NewClusterClient(conn)
	m.web = &http.Client{Transport: &http.Transport{DialContext: c.Clients.DialContext, DisableKeepAlives: true}}
	return m, nil
}

// Dial makes a further connection from the clients' host.
func (m *Member) Dial() (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+m.Address(),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return m.cluster.Clients.DialContext(ctx, "tcp4", address)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<31-1), grpc.MaxCallSendMsgSize(1<<31-1)),
		grpc.WithDisableRetry(),
		// A member that comes back is not to wait for its clients.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, MaxDelay: 300 * time.Millisecond},
			MinConnectTimeout: time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 3 * time.Second}),
	)
}

// Address is host:port for clients.
func (m *Member) Address() string { return m.Host.IP.String() + ":" + clientPort }

// PeerURL is where the other members find it.
func (m *Member) PeerURL() string {
	scheme := "http"
	if m.cluster.options.PeerTLS {
		scheme = "https"
	}
	return scheme + "://" + m.Host.IP.String() + ":" + peerPort
}

func (m *Member) dataDir() string { return m.cluster.path(m.Name) }

// Start starts the member's process, for the first time or again, and does not wait until it serves.
func (m *Member) Start() error {
	client := "http://" + m.Address()
	args := []string{
		"--name=" + m.Name,
		"--data-dir=" + m.dataDir(),
		"--listen-client-urls=" + client,
		"--advertise-client-urls=" + client,
		"--listen-peer-urls=" + m.PeerURL(),
		"--initial-advertise-peer-urls=" + m.PeerURL(),
		"--initial-cluster=" + m.initial,
		"--initial-cluster-state=" + m.state,
		"--initial-cluster-token=partitions",
	}
	if m.cluster.options.PeerTLS {
		args = append(args, "--peer-auto-tls")
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.running() {
		return errors.New("it runs already")
	}
	log, err := os.OpenFile(m.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close() // the process has its own
	p := &process{command: exec.Command(m.cluster.options.Binary, append(args, m.cluster.options.Flags...)...), exited: make(chan struct{})}
	p.command.Dir = m.cluster.options.Dir
	p.command.Stdout, p.command.Stderr = log, log
	p.command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.Host.Start(p.command); err != nil {
		return fmt.Errorf("start %s: %w", m.cluster.options.Binary, err)
	}
	m.mu.process = p
	m.mu.starts++
	go m.wait(p)
	return nil
}

func (m *Member) wait(p *process) {
	p.command.Wait() // the state says more than the error
	m.mu.Lock()
	if !p.told {
		m.mu.ended = append(m.mu.ended, fmt.Errorf("member %s ended by itself: %v\n%s", m.Name, p.command.ProcessState, m.lastWords()))
	}
	m.mu.Unlock()
	close(p.exited)
}

// lastWords are the last lines of the log.
func (m *Member) lastWords() string {
	const tail = 3 << 10
	log, err := os.ReadFile(m.Log)
	if err != nil {
		return err.Error()
	}
	return string(log[max(0, len(log)-tail):])
}

// running is Running under the lock.
func (m *Member) running() bool {
	if m.mu.process == nil {
		return false
	}
	select {
	case <-m.mu.process.exited:
		return false
	default:
		return true
	}
}

// Running says whether the member has a process, be it a stopped one.
func (m *Member) Running() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.running()
}

// Starts is how often the member was started.
func (m *Member) Starts() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.starts
}

// ID is the member's id in the cluster, 0 before it was Ready for the first time.
func (m *Member) ID() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.id
}

// tell notes that the process is to end, and sends a signal. It returns nil when there is no process.
func (m *Member) tell(s os.Signal) (*process, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.running() {
		return nil, nil
	}
	m.mu.process.told = true
	if err := m.mu.process.command.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return nil, err
	}
	return m.mu.process, nil
}

// Kill ends the process at once (SIGKILL), and returns when it is gone. The kernel closes its connections; what it has
// written stays.
func (m *Member) Kill() error {
	p, err := m.tell(syscall.SIGKILL)
	if p != nil {
		<-p.exited
	}
	return err
}

// Crash is what a machine does that loses its power: nobody is told. The lines stay cut until Heal.
func (m *Member) Crash() error {
	m.cluster.unplug(m)
	return m.Kill()
}

// Terminate ends the process with SIGTERM.
func (m *Member) Terminate(limit time.Duration) error {
	p, err := m.tell(syscall.SIGTERM)
	if p == nil {
		return err
	}
	select {
	case <-p.exited:
	case <-time.After(limit):
		return fmt.Errorf("it still runs %v after SIGTERM", limit)
	}
	// etcd ends itself with the signal, quire with status 0.
	status, ok := p.command.ProcessState.Sys().(syscall.WaitStatus)
	if !ok || status.Signaled() && status.Signal() == syscall.SIGTERM || status.Exited() && status.ExitStatus() == 0 {
		return nil
	}
	return fmt.Errorf("it ended on SIGTERM with %v\n%s", p.command.ProcessState, m.lastWords())
}

// Exit returns when the process has ended, which it was expected to do by itself.
func (m *Member) Exit(limit time.Duration) error {
	m.mu.Lock()
	p := m.mu.process
	m.mu.Unlock()
	select {
	case <-p.exited:
		m.mu.Lock()
		defer m.mu.Unlock()
		m.mu.ended = nil
		return nil
	case <-time.After(limit):
		return fmt.Errorf("it still runs after %v", limit)
	}
}

// Pause stops the process (SIGSTOP); its connections stay open and nothing answers.
func (m *Member) Pause() error { return m.signal(syscall.SIGSTOP) }

// Resume lets the process go on after Pause.
func (m *Member) Resume() error { return m.signal(syscall.SIGCONT) }

func (m *Member) signal(s os.Signal) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.running() {
		return nil
	}
	return m.mu.process.command.Process.Signal(s)
}

// Rejoins has the member's next starts say that the cluster exists already, which is how one says that a member whose data are
// lost has been in it before.
func (m *Member) Rejoins() { m.state = "existing" }

// Wipe removes the data of a member that does not run.
func (m *Member) Wipe() error {
	if m.Running() {
		return errors.New("the data of a running member cannot be removed")
	}
	return os.RemoveAll(m.dataDir())
}

// Copy keeps the data of a member that does not run, under a name.
func (m *Member) Copy(name string) error {
	if m.Running() {
		return errors.New("the data of a running member cannot be copied")
	}
	return os.CopyFS(m.cluster.path(name), os.DirFS(m.dataDir()))
}

// Restore puts a copy of the data back in the place of the newer ones.
func (m *Member) Restore(name string) error {
	if err := m.Wipe(); err != nil {
		return err
	}
	return os.CopyFS(m.dataDir(), os.DirFS(m.cluster.path(name)))
}

// ready returns when a linearizable read is answered.
func (m *Member) ready(ctx context.Context) error {
	var last error
	for {
		if !m.Running() {
			return fmt.Errorf("it does not run\n%s", m.lastWords())
		}
		try, cancel := context.WithTimeout(ctx, 3*time.Second)
		r, err := m.KV.Range(try, &pb.RangeRequest{Key: []byte("x")})
		cancel()
		if err == nil {
			m.mu.Lock()
			m.mu.id = r.Header.MemberId
			m.mu.Unlock()
			return nil
		}
		if ctx.Err() == nil {
			last = err
		}
		if !sleep(ctx, 20*time.Millisecond) {
			return fmt.Errorf("no answer (%w), last: %w", context.Cause(ctx), last)
		}
	}
}

// Status asks the member how it is.
func (m *Member) Status(ctx context.Context, limit time.Duration) (*pb.StatusResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return m.Maintenance.Status(ctx, &pb.StatusRequest{})
}

// Metric is the sum of a metric over its labels, as the member's /metrics says; 0 when it is not there.
func (m *Member) Metric(ctx context.Context, name string) (sum float64, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+m.Address()+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	answer, err := m.web.Do(request)
	if err != nil {
		return 0, err
	}
	defer answer.Body.Close()
	page, err := io.ReadAll(answer.Body)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(page)) {
		rest, found := strings.CutPrefix(line, name)
		if !found || !strings.HasPrefix(rest, "{") && !strings.HasPrefix(rest, " ") {
			continue
		}
		var value float64
		if _, err := fmt.Sscan(rest[strings.LastIndexByte(rest, ' ')+1:], &value); err != nil {
			return 0, fmt.Errorf("metric %q: %w", line, err)
		}
		sum += value
	}
	return sum, nil
}

// complaints: see Cluster.Complaints.
func (m *Member) complaints() []error {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := append([]error(nil), m.mu.ended...)
	log, err := os.ReadFile(m.Log)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		all = append(all, err)
	}
	for _, words := range []string{"panic: ", "DATA RACE", "fatal error: ", `"level":"panic"`, `"level":"dpanic"`} {
		if i := bytes.Index(log, []byte(words)); i >= 0 {
			const around = 3 << 10
			all = append(all, fmt.Errorf("member %s said:\n%s", m.Name, log[max(0, i-around/8):min(len(log), i+around)]))
		}
	}
	return all
}

func (m *Member) close() error { return m.conn.Close() }
