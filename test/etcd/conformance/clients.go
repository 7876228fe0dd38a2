package conformance

import (
	"context"
	"errors"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// clients are etcd's own clients, each on another process where several serve the store.
func (x *exam) clients(n int) []*clientv3.Client {
	x.Helper()
	all := make([]*clientv3.Client, n)
	for i := range all {
		server := x.Server
		if len(x.Processes) > 0 {
			server = x.Processes[i%len(x.Processes)]
		}
		all[i] = server.Client(x.T)
	}
	return all
}

func (x *exam) client() *clientv3.Client {
	x.Helper()
	return x.clients(1)[0]
}

// session is kept alive until its client is closed.
func (x *exam) session(c *clientv3.Client, options ...concurrency.SessionOption) *concurrency.Session {
	x.Helper()
	s, err := concurrency.NewSession(c, options...)
	x.done("begin a session", err)
	return s
}

// done ends the case unless what was tried is done.
func (x *exam) done(what string, err error) {
	x.Helper()
	if err != nil {
		x.Fatalf("%s: %v", what, err)
	}
}

// check is done for goroutines, which cannot end the case.
func (x *exam) check(err error) {
	x.Helper()
	if err != nil {
		x.Error(err)
	}
}

// refused demands the error want.
func (x *exam) refused(what string, got, want error) {
	x.Helper()
	if !errors.Is(got, want) {
		x.Errorf("%s: error %v, want %v", what, got, want)
	}
}

// begin does something in the background.
func begin(do func() error) <-chan error {
	done := make(chan error, 1)
	go func() { done <- do() }()
	return done
}

// next is what comes on a channel within 10 s; that it is closed ends the case.
func next[T any](x *exam, what string, from <-chan T) T {
	x.Helper()
	select {
	case v, ok := <-from:
		if !ok {
			x.Fatalf("%s: the channel is closed", what)
		}
		return v
	case <-time.After(10 * time.Second):
		x.Fatalf("%s: nothing within 10 s", what)
	}
	panic("unreachable")
}

// closes waits until a channel is closed.
func closes[T any](x *exam, what string, c <-chan T) {
	x.Helper()
	for limit := time.After(10 * time.Second); ; {
		select {
		case _, ok := <-c:
			if !ok {
				return
			}
		case <-limit:
			x.Fatalf("%s: not closed after 10 s", what)
		}
	}
}

// blocked fails if something comes on a channel.
func blocked[T any](x *exam, what string, c <-chan T) {
	x.Helper()
	select {
	case v := <-c:
		x.Fatalf("%s is over with %v, and should wait", what, v)
	case <-time.After(50 * time.Millisecond):
	}
}

// waiting returns once n keys begin with prefix.
func (x *exam) waiting(c *clientv3.Client, prefix string, n int64) {
	x.Helper()
	x.until(prefix+" has so many keys", func() bool {
		r, err := c.Get(x.ctx, prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
		x.done("count "+prefix, err)
		return r.Count == n
	})
}

// noticed is a Watcher that tells when it is asked for a watch.
type noticed struct {
	clientv3.Watcher
	asked chan struct{}
}

// Watch implements clientv3.Watcher.
func (n *noticed) Watch(ctx context.Context, key string, options ...clientv3.OpOption) clientv3.WatchChan {
	select {
	case n.asked <- struct{}{}:
	default: // told already
	}
	return n.Watcher.Watch(ctx, key, options...)
}

// watches tells when a client begins to watch: who enters a queue does so once he knows his place.
func watches(c *clientv3.Client) <-chan struct{} {
	n := &noticed{c.Watcher, make(chan struct{}, 1)}
	c.Watcher = n
	return n.asked
}

// until asks again and again, for 10 s.
func (x *exam) until(what string, holds func() bool) {
	x.Helper()
	for deadline := time.Now().Add(10 * time.Second); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			x.Fatalf("not after 10 s: %s", what)
		}
	}
}

// pairs are the keys and values of a store or a part of it: "a=1 b=2".
func pairs(r *clientv3.GetResponse) string {
	var all []string
	for _, kv := range r.Kvs {
		all = append(all, string(kv.Key)+"="+string(kv.Value))
	}
	return strings.Join(all, " ")
}

// value is that of a key, "" when there is none.
func (x *exam) value(kv clientv3.KV, key string, options ...clientv3.OpOption) string {
	x.Helper()
	r, err := kv.Get(x.ctx, key, options...)
	x.done("get "+key, err)
	if len(r.Kvs) == 0 {
		return ""
	}
	return string(r.Kvs[0].Value)
}

// set puts a key.
func (x *exam) set(kv clientv3.KV, key, value string, options ...clientv3.OpOption) int64 {
	x.Helper()
	r, err := kv.Put(x.ctx, key, value, options...)
	x.done("put "+key, err)
	return r.Header.Revision
}
