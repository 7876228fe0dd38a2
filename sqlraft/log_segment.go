package sqlraft

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

// A segment is a file of the log, named by its sequence number. All integers are little endian.
//
//	sector   checksum u32 | tag u32 | 504 bytes of payload
//	batch    length u32 | synced u32 | records       in the payloads of as many sectors as it takes, the last one padded
//	record   kind u8 | length u32 | body
//
// What one append writes is one batch, in sectors of its own: what is durable is never written again, so a torn write
// cannot harm it. The checksum (CRC-32C) covers the tag, the payload and the sector's place in the file; the tag names the
// segment and says whether a batch begins here. So each sector speaks for itself, and a torn write, where some sectors are
// what they were before (zeros, or intact sectors of the file's earlier life as another segment), is told from damage,
// where a sector is neither.
//
// Synced is the number of sectors at the start of the segment that were known to be durable when the batch was written. A
// batch that lies behind a hole and says that the hole was durable proves that something is lost.
//
// A segment begins with a batch of its own that makes it independent of those before it: head, identity, hard state. The
// segments that count are those from the newest head's (or kindFirst's) number on; that is written and synced before older
// ones are removed, so it does not matter which of them a power cut brings back.
const (
	sectorBytes       = 512
	stampBytes        = 8
	payloadBytes      = sectorBytes - stampBytes
	batchHeaderBytes  = 8
	recordHeaderBytes = 5
	segmentVersion    = 1
	sealSectors       = 1 // kept free at the end of a segment
	// maxBatchBytes bounds one append; far more than raft ever hands over at once.
	maxBatchBytes = 1 << 30
)

const (
	kindHead     = 1 // segmentHead; first in the first batch, and nowhere else
	kindIdentity = 2
	kindHard     = 3 // raftpb.HardState
	kindEntry    = 4 // raftpb.Entry
	kindFirst    = 5 // u64: the oldest segment that still counts
	kindSeal     = 6 // nothing follows, and the next segment's name was durable when this was written
)

const (
	segmentSuffix = ".log"
	nextName      = "next" + segmentSuffix  // a new segment that has not got its name yet
	spareName     = "spare" + segmentSuffix // an old segment, to become a new one
)

func segmentName(seq uint64) string { return fmt.Sprintf("%016x%s", seq, segmentSuffix) }

// parseSegmentName returns 0 for a file that is not a segment.
func parseSegmentName(name string) uint64 {
	digits, ok := strings.CutSuffix(name, segmentSuffix)
	if !ok || len(digits) != 16 {
		return 0
	}
	seq, err := strconv.ParseUint(digits, 16, 64)
	if err != nil || segmentName(seq) != name {
		return 0
	}
	return seq
}

// tagOf marks a sector as one of segment seq, and as the first of a batch.
func tagOf(seq uint64, first bool) uint32 {
	tag := uint32(seq) << 1
	if first {
		tag |= 1
	}
	return tag
}

// sectorsFor is how many sectors a batch of n bytes, its header included, fills.
func sectorsFor(n int) uint32 { return uint32((n + payloadBytes - 1) / payloadBytes) }

// appendSectors appends to dst the sectors of a batch that is to stand at sector at of segment seq.
func appendSectors(dst, batch []byte, seq uint64, at uint32) []byte {
	dst = slices.Grow(dst, int(sectorsFor(len(batch)))*sectorBytes)
	for first := true; len(batch) > 0; first = false {
		sector := dst[len(dst) : len(dst)+sectorBytes]
		dst = dst[:len(dst)+sectorBytes]
		binary.LittleEndian.PutUint32(sector[4:], tagOf(seq, first))
		n := copy(sector[stampBytes:], batch)
		clear(sector[stampBytes+n:])
		batch = batch[n:]
		binary.LittleEndian.PutUint32(sector, checksum(sector, at))
		at++
	}
	return dst
}

// checksum starts from the sector's place, so that the same bytes have another one anywhere else.
func checksum(sector []byte, at uint32) uint32 { return crc32.Update(at, castagnoli, sector[4:]) }

