package backend

import (
	"bytes"
	"fmt"
	"slices"
)

// A tree is the ordered set of keys of the index: each key has a slot, which is where the index keeps the records of the
// key, and a live bit, which says whether the key exists now. Keys are any bytes and are ordered by bytes.Compare.
//
// It is a B+tree whose nodes are copied when written. What it promises:
//
//  1. A *tree never changes. Any number of goroutines read it without locks, also while a treeEdit made from it goes on.
//  2. edit and treeEdit.tree are O(1). Between two calls of treeEdit.tree a node is copied at most once.
//  3. Changing only the slot or the live bit of a key copies no key bytes; setting what is already there copies nothing.
//  4. The garbage collector sees a few pointers for each node and none for each key.
//
// The nil *tree and the zero tree are empty. A treeEdit belongs to one goroutine at a time.
type tree struct {
	root *treeNode // nil: no keys
	n    int       // entries
	live int       // entries with the live bit

	// Invariant: every node below root has an epoch <= this one. An edit that starts here uses epoch+1, so the nodes which
	// bear an edit's epoch are exactly those that it made itself since its last snapshot. Two edits of one tree may use
	// the same number; neither can reach the nodes of the other.
	epoch uint64
}

const (
	// treeMaxKeys is the most keys in a leaf, or separators in an inner node. More makes fewer, longer copies.
	treeMaxKeys = 96
	// treeJoinKeys is the most keys that two neighbours join to when keys are deleted. Well below treeMaxKeys, so that
	// keys coming and going do not split and join the same nodes all the time.
	treeJoinKeys = 64
	// treeMaxBytes is the most bytes of keys in a node, besides the common prefix. (An inner node may exceed it by one
	// separator, inserted in its middle after a split.) A single key is all prefix.
	treeMaxBytes = 64 << 10
	// treeBuildKeys is how far buildTree fills a node: nine tenths.
	treeBuildKeys = treeMaxKeys * 9 / 10
	// treeMaxSlot is the highest slot; the live bit takes the 32nd bit.
	treeMaxSlot = 1<<31 - 1
)

// A treeNode is a leaf if it has no children.
type treeNode struct {
	epoch    uint64 // of the edit that may write to this node
	ownsKeys bool   // false: the bytes of keys are shared with the node that this one was copied from

	// keys of a leaf are those of its entries. Those of an inner node separate its children: keys[i] is above every key
	// below children[i], and not above any key below children[i+1]. An inner node with one child has no keys.
	keys     keyBlock
	vals     []uint32    // leaf: slot<<1 | live of each entry; inner: number of live entries below each child
	children []*treeNode // Invariant: all leaves are equally deep
}

// get returns the slot and the live bit of key; ok is false if the key is not in the tree. It does not allocate.
func (t *tree) get(key []byte) (slot uint32, live, ok bool) {
	if t == nil || t.root == nil {
		return 0, false, false
	}
	n := t.root
	for n.children != nil {
		n = n.children[n.childOf(key)]
	}
	i, ok := n.keys.search(key)
	if !ok {
		return 0, false, false
	}
	return n.vals[i] >> 1, n.vals[i]&1 == 1, true
}

// len returns the number of entries, live or not.
func (t *tree) len() int {
	if t == nil {
		return 0
	}
	return t.n
}

// liveLen returns the number of live entries.
func (t *tree) liveLen() int {
	if t == nil {
		return 0
	}
	return t.live
}

// countLive returns the number of live entries with from <= key < end, or from <= key if unboundedEnd. It looks at one
// node of each level for each bound.
func (t *tree) countLive(from, end []byte, unboundedEnd bool) int64 {
	if t == nil || t.root == nil {
		return 0
	}
	above := int64(t.live)
	if !unboundedEnd {
		above = t.root.liveBelow(end)
	}
	return max(0, above-t.root.liveBelow(from))
}

// ascend calls fn for the entries with from <= key < end, or from <= key if unboundedEnd, from the lowest key up, until fn
// returns false. The key is valid only during the call.
func (t *tree) ascend(from, end []byte, unboundedEnd bool, fn func(key []byte, slot uint32, live bool) bool) {
	if t != nil && t.root != nil {
		w := treeWalk{fn: fn}
		w.walk(t.root, treeSpan{from, end, unboundedEnd})
	}
}

