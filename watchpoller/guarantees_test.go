package watchpoller

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

func envSeed(t *testing.T) uint64 {
	s := os.Getenv("QUIRE_SEED")
	if s == "" {
		return 0
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatalf("QUIRE_SEED=%q is not a number", s)
	}
	return n
}

// within runs f against a fresh poller, in a bubble where time stands still until everything is at rest.
func within(t *testing.T, o Options, f func(t *testing.T, src *memSource, p *Poller)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		src := newMemSource()
		p := Start(src, o)
		defer p.Close()
		f(t, src, p)
	})
}

func events(responses []*pb.WatchResponse) (out []*mvccpb.Event) {
	for _, r := range responses {
		out = append(out, r.Events...)
	}
	return out
}

var allKeys = &pb.WatchCreateRequest{Key: []byte{0}, RangeEnd: []byte{0}, StartRevision: 1}

// TestOrdered: events are ordered by revision. An event will never appear on a watch if it precedes an event in time
// that has already been posted.
func TestOrdered(t *testing.T) {
	within(t, Options{StreamBytes: 3000}, func(t *testing.T, src *memSource, p *Poller) {
		c := connect(p, nil)
		defer c.stop()
		for i := range 100 {
			src.put("k", strconv.Itoa(i))
		}
		c.create(allKeys)
		for i := range 3000 { // while it catches up, and after
			src.put("k", strconv.Itoa(i))
		}
		synctest.Wait()
		last := int64(0)
		for _, e := range events(c.taken()) {
			if e.Kv.ModRevision < last {
				t.Fatalf("broke Ordered - an event will never appear on a watch if it precedes an event in time that has already been posted: %d after %d", e.Kv.ModRevision, last)
			}
			last = e.Kv.ModRevision
		}
		if last != src.Revision() {
			t.Fatalf("the last event is of %d, want %d", last, src.Revision())
		}
	})
}

// TestUnique: an event will never appear on a watch twice.
func TestUnique(t *testing.T) {
	within(t, Options{StreamBytes: 3000}, func(t *testing.T, src *memSource, p *Poller) {
		c := connect(p, nil)
		defer c.stop()
		for range 10 { // ten hand-overs from history to the present, under writes
			c.create(allKeys)
			for i := range 200 {
				src.txn(op{key: "a", value: strconv.Itoa(i)}, op{key: "b", value: strconv.Itoa(i)})
			}
			synctest.Wait()
		}
		type seen struct {
			watch, rev int64
			key        string
		}
		have := make(map[seen]bool)
		for _, r := range c.taken() {
			for _, e := range r.Events {
				s := seen{r.WatchId, e.Kv.ModRevision, string(e.Kv.Key)}
				if have[s] {
					t.Fatalf("broke Unique - an event will never appear on a watch twice: %+v", s)
				}
				have[s] = true
			}
		}
		if want := 10 * 2 * 2000; len(have) != want {
			t.Fatalf("%d events, want %d", len(have), want)
		}
	})
}

// TestReliable: a sequence of events will never drop any subsequence of events within the available history window.
func TestReliable(t *testing.T) {
	within(t, Options{StreamBytes: 2000}, func(t *testing.T, src *memSource, p *Poller) {
		c := connect(p, nil)
		defer c.stop()
		c.create(allKeys)
		stall := make(chan struct{})
		c.mu.Lock()
		c.stall = stall
		c.mu.Unlock()
		for i := range 5000 { // far more than the queue takes
			src.put("k", strconv.Itoa(i))
		}
		synctest.Wait()
		c.mu.Lock()
		c.stall = nil
		c.mu.Unlock()
		close(stall)
		synctest.Wait()
		next := int64(2)
		for _, e := range events(c.taken()) {
			if e.Kv.ModRevision != next {
				t.Fatalf("broke Reliable - a sequence of events will never drop any subsequence of events within the available history window: %d instead of %d", e.Kv.ModRevision, next)
			}
			next++
		}
		if next != src.Revision()+1 {
			t.Fatalf("the events end before %d, want %d", next, src.Revision()+1)
		}
	})
}

