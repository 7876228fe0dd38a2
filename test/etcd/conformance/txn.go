package conformance

import (
	"fmt"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/quire-db/quire/test/etcd/start"
)

func compareVersion(key string, result pb.Compare_CompareResult, version int64) *pb.Compare {
	return &pb.Compare{Key: []byte(key), Target: pb.Compare_VERSION, Result: result, TargetUnion: &pb.Compare_Version{Version: version}}
}

func compareValue(key string, result pb.Compare_CompareResult, value string) *pb.Compare {
	return &pb.Compare{Key: []byte(key), Target: pb.Compare_VALUE, Result: result, TargetUnion: &pb.Compare_Value{Value: []byte(value)}}
}

func manyPuts(n int) (ops []*pb.RequestOp) {
	for i := range n {
		ops = append(ops, putOp(fmt.Sprintf("k%03d", i), ""))
	}
	return ops
}

var txnCases = []testCase{
	{name: "every result of comparing every target", run: func(x *exam) {
		x.grant(5, 1000)
		x.put("other", "")
		x.put("k", "m")
		x.putRequest(&pb.PutRequest{Key: []byte("k"), Value: []byte("m"), Lease: 5})
		// k: created at 3, modified at 4, version 2, value m, lease 5.
		for target, at := range map[pb.Compare_CompareTarget]func(c *pb.Compare, d int64){
			pb.Compare_VERSION: func(c *pb.Compare, d int64) { c.TargetUnion = &pb.Compare_Version{Version: 2 + d} },
			pb.Compare_CREATE:  func(c *pb.Compare, d int64) { c.TargetUnion = &pb.Compare_CreateRevision{CreateRevision: 3 + d} },
			pb.Compare_MOD:     func(c *pb.Compare, d int64) { c.TargetUnion = &pb.Compare_ModRevision{ModRevision: 4 + d} },
			pb.Compare_LEASE:   func(c *pb.Compare, d int64) { c.TargetUnion = &pb.Compare_Lease{Lease: 5 + d} },
			pb.Compare_VALUE: func(c *pb.Compare, d int64) {
				c.TargetUnion = &pb.Compare_Value{Value: []byte{byte('m' + d)}}
			},
		} {
			for _, d := range []int64{-1, 0, 1} {
				for result, want := range map[pb.Compare_CompareResult]bool{
					pb.Compare_EQUAL: d == 0, pb.Compare_NOT_EQUAL: d != 0, pb.Compare_GREATER: d < 0, pb.Compare_LESS: d > 0,
				} {
					c := &pb.Compare{Key: []byte("k"), Target: target, Result: result}
					at(c, d)
					r := x.txn(&pb.TxnRequest{Compare: []*pb.Compare{c}})
					equal(x, "the outcome of "+show(c), r.Succeeded, want)
				}
			}
		}
		equal(x, "the revision after comparing only", x.revision(), 4)
	}},

	{name: "a missing key compares as zeros, and its value never", run: func(x *exam) {
		for _, c := range []struct {
			compare *pb.Compare
			want    bool
		}{
			{compareVersion("no", pb.Compare_EQUAL, 0), true},
			{compareVersion("no", pb.Compare_GREATER, 0), false},
			{&pb.Compare{Key: []byte("no"), Target: pb.Compare_CREATE, Result: pb.Compare_EQUAL, TargetUnion: &pb.Compare_CreateRevision{}}, true},
			{&pb.Compare{Key: []byte("no"), Target: pb.Compare_MOD, Result: pb.Compare_LESS, TargetUnion: &pb.Compare_ModRevision{ModRevision: 1}}, true},
			{&pb.Compare{Key: []byte("no"), Target: pb.Compare_LEASE, Result: pb.Compare_EQUAL}, true},
			{compareValue("no", pb.Compare_EQUAL, ""), false},
			{compareValue("no", pb.Compare_NOT_EQUAL, "x"), false},
			{compareValue("no", pb.Compare_LESS, "x"), false},
		} {
			r := x.txn(&pb.TxnRequest{Compare: []*pb.Compare{c.compare}})
			equal(x, "the outcome of "+show(c.compare), r.Succeeded, c.want)
		}
	}},

	{name: "a compare over a range holds when it holds for every key in it", run: func(x *exam) {
		x.put("a", "1")
		x.put("b", "1")
		x.put("b", "2")
		over := func(c *pb.Compare, end string) *pb.Compare { c.RangeEnd = []byte(end); return c }
		for _, c := range []struct {
			compare *pb.Compare
			want    bool
		}{
			{over(compareVersion("a", pb.Compare_GREATER, 0), "c"), true},
			{over(compareVersion("a", pb.Compare_EQUAL, 1), "c"), false},
			{over(compareVersion("a", pb.Compare_EQUAL, 1), "b"), true},
			{over(compareVersion("a", pb.Compare_GREATER, 0), "\x00"), true},
			{over(compareVersion("\x00", pb.Compare_GREATER, 1), "\x00"), false},
			{over(compareVersion("x", pb.Compare_EQUAL, 0), "z"), true},
			{over(compareValue("x", pb.Compare_NOT_EQUAL, "1"), "z"), false},
			{over(compareValue("a", pb.Compare_LESS, "3"), "z"), true},
		} {
			r := x.txn(&pb.TxnRequest{Compare: []*pb.Compare{c.compare}})
			equal(x, "the outcome of "+show(c.compare), r.Succeeded, c.want)
		}
	}},

	{name: "all compares must hold; the branch not taken does nothing", run: func(x *exam) {
		x.put("a", "1")
		r := x.txn(&pb.TxnRequest{
			Compare: []*pb.Compare{compareVersion("a", pb.Compare_EQUAL, 1), compareValue("a", pb.Compare_EQUAL, "2")},
			Success: []*pb.RequestOp{putOp("yes", "")},
			Failure: []*pb.RequestOp{putOp("no", ""), getOp("a")},
		})
		equal(x, "succeeded", r.Succeeded, false)
		equal(x, "answers", len(r.Responses), 2)
		if x.get("yes") != nil || x.get("no") == nil {
			x.Error("the wrong branch was taken")
		}
		empty := x.txn(&pb.TxnRequest{})
		equal(x, "succeeded without compares", empty.Succeeded, true)
		equal(x, "the revision of an empty Txn", empty.Header.Revision, 3)
	}},

	{name: "atomic: all writes of a Txn share one revision", run: func(x *exam) {
		x.put("old", "")
		r := x.txn(&pb.TxnRequest{Success: []*pb.RequestOp{putOp("a", "1"), putOp("b", "2"), deleteOp("old", ""), deleteOp("none", "")}})
		equal(x, "the revision", r.Header.Revision, 3)
		for i, op := range r.Responses {
			var inner *pb.ResponseHeader
			switch v := op.Response.(type) {
			case *pb.ResponseOp_ResponsePut:
				inner = v.ResponsePut.Header
			case *pb.ResponseOp_ResponseDeleteRange:
				inner = v.ResponseDeleteRange.Header
			}
			equal(x, fmt.Sprintf("the inner revision of operation %d", i), inner.GetRevision(), 3)
		}
		same(x, "a", x.get("a"), kv("a", "1", 3, 3, 1))
		same(x, "b", x.get("b"), kv("b", "2", 3, 3, 1))
	}},

	{name: "a Txn that writes nothing makes no revision", run: func(x *exam) {
		x.put("a", "1")
		for _, ops := range [][]*pb.RequestOp{
			{getOp("a")},
			{deleteOp("none", "")},
			{txnOp(&pb.TxnRequest{Success: []*pb.RequestOp{getOp("a")}})},
		} {
			r := x.txn(&pb.TxnRequest{Success: ops})
			equal(x, "the revision", r.Header.Revision, 2)
		}
		equal(x, "the store's revision", x.revision(), 2)
	}},

	{name: "a read in a Txn sees the writes before it and not those after", run: func(x *exam) {
		x.put("a", "old")
		r := x.txn(&pb.TxnRequest{Success: []*pb.RequestOp{getOp("a"), putOp("a", "new"), getOp("a"), deleteOp("b", ""), rangeOp(&pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}), putOp("c", "")}})
		same(x, "a before", r.Responses[0].GetResponseRange().Kvs[0], kv("a", "old", 2, 2, 1))
		same(x, "a after", r.Responses[2].GetResponseRange().Kvs[0], kv("a", "new", 2, 3, 2))
		equal(x, "the header of the read before the write", r.Responses[0].GetResponseRange().Header.Revision, 2)
		equal(x, "the header of the read after the write", r.Responses[2].GetResponseRange().Header.Revision, 3)
		wantKeys(x, r.Responses[4].GetResponseRange().Kvs, "a")
	}},

	{name: "compares see the store as it was before the Txn", run: func(x *exam) {
		r := x.txn(&pb.TxnRequest{Success: []*pb.RequestOp{
			putOp("a", "1"),
			txnOp(&pb.TxnRequest{Compare: []*pb.Compare{compareVersion("a", pb.Compare_GREATER, 0)}, Success: []*pb.RequestOp{putOp("seen", "")}, Failure: []*pb.RequestOp{putOp("unseen", "")}}),
		}})
		equal(x, "the inner outcome", r.Responses[1].GetResponseTxn().Succeeded, false)
		if x.get("seen") != nil || x.get("unseen") == nil {
			x.Error("a nested compare saw a write of its own Txn")
		}
	}},

	{name: "a read at a revision inside a Txn does not see the Txn's writes", run: func(x *exam) {
		x.put("a", "1")
		x.put("a", "2")
		r := x.txn(&pb.TxnRequest{Success: []*pb.RequestOp{
			putOp("a", "3"),
			rangeOp(&pb.RangeRequest{Key: []byte("a"), Revision: 2}),
			rangeOp(&pb.RangeRequest{Key: []byte("a"), Revision: 3}),
		}})
		same(x, "a at 2", r.Responses[1].GetResponseRange().Kvs[0], kv("a", "1", 2, 2, 1))
		same(x, "a at 3", r.Responses[2].GetResponseRange().Kvs[0], kv("a", "2", 2, 3, 2))
	}},

	{name: "a read at a future or compacted revision refuses the whole Txn", run: func(x *exam) {
		x.put("a", "1")
		x.put("a", "2")
		x.put("a", "3")
		x.compact(3)
		for revision, want := range map[int64]error{5: rpctypes.ErrGRPCFutureRev, 2: rpctypes.ErrGRPCCompacted, -1: rpctypes.ErrGRPCCompacted} {
			for _, ops := range [][]*pb.RequestOp{
				{putOp("b", ""), rangeOp(&pb.RangeRequest{Key: []byte("a"), Revision: revision})},
				{rangeOp(&pb.RangeRequest{Key: []byte("a"), Revision: revision})},
				{putOp("b", ""), txnOp(&pb.TxnRequest{Success: []*pb.RequestOp{rangeOp(&pb.RangeRequest{Key: []byte("a"), Revision: revision})}})},
			} {
				_, err := x.KV.Txn(x.ctx, &pb.TxnRequest{Success: ops})
				x.wantError(err, want)
			}
		}
		equal(x, "the revision", x.revision(), 4)
	}},

	{name: "a Txn refused for one operation does none of them", run: func(x *exam) {
		for _, c := range []struct {
			op   *pb.RequestOp
			want error
		}{
			{putOp("", ""), rpctypes.ErrGRPCEmptyKey},
			{getOp(""), rpctypes.ErrGRPCEmptyKey},
			{deleteOp("", ""), rpctypes.ErrGRPCEmptyKey},
			{&pb.RequestOp{}, rpctypes.ErrGRPCKeyNotFound},
			{putRequestOp(&pb.PutRequest{Key: []byte("a"), Lease: 404}), rpctypes.ErrGRPCLeaseNotFound},
			{putRequestOp(&pb.PutRequest{Key: []byte("a"), IgnoreValue: true}), rpctypes.ErrGRPCKeyNotFound},
			{putRequestOp(&pb.PutRequest{Key: []byte("a"), IgnoreValue: true, Value: []byte("v")}), rpctypes.ErrGRPCValueProvided},
			{putRequestOp(&pb.PutRequest{Key: []byte("a"), IgnoreLease: true, Lease: 1}), rpctypes.ErrGRPCLeaseProvided},
			{rangeOp(&pb.RangeRequest{Key: []byte("a"), SortOrder: 9}), rpctypes.ErrGRPCInvalidSortOption},
			{txnOp(&pb.TxnRequest{Failure: []*pb.RequestOp{getOp("")}}), rpctypes.ErrGRPCEmptyKey},
			{txnOp(&pb.TxnRequest{Compare: []*pb.Compare{{}}}), rpctypes.ErrGRPCEmptyKey},
		} {
			_, err := x.KV.Txn(x.ctx, &pb.TxnRequest{Success: []*pb.RequestOp{putOp("first", ""), c.op}})
			x.wantError(err, c.want)
		}
		_, err := x.KV.Txn(x.ctx, &pb.TxnRequest{Compare: []*pb.Compare{{}}})
		x.wantError(err, rpctypes.ErrGRPCEmptyKey)
		equal(x, "the revision", x.revision(), 1)
	}},

	{name: "the branch not taken is checked for form but not for what is there", run: func(x *exam) {
		_, err := x.KV.Txn(x.ctx, &pb.TxnRequest{Success: []*pb.RequestOp{putOp("a", "")}, Failure: []*pb.RequestOp{putOp("", "")}})
		x.wantError(err, rpctypes.ErrGRPCEmptyKey)
		_, err = x.KV.Txn(x.ctx, &pb.TxnRequest{Success: []*pb.RequestOp{putOp("a", "")}, Failure: []*pb.RequestOp{putOp("b", ""), putOp("b", "")}})
		x.wantError(err, rpctypes.ErrGRPCDuplicateKey)
		x.txn(&pb.TxnRequest{Success: []*pb.RequestOp{putOp("a", "")}, Failure: []*pb.RequestOp{
			putRequestOp(&pb.PutRequest{Key: []byte("b"), Lease: 404}),
			rangeOp(&pb.RangeRequest{Key: []byte("a"), Revision: 404}),
		}})
	}},

	{name: "a key is written at most once in a Txn", run: func(x *exam) {
		nested := func(ops ...*pb.RequestOp) *pb.RequestOp { return txnOp(&pb.TxnRequest{Success: ops}) }
		for _, c := range []struct {
			what string
			ops  []*pb.RequestOp
			ok   bool
		}{
			{"two puts", []*pb.RequestOp{putOp("a", ""), putOp("a", "")}, false},
			{"put and delete", []*pb.RequestOp{putOp("a", ""), deleteOp("a", "")}, false},
			{"delete and put", []*pb.RequestOp{deleteOp("a", ""), putOp("a", "")}, false},
			{"put in a deleted range", []*pb.RequestOp{putOp("b", ""), deleteOp("a", "c")}, false},
			{"put at the end of a deleted range", []*pb.RequestOp{putOp("c", ""), deleteOp("a", "c")}, true},
			{"two deletes", []*pb.RequestOp{deleteOp("a", ""), deleteOp("a", "")}, true},
			{"overlapping deletes", []*pb.RequestOp{deleteOp("a", "c"), deleteOp("b", "d")}, true},
			{"put and read", []*pb.RequestOp{putOp("a", ""), getOp("a")}, true},
			{"put outside and in a nested Txn", []*pb.RequestOp{putOp("a", ""), nested(putOp("a", ""))}, false},
			{"put in two nested Txns", []*pb.RequestOp{nested(putOp("a", "")), nested(putOp("a", ""))}, false},
			{"put in a nested Txn of a key deleted outside", []*pb.RequestOp{deleteOp("a", ""), nested(putOp("a", ""))}, false},
			{"put outside of a key deleted in a nested Txn", []*pb.RequestOp{putOp("a", ""), nested(deleteOp("a", ""))}, false},
			{"put in both branches", []*pb.RequestOp{txnOp(&pb.TxnRequest{Success: []*pb.RequestOp{putOp("a", "")}, Failure: []*pb.RequestOp{putOp("a", "")}})}, true},
		} {
			_, err := x.KV.Txn(x.ctx, &pb.TxnRequest{Success: c.ops})
			if c.ok && err != nil {
				x.Errorf("%s: %v", c.what, err)
			}
			if !c.ok {
				x.wantError(err, rpctypes.ErrGRPCDuplicateKey)
			}
		}
	}},

	{name: "a Txn has at most 128 operations in each part", run: func(x *exam) {
		x.txn(&pb.TxnRequest{Success: manyPuts(128)})
		equal(x, "the revision", x.revision(), 2)
		var compares []*pb.Compare
		for range 129 {
			compares = append(compares, compareVersion("a", pb.Compare_EQUAL, 0))
		}
		for _, r := range []*pb.TxnRequest{{Success: manyPuts(129)}, {Failure: manyPuts(129)}, {Compare: compares}} {
			_, err := x.KV.Txn(x.ctx, r)
			x.wantError(err, rpctypes.ErrGRPCTooManyOps)
		}
		// A nested Txn has what the parts around it leave.
		_, err := x.KV.Txn(x.ctx, &pb.TxnRequest{Success: append(manyPuts(100), txnOp(&pb.TxnRequest{Success: []*pb.RequestOp{
			deleteOp("d", ""), deleteOp("d", ""), deleteOp("d", ""), deleteOp("d", ""), deleteOp("d", ""), deleteOp("d", ""), deleteOp("d", ""),
			deleteOp("d", ""), deleteOp("d", ""), deleteOp("d", ""), deleteOp("d", ""), deleteOp("d", ""), deleteOp("d", ""), deleteOp("d", ""),
			deleteOp("d", ""), deleteOp("d", ""), deleteOp("d", ""), deleteOp("d", ""), deleteOp("d", ""), deleteOp("d", ""), deleteOp("d", ""),
			deleteOp("d", ""), deleteOp("d", ""), deleteOp("d", ""), deleteOp("d", ""), deleteOp("d", ""), deleteOp("d", ""), deleteOp("d", ""),
		}}))})
		x.wantError(err, rpctypes.ErrGRPCTooManyOps)
	}},

	{name: "max-txn-ops sets another limit", options: start.Options{MaxTxnOps: 3}, run: func(x *exam) {
		x.txn(&pb.TxnRequest{Success: manyPuts(3)})
		_, err := x.KV.Txn(x.ctx, &pb.TxnRequest{Success: manyPuts(4)})
		x.wantError(err, rpctypes.ErrGRPCTooManyOps)
	}},

	{name: "nested Txns choose their branches one by one and answer in place", run: func(x *exam) {
		x.put("a", "1")
		r := x.txn(&pb.TxnRequest{Success: []*pb.RequestOp{
			txnOp(&pb.TxnRequest{
				Compare: []*pb.Compare{compareValue("a", pb.Compare_EQUAL, "no")},
				Success: []*pb.RequestOp{putOp("n", "")},
				Failure: []*pb.RequestOp{txnOp(&pb.TxnRequest{
					Compare: []*pb.Compare{compareValue("a", pb.Compare_EQUAL, "1")},
					Success: []*pb.RequestOp{putOp("deep", ""), getOp("a")},
				})},
			}),
			getOp("deep"),
			txnOp(&pb.TxnRequest{Success: []*pb.RequestOp{deleteOp("a", "")}}),
		}})
		first := r.Responses[0].GetResponseTxn()
		equal(x, "the first outcome", first.Succeeded, false)
		second := first.Responses[0].GetResponseTxn()
		equal(x, "the deep outcome", second.Succeeded, true)
		wantKeys(x, second.Responses[1].GetResponseRange().Kvs, "a")
		wantKeys(x, r.Responses[1].GetResponseRange().Kvs, "deep")
		equal(x, "deleted", r.Responses[2].GetResponseTxn().Responses[0].GetResponseDeleteRange().Deleted, 1)
		equal(x, "the revision", r.Header.Revision, 3)
	}},

	// The shapes that kube-apiserver sends.
	{name: "create, update and delete as Kubernetes does them", run: func(x *exam) {
		key := "/registry/pods/default/p"
		modIs := func(rev int64) []*pb.Compare {
			return []*pb.Compare{{Key: []byte(key), Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: rev}}}
		}
		r := x.txn(&pb.TxnRequest{Compare: modIs(0), Success: []*pb.RequestOp{putOp(key, "1")}})
		equal(x, "created", r.Succeeded, true)
		r = x.txn(&pb.TxnRequest{Compare: modIs(0), Success: []*pb.RequestOp{putOp(key, "again")}, Failure: []*pb.RequestOp{getOp(key)}})
		equal(x, "created twice", r.Succeeded, false)
		same(x, "what is there", r.Responses[0].GetResponseRange().Kvs[0], kv(key, "1", 2, 2, 1))
		r = x.txn(&pb.TxnRequest{Compare: modIs(2), Success: []*pb.RequestOp{putOp(key, "2")}, Failure: []*pb.RequestOp{getOp(key)}})
		equal(x, "updated", r.Succeeded, true)
		r = x.txn(&pb.TxnRequest{Compare: modIs(2), Success: []*pb.RequestOp{deleteOp(key, "")}, Failure: []*pb.RequestOp{getOp(key)}})
		equal(x, "deleted on an old revision", r.Succeeded, false)
		r = x.txn(&pb.TxnRequest{Compare: modIs(3), Success: []*pb.RequestOp{deleteOp(key, "")}, Failure: []*pb.RequestOp{getOp(key)}})
		equal(x, "deleted", r.Succeeded, true)
		equal(x, "deleted keys", r.Responses[0].GetResponseDeleteRange().Deleted, 1)
	}},
}
