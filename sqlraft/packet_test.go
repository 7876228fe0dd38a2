package sqlraft

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// seeded prints its seed; put it into a failing test to see the same again.
func seeded(t testing.TB) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

func randomBytes(r *rand.Rand, most int) []byte {
	n := r.IntN(most + 1)
	if n == 0 {
		return nil
	}
	b := make([]byte, n)
	for i := 0; i+8 <= n; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	return b
}

// randomPacket makes a packet of any kind, with payloads up to size.
func randomPacket(r *rand.Rand, from, to uint64, size int) packet {
	p := packet{from: from, to: to}
	switch r.IntN(4) {
	case 0:
		p.forward = &forward{term: r.Uint64(), session: r.Uint64(), first: r.Uint64()}
		for range r.IntN(4) {
			p.forward.proposals = append(p.forward.proposals, forwarded{conf: r.IntN(2) == 0, payload: randomBytes(r, size)})
		}
	case 1:
		p.taken = &taken{term: r.Uint64(), session: r.Uint64(), upTo: r.Uint64(), refused: r.IntN(2) == 0}
	case 2:
		p.message = &raftpb.Message{
			Type: raftpb.MsgApp.Enum(), To: &to, From: &from, Term: new(r.Uint64()), LogTerm: new(r.Uint64()), Index: new(r.Uint64()), Commit: new(r.Uint64()),
		}
		for range r.IntN(5) {
			p.message.Entries = append(p.message.Entries, &raftpb.Entry{
				Type: raftpb.EntryType(r.IntN(3)).Enum(), Term: new(r.Uint64()), Index: new(r.Uint64()), Data: randomBytes(r, size)})
		}
	default:
		p.message = &raftpb.Message{Type: raftpb.MsgHeartbeatResp.Enum(), To: &to, From: &from, Term: new(r.Uint64()),
			Reject: new(true), RejectHint: new(r.Uint64()), Vote: new(uint64(0)), Context: randomBytes(r, 40)}
		if r.IntN(2) == 0 {
			p.message.Type = raftpb.MsgSnap.Enum()
			p.message.Snapshot = &raftpb.Snapshot{Data: randomBytes(r, 100), Metadata: &raftpb.SnapshotMetadata{
				ConfState: &raftpb.ConfState{Voters: []uint64{1, 2, 3}, Learners: []uint64{4}}, Index: new(r.Uint64()), Term: new(r.Uint64())}}
		}
	}
	return p
}

func samePacket(a, b *packet) bool {
	switch {
	case a.to != b.to || a.from != b.from:
		return false
	case a.message != nil:
		return b.message != nil && b.forward == nil && b.taken == nil && proto.Equal(a.message, b.message)
	case a.taken != nil:
		return b.taken != nil && b.forward == nil && *a.taken == *b.taken
	}
	if b.forward == nil || a.forward.term != b.forward.term || a.forward.session != b.forward.session ||
		a.forward.first != b.forward.first || len(a.forward.proposals) != len(b.forward.proposals) {
		return false
	}
	for i, x := range a.forward.proposals {
		if y := b.forward.proposals[i]; x.conf != y.conf || !bytes.Equal(x.payload, y.payload) {
			return false
		}
	}
	return true
}

func TestPacketsComeBackAsTheyWere(t *testing.T) {
	r := seeded(t)
	var f frame
	var wire bytes.Buffer
	var sent []packet
	for range 500 {
		p := randomPacket(r, 1, 2, 1<<r.IntN(18))
		before := wire.Len()
		if err := f.encode(&p); err != nil {
			t.Fatal(err)
		}
		if err := f.write(&wire); err != nil {
			t.Fatal(err)
		}
		if wire.Len()-before != f.size() {
			t.Fatalf("size says %d, %d bytes were written", f.size(), wire.Len()-before)
		}
		sent = append(sent, p)
	}
	br := bufio.NewReader(&wire)
	for i := range sent {
		body, err := readFrame(br)
		if err != nil {
			t.Fatalf("packet %d: %v", i, err)
		}
		got, err := decode(body)
		if err != nil {
			t.Fatalf("packet %d: %v", i, err)
		}
		got.from, got.to = 1, 2
		if !samePacket(&sent[i], &got) {
			t.Fatalf("packet %d: sent %+v, got %+v", i, sent[i], got)
		}
	}
	if _, err := readFrame(br); !errors.Is(err, io.EOF) {
		t.Errorf("behind the last packet: %v", err)
	}
}

func TestLargePayloadsAreNotCopied(t *testing.T) {
	data := make([]byte, 16<<20)
	p := packet{message: &raftpb.Message{Type: raftpb.MsgApp.Enum(), Entries: []*raftpb.Entry{{Data: data}}}}
	var f frame
	if err := f.encode(&p); err != nil {
		t.Fatal(err)
	}
	if len(f.buf) > 1<<10 || len(f.big) != 1 || &f.big[0].data[0] != &data[0] {
		t.Errorf("encoding 16 MiB made a frame of %d bytes beside %d large parts", len(f.buf), len(f.big))
	}
	var wire bytes.Buffer
	if err := f.write(&wire); err != nil {
		t.Fatal(err)
	}
	f.shrink()
	body, err := readFrame(bufio.NewReader(&wire))
	if err != nil {
		t.Fatal(err)
	}
	got, err := decode(body)
	if err != nil {
		t.Fatal(err)
	}
	inside := &got.message.Entries[0].Data[0]
	if &body[len(body)-len(data)] != inside {
		t.Error("decoding copied the entry")
	}
}