// descend is ascend over the same entries from the highest key down.
func (t *tree) descend(from, end []byte, unboundedEnd bool, fn func(key []byte, slot uint32, live bool) bool) {
	if t != nil && t.root != nil {
		w := treeWalk{fn: fn, down: true}
		w.walk(t.root, treeSpan{from, end, unboundedEnd})
	}
}

// edit starts changes on a private copy of t.
func (t *tree) edit() *treeEdit {
	e := &treeEdit{}
	if t != nil {
		e.now = *t
	}
	e.now.epoch++
	return e
}

// childOf returns the index of the child under which key is or would be.
func (n *treeNode) childOf(key []byte) int {
	i, found := n.keys.search(key)
	if found {
		i++
	}
	return i
}

// live counts the live entries below n.
func (n *treeNode) live() (live uint32) {
	for _, v := range n.vals {
		if n.children == nil {
			v &= 1
		}
		live += v
	}
	return live
}

// liveBelow counts the live entries with a key below key.
func (n *treeNode) liveBelow(key []byte) (live int64) {
	for n.children != nil {
		c := n.childOf(key)
		for _, v := range n.vals[:c] {
			live += int64(v)
		}
		n = n.children[c]
	}
	i, _ := n.keys.search(key)
	for _, v := range n.vals[:i] {
		live += int64(v & 1)
	}
	return live
}

// treeSpan is the keys with from <= key < end, or from <= key if open.
type treeSpan struct {
	from, end []byte
	open      bool
}

// within returns which entries (of a leaf) or children (of an inner node) can be in s: lo <= i < hi.
func (s treeSpan) within(n *treeNode) (lo, hi int) {
	lo, hi = 0, len(n.vals)
	if n.children == nil {
		lo, _ = n.keys.search(s.from)
		if !s.open {
			hi, _ = n.keys.search(s.end)
		}
		return lo, hi
	}
	lo = n.childOf(s.from)
	if !s.open {
		hi = n.childOf(s.end) + 1
	}
	return lo, hi
}

// below returns the span to walk under child c, given lo and hi from within: only the outermost children need to compare
// with the bounds.
func (s treeSpan) below(c, lo, hi int) treeSpan {
	if c > lo {
		s.from = nil // the empty key is the lowest
	}
	if c < hi-1 {
		s.open = true
	}
	return s
}

type treeWalk struct {
	fn   func(key []byte, slot uint32, live bool) bool
	down bool   // from the highest key to the lowest
	key  []byte // reused for every key
}

// walk reports whether to go on.
func (w *treeWalk) walk(n *treeNode, s treeSpan) bool {
	lo, hi := s.within(n)
	for j := lo; j < hi; j++ {
		i, more := j, false
		if w.down {
			i = lo + hi - 1 - j
		}
		if n.children != nil {
			more = w.walk(n.children[i], s.below(i, lo, hi))
		} else {
			more = w.visit(n, i, j == lo)
		}
		if !more {
			return false
		}
	}
	return true
}

// visit hands entry i of a leaf to fn. For the first visited of a leaf it copies the prefix too.
func (w *treeWalk) visit(leaf *treeNode, i int, first bool) bool {
	k := &leaf.keys
	if first {
		w.key = append(w.key[:0], k.data[:k.prefix]...)
	}
	w.key = append(w.key[:k.prefix], k.suffix(i)...)
	return w.fn(w.key, leaf.vals[i]>>1, leaf.vals[i]&1 == 1)
}

// A treeEdit is a batch of changes. Its reads see its changes. The functions given to ascend and descend must not change it.
type treeEdit struct {
	now tree // its epoch is the edit's own
}

