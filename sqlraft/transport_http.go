package sqlraft

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Paths of the peer port beside streams and snapshots. The first two are etcd's and open to anybody who can connect.
const (
	membersPath = "/members"
	versionPath = "/version"
	requestPath = "/raft/request/"
)

// Headers, etcd's where it has them.
const (
	headerCluster  = "X-Etcd-Cluster-Id"
	headerFrom     = "X-Server-From"
	headerTo       = "X-Raft-To"
	headerPeerURLs = "X-Peerurls"
	headerProtocol = "X-Raft-Protocol"
	headerLane     = "X-Raft-Lane"
	headerBack     = "X-Raft-Back" // "1": whoever dials knows the other only because the other dials it
	headerRefusal  = "X-Raft-Refusal"
)

// Bounds of requests between members and their answers: bytes, and the time that each may take on the line.
const (
	maxRequestBody = 16 << 20
	requestTimeout = 30 * time.Second
)

// refusal is why a member does not let another one in, as the one says it and the other reads it.
type refusal struct {
	by     uint64 // only for who reads it
	status int
	word   string // in the header
	text   string
	is     error // nil: nothing that lasts
}

func (r *refusal) Error() string {
	if r.by == 0 {
		return r.text
	}
	return fmt.Sprintf("member %x refuses this one: %s", r.by, r.text)
}
func (r *refusal) Unwrap() error { return r.is }

// Words for headerRefusal.
const (
	refusedRemoved = "removed"
	refusedCluster = "cluster"
	refusedMember  = "member"
)

func (r *refusal) write(w http.ResponseWriter) {
	if r.word != "" {
		w.Header().Set(headerRefusal, r.word)
	}
	http.Error(w, r.text, r.status)
}

// refusalOf reads what a member has answered instead of the welcome that was asked for.
func refusalOf(answer *http.Response, by, cluster uint64) error {
	text, err := io.ReadAll(io.LimitReader(answer.Body, 4<<10))
	if err != nil {
		return fmt.Errorf("sqlraft: reading why member %x answers %s: %w", by, answer.Status, err)
	}
	r := &refusal{by: by, status: answer.StatusCode, word: answer.Header.Get(headerRefusal)}
	if r.text = strings.TrimSpace(string(text)); r.text == "" {
		r.text = answer.Status
	}
	switch r.word {
	case refusedRemoved:
		// Final, so it must come from the one that was asked: URLs may lead to another cluster by now.
		if answer.Header.Get(headerFrom) == hexID(by) && answer.Header.Get(headerCluster) == hexID(cluster) {
			r.is = ErrRemoved
		}
	case refusedCluster:
		r.is = errWrongCluster
	case refusedMember:
		r.is = errWrongMember
	}
	return r
}

// hexID is how etcd writes ids.
func hexID(id uint64) string { return strconv.FormatUint(id, 16) }

func parseID(s string) (uint64, error) {
	id, err := strconv.ParseUint(s, 16, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is not an id in hexadecimal", s)
	}
	return id, nil
}

// newRequest makes a request by which member to knows who asks.
func (t *transport) newRequest(ctx context.Context, method, url string, body io.Reader, to, cluster uint64) (*http.Request, error) {
	r, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return nil, err
	}
	r.Host = "peer" // socket files have no host
	r.Header.Set(headerCluster, hexID(cluster))
	r.Header.Set(headerFrom, hexID(t.o.id))
	r.Header.Set(headerTo, hexID(to))
	r.Header.Set(headerProtocol, streamProtocol)
	if self := memberOf(t.o.handler.membership(), t.o.id); self != nil {
		r.Header.Set(headerPeerURLs, strings.Join(self.PeerURLs, ","))
	}
	return r, nil
}

// admit finds out which member asks, and whether it may.
func (t *transport) admit(r *http.Request) (from uint64, _ *refusal) {
	cluster := t.o.clusterID()
	if cluster == 0 {
		return 0, &refusal{status: http.StatusServiceUnavailable, text: "this member does not know its cluster yet"}
	}
	from, err := parseID(r.Header.Get(headerFrom))
	if err != nil {
		return 0, &refusal{status: http.StatusBadRequest, text: headerFrom + ": " + err.Error()}
	}
	if got := r.Header.Get(headerCluster); got != hexID(cluster) {
		return from, &refusal{status: http.StatusPreconditionFailed, word: refusedCluster, is: errWrongCluster,
			text: fmt.Sprintf("%v: this member belongs to cluster %x, member %x to %s", errWrongCluster, cluster, from, got)}
	}
	if got := r.Header.Get(headerTo); got != hexID(t.o.id) {
		return from, &refusal{status: http.StatusPreconditionFailed, word: refusedMember, is: errWrongMember,
			text: fmt.Sprintf("%v: this is member %x, not %s; check the peer URLs", errWrongMember, t.o.id, got)}
	}
	if from == t.o.id {
		return from, &refusal{status: http.StatusPreconditionFailed, word: refusedMember, is: errWrongMember,
			text: fmt.Sprintf("%v: this member itself is %x; two servers were started with the same data", errWrongMember, from)}
	}
	if slices.Contains(t.o.handler.membership().Removed, from) {
		return from, &refusal{status: http.StatusGone, word: refusedRemoved, text: ErrRemoved.Error(), is: ErrRemoved}
	}
	if got := r.Header.Get(headerProtocol); got != streamProtocol {
		return from, &refusal{status: http.StatusPreconditionFailed,
			text: fmt.Sprintf("members speak protocol %s here, not %q; upgrade the older one", streamProtocol, got)}
	}
	return from, nil
}

