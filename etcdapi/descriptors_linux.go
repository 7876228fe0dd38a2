package etcdapi

import (
	"os"

	"golang.org/x/sys/unix"
)

// descriptors returns how many files are open, and how many may be.
func descriptors() (used int, limit uint64, err error) {
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0, 0, err
	}
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 0, 0, err
	}
	return len(open) - 1, r.Cur, nil // less the one that it was read through
}
