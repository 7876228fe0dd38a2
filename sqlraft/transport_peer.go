package sqlraft

import (
	"context"
	"errors"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"go.etcd.io/raft/v3/raftpb"
)

// lane tells the two streams to a member apart. Each is a connection of its own, so that a heartbeat does not wait
// behind megabytes of entries, neither in a queue of ours nor in one of the kernel's.
type lane int

const (
	// prompt carries what is small and expected soon: heartbeats, votes, answers, read indexes.
	prompt lane = iota
	// bulk carries entries and proposals. All MsgApp go here, empty ones too: raft takes one that overtakes another
	// for a gap.
	bulk
	lanes
)

var laneNames = [lanes]string{prompt: "prompt", bulk: "bulk"}

func laneOf(p *packet) lane {
	switch {
	case p.forward != nil:
		return bulk
	case p.message != nil && (p.message.GetType() == raftpb.MsgApp || p.message.GetType() == raftpb.MsgSnap):
		return bulk
	}
	return prompt
}

// maxStrangers bounds how many members that this one has not heard of yet may be connected.
const maxStrangers = 16

var (
	errNoMember = errors.New("sqlraft: not a member any more")
	errReplaced = errors.New("sqlraft: the member has connected anew")
	errBroken   = errors.New("sqlraft: a connection broke")
)

// peer is another member.
//
// One that this member has not heard of yet is a stranger: a member that was away learns of those that joined
// meanwhile from their entries, which it must take and answer. A stranger is known by its own account, and forgotten
// when it leaves.
//
// Lock order: note, mu, outgoing.mu.
type peer struct {
	t   *transport
	id  uint64
	ctx context.Context // done when the peer is dropped
	cut context.CancelFunc
	out [lanes]*outgoing
	// byOffer asks on connections that the peer has offered.
	byOffer *http.Client

	mu struct {
		sync.Mutex
		urls   []string
		member bool
		in     [lanes]*incoming
		failed map[string]failure // by URL: what was told of dialling it

		offers   []*offer // that the peer has made, the newest last
		offering int      // goroutines that make the peer offers
	}
	// note serializes what is told of connected and lost.
	note struct {
		sync.Mutex
		active bool
	}
}

type failure struct {
	text string
	at   time.Time
}

// addPeer starts dialling. REQUIRES: t.mu is held, not closed, no such peer.
func (t *transport) addPeer(id uint64, urls []string, member bool) *peer {
	p := &peer{t: t, id: id}
	p.mu.urls, p.mu.member = slices.Clone(urls), member
	p.byOffer = p.offerClient()
	p.ctx, p.cut = context.WithCancel(t.ctx)
	t.mu.peers[id] = p
	for l := range p.out {
		out := &outgoing{p: p, lane: lane(l), wake: make(chan struct{}, 1), retry: make(chan struct{}, 1)}
		p.out[l] = out
		t.wg.Add(1)
		go func() {
			defer t.wg.Done()
			out.run()
		}()
	}
	return p
}

func (p *peer) isMember() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mu.member
}

func (p *peer) urls() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mu.urls
}

// update makes the peer a member. A connection to a URL that is not its own any more is ended.
func (p *peer) update(urls []string) {
	p.mu.Lock()
	same := slices.Equal(p.mu.urls, urls)
	p.mu.member = true
	if !same {
		p.mu.urls, p.mu.failed = slices.Clone(urls), nil
	}
	p.mu.Unlock()
	if same {
		return
	}
	for _, out := range p.out {
		out.keepTo(urls)
		out.retryNow()
	}
}

// end cuts the peer off. REQUIRES: it is not in t.mu.peers any more.
func (p *peer) end(why error) {
	p.cut()
	p.mu.Lock()
	in := p.mu.in
	p.mu.Unlock()
	p.dropOffers()
	for _, i := range in {
		if i != nil {
			i.end(why)
		}
	}
}

// connect makes in the peer's incoming stream of its lane. An older one is ended first: its packets come before those
// of the new one. It returns false when the peer was dropped meanwhile.
func (p *peer) connect(in *incoming) bool {
	p.mu.Lock()
	old := p.mu.in[in.lane]
	p.mu.in[in.lane] = in
	p.mu.Unlock()
	if old != nil {
		old.end(errReplaced)
		<-old.done
	}
	if p.ctx.Err() != nil {
		p.disconnect(in, errNoMember)
		return false
	}
	// It lives, so that dialling it is worth a try at once.
	for _, out := range p.out {
		out.retryNow()
	}
	p.noteState(nil)
	return true
}

// disconnect forgets in, and with the last one a stranger.
func (p *peer) disconnect(in *incoming, why error) {
	p.mu.Lock()
	if p.mu.in[in.lane] == in {
		p.mu.in[in.lane] = nil
	}
	gone := p.mu.in == [lanes]*incoming{}
	leaves := gone && !p.mu.member
	p.mu.Unlock()
	p.noteState(why)
	if gone { // who offers reaches this member
		p.dropOffers()
	}
	p.offerSoon()
	if !leaves {
		return
	}
	p.t.mu.Lock()
	p.mu.Lock()
	leaves = !p.mu.member && p.mu.in == [lanes]*incoming{} && p.t.mu.peers[p.id] == p
	p.mu.Unlock()
	if leaves {
		delete(p.t.mu.peers, p.id)
	}
	p.t.mu.Unlock()
	if leaves {
		p.cut()
	}
}

func (p *peer) activeSince() (time.Time, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var since time.Time
	later := func(at time.Time) bool {
		if at.After(since) {
			since = at
		}
		return !at.IsZero()
	}
	for l := range lanes {
		if p.mu.in[l] == nil || !later(p.mu.in[l].since) || !later(p.out[l].upSince()) {
			return time.Time{}, false
		}
	}
	return since, true
}

// noteState calls the hooks when the peer has become active or inactive, the latter because of err.
func (p *peer) noteState(err error) {
	p.note.Lock()
	defer p.note.Unlock()
	_, active := p.activeSince()
	if active == p.note.active {
		return
	}
	p.note.active = active
	if active {
		p.mu.Lock()
		p.mu.failed = nil
		p.mu.Unlock()
		p.t.o.hooks.connected(p.id)
	} else {
		if err == nil { // whoever knows comes second
			err = errBroken
		}
		p.t.o.hooks.lost(p.id, err)
	}
}

// noteFailure tells that dialling failed, unless that was told of late.
func (p *peer) noteFailure(url string, err error) {
	p.mu.Lock()
	before, now := p.mu.failed[url], failure{withoutPorts(err), time.Now()}
	tell := now.text != before.text || now.at.Sub(before.at) >= 30*time.Second
	if tell {
		if p.mu.failed == nil {
			p.mu.failed = map[string]failure{}
		}
		p.mu.failed[url] = now
	}
	p.mu.Unlock()
	if tell {
		p.t.o.hooks.unreached(p.id, url, err)
	}
}

// withoutPorts is the text of err without the address that the connection came from, which is never twice the same.
func withoutPorts(err error) string {
	var op *net.OpError
	if errors.As(err, &op) && op.Err != nil {
		return op.Op + " " + op.Err.Error()
	}
	return err.Error()
}
