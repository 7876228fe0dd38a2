package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/clientv3util"
	"go.etcd.io/etcd/client/v3/yaml"
)

// clientCases are those of etcd's client itself, where it does more than to pass requests on.
var clientCases = []testCase{
	{name: "keys are told there or missing", run: func(x *exam) {
		c := x.client()
		for _, want := range []bool{true, false} {
			r, err := c.Txn(x.ctx).If(clientv3util.KeyMissing("k")).Then(clientv3.OpPut("k", "")).Commit()
			x.done("create", err)
			equal(x, "created", r.Succeeded, want)
		}
		for _, want := range []bool{true, false} {
			r, err := c.Txn(x.ctx).If(clientv3util.KeyExists("k")).Then(clientv3.OpDelete("k")).Commit()
			x.done("delete", err)
			equal(x, "deleted", r.Succeeded, want)
		}
	}},

	{name: "a client is made from a file", run: func(x *exam) {
		file := filepath.Join(x.TempDir(), "client.yaml")
		x.done("write a file", os.WriteFile(file, fmt.Appendf(nil, "endpoints: [%q]\ninsecure-transport: true\n", x.Address), 0o600))
		config, err := yaml.NewConfig(file)
		x.done("read the file", err)
		c, err := clientv3.New(*config)
		x.done("connect", err)
		defer c.Close()
		x.set(c, "k", "v")
		equal(x, "the value", x.value(c, "k"), "v")
	}},

	{name: "a stream of a range is put together", run: func(x *exam) {
		c := x.client()
		x.fill("k/", 500)
		stream, err := c.GetStream(x.ctx, "k/", clientv3.WithPrefix())
		x.done("get", err)
		r, err := clientv3.GetStreamToGetResponse(stream)
		x.done("get", err)
		whole, err := c.Get(x.ctx, "k/", clientv3.WithPrefix())
		x.done("get", err)
		equal(x, "pairs", len(r.Kvs), 500)
		equal(x, "the count", r.Count, whole.Count)
		equal(x, "all", pairs(r), pairs(whole))
	}},

	{name: "a watch is made known, asks for progress, comes in parts, leaves out and is ended", run: func(x *exam) {
		c := x.client()
		w := c.Watch(clientv3.WithRequireLeader(x.ctx), "", clientv3.WithPrefix(), clientv3.WithCreatedNotify(), clientv3.WithFragment(),
			clientv3.WithFilterDelete(), clientv3.WithPrevKV(), clientv3.WithProgressNotify())
		equal(x, "created", next(x, "the watch", w).Created, true)
		var ops []clientv3.Op
		for i := range 5 { // more than one message may hold, though each write is small enough
			ops = append(ops, clientv3.OpPut(fmt.Sprint(i), strings.Repeat("v", 250_000)))
		}
		for range 2 { // the second time with what was there
			_, err := c.Txn(x.ctx).Then(ops...).Commit()
			x.done("put", err)
		}
		_, err := c.Delete(x.ctx, "0")
		x.done("delete", err)
		last := x.set(c, "last", "")
		for seen := 0; seen < 11; {
			r := next(x, "the watch", w)
			x.done("the watch", r.Err())
			for _, e := range r.Events {
				if e.Type != clientv3.EventTypePut {
					x.Errorf("a filtered event: %v", e)
				}
				if (e.PrevKv != nil) != e.IsModify() {
					x.Errorf("the previous pair of a change, or of none: %v", e)
				}
				seen++
			}
		}
		x.done("ask for progress", c.RequestProgress(clientv3.WithRequireLeader(x.ctx)))
		progress := next(x, "progress", w)
		equal(x, "progress", progress.IsProgressNotify(), true)
		equal(x, "its revision", progress.Header.Revision, last)
		_, err = c.Compact(x.ctx, last-1)
		x.done("compact", err)
		r := next(x, "a watch of before", c.Watch(x.ctx, "k", clientv3.WithRev(1)))
		x.refused("a watch of before", r.Err(), rpctypes.ErrCompacted)
		x.done("close", c.Watcher.Close())
		closes(x, "a closed watcher", w)
	}},

	{name: "leases are kept alive for each who asks, listed and given back", run: func(x *exam) {
		c := x.client()
		g, err := c.Grant(x.ctx, 2)
		x.done("grant", err)
		one, err := c.KeepAlive(x.ctx, g.ID)
		x.done("keep alive", err)
		two, err := c.KeepAlive(x.ctx, g.ID)
		x.done("keep alive", err)
		equal(x, "time to live", next(x, "a keepalive", one).TTL, 2)
		equal(x, "time to live", next(x, "a keepalive", two).TTL, 2)
		all, err := c.Leases(x.ctx)
		x.done("leases", err)
		equal(x, "leases", fmt.Sprint(all.Leases), fmt.Sprint([]clientv3.LeaseStatus{{ID: g.ID}}))
		_, err = c.Revoke(x.ctx, g.ID)
		x.done("revoke", err)
		closes(x, "a keepalive of a revoked lease", one)
		closes(x, "a keepalive of a revoked lease", two)
		_, err = c.KeepAliveOnce(x.ctx, g.ID)
		x.refused("a keepalive of a revoked lease", err, rpctypes.ErrLeaseNotFound)
	}},
}
