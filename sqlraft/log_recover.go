package sqlraft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

// recovered is what a log held when it was opened. All of it is durable.
type recovered struct {
	identity []byte            // as setIdentity was given it last, nil in a new log
	hard     *raftpb.HardState // the newest, empty when there is none
	// start and startTerm belong to the entry that the log goes on after, 0 in a new log: what purge or restart has left.
	start, startTerm uint64
	entries          []*raftpb.Entry // consecutive from start+1
}

// openLog opens the log in dir, which it makes if it is missing, or begins a new one there. What a crash has torn is cut
// off. Files that are not the log's are left alone. Only one process may have the directory open, which the caller sees to.
//
// Errors say what to do and wrap backend.ErrDamaged (something durable is lost or changed, or a file is missing),
// backend.ErrNewerSchema, backend.ErrDiskFull or backend.ErrStorage. A log that lacks all its files is a new log: who
// knows better has to say so.
func openLog(d disk, dir string) (*raftLog, *recovered, error) {
	l := &raftLog{d: d, dir: dir}
	rec, err := l.open()
	if err == nil {
		return l, rec, nil
	}
	if l.tail != nil {
		err = errors.Join(err, l.tail.f.close())
	}
	if !errors.Is(err, backend.ErrDamaged) && !errors.Is(err, backend.ErrNewerSchema) {
		err = explainDiskError(dir, err)
	}
	return nil, nil, err
}

func (l *raftLog) open() (*recovered, error) {
	if err := l.d.makeDirectory(l.dir); err != nil {
		return nil, err
	}
	names, err := l.d.list(l.dir)
	if err != nil {
		return nil, err
	}
	present := map[uint64]bool{}
	var newest uint64
	var dead []string
	for _, name := range names {
		if seq := parseSegmentName(name); seq > 0 {
			present[seq] = true
			newest = max(newest, seq)
		} else if name == nextName || name == spareName {
			// A spare may hold the beginning of a segment whose number comes again; so it is not used after a crash.
			dead = append(dead, name)
		}
	}

	var r replay
	if newest > 0 {
		if err := l.readBack(&r, newest, present); err != nil {
			return nil, err
		}
	}
	for _, name := range names {
		if seq := parseSegmentName(name); seq > 0 && seq < r.first {
			dead = append(dead, name)
		}
	}
	for _, name := range dead {
		if err := l.d.remove(filepath.Join(l.dir, name)); err != nil {
			return nil, err
		}
	}
	if newest == 0 {
		if err := l.begin(segmentHead{seq: 1, first: 1}, 0); err != nil {
			return nil, err
		}
	}
	hard := &raftpb.HardState{}
	if r.hard != (hardState{}) {
		hard = r.hard.message()
	}
	return &recovered{identity: bytes.Clone(r.identity), hard: hard, start: r.start, startTerm: r.startTerm, entries: r.entries}, nil
}

// readBack fills r from the segments that are present and makes the newest one the tail.
func (l *raftLog) readBack(r *replay, newest uint64, present map[uint64]bool) error {
	tail, f, err := l.load(newest, nil)
	if err != nil {
		return err
	}
	l.tail = &segmentWriter{f: f, seq: newest}
	if r.first, err = tail.first(); err != nil {
		return err
	}
	var buffer []byte
	for seq := r.first; seq < newest; seq++ {
		if !present[seq] {
			return missingSegment(l.dir, seq)
		}
		m, f, err := l.load(seq, buffer)
		if err != nil {
			return err
		}
		if err := errors.Join(r.segment(m), f.close()); err != nil {
			return err
		}
		buffer = m.raw
	}
	if err := r.segment(tail); err != nil {
		return err
	}
	if r.last < r.start {
		return tail.damaged(r.end, "the log begins after entry %d and ends with %d", r.start, r.last)
	}
	l.segments = r.segments
	for _, s := range l.segments {
		l.bytes.Add(s.size)
	}
	l.identity, l.hard, l.last, l.lastTerm = r.identity, r.hard, r.last, r.lastTerm
	return l.mendTail(tail, r.end, r.synced)
}

func missingSegment(dir string, seq uint64) error {
	return fmt.Errorf("%w: %s is missing: put it back if you have moved it; else replace this member, as docs/raft.md says",
		backend.ErrDamaged, filepath.Join(dir, segmentName(seq)))
}

// load reads a whole segment, into buffer if that is large enough. The file stays open.
func (l *raftLog) load(seq uint64, buffer []byte) (*segmentImage, diskFile, error) {
	path := filepath.Join(l.dir, segmentName(seq))
	f, err := l.d.open(path)
	if err != nil {
		return nil, nil, err
	}
	size, err := f.size()
	if err != nil {
		return nil, nil, errors.Join(err, f.close())
	}
	size -= size % sectorBytes
	if int64(cap(buffer)) < size {
		buffer = make([]byte, size)
	}
	m := &segmentImage{path: path, seq: seq, raw: buffer[:size]}
	if err := f.read(m.raw, 0); err != nil {
		return nil, nil, errors.Join(err, f.close())
	}
	return m, f, nil
}

