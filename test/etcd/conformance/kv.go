package conformance

import (
	"bytes"
	"fmt"
	"strconv"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/quire-db/quire/test/etcd/start"
)

var kvCases = []testCase{
	{name: "a fresh store is at revision 1 and the first write makes revision 2", run: func(x *exam) {
		equal(x, "the revision of a fresh store", x.revision(), 1)
		equal(x, "the revision of the first write", x.put("a", "1").Header.Revision, 2)
		equal(x, "the revision read after it", x.revision(), 2)
	}},

	{name: "every header names cluster, member and term, the same ones each time", run: func(x *exam) {
		first := x.put("a", "1").Header
		if first.ClusterId == 0 || first.MemberId == 0 || first.RaftTerm == 0 {
			x.Fatalf("incomplete header %v", first)
		}
		for _, h := range []*pb.ResponseHeader{
			x.rangeRequest(&pb.RangeRequest{Key: []byte("a")}).Header,
			x.delete("a").Header,
			x.txn(&pb.TxnRequest{Success: []*pb.RequestOp{putOp("a", "")}}).Header,
			x.grant(1, 100).Header,
		} {
			equal(x, "cluster id", h.ClusterId, first.ClusterId)
			equal(x, "member id", h.MemberId, first.MemberId)
			equal(x, "term", h.RaftTerm, first.RaftTerm)
		}
	}},

	{name: "a put counts versions from 1 and keeps the create revision", run: func(x *exam) {
		x.put("a", "1")
		x.put("b", "")
		x.put("a", "2")
		same(x, "a", x.get("a"), kv("a", "2", 2, 4, 2))
		same(x, "b", x.get("b"), kv("b", "", 3, 3, 1))
	}},

	{name: "a key that was deleted starts again at version 1", run: func(x *exam) {
		x.put("a", "1")
		x.put("a", "2")
		x.delete("a")
		x.put("a", "3")
		same(x, "a", x.get("a"), kv("a", "3", 5, 5, 1))
	}},

	{name: "a put tells the previous pair only when asked", run: func(x *exam) {
		if r := x.putRequest(&pb.PutRequest{Key: []byte("a"), PrevKv: true}); r.PrevKv != nil {
			x.Errorf("a new key has the previous pair %v", r.PrevKv)
		}
		if r := x.put("a", "1"); r.PrevKv != nil {
			x.Errorf("unasked for previous pair %v", r.PrevKv)
		}
		r := x.putRequest(&pb.PutRequest{Key: []byte("a"), Value: []byte("2"), PrevKv: true})
		same(x, "the previous pair", r.PrevKv, kv("a", "1", 2, 3, 2))
	}},

	{name: "ignore_value keeps the value and changes the rest", run: func(x *exam) {
		x.grant(7, 1000)
		x.put("a", "kept")
		r := x.putRequest(&pb.PutRequest{Key: []byte("a"), IgnoreValue: true, Lease: 7, PrevKv: true})
		same(x, "the previous pair", r.PrevKv, kv("a", "kept", 2, 2, 1))
		want := kv("a", "kept", 2, 3, 2)
		want.Lease = 7
		same(x, "a", x.get("a"), want)
	}},

	{name: "ignore_lease keeps the lease and changes the rest", run: func(x *exam) {
		x.grant(7, 1000)
		x.putRequest(&pb.PutRequest{Key: []byte("a"), Value: []byte("1"), Lease: 7})
		x.putRequest(&pb.PutRequest{Key: []byte("a"), Value: []byte("2"), IgnoreLease: true})
		want := kv("a", "2", 2, 3, 2)
		want.Lease = 7
		same(x, "a", x.get("a"), want)
		x.put("a", "3")
		same(x, "a after a put without lease", x.get("a"), kv("a", "3", 2, 4, 3))
	}},

	{name: "a refused put changes nothing", run: func(x *exam) {
		for _, c := range []struct {
			request *pb.PutRequest
			want    error
		}{
			{&pb.PutRequest{}, rpctypes.ErrGRPCEmptyKey},
			{&pb.PutRequest{Key: []byte("a"), Value: []byte("v"), IgnoreValue: true}, rpctypes.ErrGRPCValueProvided},
			{&pb.PutRequest{Key: []byte("a"), Lease: 1, IgnoreLease: true}, rpctypes.ErrGRPCLeaseProvided},
			{&pb.PutRequest{Key: []byte("a"), IgnoreValue: true}, rpctypes.ErrGRPCKeyNotFound},
			{&pb.PutRequest{Key: []byte("a"), IgnoreLease: true}, rpctypes.ErrGRPCKeyNotFound},
			{&pb.PutRequest{Key: []byte("a"), Lease: 404}, rpctypes.ErrGRPCLeaseNotFound},
			{&pb.PutRequest{Key: []byte("a"), Lease: 404, IgnoreValue: true}, rpctypes.ErrGRPCLeaseNotFound},
		} {
			_, err := x.KV.Put(x.ctx, c.request)
			x.wantError(err, c.want)
		}
		equal(x, "the revision", x.revision(), 1)
	}},

	{name: "keys and values are arbitrary bytes", run: func(x *exam) {
		all := make([]byte, 256)
		for i := range all {
			all[i] = byte(i)
		}
		for _, key := range [][]byte{{0}, {0, 0}, {0xff}, {0xff, 0xff, 0}, all, []byte("'; DROP TABLE kv; --"), bytes.Repeat([]byte{0xfe}, 10_000)} {
			x.putRequest(&pb.PutRequest{Key: key, Value: all})
			r := x.rangeRequest(&pb.RangeRequest{Key: key})
			if len(r.Kvs) != 1 || !bytes.Equal(r.Kvs[0].Key, key) || !bytes.Equal(r.Kvs[0].Value, all) {
				x.Errorf("the key of %d bytes beginning %q did not come back", len(key), key[:1])
			}
		}
	}},

	{name: "a delete counts what it deleted and tells it when asked", run: func(x *exam) {
		x.put("a", "1")
		x.put("b", "2")
		x.put("c", "3")
		r := x.deleteRequest(&pb.DeleteRangeRequest{Key: []byte("a"), RangeEnd: []byte("c"), PrevKv: true})
		equal(x, "deleted", r.Deleted, 2)
		equal(x, "the revision of a delete of two keys", r.Header.Revision, 5)
		if len(r.PrevKvs) != 2 {
			x.Fatalf("previous pairs are %v, want two", r.PrevKvs)
		}
		same(x, "the first previous pair", r.PrevKvs[0], kv("a", "1", 2, 2, 1))
		same(x, "the second previous pair", r.PrevKvs[1], kv("b", "2", 3, 3, 1))
		if r := x.delete("c"); r.PrevKvs != nil || r.Deleted != 1 {
			x.Errorf("deleting c answers %v", r)
		}
	}},

	{name: "a delete of nothing makes no revision", run: func(x *exam) {
		x.put("a", "1")
		for _, r := range []*pb.DeleteRangeRequest{
			{Key: []byte("b"), PrevKv: true},
			{Key: []byte("b"), RangeEnd: []byte("a")},
			{Key: []byte("a"), RangeEnd: []byte("a")},
		} {
			resp := x.deleteRequest(r)
			equal(x, "deleted by "+show(r), resp.Deleted, 0)
			equal(x, "the revision after "+show(r), resp.Header.Revision, 2)
		}
		_, err := x.KV.DeleteRange(x.ctx, &pb.DeleteRangeRequest{})
		x.wantError(err, rpctypes.ErrGRPCEmptyKey)
	}},

	{name: "a delete takes the ranges that a read takes", run: func(x *exam) {
		fill := func() {
			for _, k := range []string{"a", "a\x00", "ab", "b", "\xff", "\x00"} {
				x.put(k, "")
			}
		}
		for _, c := range []struct {
			key, end string
			want     int64
		}{
			{"a", "", 1},
			{"a", "a\x00", 1},
			{"a", "b", 3},
			{"a", "\x00", 5},
			{"\x00", "\x00", 6},
			{"\x00", "a", 1},
			{"b", "a", 0},
		} {
			fill()
			r := x.deleteRequest(&pb.DeleteRangeRequest{Key: []byte(c.key), RangeEnd: []byte(c.end)})
			equal(x, fmt.Sprintf("deleted in [%q, %q)", c.key, c.end), r.Deleted, c.want)
		}
	}},

	{name: "a compacted revision can be read, one before it not", run: func(x *exam) {
		x.put("a", "1")
		x.put("a", "2")
		x.put("a", "3")
		x.put("b", "1")
		x.compact(4)
		r := x.rangeRequest(&pb.RangeRequest{Key: []byte("a"), Revision: 4})
		same(x, "a at the compact revision", r.Kvs[0], kv("a", "3", 2, 4, 3))
		_, err := x.KV.Range(x.ctx, &pb.RangeRequest{Key: []byte("a"), Revision: 3})
		x.wantError(err, rpctypes.ErrGRPCCompacted)
		equal(x, "the store's revision after a compaction", x.revision(), 5)
	}},

	{name: "compacting twice, backwards or into the future is refused", run: func(x *exam) {
		x.put("a", "1")
		x.put("a", "2")
		x.put("a", "3")
		x.compact(3)
		for revision, want := range map[int64]error{
			3: rpctypes.ErrGRPCCompacted, 2: rpctypes.ErrGRPCCompacted, 0: rpctypes.ErrGRPCCompacted, -1: rpctypes.ErrGRPCCompacted,
			5: rpctypes.ErrGRPCFutureRev, 1 << 40: rpctypes.ErrGRPCFutureRev,
		} {
			_, err := x.KV.Compact(x.ctx, &pb.CompactionRequest{Revision: revision})
			x.wantError(err, want)
		}
		x.compact(4)
	}},

	{name: "a compaction keeps what lives and forgets what was deleted", run: func(x *exam) {
		x.put("a", "1")
		x.put("b", "1")
		x.delete("a")
		x.put("c", "1")
		r, err := x.KV.Compact(x.ctx, &pb.CompactionRequest{Revision: 4})
		x.must(err, &pb.CompactionRequest{})
		equal(x, "the revision in a compaction's answer", r.Header.Revision, 5)
		got := x.rangeRequest(&pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
		wantKeys(x, got.Kvs, "b", "c")
		x.put("a", "2")
		same(x, "a, made again", x.get("a"), kv("a", "2", 6, 6, 1))
	}},

	{name: "periodic compaction keeps the history of its period and no more", options: start.Options{AutoCompactionMode: "periodic", AutoCompactionRetention: "2s"}, run: func(x *exam) {
		x.put("a", "1")
		x.put("a", "2")
		began := time.Now()
		for {
			_, err := x.KV.Range(x.ctx, &pb.RangeRequest{Key: []byte("a"), Revision: 2})
			if err != nil {
				x.wantError(err, rpctypes.ErrGRPCCompacted)
				break
			}
			time.Sleep(50 * time.Millisecond) // the compaction sends this reader no signal
		}
		if d := time.Since(began); d < 1500*time.Millisecond {
			x.Errorf("history of 2s was compacted after %v", d)
		}
		same(x, "a", x.get("a"), kv("a", "2", 2, 3, 2))
	}},

	// "Strict serializability": what is acknowledged is seen by whoever asks afterwards.
	{name: "a write is seen by every read that begins after its answer", run: func(x *exam) {
		other, err := start.Dial(x.Address, nil)
		if err != nil {
			x.Fatal(err)
		}
		defer other.Close()
		reader := pb.NewKVClient(other)
		for i := range 100 {
			value := strconv.Itoa(i)
			w := x.put("a", value)
			r, err := reader.Range(x.ctx, &pb.RangeRequest{Key: []byte("a")})
			x.must(err, &pb.RangeRequest{})
			if string(r.Kvs[0].Value) != value || r.Header.Revision != w.Header.Revision {
				x.Fatalf("after writing %s at %d another client reads %s at %d", value, w.Header.Revision, r.Kvs[0].Value, r.Header.Revision)
			}
		}
	}},

	// "Atomicity" and "isolation": no update is lost between a read and the conditional write after it.
	{name: "concurrent conditional updates lose no update", run: func(x *exam) {
		const clients, each = 8, 25
		x.put("n", "0")
		var all sync.WaitGroup
		failures := make(chan error, clients)
		for range clients {
			all.Go(func() {
				for done := 0; done < each; {
					r, err := x.KV.Range(x.ctx, &pb.RangeRequest{Key: []byte("n")})
					if err != nil {
						failures <- err
						return
					}
					n, err := strconv.Atoi(string(r.Kvs[0].Value))
					if err != nil {
						failures <- err
						return
					}
					t, err := x.KV.Txn(x.ctx, &pb.TxnRequest{
						Compare: []*pb.Compare{{Key: []byte("n"), Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: r.Kvs[0].ModRevision}}},
						Success: []*pb.RequestOp{putOp("n", strconv.Itoa(n+1))},
					})
					if err != nil {
						failures <- err
						return
					}
					if t.Succeeded {
						done++
					}
				}
			})
		}
		all.Wait()
		close(failures)
		for err := range failures {
			x.Fatal(err)
		}
		got := x.get("n")
		equal(x, "the sum of all increments", string(got.Value), strconv.Itoa(clients*each))
		equal(x, "its version", got.Version, clients*each+1)
		equal(x, "the store's revision: no gaps", x.revision(), clients*each+2)
	}},

	{name: "concurrent writes get one revision each, without gaps", run: func(x *exam) {
		const clients, each = 16, 20
		revisions := make(chan int64, clients*each)
		failures := make(chan error, clients)
		var all sync.WaitGroup
		for c := range clients {
			all.Go(func() {
				for range each {
					r, err := x.KV.Put(x.ctx, &pb.PutRequest{Key: []byte{'k', byte(c)}})
					if err != nil {
						failures <- err
						return
					}
					revisions <- r.Header.Revision
				}
			})
		}
		all.Wait()
		close(failures)
		for err := range failures {
			x.Fatal(err)
		}
		close(revisions)
		seen := make(map[int64]bool)
		for r := range revisions {
			if seen[r] {
				x.Errorf("two writes were told revision %d", r)
			}
			seen[r] = true
		}
		for r := int64(2); r < 2+clients*each; r++ {
			if !seen[r] {
				x.Errorf("no write was told revision %d", r)
			}
		}
	}},

	{name: "a store over its quota takes no puts but reads, deletes and compacts", options: start.Options{QuotaBytes: 256 << 10}, run: func(x *exam) {
		value := bytes.Repeat([]byte("x"), 10<<10)
		var err error
		written := 0
		for ; written < 1000 && err == nil; written++ {
			_, err = x.KV.Put(x.ctx, &pb.PutRequest{Key: fmt.Appendf(nil, "%04d", written), Value: value})
		}
		x.wantError(err, rpctypes.ErrGRPCNoSpace)
		_, err = x.KV.Txn(x.ctx, &pb.TxnRequest{Success: []*pb.RequestOp{putOp("a", string(value))}})
		x.wantError(err, rpctypes.ErrGRPCNoSpace)
		_, err = x.Lease.LeaseGrant(x.ctx, &pb.LeaseGrantRequest{TTL: 100})
		x.wantError(err, rpctypes.ErrGRPCNoSpace)

		alarms, err := x.Maintenance.Alarm(x.ctx, &pb.AlarmRequest{Action: pb.AlarmRequest_GET})
		x.must(err, &pb.AlarmRequest{})
		if len(alarms.Alarms) != 1 || alarms.Alarms[0].Alarm != pb.AlarmType_NOSPACE || !x.isMember(alarms.Alarms[0].MemberID) {
			x.Errorf("alarms are %v, want NOSPACE of a member", alarms.Alarms)
		}
		if kv := x.get("0000"); kv == nil {
			x.Error("a key cannot be read over the quota")
		}
		x.deleteRequest(&pb.DeleteRangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
		x.compact(x.revision())
	}},
}
