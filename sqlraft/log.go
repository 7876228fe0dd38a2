package sqlraft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/quire-db/quire/backend"
)

// raftLog keeps raft's entries and its hard state in files of one directory, the segments (see log_segment.go).
//
// Promises:
//
//  1. What append was given with sync, and everything before it, is found again by openLog, after kill -9 and after a power
//     cut at any instruction. The same goes for setIdentity and restart when they have returned.
//  2. Of what was not synced a beginning is found: whole appends, in order, none left out.
//  3. Nothing else is found. Damage to what was durable is reported by openLog (backend.ErrDamaged), not skipped over.
//  4. After an error nothing more is written: the log is as a crash would have left it, and every later call that writes
//     returns that first error. To go on, open the log again.
//
// One goroutine at a time may use it; size may be called by any.
type raftLog struct {
	d   disk
	dir string

	segments []segment      // oldest first
	tail     *segmentWriter // of the last one
	spare    bool           // there is a file that the next segment can be made of

	identity       []byte
	hard           hardState
	last, lastTerm uint64 // of the newest entry, or of the one that the log goes on after. Invariant: hard.commit <= last

	failed error
	bytes  atomic.Int64
	batch  []byte // reused
	framed []byte // reused

	written logWritten // since takeWritten was called
}

// logWritten is how much was written, and how long that took.
type logWritten struct {
	bytes int
	took  time.Duration
}

type segment struct {
	seq   uint64
	size  int64  // bytes
	start uint64 // the log ended with this index when the segment was begun
}

// segmentWriter is a segment that is written to.
type segmentWriter struct {
	f      diskFile
	seq    uint64
	end    uint32 // the sector that the next batch begins in
	synced uint32 // sectors known to be durable. Invariant: synced <= end
}

// sync makes durable what was written. Does nothing if it is.
func (w *segmentWriter) sync() error {
	if w.synced == w.end {
		return nil
	}
	if err := w.f.sync(); err != nil {
		return err
	}
	w.synced = w.end
	return nil
}

// hardState is raftpb.HardState without the pointers.
type hardState struct{ term, vote, commit uint64 }

func (h hardState) message() *raftpb.HardState {
	return &raftpb.HardState{Term: &h.term, Vote: &h.vote, Commit: &h.commit}
}

// orElse returns what hs says, or h when it says nothing.
func (h hardState) orElse(hs *raftpb.HardState) hardState {
	if said := (hardState{hs.GetTerm(), hs.GetVote(), hs.GetCommit()}); said != (hardState{}) {
		return said
	}
	return h
}

// keptBuffer is how large, in bytes, a buffer may be that is kept for the next append.
const keptBuffer = 8 << 20

// setIdentity stores whose log this is, durably. The bytes mean nothing to the log.
func (l *raftLog) setIdentity(identity []byte) error {
	if l.failed != nil {
		return l.failed
	}
	identity = append([]byte{}, identity...)
	l.batch = addRecord(newBatch(l.batch), kindIdentity, identity)
	if err := l.write(); err != nil {
		return err
	}
	l.identity = identity
	return l.sync()
}

// append writes the hard state, if it is given and not empty, and the entries as one: either all of it is found again or
// nothing. Entries must follow each other and begin at most one after the newest; those they meet are overwritten with all
// that follow. With sync everything is durable when it returns. It keeps neither hs nor the entries.
//
// REQUIRES: what is committed is not overwritten, and not more is committed than there is; else it panics.
func (l *raftLog) append(hs *raftpb.HardState, entries []*raftpb.Entry, sync bool) error {
	if l.failed != nil {
		return l.failed
	}
	hard := l.hard.orElse(hs)
	l.checkAppend(hard, entries)
	var err error
	l.batch = newBatch(l.batch)
	if hard != l.hard {
		l.batch, err = addMessage(l.batch, kindHard, hs)
	}
	for i := 0; i < len(entries) && err == nil; i++ {
		l.batch, err = addMessage(l.batch, kindEntry, entries[i])
	}
	if err != nil {
		return l.fail(err)
	}
	if err := l.write(); err != nil {
		return err
	}
	l.hard = hard
	if n := len(entries); n > 0 {
		l.last, l.lastTerm = entries[n-1].GetIndex(), entries[n-1].GetTerm()
	}
	if sync {
		return l.sync()
	}
	return nil
}

