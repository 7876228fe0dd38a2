package sqlraft

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"
)

// A stream is one HTTP/1.1 request that becomes a connection for frames:
//
//	GET /raft/stream HTTP/1.1
//	Connection: Upgrade
//	Upgrade: quire-raft
//	X-Raft-Protocol: 1
//	X-Raft-Lane: prompt | bulk
//	X-Etcd-Cluster-ID, X-Server-From, X-Raft-To: hexadecimal
//	X-PeerURLs: where whoever dials can be dialled, separated by commas
//	X-Raft-Back: see headerBack
//
// "101 Switching Protocols" lets it in; anything else refuses it (see admit). From then on frames go from whoever
// dialled to whoever was dialled. In the other direction go acknowledgements, 8 bytes each: the token of a ping, or 0
// when bytes have arrived of late. Either side hears of the other at least once a fifth of the read timeout, however
// large a frame is and however slow the line.
const (
	streamPath     = "/raft/stream"
	streamUpgrade  = "quire-raft"
	streamProtocol = "1"
	acknowledgment = 8

	streamBuffer = 64 << 10
)

// outgoing is one lane to another member: a queue and whatever connection there is.
type outgoing struct {
	p     *peer
	lane  lane
	wake  chan struct{} // the queue is not empty
	retry chan struct{} // dial now

	mu struct {
		sync.Mutex
		queue []packet
		bytes int
		// down: the last attempt to connect failed. Packets are dropped, because most would be stale by the time that
		// they could be sent. They are kept during the first attempt, which is made as soon as a connection broke.
		down  bool
		since time.Time // of the connection, zero without one
		conn  net.Conn
		url   string // that conn was dialled with; "" when the member has offered it
	}
}

// put queues p; false when it has to be dropped.
func (o *outgoing) put(p packet) bool {
	size := weight(&p)
	o.mu.Lock()
	defer o.mu.Unlock()
	// A packet larger than the whole queue goes alone.
	full := len(o.mu.queue) >= o.p.t.o.queuePackets || len(o.mu.queue) > 0 && o.mu.bytes+size > o.p.t.o.queueBytes
	if o.mu.down || full {
		return false
	}
	o.mu.queue = append(o.mu.queue, p)
	o.mu.bytes += size
	return true
}

// weight is roughly what p takes in memory and on the wire.
func weight(p *packet) int {
	n := 128
	if p.message != nil {
		n += len(p.message.Context)
		for _, e := range p.message.Entries {
			n += len(e.Data) + 32
		}
	}
	if p.forward != nil {
		for _, one := range p.forward.proposals {
			n += len(one.payload) + 32
		}
	}
	return n
}

func (o *outgoing) signal() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

func (o *outgoing) retryNow() {
	select {
	case o.retry <- struct{}{}:
	default:
	}
}

// take empties the queue. The memory of before is used again for what comes.
func (o *outgoing) take(before []packet) []packet {
	clear(before)
	o.mu.Lock()
	defer o.mu.Unlock()
	queue := o.mu.queue
	o.mu.queue, o.mu.bytes = before[:0], 0
	return queue
}

// dialled is the URL that the connection was dialled with, "" without one and when the member has offered it.
func (o *outgoing) dialled() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.mu.conn == nil {
		return ""
	}
	return o.mu.url
}

func (o *outgoing) upSince() time.Time {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.mu.since
}

// keepTo ends the connection unless it was dialled with one of urls, which are new, or the member has offered it.
func (o *outgoing) keepTo(urls []string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.mu.down = false // they are tried at once
	if o.mu.conn != nil && o.mu.url != "" && !slices.Contains(urls, o.mu.url) {
		_ = o.mu.conn.Close() // wakes the goroutines that use it
	}
}

// run keeps the lane connected until the peer is dropped.
func (o *outgoing) run() {
	// Members that are gone cost little; those that come back are found soon, also because they dial us. One that lets
	// us in and breaks off soon after is on a bad line, or does not want us for a reason that it cannot tell.
	const (
		shortest, longest = 25 * time.Millisecond, time.Second
		broken            = 200 * time.Millisecond
	)
	var wait time.Duration
	next := 0
	for o.p.ctx.Err() == nil {
		urls := o.p.urls()
		if len(urls) == 0 {
			o.goDown()
			o.pause(time.Minute) // update ends it
			continue
		}
		u := urls[next%len(urls)]
		s, err := o.connect(u)
		if err == nil {
			began := time.Now()
			err = s.serve()
			o.disconnected(err)
			if s.offered {
				next++
			}
			if time.Since(began) >= longest {
				wait = 0
				continue
			}
			wait = min(wait, broken/2)
		} else if o.p.ctx.Err() == nil {
			o.failed(u, err)
			next++
		}
		wait = min(max(2*wait, shortest), longest)
		o.pause(wait/2 + rand.N(wait))
	}
	o.disconnected(errNoMember)
}

// pause waits, less when something speaks for an attempt.
func (o *outgoing) pause(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-o.retry:
	case <-o.p.ctx.Done():
	}
}

