package differential

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/test/etcd/model"
	"github.com/quire-db/quire/test/etcd/start"
)

// side is one of the two servers with its long-lived streams. The server may be several processes.
type side struct {
	server *start.Server
	// One for each process, taken in turn.
	keepAlives []pb.Lease_LeaseKeepAliveClient
	renewals   int
	// One for each process: it sees every event of the store.
	truths []*watchStream
	watch  [streams]*watchStream
	stop   context.CancelFunc
}

const truthID = 1

func newSide(s *start.Server) (*side, error) {
	ctx, cancel := context.WithCancel(context.Background())
	d := &side{server: s, stop: cancel}
	processes := s.Processes
	if len(processes) == 0 {
		processes = []*start.Server{s}
	}
	for _, p := range processes {
		if err := d.join(ctx, p); err != nil {
			d.close()
			return nil, err
		}
	}
	return d, nil
}

// join opens the streams of one process.
func (d *side) join(ctx context.Context, p *start.Server) error {
	k, err := p.Lease.LeaseKeepAlive(ctx)
	if err != nil {
		return err
	}
	d.keepAlives = append(d.keepAlives, k)
	truth, err := openStream(p.Watch)
	if err != nil {
		return err
	}
	d.truths = append(d.truths, truth)
	err = truth.rpc.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key: []byte{0}, RangeEnd: []byte{0}, PrevKv: true, WatchId: truthID,
	}}})
	if err != nil {
		return err
	}
	_, err = truth.control("the watch on everything is created", 0)
	return err
}

func (d *side) close() {
	d.stop()
	for _, s := range d.truths {
		s.close()
	}
	d.closeStreams()
}

func (d *side) closeStreams() {
	for i, s := range d.watch {
		if s != nil {
			s.close()
			d.watch[i] = nil
		}
	}
}

// pair plays operations on two servers in lock-step and compares everything they say. By convention
// the first is the judge.
type pair struct {
	sides   [2]*side
	history model.History
	base    int64 // the revision at which the sequence began
	head    int64 // the newest revision that both have reported
	seen    int64 // the newest revision in history
	compact int64 // the compaction revision
	open    [streams]map[int64]*openWatch

	counts map[string]int // operations by kind and outcome
	events int            // events compared on watches
}

// openWatch is a watch as etcd keeps it: one that was cancelled by compaction stays until the client
// cancels it, which blocks progress answers and its id.
type openWatch struct {
	model.Watcher
	dead bool
	// behind: began in the past and has shown no event yet. Whether etcd has caught up with it cannot be
	// seen from outside, and it takes up to 100 ms.
	behind bool
}

// difference is what this test looks for.
type difference struct {
	what   string
	first  string // what the judge said
	second string
}

func (d *difference) Error() string {
	text := d.what
	if d.first != "" || d.second != "" {
		text += "\n  first:  " + d.first + "\n  second: " + d.second
	}
	return text
}

func newPair(first, second *start.Server) (*pair, error) {
	p := &pair{counts: make(map[string]int)}
	for i, s := range []*start.Server{first, second} {
		d, err := newSide(s)
		if err != nil {
			p.close()
			return nil, fmt.Errorf("%s: %w", s.Name, err)
		}
		p.sides[i] = d
	}
	return p, nil
}

func (p *pair) close() {
	for _, d := range p.sides {
		if d != nil {
			d.close()
		}
	}
}

// both runs f on the two sides at once.
func (p *pair) both(f func(*side) answer) (a, b answer) {
	done := make(chan answer, 1)
	go func() { done <- f(p.sides[1]) }()
	a = f(p.sides[0])
	return a, <-done
}

