package backend

import (
	"sort"
	"sync"
)

// rowMarks knows the row of every markRows'th revision, so that history can be read from the middle: the
// revision table has no index on rev, but its rows lie in the order of their revisions.
type rowMarks struct {
	mu    sync.RWMutex
	marks []rowMark
	// since counts the rows since the newest mark, beginning with the row itself; 0 before the first.
	// It belongs to add's caller.
	since int
}

type rowMark struct{ rev, id int64 }

const markRows = 128

// add is called with every row, in order, by the loader and then by the holder of the commit token.
func (m *rowMarks) add(rev, id int64) {
	if m.since > 0 && m.since < markRows {
		m.since++
		return
	}
	m.since = 1
	m.mu.Lock()
	defer m.mu.Unlock()
	m.marks = append(m.marks, rowMark{rev, id})
}

// before returns an id at or before the first row of rev, and near it.
func (m *rowMarks) before(rev int64) (id int64) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	i := sort.Search(len(m.marks), func(i int) bool { return m.marks[i].rev >= rev })
	if i == 0 {
		return 0
	}
	return m.marks[i-1].id
}

// dropBefore forgets marks that no read of rev or later needs.
func (m *rowMarks) dropBefore(rev int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := sort.Search(len(m.marks), func(i int) bool { return m.marks[i].rev >= rev })
	if i > 1 {
		m.marks = append([]rowMark(nil), m.marks[i-1:]...)
	}
}

// replace makes the marks those of another table, which is not used any more.
func (m *rowMarks) replace(o *rowMarks) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.marks, m.since = o.marks, o.since
}