// newBatch empties b and leaves room for the header.
func newBatch(b []byte) []byte { return append(b[:0], make([]byte, batchHeaderBytes)...) }

// finishBatch writes the header.
func finishBatch(b []byte, synced uint32) {
	binary.LittleEndian.PutUint32(b, uint32(len(b)-batchHeaderBytes))
	binary.LittleEndian.PutUint32(b[4:], synced)
}

func addRecord(batch []byte, kind byte, body []byte) []byte {
	batch = binary.LittleEndian.AppendUint32(append(batch, kind), uint32(len(body)))
	return append(batch, body...)
}

// addMessage marshals straight into the batch.
func addMessage(batch []byte, kind byte, m proto.Message) ([]byte, error) {
	at := len(batch)
	batch, err := proto.MarshalOptions{}.MarshalAppend(append(batch, kind, 0, 0, 0, 0), m)
	if err == nil {
		binary.LittleEndian.PutUint32(batch[at+1:], uint32(len(batch)-at-recordHeaderBytes))
	}
	return batch, err
}

// cutRecord splits the first record off; ok is false when there is none that is whole.
func cutRecord(b []byte) (kind byte, body, rest []byte, ok bool) {
	if len(b) < recordHeaderBytes {
		return 0, nil, nil, false
	}
	n := uint64(binary.LittleEndian.Uint32(b[1:]))
	if n > uint64(len(b)-recordHeaderBytes) {
		return 0, nil, nil, false
	}
	end := recordHeaderBytes + int(n)
	return b[0], b[recordHeaderBytes:end:end], b[end:], true
}

// segmentHead is the first record of a segment.
type segmentHead struct {
	seq  uint64
	size int64 // of the file, bytes
	// first is the oldest segment that counts; it is seq itself where the log was begun or begun anew.
	first uint64
	// previousEnd is the number of sectors that the segment before is valid for; 0 when first is seq.
	previousEnd uint32
	// last and lastTerm belong to the entry that the segment goes on after.
	last, lastTerm uint64
}

const headBytes = 4 + 8 + 8 + 8 + 4 + 8 + 8

func (h segmentHead) encode() []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(make([]byte, 0, headBytes), segmentVersion)
	b = le.AppendUint64(b, h.seq)
	b = le.AppendUint64(b, uint64(h.size))
	b = le.AppendUint64(b, h.first)
	b = le.AppendUint32(b, h.previousEnd)
	b = le.AppendUint64(b, h.last)
	return le.AppendUint64(b, h.lastTerm)
}

// parseHead returns the version too; the rest is valid only when that is segmentVersion.
func parseHead(b []byte) (h segmentHead, version uint32, ok bool) {
	le := binary.LittleEndian
	if len(b) < 4 {
		return h, 0, false
	}
	version = le.Uint32(b)
	if version > segmentVersion {
		return h, version, true
	}
	if version != segmentVersion || len(b) != headBytes {
		return h, version, false
	}
	h.seq, h.size, h.first = le.Uint64(b[4:]), int64(le.Uint64(b[12:])), le.Uint64(b[20:])
	h.previousEnd, h.last, h.lastTerm = le.Uint32(b[28:]), le.Uint64(b[32:]), le.Uint64(b[40:])
	return h, version, true
}

// segmentImage is the content of a segment file.
type segmentImage struct {
	path    string
	seq     uint64
	raw     []byte // whole sectors
	scratch []byte // a batch of several sectors, put together
}

func (m *segmentImage) sectors() uint32 { return uint32(len(m.raw) / sectorBytes) }

func (m *segmentImage) sector(at uint32) []byte {
	return m.raw[int(at)*sectorBytes : (int(at)+1)*sectorBytes]
}

func (m *segmentImage) tag(at uint32) uint32 { return binary.LittleEndian.Uint32(m.sector(at)[4:]) }

// sectorState is what a sector is to one who expects a certain sector of this segment there.
type sectorState int

