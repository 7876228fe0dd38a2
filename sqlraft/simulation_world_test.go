package sqlraft

import (
	"bufio"
	"bytes"
	"container/heap"
	"fmt"
	"math/rand/v2"
	"slices"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/quire-db/quire/backend"
)

// world is one history: members, network, disks, clients and faults, all driven by one goroutine from one seed. Time is
// in microseconds.
type world struct {
	seed   uint64
	rand   *rand.Rand
	now    int64
	queue  eventQueue
	order  uint64
	trace  uint64       // of everything that happens
	tell   func(string) // nil: nobody listens
	broken error        // the first violation

	plan     worldPlan
	members  []*simMember // in the order of their ids
	network  simNetwork
	clients  []*simClient
	watches  []*simWatcher
	quiet    bool // no more faults
	mistakes simMistakes

	wiped      *simMember // lost its disk last
	isOut      bool       // and was taken out of the cluster since
	promotedAt uint64     // index at which it got its vote again; 0: not yet

	// What is known of the log, whoever applied it first.
	entries   map[uint64]uint64  // index → identity of the entry
	states    map[uint64]uint64  // index → hash of the state
	newest    uint64             // index
	belongs   backend.Membership // as of newest
	positions map[uint64]appliedAt
	events    []modelEvent      // by revision
	leaders   map[uint64]uint64 // term → who led it
	unique    uint64
	ops       []*simOp
	counts    simCounts
}

// simCounts say what a history was made of.
type simCounts struct {
	acknowledged, elections, crashes, cuts, snapshots, rejoined, changes, transfers, again int
}

// appliedAt is where a command was applied.
type appliedAt struct {
	index  uint64
	at     int
	result modelResult
}

type event struct {
	at    int64
	order uint64
	do    func()
}

type eventQueue []event

func (q eventQueue) Len() int { return len(q) }
func (q eventQueue) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].order < q[j].order
}
func (q eventQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *eventQueue) Push(x any)   { *q = append(*q, x.(event)) }
func (q *eventQueue) Pop() any {
	old := *q
	e := old[len(old)-1]
	old[len(old)-1].do = nil
	*q = old[:len(old)-1]
	return e
}

const (
	microsecond = int64(1)
	millisecond = 1000 * microsecond
	second      = 1000 * millisecond
)

func newWorld(seed uint64, tell func(string)) *world {
	w := &world{
		seed: seed, rand: rand.New(rand.NewPCG(seed, 0x51_0c_4a)), tell: tell, trace: mix(1, seed),
		entries: map[uint64]uint64{}, states: map[uint64]uint64{}, positions: map[uint64]appliedAt{}, leaders: map[uint64]uint64{},
	}
	w.network.w = w
	return w
}

// after has do called in a while.
func (w *world) after(delay int64, do func()) {
	w.order++
	heap.Push(&w.queue, event{w.now + delay, w.order, do})
}

// runUntil lets things happen until a time, or until done says so.
func (w *world) runUntil(end int64, done func() bool) {
	for w.broken == nil && len(w.queue) > 0 && w.queue[0].at <= end {
		e := heap.Pop(&w.queue).(event)
		w.now = e.at
		e.do()
		if w.order > 5_000_000 {
			w.violate("it does not come to an end")
		}
		if done != nil && done() {
			return
		}
	}
	if w.broken == nil {
		w.now = max(w.now, end)
	}
}

// note adds to the trace.
func (w *world) note(what uint64, vs ...uint64) {
	w.trace = mix(mix(w.trace, uint64(w.now), what), vs...)
}

func (w *world) say(format string, args ...any) {
	if w.tell != nil {
		w.tell(fmt.Sprintf("%8.3f ", float64(w.now)/float64(second)) + fmt.Sprintf(format, args...))
	}
}

// violate notes that a promise is broken.
func (w *world) violate(format string, args ...any) {
	if w.broken == nil {
		w.broken = fmt.Errorf("after %.6f s: "+format, append([]any{float64(w.now) / float64(second)}, args...)...)
		w.say("VIOLATION %v", w.broken)
	}
}

// between draws a number from a range, mostly a small one.
func (w *world) between(low, high int64) int64 {
	if high <= low {
		return low
	}
	f := w.rand.Float64()
	return low + int64(f*f*float64(high-low))
}

func (w *world) chance(p float64) bool { return p > 0 && w.rand.Float64() < p }

func (w *world) member(id uint64) *simMember {
	for _, m := range w.members {
		if m.id == id {
			return m
		}
	}
	return nil
}

// sameEntry and sameState compare what members apply.
func (w *world) sameEntry(id, index, identity uint64) {
	if known, ok := w.entries[index]; ok && known != identity {
		w.violate("%x applies an entry %d that differs from the one that others applied", id, index)
	}
	w.entries[index] = identity
}

func (w *world) sameState(id uint64, s *modelState) {
	if known, ok := w.states[s.applied]; ok && known != s.hash {
		w.violate("the state of %x as of entry %d is not that of others", id, s.applied)
	}
	w.states[s.applied] = s.hash
	if s.applied > w.newest {
		w.newest, w.belongs = s.applied, s.members
		if w.wiped != nil {
			x := memberOf(s.members, w.wiped.id)
			w.isOut = w.isOut || x == nil
			if w.isOut && x != nil && !x.Learner && w.promotedAt == 0 {
				w.promotedAt = s.applied
			}
		}
		for _, o := range s.members.Members {
			if m := w.member(o.ID); m != nil {
				m.belonged = true
			}
		}
	}
	w.note(1, id, s.applied, s.hash)
}

