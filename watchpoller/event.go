package watchpoller

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/quire-db/quire/backend"
)

// Field numbers of the messages that are written here, from etcd's rpc.proto and kv.proto.
const (
	watchResponseHeader   = 1
	watchResponseWatchID  = 2
	watchResponseFragment = 7
	watchResponseEvents   = 11

	headerClusterID = 1
	headerMemberID  = 2
	headerRevision  = 3
	headerRaftTerm  = 4

	eventType   = 1
	eventPrevKV = 3

	keyValueKey            = 1
	keyValueCreateRevision = 2
	keyValueModRevision    = 3
)

// An event is one row on its way to any number of watchers. It is encoded once, and once more with prev_kv when the
// first watcher that wants it is served.
type event struct {
	rev  int64
	kind mvccpb.Event_EventType
	// plain is the event as field 11 of a WatchResponse. Immutable, shared. When its capacity goes beyond its length,
	// what follows in memory is the plain form of the next event (see slab).
	plain []byte

	mu struct {
		sync.Mutex
		withPrev []byte // as plain, with prev_kv; nil until asked for
	}
}

// eventOverhead is what one queued reference to an event is taken to cost beside the encoded bytes.
const eventOverhead = 64

// A slab gives neighbouring events neighbouring memory, so that a run of them is sent as one buffer. The zero slab
// has every event allocated for itself, which is right where neighbours go to different watchers: an event must not
// keep its neighbours' memory alive.
type slab struct {
	size int
	free []byte
}

// slabSize bounds the memory that a queued event can keep alive beyond its own.
const slabSize = 32 << 10

func (s *slab) encode(e backend.Event) *event {
	ev := &event{rev: e.Rev, kind: e.Type}
	body := len(e.KV)
	if e.Type != mvccpb.PUT {
		body += 2
	}
	need := 1 + protowire.SizeVarint(uint64(body)) + body
	var b []byte
	switch {
	case need > s.size/4:
		b = make([]byte, 0, need)
	case need > cap(s.free):
		s.free = make([]byte, 0, s.size)
		fallthrough
	default:
		b, s.free = s.free[:0], s.free[need:need]
	}
	b = protowire.AppendTag(b, watchResponseEvents, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(body))
	b = appendType(b, e.Type)
	ev.plain = append(b, e.KV...)
	return ev
}

func appendType(b []byte, t mvccpb.Event_EventType) []byte {
	if t == mvccpb.PUT {
		return b // the zero value is not written
	}
	b = protowire.AppendTag(b, eventType, protowire.VarintType)
	return protowire.AppendVarint(b, uint64(t))
}

// follows says whether b begins in memory where a ends, and may be sent by making a longer.
func follows(a, b []byte) bool {
	return len(b) > 0 && cap(a)-len(a) >= len(b) && &a[:len(a)+1][len(a)] == &b[0]
}

// prevKV returns the event with prev_kv as field 11 of a WatchResponse. Like etcd it has none when the event
// created the key, and when the revision before is compacted. It reads the source at most once per event.
func (ev *event) prevKV(ctx context.Context, src Source) ([]byte, error) {
	ev.mu.Lock()
	defer ev.mu.Unlock()
	if ev.mu.withPrev != nil {
		return ev.mu.withPrev, nil
	}
	body, err := ev.body()
	if err != nil {
		return nil, err
	}
	key, created, err := readKeyValue(ev.kind, body)
	if err != nil {
		return nil, err
	}
	var prev backend.Frame
	if !created {
		prev, err = src.PrevKV(ctx, key, ev.rev)
		if err != nil && !errors.Is(err, backend.ErrCompacted) {
			return nil, fmt.Errorf("read the value before revision %d: %w", ev.rev, err)
		}
	}
	if len(prev) == 0 {
		ev.mu.withPrev = ev.plain
		return ev.plain, nil
	}
	_, _, tag := protowire.ConsumeTag(prev) // a frame is field 2 of an event; the same bytes become field 3
	if tag < 0 {
		return nil, fmt.Errorf("the value before revision %d is malformed: %w", ev.rev, protowire.ParseError(tag))
	}
	size := len(body) + len(prev)
	b := make([]byte, 0, 1+protowire.SizeVarint(uint64(size))+size)
	b = protowire.AppendTag(b, watchResponseEvents, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(size))
	b = append(b, body...)
	b = protowire.AppendTag(b, eventPrevKV, protowire.BytesType)
	b = append(b, prev[tag:]...)
	ev.mu.withPrev = b
	return b, nil
}

// body returns the encoded Event without tag and length.
func (ev *event) body() ([]byte, error) {
	_, _, n := protowire.ConsumeTag(ev.plain)
	if n >= 0 {
		body, m := protowire.ConsumeBytes(ev.plain[n:])
		if m >= 0 {
			return body, nil
		}
		n = m
	}
	return nil, fmt.Errorf("the event of revision %d is malformed: %w", ev.rev, protowire.ParseError(n))
}

// readKeyValue returns the key in an encoded Event and whether the event created it.
func readKeyValue(kind mvccpb.Event_EventType, body []byte) (key []byte, created bool, err error) {
	bad := func(n int) error { return fmt.Errorf("an event is malformed: %w", protowire.ParseError(n)) }
	prefix := len(appendType(nil, kind))
	_, _, tag := protowire.ConsumeTag(body[prefix:])
	if tag < 0 {
		return nil, false, bad(tag)
	}
	kv, n := protowire.ConsumeBytes(body[prefix+tag:])
	if n < 0 {
		return nil, false, bad(n)
	}
	var createRev, modRev uint64
	for len(kv) > 0 {
		num, typ, n := protowire.ConsumeTag(kv)
		if n < 0 {
			return nil, false, bad(n)
		}
		kv = kv[n:]
		switch {
		case num == keyValueKey && typ == protowire.BytesType:
			key, n = protowire.ConsumeBytes(kv)
		case num == keyValueCreateRevision && typ == protowire.VarintType:
			createRev, n = protowire.ConsumeVarint(kv)
		case num == keyValueModRevision && typ == protowire.VarintType:
			modRev, n = protowire.ConsumeVarint(kv)
		default:
			n = protowire.ConsumeFieldValue(num, typ, kv)
		}
		if n < 0 {
			return nil, false, bad(n)
		}
		kv = kv[n:]
	}
	return key, kind == mvccpb.PUT && createRev == modRev, nil
}