// TestAtomic: a list of events is guaranteed to encompass complete revisions. Updates in the same revision over
// multiple keys will not be split over several lists of events.
func TestAtomic(t *testing.T) {
	within(t, Options{StreamBytes: 1000}, func(t *testing.T, src *memSource, p *Poller) {
		c := connect(p, nil)
		defer c.stop()
		write := func() {
			for i := range 20 { // each revision is larger than the queue
				var ops []op
				for k := range 50 {
					ops = append(ops, op{key: fmt.Sprint("k", k), value: strconv.Itoa(i)})
				}
				src.txn(ops...)
			}
		}
		write()
		c.create(allKeys)
		synctest.Wait()
		write()
		synctest.Wait()
		n := 0
		for _, r := range c.taken() {
			per := make(map[int64]int)
			for _, e := range r.Events {
				per[e.Kv.ModRevision]++
			}
			for rev, got := range per {
				if got != 50 {
					t.Fatalf("broke Atomic - updates in the same revision over multiple keys will not be split over several lists of events: %d of 50 events of revision %d", got, rev)
				}
				n++
			}
		}
		if n != 40 {
			t.Fatalf("%d revisions, want 40", n)
		}
	})
}

// TestResumable: a broken watch can be resumed by establishing a new watch starting after the last revision received
// in a watch event before the break, so long as the revision is in the history window.
func TestResumable(t *testing.T) {
	within(t, Options{StreamBytes: 2000}, func(t *testing.T, src *memSource, p *Poller) {
		var have []int64
		for range 20 {
			c := connect(p, nil)
			r := &pb.WatchCreateRequest{Key: []byte("k"), StartRevision: 2}
			if len(have) > 0 {
				r.StartRevision = have[len(have)-1] + 1
			}
			c.create(r)
			for i := range 100 {
				src.put("k", strconv.Itoa(i))
			}
			if err := c.stop(); err == nil { // breaks anywhere in the middle
				t.Fatal("a broken stream returned no error")
			}
			for _, e := range events(c.taken()) {
				have = append(have, e.Kv.ModRevision)
			}
		}
		c := connect(p, nil)
		defer c.stop()
		start := int64(2)
		if len(have) > 0 {
			start = have[len(have)-1] + 1
		}
		c.create(&pb.WatchCreateRequest{Key: []byte("k"), StartRevision: start})
		synctest.Wait()
		for _, e := range events(c.taken()) {
			have = append(have, e.Kv.ModRevision)
		}
		for i, rev := range have {
			if rev != int64(i+2) {
				t.Fatalf("broke Resumable - a broken watch can be resumed by establishing a new watch starting after the last revision received in a watch event before the break: event %d is of %d", i, rev)
			}
		}
		if len(have) != 2000 {
			t.Fatalf("%d events, want 2000", len(have))
		}
	})
}

// TestBookmarkable: progress notification events guarantee that all events up to a revision have been already
// delivered.
func TestBookmarkable(t *testing.T) {
	within(t, Options{StreamBytes: 2000}, func(t *testing.T, src *memSource, p *Poller) {
		c := connect(p, nil)
		defer c.stop()
		c.create(allKeys)
		c.create(allKeys)
		for i := range 200 {
			rev := src.put("k", strconv.Itoa(i))
			c.progress()
			if i%10 == 0 {
				c.create(&pb.WatchCreateRequest{Key: []byte("k"), StartRevision: rev - int64(i/2)})
			}
		}
		synctest.Wait()
		c.progress()
		synctest.Wait()
		seen := make(map[int64]int64) // by watch: the revision of its last event
		marks := int64(0)
		for _, r := range c.taken() {
			switch {
			case r.Created:
				seen[r.WatchId] = 0
			case len(r.Events) > 0:
				seen[r.WatchId] = r.Events[len(r.Events)-1].Kv.ModRevision
			case r.WatchId == allWatchers:
				marks = r.Header.Revision
				for id, rev := range seen {
					if rev != marks { // every revision has an event here
						t.Fatalf("broke Bookmarkable - progress notification events guarantee that all events up to a revision have been already delivered: %d is marked, watch %d is at %d", marks, id, rev)
					}
				}
			}
		}
		if marks != src.Revision() {
			t.Fatalf("the last mark is %d, want %d", marks, src.Revision())
		}
	})
}