// serveHTTP answers everything on the peer port.
func (t *transport) serveHTTP(w http.ResponseWriter, r *http.Request) {
	if !t.begin() {
		http.Error(w, errTransportClosed.Error(), http.StatusServiceUnavailable)
		return
	}
	defer t.wg.Done()
	w.Header().Set(headerCluster, hexID(t.o.clusterID()))
	w.Header().Set(headerFrom, hexID(t.o.id))
	method, serve := http.MethodGet, (func(http.ResponseWriter, *http.Request, uint64))(nil)
	switch path := r.URL.Path; {
	case path == membersPath:
		t.serveMembers(w, r)
		return
	case path == versionPath && t.o.version != nil:
		if allow(w, r, http.MethodGet) {
			writeJSON(w, t.o.version())
		}
		return
	case path == streamPath:
		serve = t.serveStream
	case path == offerPath:
		serve = t.serveOffer
	case strings.HasPrefix(path, snapshotPath):
		serve = t.serveSnapshot
	case strings.HasPrefix(path, requestPath):
		method, serve = http.MethodPost, t.serveRequest
	default:
		http.NotFound(w, r)
		return
	}
	if !allow(w, r, method) {
		return
	}
	from, refused := t.admit(r)
	if refused != nil {
		t.reject(r.RemoteAddr, from, refused)
		refused.write(w)
		return
	}
	serve(w, r, from)
}

func allow(w http.ResponseWriter, r *http.Request, method string) bool {
	if r.Method == method || method == http.MethodGet && r.Method == http.MethodHead {
		return true
	}
	w.Header().Set("Allow", method)
	http.Error(w, "Method Not Allowed", http.StatusMethodNotAllowed)
	return false
}

// writeJSON: whoever has asked may be gone, which is nobody's concern.
func writeJSON(w http.ResponseWriter, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(body)
}

func (t *transport) serveMembers(w http.ResponseWriter, r *http.Request) {
	if !allow(w, r, http.MethodGet) {
		return
	}
	body, err := json.Marshal(t.o.handler.membership().Members)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	writeJSON(w, append(body, '\n'))
}

// serveStream lets a stream in: the connection leaves HTTP and gets a goroutine of its own.
func (t *transport) serveStream(w http.ResponseWriter, r *http.Request, from uint64) {
	l := lane(slices.Index(laneNames[:], r.Header.Get(headerLane)))
	if l < 0 || !strings.EqualFold(r.Header.Get("Upgrade"), streamUpgrade) {
		http.Error(w, "not a stream of members", http.StatusBadRequest)
		return
	}
	p, err := t.peerOf(r, from)
	if err != nil {
		t.reject(r.RemoteAddr, from, err)
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		p.disconnect(&incoming{lane: l}, err) // it may be a stranger, who was made for this
		return
	}
	// net/http has left its deadlines behind; timedConn sets new ones.
	_, offered := conn.(*offeredConn)
	in := &incoming{p: p, lane: l, since: time.Now(), done: make(chan struct{}), offered: offered,
		conn: &timedConn{Conn: conn, timeout: t.o.readTimeout}}
	// What net/http has read ahead comes first.
	ahead, err := buffered.Reader.Peek(buffered.Reader.Buffered())
	if err == nil {
		in.r = bufio.NewReaderSize(io.MultiReader(bytes.NewReader(bytes.Clone(ahead)), in), streamBuffer)
		err = t.welcome(in.conn, streamUpgrade)
	}
	if err != nil || !t.run(in.serve) {
		_ = conn.Close() // it dials again
		p.disconnect(in, err)
	}
}

// askUpgrade asks member to for a connection that leaves HTTP.
func (t *transport) askUpgrade(w io.Writer, r *bufio.Reader, path, upgrade string, to, cluster uint64, header map[string]string) error {
	request, err := t.newRequest(context.Background(), http.MethodGet, "http://"+upgrade+path, nil, to, cluster)
	if err != nil {
		return err
	}
	request.Header.Set("Connection", "Upgrade")
	request.Header.Set("Upgrade", upgrade)
	for k, v := range header {
		request.Header.Set(k, v)
	}
	if err := request.Write(w); err != nil {
		return err
	}
	if b, ok := w.(*bufio.Writer); ok {
		if err := b.Flush(); err != nil {
			return err
		}
	}
	answer, err := http.ReadResponse(r, request)
	if err != nil {
		return err
	}
	if answer.StatusCode == http.StatusSwitchingProtocols && answer.Header.Get("Upgrade") == upgrade {
		return nil
	}
	return refusalOf(answer, to, cluster)
}

