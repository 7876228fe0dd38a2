package backend

import "sync/atomic"

// record is one revision of one key: what is known of a row without reading it. Records live in
// pointer-free chunks, so that the garbage collector has nothing to follow, and are named by number;
// 0 is no record.
//
// All fields but val are written before the record becomes reachable through a slot, and not changed
// while a reader can reach them. Who can reach what is decided by Views: see view.go.
type record struct {
	id      int64 // row id in the revision table; 0 once the row of a tombstone is gone
	rev     int64
	create  int64 // 0: a tombstone
	version int64
	lease   int64
	val     atomic.Uint64 // where the value is resident (values.go), 0 when it is not
	prev    uint32        // the key's revision before this one
	size    uint32        // bytes of the value
}

func (r *record) tombstone() bool { return r.create == 0 }

const recordChunkBits = 12

type recordChunk [1 << recordChunkBits]record

// records is the arena. The committer allocates and frees; readers only look.
type records struct {
	chunks atomic.Pointer[[]*recordChunk]
	free   []uint32
	next   uint32
}

func newRecords() *records {
	a := &records{next: 1}
	a.chunks.Store(&[]*recordChunk{new(recordChunk)})
	return a
}

// at returns record n. REQUIRES: n was allocated and the caller's View can reach it.
func (a *records) at(n uint32) *record {
	return &(*a.chunks.Load())[n>>recordChunkBits][n&(1<<recordChunkBits-1)]
}

func (a *records) alloc() uint32 {
	if k := len(a.free); k > 0 {
		n := a.free[k-1]
		a.free = a.free[:k-1]
		return n
	}
	n := a.next
	a.next++
	if chunks := *a.chunks.Load(); int(n>>recordChunkBits) == len(chunks) {
		grown := append(chunks[:len(chunks):len(chunks)], new(recordChunk))
		a.chunks.Store(&grown)
	}
	return n
}

// release gives record n back. REQUIRES: no reader can reach it.
func (a *records) release(n uint32) { a.free = append(a.free, n) }

const slotChunkBits = 12

type slotChunk [1 << slotChunkBits]atomic.Uint32

// slots holds the newest record of each key. The tree maps a key to its slot; the slot's head moves
// with every write, so that writing an existing key leaves the tree alone.
type slots struct {
	chunks atomic.Pointer[[]*slotChunk]
	free   []uint32
	next   uint32
}

func newSlots() *slots {
	s := &slots{}
	s.chunks.Store(&[]*slotChunk{new(slotChunk)})
	return s
}

func (s *slots) head(n uint32) uint32 {
	return (*s.chunks.Load())[n>>slotChunkBits][n&(1<<slotChunkBits-1)].Load()
}

func (s *slots) setHead(n, rec uint32) {
	(*s.chunks.Load())[n>>slotChunkBits][n&(1<<slotChunkBits-1)].Store(rec)
}

func (s *slots) alloc() uint32 {
	if k := len(s.free); k > 0 {
		n := s.free[k-1]
		s.free = s.free[:k-1]
		return n
	}
	n := s.next
	s.next++
	if chunks := *s.chunks.Load(); int(n>>slotChunkBits) == len(chunks) {
		grown := append(chunks[:len(chunks):len(chunks)], new(slotChunk))
		s.chunks.Store(&grown)
	}
	return n
}

func (s *slots) release(n uint32) { s.free = append(s.free, n) }
