package sqlraft

import (
	"bytes"
	cryptorand "crypto/rand"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/tracker"

	"github.com/quire-db/quire/backend"
)

// worldPlan is what a history is like; it follows from the seed.
type worldPlan struct {
	members       int
	tick          int64
	electionTicks int
	requestTicks  int
	preVote       bool
	catchUp       int

	orderly             bool
	loss, double        float64
	delayLow, delayHigh int64
	syncLow, syncHigh   int64
	applyLow, applyHigh int64
	think, patience     int64
	clients, opsOfEach  int
	faults              int   // how many
	faultsEnd           int64 // until when
	partitions, crashes bool
	pauses, slowness    bool
	changes, wipes      bool
	transfers           bool
	segment             int64
}

func (w *world) drawPlan() {
	r := w.rand
	w.plan = worldPlan{
		members: []int{1, 3, 3, 3, 3, 3, 3, 5}[r.IntN(8)],
		tick:    100 * millisecond, electionTicks: 6 + r.IntN(7), requestTicks: 30 + r.IntN(60),
		preVote: r.IntN(8) > 0, catchUp: []int{2, 10, 50, 1000}[r.IntN(4)],
		orderly: r.IntN(2) == 0, loss: []float64{0, 0, 0.01, 0.05, 0.2}[r.IntN(5)], double: []float64{0, 0.05, 0.3}[r.IntN(3)],
		delayLow: 100 * microsecond, delayHigh: []int64{millisecond, 20 * millisecond, 200 * millisecond}[r.IntN(3)],
		syncLow: 0, syncHigh: []int64{0, 2 * millisecond, 50 * millisecond, 400 * millisecond}[r.IntN(4)],
		applyLow: 0, applyHigh: []int64{0, millisecond, 50 * millisecond, 500 * millisecond}[r.IntN(4)],
		think: []int64{50 * millisecond, 400 * millisecond, second}[r.IntN(3)], patience: 15 * second,
		clients: 2 + r.IntN(4), opsOfEach: 8 + r.IntN(22),
		faults: r.IntN(20), faultsEnd: 12 * second,
		partitions: r.IntN(2) == 0, crashes: r.IntN(4) > 0, pauses: r.IntN(3) == 0, slowness: r.IntN(3) == 0,
		transfers: r.IntN(3) == 0, segment: []int64{4 << 10, 64 << 10}[r.IntN(2)],
	}
	if w.plan.members > 1 {
		switch r.IntN(3) {
		case 0:
			w.plan.changes = true
		case 1:
			w.plan.wipes = true
		}
	}
	w.network.codec = r.IntN(8) == 0
	w.narrowPlan(r.IntN(8))
}

// narrowPlan makes some histories of the kinds that have found most.
func (w *world) narrowPlan(which int) {
	p, r := &w.plan, w.rand
	switch which {
	case 0: // few voters, who come and go
		p.members = 2 + r.IntN(2)
		p.changes, p.wipes, p.partitions, p.transfers = true, false, true, true
		p.faults, p.think, p.opsOfEach = 20+r.IntN(30), 20*millisecond, 40
	case 1: // copies of the state
		p.members, p.catchUp = 3, 1+r.IntN(3)
		p.changes, p.wipes, p.partitions, p.transfers, p.crashes = false, r.IntN(2) == 0, true, true, true
		p.faults, p.think, p.opsOfEach = 30+r.IntN(50), 20*millisecond, 100
	case 2: // everything
		p.members, p.catchUp = 3+r.IntN(3), []int{2, 10, 1000}[r.IntN(3)]
		p.changes, p.wipes, p.partitions, p.transfers, p.crashes, p.pauses = true, false, true, true, true, true
		p.faults = 40 + r.IntN(60)
	}
}