func (e *treeEdit) get(key []byte) (slot uint32, live, ok bool) { return e.now.get(key) }
func (e *treeEdit) len() int                                    { return e.now.len() }
func (e *treeEdit) liveLen() int                                { return e.now.liveLen() }
func (e *treeEdit) countLive(from, end []byte, unboundedEnd bool) int64 {
	return e.now.countLive(from, end, unboundedEnd)
}
func (e *treeEdit) ascend(from, end []byte, unboundedEnd bool, fn func(key []byte, slot uint32, live bool) bool) {
	e.now.ascend(from, end, unboundedEnd, fn)
}
func (e *treeEdit) descend(from, end []byte, unboundedEnd bool, fn func(key []byte, slot uint32, live bool) bool) {
	e.now.descend(from, end, unboundedEnd, fn)
}

// tree returns the edited state. The edit can go on: it copies again what it changes.
func (e *treeEdit) tree() *tree {
	t := e.now
	e.now.epoch++
	return &t
}

// set inserts key or changes its entry. The bytes of key are copied. REQUIRES: slot <= treeMaxSlot.
func (e *treeEdit) set(key []byte, slot uint32, live bool) {
	val := treeVal(slot, live)
	if e.now.root == nil {
		e.now.root = e.newLeaf(key, val)
		return
	}
	for done := false; !done; {
		var s treeSplit
		e.now.root, s, done = e.put(e.now.root, key, val)
		if s.right != nil {
			left := e.now.root
			e.now.root = &treeNode{
				epoch:    e.now.epoch,
				ownsKeys: true,
				keys:     newKeyBlock(s.sep),
				vals:     []uint32{left.live(), s.right.live()},
				children: []*treeNode{left, s.right},
			}
		}
	}
}

// delete removes key and reports whether it was there.
func (e *treeEdit) delete(key []byte) bool {
	if e.now.root == nil {
		return false
	}
	root, found := e.remove(e.now.root, key)
	for root != nil && len(root.children) == 1 {
		root = root.children[0]
	}
	e.now.root = root
	return found
}

func treeVal(slot uint32, live bool) uint32 {
	if slot > treeMaxSlot {
		panic(fmt.Sprintf("backend: index slot %d is above %d", slot, treeMaxSlot))
	}
	if live {
		return slot<<1 | 1
	}
	return slot << 1
}

// newLeaf makes the leaf of a key that was not in the tree.
func (e *treeEdit) newLeaf(key []byte, val uint32) *treeNode {
	e.now.n++
	e.now.live += int(val & 1)
	return &treeNode{epoch: e.now.epoch, ownsKeys: true, keys: newKeyBlock(key), vals: []uint32{val}}
}

// own returns n, or a copy that the edit may write to. The copy shares the keys until ownKeys.
func (e *treeEdit) own(n *treeNode) *treeNode {
	if n.epoch == e.now.epoch {
		return n
	}
	return &treeNode{epoch: e.now.epoch, keys: n.keys, vals: slices.Clone(n.vals), children: slices.Clone(n.children)}
}

// ownKeys is own for a change of the keys as well; room is the length of the key to be inserted, if any.
func (e *treeEdit) ownKeys(n *treeNode, room int) *treeNode {
	n = e.own(n)
	if !n.ownsKeys {
		n.keys, n.ownsKeys = n.keys.slice(0, n.keys.len(), room), true
	}
	return n
}

// part returns a new node with the children or entries i to j-1 of n, and the keys between them.
func (e *treeEdit) part(n *treeNode, i, j int) *treeNode {
	p := &treeNode{epoch: e.now.epoch, ownsKeys: true, vals: slices.Clone(n.vals[i:j])}
	if n.children != nil {
		p.children = slices.Clone(n.children[i:j])
		j--
	}
	p.keys = n.keys.slice(i, j, 0)
	return p
}

// A treeSplit is what a split added to the right of a node, and the separator before it.
type treeSplit struct {
	sep   []byte
	right *treeNode
}

// put sets key to val below n and returns what stands in the place of n: n itself, if nothing changed or the edit owns it.
// If done is false, put has only split a leaf to make room, and must be called again from the root.
func (e *treeEdit) put(n *treeNode, key []byte, val uint32) (left *treeNode, s treeSplit, done bool) {
	if n.children == nil {
		return e.putLeaf(n, key, val)
	}
	c := n.childOf(key)
	child, s, done := e.put(n.children[c], key, val)
	if child == n.children[c] && s.right == nil && n.epoch != e.now.epoch {
		return n, treeSplit{}, done // nothing changed: a child that can be written in place has parents that can, too
	}
	n = e.own(n)
	n.children[c], n.vals[c] = child, child.live()
	if s.right == nil {
		return n, treeSplit{}, done
	}
	n, s = e.addChild(n, c, s)
	return n, s, done
}

