package watchpoller

import (
	"bytes"
	"math/rand/v2"
)

// A keyRange is what a watcher watches: the one key when end is nil, [key, end) otherwise, and everything from key
// on when end is empty but not nil. The last two are etcd's range_end "\x00" and a plain range_end.
type keyRange struct{ key, end []byte }

func (r keyRange) single() bool    { return r.end == nil }
func (r keyRange) unbounded() bool { return r.end != nil && len(r.end) == 0 }

// request returns the range in the convention of backend.HistoryRequest.
func (r keyRange) request() (key, rangeEnd []byte) {
	switch {
	case r.single():
		return r.key, nil
	case r.unbounded():
		return r.key, []byte{0}
	}
	return r.key, r.end
}

// hull returns the smallest range that contains both r and q.
func (r keyRange) hull(q keyRange) keyRange {
	if bytes.Equal(r.key, q.key) && bytes.Equal(r.end, q.end) && r.single() == q.single() {
		return r
	}
	out := keyRange{key: r.key}
	if bytes.Compare(q.key, r.key) < 0 {
		out.key = q.key
	}
	if r.unbounded() || q.unbounded() {
		out.end = []byte{}
		return out
	}
	out.end = r.after()
	if e := q.after(); bytes.Compare(e, out.end) > 0 {
		out.end = e
	}
	return out
}

// after returns the end of a bounded range, also for a single key.
func (r keyRange) after() []byte {
	if r.single() {
		return append(bytes.Clone(r.key), 0)
	}
	return r.end
}

// A group finds the watchers that a key concerns, without looking at the others: a map for watchers of one key, an
// interval tree for ranges. It is not safe for use by several goroutines.
type group struct {
	keys   map[string]*watcherSet
	ranges *interval // root of a treap by (begin, end); every node knows the largest end below it
	size   int
}

func newGroup() *group { return &group{keys: make(map[string]*watcherSet)} }

func (g *group) empty() bool { return g.size == 0 }

func (g *group) add(w *watcher) {
	g.size++
	if w.rng.single() {
		set := g.keys[string(w.rng.key)]
		if set == nil {
			set = new(watcherSet)
			g.keys[string(w.rng.key)] = set
		}
		set.add(w)
		return
	}
	g.ranges = g.ranges.insert(w.rng, w)
}

// remove takes w out. REQUIRES: w is in g.
func (g *group) remove(w *watcher) {
	g.size--
	if w.rng.single() {
		set := g.keys[string(w.rng.key)]
		set.remove(w)
		if len(set.list) == 0 {
			delete(g.keys, string(w.rng.key))
		}
		return
	}
	g.ranges = g.ranges.delete(w.rng, w)
}

// match appends the watchers whose range contains key to dst. It is a pure function of the ranges and the key.
func (g *group) match(dst []*watcher, key []byte) []*watcher {
	if set := g.keys[string(key)]; set != nil {
		dst = append(dst, set.list...)
	}
	return g.ranges.stab(dst, key)
}

// indexedSet is the size from which on a watcherSet remembers where each watcher stands; below, it looks.
const indexedSet = 32

// A watcherSet holds the watchers of equal ranges.
type watcherSet struct {
	list []*watcher
	at   map[*watcher]int // nil while the list is short
}

func (s *watcherSet) add(w *watcher) {
	s.list = append(s.list, w)
	switch {
	case s.at != nil:
		s.at[w] = len(s.list) - 1
	case len(s.list) == indexedSet:
		s.at = make(map[*watcher]int, 2*indexedSet)
		for i, w := range s.list {
			s.at[w] = i
		}
	}
}

func (s *watcherSet) remove(w *watcher) {
	i := s.find(w)
	last := len(s.list) - 1
	moved := s.list[last]
	s.list[i] = moved
	s.list[last] = nil
	s.list = s.list[:last]
	if s.at != nil {
		s.at[moved] = i
		delete(s.at, w)
	}
}

func (s *watcherSet) find(w *watcher) int {
	if s.at != nil {
		if i, ok := s.at[w]; ok {
			return i
		}
	} else {
		for i, x := range s.list {
			if x == w {
				return i
			}
		}
	}
	panic("watchpoller: a watcher is removed from a group that does not hold it")
}

// An interval is a node of the tree of ranges: the watchers of one range.
//
// Invariant: a node's priority is not below its children's; last is the largest end in its subtree.
type interval struct {
	begin       []byte
	end         []byte // empty: no end
	last        []byte // empty: no end
	watchers    watcherSet
	priority    uint32
	left, right *interval
}

// before says whether key lies before end; an empty end is behind every key.
func before(key, end []byte) bool { return len(end) == 0 || bytes.Compare(key, end) < 0 }

// later returns the later of two ends.
func later(a, b []byte) []byte {
	if len(a) == 0 || len(b) == 0 {
		return nil
	}
	if bytes.Compare(a, b) >= 0 {
		return a
	}
	return b
}

func (n *interval) compare(r keyRange) int {
	if c := bytes.Compare(r.key, n.begin); c != 0 {
		return c
	}
	return bytes.Compare(r.end, n.end)
}

func (n *interval) fix() *interval {
	n.last = n.end
	if n.left != nil {
		n.last = later(n.last, n.left.last)
	}
	if n.right != nil {
		n.last = later(n.last, n.right.last)
	}
	return n
}

func (n *interval) insert(r keyRange, w *watcher) *interval {
	if n == nil {
		n = &interval{begin: r.key, end: r.end, last: r.end, priority: rand.Uint32()}
		n.watchers.add(w)
		return n
	}
	switch c := n.compare(r); {
	case c == 0:
		n.watchers.add(w)
		return n
	case c < 0:
		n.left = n.left.insert(r, w)
		if l := n.left; l.priority > n.priority {
			n.left, l.right = l.right, n
			n.fix()
			return l.fix()
		}
	default:
		n.right = n.right.insert(r, w)
		if x := n.right; x.priority > n.priority {
			n.right, x.left = x.left, n
			n.fix()
			return x.fix()
		}
	}
	return n.fix()
}

func (n *interval) delete(r keyRange, w *watcher) *interval {
	if n == nil {
		panic("watchpoller: a range is removed from a group that does not hold it")
	}
	switch c := n.compare(r); {
	case c == 0:
		n.watchers.remove(w)
		if len(n.watchers.list) == 0 {
			return joined(n.left, n.right)
		}
		return n
	case c < 0:
		n.left = n.left.delete(r, w)
	default:
		n.right = n.right.delete(r, w)
	}
	return n.fix()
}

// joined makes one tree of two. REQUIRES: everything in a sorts before everything in b.
func joined(a, b *interval) *interval {
	switch {
	case a == nil:
		return b
	case b == nil:
		return a
	case a.priority >= b.priority:
		a.right = joined(a.right, b)
		return a.fix()
	default:
		b.left = joined(a, b.left)
		return b.fix()
	}
}

func (n *interval) stab(dst []*watcher, key []byte) []*watcher {
	for n != nil && before(key, n.last) {
		dst = n.left.stab(dst, key)
		if bytes.Compare(key, n.begin) < 0 {
			return dst // everything to the right begins even later
		}
		if before(key, n.end) {
			dst = append(dst, n.watchers.list...)
		}
		n = n.right
	}
	return dst
}
