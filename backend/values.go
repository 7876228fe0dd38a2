package backend

import (
	"sync"
	"sync/atomic"
)

// values keeps Frames in memory, in slabs of 1 MiB, within a budget: a few large pointer-free pieces
// instead of millions of small ones, which the garbage collector would have to walk. A record's val
// says where its Frame lies; a Frame that is not resident is read from SQL.
//
// Slabs are only ever appended to. A slab that goes is left to the garbage collector, so a Frame that
// a reader holds stays valid however long it holds it.
type values struct {
	recs  *records
	table atomic.Pointer[slabTable]

	mu     sync.Mutex
	budget int64
	used   int64
	cur    *slab
	nextID uint64
}

// slabTable finds a slab by its id without a lock: slabs[id-base], nil where it is gone.
type slabTable struct {
	base  uint64
	slabs []*slab
}

type slab struct {
	id      uint64
	buf     []byte // its full length is backing memory; [0,n) is written
	n       int
	live    atomic.Int64 // bytes of Frames that are the newest of their key
	entries []slabEntry
}

type slabEntry struct {
	rec uint32
	at  uint32
}

const (
	slabBytes      = 1 << 20
	slabOffsetBits = 20
	// stale marks a handle whose record has been superseded: it no longer counts as live.
	stale = 1 << 63
)

func newValues(recs *records, budget int64) *values {
	v := &values{recs: recs, budget: budget, nextID: 1}
	v.table.Store(&slabTable{base: 1})
	return v
}

// get returns the resident Frame of r, or nil.
func (v *values) get(r *record) Frame {
	h := r.val.Load() &^ stale
	if h == 0 {
		return nil
	}
	t := v.table.Load()
	i := h>>slabOffsetBits - t.base
	if i >= uint64(len(t.slabs)) || t.slabs[i] == nil {
		return nil
	}
	return frameAt(t.slabs[i].buf[h&(1<<slabOffsetBits-1):])
}

// add makes the Frame of kv resident for record rec and returns it.
// REQUIRES: rec stays allocated during the call.
func (v *values) add(rec uint32, kv *keyValue) Frame {
	v.mu.Lock()
	defer v.mu.Unlock()
	buf, h := v.room(rec, kv.frameSize())
	f := Frame(kv.appendFrame(buf))
	v.recs.at(rec).val.Store(h)
	return f
}

// fill makes a Frame that was read from SQL resident, unless another reader was first.
func (v *values) fill(rec uint32, f Frame) {
	v.mu.Lock()
	defer v.mu.Unlock()
	r := v.recs.at(rec)
	if r.val.Load()&^stale != 0 {
		return
	}
	buf, h := v.room(rec, len(f))
	_ = append(buf, f...)
	if !r.val.CompareAndSwap(0, h) {
		// Superseded meanwhile: the mark is kept, so the Frame does not count as live.
		r.val.Store(h | stale)
		v.slabOf(h).live.Add(-int64(len(f)))
	}
}

// supersede says that r is no longer the newest of its key.
func (v *values) supersede(r *record) {
	h := r.val.Or(stale)
	if h&stale == 0 && h != 0 {
		v.count(h, -1)
	}
}

// restore takes supersede back, after a batch that could not be written.
func (v *values) restore(r *record) {
	h := r.val.And(^uint64(stale))
	if h&stale != 0 && h != stale {
		v.count(h&^stale, 1)
	}
}

// drop forgets the Frame of a record that is being freed.
func (v *values) drop(r *record) {
	h := r.val.Swap(0)
	if h != 0 && h&stale == 0 {
		v.count(h, -1)
	}
}

func (v *values) count(h uint64, sign int64) {
	if s := v.slabOf(h); s != nil {
		s.live.Add(sign * int64(len(frameAt(s.buf[h&(1<<slabOffsetBits-1):]))))
	}
}

