package conformance

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/client/v3/leasing"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// leased is a cache of a client's: it holds keys that it has read for itself, with keys below lease/.
func (x *exam) leased(c *clientv3.Client, options ...concurrency.SessionOption) clientv3.KV {
	x.Helper()
	kv, end, err := leasing.NewKV(c, "lease/", options...)
	x.done("begin to lease keys", err)
	x.Cleanup(end)
	return kv
}

var leasingCases = []testCase{
	{name: "what a client has read it keeps, until another writes", run: func(x *exam) {
		clients := x.clients(2)
		one, two := x.leased(clients[0]), x.leased(clients[1])
		x.set(clients[0], "k", "first")
		equal(x, "read by one", x.value(one, "k"), "first")
		if x.get("lease/k") == nil {
			x.Fatal("the key is not leased")
		}
		x.put("k", "under the hand") // breaks the rules: nobody is told
		equal(x, "read again by one", x.value(one, "k"), "first")
		equal(x, "read at a revision", x.value(one, "k", clientv3.WithRev(2)), "first")
		equal(x, "read by two, who cannot lease it too", x.value(two, "k"), "under the hand")

		x.set(two, "k", "second") // has the lease revoked
		equal(x, "read by one", x.value(one, "k"), "second")
		equal(x, "read by two", x.value(two, "k"), "second")
		x.set(one, "k", "third")
		equal(x, "read by one", x.value(one, "k"), "third")
		equal(x, "read by two", x.value(two, "k"), "third")

		_, err := two.Delete(x.ctx, "k")
		x.done("delete", err)
		equal(x, "deleted, read by one", x.value(one, "k"), "")
		_, err = one.GetStream(x.ctx, "k")
		equal(x, "the code of a stream", status.Code(err), codes.Unimplemented)
	}},

	{name: "a leased key that the owner writes stays in its cache", run: func(x *exam) {
		c := x.client()
		one := x.leased(c)
		equal(x, "a key that is not there", x.value(one, "k"), "")
		leased := x.get("lease/k").ModRevision
		rev := x.set(one, "k", "mine")
		r, err := one.Get(x.ctx, "k")
		x.done("get", err)
		same(x, "the cached pair", r.Kvs[0], x.get("k"))
		equal(x, "its revision", r.Kvs[0].ModRevision, rev)
		_, err = one.Do(x.ctx, clientv3.OpPut("k", "again"))
		x.done("put", err)
		equal(x, "the value", x.value(one, "k"), "again")
		d, err := one.Delete(x.ctx, "k")
		x.done("delete", err)
		equal(x, "deleted", d.Deleted, 1)
		equal(x, "the value", x.value(one, "k"), "")
		_, err = one.Compact(x.ctx, d.Header.Revision)
		x.done("compact", err)
		x.set(one, "k", "later")
		equal(x, "the value", x.value(one, "k"), "later")
		equal(x, "the lease's revision", x.get("lease/k").ModRevision, leased)
	}},

	{name: "transactions and ranges of one client reach the cache of another", run: func(x *exam) {
		clients := x.clients(2)
		one, two := x.leased(clients[0]), x.leased(clients[1])
		for _, key := range []string{"a", "b", "c", "d"} {
			x.set(clients[0], key, "old")
			equal(x, "read by one", x.value(one, key), "old")
		}
		// One answers from its cache: the server has other values by now.
		x.put("a", "under the hand")
		r, err := one.Txn(x.ctx).If(clientv3.Compare(clientv3.Value("a"), "=", "old")).Then(clientv3.OpGet("b")).Commit()
		x.done("txn", err)
		equal(x, "compared in the cache", r.Succeeded, true)
		x.set(one, "a", "old")

		r, err = two.Txn(x.ctx).If(clientv3.Compare(clientv3.Value("a"), "=", "old")).
			Then(clientv3.OpPut("a", "new"), clientv3.OpDelete("b"), clientv3.OpGet("c")).Else(clientv3.OpPut("c", "never")).Commit()
		x.done("txn", err)
		equal(x, "succeeded", r.Succeeded, true)
		equal(x, "got", string(r.Responses[2].GetResponseRange().Kvs[0].Value), "old")
		equal(x, "put, read by one", x.value(one, "a"), "new")
		equal(x, "deleted, read by one", x.value(one, "b"), "")
		equal(x, "not touched, read by one", x.value(one, "c"), "old")

		op, err := two.Do(x.ctx, clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpDelete("c", clientv3.WithRange("e")), clientv3.OpPut("e", "")}, nil))
		x.done("txn", err)
		equal(x, "deleted", op.Txn().Responses[0].GetResponseDeleteRange().Deleted, 2)
		equal(x, "deleted with a range, read by one", x.value(one, "c"), "")
		equal(x, "deleted with a range, read by one", x.value(one, "d"), "")
		x.set(two, "c", "back")
		d, err := one.Delete(x.ctx, "a", clientv3.WithRange("z"))
		x.done("delete", err)
		equal(x, "deleted", d.Deleted, 3)
		equal(x, "read by two", x.value(two, "c"), "")
	}},

	{name: "who has crashed holds its keys no longer than its session", run: func(x *exam) {
		clients := x.clients(2)
		one, end, err := leasing.NewKV(clients[0], "lease/", concurrency.WithTTL(2))
		x.done("begin to lease keys", err)
		two := x.leased(clients[1])
		x.set(one, "k", "old")
		equal(x, "read by one", x.value(one, "k"), "old")
		end()
		clients[0].Close()
		x.set(two, "k", "new") // waits for the end of the session
		if x.get("lease/k") != nil {
			x.Error("the crashed one has its lease still")
		}
		equal(x, "read by two", x.value(two, "k"), "new")
	}},

	{name: "who loses its session reads anew", run: func(x *exam) {
		c := x.client()
		one := x.leased(c, concurrency.WithTTL(2))
		x.set(one, "k", "old")
		equal(x, "read", x.value(one, "k"), "old")
		lease := x.get("lease/k").Lease
		_, err := c.Revoke(x.ctx, clientv3.LeaseID(lease))
		x.done("revoke", err)
		x.put("k", "new")
		x.until("it reads anew, with a new session", func() bool {
			held := x.get("lease/k")
			return x.value(one, "k") == "new" && held != nil && held.Lease != lease
		})
	}},

	{name: "many clients that lease the same keys read and write as one", run: func(x *exam) {
		const keys, rounds = 3, 15
		clients := x.clients(3)
		var all sync.WaitGroup
		cached := make([]clientv3.KV, len(clients))
		for i, c := range clients {
			cached[i] = x.leased(c)
		}
		for i, kv := range cached {
			all.Go(func() {
				r := rand.New(rand.NewPCG(1, uint64(i)))
				for range rounds {
					key := fmt.Sprintf("k%d", r.IntN(keys))
					// Counts, with a comparison that a stale cache must fail on the server or pass truly.
					for {
						got, err := kv.Get(x.ctx, key)
						if err != nil {
							x.Errorf("get: %v", err)
							return
						}
						var n int
						var mod int64
						if len(got.Kvs) > 0 {
							mod = got.Kvs[0].ModRevision
							if n, err = strconv.Atoi(string(got.Kvs[0].Value)); err != nil {
								x.Errorf("value: %v", err)
								return
							}
						}
						done, err := kv.Txn(x.ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", mod)).
							Then(clientv3.OpPut(key, strconv.Itoa(n+1))).Commit()
						if err != nil {
							x.Errorf("txn: %v", err)
							return
						}
						if done.Succeeded {
							break
						}
					}
				}
			})
		}
		all.Wait()
		sum := 0
		for i := range keys {
			key := fmt.Sprintf("k%d", i)
			want := string(x.get(key).GetValue())
			for _, kv := range cached {
				equal(x, "read of "+key, x.value(kv, key), want)
			}
			n, err := strconv.Atoi(want)
			x.done("the value", err)
			sum += n
		}
		equal(x, "all counted", sum, rounds*len(clients))
	}},

	{name: "errors of the server pass", run: func(x *exam) {
		one := x.leased(x.client())
		_, err := one.Put(x.ctx, "k", "", clientv3.WithLease(404))
		x.refused("a lease that is not there", err, rpctypes.ErrLeaseNotFound)
		_, err = one.Compact(x.ctx, 404)
		x.refused("a future revision", err, rpctypes.ErrFutureRev)
		x.set(one, "k", "")
	}},
}
