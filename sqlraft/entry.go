package sqlraft

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/quire-db/quire/backend"
)

// An entry of the log holds many proposals under one stamp:
//
//	version · proposals (uvarint) · length of the stamp (uvarint) · stamp · group · group …
//	group = origin (8) · session (8) · first number (uvarint) · proposals (uvarint) · { length (uvarint) · payload } …
//
// A group is a run of consecutive proposals of one session (see forward.go); fixed numbers are big endian. The log
// guards the bytes by checksums, so that an entry that does not decode was written by another version.

const entryVersion = 1

// accepted is a proposal that the leader has taken and not yet put into the log.
type accepted struct {
	origin, session, number uint64
	conf                    bool // payload is a memberChange
	payload                 []byte
}

// group says whose a run of an entry's proposals is.
type group struct {
	origin, session uint64
	first           uint64 // number of the first proposal
	count           int
}

// decodedEntry is an entry; the slices lie in the encoded one. The groups, in order, cover the proposals.
type decodedEntry struct {
	stamp     []byte
	proposals []backend.Proposal
	groups    []group
}

// follows says whether b stands in one group with a before it.
func (b *accepted) follows(a *accepted) bool {
	return b.origin == a.origin && b.session == a.session && b.number == a.number+1
}

// encodeEntry puts proposals, none of which is a conf change, into one entry.
func encodeEntry(stamp []byte, proposals []accepted) []byte {
	size := 1 + 2*binary.MaxVarintLen64 + len(stamp)
	for i := range proposals {
		size += binary.MaxVarintLen64 + len(proposals[i].payload)
		if i == 0 || !proposals[i].follows(&proposals[i-1]) {
			size += 16 + 2*binary.MaxVarintLen64
		}
	}
	data := make([]byte, 0, size)
	data = append(data, entryVersion)
	data = binary.AppendUvarint(data, uint64(len(proposals)))
	data = binary.AppendUvarint(data, uint64(len(stamp)))
	data = append(data, stamp...)
	for i := 0; i < len(proposals); {
		n := 1
		for i+n < len(proposals) && proposals[i+n].follows(&proposals[i+n-1]) {
			n++
		}
		data = binary.BigEndian.AppendUint64(data, proposals[i].origin)
		data = binary.BigEndian.AppendUint64(data, proposals[i].session)
		data = binary.AppendUvarint(data, proposals[i].number)
		data = binary.AppendUvarint(data, uint64(n))
		for _, p := range proposals[i : i+n] {
			data = binary.AppendUvarint(data, uint64(len(p.payload)))
			data = append(data, p.payload...)
		}
		i += n
	}
	return data
}

var errBadEntry = errors.New("sqlraft: an entry of the log was written by another version of quire; start the one that the other members run")

// decodeEntry reads what encodeEntry has written. The result refers to data.
func decodeEntry(data []byte) (decodedEntry, error) {
	var e decodedEntry
	if len(data) == 0 || data[0] != entryVersion {
		return e, fmt.Errorf("%w: its first byte is not %d", errBadEntry, entryVersion)
	}
	r := entryReader{rest: data[1:]}
	total := r.uvarint()
	e.stamp = r.bytes(r.uvarint())
	if total > uint64(len(r.rest)) { // each proposal takes a byte at least
		return e, fmt.Errorf("%w: %d proposals in %d bytes", errBadEntry, total, len(r.rest))
	}
	e.proposals = make([]backend.Proposal, 0, total)
	for len(r.rest) > 0 && !r.failed {
		g := group{origin: r.uint64(), session: r.uint64(), first: r.uvarint()}
		count := r.uvarint()
		if r.failed || count == 0 || count > total-uint64(len(e.proposals)) || g.first+count < g.first {
			return e, fmt.Errorf("%w: a group of %d proposals from %d, of %d", errBadEntry, count, g.first, total)
		}
		g.count = int(count)
		for range count {
			e.proposals = append(e.proposals, backend.Proposal{Payload: r.bytes(r.uvarint())})
		}
		e.groups = append(e.groups, g)
	}
	if r.failed || uint64(len(e.proposals)) != total {
		return e, fmt.Errorf("%w: %d of %d proposals", errBadEntry, len(e.proposals), total)
	}
	return e, nil
}

// entryReader takes numbers and bytes off the front of rest; what is not there is 0 and failed.
type entryReader struct {
	rest   []byte
	failed bool
}

func (r *entryReader) uvarint() uint64 {
	v, n := binary.Uvarint(r.rest)
	if n <= 0 {
		r.failed, r.rest = true, nil
		return 0
	}
	r.rest = r.rest[n:]
	return v
}

func (r *entryReader) uint64() uint64 {
	b := r.bytes(8)
	if b == nil {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}

func (r *entryReader) bytes(n uint64) []byte {
	if n > uint64(len(r.rest)) {
		r.failed, r.rest = true, nil
		return nil
	}
	b := r.rest[:n:n]
	r.rest = r.rest[n:]
	return b
}
