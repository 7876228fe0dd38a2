package k8s

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// process is a server of the test, with all that it printed in one file.
type process struct {
	name    string
	logPath string
	cmd     *exec.Cmd
	done    chan struct{} // closed once the process is gone
}

// startProcess runs a binary; what it prints is appended to logPath. The
// kernel kills the process when the test dies, however that happens.
func startProcess(t *testing.T, name, logPath, binary string, environment, arguments []string) *process {
	t.Helper()
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	p := &process{name: name, logPath: logPath, cmd: exec.Command(binary, arguments...), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), environment...)
	p.cmd.Dir = filepath.Dir(logPath)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}

	started := make(chan error)
	go func() {
		// Pdeathsig fires when the thread that forked ends, so this thread
		// has to live for as long as the process.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		log.Close()
		started <- err
		if err == nil {
			p.cmd.Wait() // its error is kept in ProcessState
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		t.Fatalf("starting %s: %v (build it with make)", name, err)
	}
	return p
}

// signal sends a signal and waits until the process is gone.
func (p *process) signal(t *testing.T, signal syscall.Signal, within time.Duration) {
	t.Helper()
	select {
	case <-p.done:
		t.Fatalf("%s had ended before it was sent %v: %v\n%s", p.name, signal, p.cmd.ProcessState, p.tail(40))
	default:
	}
	if err := p.cmd.Process.Signal(signal); err != nil {
		t.Fatalf("sending %v to %s: %v", signal, p.name, err)
	}
	select {
	case <-p.done:
	case <-time.After(within):
		t.Errorf("%s did not end within %v after %v", p.name, within, signal)
		p.kill()
	}
}

// kill ends the process whatever its state.
func (p *process) kill() {
	if err := p.cmd.Process.Kill(); err != nil {
		<-p.done // "already finished" is the one error there is
		return
	}
	<-p.done
}

func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// tail returns the last lines of what the process printed.
func (p *process) tail(lines int) string {
	text, err := os.ReadFile(p.logPath)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(text)), "\n")
	if len(all) > lines {
		all = all[len(all)-lines:]
	}
	return fmt.Sprintf("last lines of %s:\n%s", p.name, strings.Join(all, "\n"))
}

// binary returns the path in an environment variable, else the default, which
// is relative to the repository.
func binary(t *testing.T, variable, fallback string) string {
	t.Helper()
	path := os.Getenv(variable)
	if path == "" {
		path = filepath.Join("..", "..", fallback)
	}
	path, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: run `make test-k8s`, which builds it, or set %s", err, variable)
	}
	return path
}
