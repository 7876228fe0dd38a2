package postgres

import (
	"bytes"
	"io"
	"net"
	"sync"
	"time"
)

// link is one connection through the proxy.
type link struct {
	proxy  *Proxy
	client *net.TCPConn
	done   chan struct{} // closed when the link is over

	mu struct {
		sync.Mutex
		over   bool
		server *net.TCPConn // nil before it is connected
		answer *trap        // answers are withheld for it; nil unless it has sprung
	}
}

// chunk is what one read returned.
type chunk struct {
	bytes []byte
	due   time.Time // when it may arrive
}

// Bytes that are under way: a chunk is at most chunkSize, a direction has at most chunksUnderWay; a sender that
// has more waits, as at a full socket buffer.
const (
	chunkSize      = 32 << 10
	chunksUnderWay = 256
)

func (l *link) run() {
	defer l.close()
	if !l.proxy.passing(l) {
		return
	}
	l.proxy.mu.Lock()
	upstream := l.proxy.mu.upstream
	l.proxy.mu.Unlock()
	conn, err := net.DialTimeout("tcp", upstream, 10*time.Second)
	if err != nil {
		// The client sees that nobody is there.
		l.reset()
		return
	}
	server := conn.(*net.TCPConn)
	l.mu.Lock()
	l.mu.server = server
	over := l.mu.over
	l.mu.Unlock()
	if over {
		server.Close()
		return
	}
	var pumps sync.WaitGroup
	requests := &requestFilter{link: l}
	answers := &answerFilter{link: l}
	pumps.Go(func() { l.pump(l.client, server, requests.pass) })
	pumps.Go(func() { l.pump(server, l.client, answers.pass) })
	pumps.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.answer != nil {
		// The server went away without a whole answer. Otherwise cut has done it.
		l.mu.answer.spring()
	}
}

// pump carries one direction until either end closes. pass gets each chunk when it is due.
func (l *link) pump(from, to *net.TCPConn, pass func(to *net.TCPConn, sent []byte) error) {
	queue := make(chan chunk, chunksUnderWay)
	var reader sync.WaitGroup
	reader.Go(func() {
		defer close(queue)
		for {
			buffer := make([]byte, chunkSize)
			n, err := from.Read(buffer)
			if n > 0 {
				l.proxy.mu.Lock()
				due := time.Now().Add(l.proxy.mu.delay)
				l.proxy.mu.Unlock()
				select {
				case queue <- chunk{buffer[:n], due}:
				case <-l.done:
					return
				}
			}
			if err != nil {
				return // closed: the writer ends the link when it has passed the rest on
			}
		}
	})
	for c := range queue {
		if !l.until(c.due) || !l.proxy.passing(l) || pass(to, c.bytes) != nil {
			break
		}
	}
	// What one side closed is closed for the other too, once it may hear of it.
	l.proxy.passing(l)
	l.close()
	reader.Wait()
}

// until waits for a moment; false when the link ended before.
func (l *link) until(due time.Time) bool {
	wait := time.Until(due)
	if wait <= 0 {
		return true
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-l.done:
		return false
	}
}

func (l *link) ended() bool {
	select {
	case <-l.done:
		return true
	default:
		return false
	}
}

// close ends the link.
func (l *link) close() {
	l.finish(false)
	l.proxy.mu.Lock()
	delete(l.proxy.mu.links, l)
	l.proxy.mu.Unlock()
}

// reset ends the link so that both sides see an error (ECONNRESET), not an orderly end.
func (l *link) reset() { l.finish(true) }

func (l *link) finish(reset bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.over {
		return
	}
	l.mu.over = true
	close(l.done)
	for _, conn := range []*net.TCPConn{l.client, l.mu.server} {
		if conn == nil {
			continue
		}
		// Either fails only for a connection that is gone, which is what is wanted.
		if reset {
			_ = conn.SetLinger(0)
		}
		_ = conn.Close()
	}
}

// cut ends the link for a trap. The server's side ends in order, so that what was passed on still arrives.
func (l *link) cut(t *trap) {
	// Fails only for a connection that is gone, which is what is wanted.
	_ = l.client.SetLinger(0)
	l.finish(false)
	t.spring()
}

// requestFilter passes on what clients send, up to a trap.
type requestFilter struct {
	link   *link
	before []byte // the last bytes that were passed on, for a match that lies across two chunks
}

func (f *requestFilter) pass(to *net.TCPConn, sent []byte) error {
	t, passed := f.link.proxy.springs(f.before, sent)
	if t != nil && t.kind == beforeAnswer {
		// Before the server can answer.
		f.link.mu.Lock()
		f.link.mu.answer = t
		f.link.mu.Unlock()
	}
	if passed > 0 {
		if _, err := to.Write(sent[:passed]); err != nil {
			return err
		}
	}
	if t != nil && t.kind != beforeAnswer {
		f.link.cut(t)
		return io.ErrClosedPipe
	}
	f.before = last(append(f.before, sent...), longestMatch)
	return nil
}

// longestMatch is the longest text that CutBeforeRequest finds across two chunks.
const longestMatch = 4 << 10

func last(text []byte, n int) []byte { return text[max(0, len(text)-n):] }

// answerFilter passes on what the server sends, unless a trap withholds it.
type answerFilter struct {
	link     *link
	started  bool
	tls      bool
	withheld []byte // the end of it
}

func (f *answerFilter) pass(to *net.TCPConn, sent []byte) error {
	// The answer to a request for TLS is one byte; nothing else that a server begins with is so short.
	if !f.started {
		f.started, f.tls = true, string(sent) == "S"
	}
	f.link.mu.Lock()
	t := f.link.mu.answer
	f.link.mu.Unlock()
	if t == nil {
		_, err := to.Write(sent)
		return err
	}
	f.withheld = last(append(f.withheld, sent...), readyForQuerySize)
	if !f.tls && !isReadyForQuery(f.withheld) {
		return nil
	}
	f.link.cut(t)
	return io.ErrClosedPipe
}

// A server that has done all it was asked ends its answer with ReadyForQuery: 'Z', a length of 5, and the state of
// the transaction ('I'dle, in a 'T'ransaction, in one that 'E'rred).
const readyForQuerySize = 6

func isReadyForQuery(end []byte) bool {
	return len(end) == readyForQuerySize && string(end[:5]) == "Z\x00\x00\x00\x05" &&
		(end[5] == 'I' || end[5] == 'T' || end[5] == 'E')
}

// contains says whether text lies in the chunk, or begins before it and ends in it.
func contains(before, chunk []byte, text string) bool {
	if text == "" {
		return true
	}
	// One byte less than the text, so that a match wholly before the chunk is not found again.
	around := append(append([]byte(nil), last(before, len(text)-1)...), chunk...)
	return bytes.Contains(around, []byte(text))
}