func (e *treeEdit) putLeaf(n *treeNode, key []byte, val uint32) (left *treeNode, s treeSplit, done bool) {
	i, found := n.keys.search(key)
	if found {
		if n.vals[i] != val {
			n = e.own(n)
			e.now.live += int(val&1) - int(n.vals[i]&1)
			n.vals[i] = val
		}
		return n, treeSplit{}, true
	}
	count := n.keys.len()
	switch {
	case n.keys.fits(key):
		n = e.ownKeys(n, len(key))
		n.keys.insert(i, key)
		n.vals = insertAt(n.vals, i, val)
		e.now.n++
		e.now.live += int(val & 1)
		return n, treeSplit{}, true

	// A full leaf whose edge is written stays full: keys often come in ascending order, in the tree or below some prefix.
	// Only a key at the edge can fail to have the prefix of the leaf, so no leaf is ever unpacked beyond treeMaxBytes.
	case i == count:
		return n, treeSplit{separator(n.keys.appendKey(nil, count-1), key), e.newLeaf(key, val)}, true
	case i == 0:
		return e.newLeaf(key, val), treeSplit{separator(key, n.keys.appendKey(nil, 0)), n}, true
	}
	c := n.keys.middle()
	if len(key)-n.keys.prefix > treeMaxBytes/2 {
		c = i // the key comes to the edge of a leaf, and so into a leaf of its own
	}
	sep := separator(n.keys.appendKey(nil, c-1), n.keys.appendKey(nil, c))
	return e.part(n, 0, c), treeSplit{sep, e.part(n, c, count)}, false
}

// addChild inserts s behind child c of n, which the edit owns. If n has no room it is split too.
func (e *treeEdit) addChild(n *treeNode, c int, s treeSplit) (*treeNode, treeSplit) {
	count := n.keys.len()
	switch {
	case n.keys.fits(s.sep):
		e.insertChild(n, c, s)
		return n, treeSplit{}
	case c == count: // as in putLeaf
		right := &treeNode{epoch: e.now.epoch, ownsKeys: true, vals: []uint32{s.right.live()}, children: []*treeNode{s.right}}
		return n, treeSplit{s.sep, right}
	case c == 0:
		left := e.part(n, 0, 1)
		n.children[0], n.vals[0] = s.right, s.right.live()
		return left, treeSplit{s.sep, n}
	}
	m := n.keys.middle()
	left, up, right := e.part(n, 0, m+1), n.keys.appendKey(nil, m), e.part(n, m+1, count+1)
	if c <= m {
		e.insertChild(left, c, s)
	} else {
		e.insertChild(right, c-m-1, s)
	}
	return left, treeSplit{up, right}
}

func (e *treeEdit) insertChild(n *treeNode, c int, s treeSplit) {
	e.ownKeys(n, len(s.sep)).keys.insert(c, s.sep)
	n.children = insertAt(n.children, c+1, s.right)
	n.vals = insertAt(n.vals, c+1, s.right.live())
}

// remove deletes key below n and returns what stands in the place of n, nil if nothing is left.
func (e *treeEdit) remove(n *treeNode, key []byte) (_ *treeNode, found bool) {
	if n.children == nil {
		i, found := n.keys.search(key)
		if !found {
			return n, false
		}
		e.now.n--
		e.now.live -= int(n.vals[i] & 1)
		if len(n.vals) == 1 {
			return nil, true
		}
		n = e.ownKeys(n, 0)
		n.keys.remove(i)
		n.vals = slices.Delete(n.vals, i, i+1)
		return n, true
	}
	c := n.childOf(key)
	child, found := e.remove(n.children[c], key)
	if !found {
		return n, false
	}
	if child == nil {
		if len(n.children) == 1 {
			return nil, true
		}
		n = e.own(n)
		e.removeChild(n, c, max(0, c-1))
		return n, true
	}
	n = e.own(n)
	n.children[c], n.vals[c] = child, child.live()
	if child.keys.len() <= treeJoinKeys && !e.join(n, c) && c > 0 {
		e.join(n, c-1)
	}
	return n, true
}