// TestEveryDamageIsNoticed flips, cuts and lengthens.
func TestEveryDamageIsNoticed(t *testing.T) {
	r := seeded(t)
	for range 300 {
		p := randomPacket(r, 1, 2, 300)
		var f frame
		if err := f.encode(&p); err != nil {
			t.Fatal(err)
		}
		var wire bytes.Buffer
		if err := f.write(&wire); err != nil {
			t.Fatal(err)
		}
		whole := wire.Bytes()
		bad := bytes.Clone(whole)
		bad[r.IntN(len(bad))] ^= 1 << r.IntN(8)
		if _, err := readFrame(bufio.NewReader(bytes.NewReader(bad))); err == nil {
			t.Fatalf("one bit of %x is different in %x, and nobody noticed", whole, bad)
		}
		cut := whole[:1+r.IntN(len(whole)-1)]
		if _, err := readFrame(bufio.NewReader(bytes.NewReader(cut))); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("%d of %d bytes: %v", len(cut), len(whole), err)
		}
	}
}

// TestAnnouncedSizesTakeNoMemory: whoever announces a gigabyte has to send it.
func TestAnnouncedSizesTakeNoMemory(t *testing.T) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	header := binary.LittleEndian.AppendUint32(nil, maxFrame)
	header = append(header, 1, 2, 3, 4, 5)
	if _, err := readFrame(bufio.NewReader(bytes.NewReader(header))); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a gigabyte was announced, one byte sent: %v", err)
	}
	binary.LittleEndian.PutUint32(header, maxFrame+1)
	if _, err := readFrame(bufio.NewReader(bytes.NewReader(header))); !errors.Is(err, errDamaged) {
		t.Errorf("more than a frame may have was announced: %v", err)
	}
	for _, body := range [][]byte{
		append([]byte{frameForward, 1, 1, 1}, binary.AppendUvarint(nil, maxParts+1)...),
		append([]byte{frameForward, 1, 1, 1}, binary.AppendUvarint(nil, 1<<60)...),
		append([]byte{frameMessage, 2, 8, 3}, binary.AppendUvarint(nil, 1<<19)...),
		append([]byte{frameForward, 1, 1, 1, 1, 0}, binary.AppendUvarint(nil, 1<<62)...),
	} {
		if _, err := decode(body); !errors.Is(err, errDamaged) {
			t.Errorf("decoding %x: %v", body, err)
		}
	}
	runtime.ReadMemStats(&after)
	if took := after.TotalAlloc - before.TotalAlloc; took > 16<<20 {
		t.Errorf("%d bytes were allocated for a few that arrived", took)
	}
}

func TestWhatCannotBeSent(t *testing.T) {
	var f frame
	if err := f.encode(&packet{to: 1}); err == nil {
		t.Error("an empty packet was encoded")
	}
	// The same memory many times: it is refused before it is copied.
	big := make([]byte, 64<<20)
	p := packet{forward: &forward{}}
	for range maxFrame/len(big) + 1 {
		p.forward.proposals = append(p.forward.proposals, forwarded{payload: big})
	}
	if err := f.encode(&p); err == nil {
		t.Error("a packet of more than a gigabyte was encoded")
	}
}

func FuzzDecode(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 40 {
		p := randomPacket(r, 1, 2, 64)
		var fr frame
		if err := fr.encode(&p); err != nil {
			f.Fatal(err)
		}
		f.Add(fr.buf[frameHeader:])
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		p, err := decode(bytes.Clone(body))
		if err != nil {
			if !errors.Is(err, errDamaged) {
				t.Fatalf("an error of another kind: %v", err)
			}
			return
		}
		// What is read can be written, and is the same when it is read again.
		var fr frame
		if err := fr.encode(&p); err != nil {
			t.Fatal(err)
		}
		var wire bytes.Buffer
		if err := fr.write(&wire); err != nil {
			t.Fatal(err)
		}
		again, err := readFrame(bufio.NewReader(&wire))
		if err != nil {
			t.Fatal(err)
		}
		q, err := decode(again)
		if err != nil {
			t.Fatalf("%x became %x: %v", body, again, err)
		}
		if !samePacket(&p, &q) {
			t.Fatalf("%+v became %+v", p, q)
		}
	})
}

func FuzzReadFrame(f *testing.F) {
	header := binary.LittleEndian.AppendUint32(nil, 3)
	header = binary.LittleEndian.AppendUint32(header, crc32.Checksum([]byte{1, 2, 3}, castagnoli))
	f.Add(append(header, 1, 2, 3))
	f.Add([]byte{255, 255, 255, 255, 0, 0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, wire []byte) {
		r := bufio.NewReader(bytes.NewReader(wire))
		for {
			body, err := readFrame(r)
			if err != nil {
				return
			}
			if len(body) > len(wire) {
				t.Fatalf("%d bytes became a frame of %d", len(wire), len(body))
			}
		}
	})
}