// TestNoGoroutineIsLeft after Close, and Close ends what runs.
func TestNoGoroutineIsLeft(t *testing.T) {
	before := runtime.NumGoroutine()
	src := newMemSource()
	p := Start(src, Options{PollInterval: time.Millisecond})
	var clients []*client
	for range 20 {
		c := connect(p, nil)
		for range 20 {
			c.create(allKeys)
		}
		clients = append(clients, c)
	}
	src.put("k", "v")
	if err := clients[0].stop(); err == nil {
		t.Error("Serve returned no error for a context that ended")
	}
	clients[1].mu.Lock()
	clients[1].fail = errBroken
	clients[1].mu.Unlock()
	clients[1].progress()
	if err := <-clients[1].result; err != errBroken {
		t.Errorf("Serve returned %v when send failed, want that error", err)
	}
	p.Close()
	for _, c := range clients[2:] {
		if err := <-c.result; err != ErrClosed {
			t.Errorf("Serve returned %v, want ErrClosed", err)
		}
	}
	if err := p.Serve(t.Context(), nil, nil); err != ErrClosed {
		t.Errorf("Serve on a closed poller returned %v, want ErrClosed", err)
	}
	// The clients' own goroutines end a moment after they have handed over their result.
	deadline := time.Now().Add(5 * time.Second)
	for runtime.NumGoroutine() > before {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines are left, there were %d:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
		}
		time.Sleep(time.Millisecond)
	}
	if len(src.subs) != 0 {
		t.Error("the poller is still subscribed")
	}
	if n := len(p.mu.lagging) + p.mu.synced.size + len(p.mu.streams) + len(p.mu.asking); n != 0 {
		t.Errorf("the closed poller still holds %d watchers and streams", n)
	}
}

// TestOneReadServesManyLaggingWatchers: a thousand watchers from the oldest revision do not read history a thousand
// times.
func TestOneReadServesManyLaggingWatchers(t *testing.T) {
	const watchers, rows = 1000, 2000
	within(t, Options{}, func(t *testing.T, src *memSource, p *Poller) {
		for i := range rows {
			src.put(fmt.Sprint("k", i%watchers), "v")
		}
		src.hold()
		var got atomic.Int64
		var clients []*client
		for i := range watchers {
			if i%10 == 0 {
				clients = append(clients, connect(p, func(r *pb.WatchResponse) { got.Add(int64(len(r.Events))) }))
			}
			clients[len(clients)-1].create(&pb.WatchCreateRequest{Key: fmt.Append(nil, "k", i), StartRevision: 1})
		}
		synctest.Wait()
		src.release()
		synctest.Wait()
		if got.Load() != rows {
			t.Errorf("%d events were sent, want %d", got.Load(), rows)
		}
		if src.reads > 2*rows/minScanEvents {
			t.Errorf("history was read %d times for %d watchers", src.reads, watchers)
		}
		for _, c := range clients {
			c.stop()
		}
	})
}