// mendTail makes the newest segment ready to go on after its last whole batch, in sector end.
//
// What the batches hold may be in the page cache only: the process was killed before it synced them, or the sync failed
// and the kernel then took the pages for clean. So everything that was not known to be durable is written again. What is
// left of a torn batch is zeroed, so that it can never be taken for the rest of a later one.
func (l *raftLog) mendTail(m *segmentImage, end, synced uint32) error {
	remains := end
	for at := end; at < m.sectors(); at++ {
		if m.tag(at)>>1 != tagOf(m.seq, false)>>1 {
			continue
		}
		remains = at + 1
		if m.look(at, true) == sectorPresent && binary.LittleEndian.Uint32(m.sector(at)[stampBytes+4:]) > end {
			return m.damaged(end, "what follows at byte %d shows that something durable is lost", int64(at)*sectorBytes)
		}
	}
	clear(m.raw[int(end)*sectorBytes : int(remains)*sectorBytes])
	if err := l.tail.f.write(m.raw[int(synced)*sectorBytes:int(remains)*sectorBytes], int64(synced)*sectorBytes); err != nil {
		return err
	}
	if err := l.tail.f.sync(); err != nil {
		return err
	}
	l.tail.end, l.tail.synced = end, end
	return l.d.syncDirectory(l.dir) // the crash may have come before begin did it
}

// first returns the oldest segment that counts, as this one has it. It is an error if this one is not the newest.
func (m *segmentImage) first() (uint64, error) {
	head, err := m.head()
	if err != nil {
		return 0, err
	}
	first := head.first
	for at := uint32(0); ; {
		records, _, after, err := m.batch(at)
		if err != nil || after == at {
			return first, err
		}
		for len(records) > 0 {
			kind, body, rest, ok := cutRecord(records)
			if !ok {
				return 0, m.damaged(at, "a record is cut off")
			}
			switch kind {
			case kindSeal:
				return 0, missingSegment(filepath.Dir(m.path), m.seq+1)
			case kindFirst:
				if len(body) != 8 || binary.LittleEndian.Uint64(body) < first || binary.LittleEndian.Uint64(body) > m.seq {
					return 0, m.damaged(at, "impossible first segment")
				}
				first = binary.LittleEndian.Uint64(body)
			}
			records = rest
		}
		at = after
	}
}

// replay is the state that the batches, read in order, lead to.
type replay struct {
	first    uint64 // the oldest segment that counts
	segments []segment

	identity         []byte
	hard             hardState
	start, startTerm uint64
	last, lastTerm   uint64
	entries          []*raftpb.Entry // those above start

	previous *segmentImage // the segment read last
	end      uint32        // the sector after its last batch, the seal left out
	synced   uint32        // as the last batch has it
	sealed   bool
}

// segment reads one segment. Errors wrap backend.ErrDamaged or backend.ErrNewerSchema.
func (r *replay) segment(m *segmentImage) error {
	head, err := m.head()
	if err != nil {
		return err
	}
	before := *r
	if before.previous != nil && head.previousEnd != r.end {
		return r.previous.damaged(min(r.end, head.previousEnd), "its batches end in sector %d, the next segment says %d", r.end, head.previousEnd)
	}
	r.segments = append(r.segments, segment{seq: m.seq, size: head.size, start: head.last})
	r.identity, r.hard, r.last, r.lastTerm = nil, hardState{}, head.last, head.lastTerm
	r.previous, r.end, r.synced, r.sealed = m, 0, 0, false
	for !r.sealed {
		records, synced, after, err := m.batch(r.end)
		if err != nil {
			return err
		}
		if after == r.end {
			break
		}
		if err := r.batch(m, records); err != nil {
			return err
		}
		switch {
		case r.end > 0:
		case before.previous == nil:
			r.start, r.startTerm = r.last, r.lastTerm
		case !bytes.Equal(r.identity, before.identity) || r.hard != before.hard || r.last != before.last || r.lastTerm != before.lastTerm:
			return m.damaged(0, "it does not go on where %s ends", filepath.Base(before.previous.path))
		}
		if !r.sealed {
			r.end, r.synced = after, synced
		}
	}
	return nil
}

// batch takes in the batch at sector r.end.
func (r *replay) batch(m *segmentImage, records []byte) error {
	for n := 0; len(records) > 0; n++ {
		kind, body, rest, ok := cutRecord(records)
		if !ok {
			return m.damaged(r.end, "a record is cut off")
		}
		records = rest
		if (kind == kindHead) != (r.end == 0 && n == 0) || r.end == 0 && n > 0 && kind != kindIdentity && kind != kindHard {
			return m.damaged(r.end, "record %d where it cannot be", kind)
		}
		switch kind {
		case kindHead: // see segment
		case kindIdentity:
			r.identity = append([]byte{}, body...)
		case kindHard:
			var hs raftpb.HardState
			if err := proto.Unmarshal(body, &hs); err != nil {
				return m.damaged(r.end, "a hard state cannot be read: %v", err)
			}
			r.hard = hardState{hs.GetTerm(), hs.GetVote(), hs.GetCommit()}
		case kindEntry:
			e := &raftpb.Entry{}
			if err := proto.Unmarshal(body, e); err != nil {
				return m.damaged(r.end, "an entry cannot be read: %v", err)
			}
			if e.GetIndex() == 0 || e.GetIndex() > r.last+1 {
				return m.damaged(r.end, "entry %d follows %d", e.GetIndex(), r.last)
			}
			r.entry(e)
		case kindFirst: // see segmentImage.first
		case kindSeal:
			r.sealed = true
		default:
			return m.damaged(r.end, "unknown record %d", kind)
		}
	}
	if r.hard.commit > r.last {
		return m.damaged(r.end, "index %d is committed, but the entries end with %d", r.hard.commit, r.last)
	}
	return nil
}

// entry puts e at its place and drops what stood there and after it. Of what a purge has left, the first entries may
// overwrite some that the start of the segment still stands for.
func (r *replay) entry(e *raftpb.Entry) {
	index := e.GetIndex()
	r.last, r.lastTerm = index, e.GetTerm()
	if index <= r.start {
		r.entries = nil
		if index == r.start {
			r.startTerm = e.GetTerm()
		}
		return
	}
	r.entries = append(r.entries[:index-r.start-1], e)
}
