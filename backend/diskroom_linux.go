package backend

import (
	"os"

	"golang.org/x/sys/unix"
)

// diskRoom is how many bytes of the file system that a file is on are free, for a process without privileges, and how many
// it has.
func diskRoom(file *os.File) (free, total uint64, err error) {
	var st unix.Statfs_t
	for {
		if err = unix.Fstatfs(int(file.Fd()), &st); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return 0, 0, os.NewSyscallError("fstatfs", err)
	}
	return st.Bavail * uint64(st.Bsize), st.Blocks * uint64(st.Bsize), nil
}
