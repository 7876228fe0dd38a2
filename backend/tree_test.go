package backend

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// check returns an error if t breaks an invariant of tree, treeNode or keyBlock.
func (t *tree) check() error {
	if t == nil || t.root == nil {
		if t.len() != 0 || t.liveLen() != 0 {
			return fmt.Errorf("an empty tree has %d entries, %d of them live", t.len(), t.liveLen())
		}
		return nil
	}
	c := treeCheck{epoch: t.epoch, leafDepth: -1}
	if t.root.children != nil && len(t.root.children) < 2 {
		return fmt.Errorf("the root has %d children", len(t.root.children))
	}
	live, err := c.node(t.root, 0, nil, nil)
	if err != nil {
		return err
	}
	if c.entries != t.n || live != t.live {
		return fmt.Errorf("the tree counts %d entries and %d live, but has %d and %d", t.n, t.live, c.entries, live)
	}
	return nil
}

type treeCheck struct {
	epoch          uint64
	leafDepth      int
	entries, nodes int
}

// node checks the nodes from n down, whose keys are k with low <= k < high; nil is no bound. It returns their live entries.
func (c *treeCheck) node(n *treeNode, depth int, low, high []byte) (live int, err error) {
	c.nodes++
	if n.epoch > c.epoch {
		return 0, fmt.Errorf("a node of epoch %d is in a tree of epoch %d", n.epoch, c.epoch)
	}
	keys, err := n.keys.check()
	if err != nil {
		return 0, err
	}
	for _, key := range keys {
		if low != nil && bytes.Compare(key, low) < 0 || high != nil && bytes.Compare(key, high) >= 0 {
			return 0, fmt.Errorf("key %.60q at depth %d is not between its separators %.60q and %.60q", key, depth, low, high)
		}
	}
	if n.children == nil {
		if c.leafDepth < 0 {
			c.leafDepth = depth
		}
		if depth != c.leafDepth || len(keys) == 0 || len(n.vals) != len(keys) {
			return 0, fmt.Errorf("leaf at depth %d (others %d) has %d keys, %d values", depth, c.leafDepth, len(keys), len(n.vals))
		}
		if size := len(n.keys.data) - n.keys.prefix; size > treeMaxBytes {
			return 0, fmt.Errorf("leaf of %d keys has %d bytes besides the prefix", len(keys), size)
		}
		c.entries += len(keys)
		for _, v := range n.vals {
			live += int(v & 1)
		}
		return live, nil
	}
	if len(n.children) != len(keys)+1 || len(n.vals) != len(keys)+1 {
		return 0, fmt.Errorf("inner node has %d keys, %d children, %d values", len(keys), len(n.children), len(n.vals))
	}
	for i, child := range n.children {
		if child.epoch > n.epoch {
			return 0, fmt.Errorf("a node of epoch %d is below one of epoch %d", child.epoch, n.epoch)
		}
		from, to := low, high
		if i > 0 {
			from = keys[i-1]
		}
		if i < len(keys) {
			to = keys[i]
		}
		below, err := c.node(child, depth+1, from, to)
		if err != nil {
			return 0, err
		}
		if below != int(n.vals[i]) {
			return 0, fmt.Errorf("an inner node counts %d live entries below a child with %d", n.vals[i], below)
		}
		live += below
	}
	return live, nil
}

func (k *keyBlock) check() (keys [][]byte, err error) {
	if k.len() > treeMaxKeys {
		return nil, fmt.Errorf("a block has %d keys", k.len())
	}
	if k.len() == 0 && (k.prefix != 0 || len(k.data) != 0) {
		return nil, fmt.Errorf("a block of no keys has a prefix of %d and %d bytes", k.prefix, len(k.data))
	}
	end := k.prefix
	for i := range k.len() {
		if int(k.ends[i]) < end || int(k.ends[i]) > len(k.data) {
			return nil, fmt.Errorf("key %d ends at %d, after %d, in %d bytes", i, k.ends[i], end, len(k.data))
		}
		end = int(k.ends[i])
		keys = append(keys, k.appendKey(nil, i))
		if i > 0 && bytes.Compare(keys[i-1], keys[i]) >= 0 {
			return nil, fmt.Errorf("key %d of a block, %.60q, is not above the one before, %.60q", i, keys[i], keys[i-1])
		}
	}
	if end != len(k.data) {
		return nil, fmt.Errorf("the keys of a block end at %d, its data at %d", end, len(k.data))
	}
	return keys, nil
}

