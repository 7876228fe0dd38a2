//go:build linux

package network

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

func newNetwork(t *testing.T, hosts int) *Network {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	n, err := New(hosts, 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Errorf("close the network: %v", err)
		}
	})
	return n
}

// pair is a TCP connection from a to b; an end is closed with the test.
func pair(t *testing.T, a, b *Host) (here, there net.Conn) {
	t.Helper()
	address := net.JoinHostPort(b.IP.String(), "700")
	var listener net.Listener
	var err error
	listening := make(chan struct{})
	b.calls <- func() {
		listener, err = net.Listen("tcp4", address)
		close(listening)
	}
	<-listening
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			t.Errorf("accept: %v", err)
		}
		accepted <- conn
	}()
	here, err = a.DialContext(t.Context(), "tcp4", address)
	if err != nil {
		t.Fatal(err)
	}
	there = <-accepted
	t.Cleanup(func() { here.Close(); there.Close() })
	return here, there
}

// arrives says whether a byte that is sent into one end comes out at the other in time.
func arrives(t *testing.T, from, to net.Conn, limit time.Duration) bool {
	t.Helper()
	if _, err := from.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	if err := to.SetReadDeadline(time.Now().Add(limit)); err != nil {
		t.Fatal(err)
	}
	_, err := io.ReadFull(to, make([]byte, 1))
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the connection has ended: %v", err)
	}
	return err == nil
}

func TestACutLineIsSilent(t *testing.T) {
	n := newNetwork(t, 3)
	a, b := n.Host(0), n.Host(1)
	here, there := pair(t, a, b)
	if !arrives(t, here, there, 5*time.Second) {
		t.Fatal("nothing arrives on an open line")
	}
	n.Set(a, b, Line{Cut: true})
	n.Set(b, a, Line{Cut: true})
	if arrives(t, here, there, 300*time.Millisecond) {
		t.Error("a byte came through a cut line")
	}
	if n.Lost() == 0 {
		t.Error("a cut line has lost nothing")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := a.DialContext(ctx, "tcp4", "10.0.0.2:1"); !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a connection over a cut line: %v, want a timeout", err)
	}
	if _, err := a.DialContext(t.Context(), "tcp4", "10.0.0.3:1"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a connection over another line, to a port where nobody listens: %v, want it refused", err)
	}
	n.Set(a, b, Line{})
	n.Set(b, a, Line{})
	if !arrives(t, here, there, 10*time.Second) {
		t.Error("nothing arrives once the line is whole again")
	}
}

func TestALineIsOneWay(t *testing.T) {
	n := newNetwork(t, 2)
	a, b := n.Host(0), n.Host(1)
	here, there := pair(t, a, b)
	n.Set(a, b, Line{Cut: true})
	if !arrives(t, there, here, 5*time.Second) {
		t.Error("nothing comes back while only the way there is cut")
	}
	if arrives(t, here, there, 300*time.Millisecond) {
		t.Error("a byte came through the cut line")
	}
}

func TestALineDelays(t *testing.T) {
	n := newNetwork(t, 2)
	a, b := n.Host(0), n.Host(1)
	here, there := pair(t, a, b)
	const delay, jitter = 60 * time.Millisecond, 20 * time.Millisecond
	n.Set(a, b, Line{Delay: delay, Jitter: jitter})
	for range 10 {
		began := time.Now()
		if !arrives(t, here, there, 5*time.Second) {
			t.Fatal("nothing arrives")
		}
		if took := time.Since(began); took < delay {
			t.Errorf("a byte took %v over a line that delays by %v", took, delay)
		}
	}
	began := time.Now()
	if !arrives(t, there, here, 5*time.Second) || time.Since(began) > delay {
		t.Errorf("the way back took %v, want it undelayed", time.Since(began))
	}
}

func TestALineLosesItsShare(t *testing.T) {
	n := newNetwork(t, 2)
	a, b := n.Host(0), n.Host(1)
	n.Set(a, b, Line{Loss: 0.3})
	conn, err := a.DialContext(t.Context(), "udp4", net.JoinHostPort(b.IP.String(), "700"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	const sent = 2000
	for range sent {
		// Nobody listens there, and b says so.
		if _, err := conn.Write([]byte{1}); err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Microsecond) // so that the device's queue does not overflow
	}
	time.Sleep(100 * time.Millisecond) // for the last ones to be carried
	if lost := n.Lost(); lost < sent/4 || lost > sent*7/20 {
		t.Errorf("%d of %d packets are lost, want about 30 %%", lost, sent)
	}
}

func TestProcessesLiveAndEndWithTheirHost(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	n, err := New(2, 1)
	if err != nil {
		t.Fatal(err)
	}
	command := exec.Command("sh", "-c", "cat /proc/net/fib_trie; echo over; exec sleep 100")
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	output, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Host(1).Start(command); err != nil {
		t.Fatal(err)
	}
	var addresses strings.Builder
	for lines := bufio.NewScanner(output); lines.Scan() && lines.Text() != "over"; {
		addresses.WriteString(lines.Text() + "\n")
	}
	if text := addresses.String(); !strings.Contains(text, "10.0.0.2") || strings.Contains(text, "10.0.0.1\n") {
		t.Errorf("a process of host 10.0.0.2 sees these addresses:\n%s", text)
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- command.Wait() }()
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		t.Error("the process outlives its host")
		if err := command.Process.Kill(); err != nil {
			t.Error(err)
		}
	}
}

func TestNetworksDoNotMeet(t *testing.T) {
	one, other := newNetwork(t, 2), newNetwork(t, 2)
	here, there := pair(t, one.Host(0), one.Host(1))
	other.Set(other.Host(0), other.Host(1), Line{Cut: true})
	if !arrives(t, here, there, 5*time.Second) {
		t.Error("a line of another network with the same addresses was cut, and this one's with it")
	}
	other.Set(other.Host(0), other.Host(1), Line{})
	if _, err := other.Host(1).DialContext(t.Context(), "tcp4", "10.0.0.1:700"); err == nil {
		t.Error("two networks with the same addresses are connected")
	}
}
