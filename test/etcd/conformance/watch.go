package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/test/etcd/start"
)

// watchStream is one watch RPC of a case.
type watchStream struct {
	x      *exam
	rpc    pb.Watch_WatchClient
	cancel context.CancelFunc
}

func (x *exam) watchStream(pairs ...string) *watchStream {
	x.Helper()
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(x.ctx, pairs...))
	x.Cleanup(cancel)
	rpc, err := x.Watch.Watch(ctx)
	if err != nil {
		x.Fatalf("open a watch stream: %v", err)
	}
	return &watchStream{x: x, rpc: rpc, cancel: cancel}
}

func (s *watchStream) send(r *pb.WatchRequest) {
	s.x.Helper()
	if err := s.rpc.Send(r); err != nil {
		s.x.Fatalf("%s: %v", show(r), err)
	}
}

func (s *watchStream) recv() *pb.WatchResponse {
	s.x.Helper()
	r, err := s.rpc.Recv()
	if err != nil {
		s.x.Fatalf("the watch stream ended: %v", err)
	}
	return r
}

// request asks for a watch and returns the next answer, which is for it when nothing else is open.
func (s *watchStream) request(r *pb.WatchCreateRequest) *pb.WatchResponse {
	s.x.Helper()
	s.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: r}})
	return s.recv()
}

func (s *watchStream) create(r *pb.WatchCreateRequest) int64 {
	s.x.Helper()
	a := s.request(r)
	if !a.Created || a.Canceled || len(a.Events) > 0 || a.CompactRevision != 0 {
		s.x.Fatalf("%s was not created: %s", show(r), show(a))
	}
	return a.WatchId
}

func (s *watchStream) requestCancel(id int64) {
	s.x.Helper()
	s.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: &pb.WatchCancelRequest{WatchId: id}}})
}

func (s *watchStream) requestProgress() {
	s.x.Helper()
	s.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}})
}

// events reads until n events have come and checks what holds for every answer with events.
func (s *watchStream) events(n int) (events []*mvccpb.Event) {
	s.x.Helper()
	for len(events) < n {
		r := s.recv()
		if len(r.Events) == 0 {
			s.x.Fatalf("after %d of %d events came %s", len(events), n, show(r))
		}
		if len(events) > 0 && r.Events[0].Kv.ModRevision <= events[len(events)-1].Kv.ModRevision {
			s.x.Errorf("broke Ordered or Atomic - revision %d after %d in another answer", r.Events[0].Kv.ModRevision, events[len(events)-1].Kv.ModRevision)
		}
		if last := r.Events[len(r.Events)-1].Kv.ModRevision; r.Header.Revision < last {
			s.x.Errorf("the header's revision %d is below an event's %d", r.Header.Revision, last)
		}
		events = append(events, r.Events...)
	}
	if len(events) > n {
		s.x.Fatalf("%d events came, want %d: %v", len(events), n, events[n:])
	}
	return events
}

// watch opens a stream with one watch.
func (x *exam) watch(r *pb.WatchCreateRequest) *watchStream {
	x.Helper()
	s := x.watchStream()
	s.create(r)
	return s
}

func wantEvent(x *exam, e *mvccpb.Event, kind mvccpb.Event_EventType, key string, mod int64) {
	x.Helper()
	if e.Type != kind || string(e.Kv.Key) != key || e.Kv.ModRevision != mod {
		x.Errorf("event is %v, want %v of %q at %d", e, kind, key, mod)
	}
}

var (
	allKeys = &pb.WatchCreateRequest{Key: []byte{0}, RangeEnd: []byte{0}}
	put     = mvccpb.Event_PUT
	del     = mvccpb.Event_DELETE
)