// treeModel is the dumb tree beside the clever one: a sorted slice.
type treeModel struct {
	keys []string
	vals map[string]treeModelVal
}

type treeModelVal struct {
	slot uint32
	live bool
}

func (m *treeModel) set(key string, slot uint32, live bool) {
	if m.vals == nil {
		m.vals = map[string]treeModelVal{}
	}
	if _, ok := m.vals[key]; !ok {
		m.keys = slices.Insert(m.keys, sort.SearchStrings(m.keys, key), key)
	}
	m.vals[key] = treeModelVal{slot, live}
}

func (m *treeModel) delete(key string) bool {
	if _, ok := m.vals[key]; !ok {
		return false
	}
	i := sort.SearchStrings(m.keys, key)
	m.keys = slices.Delete(m.keys, i, i+1)
	delete(m.vals, key)
	return true
}

func (m *treeModel) clone() *treeModel {
	c := &treeModel{keys: slices.Clone(m.keys), vals: map[string]treeModelVal{}}
	for k, v := range m.vals {
		c.vals[k] = v
	}
	return c
}

func (m *treeModel) span(from, end string, open bool) []string {
	lo, hi := sort.SearchStrings(m.keys, from), len(m.keys)
	if !open {
		hi = sort.SearchStrings(m.keys, end)
	}
	return m.keys[min(lo, hi):hi]
}

// treeReader is what a tree and a treeEdit have in common.
type treeReader interface {
	get(key []byte) (slot uint32, live, ok bool)
	len() int
	liveLen() int
	countLive(from, end []byte, unboundedEnd bool) int64
	ascend(from, end []byte, unboundedEnd bool, fn func(key []byte, slot uint32, live bool) bool)
	descend(from, end []byte, unboundedEnd bool, fn func(key []byte, slot uint32, live bool) bool)
}

// compareSpan checks that t and m agree on the entries from from to end, in both directions, all and the first few.
func (m *treeModel) compareSpan(t treeReader, from, end []byte, open bool) error {
	want := m.span(string(from), string(end), open)
	live := int64(0)
	for _, key := range want {
		if m.vals[key].live {
			live++
		}
	}
	if got := t.countLive(from, end, open); got != live {
		return fmt.Errorf("countLive(%.60q, %.60q, %v) = %d, want %d", from, end, open, got, live)
	}
	for _, stop := range []int{len(want) + 1, (len(want) + 1) / 2} {
		for _, down := range []bool{false, true} {
			i, fault := 0, error(nil)
			visit := func(key []byte, slot uint32, live bool) bool {
				at := i
				if down {
					at = len(want) - 1 - i
				}
				i++
				if at < 0 || at >= len(want) {
					fault = fmt.Errorf("a walk from %.60q to %.60q (open %v, down %v) goes beyond %d keys", from, end, open, down, len(want))
				} else if string(key) != want[at] || m.vals[want[at]] != (treeModelVal{slot, live}) {
					fault = fmt.Errorf("entry %d from %.60q to %.60q (open %v, down %v) is %.60q %d %v, want %.60q %v",
						at, from, end, open, down, key, slot, live, want[at], m.vals[want[at]])
				}
				return fault == nil && i != stop
			}
			if down {
				t.descend(from, end, open, visit)
			} else {
				t.ascend(from, end, open, visit)
			}
			if fault != nil {
				return fault
			}
			if i != min(stop, len(want)) {
				return fmt.Errorf("a walk from %.60q to %.60q (open %v, down %v) gave %d keys, want %d", from, end, open, down, i, min(stop, len(want)))
			}
		}
	}
	return nil
}

// compare checks that t has exactly the entries of m.
func (m *treeModel) compare(t treeReader) error {
	if t.len() != len(m.keys) || int64(t.liveLen()) != t.countLive(nil, nil, true) {
		return fmt.Errorf("len = %d, want %d; liveLen = %d, countLive = %d", t.len(), len(m.keys), t.liveLen(), t.countLive(nil, nil, true))
	}
	for _, key := range m.keys {
		want := m.vals[key]
		if slot, live, ok := t.get([]byte(key)); !ok || (treeModelVal{slot, live}) != want {
			return fmt.Errorf("get(%.60q) = %d %v %v, want %v", key, slot, live, ok, want)
		}
	}
	return m.compareSpan(t, nil, nil, true)
}

