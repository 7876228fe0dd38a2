package conformance

import (
	"slices"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/client/v3/namespace"
)

// inNamespace gives a new client a part of the store for all that there is.
func (x *exam) inNamespace(prefix string) *clientv3.Client {
	x.Helper()
	c := x.client()
	c.KV, c.Watcher, c.Lease = namespace.NewKV(c.KV, prefix), namespace.NewWatcher(c.Watcher, prefix), namespace.NewLease(c.Lease, prefix)
	return c
}

var namespaceCases = []testCase{
	{name: "reads and writes stay in their namespace", run: func(x *exam) {
		c, other := x.inNamespace("ns/"), x.inNamespace("nt/")
		x.put("ns", "before")
		x.put("ns0", "after")
		x.set(other, "a", "other")
		x.set(c, "a", "1")
		x.set(c, "b", "2")
		equal(x, "the stored key", string(x.get("ns/a").Value), "1")
		p, err := c.Put(x.ctx, "a", "3", clientv3.WithPrevKV())
		x.done("put", err)
		same(x, "the previous pair", p.PrevKv, kv("a", "1", 5, 5, 1))
		for what, options := range map[string][]clientv3.OpOption{
			"all with a prefix":   {clientv3.WithPrefix()},
			"all from a key on":   {clientv3.WithFromKey()},
			"all of a range":      {clientv3.WithRange("c")},
			"all in other order":  {clientv3.WithFromKey(), clientv3.WithSort(clientv3.SortByVersion, clientv3.SortDescend)},
			"all of a long range": {clientv3.WithRange("\x00")},
		} {
			key := ""
			if what == "all of a range" || what == "all of a long range" {
				key = "a"
			}
			r, err := c.Get(x.ctx, key, options...)
			x.done(what, err)
			equal(x, what, pairs(r), "a=3 b=2")
		}
		r, err := c.Do(x.ctx, clientv3.OpGet("a", clientv3.WithRev(5)))
		x.done("get", err)
		equal(x, "as it was", pairs(r.Get()), "a=1")
		for what, err := range map[string]error{
			"a put":    func() error { _, err := c.Put(x.ctx, "", ""); return err }(),
			"a get":    func() error { _, err := c.Get(x.ctx, ""); return err }(),
			"a delete": func() error { _, err := c.Delete(x.ctx, ""); return err }(),
			"an op":    func() error { _, err := c.Do(x.ctx, clientv3.OpPut("", "")); return err }(),
		} {
			x.refused(what+" of no key", err, rpctypes.ErrEmptyKey)
		}
		d, err := c.Delete(x.ctx, "", clientv3.WithFromKey(), clientv3.WithPrevKV())
		x.done("delete", err)
		equal(x, "deleted", d.Deleted, 2)
		wantKeys(x, d.PrevKvs, "a", "b")
		wantKeys(x, x.rangeRequest(everything).Kvs, "ns", "ns0", "nt/a")
	}},

	{name: "transactions compare and act in their namespace, nested ones too", run: func(x *exam) {
		c := x.inNamespace("ns/")
		x.put("a", "outside")
		x.set(c, "a", "inside")
		x.set(c, "b", "inside")
		r, err := c.Txn(x.ctx).If(
			clientv3.Compare(clientv3.Value("a"), "=", "inside"),
			clientv3.Compare(clientv3.CreateRevision("a").WithRange("z"), ">", 2), // "a" outside is older
			clientv3.Compare(clientv3.Version("none"), "=", 0),
		).Then(
			clientv3.OpTxn([]clientv3.Cmp{clientv3.Compare(clientv3.Version("a").WithPrefix(), "=", 1)},
				[]clientv3.Op{clientv3.OpPut("a", "new", clientv3.WithPrevKV()), clientv3.OpGet("", clientv3.WithFromKey())}, nil),
			clientv3.OpDelete("b", clientv3.WithPrevKV()),
		).Else(clientv3.OpPut("else", "")).Commit()
		x.done("txn", err)
		equal(x, "succeeded", r.Succeeded, true)
		nested := r.Responses[0].GetResponseTxn()
		equal(x, "the nested one too", nested.Succeeded, true)
		equal(x, "the previous key", string(nested.Responses[0].GetResponsePut().PrevKv.Key), "a")
		wantKeys(x, nested.Responses[1].GetResponseRange().Kvs, "a", "b")
		wantKeys(x, r.Responses[1].GetResponseDeleteRange().PrevKvs, "b")
		wantKeys(x, x.rangeRequest(everything).Kvs, "a", "ns/a")
		equal(x, "outside", string(x.get("a").Value), "outside")
		r, err = c.Txn(x.ctx).If(clientv3.Compare(clientv3.LeaseValue("a"), "!=", 0)).Else(clientv3.OpGet("a")).Commit()
		x.done("txn", err)
		equal(x, "succeeded", r.Succeeded, false)
		wantKeys(x, r.Responses[0].GetResponseRange().Kvs, "a")
	}},

	{name: "watches and leases show their namespace only", run: func(x *exam) {
		c := x.inNamespace("ns/")
		g, err := c.Grant(x.ctx, 100)
		x.done("grant", err)
		all := c.Watch(x.ctx, "", clientv3.WithPrefix(), clientv3.WithPrevKV(), clientv3.WithRev(1))
		from := c.Watch(x.ctx, "b", clientv3.WithFromKey(), clientv3.WithRev(1))
		one := c.Watch(x.ctx, "a", clientv3.WithRev(1))
		x.putLease("a", int64(g.ID))
		x.putLease("ns", int64(g.ID))
		x.set(c, "a", "1", clientv3.WithLease(g.ID))
		x.set(c, "b", "2", clientv3.WithLease(g.ID))
		x.put("ns0", "")
		ttl, err := c.TimeToLive(x.ctx, g.ID, clientv3.WithAttachedKeys())
		x.done("time to live", err)
		var keys []string
		for _, k := range ttl.Keys {
			keys = append(keys, string(k))
		}
		slices.Sort(keys)
		if !slices.Equal(keys, []string{"a", "b"}) {
			x.Errorf("the lease's keys are %q", keys)
		}
		_, err = c.Revoke(x.ctx, g.ID)
		x.done("revoke", err)
		sees := func(what string, from clientv3.WatchChan, want ...string) {
			x.Helper()
			var seen []string
			for len(seen) < len(want) {
				r := next(x, what, from)
				x.done(what, r.Err())
				for _, e := range r.Events {
					seen = append(seen, e.Type.String()+" "+string(e.Kv.Key))
					if e.PrevKv != nil && string(e.PrevKv.Key) != string(e.Kv.Key) {
						x.Errorf("%s: the previous pair is %v", what, e.PrevKv)
					}
				}
			}
			if !slices.Equal(seen, want) {
				x.Errorf("%s: %q, want %q", what, seen, want)
			}
		}
		sees("all", all, "PUT a", "PUT b", "DELETE a", "DELETE b")
		sees("all from b on", from, "PUT b", "DELETE b")
		sees("one key", one, "PUT a", "DELETE a")
		x.done("close the watcher", c.Watcher.Close())
		closes(x, "a closed watcher", all)
	}},

	{name: "mutexes in two namespaces are two", run: func(x *exam) {
		c, other := x.inNamespace("ns/"), x.inNamespace("nt/")
		m := concurrency.NewMutex(x.session(c), "lock")
		x.done("lock", m.Lock(x.ctx))
		x.done("lock in the other one", concurrency.NewMutex(x.session(other), "lock").TryLock(x.ctx))
		second := concurrency.NewMutex(x.session(x.inNamespace("ns/")), "lock")
		x.refused("lock in the same one", second.TryLock(x.ctx), concurrency.ErrLocked)
		waits := begin(func() error { return second.Lock(x.ctx) })
		x.waiting(c, "lock/", 2)
		blocked(x, "the second", waits)
		x.done("unlock", m.Unlock(x.ctx))
		x.done("lock", next(x, "the second", waits))
	}},
}
