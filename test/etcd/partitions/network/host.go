//go:build linux

package network

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// mtu is the size of the largest packet.
const mtu = 9000

// Host is one host: a network namespace with a loopback device, which processes are started in.
type Host struct {
	IP netip.Addr

	tun       *os.File // the other end of its network device
	namespace *os.File
	calls     chan func() // run by the thread that lives in the namespace
	ended     chan struct{}
}

func newHost(ip netip.Addr) (*Host, error) {
	h := &Host{IP: ip, calls: make(chan func()), ended: make(chan struct{})}
	ready := make(chan error)
	go h.live(ready)
	if err := <-ready; err != nil {
		<-h.ended
		return nil, err
	}
	return h, nil
}

// live is the thread of the namespace. It is never given back: a thread cannot leave a namespace and be as it was, so it
// ends with the goroutine.
func (h *Host) live(ready chan<- error) {
	defer close(h.ended)
	runtime.LockOSThread()
	if err := h.enter(); err != nil {
		ready <- err
		return
	}
	ready <- nil
	for call := range h.calls {
		call()
	}
}

// enter makes the namespace and the devices in it.
func (h *Host) enter() (err error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("make a network namespace: %w", err)
	}
	if h.namespace, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			h.namespace.Close()
		}
	}()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open /dev/net/tun: %w", err)
	}
	device, err := unix.NewIfreq("tun0")
	if err != nil {
		return err
	}
	device.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, device); err != nil {
		unix.Close(fd)
		return fmt.Errorf("make a TUN device: %w", err)
	}
	// Only now: the runtime's poller cannot wait for a file that is no device yet.
	h.tun = os.NewFile(uintptr(fd), "tun0 of "+h.IP.String())
	if err := configure(h.IP); err != nil {
		h.tun.Close()
		return err
	}
	return nil
}

// configure gives the devices of this thread's namespace their addresses and brings them up.
func configure(ip netip.Addr) error {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(socket)
	address := ip.As4()
	for _, step := range []struct {
		device  string
		request uint
		set     func(*unix.Ifreq) error
	}{
		{"lo", unix.SIOCSIFFLAGS, flags(unix.IFF_UP)},
		{"tun0", unix.SIOCSIFADDR, inet4(address[:])},
		{"tun0", unix.SIOCSIFNETMASK, inet4([]byte{255, 255, 255, 0})},
		{"tun0", unix.SIOCSIFMTU, func(r *unix.Ifreq) error { r.SetUint32(mtu); return nil }},
		{"tun0", unix.SIOCSIFFLAGS, flags(unix.IFF_UP)},
	} {
		r, err := unix.NewIfreq(step.device)
		if err != nil {
			return err
		}
		if err := step.set(r); err != nil {
			return err
		}
		if err := unix.IoctlIfreq(socket, step.request, r); err != nil {
			return fmt.Errorf("configure %s of %s (request %#x): %w", step.device, ip, step.request, err)
		}
	}
	return nil
}

func flags(f uint16) func(*unix.Ifreq) error {
	return func(r *unix.Ifreq) error { r.SetUint16(f); return nil }
}

func inet4(address []byte) func(*unix.Ifreq) error {
	return func(r *unix.Ifreq) error { return r.SetInet4Addr(address) }
}

func (h *Host) close() {
	close(h.calls)
	<-h.ended
	h.namespace.Close() // read by nobody: it only held the namespace
}

// Start starts a command on the host. With Pdeathsig set it ends with the network at the latest.
func (h *Host) Start(command *exec.Cmd) error {
	result := make(chan error)
	h.calls <- func() { result <- command.Start() }
	return <-result
}

// DialContext connects from the host to an address, which must not be a name. It is what gRPC and HTTP take as a dialer.
func (h *Host) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	dialed := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked, see live; a socket stays in the namespace that it was made in
		if err := unix.Setns(int(h.namespace.Fd()), unix.CLONE_NEWNET); err != nil {
			dialed <- result{err: fmt.Errorf("enter the namespace of %s: %w", h.IP, err)}
			return
		}
		var d net.Dialer
		conn, err := d.DialContext(ctx, network, address)
		dialed <- result{conn, err}
	}()
	r := <-dialed
	return r.conn, r.err
}
