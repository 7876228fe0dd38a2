package watchpoller

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
)

// A modelWatch is what the naive model knows of one watch: what it asked for, and what it was sent.
type modelWatch struct {
	req      *pb.WatchCreateRequest
	rng      keyRange
	from     int64 // the first revision it must get
	created  bool
	canceled bool
	compact  int64
	got      []*mvccpb.Event
	fragment bool  // the last response is to be continued
	last     int64 // revision of the last event before this response
}

// want says whether the model expects e on the watch.
func (w *modelWatch) want(e *mvccpb.Event) bool {
	if e.Kv.ModRevision < w.from || !w.rng.contains(e.Kv.Key) {
		return false
	}
	for _, f := range w.req.Filters {
		if f == pb.WatchCreateRequest_NOPUT && e.Type == mvccpb.PUT || f == pb.WatchCreateRequest_NODELETE && e.Type == mvccpb.DELETE {
			return false
		}
	}
	return true
}

// A modelClient checks each response as it comes.
type modelClient struct {
	*client
	t    *testing.T
	name string

	mu      sync.Mutex
	watches map[int64]*modelWatch // by id
	all     []*modelWatch
	marks   []mark
	progs   int
}

// A mark is a progress notification: up to rev, watch had got its first n events.
type mark struct {
	w   *modelWatch
	rev int64
	n   int
}

func (c *modelClient) see(r *pb.WatchResponse) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r.WatchId == allWatchers {
		if r.Created || r.Canceled || len(r.Events) > 0 {
			c.t.Errorf("%s: unexpected answer on id -1: %v", c.name, describe(r))
		}
		c.progs++
		for _, w := range c.all {
			if w.created && !w.canceled {
				if r.Header.Revision < w.last {
					c.t.Errorf("%s: a mark goes back from %d: %v", c.name, w.last, describe(r))
				}
				c.marks = append(c.marks, mark{w, r.Header.Revision, len(w.got)})
			}
		}
		return
	}
	w := c.watches[r.WatchId]
	switch {
	case w == nil || w.created == r.Created || w.canceled && len(r.Events) > 0:
		c.t.Errorf("%s: unexpected in this state: %v", c.name, describe(r))
	case r.Created:
		w.created = true
		if w.req.StartRevision == 0 {
			w.from = r.Header.Revision + 1
		}
	case r.Canceled:
		w.canceled = true
		w.compact = r.CompactRevision
	case len(r.Events) == 0:
		if r.Header.Revision < w.last {
			c.t.Errorf("%s: a mark goes back from %d: %v", c.name, w.last, describe(r))
		}
		c.marks = append(c.marks, mark{w, r.Header.Revision, len(w.got)})
	default:
		if first := r.Events[0].Kv.ModRevision; first == w.last && !w.fragment {
			c.t.Errorf("%s: broke Atomic: revision %d is split: %v", c.name, first, describe(r))
		}
		w.got = append(w.got, r.Events...)
		w.last = r.Events[len(r.Events)-1].Kv.ModRevision
		w.fragment = r.Fragment
		if r.Header.Revision < w.last {
			c.t.Errorf("%s: the header is older than the events: %v", c.name, describe(r))
		}
		if r.Fragment && !w.req.Fragment {
			c.t.Errorf("%s: a fragment that was not asked for: %v", c.name, describe(r))
		}
	}
}

// TestRandomAgainstModel runs random clients against random writes, with stalls, compactions, cancels and failing
// reads, and compares what every watch was sent with what a scan over all rows says it must be sent.
func TestRandomAgainstModel(t *testing.T) {
	rounds := 20
	if testing.Short() {
		rounds = 5
	}
	seed := uint64(time.Now().UnixNano())
	if s := envSeed(t); s != 0 {
		seed, rounds = s, 1
	}
	for i := range rounds {
		t.Run(fmt.Sprintf("QUIRE_SEED=%d", seed+uint64(i)), func(t *testing.T) { randomRound(t, seed+uint64(i)) })
	}
}