var watchCases = []testCase{
	{name: "a watch is created under the store's revision, then tells what happens", run: func(x *exam) {
		x.put("a", "1")
		s := x.watchStream()
		r := s.request(&pb.WatchCreateRequest{Key: []byte("a")})
		equal(x, "created", r.Created, true)
		equal(x, "the header's revision", r.Header.Revision, 2)
		if r.Header.MemberId == 0 || r.Header.ClusterId == 0 || r.Header.RaftTerm == 0 {
			x.Errorf("incomplete header %v", r.Header)
		}
		x.put("b", "")
		x.put("a", "2")
		x.delete("a")
		events := s.events(2)
		wantEvent(x, events[0], put, "a", 4)
		same(x, "the pair of the put", events[0].Kv, kv("a", "2", 2, 4, 2))
		same(x, "the pair of the delete: key and revision only", events[1].Kv, &mvccpb.KeyValue{Key: []byte("a"), ModRevision: 5})
		equal(x, "kind of the second", events[1].Type, del)
	}},

	{name: "a watch from the past begins with created and tells all since", run: func(x *exam) {
		for i := range 10 {
			x.put("a", fmt.Sprint(i))
		}
		s := x.watch(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: 5})
		x.put("a", "last")
		for i, e := range s.events(8) {
			wantEvent(x, e, put, "a", int64(5+i))
		}
	}},

	{name: "a watch from the next revision misses nothing after a list", run: func(x *exam) {
		x.put("a", "1")
		list := x.rangeRequest(everything)
		x.put("b", "between")
		s := x.watch(&pb.WatchCreateRequest{Key: []byte{0}, RangeEnd: []byte{0}, StartRevision: list.Header.Revision + 1})
		wantEvent(x, s.events(1)[0], put, "b", 3)
	}},

	{name: "a watch from the future tells nothing older", run: func(x *exam) {
		s := x.watch(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: 5})
		for range 6 {
			x.put("a", "")
		}
		for i, e := range s.events(3) {
			wantEvent(x, e, put, "a", int64(5+i))
		}
	}},

	// "Ordered", "unique", "reliable", "atomic".
	{name: "ordered, unique, reliable and atomic under concurrent writers", run: func(x *exam) {
		const writers, each = 6, 40
		streams := make([]*watchStream, 3)
		for i := range streams {
			streams[i] = x.watch(allKeys)
		}
		var all sync.WaitGroup
		failures := make(chan error, writers)
		for w := range writers {
			all.Go(func() {
				for i := range each {
					_, err := x.KV.Txn(x.ctx, &pb.TxnRequest{Success: []*pb.RequestOp{
						putOp(fmt.Sprintf("%d/a", w), fmt.Sprint(i)), putOp(fmt.Sprintf("%d/b", w), fmt.Sprint(i)), putOp("shared", fmt.Sprint(w, i)),
					}})
					if err != nil {
						failures <- err
						return
					}
				}
			})
		}
		all.Wait()
		close(failures)
		for err := range failures {
			x.Fatal(err)
		}
		for _, s := range streams {
			next := int64(2)
			for next < 2+writers*each {
				r := s.recv()
				if len(r.Events)%3 != 0 {
					x.Fatalf("broke Atomic - an answer has %d events of Txns of three", len(r.Events))
				}
				for i, e := range r.Events {
					if want := next + int64(i/3); e.Kv.ModRevision != want {
						x.Fatalf("broke Ordered, Unique or Reliable - revision %d came, want %d", e.Kv.ModRevision, want)
					}
				}
				next += int64(len(r.Events) / 3)
			}
		}
		// "Resumable": the same again from the middle.
		s := x.watch(&pb.WatchCreateRequest{Key: []byte{0}, RangeEnd: []byte{0}, StartRevision: 100})
		for i, e := range s.events((2 + writers*each - 100) * 3) {
			if want := int64(100 + i/3); e.Kv.ModRevision != want {
				x.Fatalf("broke Resumable - revision %d came, want %d", e.Kv.ModRevision, want)
			}
		}
	}},

	{name: "atomic: the events of a Txn come in one answer, in the order of its operations", run: func(x *exam) {
		x.put("d", "")
		s := x.watch(&pb.WatchCreateRequest{Key: []byte{0}, RangeEnd: []byte{0}})
		x.txn(&pb.TxnRequest{Success: []*pb.RequestOp{putOp("c", ""), putOp("a", ""), deleteOp("d", ""), txnOp(&pb.TxnRequest{Success: []*pb.RequestOp{putOp("b", "")}})}})
		r := s.recv()
		if len(r.Events) != 4 {
			x.Fatalf("the answer has %d events, want 4", len(r.Events))
		}
		wantEvent(x, r.Events[0], put, "c", 3)
		wantEvent(x, r.Events[1], put, "a", 3)
		wantEvent(x, r.Events[2], del, "d", 3)
		wantEvent(x, r.Events[3], put, "b", 3)
	}},

	{name: "prev_kv gives the pair before, none for a new key", run: func(x *exam) {
		s := x.watch(&pb.WatchCreateRequest{Key: []byte("a"), PrevKv: true})
		without := x.watch(&pb.WatchCreateRequest{Key: []byte("a")})
		x.put("a", "1")
		x.put("a", "2")
		x.delete("a")
		x.put("a", "3")
		check := func(events []*mvccpb.Event) {
			if events[0].PrevKv != nil || events[3].PrevKv != nil {
				x.Errorf("a new key has a previous pair: %v", events)
			}
			same(x, "before the second put", events[1].PrevKv, kv("a", "1", 2, 2, 1))
			same(x, "before the delete", events[2].PrevKv, kv("a", "2", 2, 3, 2))
		}
		check(s.events(4))
		check(x.watch(&pb.WatchCreateRequest{Key: []byte("a"), PrevKv: true, StartRevision: 2}).events(4))
		for _, e := range without.events(4) {
			if e.PrevKv != nil {
				x.Errorf("unasked for previous pair in %v", e)
			}
		}
	}},

	{name: "filters leave out puts or deletes", run: func(x *exam) {
		noPut := x.watch(&pb.WatchCreateRequest{Key: []byte("a"), Filters: []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NOPUT}})
		noDelete := x.watch(&pb.WatchCreateRequest{Key: []byte("a"), Filters: []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NODELETE}})
		x.put("a", "")
		x.delete("a")
		x.put("a", "")
		wantEvent(x, noPut.events(1)[0], del, "a", 3)
		events := noDelete.events(2)
		wantEvent(x, events[0], put, "a", 2)
		wantEvent(x, events[1], put, "a", 4)
		past := x.watch(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: 1, Filters: []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NOPUT}})
		wantEvent(x, past.events(1)[0], del, "a", 3)
	}},

	{name: "ranges of a watch are those of a read; no key means the smallest", run: func(x *exam) {
		keys := []string{"\x00", "a", "a\x00", "ab", "b", "\xff"}
		for _, c := range []struct {
			key, end string
			want     []string
		}{
			{"a", "", []string{"a"}},
			{"a", "b", []string{"a", "a\x00", "ab"}},
			{"a\x00", "b", []string{"a\x00", "ab"}},
			{"a", "\x00", []string{"a", "a\x00", "ab", "b", "\xff"}},
			{"", "\x00", keys},
			{"", "", []string{"\x00"}},
			{"", "a", []string{"\x00"}},
			{"\xff", "\x00", []string{"\xff"}},
		} {
			s := x.watch(&pb.WatchCreateRequest{Key: []byte(c.key), RangeEnd: []byte(c.end)})
			for _, k := range keys {
				x.put(k, "")
			}
			for i, e := range s.events(len(c.want)) {
				if string(e.Kv.Key) != c.want[i] {
					x.Errorf("[%q, %q): event %d is of %q, want %q", c.key, c.end, i, e.Kv.Key, c.want[i])
				}
			}
			s.cancel()
		}
	}},

	{name: "a range without keys is refused", run: func(x *exam) {
		for _, r := range []*pb.WatchCreateRequest{
			{Key: []byte("b"), RangeEnd: []byte("a")}, {Key: []byte("b"), RangeEnd: []byte("b")},
		} {
			s := x.watchStream()
			a := s.request(r)
			same(x, "the answer", a, &pb.WatchResponse{Header: a.Header, WatchId: -1, Created: true, Canceled: true, CancelReason: "mvcc: watcher range is empty"})
			s.create(allKeys)
		}
	}},

	{name: "a negative start revision is refused", run: func(x *exam) {
		s := x.watchStream()
		a := s.request(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: -1})
		same(x, "the answer", a, &pb.WatchResponse{Header: a.Header, WatchId: -1, Created: true, Canceled: true, CancelReason: rpctypes.ErrCompacted.Error()})
		s.create(allKeys)
	}},

	{name: "a compacted start revision is cancelled with the compact revision", run: func(x *exam) {
		for range 5 {
			x.put("a", "")
		}
		x.compact(4)
		s := x.watchStream()
		id := s.create(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: 3})
		r := s.recv()
		same(x, "the answer", r, &pb.WatchResponse{Header: r.Header, WatchId: id, Canceled: true, CompactRevision: 4})
		// The stream goes on.
		s.create(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: 6, WatchId: 20})
		wantEvent(x, s.events(1)[0], put, "a", 6)
	}},

	// etcd issues 18089 and 19179.
	{name: "a watch from the compact revision sees what happened there, a delete as well", run: func(x *exam) {
		x.put("a", "1")
		x.put("b", "1")
		x.txn(&pb.TxnRequest{Success: []*pb.RequestOp{deleteOp("a", ""), putOp("b", "2"), putOp("c", "1")}})
		x.put("b", "3")
		x.compact(4)
		events := x.watch(&pb.WatchCreateRequest{Key: []byte{0}, RangeEnd: []byte{0}, StartRevision: 4, PrevKv: true}).events(4)
		wantEvent(x, events[0], del, "a", 4)
		wantEvent(x, events[1], put, "b", 4)
		wantEvent(x, events[2], put, "c", 4)
		wantEvent(x, events[3], put, "b", 5)
		if events[0].PrevKv != nil || events[1].PrevKv != nil {
			x.Errorf("previous pairs from before the compaction: %v", events[:2])
		}
		same(x, "the previous pair at the compact revision", events[3].PrevKv, kv("b", "2", 3, 4, 2))
	}},

	{name: "a compaction does not disturb a watch that has seen everything", run: func(x *exam) {
		s := x.watch(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: 1})
		x.put("a", "1")
		x.put("a", "2")
		s.events(2)
		x.compact(3)
		x.put("a", "3")
		wantEvent(x, s.events(1)[0], put, "a", 4)
	}},

	{name: "watch ids are the client's choice or the next free one, and unique on a stream", run: func(x *exam) {
		s := x.watchStream()
		equal(x, "the first drawn id", s.create(&pb.WatchCreateRequest{Key: []byte("a")}), 0)
		equal(x, "a chosen id", s.create(&pb.WatchCreateRequest{Key: []byte("a"), WatchId: 1}), 1)
		equal(x, "a chosen id", s.create(&pb.WatchCreateRequest{Key: []byte("a"), WatchId: 1 << 40}), 1<<40)
		equal(x, "the next drawn id", s.create(&pb.WatchCreateRequest{Key: []byte("a")}), 2)
		for _, id := range []int64{1, 2, 1 << 40} {
			a := s.request(&pb.WatchCreateRequest{Key: []byte("b"), WatchId: id})
			same(x, "the answer to a used id", a, &pb.WatchResponse{Header: a.Header, WatchId: -1, Created: true, Canceled: true, CancelReason: "mvcc: duplicate watch ID provided on the WatchStream"})
		}
		s.requestCancel(1)
		a := s.recv()
		same(x, "the answer to a cancel", a, &pb.WatchResponse{Header: a.Header, WatchId: 1, Canceled: true})
		equal(x, "an id used again after its cancel", s.create(&pb.WatchCreateRequest{Key: []byte("b"), WatchId: 1}), 1)
		// Another stream has its own ids.
		equal(x, "the first id of another stream", x.watchStream().create(allKeys), 0)
	}},

	{name: "a cancelled watch tells nothing more, the others go on", run: func(x *exam) {
		s := x.watchStream()
		s.create(&pb.WatchCreateRequest{Key: []byte("a"), WatchId: 1})
		s.create(&pb.WatchCreateRequest{Key: []byte("a"), WatchId: 2})
		s.requestCancel(99) // unknown: no answer
		s.requestCancel(1)
		r := s.recv()
		same(x, "the answer", r, &pb.WatchResponse{Header: r.Header, WatchId: 1, Canceled: true})
		x.put("a", "")
		x.put("a", "")
		for range 2 {
			if r := s.recv(); r.WatchId != 2 || len(r.Events) != 1 {
				x.Errorf("got %s, want an event for watch 2", show(r))
			}
		}
	}},

	{name: "many watches share a stream and each gets its own events", run: func(x *exam) {
		s := x.watchStream()
		const n = 300
		for i := range n {
			s.create(&pb.WatchCreateRequest{Key: fmt.Appendf(nil, "%d", i), WatchId: int64(i + 1)})
		}
		for i := range n {
			x.put(fmt.Sprint(i), "")
		}
		seen := make(map[int64]bool)
		for range n {
			r := s.recv()
			if len(r.Events) != 1 || string(r.Events[0].Kv.Key) != fmt.Sprint(r.WatchId-1) || seen[r.WatchId] {
				x.Fatalf("watch %d got %v", r.WatchId, r.Events)
			}
			seen[r.WatchId] = true
		}
	}},

	// "Bookmarkable": progress never overtakes an event.
	{name: "a progress request is answered on id -1 with the revision that all watches have reached", run: func(x *exam) {
		s := x.watchStream()
		s.create(&pb.WatchCreateRequest{Key: []byte("a"), WatchId: 1})
		s.create(&pb.WatchCreateRequest{Key: []byte("b"), WatchId: 2})
		x.put("elsewhere", "")
		s.requestProgress()
		r := s.recv()
		same(x, "progress", r, &pb.WatchResponse{Header: r.Header, WatchId: -1})
		equal(x, "its revision", r.Header.Revision, 2)
		for i := range 50 {
			rev := x.put("a", "").Header.Revision
			s.requestProgress()
			if r := s.recv(); len(r.Events) != 1 || r.Events[0].Kv.ModRevision != rev {
				x.Fatalf("round %d: got %s before the event of revision %d", i, show(r), rev)
			}
			if r := s.recv(); r.WatchId != -1 || r.Header.Revision != rev {
				x.Fatalf("round %d: got %s, want progress at %d", i, show(r), rev)
			}
		}
	}},

	{name: "no progress is told while a watch on the stream waits for the future", run: func(x *exam) {
		s := x.watchStream()
		s.create(&pb.WatchCreateRequest{Key: []byte("a"), WatchId: 1})
		s.create(&pb.WatchCreateRequest{Key: []byte("b"), WatchId: 2, StartRevision: 4})
		s.requestProgress()
		// An answer to the next request shows that the one before was dealt with.
		s.create(&pb.WatchCreateRequest{Key: []byte("c"), WatchId: 3})
		x.put("a", "")
		wantEvent(x, s.events(1)[0], put, "a", 2)
		x.put("x", "")
		x.put("x", "")
		s.requestProgress()
		if r := s.recv(); r.WatchId != -1 || r.Header.Revision != 4 {
			x.Errorf("got %s, want progress at 4", show(r))
		}
	}},

	{name: "progress requests during catching up never overtake an event", run: func(x *exam) {
		const n = 500
		for range n {
			x.put("a", strings.Repeat("v", 1000))
		}
		s := x.watch(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: 2})
		next := int64(2)
		done := false
		for !done {
			s.requestProgress()
			for {
				r := s.recv()
				if r.WatchId == -1 {
					if r.Header.Revision != next-1 {
						x.Fatalf("broke Bookmarkable - progress at %d after the event of %d", r.Header.Revision, next-1)
					}
					done = next == n+2
					break
				}
				for _, e := range r.Events {
					if e.Kv.ModRevision != next {
						x.Fatalf("broke Ordered - revision %d came, want %d", e.Kv.ModRevision, next)
					}
					next++
				}
				if next == n+2 {
					break // etcd drops requests that come too early
				}
			}
		}
	}},

	{name: "progress_notify tells an idle watch how far the store is", options: start.Options{WatchProgressNotify: 200 * time.Millisecond}, run: func(x *exam) {
		s := x.watchStream()
		s.create(&pb.WatchCreateRequest{Key: []byte("a"), WatchId: 5, ProgressNotify: true})
		s.create(&pb.WatchCreateRequest{Key: []byte("a"), WatchId: 6})
		x.put("elsewhere", "")
		for {
			r := s.recv()
			same(x, "the notification", r, &pb.WatchResponse{Header: r.Header, WatchId: 5})
			if r.Header.Revision == 2 {
				break
			}
		}
	}},

	{name: "without fragments one revision is one answer, however large", run: func(x *exam) {
		fillLarge(x)
		s := x.watch(&pb.WatchCreateRequest{Key: []byte{0}, RangeEnd: []byte{0}, PrevKv: true})
		fillLarge(x)
		r := s.recv()
		equal(x, "events", len(r.Events), 10)
		equal(x, "fragment", r.Fragment, false)
	}},

	{name: "with fragments a large revision is split, each part but the last marked", run: func(x *exam) {
		fillLarge(x)
		s := x.watch(&pb.WatchCreateRequest{Key: []byte{0}, RangeEnd: []byte{0}, PrevKv: true, Fragment: true})
		fillLarge(x)
		var events []*mvccpb.Event
		parts := 0
		for {
			r := s.recv()
			parts++
			events = append(events, r.Events...)
			equal(x, "the revision of a part", r.Header.Revision, 3)
			if !r.Fragment {
				break
			}
		}
		equal(x, "parts", parts, 2)
		equal(x, "events", len(events), 10)
		for i, e := range events {
			wantEvent(x, e, put, fmt.Sprintf("k%d", i), 3)
		}
		x.put("small", "")
		equal(x, "fragment of a small answer", s.recv().Fragment, false)
	}},

	{name: "a slow watcher gets everything in the end and holds up nobody", run: func(x *exam) {
		slow := x.watch(allKeys)
		fast := x.watch(allKeys)
		const n = 3000
		value := bytes.Repeat([]byte("v"), 4000)
		go func() {
			for range n {
				if _, err := x.KV.Put(x.ctx, &pb.PutRequest{Key: []byte("k"), Value: value}); err != nil {
					x.Errorf("put: %v", err)
					return
				}
			}
		}()
		fast.events(n)
		for i, e := range slow.events(n) {
			if e.Kv.ModRevision != int64(i+2) {
				x.Fatalf("broke Reliable - event %d is of revision %d", i, e.Kv.ModRevision)
			}
		}
	}},

	{name: "a watch that requires a leader works while there is one", run: func(x *exam) {
		s := x.watchStream(rpctypes.MetadataRequireLeaderKey, rpctypes.MetadataHasLeader)
		s.create(allKeys)
		x.put("a", "")
		wantEvent(x, s.events(1)[0], put, "a", 2)
	}},

	{name: "a client that has no more requests still gets events", run: func(x *exam) {
		s := x.watch(allKeys)
		if err := s.rpc.CloseSend(); err != nil {
			x.Fatal(err)
		}
		x.put("a", "")
		wantEvent(x, s.events(1)[0], put, "a", 2)
	}},

	{name: "an empty request is ignored", run: func(x *exam) {
		s := x.watchStream()
		s.send(&pb.WatchRequest{})
		s.create(allKeys)
		x.put("a", "")
		wantEvent(x, s.events(1)[0], put, "a", 2)
	}},

	{name: "a stream that the client cancels ends with Canceled", run: func(x *exam) {
		s := x.watch(allKeys)
		s.cancel()
		for {
			if _, err := s.rpc.Recv(); err != nil {
				equal(x, "the code", status.Code(err), codes.Canceled)
				break
			}
		}
		x.put("a", "")
	}},

	{name: "etcd's own client watches, asks for progress and closes", run: func(x *exam) {
		c := x.Client(x.T)
		ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(x.ctx))
		defer cancel()
		w := c.Watch(ctx, "a", clientv3.WithPrefix(), clientv3.WithPrevKV(), clientv3.WithCreatedNotify(), clientv3.WithRev(1))
		if r := <-w; !r.Created {
			x.Fatalf("first came %v", r)
		}
		if _, err := c.Put(ctx, "ab", "1"); err != nil {
			x.Fatal(err)
		}
		if r := <-w; len(r.Events) != 1 || !r.Events[0].IsCreate() {
			x.Fatalf("then came %v", r)
		}
		for {
			if err := c.RequestProgress(ctx); err != nil {
				x.Fatal(err)
			}
			select {
			case r := <-w:
				if !r.IsProgressNotify() || r.Header.Revision != 2 {
					x.Errorf("then came %v", r)
				}
				return
			case <-time.After(200 * time.Millisecond):
				// etcd drops a request that comes while the watch catches up.
			case <-ctx.Done():
				x.Fatal(errors.Join(errors.New("no progress"), ctx.Err()))
			}
		}
	}},
}

// fillLarge writes ten keys of 140 KB in one Txn: just under the size of a request, so that events with
// previous pairs are larger than an answer may be.
func fillLarge(x *exam) {
	x.Helper()
	t := &pb.TxnRequest{}
	for i := range 10 {
		t.Success = append(t.Success, putOp(fmt.Sprintf("k%d", i), strings.Repeat("v", 140_000)))
	}
	x.txn(t)
}
