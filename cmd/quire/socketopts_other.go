//go:build !unix

package main

import (
	"errors"
	"syscall"
)

func socketControl(reusePort, reuseAddress bool) func(network, address string, conn syscall.RawConn) error {
	if !reusePort && !reuseAddress {
		return nil
	}
	return func(string, string, syscall.RawConn) error {
		return errors.New("--socket-reuse-port and --socket-reuse-address are not supported on this system")
	}
}

// fileLimit is unknown here.
func fileLimit() uint64 { return 0 }
