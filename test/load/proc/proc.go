// Package proc starts a real key-value server process on the loopback, kills it,
// and reads from /proc what it used.
//
// The binaries are etcd, quire (which takes etcd's flags) and kine. Nothing here knows more about them than
// how they are started.
package proc

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quire-db/quire/test/ports"
)

// Spec says what to start and where.
type Spec struct {
	Kind   string // "etcd", "quire" or "kine": which command line the binary takes
	Binary string // path of the executable
	Dir    string // directory of its own, made if missing; holds the data and the log
	Addr   string // host:port the clients use
	Peer   string // host:port for etcd's peers; unused by kine
	Name   string // of the member; empty: one
	// Cluster is --initial-cluster; empty: etcd is a member alone, and quire has plain SQLite, as it would be a member too
	// if the flag were there.
	Cluster string
	Flags   []string // further arguments, appended last
	Env     []string // further environment, KEY=value
}

// Process is one running server. It belongs to one goroutine, except for Done and the readings of /proc.
type Process struct {
	Spec    Spec
	Started time.Time

	cmd  *exec.Cmd
	log  *os.File
	done chan struct{} // closed when the process has been reaped
}

// FreeAddr returns a loopback address on which nothing listens now. Another process may take it before it is
// used: the caller sees that as a server that does not start.
func FreeAddr() (string, error) {
	port, err := ports.Free()
	return ports.Loopback(port), err
}

// WorkDir makes an empty directory on a real disk: below TMPDIR if that is set, else below bin of the
// repository, which is found from the module in the working directory. Durations of fsync on a tmpfs mean nothing.
func WorkDir(pattern string) (string, error) {
	base := os.Getenv("TMPDIR")
	if base == "" {
		root, err := RepoRoot()
		if err != nil {
			return "", err
		}
		base = filepath.Join(root, "bin")
	}
	if err := os.MkdirAll(base, 0o755); err != nil {
		return "", err
	}
	return os.MkdirTemp(base, pattern)
}

// RepoRoot is the directory with quire's own go.mod, at or above the working directory.
func RepoRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && bytes.HasPrefix(mod, []byte("module github.com/quire-db/quire\n")) {
			return dir, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", errors.New("no go.mod of module github.com/quire-db/quire above the working directory: run this inside the repository")
		}
		dir = up
	}
}

// DataDir is where the server keeps its data.
func (s Spec) DataDir() string { return filepath.Join(s.Dir, "data") }

// LogPath is the file that receives everything the server prints.
func (s Spec) LogPath() string { return filepath.Join(s.Dir, "server.log") }

func (s Spec) args() ([]string, error) {
	switch s.Kind {
	case "etcd", "quire":
		client, peer := "http://"+s.Addr, "http://"+s.Peer
		name := cmp.Or(s.Name, "one")
		args := []string{
			"--name=" + name,
			"--data-dir=" + s.DataDir(),
			"--listen-client-urls=" + client,
			"--advertise-client-urls=" + client,
			"--listen-peer-urls=" + peer,
			"--initial-advertise-peer-urls=" + peer,
			"--log-level=warn",
		}
		if s.Kind == "etcd" || s.Cluster != "" {
			args = append(args, "--initial-cluster="+cmp.Or(s.Cluster, name+"="+peer))
		}
		return append(args, s.Flags...), nil
	case "kine":
		// Without --endpoint kine opens ./db/state.db with its default parameters, below its working directory.
		return append([]string{"--listen-address=" + s.Addr, "--metrics-bind-address=0"}, s.Flags...), nil
	default:
		return nil, fmt.Errorf("unknown kind of server %q: use etcd, quire or kine", s.Kind)
	}
}

