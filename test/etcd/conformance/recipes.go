package conformance

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/client/v3/concurrency"
	recipe "go.etcd.io/etcd/client/v3/experimental/recipes"
)

// taken is what somebody has got from a queue.
type taken struct {
	value string
	err   error
}

func take(dequeue func() (string, error)) <-chan taken {
	got := make(chan taken, 1)
	go func() {
		value, err := dequeue()
		got <- taken{value, err}
	}()
	return got
}

// recipeCases are those of etcd's client/v3/experimental/recipes.
var recipeCases = []testCase{
	{name: "a barrier holds all until it is released", run: func(x *exam) {
		clients := x.clients(3)
		b := recipe.NewBarrier(clients[0], "barrier")
		x.done("wait where there is none", b.Wait())
		x.done("hold", b.Hold())
		x.refused("hold again", recipe.NewBarrier(clients[1], "barrier").Hold(), recipe.ErrKeyExists)
		var waits []<-chan error
		for _, c := range clients {
			waits = append(waits, begin(recipe.NewBarrier(c, "barrier").Wait))
		}
		for _, w := range waits {
			blocked(x, "who waits", w)
		}
		x.done("release", b.Release())
		for _, w := range waits {
			x.done("wait", next(x, "who waits", w))
		}
		x.done("hold anew", b.Hold())
	}},

	{name: "a double barrier lets so many in together, and out together", run: func(x *exam) {
		const n = 3
		clients := x.clients(n + 1)
		var barriers []*recipe.DoubleBarrier
		for _, c := range clients {
			barriers = append(barriers, recipe.NewDoubleBarrier(x.session(c), "double", n))
		}
		var enters []<-chan error
		for i, b := range barriers[:n-1] {
			enters = append(enters, begin(b.Enter))
			x.waiting(clients[0], "double/waiters", int64(i+1))
		}
		for _, e := range enters {
			blocked(x, "who enters", e)
		}
		x.done("enter, the last", barriers[n-1].Enter())
		for _, e := range enters {
			x.done("enter", next(x, "who enters", e))
		}
		x.refused("one too many", barriers[n].Enter(), recipe.ErrTooManyClients)

		var leaves []<-chan error
		for _, b := range barriers[:n-1] {
			leaves = append(leaves, begin(b.Leave))
		}
		for _, l := range leaves {
			blocked(x, "who leaves", l)
		}
		x.done("leave, the last", barriers[n-1].Leave())
		for _, l := range leaves {
			x.done("leave", next(x, "who leaves", l))
		}
		x.waiting(clients[0], "double/", 0)
	}},

	{name: "who crashes inside a double barrier does not keep the others there", run: func(x *exam) {
		clients := x.clients(2)
		crashing := x.session(clients[0])
		first, second := recipe.NewDoubleBarrier(crashing, "double", 2), recipe.NewDoubleBarrier(x.session(clients[1]), "double", 2)
		enters := begin(first.Enter)
		x.waiting(clients[1], "double/waiters", 1)
		x.done("enter", second.Enter())
		x.done("enter", next(x, "who enters", enters))
		leaves := begin(second.Leave)
		blocked(x, "who leaves", leaves)
		x.done("end of the session", crashing.Close())
		x.done("leave", next(x, "who leaves", leaves))
	}},

	{name: "a queue gives each element once, the oldest first", run: func(x *exam) {
		clients := x.clients(3)
		q := recipe.NewQueue(clients[0], "queue")
		for i := range 5 {
			x.done("enqueue", q.Enqueue(fmt.Sprint(i)))
		}
		for i := range 5 {
			value, err := recipe.NewQueue(clients[i%len(clients)], "queue").Dequeue()
			x.done("dequeue", err)
			equal(x, "the element", value, fmt.Sprint(i))
		}
		waits := take(q.Dequeue)
		blocked(x, "a dequeue of nothing", waits)
		x.done("enqueue", recipe.NewQueue(clients[1], "queue").Enqueue("late"))
		equal(x, "the element", next(x, "the dequeue", waits), taken{value: "late"})

		const each = 10
		var all sync.WaitGroup
		var mu sync.Mutex
		var got []string
		for i, c := range clients {
			q := recipe.NewQueue(c, "queue")
			all.Go(func() {
				for n := range each {
					if err := q.Enqueue(fmt.Sprintf("%d/%d", i, n)); err != nil {
						x.Errorf("enqueue: %v", err)
					}
				}
			})
			all.Go(func() {
				for range each {
					value, err := q.Dequeue()
					if err != nil {
						x.Errorf("dequeue: %v", err)
					}
					mu.Lock()
					got = append(got, value)
					mu.Unlock()
				}
			})
		}
		all.Wait()
		slices.Sort(got)
		equal(x, "elements, each once", len(slices.Compact(got)), each*len(clients))
		x.waiting(clients[0], "queue", 0)
	}},

	{name: "a priority queue gives the lowest number first", run: func(x *exam) {
		clients := x.clients(2)
		q := recipe.NewPriorityQueue(clients[0], "queue")
		for i, priority := range []uint16{7, 3, 65535, 3, 0} {
			x.done("enqueue", q.Enqueue(fmt.Sprintf("%d of %d", i, priority), priority))
		}
		for _, want := range []string{"4 of 0", "1 of 3", "3 of 3", "0 of 7", "2 of 65535"} {
			value, err := recipe.NewPriorityQueue(clients[1], "queue").Dequeue()
			x.done("dequeue", err)
			equal(x, "the element", value, want)
		}
		waits := take(q.Dequeue)
		blocked(x, "a dequeue of nothing", waits)
		x.done("enqueue", recipe.NewPriorityQueue(clients[1], "queue").Enqueue("late", 9))
		equal(x, "the element", next(x, "the dequeue", waits), taken{value: "late"})
	}},

	{name: "readers share a lock, a writer has it alone", run: func(x *exam) {
		clients := x.clients(3)
		var locks []*recipe.RWMutex
		var sessions []*concurrency.Session
		for _, c := range clients {
			s := x.session(c)
			sessions = append(sessions, s)
			locks = append(locks, recipe.NewRWMutex(s, "rw"))
		}
		x.done("read", locks[0].RLock())
		x.done("read beside", locks[1].RLock())
		writer := begin(locks[2].Lock)
		x.waiting(clients[0], "rw/write", 1)
		blocked(x, "the writer", writer)
		late := recipe.NewRWMutex(sessions[0], "rw")
		reader := begin(late.RLock) // comes after the writer
		x.waiting(clients[0], "rw/read", 3)
		x.done("end of reading", locks[0].RUnlock())
		blocked(x, "the writer", writer)
		x.done("end of the other's session", sessions[1].Close())
		x.done("write", next(x, "the writer", writer))
		blocked(x, "the late reader", reader)
		x.done("end of writing", locks[2].Unlock())
		x.done("read", next(x, "the late reader", reader))
		x.done("end of reading", late.RUnlock())

		var all sync.WaitGroup
		var readers, writers atomic.Int32
		for i, s := range sessions {
			if i == 1 {
				continue // its session is over
			}
			all.Go(func() {
				for n := range 6 {
					l := recipe.NewRWMutex(s, "rw")
					if n%3 == i%3 {
						x.check(l.Lock())
						if w, r := writers.Add(1), readers.Load(); w != 1 || r != 0 {
							x.Errorf("%d writers and %d readers are in", w, r)
						}
						writers.Add(-1)
						x.check(l.Unlock())
						continue
					}
					x.check(l.RLock())
					readers.Add(1)
					if w := writers.Load(); w != 0 {
						x.Errorf("a reader is in with %d writers", w)
					}
					readers.Add(-1)
					x.check(l.RUnlock())
				}
			})
		}
		all.Wait()
		x.waiting(clients[0], "rw/", 0)
	}},

	{name: "events are waited for in the order asked", run: func(x *exam) {
		c := x.client()
		rev := x.put("k/a", "").Header.Revision
		x.delete("k/a")
		x.put("k/b", "last")
		e, err := recipe.WaitPrefixEvents(c, "k/", rev, []mvccpb.Event_EventType{mvccpb.Event_DELETE, mvccpb.Event_PUT})
		x.done("wait", err)
		equal(x, "the event", string(e.Kv.Value), "last")
		e, err = recipe.WaitEvents(c, "k/a", rev, []mvccpb.Event_EventType{mvccpb.Event_DELETE})
		x.done("wait", err)
		equal(x, "its revision", e.Kv.ModRevision, rev+1)
	}},
}
