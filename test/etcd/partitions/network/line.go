//go:build linux

package network

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Line says how packets get from one host to another. The way back is another line. The zero Line is open.
type Line struct {
	Cut    bool          // nothing gets through
	Loss   float64       // the share of packets that is lost, 0 to 1
	Delay  time.Duration // until a packet arrives
	Jitter time.Duration // at most so much more, drawn for each packet; they stay in order
}

// line is a Line at work.
type line struct {
	to    *Host
	queue chan packet // what is on its way; a packet that finds it full is lost, as on a real line
	lost  atomic.Int64

	mu struct {
		sync.Mutex
		is     Line
		random *rand.Rand
		newest time.Time // when the newest packet of the queue is due
	}
}

type packet struct {
	data []byte
	due  time.Time
}

func newLine(to *Host, seed, number uint64) *line {
	l := &line{to: to, queue: make(chan packet, 4096)}
	l.mu.random = rand.New(rand.NewPCG(seed, number))
	return l
}

func (l *line) set(is Line) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mu.is = is
}

// send lets a packet go, which stays the caller's.
func (l *line) send(data []byte) error {
	l.mu.Lock()
	is := l.mu.is
	if is.Cut || is.Loss > 0 && l.mu.random.Float64() < is.Loss {
		l.mu.Unlock()
		l.lost.Add(1)
		return nil
	}
	if is.Delay == 0 && is.Jitter == 0 {
		l.mu.Unlock()
		return l.arrive(data)
	}
	due := time.Now().Add(is.Delay)
	if is.Jitter > 0 {
		due = due.Add(time.Duration(l.mu.random.Int64N(int64(is.Jitter))))
	}
	if due.Before(l.mu.newest) {
		due = l.mu.newest
	}
	l.mu.newest = due
	l.mu.Unlock()
	select {
	case l.queue <- packet{data: bytes.Clone(data), due: due}:
	default:
		l.lost.Add(1)
	}
	return nil
}

// deliver lets the packets of the queue arrive when they are due.
func (l *line) deliver(done <-chan struct{}) error {
	for {
		select {
		case <-done:
			return nil
		case p := <-l.queue:
			select {
			case <-done:
				return nil
			case <-time.After(time.Until(p.due)):
			}
			if err := l.arrive(p.data); err != nil {
				return err
			}
		}
	}
}

func (l *line) arrive(data []byte) error {
	_, err := l.to.tun.Write(data)
	if errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.ENOMEM) {
		l.lost.Add(1)
		return nil
	}
	if err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("hand a packet to %s: %w", l.to.IP, err)
	}
	return nil
}