// TestABoundIsABound: what waits for a client that does not read stays within the bound and a revision per reader,
// whatever is written and however many watchers it has; and its unanswered requests are not read on.
func TestABoundIsABound(t *testing.T) {
	const bound = 20_000
	within(t, Options{StreamBytes: bound}, func(t *testing.T, src *memSource, p *Poller) {
		c := connect(p, nil)
		for range 50 {
			c.create(allKeys)
		}
		synctest.Wait()
		c.mu.Lock()
		c.stall = make(chan struct{})
		c.mu.Unlock()
		for i := range 2000 {
			src.put("k", strings.Repeat("x", i%100))
		}
		synctest.Wait()
		p.mu.Lock()
		for s := range p.mu.streams {
			one := int64(50 * (200 + eventOverhead))
			if n := s.bytes.Load(); n > bound+bound/2+2*one {
				t.Errorf("%d bytes wait, the bound is %d", n, bound)
			}
		}
		p.mu.Unlock()
		accepted := 0
		for range 10 * maxControls {
			select {
			case c.requests <- &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("z")}}}:
				accepted++
			case <-time.After(time.Second):
			}
		}
		if accepted > maxControls+1 {
			t.Errorf("%d requests were taken from a client that reads no answers", accepted)
		}
		c.stop()
	})
}

// TestIdleReadsNothing: without watchers, or without writes, the source is left alone.
func TestIdleReadsNothing(t *testing.T) {
	within(t, Options{}, func(t *testing.T, src *memSource, p *Poller) {
		for range 100 {
			src.put("k", "v")
		}
		synctest.Wait()
		if src.reads != 0 {
			t.Errorf("rows were read %d times without any watcher", src.reads)
		}
		c := connect(p, nil)
		defer c.stop()
		c.create(&pb.WatchCreateRequest{Key: []byte("k")})
		synctest.Wait()
		time.Sleep(time.Hour)
		if src.reads != 0 {
			t.Errorf("rows were read %d times without any write", src.reads)
		}
	})
}

// TestPollIntervalFindsWhatNobodyTold: with a tick a lost hint costs a tick.
func TestPollIntervalFindsWhatNobodyTold(t *testing.T) {
	within(t, Options{PollInterval: time.Second}, func(t *testing.T, src *memSource, p *Poller) {
		c := connect(p, nil)
		defer c.stop()
		c.create(&pb.WatchCreateRequest{Key: []byte("k")})
		synctest.Wait()
		src.mu.Lock()
		subs := src.subs
		src.subs = nil
		src.mu.Unlock()
		src.put("k", "v")
		synctest.Wait()
		if n := len(events(c.taken())); n != 0 {
			t.Fatalf("%d events without a hint or a tick", n)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if n := len(events(c.taken())); n != 1 {
			t.Errorf("%d events after a tick, want 1", n)
		}
		src.mu.Lock()
		src.subs = subs
		src.mu.Unlock()
	})
}

// TestWhoeverCommitsQueuesTheEvents: few new events in memory are queued by the hint itself; more, or events that are not
// in memory any more, are left to follow. Nothing is lost or doubled in any mixture.
func TestWhoeverCommitsQueuesTheEvents(t *testing.T) {
	within(t, Options{}, func(t *testing.T, src *memSource, p *Poller) {
		c := connect(p, nil)
		defer c.stop()
		c.create(&pb.WatchCreateRequest{Key: []byte("k")})
		synctest.Wait()
		src.mu.Lock()
		subs := src.subs
		src.subs = nil // so that follow is not told
		src.mu.Unlock()
		defer func() {
			src.mu.Lock()
			src.subs = subs
			src.mu.Unlock()
		}()
		delivered := func(what string, want int) {
			t.Helper()
			synctest.Wait()
			if n := len(events(c.taken())); n != want {
				t.Fatalf("%s: %d events, want %d", what, n, want)
			}
		}
		if !p.direct(src.put("k", "1")) {
			t.Fatal("one event in memory was left to follow")
		}
		delivered("directly", 1)
		if p.direct(src.Revision()) {
			t.Error("there was nothing to do, and it was done")
		}
		delivered("again", 0)
		src.hold() // storage does not answer, and nothing is in memory
		if p.direct(src.put("k", "2")) {
			t.Error("events that are not in memory were queued")
		}
		src.release()
		for range directWork {
			src.put("k", "3")
		}
		if p.direct(src.Revision()) {
			t.Error("more than directWork was done while a writer waited")
		}
		p.told(src.Revision())
		delivered("by follow", 1+directWork)
	})
}