// treeSeed is the seed of a random test: QUIRE_SEED, or a new one. It is printed, so that a failure can be replayed.
func treeSeed(t *testing.T) uint64 {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("QUIRE_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("QUIRE_SEED is not a number: %v", err)
		}
	}
	t.Logf("replay with QUIRE_SEED=%d", seed)
	return seed
}

// treeKeys are generators of keys that are hard on a prefix-compressed tree, each in its own way.
var treeKeys = []struct {
	name  string
	steps int
	key   func(r *rand.Rand, step int) []byte
}{
	{"short keys of few letters, NULs among them", 12000, func(r *rand.Rand, _ int) []byte {
		key := make([]byte, r.IntN(7))
		for i := range key {
			key[i] = "\x00\x01a\xff"[r.IntN(4)]
		}
		return key
	}},
	{"keys that are prefixes of each other", 6000, func(r *rand.Rand, _ int) []byte {
		return bytes.Repeat([]byte{0}, r.IntN(1500))
	}},
	{"Kubernetes keys", 20000, func(r *rand.Rand, _ int) []byte {
		return fmt.Appendf(nil, "/registry/pods/ns-%d/pod-%04d", r.IntN(5), r.IntN(2000))
	}},
	{"long common prefixes", 6000, func(r *rand.Rand, _ int) []byte {
		n := []int{0, 1, 700, 5000}[r.IntN(4)]
		return fmt.Appendf(bytes.Repeat([]byte("p"), n), "%d", r.IntN(300))
	}},
	{"long keys between short ones", 4000, func(r *rand.Rand, _ int) []byte {
		key := fmt.Appendf(nil, "%04d", r.IntN(400))
		if r.IntN(10) == 0 {
			key = append(key, bytes.Repeat([]byte{byte(r.IntN(3))}, r.IntN(150<<10))...)
		}
		return key
	}},
	{"long separators", 3000, func(r *rand.Rand, _ int) []byte {
		key := bytes.Repeat([]byte{byte(r.IntN(40))}, 3000)
		return append(key, byte(r.IntN(3)), byte(r.IntN(8)))
	}},
	{"ascending keys", 8000, func(r *rand.Rand, step int) []byte {
		return fmt.Appendf(nil, "%08d", max(0, step-r.IntN(20)))
	}},
	{"descending keys", 8000, func(r *rand.Rand, step int) []byte {
		return fmt.Appendf(nil, "%08d", 1_000_000-max(0, step-r.IntN(20)))
	}},
}

