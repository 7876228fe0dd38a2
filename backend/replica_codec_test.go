package backend

import (
	"bytes"
	"errors"
	"testing"

	"google.golang.org/protobuf/proto"
)

// TestPayloadsComeBackAsTheyWere: what one member proposes another decodes as the same Commands.
func TestPayloadsComeBackAsTheyWere(t *testing.T) {
	maker := &entryMaker{rnd: seed(t), rev: 100}
	for range 300 {
		var want []*pending
		for range maker.rnd.IntN(20) {
			want = append(want, maker.command())
		}
		tk := &ticket{}
		for _, p := range want {
			var err error
			if p.encoded, err = appendCommand(nil, p); err != nil {
				t.Fatal(err)
			}
			tk.items = append(tk.items, p)
		}
		payload := tk.payload()
		got, err := decodePayload(payload)
		if err != nil || len(got) != len(want) {
			t.Fatalf("%d Commands of %d, %v", len(got), len(want), err)
		}
		clear(payload) // what is decoded keeps nothing of it
		for i := range want {
			if (got[i].expire == nil) != (want[i].expire == nil) || got[i].cmd.Author != want[i].cmd.Author ||
				want[i].expire == nil && !proto.Equal(got[i].cmd.Request, want[i].cmd.Request) {
				t.Errorf("got %+v, want %+v", got[i], want[i])
			}
		}
	}
}

// TestWhatANewerQuireProposesIsNotPassedOver: nor what is cut off.
func TestWhatANewerQuireProposesIsNotPassedOver(t *testing.T) {
	put, err := appendCommand([]byte{payloadVersion}, &pending{cmd: Command{Request: putReq("k", "v"), Author: "me"}})
	if err != nil {
		t.Fatal(err)
	}
	for n := 2; n < len(put); n++ {
		if _, err := decodePayload(put[:n]); !errors.Is(err, ErrDamaged) {
			t.Errorf("cut off after %d bytes: %v", n, err)
		}
	}
	for _, payload := range [][]byte{{payloadVersion + 1}, append(bytes.Clone(put), 99, 0, 0)} {
		if _, err := decodePayload(payload); !errors.Is(err, ErrNewerSchema) {
			t.Errorf("%x: %v", payload, err)
		}
	}
	for _, b := range [][]byte{nil, {stampVersion + 1, 0, 0, 0, 0}} {
		if _, err := decodeStamp(b); !errors.Is(err, ErrNewerSchema) {
			t.Errorf("stamp %x: %v", b, err)
		}
	}
	db := openReplicaTest(t, testPath(t), Options{})
	index, term := db.Applied()
	unknown := Entry{Index: index + 1, Term: term, Stamp: db.Stamp(), Proposals: []Proposal{{Payload: []byte{payloadVersion, 99, 0, 0}}}}
	if err := db.Apply([]Entry{unknown}); !errors.Is(err, ErrNewerSchema) {
		t.Errorf("applied: %v", err)
	}
	if _, err := db.Write(t.Context(), Command{Request: putReq("k", "v")}); !errors.Is(err, ErrNewerSchema) {
		t.Errorf("a member that has to stop takes a write: %v", err)
	}
}

// FuzzDecodePayload: whatever comes, it is an error or Commands that encode and decode to the same again.
func FuzzDecodePayload(f *testing.F) {
	for _, p := range []*pending{{cmd: Command{Request: putReq("k", "v"), Author: "a"}}, {expire: &expireLeases{}}} {
		b, err := appendCommand([]byte{payloadVersion}, p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte{payloadVersion, kindTxn, 0, 0x80})
	f.Fuzz(func(t *testing.T, b []byte) {
		items, err := decodePayload(b)
		if err != nil {
			if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewerSchema) {
				t.Errorf("an error of no kind: %v", err)
			}
			return
		}
		again := []byte{payloadVersion}
		for _, p := range items {
			if again, err = appendCommand(again, p); err != nil {
				t.Fatal(err)
			}
		}
		got, err := decodePayload(again)
		if err != nil || len(got) != len(items) {
			t.Fatalf("%d Commands, then %d, %v", len(items), len(got), err)
		}
		for i, p := range got {
			if p.cmd.Author != items[i].cmd.Author || (p.expire == nil) != (items[i].expire == nil) ||
				p.expire == nil && !proto.Equal(p.cmd.Request, items[i].cmd.Request) {
				t.Errorf("Command %d changed", i)
			}
		}
	})
}

// FuzzDecodeStamp: likewise.
func FuzzDecodeStamp(f *testing.F) {
	f.Add((&stamp{clock: 1, wall: -1, space: 1 << 40, member: 1 << 63}).encode())
	f.Add([]byte{stampVersion, 0x80})
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := decodeStamp(b)
		if err != nil {
			return
		}
		if got, err := decodeStamp(s.encode()); err != nil || *got != *s {
			t.Errorf("%+v became %+v, %v", s, got, err)
		}
	})
}
