package start

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/quire-db/quire/test/ports"
)

// readyLine is part of the log line that etcd and quire print when clients may come.
const readyLine = "ready to serve client requests"

// Process is one run of the quire binary, or of another program.
type Process struct {
	Args []string
	Log  string // file with everything it printed, stdout and stderr

	cmd    *exec.Cmd
	exited chan struct{}
	state  *os.ProcessState // valid once exited is closed
	ready  chan struct{}
}

// Binary is the quire binary under test: $QUIRE_BIN, else bin/quire of this repository.
func Binary(t testing.TB) string {
	t.Helper()
	path := os.Getenv("QUIRE_BIN")
	if path == "" {
		_, file, _, ok := runtime.Caller(0)
		if !ok {
			t.Fatal("cannot find the repository; set QUIRE_BIN")
		}
		path = filepath.Join(filepath.Dir(file), "..", "..", "..", "bin", "quire")
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("no quire binary: %v; build it with `make build` or set QUIRE_BIN", err)
	}
	return path
}

// Quire starts the binary on a free port with a new data directory, or a new database where $QUIRE_STORAGE is
// "postgres", and waits until it is ready. When the test ends it must stop on SIGTERM with status 0.
func Quire(t testing.TB, o Options) *Server {
	t.Helper()
	return QuireIn(t, filepath.Join(tempDir(t), "data"), o)
}

// QuireIn is Quire with a data directory of the caller, which may hold data already. On Postgres the directory
// stands for a database, see StorageFlags.
func QuireIn(t testing.TB, dataDir string, o Options, extra ...string) *Server {
	t.Helper()
	storage := StorageFlags(t, dataDir)
	const attempts = 5
	for attempt := 1; ; attempt++ {
		address := ports.FreeAddress(t)
		args := append([]string{
			"--data-dir=" + dataDir,
			"--listen-client-urls=http://" + address,
			"--advertise-client-urls=http://" + address,
		}, quireFlags(o)...)
		args = append(args, storage...)
		p := Run(t, nil, append(args, extra...)...)
		if err := p.WaitReady(60 * time.Second); err != nil {
			if attempt < attempts && strings.Contains(p.Output(), "address already in use") {
				continue
			}
			t.Fatalf("start quire: %v\n%s", err, p.Output())
		}
		s := &Server{Name: "quire", Address: address, Process: p}
		t.Cleanup(func() { p.stopCleanly(t) })
		s.dial(t, nil)
		return s
	}
}

func quireFlags(o Options) []string {
	var args []string
	if o.MaxTxnOps != 0 {
		args = append(args, "--max-txn-ops="+strconv.FormatUint(uint64(o.MaxTxnOps), 10))
	}
	if o.MaxRequestBytes != 0 {
		args = append(args, "--max-request-bytes="+strconv.FormatUint(uint64(o.MaxRequestBytes), 10))
	}
	if o.QuotaBytes != 0 {
		args = append(args, "--quota-backend-bytes="+strconv.FormatInt(o.QuotaBytes, 10))
	}
	if o.WatchProgressNotify != 0 {
		args = append(args, "--watch-progress-notify-interval="+o.WatchProgressNotify.String())
	}
	if o.AutoCompactionMode != "" {
		args = append(args, "--auto-compaction-mode="+o.AutoCompactionMode, "--auto-compaction-retention="+o.AutoCompactionRetention)
	}
	if o.AuthToken != "" {
		args = append(args, "--auth-token="+o.AuthToken)
	}
	if o.AuthTokenTTL != 0 {
		args = append(args, "--auth-token-ttl="+strconv.FormatUint(uint64(o.AuthTokenTTL), 10))
	}
	if o.BcryptCost != 0 {
		args = append(args, "--bcrypt-cost="+strconv.FormatUint(uint64(o.BcryptCost), 10))
	}
	return args
}

// Run starts the binary with exactly these arguments and adds env to its environment. It is killed when
// the test ends, if it still runs. Its output is shown when the test has failed.
func Run(t testing.TB, env []string, args ...string) *Process {
	t.Helper()
	return RunProgram(t, Binary(t), env, args...)
}