// goDown drops what waits and what comes until there is a connection.
func (o *outgoing) goDown() {
	o.mu.Lock()
	o.mu.down = true
	dropped := len(o.mu.queue)
	o.mu.queue, o.mu.bytes = nil, 0
	o.mu.Unlock()
	if dropped > 0 {
		o.p.t.reportDropped(o.p.id, dropped)
	}
}

func (o *outgoing) failed(url string, err error) {
	o.goDown()
	o.p.noteFailure(url, err)
	var r *refusal
	if errors.As(err, &r) && r.is != nil {
		o.p.t.o.handler.refused(o.p.id, err)
	}
}

func (o *outgoing) disconnected(err error) {
	o.mu.Lock()
	was := o.mu.conn != nil
	o.mu.conn, o.mu.since = nil, time.Time{}
	o.mu.Unlock()
	if was {
		o.p.noteState(err)
		o.p.t.reportUnreachable(o.p.id)
	}
}

// stream is a connection of an outgoing lane.
type stream struct {
	o       *outgoing
	offered bool // by the member
	conn    net.Conn
	answers *bufio.Reader
	w       *bufio.Writer
	flush   func() error // below w
	frame   frame
}

// connect dials, or takes a connection that the member has offered, and asks to be let in.
func (o *outgoing) connect(url string) (*stream, error) {
	cluster := o.p.t.o.clusterID()
	if cluster == 0 {
		return nil, errors.New("sqlraft: the cluster is not known yet")
	}
	timeout := o.p.t.o.dialTimeout
	offered := o.p.hasOffer()
	if offered {
		timeout /= 4 // where packets vanish, a lane is not to wait long for what it knows
	}
	s, err := o.dial(cluster, url, timeout)
	if err == nil || !offered {
		return s, err
	}
	conn := o.p.takeOffer()
	if conn == nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(o.p.ctx, o.p.t.o.dialTimeout)
	defer cancel()
	raw := &timedConn{Conn: conn, timeout: o.p.t.o.readTimeout}
	s, oerr := o.open(ctx, cluster, "", raw, raw, func() error { return nil })
	if oerr != nil {
		return nil, fmt.Errorf("%w; on a connection that the member has offered: %w", err, oerr)
	}
	// Told, and not wrapped: it lives.
	o.p.noteFailure(url, fmt.Errorf("sqlraft: only the member itself can connect: %v", err))
	return s, nil
}

func (o *outgoing) dial(cluster uint64, url string, timeout time.Duration) (*stream, error) {
	t := o.p.t
	to, err := targetOf(url)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(o.p.ctx, timeout)
	defer cancel()
	var raw net.Conn
	flush := func() error { return nil }
	conn, err := t.dialer.dial(ctx, to, func(c net.Conn) net.Conn {
		raw = &timedConn{Conn: c, timeout: t.o.readTimeout}
		if !to.secure {
			return raw
		}
		g := newGatheringConn(raw)
		flush = g.flush
		return g
	})
	if err != nil {
		return nil, err
	}
	s, err := o.open(ctx, cluster, url, conn, raw, flush)
	if err == nil && !slices.Contains(o.p.urls(), url) {
		_ = raw.Close() // the URLs have changed meanwhile; serve will notice
	}
	return s, err
}

// open asks to be let in on a connection that was dialled with url. raw lies below the TLS that this member speaks by
// dialling: closing it ends everything at once; TLS would first wait for a write that hangs.
func (o *outgoing) open(ctx context.Context, cluster uint64, url string, conn, raw net.Conn, flush func() error) (_ *stream, err error) {
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	s := &stream{o: o, offered: url == "", conn: raw, answers: bufio.NewReaderSize(conn, 512), w: bufio.NewWriterSize(conn, streamBuffer), flush: flush}
	header := map[string]string{headerLane: laneNames[o.lane]}
	if !o.p.isMember() {
		header[headerBack] = "1"
	}
	err = o.p.t.askUpgrade(s.w, s.answers, streamPath, streamUpgrade, o.p.id, cluster, header)
	if !stop() {
		err = fmt.Errorf("sqlraft: no answer in time: %w", ctx.Err())
	}
	if err != nil {
		_ = raw.Close() // the error that matters is known
		return nil, err
	}
	o.mu.Lock()
	o.mu.conn, o.mu.url, o.mu.since, o.mu.down = raw, url, time.Now(), false
	o.mu.Unlock()
	o.p.noteState(nil)
	if url != "" {
		o.p.offerSoon()
	}
	return s, nil
}

// serve sends until the connection breaks or the peer is dropped, and returns why.
func (s *stream) serve() error {
	t := s.o.p.t
	defer context.AfterFunc(s.o.p.ctx, func() { _ = s.conn.Close() })() // a write may hang
	died := make(chan error, 1)
	t.wg.Add(1) // on a goroutine that is counted already
	go func() {
		defer t.wg.Done()
		err := s.readAnswers()
		_ = s.conn.Close() // ends a write that hangs
		died <- err
	}()
	err := s.write(died)
	_ = s.conn.Close() // ends readAnswers
	if other := <-died; err == nil || errors.Is(err, net.ErrClosed) {
		return other // it was first
	}
	return err
}

