//go:build unix

package main

import (
	"errors"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// socketControl sets the options of --socket-reuse-port and --socket-reuse-address before the socket is bound; nil
// when neither is asked for.
func socketControl(reusePort, reuseAddress bool) func(network, address string, conn syscall.RawConn) error {
	if !reusePort && !reuseAddress {
		return nil
	}
	return func(network, _ string, conn syscall.RawConn) error {
		if !strings.HasPrefix(network, "tcp") {
			return nil
		}
		var errs []error
		err := conn.Control(func(fd uintptr) {
			if reusePort {
				errs = append(errs, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
			}
			if reuseAddress {
				errs = append(errs, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
			}
		})
		return errors.Join(append(errs, err)...)
	}
}

// fileLimit is how many files may be open; 0 if the system does not tell.
func fileLimit() uint64 {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 0
	}
	return uint64(r.Cur)
}
