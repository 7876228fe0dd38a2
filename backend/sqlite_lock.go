package backend

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// fileLock keeps a second quire away from a database: an exclusive flock on a file of its own beside it. Not on the
// database itself: closing that by other means than SQLite drops SQLite's POSIX locks on it, and people may read the live
// database with other tools. The kernel drops the lock when the process ends, however it ends. The file stays: removing it
// would let two processes lock two files of the same name.
type fileLock struct{ file *os.File }

// lockFile takes the lock that path names, without waiting. ErrInUse: another process (or this one) has it.
func lockFile(path string) (*fileLock, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		holder := readHolder(f)
		return nil, errors.Join(fmt.Errorf("%w: %s is locked%s; stop that quire first, or give this one a data directory of its own",
			ErrInUse, path, holder), f.Close())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w; use a local file system that supports flock", path, err), f.Close())
	}
	l := &fileLock{file: f}
	if err := l.writeHolder(); err != nil && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		// On a full disk the lock holds all the same, only its holder stays unnamed: reads and deletes must go on.
		return nil, errors.Join(fmt.Errorf("write to %s: %w", path, err), l.unlock())
	}
	return l, nil
}

// writeHolder leaves our process id for the message of whoever finds the file locked.
func (l *fileLock) writeHolder() error {
	if err := l.file.Truncate(0); err != nil {
		return err
	}
	_, err := l.file.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	return err
}

// readHolder says who holds the lock, as far as the file tells. The id is as the holder sees itself: in a container it
// may be another one than outside.
func readHolder(f *os.File) string {
	text := make([]byte, 32)
	n, err := f.ReadAt(text, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return " by another process"
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text[:n])))
	if err != nil {
		return " by another process" // it is between locking and writing, or its disk was full
	}
	return fmt.Sprintf(" by process %d", pid)
}

func (l *fileLock) unlock() error { return l.file.Close() }
