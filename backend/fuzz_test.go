package backend

import (
	"bytes"
	"fmt"
	"slices"
	"sort"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
)

// FuzzFrame: a Frame is what proto makes of the same message, gives back what it was made of, and is found at the start
// of longer memory.
func FuzzFrame(f *testing.F) {
	f.Add([]byte("key"), []byte("value"), int64(2), int64(3), int64(1), int64(0), []byte("behind"))
	f.Add([]byte{0}, []byte{}, int64(0), int64(7), int64(0), int64(0), []byte{})
	f.Add([]byte{}, bytes.Repeat([]byte{0x12}, 300), int64(1)<<62, int64(1)<<62, int64(-1), int64(-1), []byte{0x12, 0xff})
	f.Fuzz(func(t *testing.T, key, value []byte, create, mod, version, lease int64, behind []byte) {
		kv := keyValue{key: key, value: value, create: create, mod: mod, version: version, lease: lease}
		made := kv.appendFrame(nil)
		if len(made) != kv.frameSize() {
			t.Fatalf("%d bytes, frameSize says %d", len(made), kv.frameSize())
		}
		frame := frameAt(append(made, behind...))
		want := &mvccpb.KeyValue{Key: key, Value: value, CreateRevision: create, ModRevision: mod, Version: version, Lease: lease}
		wire, err := proto.MarshalOptions{Deterministic: true}.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(frame.Message(), wire) || len(frame) != len(made) || cap(frame) != len(frame) {
			t.Fatalf("the frame is %x, the message %x", frame, wire)
		}
		if !proto.Equal(frame.KeyValue(), want) || !bytes.Equal(frame.Key(), key) || !bytes.Equal(frame.Value(), value) {
			t.Fatalf("the frame gives back %v", frame.KeyValue())
		}
		// The tag is that of RangeResponse.kvs, so frames in a row are a response.
		var resp pb.RangeResponse
		if err := proto.Unmarshal(slices.Concat(frame, frame), &resp); err != nil || len(resp.Kvs) != 2 || !proto.Equal(resp.Kvs[1], want) {
			t.Fatalf("two frames are %v (%v) as a response", &resp, err)
		}
	})
}

// rangeFixture is a store with everything that a Range distinguishes: odd keys, equal values and versions, leases, deleted
// and recreated keys, and a compaction.
func rangeFixture(t testing.TB) (*DB, *model) {
	t.Helper()
	db, err := OpenSQLite(t.Context(), t.TempDir()+"/quire.db", Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	write := func(req proto.Message) {
		if _, err := db.Write(t.Context(), Command{Request: req}); err != nil {
			t.Fatal(err)
		}
	}
	m := newModel()
	write(&pb.LeaseGrantRequest{ID: 7, TTL: 1 << 30})
	keys := []string{"\x00", "\x00\x00", "a", "a\x00", "aa", "ab", "b", "b\xff", "c", "\xff", "\xff\xff"}
	for i := range 20 {
		keys = append(keys, fmt.Sprintf("k%02d", i))
	}
	for i := range 150 {
		key, value := keys[i*7%len(keys)], fmt.Sprint(i%5)
		if i%11 == 0 {
			value = ""
		}
		lease := int64(0)
		if i%3 == 0 {
			lease = 7
		}
		if i%13 == 12 {
			write(&pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(key + "\xff")})
			m.deleteRange(key, key+"\xff")
			continue
		}
		write(&pb.PutRequest{Key: []byte(key), Value: []byte(value), Lease: lease})
		m.put(key, value)
		m.at(key, m.rev).Lease = lease
	}
	m.compact = 40
	write(&pb.CompactionRequest{Revision: m.compact})
	return db, m
}