// A tree answers like a sorted slice, whatever is set and deleted, and a snapshot stays what it was.
func TestTreeAnswersLikeASortedSlice(t *testing.T) {
	seed := treeSeed(t)
	for i, keys := range treeKeys {
		t.Run(strings.ReplaceAll(keys.name, " ", "-"), func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(seed, uint64(i)))
			steps := keys.steps
			if testing.Short() {
				steps /= 4
			}
			type snapshot struct {
				tree  *tree
				model *treeModel
			}
			var kept []snapshot
			e, m := (*tree)(nil).edit(), &treeModel{}
			for step := range steps {
				key := keys.key(r, step)
				// The tree grows in one third of the steps, changes in the next, and shrinks in the last.
				deletes := []int{1, 5, 9}[step*3/steps]
				switch op := r.IntN(10); {
				case op < deletes:
					if op < deletes/2 && len(m.keys) > 0 { // a key that is there
						key = []byte(m.keys[r.IntN(len(m.keys))])
					}
					if got, want := e.delete(key), m.delete(string(key)); got != want {
						t.Fatalf("step %d: delete(%.60q) = %v, want %v", step, key, got, want)
					}
				default:
					slot, live := r.Uint32N(treeMaxSlot+1), r.IntN(2) == 0
					given := bytes.Clone(key)
					e.set(given, slot, live)
					for i := range given {
						given[i] ^= 0xff // the tree must have copied it
					}
					m.set(string(key), slot, live)
				}
				// Checking the whole tree after each step is quadratic: always while it is small, else one time in 16.
				if len(m.keys) < 150 || step%16 == 0 {
					if err := e.now.check(); err != nil {
						t.Fatalf("step %d: %v", step, err)
					}
				}
				from, end := keys.key(r, step), keys.key(r, step) // half of them inverted
				slot, live, ok := e.get(from)
				if want, there := m.vals[string(from)]; ok != there || want != (treeModelVal{slot, live}) {
					t.Fatalf("step %d: get(%.60q) = %d %v %v, want %v %v", step, from, slot, live, ok, want, there)
				}
				if step%8 == 0 {
					if err := m.compareSpan(e, from, end, r.IntN(8) == 0); err != nil {
						t.Fatalf("step %d: %v", step, err)
					}
				}
				if r.IntN(4) == 0 { // mostly thrown away: they make the edit copy
					s := e.tree()
					if r.IntN(steps/100) == 0 {
						kept = append(kept, snapshot{s, m.clone()})
					}
				}
				if r.IntN(500) == 0 && len(kept) > 0 { // go on from an old tree, beside the edit that came from it
					s := kept[r.IntN(len(kept))]
					e, m = s.tree.edit(), s.model.clone()
				}
			}
			kept = append(kept, snapshot{e.tree(), m})
			for i, s := range kept {
				if err := s.tree.check(); err != nil {
					t.Fatalf("snapshot %d: %v", i, err)
				}
				if err := s.model.compare(s.tree); err != nil {
					t.Fatalf("snapshot %d of %d has changed: %v", i, len(kept), err)
				}
				built := buildTree(len(s.model.keys), func(i int) ([]byte, uint32, bool) {
					v := s.model.vals[s.model.keys[i]]
					return []byte(s.model.keys[i]), v.slot, v.live
				})
				if err := built.check(); err != nil {
					t.Fatalf("snapshot %d, built at once: %v", i, err)
				}
				if err := s.model.compare(built); err != nil {
					t.Fatalf("snapshot %d, built at once: %v", i, err)
				}
			}
			for n := len(m.keys); n > 0; n-- {
				key := m.keys[r.IntN(n)]
				m.delete(key)
				if !e.delete([]byte(key)) {
					t.Fatalf("delete(%.60q) does not find it", key)
				}
				if n < 100 || n%16 == 0 {
					if err := e.now.check(); err != nil {
						t.Fatalf("with %d keys left: %v", n-1, err)
					}
				}
			}
			if e.now.root != nil || e.len() != 0 || e.liveLen() != 0 {
				t.Fatalf("all keys are deleted, but the tree has nodes, or counts %d entries, %d live", e.len(), e.liveLen())
			}
		})
	}
}

func TestTreeEmpty(t *testing.T) {
	for name, r := range map[string]treeReader{
		"nil": (*tree)(nil), "zero": &tree{}, "built": buildTree(0, nil), "edit": (*tree)(nil).edit(), "edited": (&tree{}).edit().tree(),
	} {
		if err := (&treeModel{}).compare(r); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if _, _, ok := r.get(nil); ok {
			t.Errorf("%s: the empty key is found in an empty tree", name)
		}
	}
	e := (*tree)(nil).edit()
	if e.delete([]byte("a")) {
		t.Error("a key is deleted from an empty tree")
	}
	e.set(nil, 7, true)
	if slot, live, ok := e.get([]byte{}); slot != 7 || !live || !ok {
		t.Errorf("the empty key has %d %v %v, want 7 true true", slot, live, ok)
	}
}

