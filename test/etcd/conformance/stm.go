package conformance

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

var isolations = map[string]concurrency.Isolation{
	"serializable snapshot": concurrency.SerializableSnapshot,
	"serializable":          concurrency.Serializable,
	"repeatable reads":      concurrency.RepeatableReads,
	"read committed":        concurrency.ReadCommitted,
}

var stmCases = []testCase{
	{name: "each isolation level retries for what it promises, and no more", run: func(x *exam) {
		c := x.client()
		for _, want := range []struct {
			level              string
			read, written, new int    // attempts when another writes a key that was read, is written, is neither
			second             string // what the first attempt reads of a key that changed since its first read
		}{
			{"serializable snapshot", 2, 2, 1, "old"},
			{"serializable", 2, 1, 1, "old"},
			{"repeatable reads", 2, 1, 1, "new"},
			{"read committed", 1, 1, 1, "new"},
		} {
			level := concurrency.WithIsolation(isolations[want.level])
			// attempts counts them when another writes a key during the first one.
			attempts := func(key string) (n int) {
				x.Helper()
				x.set(c, "read", "old")
				r, err := concurrency.NewSTM(c, func(s concurrency.STM) error {
					n++
					s.Get("read")
					if n == 1 {
						x.set(c, key, "new")
					}
					s.Put("written", strconv.Itoa(n))
					return nil
				}, level)
				x.done(want.level, err)
				equal(x, "succeeded", r.Succeeded, true)
				equal(x, want.level+": written", x.value(c, "written"), strconv.Itoa(n))
				return n
			}
			equal(x, want.level+": attempts, a read key is written", attempts("read"), want.read)
			equal(x, want.level+": attempts, a written key is written", attempts("written"), want.written)
			equal(x, want.level+": attempts, another key is written", attempts("another"), want.new)

			x.set(c, "a", "old")
			x.set(c, "b", "old")
			first := true
			_, err := concurrency.NewSTM(c, func(s concurrency.STM) error {
				s.Get("a")
				if first {
					first = false
					rev := x.set(c, "b", "new")
					equal(x, want.level+": the second key", s.Get("b"), want.second)
					equal(x, want.level+": the second key again", s.Get("b"), want.second)
					equal(x, want.level+": it is of the revision", s.Rev("b") == rev, want.second == "new")
				}
				return nil
			}, level)
			x.done(want.level, err)
		}
	}},

	{name: "no money is lost between accounts at any level that guards what was read", run: func(x *exam) {
		const accounts, times, start = 4, 10, 100
		clients := x.clients(3)
		for _, level := range []string{"serializable snapshot", "serializable", "repeatable reads"} {
			account := func(i int) string { return fmt.Sprintf("%s/%d", level, i%accounts) }
			for i := range accounts {
				x.set(clients[0], account(i), strconv.Itoa(start))
			}
			var all sync.WaitGroup
			for who, c := range clients {
				x.value(c, account(0)) // its process knows the accounts now, also for serializable reads
				all.Go(func() {
					for i := range times {
						from, to := account(who+i), account(who+2*i+1)
						if from == to {
							continue
						}
						options := []concurrency.STMOption{concurrency.WithIsolation(isolations[level]), concurrency.WithAbortContext(x.ctx)}
						if i%2 == 0 {
							options = append(options, concurrency.WithPrefetch(from, to))
						}
						_, err := concurrency.NewSTM(c, func(s concurrency.STM) error {
							a, err := strconv.Atoi(s.Get(from))
							b, err2 := strconv.Atoi(s.Get(to))
							s.Put(from, strconv.Itoa(a-1))
							s.Put(to, strconv.Itoa(b+1))
							return errors.Join(err, err2)
						}, options...)
						if err != nil {
							x.Errorf("%s: %v", level, err)
						}
					}
				})
			}
			all.Wait()
			sum := 0
			for i := range accounts {
				n, err := strconv.Atoi(x.value(clients[0], account(i)))
				x.done("read an account", err)
				sum += n
			}
			equal(x, level+": all money", sum, accounts*start)
		}
	}},

	{name: "what a transaction puts and deletes it sees, and the others at its end", run: func(x *exam) {
		c := x.client()
		x.grant(1, 100)
		x.set(c, "gone", "old")
		for level, isolation := range isolations {
			x.set(c, "gone", "old")
			r, err := concurrency.NewSTM(c, func(s concurrency.STM) error {
				equal(x, level+": a key that is there", s.Get("gone"), "old")
				s.Del("gone")
				equal(x, level+": a deleted key", s.Get("gone"), "")
				s.Put("leased", level, clientv3.WithLease(1))
				equal(x, level+": its own put", s.Get("leased"), level)
				equal(x, level+": a key that is not there", s.Get("none"), "")
				equal(x, level+": its revision", s.Rev("none"), 0)
				equal(x, level+": the first of several", s.Get("leased", "gone"), level)
				if x.value(c, "gone") != "old" {
					x.Error("others see an unfinished transaction")
				}
				return nil
			}, concurrency.WithIsolation(isolation))
			x.done(level, err)
			equal(x, level+": the lease", x.get("leased").Lease, 1)
			equal(x, level+": the revision", x.get("leased").ModRevision, r.Header.Revision)
			if x.get("gone") != nil {
				x.Errorf("%s: a deleted key is there", level)
			}
		}
	}},

	{name: "a transaction that gives up writes nothing", run: func(x *exam) {
		c := x.client()
		revision := x.set(c, "k", "old")
		mine := errors.New("no")
		_, err := concurrency.NewSTM(c, func(s concurrency.STM) error { s.Put("k", "new"); return mine })
		x.refused("its own error", err, mine)
		ctx, cancel := context.WithCancel(x.ctx)
		_, err = concurrency.NewSTM(c, func(s concurrency.STM) error { s.Put("k", "new"); cancel(); return nil }, concurrency.WithAbortContext(ctx))
		x.refused("its context", err, context.Canceled)
		_, err = concurrency.NewSTM(c, func(s concurrency.STM) error { s.Put("", "new"); return nil })
		x.refused("an empty key", err, rpctypes.ErrEmptyKey)
		_, err = concurrency.NewSTM(c, func(s concurrency.STM) error { s.Put("k", "new", clientv3.WithLease(404)); return nil })
		x.refused("a lease that is not there", err, rpctypes.ErrLeaseNotFound)
		equal(x, "the revision", x.revision(), revision)
	}},

	{name: "a snapshot that is compacted meanwhile ends the transaction", run: func(x *exam) {
		c := x.client()
		for level, want := range map[string]error{
			"serializable snapshot": rpctypes.ErrCompacted, "serializable": rpctypes.ErrCompacted, "repeatable reads": nil, "read committed": nil,
		} {
			x.set(c, "a", "")
			_, err := concurrency.NewSTM(c, func(s concurrency.STM) error {
				s.Get("a")
				rev := x.set(c, "c", "")
				if _, err := c.Compact(x.ctx, rev); err != nil {
					return err
				}
				s.Get("b")
				return nil
			}, concurrency.WithIsolation(isolations[level]))
			x.refused(level, err, want)
		}
	}},
}