// naiveRange is etcd's rule (etcdserver/txn/range.go), step by step over all keys.
func (m *model) naiveRange(req *pb.RangeRequest) (kvs []*mvccpb.KeyValue, more bool, count int64, err error) {
	rev := req.Revision
	switch {
	case rev > m.rev:
		return nil, false, 0, ErrFutureRev
	case rev <= 0:
		rev = m.rev
	case rev < m.compact:
		return nil, false, 0, &CompactedError{m.compact}
	}
	var keys []string
	for k := range m.keys {
		switch {
		case len(req.RangeEnd) == 0 && k != string(req.Key):
		case len(req.RangeEnd) == 0:
			keys = append(keys, k)
		case k < string(req.Key):
		case string(req.RangeEnd) == "\x00" || k < string(req.RangeEnd):
			keys = append(keys, k)
		}
	}
	sort.Strings(keys)
	var all []*mvccpb.KeyValue
	for _, k := range keys {
		if kv := m.at(k, rev); kv != nil {
			all = append(all, proto.Clone(kv).(*mvccpb.KeyValue))
		}
	}
	count = int64(len(all))
	if req.CountOnly {
		return nil, false, count, nil
	}
	// etcd looks at no more than it needs in its own order, also where it sorts what it found by something else.
	filtered := req.MinModRevision != 0 || req.MaxModRevision != 0 || req.MinCreateRevision != 0 || req.MaxCreateRevision != 0
	inKeyOrder := req.SortOrder == pb.RangeRequest_NONE || req.SortTarget == pb.RangeRequest_KEY && req.SortOrder == pb.RangeRequest_ASCEND
	if inKeyOrder && !filtered && req.Limit > 0 && req.Limit < count {
		all = all[:req.Limit+1]
	}
	all = slices.DeleteFunc(all, func(kv *mvccpb.KeyValue) bool {
		return req.MinModRevision != 0 && kv.ModRevision < req.MinModRevision ||
			req.MaxModRevision != 0 && kv.ModRevision > req.MaxModRevision ||
			req.MinCreateRevision != 0 && kv.CreateRevision < req.MinCreateRevision ||
			req.MaxCreateRevision != 0 && kv.CreateRevision > req.MaxCreateRevision
	})
	less := map[pb.RangeRequest_SortTarget]func(a, b *mvccpb.KeyValue) bool{
		pb.RangeRequest_KEY:     func(a, b *mvccpb.KeyValue) bool { return bytes.Compare(a.Key, b.Key) < 0 },
		pb.RangeRequest_VERSION: func(a, b *mvccpb.KeyValue) bool { return a.Version < b.Version },
		pb.RangeRequest_CREATE:  func(a, b *mvccpb.KeyValue) bool { return a.CreateRevision < b.CreateRevision },
		pb.RangeRequest_MOD:     func(a, b *mvccpb.KeyValue) bool { return a.ModRevision < b.ModRevision },
		pb.RangeRequest_VALUE:   func(a, b *mvccpb.KeyValue) bool { return bytes.Compare(a.Value, b.Value) < 0 },
	}[req.SortTarget]
	var s sort.Interface = &kvSort{all, less}
	switch {
	case req.SortOrder == pb.RangeRequest_DESCEND:
		sort.Sort(sort.Reverse(s))
	case req.SortTarget != pb.RangeRequest_KEY:
		sort.Sort(s)
	}
	if req.Limit > 0 && int64(len(all)) > req.Limit {
		all, more = all[:req.Limit], true
	}
	if req.KeysOnly {
		for _, kv := range all {
			kv.Value = nil
			if req.SortTarget != pb.RangeRequest_VALUE {
				kv.Lease = 0 // etcd answers from its index, which knows no leases (mvcc: FastKeysOnly)
			}
		}
	}
	return all, more, count, nil
}

type kvSort struct {
	kvs  []*mvccpb.KeyValue
	less func(a, b *mvccpb.KeyValue) bool
}

func (s *kvSort) Len() int           { return len(s.kvs) }
func (s *kvSort) Less(i, j int) bool { return s.less(s.kvs[i], s.kvs[j]) }
func (s *kvSort) Swap(i, j int)      { s.kvs[i], s.kvs[j] = s.kvs[j], s.kvs[i] }

