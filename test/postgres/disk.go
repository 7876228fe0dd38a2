package postgres

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

// ErrCannotMount is what Start returns when it may not make the file system that Options.DiskBytes asks for. Tests skip then.
var ErrCannotMount = errors.New("cannot mount a small file system for the data directory: it needs root and CAP_SYS_ADMIN")

// mountData mounts a file system in memory on the data directory.
func (s *Server) mountData(size int64) error {
	a := s.workspace.account
	options := fmt.Sprintf("size=%d,mode=0700,uid=%d,gid=%d", size, a.uid, a.gid)
	if err := run(exec.Command("mount", "-t", "tmpfs", "-o", options, "quire-postgres", s.dataDir())); err != nil {
		s.limited = false
		return fmt.Errorf("%w: %w", ErrCannotMount, err)
	}
	return nil
}

func (s *Server) unmountData() error { return run(exec.Command("umount", s.dataDir())) }

func (s *Server) ballast() string { return filepath.Join(s.dataDir(), "ballast") }

// FillDisk takes every free byte of a server that has Options.DiskBytes. A server without room fails statements
// first (SQLSTATE 53100); where it cannot write its log it stops altogether and comes back only by FreeDisk and Restart.
func (s *Server) FillDisk() error {
	if !s.limited {
		return errors.New("this PostgreSQL server has no disk of its own to fill: start it with Options.DiskBytes")
	}
	f, err := os.OpenFile(s.ballast(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	// A write that does not fit takes what is left before it fails.
	block := make([]byte, 1<<20)
	for {
		if _, err := f.Write(block); errors.Is(err, syscall.ENOSPC) {
			return nil
		} else if err != nil {
			return fmt.Errorf("filling the disk of PostgreSQL: %w", err)
		}
	}
}

// FreeDisk gives back what FillDisk took.
func (s *Server) FreeDisk() error { return os.Remove(s.ballast()) }
