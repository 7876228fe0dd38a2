package postgres

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// process is a server program that runs in the background.
type process struct {
	cmd  *exec.Cmd
	log  string        // the file that gets all it prints
	done chan struct{} // closed when it has been reaped
}

// startProcess starts a command whose output is appended to the log.
func startProcess(cmd *exec.Cmd, log string) (*process, error) {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	cmd.Stdout, cmd.Stderr = f, f
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", cmd.Path, err)
	}
	p := &process{cmd: cmd, log: log, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		// How it ended is kept in ProcessState.
		_ = cmd.Wait()
	}()
	return p, nil
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// await calls ready until it says yes, fails, the process ends or ctx does.
func (p *process) await(ctx context.Context, ready func() (bool, error)) error {
	for {
		ok, err := ready()
		if ok || err != nil {
			return err
		}
		select {
		case <-p.done:
			return fmt.Errorf("%w: %s\n%s", errEnded, p.cmd.ProcessState, logTail(p.log, 4000))
		case <-ctx.Done():
			return fmt.Errorf("%w\n%s", ctx.Err(), logTail(p.log, 4000))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

var errEnded = errors.New("the server ended while starting")

var errStillRunning = errors.New("the server has not ended")

// stop sends a signal and waits for the end of the process, which is errStillRunning if it takes longer than the limit.
func (p *process) stop(signal syscall.Signal, limit time.Duration) error {
	if err := p.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(limit):
		return fmt.Errorf("%w %s after %s\n%s", errStillRunning, limit, signal, logTail(p.log, 4000))
	}
}

// kill ends the process by force.
func (p *process) kill() error {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-p.done
	return nil
}

// logTail returns up to n bytes from the end of a log, or why it cannot be read.
func logTail(file string, n int64) string {
	f, err := os.Open(file)
	if err != nil {
		return "(no log: " + err.Error() + ")"
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return "(no log: " + err.Error() + ")"
	}
	tail := make([]byte, min(n, size))
	if _, err := f.ReadAt(tail, size-int64(len(tail))); err != nil {
		return "(no log: " + err.Error() + ")"
	}
	return strings.TrimSpace(string(tail))
}