// reset brings both stores to the same empty state: no keys, no leases, no watches, everything compacted. Which process
// of a server gets which request follows from the seed.
func (p *pair) reset(seed uint64) error {
	for _, d := range p.sides {
		d.server.DrawFrom(seed)
		d.renewals = int(seed % 97)
		d.closeStreams()
	}
	for i := range p.open {
		p.open[i] = make(map[int64]*openWatch)
	}
	for _, id := range append([]int64{99}, leaseIDs...) {
		if err := p.play(operation{kind: opRevoke, request: &pb.LeaseRevokeRequest{ID: id}}); err != nil {
			return err
		}
	}
	everything := &pb.DeleteRangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}
	for _, o := range []operation{
		// The store must end at a revision that is not compacted yet.
		{kind: opPut, request: &pb.PutRequest{Key: []byte("reset")}},
		{kind: opDelete, request: everything},
	} {
		if err := p.play(o); err != nil {
			return err
		}
	}
	if err := p.play(operation{kind: opCompact, request: &pb.CompactionRequest{Revision: p.head, Physical: true}}); err != nil {
		return err
	}
	p.base = p.head
	// Of what was, only the events at the compaction revision can be asked for again.
	p.history.Events = slices.DeleteFunc(p.history.Events, func(e *mvccpb.Event) bool { return e.Kv.ModRevision < p.compact })
	return nil
}

// play runs one operation on both and returns a *difference when the answers differ.
func (p *pair) play(o operation) error {
	switch o.kind {
	case opWatch:
		return p.playWatch(o)
	case opCancel:
		return p.playCancel(o)
	case opProgress:
		return p.playProgress(o)
	case opClose:
		if err := p.settle(); err != nil {
			return err
		}
		for _, d := range p.sides {
			if s := d.watch[o.stream]; s != nil {
				s.close()
				d.watch[o.stream] = nil
			}
		}
		p.open[o.stream] = make(map[int64]*openWatch)
		return nil
	case opCompact:
		// A watcher that has not caught up would be cancelled, on one side perhaps.
		for n := range p.open {
			if err := p.dropBehind(n); err != nil {
				return err
			}
		}
	}
	a, b := p.both(func(d *side) answer { return d.call(o) })
	if a.err != nil || b.err != nil {
		if !sameError(a.err, b.err) {
			return &difference{what: "the answers differ", first: a.String(), second: b.String()}
		}
		p.counts[string(o.kind)+" refused"]++
		return nil
	}
	if o.kind == opKeepAlive && len(p.sides[1].truths) > 1 {
		forgiveLag(a, b)
	}
	for i, x := range []answer{a, b} {
		if err := blank(x); err != nil {
			return &difference{what: fmt.Sprintf("%s: %v", p.sides[i].server.Name, err), first: a.String(), second: b.String()}
		}
	}
	if !sameAnswer(o.request, a, b) {
		return &difference{what: "the answers differ", first: a.String(), second: b.String()}
	}
	p.counts[string(o.kind)]++
	if h, ok := a.message.(interface{ GetHeader() *pb.ResponseHeader }); ok {
		p.head = max(p.head, h.GetHeader().Revision)
	}
	if c, ok := o.request.(*pb.CompactionRequest); ok {
		p.compact = c.Revision
	}
	return nil
}

// call sends a unary operation, or one that this test uses like a unary one.
func (d *side) call(o operation) answer {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s := d.server
	var m proto.Message
	var err error
	switch r := o.request.(type) {
	case *pb.PutRequest:
		m, err = s.KV.Put(ctx, r)
	case *pb.RangeRequest:
		if o.kind == opRangeStream {
			return d.rangeStream(ctx, r)
		}
		m, err = s.KV.Range(ctx, r)
	case *pb.DeleteRangeRequest:
		m, err = s.KV.DeleteRange(ctx, r)
	case *pb.TxnRequest:
		m, err = s.KV.Txn(ctx, r)
	case *pb.CompactionRequest:
		m, err = s.KV.Compact(ctx, r)
	case *pb.LeaseGrantRequest:
		m, err = s.Lease.LeaseGrant(ctx, r)
	case *pb.LeaseRevokeRequest:
		m, err = s.Lease.LeaseRevoke(ctx, r)
	case *pb.LeaseTimeToLiveRequest:
		m, err = s.Lease.LeaseTimeToLive(ctx, r)
	case *pb.LeaseLeasesRequest:
		m, err = s.Lease.LeaseLeases(ctx, r)
	case *pb.HashKVRequest:
		m, err = s.Maintenance.HashKV(ctx, r)
	case *pb.LeaseKeepAliveRequest:
		k := d.keepAlives[d.renewals%len(d.keepAlives)]
		d.renewals++
		if err = k.Send(r); err == nil {
			m, err = k.Recv()
		}
	default:
		panic(fmt.Sprintf("no call for %s", o))
	}
	if err != nil {
		return answer{err: err}
	}
	return answer{message: m}
}

