package sqlraft

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// preallocate gives an empty file its size. Where the file system can, the blocks are set aside, so that a full disk is
// met here and not in the middle of an append.
func preallocate(f *os.File, size int64) error {
	for {
		err := unix.Fallocate(int(f.Fd()), 0, 0, size)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS):
			return f.Truncate(size)
		default:
			return err
		}
	}
}

// syncData is fdatasync: it leaves out the times of the file, which would cost a write to the file system's journal.
func syncData(f *os.File) error {
	for {
		if err := unix.Fdatasync(int(f.Fd())); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
