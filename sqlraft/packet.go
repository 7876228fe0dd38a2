package sqlraft

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// packet is one message to or from another member. Exactly one of message, forward and taken is set.
//
// Whoever gives a packet to the transport must not change what it points to any more: it is encoded later.
type packet struct {
	to, from uint64
	message  *raftpb.Message
	forward  *forward
	taken    *taken
}

// forward carries proposals to the member that leads term; anybody else refuses them. Within one session they are
// numbered from 1 without gaps; first is the number of proposals[0]. A member draws a new session for each leader and
// term that it sends to.
type forward struct {
	term, session, first uint64
	proposals            []forwarded
}

// forwarded is one proposal.
type forwarded struct {
	conf    bool // payload is a memberChange instead of a batch of Commands
	payload []byte
}

// taken is the leader's answer: it has the session's proposals up to number upTo, and puts them into its log as long as it
// leads that term. Refused says that it does not, or does not any more: it takes nothing.
type taken struct {
	term, session, upTo uint64
	refused             bool
}

// A frame is what a stream carries: 4 bytes length and 4 bytes CRC-32C, both of the body and little endian, then the
// body, whose first byte says what it is. Numbers in a body are unsigned varints, byte strings have their length in
// front.
//
//	frameMessage  envelope (raftpb.Message without entries), number of entries; each: type, term, index, data
//	frameForward  term, session, first, number of proposals; each: conf (0 or 1), payload
//	frameTaken    term, session, upTo, refused (0 or 1)
//	framePing     8 bytes, which come back in an acknowledgement
const (
	frameMessage = 1
	frameForward = 2
	frameTaken   = 3
	framePing    = 4

	frameHeader = 8

	// maxFrame bounds the body. The largest request that etcd's flags allow for is far smaller.
	maxFrame = 1 << 30
	// maxParts bounds the entries or proposals in one frame: even empty ones take memory once decoded.
	maxParts = 1 << 20
	// referenced is the size from which payloads are not copied into the frame but written from where they are.
	referenced = 32 << 10
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// frame is one encoded packet. Its memory is used again for the next one.
type frame struct {
	buf []byte // header and all small parts
	big []bigPart
}

// bigPart belongs behind buf[:at].
type bigPart struct {
	at   int
	data []byte
}

// encode replaces what f holds by p.
func (f *frame) encode(p *packet) error {
	f.buf, f.big = append(f.buf[:0], make([]byte, frameHeader)...), f.big[:0]
	switch {
	case p.message != nil:
		if err := f.message(p.message); err != nil {
			return err
		}
	case p.forward != nil:
		f.buf = append(f.buf, frameForward)
		f.numbers(p.forward.term, p.forward.session, p.forward.first, uint64(len(p.forward.proposals)))
		for _, one := range p.forward.proposals {
			f.flag(one.conf)
			f.bytes(one.payload)
		}
	case p.taken != nil:
		f.buf = append(f.buf, frameTaken)
		f.numbers(p.taken.term, p.taken.session, p.taken.upTo)
		f.flag(p.taken.refused)
	default:
		return errors.New("sqlraft: an empty packet was sent")
	}
	return f.seal()
}

// ping replaces what f holds by a ping that bears token.
func (f *frame) ping(token uint64) {
	f.buf, f.big = append(f.buf[:0], make([]byte, frameHeader)...), f.big[:0]
	f.buf = binary.LittleEndian.AppendUint64(append(f.buf, framePing), token)
	if err := f.seal(); err != nil {
		panic(fmt.Sprintf("sqlraft: a ping of %d bytes is too large: %v", len(f.buf), err))
	}
}

// message writes the entries' data apart from the rest: protobuf would copy them once more on either side.
func (f *frame) message(m *raftpb.Message) error {
	envelope := raftpb.Message{
		Type: m.Type, To: m.To, From: m.From, Term: m.Term, LogTerm: m.LogTerm, Index: m.Index, Commit: m.Commit, Vote: m.Vote,
		Snapshot: m.Snapshot, Reject: m.Reject, RejectHint: m.RejectHint, Context: m.Context, Responses: m.Responses,
	}
	f.buf = append(f.buf, frameMessage)
	f.numbers(uint64(proto.Size(&envelope)))
	var err error
	if f.buf, err = (proto.MarshalOptions{UseCachedSize: true}).MarshalAppend(f.buf, &envelope); err != nil {
		return fmt.Errorf("sqlraft: encoding a %v: %w", m.GetType(), err)
	}
	f.numbers(uint64(len(m.Entries)))
	for _, e := range m.Entries {
		f.numbers(uint64(e.GetType()), e.GetTerm(), e.GetIndex())
		f.bytes(e.Data)
	}
	return nil
}

func (f *frame) numbers(vs ...uint64) {
	for _, v := range vs {
		f.buf = binary.AppendUvarint(f.buf, v)
	}
}

func (f *frame) flag(set bool) {
	b := byte(0)
	if set {
		b = 1
	}
	f.buf = append(f.buf, b)
}

func (f *frame) bytes(b []byte) {
	f.numbers(uint64(len(b)))
	if len(b) < referenced {
		f.buf = append(f.buf, b...)
		return
	}
	f.big = append(f.big, bigPart{at: len(f.buf), data: b})
}

// size is the number of bytes that write writes.
func (f *frame) size() int {
	n := len(f.buf)
	for _, b := range f.big {
		n += len(b.data)
	}
	return n
}

// seal fills in the header.
func (f *frame) seal() error {
	length := f.size() - frameHeader
	if length > maxFrame {
		return fmt.Errorf("sqlraft: a packet of %d bytes is larger than the %d that may be sent; lower --max-request-bytes", length, maxFrame)
	}
	sum, from := uint32(0), frameHeader
	for _, b := range f.big {
		sum = crc32.Update(sum, castagnoli, f.buf[from:b.at])
		sum = crc32.Update(sum, castagnoli, b.data)
		from = b.at
	}
	sum = crc32.Update(sum, castagnoli, f.buf[from:])
	binary.LittleEndian.PutUint32(f.buf, uint32(length))
	binary.LittleEndian.PutUint32(f.buf[4:], sum)
	return nil
}

// write writes the frame to w, which is buffered.
func (f *frame) write(w io.Writer) error {
	from := 0
	for _, b := range f.big {
		if _, err := w.Write(f.buf[from:b.at]); err != nil {
			return err
		}
		if _, err := w.Write(b.data); err != nil {
			return err
		}
		from = b.at
	}
	_, err := w.Write(f.buf[from:])
	return err
}

// shrink gives memory back after an unusually large frame.
func (f *frame) shrink() {
	if cap(f.buf) > 1<<20 {
		f.buf = nil
	}
	clear(f.big[:cap(f.big)]) // holds on to payloads otherwise
	if cap(f.big) > 1<<10 {
		f.big = nil
	}
}

// errDamaged is what a stream is closed with when it carries something that no member has sent.
var errDamaged = errors.New("sqlraft: what another member sent is damaged")

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errDamaged, fmt.Sprintf(format, args...))
}

