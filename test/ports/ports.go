// Package ports finds TCP ports for the servers that tests start.
package ports

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"sync/atomic"
	"testing"
)

// Ports of [first, first+count) are handed out. They lie below the kernel's range for outgoing connections
// (ip_local_port_range starts at 32768), so that no connection takes one while its server is away and is to come back,
// and below the ports that etcd's own tests name (20000 and a few).
const (
	first = 10000
	count = 10000
)

// next counts what this process has handed out, from a start of its own: other processes look for ports at the same
// time.
var next atomic.Uint32

func init() { next.Store(rand.Uint32N(count)) }

// Free returns a port of 127.0.0.1 on which nothing listens now, and that this process has not been given for the last
// 10,000 calls: what the kernel gives a listener on port 0 comes back once that listener is closed, to two askers
// at once too. Another process may take the port before it is used; who starts a server tries again then.
func Free() (int, error) {
	for range count {
		port := first + int(next.Add(1)%count)
		l, err := net.Listen("tcp", Loopback(port))
		if err != nil {
			continue
		}
		return port, l.Close()
	}
	return 0, errors.New("all ports of 127.0.0.1 from 10000 to 19999 are taken")
}

// Loopback is the address of a port of this machine.
func Loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// FreeAddress is the address of a port that [Free] returns. Without one the test ends.
func FreeAddress(t testing.TB) string {
	t.Helper()
	port, err := Free()
	if err != nil {
		t.Fatal(fmt.Errorf("find a free port: %w", err))
	}
	return Loopback(port)
}