// welcome is the answer to askUpgrade.
func (t *transport) welcome(w io.Writer, upgrade string) error {
	_, err := fmt.Fprintf(w, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n%s: %s\r\n%s: %s\r\n\r\n",
		upgrade, headerCluster, hexID(t.o.clusterID()), headerFrom, hexID(t.o.id))
	return err
}

// peerOf returns the peer from, which may be a stranger.
func (t *transport) peerOf(r *http.Request, from uint64) (*peer, error) {
	if p := t.peer(from); p != nil {
		return p, nil
	}
	var urls []string
	if m := memberOf(t.o.handler.membership(), from); m != nil {
		urls = m.PeerURLs
	} else if r.Header.Get(headerBack) != "" {
		return nil, errNoMember // else two strangers would keep each other forever
	} else if given := r.Header.Get(headerPeerURLs); given != "" {
		urls = strings.Split(given, ",")
	}
	for _, u := range urls {
		if _, err := targetOf(u); err != nil {
			return nil, err
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.closed {
		return nil, errTransportClosed
	}
	if p := t.mu.peers[from]; p != nil {
		return p, nil
	}
	strangers := 0
	for _, p := range t.mu.peers {
		if !p.isMember() {
			strangers++
		}
	}
	if strangers >= maxStrangers {
		return nil, fmt.Errorf("sqlraft: %d members that this one has not heard of are connected already", strangers)
	}
	return t.addPeer(from, urls, false), nil
}

// remoteError is what another member's handler has returned.
type remoteError struct{ text string }

func (e *remoteError) Error() string { return e.text }

func (t *transport) serveRequest(w http.ResponseWriter, r *http.Request, from uint64) {
	control := http.NewResponseController(w)
	err := control.SetReadDeadline(time.Now().Add(requestTimeout))
	var body []byte
	if err == nil {
		body, err = io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequestBody))
	}
	if err == nil {
		err = control.SetReadDeadline(time.Time{})
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	answer, err := t.o.handler.serve(r.Context(), from, strings.TrimPrefix(r.URL.Path, requestPath), body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	if err := control.SetWriteDeadline(time.Now().Add(requestTimeout)); err == nil {
		_, _ = w.Write(answer) // whoever has asked may be gone
	}
}

// request asks a member something small, over a connection of its own. An error of the other side's handler is a
// *remoteError with its text. When the request may have arrived it is not repeated; only connections that cannot be
// made are tried at the member's other URLs.
func (t *transport) request(ctx context.Context, id uint64, path string, body []byte) ([]byte, error) {
	if !t.begin() {
		return nil, errTransportClosed
	}
	defer t.wg.Done()
	ctx, cancel := t.bound(ctx)
	defer cancel()
	answer, err := t.ask(ctx, id, http.MethodPost, requestPath+path, body, nil)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	switch answer.StatusCode {
	case http.StatusOK:
		b, err := io.ReadAll(io.LimitReader(answer.Body, maxRequestBody+1))
		if err == nil && len(b) > maxRequestBody {
			err = fmt.Errorf("sqlraft: member %x answers %s with more than %d bytes", id, path, maxRequestBody)
		}
		return b, err
	case http.StatusInternalServerError:
		b, err := io.ReadAll(io.LimitReader(answer.Body, 64<<10))
		if err != nil {
			return nil, err
		}
		return nil, &remoteError{text: strings.TrimSuffix(string(b), "\n")}
	}
	return nil, refusalOf(answer, id, t.o.clusterID())
}

// bound returns a context that ends with the transport, too.
func (t *transport) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(t.ctx, cancel)
	return ctx, func() { stop(); cancel() }
}

var errUnknownMember = errors.New("sqlraft: no such member is known here")

// ask sends one HTTP request to a member. The caller closes the answer's body, and holds a count of t.wg.
func (t *transport) ask(ctx context.Context, id uint64, method, path string, body []byte, header http.Header) (*http.Response, error) {
	p := t.peer(id)
	cluster := t.o.clusterID()
	if p == nil || cluster == 0 {
		return nil, fmt.Errorf("%w: %x", errUnknownMember, id)
	}
	send := func(client *http.Client, target string) (*http.Response, error) {
		r, err := t.newRequest(ctx, method, target, bytes.NewReader(body), id, cluster)
		if err != nil {
			return nil, err
		}
		for k, v := range header {
			r.Header[k] = v
		}
		return client.Do(r)
	}
	escaped := (&url.URL{Path: path}).EscapedPath()
	var failed error
	var dialling *dialError
	if p.out[prompt].dialled() == "" && p.hasOffer() { // this member does not reach it
		answer, err := send(p.byOffer, "http://"+offerUpgrade+escaped)
		if err == nil || !errors.As(err, &dialling) || ctx.Err() != nil {
			return answer, err
		}
	}
	for _, u := range p.urls() {
		target, err := httpURL(u, escaped)
		if err != nil {
			return nil, err
		}
		answer, err := send(t.client, target)
		if err == nil || !errors.As(err, &dialling) || ctx.Err() != nil {
			return answer, err
		}
		failed = cmp.Or(failed, err)
	}
	return nil, cmp.Or(failed, fmt.Errorf("sqlraft: member %x has no peer URL", id))
}