// write returns nil when the reader has died.
func (s *stream) write(died chan error) error {
	o, t := s.o, s.o.p.t
	ticker := time.NewTicker(t.o.readTimeout / 5)
	defer ticker.Stop()
	var queue []packet
	for {
		bytes := 0
		select {
		case <-o.p.ctx.Done():
			return errNoMember
		case err := <-died:
			died <- err
			return nil
		case <-ticker.C:
			s.frame.ping(uint64(time.Since(t.started)) | 1) // not 0
			if err := s.frame.write(s.w); err != nil {
				return err
			}
		case <-o.wake:
		}
		queue = o.take(queue)
		for i := range queue {
			if err := s.frame.encode(&queue[i]); err != nil {
				// Nothing is wrong with the connection, and sending it again would not help.
				t.reportDropped(o.p.id, 1)
				o.p.noteFailure("", err)
				continue
			}
			if err := s.frame.write(s.w); err != nil {
				return err
			}
			bytes += s.frame.size()
		}
		s.frame.shrink()
		if err := s.w.Flush(); err != nil {
			return err
		}
		if err := s.flush(); err != nil {
			return err
		}
		if bytes > 0 {
			t.o.hooks.sent(o.p.id, bytes)
		}
		if cap(queue) > 1<<10 {
			queue = nil
		}
	}
}

// readAnswers returns why the connection is of no use any more.
func (s *stream) readAnswers() error {
	t := s.o.p.t
	var answer [acknowledgment]byte
	for {
		if _, err := io.ReadFull(s.answers, answer[:]); err != nil {
			if errors.Is(err, io.EOF) {
				return errors.New("sqlraft: the member has closed the connection")
			}
			return err
		}
		if token := binary.LittleEndian.Uint64(answer[:]); token != 0 {
			t.o.hooks.roundTrip(s.o.p.id, time.Since(t.started)-time.Duration(token))
		}
	}
}

// incoming is one lane from another member.
type incoming struct {
	p       *peer
	lane    lane
	offered bool // by this member
	conn    net.Conn
	r       *bufio.Reader
	since   time.Time
	done    chan struct{} // closed once nothing more is received

	acknowledged time.Time // only for the goroutine that reads

	ended struct {
		sync.Mutex
		why error
	}
}

// end closes the connection, because of why.
func (in *incoming) end(why error) {
	in.ended.Lock()
	if in.ended.why == nil {
		in.ended.why = why
	}
	in.ended.Unlock()
	_ = in.conn.Close() // wakes serve
}

// serve receives until the connection ends.
func (in *incoming) serve() {
	if !in.p.connect(in) {
		close(in.done)
		_ = in.conn.Close() // there is nobody to tell
		return
	}
	err := in.receive()
	in.end(err)
	close(in.done)
	in.ended.Lock()
	err = in.ended.why
	in.ended.Unlock()
	if errors.Is(err, errDamaged) {
		in.p.t.reject(in.conn.RemoteAddr().String(), in.p.id, err)
	}
	in.p.disconnect(in, err)
}

func (in *incoming) receive() error {
	const most = 64 // packets handed over together
	t := in.p.t
	for {
		var packets []packet
		bytes := 0
		for {
			body, err := readFrame(in.r)
			if errors.Is(err, io.EOF) {
				err = errors.New("sqlraft: the member has closed the connection")
			}
			if err != nil {
				return err
			}
			bytes += len(body) + frameHeader
			if len(body) == 1+acknowledgment && body[0] == framePing {
				if err := in.acknowledge(body[1:]); err != nil {
					return err
				}
			} else {
				p, err := decode(body)
				if err != nil {
					return err
				}
				if p.to, p.from = t.o.id, in.p.id; p.message != nil && p.message.GetTo() != t.o.id {
					return damaged("a %v for member %x reached %x", p.message.GetType(), p.message.GetTo(), t.o.id)
				}
				packets = append(packets, p)
			}
			if len(packets) >= most || !in.frameWaits() {
				break
			}
		}
		if len(packets) > 0 {
			t.o.hooks.received(in.p.id, bytes)
			t.o.handler.receive(packets)
		}
	}
}

// frameWaits tells whether another whole frame can be had without waiting.
func (in *incoming) frameWaits() bool {
	if in.r.Buffered() < frameHeader {
		return false
	}
	header, err := in.r.Peek(frameHeader)
	return err == nil && in.r.Buffered()-frameHeader >= int(binary.LittleEndian.Uint32(header))
}

func (in *incoming) acknowledge(token []byte) error {
	in.acknowledged = time.Now()
	if err := in.conn.SetWriteDeadline(in.acknowledged.Add(in.p.t.o.readTimeout)); err != nil {
		return err
	}
	if _, err := in.conn.Write(token); err != nil {
		return fmt.Errorf("sqlraft: acknowledging: %w", err)
	}
	return nil
}

// Read is what in.r reads from.
func (in *incoming) Read(b []byte) (int, error) {
	n, err := in.conn.Read(b)
	if n > 0 && err == nil && time.Since(in.acknowledged) >= in.p.t.o.readTimeout/5 {
		err = in.acknowledge(make([]byte, acknowledgment))
	}
	return n, err
}