func (d *side) rangeStream(ctx context.Context, r *pb.RangeRequest) answer {
	s, err := d.server.KV.RangeStream(ctx, r)
	if err != nil {
		return answer{err: err}
	}
	a := answer{stream: []*pb.RangeStreamResponse{}}
	for {
		c, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return a
		}
		if err != nil {
			return answer{err: err}
		}
		a.stream = append(a.stream, c)
	}
}

// streamsFor returns stream n of both sides, opening it where it is not.
func (p *pair) streamsFor(n int) (pair [2]*watchStream, err error) {
	for i, d := range p.sides {
		if d.watch[n] == nil {
			if d.watch[n], err = openStream(d.server.Watch); err != nil {
				return pair, fmt.Errorf("%s: %w", d.server.Name, err)
			}
		}
		pair[i] = d.watch[n]
	}
	return pair, nil
}

// controls sends r on stream n of both and compares the next answer without events.
func (p *pair) controls(n int, r *pb.WatchRequest, what string) (*pb.WatchResponse, error) {
	both, err := p.streamsFor(n)
	if err != nil {
		return nil, err
	}
	if r != nil {
		for i, s := range both {
			if err := s.rpc.Send(r); err != nil {
				return nil, &difference{what: fmt.Sprintf("%s: the watch stream takes no request: %v", p.sides[i].server.Name, err)}
			}
		}
	}
	var got [2]*pb.WatchResponse
	for i, s := range both {
		if got[i], err = s.control(what, p.head); err != nil {
			return nil, &difference{what: fmt.Sprintf("%s: %v", p.sides[i].server.Name, err)}
		}
	}
	for _, g := range got {
		g.Header.ClusterId, g.Header.MemberId, g.Header.RaftTerm = 0, 0, 0
	}
	if !proto.Equal(got[0], got[1]) {
		return nil, &difference{what: "the watch answers differ: " + what, first: format(got[0]), second: format(got[1])}
	}
	return got[0], nil
}

func (p *pair) playWatch(o operation) error {
	request := o.request.(*pb.WatchCreateRequest)
	r, err := p.controls(o.stream, &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: request}}, "created")
	if err != nil {
		return err
	}
	if r.Canceled {
		p.counts["Watch create refused"]++
		return nil
	}
	p.counts["Watch create"]++
	w := &openWatch{Watcher: model.Watcher{Request: request, From: request.StartRevision, Compacted: p.compact}}
	if w.From == 0 {
		w.From = p.head + 1
	}
	p.open[o.stream][r.WatchId] = w
	w.behind = w.From <= p.head
	if w.From < p.compact {
		w.dead = true
		p.counts["Watch cancelled by compaction"]++
		_, err = p.controls(o.stream, nil, "cancelled because of compaction")
	}
	return err
}

func (p *pair) playCancel(o operation) error {
	id := o.request.(*pb.WatchCancelRequest).WatchId
	if p.open[o.stream][id] == nil {
		// No answer to this; one that comes nevertheless is found at the end.
		both, err := p.streamsFor(o.stream)
		if err != nil {
			return err
		}
		for _, s := range both {
			if err := s.rpc.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: o.request.(*pb.WatchCancelRequest)}}); err != nil {
				return err
			}
		}
		return nil
	}
	if err := p.settle(); err != nil {
		return err
	}
	delete(p.open[o.stream], id)
	_, err := p.controls(o.stream, &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: o.request.(*pb.WatchCancelRequest)}}, "cancelled")
	return err
}

// dropBehind settles and then cancels the watches on stream n of which nobody knows whether etcd has
// caught up: they have no events to show, so nothing is lost.
func (p *pair) dropBehind(n int) error {
	if err := p.settle(); err != nil {
		return err
	}
	for _, id := range slices.Sorted(maps.Keys(p.open[n])) {
		if w := p.open[n][id]; w.behind && !w.dead {
			if err := p.playCancel(operation{kind: opCancel, stream: n, request: &pb.WatchCancelRequest{WatchId: id}}); err != nil {
				return err
			}
		}
	}
	return nil
}