// readFrame returns the next body; it is the caller's. Memory grows with what arrives, not with what is announced.
func readFrame(r *bufio.Reader) ([]byte, error) {
	header, err := r.Peek(frameHeader)
	if err != nil {
		if len(header) > 0 && errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	length, sum := int(binary.LittleEndian.Uint32(header)), binary.LittleEndian.Uint32(header[4:])
	if length > maxFrame {
		return nil, damaged("a frame of %d bytes", length)
	}
	if _, err := r.Discard(frameHeader); err != nil {
		return nil, err
	}
	const atOnce = 4 << 20
	body := make([]byte, min(length, atOnce))
	for read := 0; ; {
		if _, err := io.ReadFull(r, body[read:]); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
		if read = len(body); read == length {
			break
		}
		body = append(make([]byte, 0, min(length, 2*read)), body...)
		body = body[:cap(body)]
	}
	if crc32.Checksum(body, castagnoli) != sum {
		return nil, damaged("the checksum of a frame of %d bytes does not fit", length)
	}
	return body, nil
}

// decode reads a body. The packet's byte strings are parts of body. To and from are not in it, unless raft has put
// them into its message.
func decode(body []byte) (packet, error) {
	if len(body) == 0 {
		return packet{}, damaged("an empty frame")
	}
	r := &bodyReader{rest: body[1:]}
	var p packet
	switch body[0] {
	case frameMessage:
		p.message = r.message()
	case frameForward:
		p.forward = &forward{term: r.number(), session: r.number(), first: r.number()}
		if n := r.count(2); n > 0 {
			p.forward.proposals = make([]forwarded, n)
		}
		for i := range p.forward.proposals {
			p.forward.proposals[i] = forwarded{conf: r.flag(), payload: r.bytes()}
		}
	case frameTaken:
		p.taken = &taken{term: r.number(), session: r.number(), upTo: r.number(), refused: r.flag()}
	default:
		return packet{}, damaged("a frame of unknown kind %d", body[0])
	}
	if r.err == nil && len(r.rest) > 0 {
		r.fail("%d bytes behind the end of a frame", len(r.rest))
	}
	if r.err != nil {
		return packet{}, r.err
	}
	return p, nil
}

// bodyReader takes one thing after the other from a body. After the first error it returns zeros.
type bodyReader struct {
	rest []byte
	err  error
}

func (r *bodyReader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = damaged(format, args...)
	}
	r.rest = nil
}