func TestTreeTakesTheLargestKeys(t *testing.T) {
	e, m := (*tree)(nil).edit(), &treeModel{}
	long := bytes.Repeat([]byte("x"), 3<<19) // 1.5 MiB
	for i := range 200 {
		key := fmt.Appendf(bytes.Clone([][]byte{nil, long, nil, long[:len(long)/2]}[i%4]), "%03d", i)
		e.set(key, uint32(i), i%3 == 0)
		m.set(string(key), uint32(i), i%3 == 0)
	}
	if err := e.now.check(); err != nil {
		t.Fatal(err)
	}
	if err := m.compare(e); err != nil {
		t.Fatal(err)
	}
	// 50 keys of 1.5 MiB and 50 of half of it have their first bytes in common, and the tree must make use of it.
	if size := treeBytes(e.now.root); size > 8*len(long) {
		t.Errorf("keys with long common prefixes take %d bytes", size)
	}
	for len(m.keys) > 0 {
		key := m.keys[len(m.keys)/2]
		m.delete(key)
		if !e.delete([]byte(key)) {
			t.Fatalf("delete(%.60q) does not find it", key)
		}
		if len(m.keys)%16 == 0 { // the check copies all keys
			if err := e.now.check(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// treeBytes returns the bytes that the slices from n down take, the unused ones too.
func treeBytes(n *treeNode) int {
	if n == nil {
		return 0
	}
	size := cap(n.keys.data) + 4*cap(n.keys.ends) + 4*cap(n.vals) + 8*cap(n.children)
	for _, child := range n.children {
		size += treeBytes(child)
	}
	return size
}

func TestTreeOfAscendingKeysIsFull(t *testing.T) {
	const n = 96 * 200
	for name, number := range map[string]func(i int) int{
		"ascending":  func(i int) int { return i },
		"descending": func(i int) int { return n - i },
	} {
		e := (*tree)(nil).edit()
		for i := range n {
			e.set(fmt.Appendf(nil, "/registry/events/%08d", number(i)), uint32(i), true)
		}
		c := treeCheck{epoch: e.now.epoch, leafDepth: -1}
		if _, err := c.node(e.now.root, 0, nil, nil); err != nil {
			t.Fatal(err)
		}
		if full := n/treeMaxKeys + n/treeMaxKeys/treeMaxKeys + 5; c.nodes > full {
			t.Errorf("%d %s keys are in %d nodes, want %d", n, name, c.nodes, full)
		}
		// The node written last has one child, and then none.
		for i := n - 1; i >= 0; i-- {
			if !e.delete(fmt.Appendf(nil, "/registry/events/%08d", number(i))) {
				t.Fatalf("%s: key %d is not found", name, i)
			}
			if i%96 == 0 {
				if err := e.now.check(); err != nil {
					t.Fatalf("%s, with %d keys left: %v", name, i, err)
				}
			}
		}
	}
}

func TestTreeGivesMemoryBack(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	const n = 50000
	e := (*tree)(nil).edit()
	for i := range n {
		e.set(treeBenchKey(i), uint32(i), true)
	}
	before := treeBytes(e.now.root)
	for _, i := range r.Perm(n)[:n*19/20] {
		e.delete(treeBenchKey(i))
	}
	if err := e.now.check(); err != nil {
		t.Fatal(err)
	}
	if after := treeBytes(e.now.root); after > before/8 {
		t.Errorf("with a twentieth of the keys left, %d bytes of %d are in use", after, before)
	}
}

// A leaf that is split finds the longer prefixes of its halves.
func TestTreeCompressesPrefixes(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	const groups, n = 20, 4000
	e := (*tree)(nil).edit()
	for _, i := range r.Perm(n) {
		e.set(fmt.Appendf(bytes.Repeat([]byte{byte(i % groups)}, 500), "%06d", i), uint32(i), true)
	}
	if size := treeBytes(e.now.root); size > n*300 { // leaves at the borders have keys of two groups
		t.Errorf("%d keys of 506 bytes, 500 of them the same in each group of %d, take %d bytes", n, n/groups, size)
	}
}

func TestTreeLeafGivesMemoryBack(t *testing.T) {
	e := (*tree)(nil).edit()
	for i := range 90 + 87 {
		if key := append([]byte{byte(i % 90)}, bytes.Repeat([]byte("v"), 600)...); i < 90 {
			e.set(key, 1, true)
		} else {
			e.delete(key)
		}
	}
	if size := treeBytes(e.now.root); size > 8*600 {
		t.Errorf("three keys of 600 bytes take %d", size)
	}
}

// A long key gets a leaf of its own, and those beside it stay whole.
func TestTreeLongKeySplitsOnce(t *testing.T) {
	e := (*tree)(nil).edit()
	for i := range 90 {
		e.set([]byte{byte(i)}, 1, true)
	}
	e.set(append([]byte{40}, bytes.Repeat([]byte("v"), 100<<10)...), 1, true)
	if err := e.now.check(); err != nil {
		t.Fatal(err)
	}
	if got := len(e.now.root.children); got != 3 {
		t.Errorf("90 short keys and a long one are in %d leaves, want 3", got)
	}
}

// What an edit copies: nothing for what is already so, each node once, and no keys to change a live bit.
func TestTreeCopiesLittle(t *testing.T) {
	old := buildTree(20000, func(i int) ([]byte, uint32, bool) { return fmt.Appendf(nil, "/k/%08d", i), uint32(i), true })
	key := []byte("/k/00012345")
	e := old.edit()
	e.set(key, 12345, true)
	if e.delete([]byte("/k/00012345x")) || e.now.root != old.root {
		t.Error("setting what is already so, or deleting what is not there, copies nodes")
	}
	if got := testing.AllocsPerRun(100, func() { e.get(key); old.get(key); old.countLive(key, nil, true) }); got != 0 {
		t.Errorf("get and countLive allocate %v times", got)
	}
	e.set(key, 12345, false)
	root := e.now.root
	leafOf := func(n *treeNode) *treeNode {
		for n.children != nil {
			n = n.children[n.childOf(key)]
		}
		return n
	}
	if &leafOf(root).keys.data[0] != &leafOf(old.root).keys.data[0] {
		t.Error("changing the live bit copies the keys")
	}
	if got := testing.AllocsPerRun(100, func() { e.set(key, 12345, true); e.set(key, 12345, false) }); got != 0 {
		t.Errorf("an edit copies nodes that are already its own: %v allocations", got)
	}
	s := e.tree()
	e.set(key, 1, true)
	if e.now.root == root || s.root != root {
		t.Error("an edit writes to a node of its snapshot")
	}
}

func TestTreeRefusesBrokenCalls(t *testing.T) {
	mustPanic := func(what string, fn func()) {
		defer func() {
			if recover() == nil {
				t.Errorf("%s does not panic", what)
			}
		}()
		fn()
	}
	mustPanic("a slot of 32 bits", func() { (*tree)(nil).edit().set([]byte("a"), treeMaxSlot+1, true) })
	mustPanic("building from equal keys", func() { buildTree(2, func(int) ([]byte, uint32, bool) { return []byte("a"), 0, true }) })
}

// Readers use snapshots without locks while the edit goes on. The race detector proves it.
func TestTreeSnapshotsAreReadWhileEdited(t *testing.T) {
	type snapshot struct {
		tree *tree
		n    int // entries; the live ones are those with an even slot
	}
	snapshots := make(chan snapshot, 4)
	var readers sync.WaitGroup
	for id := range 4 {
		readers.Go(func() {
			for s := range snapshots {
				up, down, live := 0, 0, int64(0)
				s.tree.ascend(nil, nil, true, func(key []byte, slot uint32, isLive bool) bool {
					up++
					if isLive {
						live++
					}
					if got, _, ok := s.tree.get(key); !ok || got != slot || isLive != (slot%2 == 0) {
						t.Errorf("reader %d: get = %d %v, want %d; live %v", id, got, ok, slot, isLive)
					}
					return true
				})
				s.tree.descend(nil, nil, true, func([]byte, uint32, bool) bool { down++; return true })
				if up != s.n || down != s.n || live != s.tree.countLive(nil, nil, true) || live != int64(s.tree.liveLen()) {
					t.Errorf("reader %d: %d up, %d down, want %d; %d live, counted %d", id, up, down, s.n, live, s.tree.liveLen())
				}
			}
		})
	}
	r := rand.New(rand.NewPCG(treeSeed(t), 0))
	e := (*tree)(nil).edit()
	for i := range 30000 {
		key := treeBenchKey(r.IntN(3000))
		if r.IntN(3) == 0 {
			e.delete(key)
		} else {
			slot := r.Uint32N(1000)
			e.set(key, slot, slot%2 == 0)
		}
		if i%100 == 0 {
			s := e.tree()
			snapshots <- snapshot{s, s.len()}
		}
	}
	close(snapshots)
	readers.Wait()
}

// FuzzTree reads a script: for each operation a byte, a length and a key.
func FuzzTree(f *testing.F) {
	f.Add([]byte("\x00\x01a\x00\x02ab\x01\x01a\x03\x01a\x02\x00"))
	f.Add(bytes.Repeat([]byte("\x00\x03abc\x00\x05abcde\x05\x04wxyz\x08\x02qq"), 40))
	f.Fuzz(func(t *testing.T, script []byte) {
		script = script[:min(len(script), 1000)]
		e, m := (*tree)(nil).edit(), &treeModel{}
		old, oldModel := e.tree(), &treeModel{}
		for step := uint32(0); len(script) >= 2; step++ {
			op, n := script[0], min(int(script[1]), len(script)-2)
			key := script[2 : 2+n]
			script = script[2+n:]
			switch op % 6 {
			case 0:
				e.set(key, step, op&64 == 0)
				m.set(string(key), step, op&64 == 0)
			case 1:
				if got, want := e.delete(key), m.delete(string(key)); got != want {
					t.Fatalf("delete(%q) = %v, want %v", key, got, want)
				}
			case 2:
				old, oldModel = e.tree(), m.clone()
			case 3:
				if err := m.compareSpan(e, key[:n/2], key[n/2:], op&64 != 0); err != nil {
					t.Fatal(err)
				}
			case 4: // a run of keys, enough to split leaves
				for i := range 60 {
					k := append(bytes.Clone(key), byte(i*int(op)), byte(i))
					e.set(k, uint32(i), i%2 == 0)
					m.set(string(k), uint32(i), i%2 == 0)
				}
			case 5: // a long key
				k := append(bytes.Repeat(key, 150), op)
				e.set(k, step, true)
				m.set(string(k), step, true)
			}
			if e.len() < 150 || step%16 == 0 || len(script) < 2 {
				if err := e.now.check(); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := m.compare(e); err != nil {
			t.Fatal(err)
		}
		if err := oldModel.compare(old); err != nil {
			t.Fatalf("a snapshot has changed: %v", err)
		}
	})
}

// treeBenchKey returns a key, of 58 bytes for i < 1e6, like those of Kubernetes.
func treeBenchKey(i int) []byte {
	h := uint64(i+1) * 0x9e3779b97f4a7c15
	return fmt.Appendf(nil, "/registry/pods/ns-%04d/pod-%06d-%012x-%05x-%05x", i%1000, i, h>>16, h&0xfffff, h>>20&0xfffff)
}

const treeBenchLen = 1_000_000

var treeBench = sync.OnceValue(func() (b struct {
	keys  [][]byte // in random order
	tree  *tree    // of keys, inserted one after the other
	bytes uint64   // in use for tree
	took  time.Duration
}) {
	for _, i := range rand.New(rand.NewPCG(1, 2)).Perm(treeBenchLen) {
		b.keys = append(b.keys, treeBenchKey(i))
	}
	inUse := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before, start := inUse(), time.Now()
	e := (*tree)(nil).edit()
	for i, key := range b.keys {
		e.set(key, uint32(i), true)
	}
	b.took = time.Since(start)
	b.tree = e.tree()
	b.bytes = inUse() - before
	return b
})

func BenchmarkTreeGet(b *testing.B) {
	data := treeBench()
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if _, _, ok := data.tree.get(data.keys[i*7919%treeBenchLen]); !ok {
			b.Fatal("a key is missing")
		}
	}
	b.ReportMetric(float64(data.bytes)/treeBenchLen, "bytes/key")
	b.ReportMetric(float64(data.took.Nanoseconds())/treeBenchLen, "ns/insert")
}

// BenchmarkTreeSet makes changes to a tree of a million keys, with a snapshot after every one or every 32 of them.
func BenchmarkTreeSet(b *testing.B) {
	for _, batch := range []int{1, 32} {
		b.Run(fmt.Sprintf("new/batch=%d", batch), func(b *testing.B) {
			e := treeBench().tree.edit()
			r := rand.New(rand.NewPCG(3, 4))
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				e.set(treeBenchKey(r.IntN(1<<40)), uint32(i), true)
				if i%batch == 0 {
					e.tree()
				}
			}
		})
		b.Run(fmt.Sprintf("flip/batch=%d", batch), func(b *testing.B) {
			data := treeBench()
			e := data.tree.edit()
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				e.set(data.keys[i*7919%treeBenchLen], uint32(i%treeBenchLen), i/treeBenchLen%2 == 1)
				if i%batch == 0 {
					e.tree()
				}
			}
		})
	}
}

func BenchmarkTreeAscend(b *testing.B) {
	data := treeBench()
	left := 0
	b.ReportAllocs()
	b.ResetTimer()
	for left = b.N; left > 0; {
		data.tree.ascend(nil, nil, true, func([]byte, uint32, bool) bool { left--; return left > 0 })
	}
}

// BenchmarkTreeBuild builds a tree of a million keys.
func BenchmarkTreeBuild(b *testing.B) {
	keys := slices.Clone(treeBench().keys)
	slices.SortFunc(keys, bytes.Compare)
	for b.Loop() {
		built := buildTree(len(keys), func(i int) ([]byte, uint32, bool) { return keys[i], uint32(i), true })
		b.ReportMetric(float64(treeBytes(built.root))/treeBenchLen, "bytes/key")
	}
}