// populate makes the members of a new cluster, the clients and the watchers.
func (w *world) populate() {
	var initial backend.Membership
	initial.ClusterID = 1 + w.rand.Uint64()>>1
	for i := range w.plan.members {
		initial.Members = append(initial.Members, backend.Member{ID: uint64(i + 1), PeerURLs: []string{fmt.Sprint("http://", i+1)}})
	}
	for _, o := range initial.Members {
		m := w.addMember(o.ID)
		m.initial = initial
		w.after(w.between(0, second), func() { m.start() })
	}
	for i := range w.plan.clients {
		c := &simClient{w: w, id: i, left: w.plan.opsOfEach}
		w.clients = append(w.clients, c)
		w.after(w.between(0, second), c.next)
	}
	for range 2 {
		s := &simWatcher{w: w}
		w.watches = append(w.watches, s)
		w.after(0, s.look)
	}
}

func (w *world) addMember(id uint64) *simMember {
	m := &simMember{w: w, id: id, disk: newMemoryDisk(w.plan.segment)}
	m.machine = &modelMachine{m: m}
	w.members = append(w.members, m)
	return m
}

// run plays the history and returns what it broke.
func (w *world) run() error {
	w.drawPlan()
	w.say("%+v", w.plan)
	w.populate()
	for range w.plan.faults {
		w.after(second+w.rand.Int64N(w.plan.faultsEnd-second), w.fault)
	}
	w.runUntil(w.plan.faultsEnd, nil)
	w.heal()
	w.runUntil(w.now+60*second, w.settled)
	if w.broken == nil && !w.settled() {
		w.violate("a minute after the last fault not everything that clients asked for is answered, or members differ: %s", w.standing())
	}
	w.probe()
	w.check()
	w.note(6, uint64(len(w.events)), uint64(len(w.entries)))
	return w.broken
}

// heal ends all faults: everybody who belongs to the cluster is up, and all can talk.
func (w *world) heal() {
	w.say("all faults end")
	w.quiet = true
	w.plan.loss, w.plan.double, w.plan.catchUp = 0, 0, 1000
	w.plan.delayHigh, w.plan.syncHigh = min(w.plan.delayHigh, 20*millisecond), min(w.plan.syncHigh, 20*millisecond)
	for _, l := range sortedLinks(w.network.links) {
		l.cut, l.slow = false, 0
	}
	for _, m := range w.members {
		if m.paused {
			m.resume()
		}
		if m.core != nil {
			m.core.o.catchUpEntries = 1000 // who has to install a copy fails what it proposed
		}
		m.restartSoon()
	}
}

// settled says whether all that was asked is answered and everybody has applied the same.
func (w *world) settled() bool {
	for _, c := range w.clients {
		if c.left > 0 {
			return false
		}
	}
	for _, op := range w.ops {
		if !op.over {
			return false
		}
	}
	var first *simMember
	counted := map[uint64]bool{}
	now := w.belongs
	for _, m := range w.members {
		if m.gone || memberOf(now, m.id) == nil && (!m.started || !m.belonged || slices.Contains(now.Removed, m.id)) {
			continue // nobody let it in, or it was removed and has not heard of it
		}
		self := memberOf(m.machine.state.members, m.id)
		if !m.up || m.core.lead == 0 || m.core.rejoin.lost || self == nil || self.Learner && w.plan.wipes {
			return false
		}
		if first == nil {
			first = m
		}
		if m.machine.state.applied != first.machine.state.applied || m.core.hard.commit != first.core.hard.commit || m.core.handed.index != m.machine.state.applied {
			return false
		}
		counted[m.id] = true
	}
	// A leader that has not heard what a member has may send it a copy yet: it may have forgotten the entries while there
	// were faults.
	known := true
	for _, m := range w.members {
		if counted[m.id] && m.core.lead == m.id {
			m.core.rn.WithProgress(func(id uint64, _ raft.ProgressType, pr tracker.Progress) {
				known = known && (!counted[id] || pr.Match >= first.core.hard.commit)
			})
		}
	}
	return known
}