// applied notes what a command did; it does so once.
func (w *world) applied(id, index uint64, at int, c modelCommand, r modelResult) {
	where := appliedAt{index, at, r}
	if known, ok := w.positions[c.unique]; ok && known != where {
		w.violate("%x applies a proposal at entry %d (%d) that was applied at entry %d (%d)", id, index, at, known.index, known.at)
	}
	w.positions[c.unique] = where
	if !r.done {
		return
	}
	e := modelEvent{r.revision, c.key, c.value}
	if n := int64(len(w.events)); e.revision == n+1 {
		w.events = append(w.events, e)
	} else if e.revision > n || w.events[e.revision-1] != e {
		w.violate("%x makes revision %d of something else than others did", id, e.revision)
	}
}

// leads notes that a member leads.
func (w *world) leads(id, term uint64) {
	if known, ok := w.leaders[term]; ok && known != id {
		w.violate("%x and %x both lead term %d", known, id, term)
	} else if !ok {
		w.counts.elections++
		w.say("%x leads term %d", id, term)
	}
	w.leaders[term] = id
}

// simNetwork carries packets. When it is orderly, each lane from one member to another is a connection: what it carries
// arrives in order, or it breaks and everything under way is lost. Otherwise packets are lost, doubled and overtaken.
type simNetwork struct {
	w     *world
	links map[[2]uint64]*simLink
	codec bool // packets are encoded and decoded
}

type simLink struct {
	cut   bool
	epoch int
	last  [lanes]int64 // when the newest packet arrives
	slow  int64        // extra delay
}

func (n *simNetwork) link(from, to uint64) *simLink {
	if n.links == nil {
		n.links = map[[2]uint64]*simLink{}
	}
	key := [2]uint64{from, to}
	if n.links[key] == nil {
		n.links[key] = &simLink{}
	}
	return n.links[key]
}

// breakLink loses everything under way.
func (n *simNetwork) breakLink(from, to uint64) { n.link(from, to).epoch++ }

func (n *simNetwork) send(packets []packet) {
	w := n.w
	for _, p := range packets {
		l := n.link(p.from, p.to)
		if l.cut || w.chance(w.plan.loss) {
			if w.plan.orderly {
				n.breakLink(p.from, p.to)
			}
			n.lost(p.from, p.to)
			continue
		}
		times := 1
		if !w.plan.orderly && w.chance(w.plan.double) {
			times = 2
		}
		for range times {
			at := w.now + w.between(w.plan.delayLow, w.plan.delayHigh) + l.slow
			if w.plan.orderly {
				lane := laneOf(&p)
				at = max(at, l.last[lane])
				l.last[lane] = at
			}
			epoch := l.epoch
			p := n.carry(p)
			w.after(at-w.now, func() { n.deliver(p, epoch) })
		}
	}
}

// lost tells the sender, as the transport does.
func (n *simNetwork) lost(from, to uint64) {
	n.w.after(n.w.between(millisecond, 100*millisecond), func() {
		if m := n.w.member(from); m != nil {
			m.input(func(c *core) { c.unreachable(to) })
		}
	})
}

func (n *simNetwork) deliver(p packet, epoch int) {
	l := n.link(p.from, p.to)
	if l.cut || l.epoch != epoch {
		n.lost(p.from, p.to)
		return
	}
	m := n.w.member(p.to)
	if m == nil || !m.up {
		n.lost(p.from, p.to)
		return
	}
	if s := n.w.member(p.from); s != nil && slices.Contains(m.machine.state.members.Removed, p.from) {
		s.w.after(millisecond, func() { s.leave(s.life) })
		return
	}
	n.w.note(2, p.from, p.to, packetKind(&p))
	m.input(func(c *core) { c.receive(p) })
}

func packetKind(p *packet) uint64 {
	switch {
	case p.message != nil:
		return mix(uint64(p.message.GetType()), p.message.GetTerm(), p.message.GetIndex(), uint64(len(p.message.GetEntries())), p.message.GetCommit())
	case p.forward != nil:
		return mix(100, p.forward.session, p.forward.first, uint64(len(p.forward.proposals)))
	default:
		return mix(101, p.taken.session, p.taken.upTo)
	}
}

// carry puts a packet through the wire's format and back, in some of the histories.
func (n *simNetwork) carry(p packet) packet {
	if !n.codec {
		return p
	}
	var f frame
	var wire bytes.Buffer
	if err := f.encode(&p); err != nil {
		n.w.violate("encoding a packet: %v", err)
		return p
	}
	if err := f.write(&wire); err != nil {
		n.w.violate("writing a packet: %v", err)
		return p
	}
	body, err := readFrame(bufio.NewReader(&wire))
	if err != nil {
		n.w.violate("reading a packet: %v", err)
		return p
	}
	got, err := decode(body)
	if err != nil {
		n.w.violate("decoding a packet: %v", err)
		return p
	}
	got.from, got.to = p.from, p.to
	return got
}

// entriesOf is for say.
func describe(p *packet) string {
	switch {
	case p.message != nil && p.message.GetType() == raftpb.MsgApp:
		return fmt.Sprintf("MsgApp term %d after %d: %d entries, commit %d", p.message.GetTerm(), p.message.GetIndex(), len(p.message.GetEntries()), p.message.GetCommit())
	case p.message != nil:
		return fmt.Sprintf("%v term %d index %d commit %d reject %t", p.message.GetType(), p.message.GetTerm(), p.message.GetIndex(), p.message.GetCommit(), p.message.GetReject())
	case p.forward != nil:
		return fmt.Sprintf("forward term %d session %x: %d from %d", p.forward.term, p.forward.session, len(p.forward.proposals), p.forward.first)
	default:
		return fmt.Sprintf("taken %+v", *p.taken)
	}
}
