package powercut

import (
	"maps"
	"math/rand/v2"
)

// nameChange is a change of one name or, by a rename, of two at once.
type nameChange []nameSet

// nameSet has a name in a directory lead to a node, or nowhere (nil).
type nameSet struct {
	entry
	to *node
}

// entry is a place for a name.
type entry struct {
	dir  *node
	name string
}

func (c nameChange) apply(names func(dir *node) map[string]*node) {
	for _, s := range c {
		if s.to == nil {
			delete(names(s.dir), s.name)
		} else {
			names(s.dir)[s.name] = s.to
		}
	}
}

// touches says whether the change concerns one of the entries.
func (c nameChange) touches(entries map[entry]bool) bool {
	for _, s := range c {
		if entries[s.entry] {
			return true
		}
	}
	return false
}

func (c nameChange) addTo(entries map[entry]bool) {
	for _, s := range c {
		entries[s.entry] = true
	}
}

func synced(dir *node) map[string]*node  { return dir.synced }
func current(dir *node) map[string]*node { return dir.entries }

// syncNames makes the changes in one directory durable, and those they rest on. It returns the rest.
func syncNames(pending []nameChange, dir *node) (rest []nameChange) {
	needed := make([]bool, len(pending))
	restOn := make(map[entry]bool)
	for i := len(pending) - 1; i >= 0; i-- {
		c := pending[i]
		for _, s := range c {
			needed[i] = needed[i] || s.dir == dir
		}
		if needed[i] = needed[i] || c.touches(restOn); needed[i] {
			c.addTo(restOn)
		}
	}
	for i, c := range pending {
		if needed[i] {
			c.apply(synced)
		} else {
			rest = append(rest, c)
		}
	}
	return rest
}

// cutNames draws which of the pending changes survive a power cut, and makes them durable. With a journal these are always
// the first ones.
func cutNames(pending []nameChange, journal bool, r *rand.Rand) {
	l := drawLuck(r)
	if r.IntN(2) == 0 || journal {
		for _, c := range pending[:l.among(r, len(pending)+1)] {
			c.apply(synced)
		}
		return
	}
	lost := make(map[entry]bool)
	for _, c := range pending {
		if c.touches(lost) || l.among(r, 2) == 0 {
			c.addTo(lost)
		} else {
			c.apply(synced)
		}
	}
}

// settle makes the tree of directories below dir the one on the disk, and calls file for each file in it, in no order.
func (dir *node) settle(file func(*node)) {
	dir.entries = maps.Clone(dir.synced)
	for name, n := range dir.entries {
		n.name, n.links = name, 1
		if n.dir() {
			n.settle(file)
		} else {
			file(n)
		}
	}
}