func (r *bodyReader) number() uint64 {
	v, n := binary.Uvarint(r.rest)
	if n <= 0 {
		r.fail("a number is cut off or too large")
		return 0
	}
	r.rest = r.rest[n:]
	return v
}

func (r *bodyReader) flag() bool {
	v := r.number()
	if v > 1 {
		r.fail("%d where 0 or 1 belongs", v)
	}
	return v == 1
}

// count reads how many parts follow, each of which takes at least so many bytes.
func (r *bodyReader) count(least uint64) int {
	n := r.number()
	if n > maxParts || n*least > uint64(len(r.rest)) {
		r.fail("%d parts in %d bytes", n, len(r.rest))
		return 0
	}
	return int(n)
}

// bytes returns nil for the empty string, which is how raft writes it.
func (r *bodyReader) bytes() []byte {
	n := r.number()
	if n > uint64(len(r.rest)) {
		r.fail("%d bytes announced where %d follow", n, len(r.rest))
		return nil
	}
	if n == 0 {
		return nil
	}
	b := r.rest[:n:n]
	r.rest = r.rest[n:]
	return b
}

// entryMemory holds an entry and what it points to, so that all entries of a message are one allocation.
type entryMemory struct {
	entry       raftpb.Entry
	kind        raftpb.EntryType
	term, index uint64
}

func (r *bodyReader) message() *raftpb.Message {
	m := new(raftpb.Message)
	if err := proto.Unmarshal(r.bytes(), m); err != nil {
		r.fail("a raft message: %v", err)
		return nil
	}
	if m.Type == nil || len(m.Entries) > 0 || len(m.Responses) > 0 {
		r.fail("a raft message of type %v with %d entries and %d responses in its envelope", m.Type, len(m.Entries), len(m.Responses))
		return nil
	}
	m.ProtoReflect().SetUnknown(nil) // of a later version
	n := r.count(4)
	if n == 0 {
		return r.sound(m)
	}
	memory := make([]entryMemory, n)
	m.Entries = make([]*raftpb.Entry, n)
	for i := range memory {
		e := &memory[i]
		kind := r.number()
		e.kind, e.term, e.index = raftpb.EntryType(kind), r.number(), r.number()
		if _, known := raftpb.EntryType_name[int32(e.kind)]; !known || uint64(e.kind) != kind {
			r.fail("an entry of unknown type %d", kind)
			return nil
		}
		e.entry.Type, e.entry.Term, e.entry.Index, e.entry.Data = &e.kind, &e.term, &e.index, r.bytes()
		m.Entries[i] = &e.entry
	}
	return r.sound(m)
}

// sound refuses what no member sends and what Raft, or core, would fall over.
func (r *bodyReader) sound(m *raftpb.Message) *raftpb.Message {
	kind, entries := m.GetType(), m.GetEntries()
	if _, known := raftpb.MessageType_name[int32(kind)]; !known || raft.IsLocalMsgTarget(m.GetFrom()) {
		r.fail("a raft message of type %v from %x", kind, m.GetFrom())
		return nil
	}
	if (kind == raftpb.MsgReadIndex || kind == raftpb.MsgReadIndexResp) && (len(entries) != 1 || len(entries[0].GetData()) != readContext) {
		r.fail("a %v with %d entries", kind, len(entries))
		return nil
	}
	return m
}
