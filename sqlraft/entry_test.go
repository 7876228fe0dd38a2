package sqlraft

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
)

func randomProposals(r *rand.Rand) (stamp []byte, proposals []accepted) {
	stamp = bytes.Repeat([]byte{1}, r.IntN(20))
	a := accepted{origin: r.Uint64(), session: r.Uint64(), number: 1 + r.Uint64N(3)}
	for range r.IntN(30) {
		a.payload = bytes.Repeat([]byte{byte(r.IntN(256))}, r.IntN(100))
		proposals = append(proposals, a)
		if a.number++; r.IntN(4) == 0 {
			a = accepted{origin: uint64(r.IntN(3)), session: uint64(r.IntN(3)), number: r.Uint64N(1 << 60)}
		}
	}
	return stamp, proposals
}

// flatten puts a decoded entry back into what was encoded.
func flatten(e decodedEntry) (proposals []accepted) {
	at := 0
	for _, g := range e.groups {
		for i := range g.count {
			proposals = append(proposals, accepted{origin: g.origin, session: g.session, number: g.first + uint64(i), payload: e.proposals[at].Payload})
			at++
		}
	}
	return proposals
}

func TestEntriesComeBackAsTheyWere(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 1))
	for range 2000 {
		stamp, proposals := randomProposals(r)
		data := encodeEntry(stamp, proposals)
		if cap(data)-len(data) > 20*len(proposals)+64 {
			t.Fatalf("seed %d: %d of %d bytes are room to spare", seed, cap(data)-len(data), cap(data))
		}
		e, err := decodeEntry(data)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if !bytes.Equal(e.stamp, stamp) || fmt.Sprint(flatten(e)) != fmt.Sprint(proposals) {
			t.Fatalf("seed %d: %v %v became %v %v", seed, stamp, proposals, e.stamp, flatten(e))
		}
	}
}

func TestBadEntriesAreRefused(t *testing.T) {
	good := encodeEntry([]byte("stamp"), []accepted{{origin: 1, session: 2, number: 3, payload: []byte("payload")}})
	for n := range good {
		if _, err := decodeEntry(good[:n]); !errors.Is(err, errBadEntry) {
			t.Errorf("the first %d of %d bytes: %v", n, len(good), err)
		}
	}
	if _, err := decodeEntry(append(bytes.Clone(good), 0)); !errors.Is(err, errBadEntry) {
		t.Errorf("a byte too many: %v", err)
	}
}

func FuzzDecodeEntry(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 1))
	for range 10 {
		stamp, proposals := randomProposals(r)
		f.Add(encodeEntry(stamp, proposals))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := decodeEntry(data)
		if err != nil {
			if !errors.Is(err, errBadEntry) {
				t.Fatal(err)
			}
			return
		}
		again, err := decodeEntry(encodeEntry(e.stamp, flatten(e)))
		if err != nil || !bytes.Equal(again.stamp, e.stamp) || fmt.Sprint(flatten(again)) != fmt.Sprint(flatten(e)) {
			t.Fatalf("%+v became %+v, %v", e, again, err)
		}
	})
}