// RunProgram is Run with another program, which has to print the ready line too.
func RunProgram(t testing.TB, program string, env []string, args ...string) *Process {
	t.Helper()
	p := &Process{
		Args:   args,
		Log:    filepath.Join(tempDir(t), filepath.Base(program)+".log"),
		exited: make(chan struct{}),
		ready:  make(chan struct{}),
	}
	out, err := os.Create(p.Log)
	if err != nil {
		t.Fatal(err)
	}
	p.cmd = exec.Command(program, args...)
	p.cmd.SysProcAttr = noOrphan
	p.cmd.Env = append(os.Environ(), env...)
	w := &watchedWriter{file: out, ready: p.ready}
	p.cmd.Stdout, p.cmd.Stderr = w, w
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", p.cmd.Path, err)
	}
	go func() {
		p.cmd.Wait() // the state says more than the error, and is kept below
		p.state = p.cmd.ProcessState
		out.Close()
		close(p.exited)
	}()
	t.Cleanup(func() {
		p.Kill()
		showLog(t, filepath.Base(program), p.Log)
	})
	return p
}

// watchedWriter keeps what the process prints and notices the ready line.
type watchedWriter struct {
	mu    sync.Mutex
	file  *os.File
	line  []byte // the unfinished last line
	ready chan struct{}
	seen  bool
}

func (w *watchedWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.seen {
		w.line = append(w.line, b...)
		if bytes.Contains(w.line, []byte(readyLine)) {
			w.seen = true
			close(w.ready)
			w.line = nil
		} else if i := bytes.LastIndexByte(w.line, '\n'); i >= 0 {
			w.line = append(w.line[:0], w.line[i+1:]...)
		}
	}
	return w.file.Write(b)
}

// WaitReady returns when the process has printed the ready line, which is what etcd's own tests and
// kubeadm wait for.
func (p *Process) WaitReady(limit time.Duration) error {
	select {
	case <-p.ready:
		return nil
	case <-p.exited:
		return fmt.Errorf("%s ended with %v before it was ready", filepath.Base(p.cmd.Path), p.state)
	case <-time.After(limit):
		return fmt.Errorf("%s did not print %q within %v", filepath.Base(p.cmd.Path), readyLine, limit)
	}
}

// Output is everything printed so far.
func (p *Process) Output() string {
	data, err := os.ReadFile(p.Log)
	if err != nil {
		return err.Error()
	}
	return string(data)
}

// Lines are the lines of Output that contain part.
func (p *Process) Lines(part string) []string {
	var found []string
	s := bufio.NewScanner(strings.NewReader(p.Output()))
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		if strings.Contains(s.Text(), part) {
			found = append(found, s.Text())
		}
	}
	return found
}

// Signal sends sig to the process; an ended process is no error.
func (p *Process) Signal(sig os.Signal) error {
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// PID is the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Wait returns the exit status; killed by a signal it is -1.
func (p *Process) Wait(limit time.Duration) (int, error) {
	select {
	case <-p.exited:
		return p.state.ExitCode(), nil
	case <-time.After(limit):
		return 0, fmt.Errorf("%s still ran after %v", filepath.Base(p.cmd.Path), limit)
	}
}

// Kill ends the process without warning and waits for its end.
func (p *Process) Kill() {
	p.cmd.Process.Kill() // fails only when it has ended
	<-p.exited
}

// Stop sends SIGTERM and returns the exit status.
func (p *Process) Stop(limit time.Duration) (int, error) {
	if err := p.Signal(syscall.SIGTERM); err != nil {
		return 0, err
	}
	return p.Wait(limit)
}

// stopCleanly ends a process that still runs as an operator would, and fails the test if it does not obey.
// A process that the test itself ended is left alone.
func (p *Process) stopCleanly(t testing.TB) {
	select {
	case <-p.exited:
		t.Logf("quire (pid %d) had ended before the test: %v", p.PID(), p.state)
		return
	default:
	}
	code, err := p.Stop(20 * time.Second)
	if err != nil {
		t.Errorf("quire does not stop on SIGTERM: %v", err)
		return
	}
	if code != 0 {
		t.Errorf("quire ended with status %d on SIGTERM, want 0", code)
	}
}