// compareRange wants the database to answer req as the model does.
func compareRange(t *testing.T, db *DB, m *model, req *pb.RangeRequest) {
	t.Helper()
	v := db.View()
	defer v.Release()
	kvs, more, count, wantErr := m.naiveRange(req)
	res, err := v.Range(t.Context(), req)
	if wantErr != nil || err != nil {
		if fmt.Sprint(err) != fmt.Sprint(wantErr) {
			t.Fatalf("%v: error %v, want %v", req, err, wantErr)
		}
		return
	}
	if res.Revision != m.rev || res.More != more || res.Count != count || len(res.KVs) != len(kvs) {
		t.Fatalf("%v: revision %d, more %v, count %d, %d keys; want %d, %v, %d, %d",
			req, res.Revision, res.More, res.Count, len(res.KVs), m.rev, more, count, len(kvs))
	}
	for i, kv := range kvs {
		if got := res.KVs[i].KeyValue(); !proto.Equal(got, kv) {
			t.Fatalf("%v: key %d is %v, want %v", req, i, got, kv)
		}
	}
}

// FuzzRange compares Ranges over a small store with the naive rule.
func FuzzRange(f *testing.F) {
	db, m := rangeFixture(f)
	for i := range int64(60) {
		f.Add([]byte("a"), []byte("z"), i*3, i%7, int32(i%3), int32(i%5), uint8(i%8), i*2%150, i*5%150)
		f.Add([]byte{0}, []byte{0}, int64(0), i, int32(i%3), int32(i%5), uint8(0), int64(0), int64(0))
	}
	f.Add([]byte("k"), []byte(nil), int64(-1), int64(-1), int32(0), int32(0), uint8(0), int64(-1), int64(-1))
	f.Add([]byte("z"), []byte("a"), int64(1)<<62, int64(1)<<62, int32(2), int32(4), uint8(255), int64(1)<<62, int64(1)<<62)
	f.Fuzz(func(t *testing.T, key, end []byte, rev, limit int64, order, target int32, flags uint8, low, high int64) {
		req := &pb.RangeRequest{
			Key: key, RangeEnd: end, Revision: rev, Limit: limit,
			SortOrder:  pb.RangeRequest_SortOrder(uint32(order) % 3),
			SortTarget: pb.RangeRequest_SortTarget(uint32(target) % 5),
			KeysOnly:   flags&1 != 0, CountOnly: flags&2 != 0, Serializable: flags&4 != 0,
		}
		if flags&8 != 0 {
			req.MinModRevision, req.MaxModRevision = low, high
		}
		if flags&16 != 0 {
			req.MinCreateRevision, req.MaxCreateRevision = low, high
		}
		compareRange(t, db, m, req)
	})
}

// TestRangeAgainstTheNaiveRule goes through every combination of order, target, limit and flag at several revisions.
func TestRangeAgainstTheNaiveRule(t *testing.T) {
	db, m := rangeFixture(t)
	spans := []struct{ key, end string }{{"\x00", "\x00"}, {"a", "c"}, {"k", "l"}, {"k05", ""}, {"c", "a"}, {"\xff", "\x00"}, {"none", ""}}
	n := 0
	for _, span := range spans {
		for _, rev := range []int64{0, m.compact, m.compact + 1, 97, m.rev - 1, m.rev} {
			for _, limit := range []int64{0, 1, 2, 10, 1000} {
				for order := range int32(3) {
					for target := range int32(5) {
						for flags := range 16 {
							req := &pb.RangeRequest{
								Key: []byte(span.key), RangeEnd: []byte(span.end), Revision: rev, Limit: limit,
								SortOrder: pb.RangeRequest_SortOrder(order), SortTarget: pb.RangeRequest_SortTarget(target),
								KeysOnly: flags&1 != 0, CountOnly: flags&2 != 0,
							}
							if flags&4 != 0 {
								req.MinModRevision, req.MaxModRevision = 60, 120
							}
							if flags&8 != 0 {
								req.MinCreateRevision, req.MaxCreateRevision = 30, 100
							}
							compareRange(t, db, m, req)
							n++
						}
					}
				}
			}
		}
	}
	t.Logf("%d ranges", n)
}
