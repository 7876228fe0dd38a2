package postgres

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// Signal sends a signal to every process of the server: the main process first, so that it starts no further ones,
// then its children. A frozen server's kernel still accepts connections and bytes, nobody answers.
func (s *Server) Signal(signal syscall.Signal) error {
	if !s.Running() {
		return errors.New("the PostgreSQL server does not run")
	}
	main := s.process.cmd.Process.Pid
	if err := syscall.Kill(main, signal); err != nil {
		return fmt.Errorf("sending %s to PostgreSQL: %w", signal, err)
	}
	all, err := family(main)
	if err != nil {
		return err
	}
	for _, member := range all {
		if member.pid == main {
			continue
		}
		// A backend may have ended by itself meanwhile.
		if err := syscall.Kill(member.pid, signal); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("sending %s to a process of PostgreSQL: %w", signal, err)
		}
	}
	return nil
}

// Pause freezes the server (SIGSTOP) and returns when none of its processes runs any more.
func (s *Server) Pause() error {
	if err := s.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	const limit = 10 * time.Second
	for deadline := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		all, err := family(s.process.cmd.Process.Pid)
		if err != nil {
			return err
		}
		running := 0
		for _, member := range all {
			if member.state != 'T' && member.state != 'Z' {
				running++
			}
		}
		if running == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d processes of PostgreSQL still run %s after SIGSTOP", running, limit)
		}
	}
}

// Resume undoes Pause.
func (s *Server) Resume() error { return s.Signal(syscall.SIGCONT) }

// member is a process of a server.
type member struct {
	pid   int
	state byte // as in proc_pid_stat(5): 'T' is stopped
}

// family lists a process and its children; PostgreSQL's processes have no grandchildren.
func family(main int) ([]member, error) {
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	var all []member
	for _, file := range files {
		text, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // it has ended meanwhile
		}
		if err != nil {
			return nil, err
		}
		// pid (name) state parent …; the name may hold anything.
		fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
		if len(fields) < 2 {
			return nil, fmt.Errorf("%s says %q, which names no parent", file, text)
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			return nil, err
		}
		if pid == main || string(fields[1]) == strconv.Itoa(main) {
			all = append(all, member{pid: pid, state: fields[0][0]})
		}
	}
	return all, nil
}
