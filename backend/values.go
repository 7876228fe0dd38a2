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
	table atomic.Pointer[[]atomic.Pointer[slab]] // by place; replaced when it grows

	mu     sync.Mutex
	budget int64
	used   int64
	cur    *slab
	born   uint64 // slabs made so far
}

// slab has a place in the table, which it leaves to another when it goes. Its id is the place and how many slabs
// had it before, so that a handle of an older one is told apart.
type slab struct {
	id      uint64
	born    uint64 // counts up: which one is older
	buf     []byte // its full length is backing memory; [0,n) is written
	n       int
	live    atomic.Int64 // bytes of Frames that are the newest of their key
	entries []slabEntry
}

type slabEntry struct {
	rec uint32
	at  uint32
}

// A handle is, from the top: the stale mark, the slab's id, the offset in it.
const (
	slabBytes      = 1 << 20
	slabOffsetBits = 20
	slabPlaceBits  = 20
	slabIDMask     = 1<<(63-slabOffsetBits) - 1
	// stale marks a handle whose record has been superseded: it no longer counts as live.
	stale = 1 << 63
)

func newValues(recs *records, budget int64) *values {
	v := &values{recs: recs, budget: budget}
	v.table.Store(new([]atomic.Pointer[slab]))
	return v
}

// get returns the resident Frame of r, or nil.
func (v *values) get(r *record) Frame {
	h := r.val.Load() &^ stale
	if h == 0 {
		return nil
	}
	s := v.slabOf(h)
	if s == nil {
		return nil
	}
	return frameAt(s.buf[h&(1<<slabOffsetBits-1):])
}

// slabOf finds the slab of a handle without a lock; nil when it is gone.
func (v *values) slabOf(h uint64) *slab {
	id := h &^ stale >> slabOffsetBits
	table := *v.table.Load()
	place := id & (1<<slabPlaceBits - 1)
	if place >= uint64(len(table)) {
		return nil
	}
	if s := table[place].Load(); s != nil && s.id == id {
		return s
	}
	return nil
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

// fill makes a Frame that was read from SQL resident, unless another reader was first, and returns the resident one:
// so a hundred readers of the same value hold it once.
func (v *values) fill(rec uint32, f Frame) Frame {
	v.mu.Lock()
	defer v.mu.Unlock()
	r := v.recs.at(rec)
	if r.val.Load()&^stale != 0 {
		if there := v.get(r); there != nil {
			return there
		}
		return f
	}
	buf, h := v.room(rec, len(f))
	filled := Frame(append(buf, f...))
	if !r.val.CompareAndSwap(0, h) {
		// Superseded meanwhile: the mark is kept, so the Frame does not count as live.
		r.val.Store(h | stale)
		v.slabOf(h).live.Add(-int64(len(f)))
	}
	return filled
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

// room finds n bytes for record rec: an empty slice with that capacity, and its handle.
// REQUIRES: v.mu is held.
func (v *values) room(rec uint32, n int) (buf []byte, handle uint64) {
	s := v.cur
	for s == nil || s.n+n > len(s.buf) {
		// A new slab may begin with Frames rescued from another, up to a half of it.
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
	soft := 2 // it shrinks in small steps: a slab has thousands of Frames to forget
	for limit := v.limit(); v.used > 0 && v.used+int64(size) > limit; {
		if v.used+int64(size) <= v.budget {
			if soft == 0 {
				break
			}
			soft--
		}
		victim := v.victim()
		if victim == nil {
			break
		}
		v.remove(victim)
		if 2*victim.live.Load() < int64(victim.n) && from == nil && size == slabBytes && len(victim.buf) == slabBytes {
			// Mostly superseded values: what still counts moves on to the new slab.
			from, rescued = victim, victim.entries
			continue
		}
		v.forget(victim, victim.entries)
	}
	s := v.place(size)
	if size == slabBytes {
		v.cur = s
	}
	if from != nil {
		v.rescue(from, rescued, s)
	}
	return s
}

// keepSuperseded is how many bytes of superseded Frames may stay beside as many as there are newest ones: whoever reads
// a little in the past (a watcher's prev_kv, a list that goes on at its revision) finds them there.
const keepSuperseded = 32 << 20

// limit is the budget, or less when it would be filled with superseded Frames. To get there newest ones that lie among
// them may leave too.
func (v *values) limit() int64 {
	live := int64(0)
	for i := range *v.table.Load() {
		if s := (*v.table.Load())[i].Load(); s != nil {
			live += s.live.Load()
		}
	}
	return min(v.budget, 2*live+keepSuperseded)
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

// victim is the slab with the fewest live bytes for its size; where they are much alike, the oldest.
func (v *values) victim() *slab {
	var best *slab
	for i := range *v.table.Load() {
		s := (*v.table.Load())[i].Load()
		if s == nil || s == v.cur {
			continue
		}
		if best == nil {
			best = s
			continue
		}
		more := s.density() - best.density()
		if more < -slabBytes/16 || more <= slabBytes/16 && s.born < best.born {
			best = s
		}
	}
	return best
}

// density is the live bytes of a slab, as of one of the usual size.
func (s *slab) density() int64 { return s.live.Load() * slabBytes / int64(len(s.buf)) }

// place makes a slab and gives it the first free place in the table.
func (v *values) place(size int) *slab {
	table := *v.table.Load()
	at := 0
	for at < len(table) && table[at].Load() != nil {
		at++
	}
	if at == len(table) {
		grown := make([]atomic.Pointer[slab], len(table)+len(table)/2+8)
		for i := range table {
			grown[i].Store(table[i].Load())
		}
		v.table.Store(&grown)
		table = grown
	}
	v.born++
	s := &slab{id: (v.born<<slabPlaceBits | uint64(at)) & slabIDMask, born: v.born, buf: make([]byte, size)}
	v.used += int64(size)
	table[at].Store(s)
	return s
}

func (v *values) remove(s *slab) {
	(*v.table.Load())[s.id&(1<<slabPlaceBits-1)].Store(nil)
	v.used -= int64(len(s.buf))
}

// bytes is the memory that the slabs take.
func (v *values) bytes() int64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.used
}
