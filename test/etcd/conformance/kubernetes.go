package conformance

import (
	"fmt"
	"strconv"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/kubernetes"
)

// kube is etcd's client for Kubernetes, closed when the case ends.
func (x *exam) kube() kubernetes.Interface {
	x.Helper()
	c, err := kubernetes.New(clientv3.Config{Endpoints: []string{x.Address}, DialTimeout: 10 * time.Second})
	x.done("connect etcd's client for Kubernetes", err)
	x.Cleanup(func() { c.Close() })
	return c.Kubernetes
}

var kubernetesCases = []testCase{
	{name: "Get answers a pair as it is or was", run: func(x *exam) {
		k := x.kube()
		r, err := k.Get(x.ctx, "/a", kubernetes.GetOptions{})
		x.done("get", err)
		if r.KV != nil || r.Revision != 1 {
			x.Errorf("a key that is not there: %v", r)
		}
		x.put("/a", "one")
		x.put("/a", "two")
		x.put("/b", "")
		r, err = k.Get(x.ctx, "/a", kubernetes.GetOptions{})
		x.done("get", err)
		same(x, "the pair", r.KV, kv("/a", "two", 2, 3, 2))
		equal(x, "the revision", r.Revision, 4)
		r, err = k.Get(x.ctx, "/a", kubernetes.GetOptions{Revision: 2})
		x.done("get", err)
		same(x, "the pair as it was", r.KV, kv("/a", "one", 2, 2, 1))
		equal(x, "the revision", r.Revision, 4)
		x.compact(3)
		_, err = k.Get(x.ctx, "/a", kubernetes.GetOptions{Revision: 2})
		x.refused("a compacted revision", err, rpctypes.ErrCompacted)
		_, err = k.Get(x.ctx, "/a", kubernetes.GetOptions{Revision: 5})
		x.refused("a future revision", err, rpctypes.ErrFutureRev)
	}},

	{name: "List goes page by page through one revision while others write", run: func(x *exam) {
		k := x.kube()
		const n = 7
		for i := range n {
			x.put(fmt.Sprintf("/pods/%d", i), strconv.Itoa(i))
		}
		x.put("/podsx", "")
		options := kubernetes.ListOptions{Limit: 3}
		for page, want := range []struct {
			keys  []string
			count int64 // from the first key of the page on
		}{{[]string{"/pods/0", "/pods/1", "/pods/2"}, 7}, {[]string{"/pods/3", "/pods/4", "/pods/5"}, 4}, {[]string{"/pods/6"}, 1}} {
			r, err := k.List(x.ctx, "/pods/", options)
			x.done("list", err)
			wantKeys(x, r.Kvs, want.keys...)
			equal(x, "the count", r.Count, want.count)
			if page == 0 {
				options.Revision = r.Revision
			}
			equal(x, "the revision", r.Revision, options.Revision+2*int64(page))
			options.Continue = string(r.Kvs[len(r.Kvs)-1].Key) + "\x00"
			x.delete(fmt.Sprintf("/pods/%d", 4+page)) // is still on the later pages
			x.put("/pods/9", "")
		}
		r, err := k.List(x.ctx, "/pods/", kubernetes.ListOptions{})
		x.done("list", err)
		wantKeys(x, r.Kvs, "/pods/0", "/pods/1", "/pods/2", "/pods/3", "/pods/9")
		count, err := k.Count(x.ctx, "/pods/", kubernetes.CountOptions{})
		x.done("count", err)
		equal(x, "the count", count, 5)
		count, err = k.Count(x.ctx, "/none/", kubernetes.CountOptions{})
		x.done("count", err)
		equal(x, "the count of nothing", count, 0)
		x.compact(options.Revision + 1)
		_, err = k.List(x.ctx, "/pods/", options)
		x.refused("a page after the compaction", err, rpctypes.ErrCompacted)
	}},

	{name: "OptimisticPut and OptimisticDelete fail where somebody was faster", run: func(x *exam) {
		k := x.kube()
		x.grant(1, 100)
		put := func(value string, expected int64, options kubernetes.PutOptions, succeeds bool, found string) int64 {
			x.Helper()
			r, err := k.OptimisticPut(x.ctx, "/a", []byte(value), expected, options)
			x.done("put", err)
			equal(x, fmt.Sprintf("a put over %d succeeds", expected), r.Succeeded, succeeds)
			equal(x, "what is there", string(r.KV.GetValue()), found)
			return r.Revision
		}
		remove := func(key string, expected int64, options kubernetes.DeleteOptions, succeeds bool, found string) int64 {
			x.Helper()
			r, err := k.OptimisticDelete(x.ctx, key, expected, options)
			x.done("delete", err)
			equal(x, fmt.Sprintf("a delete of %s at %d succeeds", key, expected), r.Succeeded, succeeds)
			equal(x, "what is there", string(r.KV.GetValue()), found)
			return r.Revision
		}
		get := kubernetes.PutOptions{GetOnFailure: true}
		equal(x, "the revision", put("none", 7, get, false, ""), 1)
		equal(x, "the revision", put("one", 0, kubernetes.PutOptions{LeaseID: 1}, true, ""), 2)
		equal(x, "the lease", x.get("/a").Lease, 1)
		equal(x, "the revision", put("no", 0, get, false, "one"), 2)
		equal(x, "the revision", put("no", 0, kubernetes.PutOptions{}, false, ""), 2)
		equal(x, "the revision", put("two", 2, get, true, ""), 3)
		equal(x, "the lease", x.get("/a").Lease, 0)
		equal(x, "the revision", put("no", 2, get, false, "two"), 3)

		equal(x, "the revision", remove("/a", 2, kubernetes.DeleteOptions{GetOnFailure: true}, false, "two"), 3)
		equal(x, "the revision", remove("/a", 2, kubernetes.DeleteOptions{}, false, ""), 3)
		equal(x, "the revision", remove("/b", 2, kubernetes.DeleteOptions{GetOnFailure: true}, false, ""), 3)
		equal(x, "the revision", remove("/a", 3, kubernetes.DeleteOptions{GetOnFailure: true}, true, ""), 4)
		if x.get("/a") != nil {
			x.Error("a deleted key is there")
		}
		_, err := k.OptimisticPut(x.ctx, "/a", nil, 0, kubernetes.PutOptions{LeaseID: 404})
		x.refused("a lease that is not there", err, rpctypes.ErrLeaseNotFound)
	}},

	{name: "many who update one object lose nothing", run: func(x *exam) {
		const each, clients = 10, 4
		var all sync.WaitGroup
		for range clients {
			k := x.kube()
			all.Go(func() {
				for n := 0; n < each; {
					var value int
					var expected int64
					r, err := k.Get(x.ctx, "/counter", kubernetes.GetOptions{})
					if err == nil && r.KV != nil {
						expected = r.KV.ModRevision
						value, err = strconv.Atoi(string(r.KV.Value))
					}
					if err != nil {
						x.Errorf("get: %v", err)
						return
					}
					put, err := k.OptimisticPut(x.ctx, "/counter", []byte(strconv.Itoa(value+1)), expected, kubernetes.PutOptions{GetOnFailure: true})
					switch {
					case err != nil:
						x.Errorf("put: %v", err)
						return
					case put.Succeeded:
						n++
					case put.KV == nil || put.KV.ModRevision <= expected:
						x.Errorf("a put over revision %d fails for %v", expected, put.KV)
					}
				}
			})
		}
		all.Wait()
		equal(x, "the counter", string(x.get("/counter").Value), strconv.Itoa(each*clients))
		equal(x, "its version", x.get("/counter").Version, each*clients)
	}},
}
