//go:build linux

package network

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"sync"
)

// Network is hosts with lines between every two of them. Its methods may be called at any time, by anyone.
type Network struct {
	hosts   []*Host
	byIP    map[netip.Addr]*Host
	lines   map[ends]*line
	done    chan struct{}
	running sync.WaitGroup

	mu struct {
		sync.Mutex
		err error // the first that the wire met
	}
}

// ends are those of a line.
type ends struct{ from, to *Host }

// New makes a network of hosts whose lines are all open. The seed is that of what the lines draw. The caller closes it.
func New(hosts int, seed uint64) (*Network, error) {
	const most = 250 // in a network of 256 addresses
	if hosts < 1 || hosts > most {
		return nil, fmt.Errorf("a network of %d hosts; it may have 1 to %d", hosts, most)
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("network namespaces need root")
	}
	n := &Network{
		byIP:  make(map[netip.Addr]*Host),
		lines: make(map[ends]*line),
		done:  make(chan struct{}),
	}
	for i := range hosts {
		h, err := newHost(netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)}))
		if err != nil {
			return nil, errors.Join(fmt.Errorf("make host %d of the network: %w", i+1, err), n.Close())
		}
		n.hosts = append(n.hosts, h)
		n.byIP[h.IP] = h
	}
	for i, from := range n.hosts {
		for j, to := range n.hosts {
			if from != to {
				l := newLine(to, seed, uint64(i)<<8|uint64(j))
				n.lines[ends{from, to}] = l
				n.running.Go(func() { n.failed(l.deliver(n.done)) })
			}
		}
	}
	for _, h := range n.hosts {
		n.running.Go(func() { n.failed(n.carry(h)) })
	}
	return n, nil
}

// Host returns the host with a number, counted from 0. Its address ends in the number and one.
func (n *Network) Host(i int) *Host { return n.hosts[i] }

// Set makes the line from one host to another what l says.
func (n *Network) Set(from, to *Host, l Line) { n.lines[ends{from, to}].set(l) }

// Lost is how many packets the lines have lost so far.
func (n *Network) Lost() (packets int64) {
	for _, l := range n.lines {
		packets += l.lost.Load()
	}
	return packets
}

// Close ends the network, and every process on it that still runs. It returns the first error that the wire met.
func (n *Network) Close() error {
	close(n.done)
	for _, h := range n.hosts {
		n.failed(h.tun.Close())
	}
	n.running.Wait()
	for _, h := range n.hosts {
		h.close()
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.mu.err
}

func (n *Network) failed(err error) {
	if err == nil || errors.Is(err, os.ErrClosed) || errors.Is(err, io.EOF) {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.mu.err == nil {
		n.mu.err = err
	}
}

// carry puts the packets that leave a host on their lines, until the device is closed. What is not IPv4 (a host looks for
// IPv6 routers) or is for nobody goes nowhere.
func (n *Network) carry(from *Host) error {
	const header, destination = 20, 16 // of IPv4, in bytes
	buffer := make([]byte, mtu)
	for {
		k, err := from.tun.Read(buffer)
		if err != nil {
			return fmt.Errorf("read what %s sends: %w", from.IP, err)
		}
		packet := buffer[:k]
		if k < header || packet[0]>>4 != 4 {
			continue
		}
		to := n.byIP[netip.AddrFrom4([4]byte(packet[destination:header]))]
		if l := n.lines[ends{from, to}]; l != nil {
			if err := l.send(packet); err != nil {
				return err
			}
		}
	}
}