func (l *raftLog) checkAppend(hard hardState, entries []*raftpb.Entry) {
	last := l.last
	for i, e := range entries {
		index := e.GetIndex()
		if i == 0 && (index > last+1 || index <= max(l.hard.commit, l.segments[0].start)) || i > 0 && index != last+1 {
			panic(fmt.Sprintf("sqlraft: entry %d of %d has index %d: the log goes from %d to %d, committed %d, and %d would be next",
				i, len(entries), index, l.segments[0].start, l.last, l.hard.commit, last+1))
		}
		last = index
	}
	if hard.commit > last {
		panic(fmt.Sprintf("sqlraft: index %d is committed, the log ends at %d", hard.commit, last))
	}
}

// restart forgets all entries: the log goes on after index, which an installed snapshot reaches up to, and everything up to
// there is committed. Hs, if given and not empty, is the new hard state, save that its commit becomes index and its term at
// least term. It is durable when this returns; after a crash in the middle the log is the old or the new one.
func (l *raftLog) restart(index, term uint64, hs *raftpb.HardState) error {
	if l.failed != nil {
		return l.failed
	}
	hard := l.hard.orElse(hs)
	hard.commit = index
	if hard.term < term {
		hard.term, hard.vote = term, 0
	}
	old, oldTail := l.segments, l.tail
	l.hard, l.last, l.lastTerm = hard, index, term
	seq := oldTail.seq + 1
	if err := l.begin(segmentHead{seq: seq, first: seq, last: index, lastTerm: term}, 0); err != nil {
		return l.fail(err)
	}
	l.segments = l.segments[len(old):]
	if err := oldTail.f.close(); err != nil {
		return l.fail(err)
	}
	return l.discard(old)
}

// purge removes the segments that hold nothing above index. It never removes the newest one.
// REQUIRES: everything up to index is committed, and nobody needs it any more.
func (l *raftLog) purge(index uint64) error {
	if l.failed != nil {
		return l.failed
	}
	n := 0
	for n < len(l.segments)-1 && l.segments[n+1].start <= index {
		n++
	}
	if n == 0 {
		return nil
	}
	old := l.segments[:n]
	l.segments = l.segments[n:]
	l.batch = addRecord(newBatch(l.batch), kindFirst, binary.LittleEndian.AppendUint64(nil, l.segments[0].seq))
	if err := l.write(); err != nil {
		return err
	}
	if err := l.sync(); err != nil {
		return err
	}
	return l.discard(old)
}

// size is how many bytes the files of the log take, the room set aside in them included.
func (l *raftLog) size() int64 { return l.bytes.Load() }

// close makes everything durable that is not yet, unless the log has failed.
func (l *raftLog) close() error {
	var err error
	if l.failed == nil {
		err = l.sync()
	}
	if l.failed == nil {
		l.failed = fmt.Errorf("the raft log in %s: %w", l.dir, backend.ErrClosed)
	}
	return errors.Join(err, l.tail.f.close())
}

// write appends l.batch, unless it is empty, to the newest segment or, if it has no room there, to a new one.
func (l *raftLog) write() error {
	if len(l.batch) == batchHeaderBytes {
		return nil
	}
	if len(l.batch) > maxBatchBytes {
		return l.fail(fmt.Errorf("%d bytes in one append, at most %d are possible", len(l.batch), maxBatchBytes))
	}
	full := l.segments[len(l.segments)-1]
	if need := sectorsFor(len(l.batch)) + sealSectors; int64(l.tail.end)+int64(need) > full.size/sectorBytes {
		if err := l.roll(need); err != nil {
			return l.fail(err)
		}
	}
	if err := l.put(l.tail, l.batch); err != nil {
		return l.fail(err)
	}
	if cap(l.framed) > keptBuffer {
		l.batch, l.framed = nil, nil
	}
	return nil
}

// put writes a batch to the end of a segment.
func (l *raftLog) put(w *segmentWriter, batch []byte) error {
	finishBatch(batch, w.synced)
	l.framed = appendSectors(l.framed[:0], batch, w.seq, w.end)
	start := time.Now()
	if err := w.f.write(l.framed, int64(w.end)*sectorBytes); err != nil {
		return err
	}
	l.written.bytes += len(l.framed)
	l.written.took += time.Since(start)
	w.end += uint32(len(l.framed) / sectorBytes)
	return nil
}

// takeWritten returns what was written since the last call.
func (l *raftLog) takeWritten() logWritten {
	w := l.written
	l.written = logWritten{}
	return w
}

func (l *raftLog) sync() error {
	if err := l.tail.sync(); err != nil {
		return l.fail(err)
	}
	return nil
}