func (w *world) standing() (s string) {
	for _, m := range w.members {
		if m.core == nil {
			continue
		}
		s += fmt.Sprintf("\n  %x up %t gone %t applied %d, log %d to %d, %+v lead %x lost %t own %d of %v", m.id, m.up, m.gone, m.machine.state.applied,
			m.core.storage.first(), m.core.storage.last(), m.core.hard, m.core.lead, m.core.rejoin.lost, m.core.own.count, m.machine.state.members)
	}
	return s
}

// probe writes once more through each member: a healed cluster takes writes, each of them, and watchers see all.
func (w *world) probe() {
	if w.broken != nil {
		return
	}
	probes := 0
	for _, m := range w.members {
		if m.gone || !m.up || memberOf(w.belongs, m.id) == nil {
			continue
		}
		c := &simClient{w: w, id: len(w.clients), at: m}
		w.clients = append(w.clients, c)
		w.unique++
		op := &simOp{client: c.id, at: m.id, begin: w.now, command: modelCommand{unique: w.unique, value: int64(w.unique)}}
		w.ops = append(w.ops, op)
		probes++
		end := func() {
			if !op.over {
				op.over, op.end = true, w.now
				probes--
			}
		}
		m.input(func(c *core) { c.propose(op.command.encode(), false, &simTicket{op: op, done: end}) })
		w.after(20*second, end)
	}
	start := w.now
	w.runUntil(w.now+30*second, func() bool { return probes == 0 && w.settled() })
	if w.broken != nil {
		return
	}
	if probes > 0 {
		w.violate("%d members of a cluster without faults do not take a write: %s", probes, w.standing())
		return
	}
	for _, op := range w.ops {
		// Where hardly any entries are kept, a member may need a copy without a fault, which fails what it has under way.
		if w.plan.catchUp >= 1000 && op.begin >= start && !op.known && memberOf(w.belongs, op.at) != nil {
			w.violate("a write failed in a cluster without faults: %s", w.standing())
		}
	}
	for _, s := range w.watches {
		for _, m := range w.members {
			if m.up && memberOf(w.belongs, m.id) != nil {
				s.take(m)
			}
		}
		if s.seen != int64(len(w.events)) {
			w.violate("a watcher has seen %d of %d events", s.seen, len(w.events))
		}
	}
	for _, m := range w.members {
		if m.core != nil {
			w.counts.again += m.core.own.again
		}
	}
}

func sortedLinks(links map[[2]uint64]*simLink) []*simLink {
	var keys [][2]uint64
	for k := range links {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b [2]uint64) int { return slices.Compare(a[:], b[:]) })
	var sorted []*simLink
	for _, k := range keys {
		sorted = append(sorted, links[k])
	}
	return sorted
}

// worldRandom stands in for crypto/rand.Reader, from which Raft draws its election timeouts: a goroutine that plays a
// history gets the numbers of that history, all others true ones.
type worldRandom struct {
	true io.Reader
	mu   sync.Mutex
	of   map[string]*rand.Rand
}

func (r *worldRandom) Read(p []byte) (int, error) {
	r.mu.Lock()
	mine := r.of[goroutine()]
	r.mu.Unlock()
	if mine == nil {
		return r.true.Read(p)
	}
	for i := range p {
		p[i] = byte(mine.Uint32())
	}
	return len(p), nil
}

// goroutine tells goroutines apart; the runtime says who it is in no other way.
func goroutine() string {
	buf := make([]byte, 32)
	fields := bytes.Fields(buf[:runtime.Stack(buf, false)])
	return string(fields[1])
}

var simRandom *worldRandom

// replaceRandom lets histories be replayed until the test ends.
func replaceRandom(t testing.TB) {
	simRandom = &worldRandom{true: cryptorand.Reader, of: map[string]*rand.Rand{}}
	cryptorand.Reader = simRandom
	t.Cleanup(func() { cryptorand.Reader = simRandom.true })
}