const (
	sectorAbsent  sectorState = iota // never written, in this life of the file
	sectorPresent                    // the one expected
	sectorBroken                     // anything else
)

func (m *segmentImage) look(at uint32, first bool) sectorState {
	sector, tag := m.sector(at), m.tag(at)
	intact := binary.LittleEndian.Uint32(sector) == checksum(sector, at)
	switch {
	case intact && tag == tagOf(m.seq, first):
		return sectorPresent
	case intact && tag>>1 != uint32(m.seq)&(1<<31-1):
		return sectorAbsent
	case !intact && allZero(sector):
		return sectorAbsent
	default:
		return sectorBroken
	}
}

func allZero(sector []byte) bool {
	for ; len(sector) >= 8; sector = sector[8:] {
		if binary.LittleEndian.Uint64(sector) != 0 {
			return false
		}
	}
	return true
}

// batch returns the records of the batch at a sector, valid until the next call, and the sector that follows it: at itself
// when there is no whole batch, only nothing or a torn one. Errors wrap backend.ErrDamaged.
func (m *segmentImage) batch(at uint32) (records []byte, synced, after uint32, err error) {
	if at >= m.sectors() {
		return nil, 0, at, nil
	}
	switch m.look(at, true) {
	case sectorAbsent:
		return nil, 0, at, nil
	case sectorBroken:
		return nil, 0, at, m.damaged(at, "the checksum does not match")
	}
	payload := m.sector(at)[stampBytes:]
	length, synced := binary.LittleEndian.Uint32(payload), binary.LittleEndian.Uint32(payload[4:])
	if length > maxBatchBytes || synced > at || sectorsFor(batchHeaderBytes+int(length)) > m.sectors()-at {
		return nil, 0, at, m.damaged(at, "impossible batch of %d bytes with %d sectors synced", length, synced)
	}
	end := batchHeaderBytes + int(length)
	after = at + sectorsFor(end)
	torn := false
	for i := at + 1; i < after; i++ {
		switch m.look(i, false) {
		case sectorAbsent:
			torn = true
		case sectorBroken:
			return nil, 0, at, m.damaged(i, "the checksum does not match")
		}
	}
	if torn {
		return nil, 0, at, nil
	}
	if after > at+1 {
		m.scratch = m.scratch[:0]
		for i := at; i < after; i++ {
			m.scratch = append(m.scratch, m.sector(i)[stampBytes:]...)
		}
		payload = m.scratch
	}
	return payload[batchHeaderBytes:end:end], synced, after, nil
}

// head returns what the segment begins with. Errors wrap backend.ErrDamaged or backend.ErrNewerSchema.
func (m *segmentImage) head() (segmentHead, error) {
	records, _, _, err := m.batch(0)
	if err != nil {
		return segmentHead{}, err
	}
	kind, body, _, ok := cutRecord(records)
	if !ok || kind != kindHead {
		return segmentHead{}, m.damaged(0, "it has no head")
	}
	h, version, ok := parseHead(body)
	switch {
	case version > segmentVersion:
		return h, fmt.Errorf("%w: %s has format %d, this quire knows %d: start the newer quire again", backend.ErrNewerSchema, m.path, version, segmentVersion)
	case !ok || h.first == 0 || h.first > h.seq || (h.first == h.seq) != (h.previousEnd == 0):
		return h, m.damaged(0, "its head makes no sense")
	case h.seq != m.seq:
		return h, m.damaged(0, "it is segment %s under another name", segmentName(h.seq))
	case h.size != int64(len(m.raw)):
		return h, m.damaged(0, "it has %d bytes instead of %d", len(m.raw), h.size)
	}
	return h, nil
}

// damaged says where the segment is damaged and what to do.
func (m *segmentImage) damaged(at uint32, format string, args ...any) error {
	return fmt.Errorf("%w: %s, at byte %d: %s: replace this member, as docs/raft.md says; do not start it with what is left",
		backend.ErrDamaged, m.path, int64(at)*sectorBytes, fmt.Sprintf(format, args...))
}