// roll begins the segment after the newest one, with room for a number of sectors.
func (l *raftLog) roll(need uint32) error {
	// Only what is durable may have a successor: else the end of the segment could be lost, which would look like damage.
	full := l.tail
	if err := full.sync(); err != nil {
		return err
	}
	err := l.begin(segmentHead{seq: full.seq + 1, first: l.segments[0].seq, previousEnd: full.end, last: l.last, lastTerm: l.lastTerm}, need)
	if err != nil {
		return err
	}
	// The seal tells a log whose newest file is missing from one that ends here.
	if err := l.put(full, addRecord(newBatch(nil), kindSeal, nil)); err != nil {
		return errors.Join(err, full.f.close())
	}
	return errors.Join(full.sync(), full.f.close())
}

// begin makes a segment, with room for a number of sectors after its first batch, and turns to it; the caller closes the
// one before. The segment is durable, with its name, when begin returns; without the name it does not count.
func (l *raftLog) begin(head segmentHead, room uint32) error {
	head.size = l.d.segmentBytes()
	batch, err := l.firstBatch(head)
	if err != nil {
		return err
	}
	if needed := int64(sectorsFor(len(batch))+max(room, sealSectors)) * sectorBytes; needed > head.size {
		head.size = needed
		if batch, err = l.firstBatch(head); err != nil {
			return err
		}
	}

	w := &segmentWriter{seq: head.seq}
	name := nextName
	if l.spare && head.size == l.d.segmentBytes() {
		name, l.spare = spareName, false
		w.f, err = l.d.open(filepath.Join(l.dir, name))
	} else if w.f, err = l.d.create(filepath.Join(l.dir, name), head.size); err == nil {
		l.bytes.Add(head.size)
	}
	if err != nil {
		return err
	}
	if err = l.put(w, batch); err == nil {
		err = w.sync()
	}
	if err == nil {
		err = l.d.rename(filepath.Join(l.dir, name), filepath.Join(l.dir, segmentName(head.seq)))
	}
	if err == nil {
		err = l.d.syncDirectory(l.dir)
	}
	if err != nil {
		return errors.Join(err, w.f.close())
	}
	l.tail = w
	l.segments = append(l.segments, segment{seq: head.seq, size: head.size, start: head.last})
	return nil
}

// firstBatch is what a segment begins with.
func (l *raftLog) firstBatch(head segmentHead) (batch []byte, err error) {
	batch = addRecord(newBatch(nil), kindHead, head.encode())
	if l.identity != nil {
		batch = addRecord(batch, kindIdentity, l.identity)
	}
	if l.hard != (hardState{}) {
		batch, err = addMessage(batch, kindHard, l.hard.message())
	}
	return batch, err
}

// discard removes segments that do not count any more, or keeps one to make the next one of: its blocks are written
// already, so that a sync does not have to tell the file system's journal of them. The directory is not synced: segments
// that come back with a power cut are removed by the next openLog.
func (l *raftLog) discard(old []segment) error {
	var errs []error
	for _, s := range old {
		if !l.spare && s.size == l.d.segmentBytes() {
			if err := l.d.rename(filepath.Join(l.dir, segmentName(s.seq)), filepath.Join(l.dir, spareName)); err != nil {
				errs = append(errs, err)
			} else {
				l.spare = true
			}
			continue
		}
		if err := l.d.remove(filepath.Join(l.dir, segmentName(s.seq))); err != nil {
			errs = append(errs, err)
			continue
		}
		l.bytes.Add(-s.size)
	}
	if len(errs) > 0 {
		return l.fail(errors.Join(errs...))
	}
	return nil
}

// fail ends the writing, and says why.
func (l *raftLog) fail(err error) error {
	if l.failed == nil {
		l.failed = explainDiskError(l.dir, err)
	}
	return l.failed
}

// explainDiskError says what to do when the disk has failed to do something for the log, and wraps backend.ErrDiskFull or
// backend.ErrStorage.
func explainDiskError(dir string, err error) error {
	switch {
	case errors.Is(err, backend.ErrDiskFull) || errors.Is(err, backend.ErrStorage):
		return err
	case errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("%w: the raft log in %s: free space on its file system and start again: %w", backend.ErrDiskFull, dir, err)
	case errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%w: the raft log in %s: its file system is read-only: look for disk errors in the system's log, remount it and start again: %w",
			backend.ErrStorage, dir, err)
	case errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM):
		return fmt.Errorf("%w: the raft log in %s: give the user that runs quire permission to write there: %w", backend.ErrStorage, dir, err)
	default:
		return fmt.Errorf("%w: the raft log in %s: look for disk errors in the system's log, then start again: %w", backend.ErrStorage, dir, err)
	}
}