// Start runs the server. It returns as soon as the process exists: see Wait for whether it serves.
func Start(s Spec) (*Process, error) {
	args, err := s.args()
	if err != nil {
		return nil, err
	}
	binary, err := filepath.Abs(s.Binary)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(s.DataDir(), 0o700); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(s.LogPath(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(binary, args...)
	cmd.Dir = s.DataDir()
	cmd.Env = append(os.Environ(), s.Env...)
	cmd.Stdout, cmd.Stderr = log, log
	// The server must not outlive a test that is killed itself.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p := &Process{Spec: s, Started: time.Now(), cmd: cmd, log: log, done: make(chan struct{})}
	if err := startOnOwnThread(p); err != nil {
		log.Close()
		return nil, fmt.Errorf("starting %s: %w", binary, err)
	}
	return p, nil
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// PID is the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Kill sends SIGKILL and waits until the process is gone.
func (p *Process) Kill() {
	// The only error is "already finished", which is what is wanted.
	_ = p.cmd.Process.Kill()
	<-p.done
}

// Stop sends SIGTERM and waits; after the timeout it kills and says so.
func (p *Process) Stop(timeout time.Duration) error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		<-p.done
		return fmt.Errorf("%s had already ended: %w", p.Spec.Kind, err)
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(timeout):
		p.Kill()
		return fmt.Errorf("%s did not end within %s after SIGTERM: killed", p.Spec.Kind, timeout)
	}
}

// Pause stops the process from running (SIGSTOP), Resume lets it go on.
func (p *Process) Pause() error { return p.cmd.Process.Signal(syscall.SIGSTOP) }

// Resume undoes Pause.
func (p *Process) Resume() error { return p.cmd.Process.Signal(syscall.SIGCONT) }

// Wait calls ready again and again until it returns nil. It gives up when ctx ends or the process does; the
// error then holds the end of the server's log.
func (p *Process) Wait(ctx context.Context, ready func(context.Context) error) error {
	var last error
	for {
		if last = ready(ctx); last == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended while starting: %s\n%s", p.Spec.Kind, p.cmd.ProcessState, p.LogTail(2000))
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w (last answer: %w)\n%s", p.Spec.Kind, ctx.Err(), last, p.LogTail(2000))
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// LogTail returns up to n bytes from the end of what the server printed.
func (p *Process) LogTail(n int64) string {
	f, err := os.Open(p.Spec.LogPath())
	if err != nil {
		return "(no log: " + err.Error() + ")"
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return "(no log: " + err.Error() + ")"
	}
	b := make([]byte, min(n, size))
	if _, err := f.ReadAt(b, size-int64(len(b))); err != nil {
		return "(no log: " + err.Error() + ")"
	}
	return strings.TrimSpace(string(b))
}

// CPU is the processor time the process has used so far, in user and kernel mode, threads that have ended included.
// It is read from the process's own clock (clock_getcpuclockid(3)), which counts in nanoseconds where
// /proc/pid/stat counts in ticks of 10 ms.
func (p *Process) CPU() (time.Duration, error) { return processorTime(p.PID()) }

func processorTime(pid int) (time.Duration, error) {
	const sched = 2 // CPUCLOCK_SCHED in the kernel's include/linux/posix-timers.h
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|sched), &t); err != nil {
		return 0, fmt.Errorf("processor time of process %d: %w", pid, err)
	}
	return time.Duration(t.Nano()), nil
}

// RSS is the resident memory in bytes.
func (p *Process) RSS() (int64, error) {
	kib, err := procField(p.PID(), "status", "VmRSS:")
	return kib * 1024, err
}

// WrittenBytes is what the process caused to be written to storage so far (write_bytes of /proc/pid/io).
func (p *Process) WrittenBytes() (int64, error) {
	return procField(p.PID(), "io", "write_bytes:")
}

func procField(pid int, file, name string) (int64, error) {
	path := fmt.Sprintf("/proc/%d/%s", pid, file)
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == name {
			return strconv.ParseInt(f[1], 10, 64)
		}
	}
	return 0, fmt.Errorf("%s has no %s", path, name)
}