// playProgress expects an answer exactly when etcd gives one: there is a watch on the stream, all of
// them are alive and none waits for a revision still to come.
func (p *pair) playProgress(o operation) error {
	if err := p.dropBehind(o.stream); err != nil {
		return err
	}
	expected := len(p.open[o.stream]) > 0
	for _, w := range p.open[o.stream] {
		if w.dead || w.Request.StartRevision > p.head {
			expected = false
		}
	}
	request := &pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: o.request.(*pb.WatchProgressRequest)}}
	if expected {
		p.counts["Watch progress answered"]++
		_, err := p.controls(o.stream, request, progress)
		return err
	}
	both, err := p.streamsFor(o.stream)
	if err != nil {
		return err
	}
	both[1].mu.Lock()
	both[1].owed++
	both[1].mu.Unlock()
	for _, s := range both {
		if err := s.rpc.Send(request); err != nil {
			return err
		}
	}
	return nil
}

// settle waits until every watcher of both sides has been told everything up to head, and compares it
// with what it must be told.
func (p *pair) settle() error {
	if err := p.learn(); err != nil {
		return err
	}
	for n, open := range p.open {
		for _, id := range slices.Sorted(maps.Keys(open)) {
			w := open[id]
			if w.dead {
				continue
			}
			want := w.Next(&p.history)
			p.events += len(want)
			if len(want) > 0 {
				w.behind = false
			}
			for _, d := range p.sides {
				what := fmt.Sprintf("%d events for watch %d on stream %d of %s", len(want), id, n, d.server.Name)
				got, err := d.watch[n].take(id, len(want), what)
				if err != nil {
					return &difference{what: err.Error(), first: "must be " + formatEvents(want), second: "came    " + formatEvents(got)}
				}
				if !sameEvents(want, got) {
					return &difference{
						what:  fmt.Sprintf("stream %d, watch %d %s: wrong events from %s", n, id, format(w.Request), d.server.Name),
						first: "must be " + formatEvents(want), second: "came    " + formatEvents(got),
					}
				}
			}
		}
	}
	return nil
}

// learn extends the history up to head from the watches on everything, which must agree.
func (p *pair) learn() error {
	if p.seen >= p.head {
		return nil
	}
	var judged []*mvccpb.Event
	for i, d := range p.sides {
		for n, s := range d.truths {
			err := s.wait(fmt.Sprintf("revision %d on the watch on everything of %s, process %d", p.head, d.server.Name, n), func() bool {
				e := s.events[truthID]
				return len(e) > 0 && e[len(e)-1].Kv.ModRevision >= p.head
			})
			if err != nil {
				return &difference{what: fmt.Sprintf("%s, process %d: %v", d.server.Name, n, err)}
			}
			got, err := s.take(truthID, 0, "")
			if err != nil {
				return &difference{what: fmt.Sprintf("%s, process %d: %v", d.server.Name, n, err)}
			}
			if i == 0 {
				judged = got
			} else if !sameEvents(judged, got) {
				return &difference{what: fmt.Sprintf("the watches on everything differ (process %d)", n), first: formatEvents(judged), second: formatEvents(got)}
			}
		}
	}
	p.history.Events = append(p.history.Events, judged...)
	p.seen = p.head
	return nil
}

// finish checks what can only be checked at the end of a sequence: every watch ends when asked to, and
// nothing came that nobody expected.
func (p *pair) finish() error {
	if err := p.settle(); err != nil {
		return err
	}
	for n, open := range p.open {
		for _, id := range slices.Sorted(maps.Keys(open)) {
			if err := p.playCancel(operation{kind: opCancel, stream: n, request: &pb.WatchCancelRequest{WatchId: id}}); err != nil {
				return err
			}
		}
		for _, d := range p.sides {
			if s := d.watch[n]; s != nil {
				if more := s.untaken(); len(more) > 0 {
					return &difference{what: fmt.Sprintf("%s: an answer on stream %d that nobody asked for: %s", d.server.Name, n, format(more[0]))}
				}
			}
		}
	}
	return nil
}

func sameEvents(a, b []*mvccpb.Event) bool {
	return slices.EqualFunc(a, b, func(x, y *mvccpb.Event) bool { return proto.Equal(x, y) })
}

func formatEvents(events []*mvccpb.Event) string {
	text := fmt.Sprintf("%d events:", len(events))
	for _, e := range events {
		text += "\n    " + format(e)
	}
	return text
}

func sortedIDs(m map[int64]bool) []int64 { return slices.Sorted(maps.Keys(m)) }