func randomRound(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 2))
	src := newMemSource()
	p := Start(src, Options{
		StreamBytes: 200 + r.IntN(20000), MaxResponseBytes: 100 + r.IntN(3000), ProgressInterval: minProgressInterval,
	})
	defer p.Close()
	var clients []*modelClient
	for i := range 1 + r.IntN(6) {
		c := &modelClient{t: t, name: fmt.Sprint("client ", i), watches: make(map[int64]*modelWatch)}
		c.client = connect(p, c.see)
		clients = append(clients, c)
	}
	key := func() string { return string([]byte{"abc"[r.IntN(3)], "abc"[r.IntN(3)]}[:1+r.IntN(2)]) }
	compacts := r.IntN(2) == 0
	for range 1000 {
		switch n := r.IntN(100); {
		case n < 60:
			var ops []op
			used := make(map[string]bool)
			for range 1 + r.IntN(5) {
				k := key()
				if !used[k] {
					used[k] = true
					ops = append(ops, op{key: k, value: fmt.Sprint(r.IntN(1000)), del: r.IntN(4) == 0})
				}
			}
			src.txn(ops...)
		case n < 66:
			c := clients[r.IntN(len(clients))]
			rng := randomRange(r)
			key, end := rng.request()
			req := &pb.WatchCreateRequest{
				Key: key, RangeEnd: end, WatchId: int64(len(c.all) + 1), PrevKv: r.IntN(3) == 0,
				Fragment: r.IntN(3) == 0, ProgressNotify: r.IntN(3) == 0,
			}
			if r.IntN(2) == 0 {
				req.StartRevision = max(1, r.Int64N(src.Revision()+20))
			}
			for _, f := range []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NOPUT, pb.WatchCreateRequest_NODELETE} {
				if r.IntN(8) == 0 {
					req.Filters = append(req.Filters, f)
				}
			}
			w := &modelWatch{req: req, rng: rng, from: req.StartRevision}
			c.mu.Lock()
			c.watches[req.WatchId] = w
			c.all = append(c.all, w)
			c.mu.Unlock()
			c.client.mu.Lock()
			stalled := c.stall != nil
			c.client.mu.Unlock()
			if stalled {
				go func() { // the poller may rightly not read it before the client goes on
					select {
					case c.requests <- &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: req}}:
					case <-t.Context().Done():
					}
				}()
			} else {
				c.create(req)
			}
		case n < 70:
			c := clients[r.IntN(len(clients))]
			c.client.mu.Lock()
			stalled := c.stall != nil
			c.client.mu.Unlock()
			if !stalled && len(c.all) > 0 {
				c.cancelWatch(int64(1 + r.IntN(len(c.all))))
			}
		case n < 78:
			c := clients[r.IntN(len(clients))]
			c.client.mu.Lock()
			stalled := c.stall != nil
			c.client.mu.Unlock()
			if !stalled {
				c.progress()
			}
		case n < 86:
			c := clients[r.IntN(len(clients))].client
			c.mu.Lock()
			if c.stall == nil {
				c.stall = make(chan struct{})
			} else {
				close(c.stall)
				c.stall = nil
			}
			c.mu.Unlock()
		case n < 87 && compacts:
			src.compactAt(max(1, src.Revision()-r.Int64N(50)))
		case n < 88:
			src.fail(errBroken)
			time.Sleep(time.Duration(r.IntN(200)) * time.Microsecond) // long enough to be met, now and then
			src.fail(nil)
		default:
			time.Sleep(time.Duration(r.IntN(50)) * time.Microsecond) // lets the readers run, at a random moment
		}
	}
	for _, c := range clients {
		c.client.mu.Lock()
		if c.stall != nil {
			close(c.stall)
			c.stall = nil
		}
		c.client.mu.Unlock()
	}
	var all []*mvccpb.Event
	for _, row := range src.rows {
		kv := new(mvccpb.KeyValue)
		if err := proto.Unmarshal(row.KV[1:][lengthSize(row.KV[1:]):], kv); err != nil {
			t.Fatal(err)
		}
		all = append(all, &mvccpb.Event{Type: row.Type, Kv: kv})
	}
	for _, c := range clients {
		await(t, c, all, src.CompactRevision())
	}
	for _, c := range clients {
		if err := c.stop(); err == nil || errors.Is(err, errBroken) {
			t.Errorf("%s: Serve returned %v", c.name, err)
		}
		c.mu.Lock()
		for _, m := range c.marks {
			expect := 0
			for i, e := range m.w.got {
				if e.Kv.ModRevision <= m.rev {
					expect = i + 1
				}
			}
			if expect > m.n {
				t.Errorf("%s: broke Bookmarkable: watch %d was told of %d with %d of %d events", c.name, m.w.req.WatchId, m.rev, m.n, expect)
			}
		}
		c.mu.Unlock()
	}
}

// await waits until every watch of c has what the model says, and fails if that never comes.
func await(t *testing.T, c *modelClient, all []*mvccpb.Event, compactRev int64) {
	t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for i := 0; i < len(c.all); {
		w := c.all[i]
		c.mu.Lock()
		problem := w.check(all, compactRev)
		c.mu.Unlock()
		if problem == "" {
			i++
			continue
		}
		if t.Failed() || time.Now().After(deadline) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%s, watch %v (from %d): %s\n%s", c.name, w.req, w.from, problem, buf[:runtime.Stack(buf, true)])
		}
		time.Sleep(time.Millisecond) // there is no signal for "everything was sent" but looking
	}
}

// check says what is wrong with what w was sent, given all events there are; empty: nothing.
func (w *modelWatch) check(all []*mvccpb.Event, compactRev int64) string {
	if !w.created {
		return "not created"
	}
	i := 0
	for _, e := range all {
		if !w.want(e) {
			continue
		}
		rev := e.Kv.ModRevision
		if i == len(w.got) {
			if w.canceled && (w.compact == 0 || w.last < w.compact) {
				return "" // by the client, or by a compaction that it had not passed
			}
			return fmt.Sprintf("the event of %d is missing after %d events, canceled=%v compact=%d", rev, i, w.canceled, w.compact)
		}
		got := w.got[i]
		if got.Type != e.Type || !proto.Equal(got.Kv, e.Kv) {
			return fmt.Sprintf("event %d is of revision %d, want that of %d", i, got.Kv.ModRevision, rev)
		}
		switch prev := got.PrevKv; {
		case prev != nil && !w.req.PrevKv:
			return fmt.Sprintf("the event of %d has a prev_kv that was not asked for", rev)
		case prev != nil && (string(prev.Key) != string(e.Kv.Key) || prev.ModRevision >= rev):
			return fmt.Sprintf("the event of %d has another's prev_kv", rev)
		case prev == nil && w.req.PrevKv && compactRev == 0 && (e.Type == mvccpb.DELETE || e.Kv.Version > 1):
			return fmt.Sprintf("the event of %d has no prev_kv", rev)
		}
		i++
	}
	if i < len(w.got) {
		return fmt.Sprintf("%d events too many", len(w.got)-i)
	}
	return ""
}