// removeChild takes child c and separator sep, which is on one of its sides, from n, which the edit owns.
func (e *treeEdit) removeChild(n *treeNode, c, sep int) {
	e.ownKeys(n, 0).keys.remove(sep)
	n.children = slices.Delete(n.children, c, c+1)
	n.vals = slices.Delete(n.vals, c, c+1)
}

// join makes one of the children c and c+1 of n, which the edit owns, if they are small enough.
func (e *treeEdit) join(n *treeNode, c int) bool {
	if c+1 >= len(n.children) {
		return false
	}
	a, b := n.children[c], n.children[c+1]
	if a.keys.len()+b.keys.len() > treeJoinKeys {
		return false
	}
	between := keyBlock{}
	if a.children != nil {
		between = newKeyBlock(n.keys.appendKey(nil, c))
	}
	keys, ok := joinKeys(&a.keys, &between, &b.keys)
	if !ok {
		return false
	}
	n.children[c] = &treeNode{
		epoch:    e.now.epoch,
		ownsKeys: true,
		keys:     keys,
		vals:     slices.Concat(a.vals, b.vals),
		children: slices.Concat(a.children, b.children),
	}
	n.vals[c] += n.vals[c+1]
	e.removeChild(n, c+1, c)
	return true
}

// buildTree makes a tree of n entries, at(0) to at(n-1), in O(n). REQUIRES: the keys strictly ascend. A key is not used
// after the next call of at.
func buildTree(n int, at func(i int) (key []byte, slot uint32, live bool)) *tree {
	t := &tree{}
	var level []*treeNode // the nodes of the level that is being made
	var seps [][]byte     // seps[i] separates level[i] and level[i+1]
	finish := func(nodes []*treeNode) {
		if len(nodes) > 0 { // give back the room to grow
			last := nodes[len(nodes)-1]
			last.keys, last.ownsKeys = last.keys.slice(0, last.keys.len(), 0), true
			last.vals, last.children = slices.Clone(last.vals), slices.Clone(last.children)
		}
	}
	var prev []byte
	for i := range n {
		key, slot, live := at(i)
		if i > 0 && bytes.Compare(prev, key) >= 0 {
			panic(fmt.Sprintf("backend: index built from keys out of order at %d of %d", i, n))
		}
		if last := len(level) - 1; last >= 0 && len(level[last].vals) < treeBuildKeys && level[last].keys.fits(key) {
			leaf := level[last]
			leaf.keys.insert(len(leaf.vals), key)
			leaf.vals = insertAt(leaf.vals, len(leaf.vals), treeVal(slot, live))
		} else {
			finish(level)
			if i > 0 {
				seps = append(seps, separator(prev, key))
			}
			level = append(level, &treeNode{keys: newKeyBlock(key), vals: []uint32{treeVal(slot, live)}})
		}
		prev = append(prev[:0], key...)
	}
	finish(level)
	for len(level) > 1 {
		var up []*treeNode
		var upSeps [][]byte
		for i, child := range level {
			if last := len(up) - 1; last >= 0 && len(up[last].children) < treeBuildKeys && up[last].keys.fits(seps[i-1]) {
				parent := up[last]
				parent.keys.insert(parent.keys.len(), seps[i-1])
				parent.children = insertAt(parent.children, len(parent.children), child)
				parent.vals = insertAt(parent.vals, len(parent.vals), child.live())
			} else {
				finish(up)
				if i > 0 {
					upSeps = append(upSeps, seps[i-1])
				}
				up = append(up, &treeNode{vals: []uint32{child.live()}, children: []*treeNode{child}})
			}
		}
		finish(up)
		level, seps = up, upSeps
	}
	if n > 0 {
		t.root, t.n, t.live = level[0], n, int(level[0].live())
	}
	return t
}