func numberFrom(t *testing.T, name string) (uint64, bool) {
	text := os.Getenv(name)
	if text == "" {
		return 0, false
	}
	n, err := strconv.ParseUint(text, 0, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n, true
}

// TestSimulation plays histories (300, or QUIRE_SIMULATE of them) and checks each. QUIRE_SEED plays one again and tells
// all of it.
func TestSimulation(t *testing.T) {
	replaceRandom(t)
	if seed, ok := numberFrom(t, "QUIRE_SEED"); ok {
		w := newWorld(seed, func(line string) { fmt.Println(line) })
		if err := w.play(); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		t.Logf("%+v, trace %x", w.counts, w.trace)
		return
	}
	histories := uint64(300)
	if n, ok := numberFrom(t, "QUIRE_SIMULATE"); ok {
		histories = n
	} else if testing.Short() {
		histories = 50
	}
	first := uint64(time.Now().UnixNano()) >> 10 << 10
	if n, ok := numberFrom(t, "QUIRE_FIRST_SEED"); ok {
		first = n
	}
	t.Logf("%d histories from seed %d", histories, first)
	var mu sync.Mutex
	var total simCounts
	next, failed := uint64(0), 0
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for {
				mu.Lock()
				seed := first + next
				next++
				stop := next > histories || failed >= 5
				mu.Unlock()
				if stop {
					return
				}
				w := newWorld(seed, nil)
				err := w.play()
				mu.Lock()
				total.add(w.counts)
				if err != nil {
					failed++
					t.Errorf("QUIRE_SEED=%d: %v", seed, err)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	t.Logf("%+v", total)
	if histories >= 300 && failed == 0 && (total.acknowledged == 0 || total.crashes == 0 || total.cuts == 0 || total.snapshots == 0 ||
		total.rejoined == 0 || total.changes == 0 || total.transfers == 0 || total.again == 0) {
		t.Errorf("something that the simulation is for never happened: %+v", total)
	}
}

// play is run, with a panic for a violation.
func (w *world) play() (err error) {
	me := goroutine()
	simRandom.mu.Lock()
	simRandom.of[me] = rand.New(rand.NewPCG(w.seed, 0xe1ec7))
	simRandom.mu.Unlock()
	defer func() {
		if r := recover(); r != nil {
			buf := make([]byte, 16<<10)
			err = fmt.Errorf("panic after %.3f s: %v\n%s", float64(w.now)/float64(second), r, buf[:runtime.Stack(buf, false)])
		}
	}()
	return w.run()
}

func (c *simCounts) add(o simCounts) {
	c.acknowledged += o.acknowledged
	c.elections += o.elections
	c.crashes += o.crashes
	c.cuts += o.cuts
	c.snapshots += o.snapshots
	c.rejoined += o.rejoined
	c.changes += o.changes
	c.transfers += o.transfers
	c.again += o.again
}

// TestSimulationReplays: a history follows from its seed.
func TestSimulationReplays(t *testing.T) {
	replaceRandom(t)
	for seed := range uint64(20) {
		a, b := newWorld(seed, nil), newWorld(seed, nil)
		errA, errB := a.play(), b.play()
		if a.trace != b.trace || fmt.Sprint(errA) != fmt.Sprint(errB) {
			t.Fatalf("seed %d: trace %x (%v) and then %x (%v)", seed, a.trace, errA, b.trace, errB)
		}
	}
}

// simMistakes are what a driver of cores could do wrong. Members of a world can be made to do it.
type simMistakes struct {
	noSync, noHardState, readsDoNotWait bool
}

// TestSimulationFindsMistakes: each of them shows in one of the first histories.
func TestSimulationFindsMistakes(t *testing.T) {
	replaceRandom(t)
	for name, mistakes := range map[string]simMistakes{
		"entries are acknowledged before they are synced": {noSync: true},
		"votes are given before they are written":         {noHardState: true},
		"reads do not wait for what they have to see":     {readsDoNotWait: true},
	} {
		found := error(nil)
		for seed := range uint64(3000) {
			w := newWorld(seed, nil)
			w.mistakes = mistakes
			if found = w.play(); found != nil {
				t.Logf("%s: history %d: %.150v", name, seed, found)
				break
			}
		}
		if found == nil {
			t.Errorf("%s: no history shows it", name)
		}
	}
}
