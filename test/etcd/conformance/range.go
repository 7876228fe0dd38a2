package conformance

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// fillMixed makes five keys whose orders by key, version, create revision, mod revision and value all
// differ, and deletes a sixth. The store is at revision 12 afterwards.
func fillMixed(x *exam) {
	for _, p := range [][2]string{{"c", "2"}, {"a", "9"}, {"e", "0"}, {"b", "x"}, {"d", "1"}, {"gone", ""}, {"a", "5"}, {"c", "4"}, {"c", "3"}, {"e", "7"}} {
		x.put(p[0], p[1])
	}
	x.delete("gone")
}

var everything = &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}

var rangeCases = []testCase{
	{name: "a key that is not there is an empty answer", run: func(x *exam) {
		x.put("a", "1")
		r := x.rangeRequest(&pb.RangeRequest{Key: []byte("b")})
		if len(r.Kvs) != 0 || r.Count != 0 || r.More {
			x.Errorf("an absent key answers %v", r)
		}
	}},

	{name: "bounds compare bytes, NUL and 0xff included", run: func(x *exam) {
		for _, k := range []string{"a", "a\x00", "a\x00\x00", "a\x01", "aa", "a\xff", "b", "\x00", "\xff", "\xff\xff"} {
			x.put(k, "")
		}
		for _, c := range []struct {
			key, end string
			want     []string
		}{
			{"a", "", []string{"a"}},
			{"a", "a\x00", []string{"a"}},
			{"a\x00", "a\x01", []string{"a\x00", "a\x00\x00"}},
			{"a\x00", "b", []string{"a\x00", "a\x00\x00", "a\x01", "aa", "a\xff"}},
			{"a", "b", []string{"a", "a\x00", "a\x00\x00", "a\x01", "aa", "a\xff"}},
			{"a\xff", "b", []string{"a\xff"}},
			{"a\xff", "\x00", []string{"a\xff", "b", "\xff", "\xff\xff"}},
			{"\xff", "\x00", []string{"\xff", "\xff\xff"}},
			{"\x00", "\x00", []string{"\x00", "a", "a\x00", "a\x00\x00", "a\x01", "aa", "a\xff", "b", "\xff", "\xff\xff"}},
			{"\x00", "a", []string{"\x00"}},
			{"\x00", "", []string{"\x00"}},
			{"c", "\xff", nil},
			{"b", "a", nil},
			{"b", "b", nil},
			{"b", "\x00\x00", nil},
		} {
			r := x.rangeRequest(&pb.RangeRequest{Key: []byte(c.key), RangeEnd: []byte(c.end)})
			if got := keysOf(r.Kvs); !slices.Equal(got, c.want) && len(got)+len(c.want) > 0 {
				x.Errorf("[%q, %q) has %q, want %q", c.key, c.end, got, c.want)
			}
			equal(x, fmt.Sprintf("the count of [%q, %q)", c.key, c.end), r.Count, int64(len(c.want)))
		}
	}},

	{name: "a limit cuts the keys, not the count", run: func(x *exam) {
		for _, k := range []string{"a", "b", "c", "d"} {
			x.put(k, k)
		}
		for _, c := range []struct {
			limit int64
			keys  []string
			more  bool
		}{
			{1, []string{"a"}, true},
			{3, []string{"a", "b", "c"}, true},
			{4, []string{"a", "b", "c", "d"}, false},
			{5, []string{"a", "b", "c", "d"}, false},
			{0, []string{"a", "b", "c", "d"}, false},
			{-1, []string{"a", "b", "c", "d"}, false},
			{1<<63 - 1, []string{"a", "b", "c", "d"}, false},
		} {
			r := x.rangeRequest(&pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Limit: c.limit})
			wantKeys(x, r.Kvs, c.keys...)
			equal(x, fmt.Sprintf("more at limit %d", c.limit), r.More, c.more)
			equal(x, fmt.Sprintf("count at limit %d", c.limit), r.Count, 4)
		}
	}},

	{name: "every order by every target, with and without limit", run: func(x *exam) {
		fillMixed(x)
		all := x.rangeRequest(everything).Kvs
		by := map[pb.RangeRequest_SortTarget]func(a, b *mvccpb.KeyValue) int{
			pb.RangeRequest_KEY:     func(a, b *mvccpb.KeyValue) int { return bytes.Compare(a.Key, b.Key) },
			pb.RangeRequest_VERSION: func(a, b *mvccpb.KeyValue) int { return cmp.Compare(a.Version, b.Version) },
			pb.RangeRequest_CREATE:  func(a, b *mvccpb.KeyValue) int { return cmp.Compare(a.CreateRevision, b.CreateRevision) },
			pb.RangeRequest_MOD:     func(a, b *mvccpb.KeyValue) int { return cmp.Compare(a.ModRevision, b.ModRevision) },
			pb.RangeRequest_VALUE:   func(a, b *mvccpb.KeyValue) int { return bytes.Compare(a.Value, b.Value) },
		}
		for target, compare := range by {
			for order := range pb.RangeRequest_SortOrder_name {
				for _, limit := range []int{0, 2} {
					want := slices.Clone(all)
					if limit > 0 && pb.RangeRequest_SortOrder(order) == pb.RangeRequest_NONE {
						// Without an order the limit, and one key to know whether there is more, comes
						// before the sorting.
						want = want[:limit+1]
					}
					// Without an order a target other than the key sorts upwards.
					slices.SortStableFunc(want, func(a, b *mvccpb.KeyValue) int {
						if pb.RangeRequest_SortOrder(order) == pb.RangeRequest_DESCEND {
							return compare(b, a)
						}
						return compare(a, b)
					})
					r := x.rangeRequest(&pb.RangeRequest{
						Key: []byte{0}, RangeEnd: []byte{0}, Limit: int64(limit),
						SortTarget: target, SortOrder: pb.RangeRequest_SortOrder(order),
					})
					what := fmt.Sprintf("by %v, %v, limit %d", target, pb.RangeRequest_SortOrder(order), limit)
					expect := want
					if limit > 0 {
						expect = want[:limit]
					}
					if got := keysOf(r.Kvs); !slices.Equal(got, keysOf(expect)) {
						x.Errorf("%s: keys are %q, want %q", what, got, keysOf(expect))
					}
					equal(x, what+": count", r.Count, int64(len(all)))
					equal(x, what+": more", r.More, limit > 0)
				}
			}
		}
	}},

	{name: "sorting by value works with keys_only, which takes the values away afterwards", run: func(x *exam) {
		fillMixed(x)
		r := x.rangeRequest(&pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, SortTarget: pb.RangeRequest_VALUE, SortOrder: pb.RangeRequest_DESCEND, KeysOnly: true})
		wantKeys(x, r.Kvs, "b", "e", "a", "c", "d")
		for _, kv := range r.Kvs {
			if kv.Value != nil {
				x.Errorf("keys_only gives a value of %s", kv.Key)
			}
		}
	}},

	{name: "an unknown order or target is refused", run: func(x *exam) {
		for _, r := range []*pb.RangeRequest{
			{Key: []byte("a"), SortOrder: 9}, {Key: []byte("a"), SortTarget: 9}, {Key: []byte("a"), SortTarget: -1},
		} {
			_, err := x.KV.Range(x.ctx, r)
			x.wantError(err, rpctypes.ErrGRPCInvalidSortOption)
		}
		_, err := x.KV.Range(x.ctx, &pb.RangeRequest{RangeEnd: []byte("a")})
		x.wantError(err, rpctypes.ErrGRPCEmptyKey)
	}},

	{name: "an old revision shows the store as it was, under today's header", run: func(x *exam) {
		fillMixed(x)
		r := x.rangeRequest(&pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Revision: 8})
		wantKeys(x, r.Kvs, "a", "b", "c", "d", "e", "gone")
		same(x, "a at revision 8", r.Kvs[0], kv("a", "5", 3, 8, 2))
		same(x, "c at revision 8", r.Kvs[2], kv("c", "2", 2, 2, 1))
		equal(x, "the header's revision", r.Header.Revision, 12)
		equal(x, "the count then", r.Count, 6)

		r = x.rangeRequest(&pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Revision: 1})
		equal(x, "the count at revision 1", r.Count, 0)
		r = x.rangeRequest(&pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Revision: -1})
		equal(x, "the count at a negative revision, which means now", r.Count, 5)
	}},

	{name: "a future revision is refused", run: func(x *exam) {
		x.put("a", "")
		_, err := x.KV.Range(x.ctx, &pb.RangeRequest{Key: []byte("a"), Revision: 3})
		x.wantError(err, rpctypes.ErrGRPCFutureRev)
		x.rangeRequest(&pb.RangeRequest{Key: []byte("a"), Revision: 2})
	}},

	{name: "revision filters choose keys but do not count", run: func(x *exam) {
		fillMixed(x)
		for _, c := range []struct {
			request *pb.RangeRequest
			want    []string
		}{
			{&pb.RangeRequest{MinModRevision: 8}, []string{"a", "c", "e"}},
			{&pb.RangeRequest{MaxModRevision: 8}, []string{"a", "b", "d"}},
			{&pb.RangeRequest{MinModRevision: 8, MaxModRevision: 10}, []string{"a", "c"}},
			{&pb.RangeRequest{MinCreateRevision: 4}, []string{"b", "d", "e"}},
			{&pb.RangeRequest{MaxCreateRevision: 3}, []string{"a", "c"}},
			{&pb.RangeRequest{MinCreateRevision: 3, MaxCreateRevision: 4, MinModRevision: 9}, []string{"e"}},
			{&pb.RangeRequest{MinModRevision: 100}, nil},
			{&pb.RangeRequest{MaxModRevision: 8, Revision: 5}, []string{"a", "b", "c", "e"}},
		} {
			c.request.Key, c.request.RangeEnd = []byte{0}, []byte{0}
			r := x.rangeRequest(c.request)
			if got := keysOf(r.Kvs); !slices.Equal(got, c.want) && len(got)+len(c.want) > 0 {
				x.Errorf("%s: keys are %q, want %q", show(c.request), got, c.want)
			}
			count := int64(5)
			if c.request.Revision == 5 {
				count = 4
			}
			equal(x, "count of "+show(c.request), r.Count, count)
		}
		r := x.rangeRequest(&pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, MinModRevision: 8, Limit: 2})
		wantKeys(x, r.Kvs, "a", "c")
		equal(x, "more with a filter and a limit", r.More, true)
	}},

	// Since 3.7 etcd answers keys_only from its index, which has no leases, except when it has to sort by
	// value.
	{name: "keys_only leaves out value and lease, when sorting by value only the value", run: func(x *exam) {
		x.grant(5, 1000)
		x.putRequest(&pb.PutRequest{Key: []byte("a"), Value: []byte("1"), Lease: 5})
		want := kv("a", "", 2, 2, 1)
		r := x.rangeRequest(&pb.RangeRequest{Key: []byte("a"), KeysOnly: true})
		same(x, "a", r.Kvs[0], want)
		r = x.rangeRequest(&pb.RangeRequest{Key: []byte("a"), KeysOnly: true, SortTarget: pb.RangeRequest_VALUE})
		want.Lease = 5
		same(x, "a, sorted by value", r.Kvs[0], want)
	}},

	{name: "count_only counts and sends no keys", run: func(x *exam) {
		fillMixed(x)
		for _, c := range []struct {
			request *pb.RangeRequest
			want    int64
		}{
			{&pb.RangeRequest{}, 5},
			{&pb.RangeRequest{Limit: 2}, 5},
			{&pb.RangeRequest{Revision: 3}, 2},
			{&pb.RangeRequest{KeysOnly: true}, 5},
			{&pb.RangeRequest{SortTarget: pb.RangeRequest_VALUE}, 5},
		} {
			c.request.Key, c.request.RangeEnd, c.request.CountOnly = []byte{0}, []byte{0}, true
			r := x.rangeRequest(c.request)
			if len(r.Kvs) != 0 || r.More {
				x.Errorf("%s answers keys or more: %s", show(c.request), show(r))
			}
			equal(x, "count of "+show(c.request), r.Count, c.want)
		}
	}},

	{name: "a serializable read has the same answer on one node", run: func(x *exam) {
		fillMixed(x)
		a := x.rangeRequest(everything)
		b := x.rangeRequest(&pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Serializable: true})
		same(x, "the serializable answer", b, a)
	}},

	// What kube-apiserver does for a list in pages.
	{name: "pages at one revision make the whole list, whatever is written meanwhile", run: func(x *exam) {
		const total = 57
		for i := range total {
			x.put(fmt.Sprintf("k/%03d", i), "")
		}
		x.put("l", "outside")
		key, end := []byte("k/"), []byte("k0")
		var revision int64
		var got []string
		for {
			r := x.rangeRequest(&pb.RangeRequest{Key: key, RangeEnd: end, Limit: 10, Revision: revision})
			if revision == 0 {
				revision = r.Header.Revision
			}
			got = append(got, keysOf(r.Kvs)...)
			equal(x, "count from this page on", r.Count, int64(total-len(got)+len(r.Kvs)))
			if !r.More {
				break
			}
			key = append(slices.Clone(r.Kvs[len(r.Kvs)-1].Key), 0)
			x.put(fmt.Sprintf("k/%03d/new", len(got)+5), "")
			x.delete(fmt.Sprintf("k/%03d", len(got)+1))
		}
		equal(x, "keys in all pages", len(got), total)
		for i, k := range got {
			equal(x, "a key", k, fmt.Sprintf("k/%03d", i))
		}
	}},

	{name: "ten thousand keys come in one answer", run: func(x *exam) {
		value := string(bytes.Repeat([]byte("v"), 500))
		for i := 0; i < 10_000; i += 100 {
			t := &pb.TxnRequest{}
			for j := range 100 {
				t.Success = append(t.Success, putOp(fmt.Sprintf("k/%05d", i+j), value))
			}
			x.txn(t)
		}
		r := x.rangeRequest(everything)
		equal(x, "keys", len(r.Kvs), 10_000)
		for i, kv := range r.Kvs {
			if string(kv.Key) != fmt.Sprintf("k/%05d", i) || len(kv.Value) != 500 {
				x.Fatalf("key %d is %q with %d bytes", i, kv.Key, len(kv.Value))
			}
		}
	}},
}
