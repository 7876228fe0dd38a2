package sqlraft

import (
	"fmt"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
)

// storage is the part of the log that Raft reads: the entries that are on disk and may still be sent to a follower or
// applied. Older ones are compacted away here while the disk still has them, until what they did is durable
// elsewhere. It belongs to the goroutine of its core.
type storage struct {
	hardState *raftpb.HardState
	conf      *raftpb.ConfState

	// entries[0] is only an index and a term: those before the first entry. The entries are never changed and the slice
	// is never written behind what was handed out: Raft and the transport keep parts of it.
	entries []*raftpb.Entry
	bytes   int

	// snapshot, when not nil, is one that can be sent; wanted says that Raft has asked for one that was not there.
	snapshot *raftpb.Snapshot
	wanted   bool
}

// newStorage holds the entries after (index, term).
func newStorage(index, term uint64, entries []*raftpb.Entry) *storage {
	s := &storage{}
	s.restart(index, term)
	s.append(entries)
	return s
}

// restart forgets all entries; the next one to come is index+1.
func (s *storage) restart(index, term uint64) {
	s.entries = []*raftpb.Entry{{Index: new(index), Term: new(term)}}
	s.bytes = 0
}

func (s *storage) first() uint64 { return s.entries[0].GetIndex() + 1 }

func (s *storage) last() uint64 { return s.entries[0].GetIndex() + uint64(len(s.entries)) - 1 }

// has says whether the log holds index with that term, or begins behind it.
func (s *storage) has(index, term uint64) bool {
	t, err := s.Term(index)
	return err == nil && t == term
}

// footprint is about what an entry takes in memory.
func footprint(e *raftpb.Entry) int { return len(e.GetData()) + 96 }

// append adds entries, which replace those that have the same index and everything behind.
func (s *storage) append(entries []*raftpb.Entry) {
	if len(entries) == 0 {
		return
	}
	at := entries[0].GetIndex()
	if at < s.first() || at > s.last()+1 {
		panic(fmt.Sprintf("sqlraft: entry %d cannot be put into a log from %d to %d", at, s.first(), s.last()))
	}
	keep := at - s.entries[0].GetIndex()
	for _, e := range s.entries[keep:] {
		s.bytes -= footprint(e)
	}
	if keep < uint64(len(s.entries)) {
		s.entries = s.entries[:keep:keep] // what is replaced may be on its way to a follower
	}
	s.entries = append(s.entries, entries...)
	for _, e := range entries {
		s.bytes += footprint(e)
	}
}

// compact drops the entries up to index.
func (s *storage) compact(index uint64) {
	if index < s.first() {
		return
	}
	if index > s.last() {
		panic(fmt.Sprintf("sqlraft: compaction to %d of a log that ends at %d", index, s.last()))
	}
	drop := index - s.entries[0].GetIndex()
	for _, e := range s.entries[1 : drop+1] {
		s.bytes -= footprint(e)
	}
	kept := make([]*raftpb.Entry, 0, len(s.entries)-int(drop)+64)
	kept = append(kept, &raftpb.Entry{Index: new(index), Term: new(s.entries[drop].GetTerm())})
	s.entries = append(kept, s.entries[drop+1:]...)
}

// keep compacts so that of the entries up to applied about the newest `entries` and `bytes` stay. Copying the rest
// costs, so that it waits until there is a quarter more.
func (s *storage) keep(applied uint64, entries int, bytes int) {
	if applied < s.first() {
		return
	}
	have := int(applied - s.first() + 1)
	if have <= entries+entries/4 && s.bytes <= bytes+bytes/4 {
		return
	}
	drop, size := max(0, have-entries), s.bytes
	for _, e := range s.entries[1 : drop+1] {
		size -= footprint(e)
	}
	for ; drop < have && size > bytes; drop++ {
		size -= footprint(s.entries[drop+1])
	}
	s.compact(s.entries[0].GetIndex() + uint64(drop))
}

// InitialState is part of raft.Storage, as are the methods below.
func (s *storage) InitialState() (*raftpb.HardState, *raftpb.ConfState, error) {
	return s.hardState, s.conf, nil
}

func (s *storage) Entries(lo, hi, maxSize uint64) ([]*raftpb.Entry, error) {
	if lo < s.first() {
		return nil, raft.ErrCompacted
	}
	if hi > s.last()+1 || lo >= hi {
		return nil, raft.ErrUnavailable
	}
	offset := s.entries[0].GetIndex()
	found := s.entries[lo-offset : hi-offset]
	size := uint64(0)
	for i, e := range found {
		size += uint64(footprint(e))
		if size > maxSize && i > 0 {
			found = found[:i]
			break
		}
	}
	return found[:len(found):len(found)], nil
}

func (s *storage) Term(index uint64) (uint64, error) {
	if index+1 < s.first() {
		return 0, raft.ErrCompacted
	}
	if index > s.last() {
		return 0, raft.ErrUnavailable
	}
	return s.entries[index-s.entries[0].GetIndex()].GetTerm(), nil
}

func (s *storage) FirstIndex() (uint64, error) { return s.first(), nil }

func (s *storage) LastIndex() (uint64, error) { return s.last(), nil }

func (s *storage) Snapshot() (*raftpb.Snapshot, error) {
	if s.snapshot == nil || s.snapshot.GetMetadata().GetIndex()+1 < s.first() {
		s.wanted = true
		return nil, raft.ErrSnapshotTemporarilyUnavailable
	}
	return s.snapshot, nil
}