func (v *values) slabOf(h uint64) *slab {
	t := v.table.Load()
	i := (h&^stale)>>slabOffsetBits - t.base
	if i >= uint64(len(t.slabs)) {
		return nil
	}
	return t.slabs[i]
}

// room finds n bytes for record rec: an empty slice with that capacity, and its handle.
// REQUIRES: v.mu is held.
func (v *values) room(rec uint32, n int) (buf []byte, handle uint64) {
	s := v.cur
	if s == nil || s.n+n > len(s.buf) {
		s = v.newSlab(max(n, slabBytes))
	}
	at := s.n
	s.n += n
	s.live.Add(int64(n))
	s.entries = append(s.entries, slabEntry{rec: rec, at: uint32(at)})
	return s.buf[at:at:s.n], s.id<<slabOffsetBits | uint64(at)
}

// newSlab makes room in the budget and starts a slab; one that is larger than usual is for a single
// Frame and does not become the current one.
func (v *values) newSlab(size int) *slab {
	var rescued []slabEntry
	var from *slab
	for v.used > 0 && v.used+int64(size) > v.budget {
		victim := v.victim()
		if victim == nil {
			break
		}
		v.remove(victim)
		if 2*victim.live.Load() < int64(victim.n) && from == nil && size == slabBytes {
			// Mostly superseded values: what still counts moves on to the new slab.
			from, rescued = victim, victim.entries
			continue
		}
		v.forget(victim, victim.entries)
	}
	s := &slab{id: v.nextID, buf: make([]byte, size)}
	v.nextID++
	v.used += int64(size)
	t := v.table.Load()
	base, old := t.base, t.slabs
	for len(old) > 0 && old[0] == nil {
		base, old = base+1, old[1:]
	}
	if len(old) == 0 {
		base = s.id
	}
	grown := append(append(make([]*slab, 0, len(old)+1), old...), s)
	v.table.Store(&slabTable{base: base, slabs: grown})
	if size == slabBytes {
		v.cur = s
	}
	if from != nil {
		v.rescue(from, rescued, s)
	}
	return s
}

// rescue copies the live Frames of a slab that is leaving into s.
func (v *values) rescue(from *slab, entries []slabEntry, s *slab) {
	for _, e := range entries {
		r := v.recs.at(e.rec)
		h := from.id<<slabOffsetBits | uint64(e.at)
		if r.val.Load() != h {
			v.forget(from, []slabEntry{e})
			continue
		}
		f := frameAt(from.buf[e.at:])
		at := s.n
		copy(s.buf[at:], f)
		s.n += len(f)
		s.entries = append(s.entries, slabEntry{rec: e.rec, at: uint32(at)})
		if r.val.CompareAndSwap(h, s.id<<slabOffsetBits|uint64(at)) {
			s.live.Add(int64(len(f)))
		} else {
			r.val.CompareAndSwap(h|stale, stale)
		}
	}
}

// forget makes the records of entries not resident. A record that has been freed and given to another
// key meanwhile bears another handle, and is left alone.
func (v *values) forget(s *slab, entries []slabEntry) {
	for _, e := range entries {
		r := v.recs.at(e.rec)
		h := s.id<<slabOffsetBits | uint64(e.at)
		if !r.val.CompareAndSwap(h, 0) {
			r.val.CompareAndSwap(h|stale, stale)
		}
	}
}

// victim is the slab with the fewest live bytes; where all are much alike, the oldest.
func (v *values) victim() *slab {
	var best *slab
	for _, s := range v.table.Load().slabs {
		if s == nil || s == v.cur {
			continue
		}
		if best == nil || s.live.Load()+slabBytes/16 < best.live.Load() {
			best = s
		}
	}
	return best
}

func (v *values) remove(s *slab) {
	t := v.table.Load()
	next := append([]*slab(nil), t.slabs...)
	next[s.id-t.base] = nil
	v.table.Store(&slabTable{base: t.base, slabs: next})
	v.used -= int64(len(s.buf))
}

// bytes is the memory that the slabs take.
func (v *values) bytes() int64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.used
}
