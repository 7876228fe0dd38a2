package watchpoller

import (
	"bytes"
	"context"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// Reasons for a refused watch, as etcd gives them: the first is rpctypes.ErrCompacted's text, the others are those of
// its mvcc package.
const (
	reasonNegativeRevision = "etcdserver: mvcc: required revision has been compacted"
	reasonEmptyRange       = "mvcc: watcher range is empty"
	reasonDuplicateID      = "mvcc: duplicate watch ID provided on the WatchStream"
)

// receive handles the client's requests, one after another, until recv fails. It reads none while too many answers
// wait to be sent.
func (s *stream) receive(ctx context.Context, recv func() (*pb.WatchRequest, error)) error {
	for {
		for s.answersWaiting() >= maxControls {
			select {
			case <-s.drained:
			case <-s.done:
				return ErrClosed
			}
		}
		req, err := recv()
		if err != nil {
			return err
		}
		switch r := req.GetRequestUnion().(type) {
		case *pb.WatchRequest_CreateRequest:
			if r.CreateRequest != nil {
				s.create(ctx, r.CreateRequest)
			}
		case *pb.WatchRequest_CancelRequest:
			if r.CancelRequest != nil {
				s.cancel(r.CancelRequest.WatchId)
			}
		case *pb.WatchRequest_ProgressRequest:
			if r.ProgressRequest != nil {
				s.requestProgress()
			}
		default:
			// As in etcd a request of a kind that is not known does not end the stream.
		}
	}
}

func (s *stream) answersWaiting() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.controls
}

// watchRange translates key and range_end of a request.
func watchRange(key, rangeEnd []byte) keyRange {
	r := keyRange{key: key}
	if len(key) == 0 {
		r.key = []byte{0} // the smallest key
	}
	switch {
	case len(rangeEnd) == 0: // the one key
	case len(rangeEnd) == 1 && rangeEnd[0] == 0:
		r.end = []byte{}
	default:
		r.end = rangeEnd
	}
	return r
}

// create adds a watcher and answers; the answer is queued before any event of the watcher can be.
func (s *stream) create(ctx context.Context, req *pb.WatchCreateRequest) {
	p := s.p
	if req.StartRevision < 0 {
		s.refuse(reasonNegativeRevision)
		return
	}
	if p.o.Permit != nil {
		if reason := p.o.Permit(ctx, req); reason != "" {
			s.refuse(reason)
			return
		}
	}
	rng := watchRange(req.Key, req.RangeEnd)
	if len(rng.end) > 0 && bytes.Compare(rng.key, rng.end) >= 0 {
		s.refuse(reasonEmptyRange)
		return
	}

	p.mu.Lock()
	defer p.mu.Unlock()
	if s.ended {
		return
	}
	id := req.WatchId
	if id == 0 {
		for s.watchers[s.nextID] != nil {
			s.nextID++
		}
		id = s.nextID
		s.nextID++
	} else if s.watchers[id] != nil {
		s.refuse(reasonDuplicateID)
		return
	}
	w := &watcher{
		s: s, id: id, rng: rng, startRev: req.StartRevision,
		filters: filters(req.Filters), prevKV: req.PrevKv, progressNotify: req.ProgressNotify, fragment: req.Fragment,
	}
	w.quiet.Store(true)
	s.watchers[id] = w
	p.watches.Add(1) // before the revision is read, see Start
	count(p.o.Hooks.Watchers, 1)
	if p.mu.synced.empty() {
		p.skipUnwatched()
	}
	rev := p.src.Revision()
	s.control(nil, &pb.WatchResponse{Header: &pb.ResponseHeader{Revision: rev}, WatchId: id, Created: true})

	w.next = w.startRev
	if w.startRev == 0 {
		w.next = rev + 1
	}
	compactRev := p.src.CompactRevision()
	if w.next >= compactRev && w.next >= p.mu.next {
		w.state = synced
		p.mu.synced.add(w)
		return
	}
	p.lag(w)
	if w.next < compactRev {
		p.cancelCompacted(w, compactRev)
	}
}

// filters returns the event types that are not to be sent. Values that etcd does not know are ignored, as there.
func filters(req []pb.WatchCreateRequest_FilterType) []mvccpb.Event_EventType {
	var out []mvccpb.Event_EventType
	for _, f := range req {
		switch f {
		case pb.WatchCreateRequest_NOPUT:
			out = append(out, mvccpb.PUT)
		case pb.WatchCreateRequest_NODELETE:
			out = append(out, mvccpb.DELETE)
		}
	}
	return out
}

// refuse answers a create request that makes no watcher.
func (s *stream) refuse(reason string) {
	s.control(nil, &pb.WatchResponse{
		Header:  &pb.ResponseHeader{Revision: s.p.src.Revision()},
		WatchId: allWatchers, Created: true, Canceled: true, CancelReason: reason,
	})
}

// cancel ends a watcher. What is queued for it is not sent; nothing of it comes behind the answer. An id that the
// stream does not have is not answered, as in etcd.
func (s *stream) cancel(id int64) {
	p := s.p
	p.mu.Lock()
	defer p.mu.Unlock()
	w := s.watchers[id]
	if w == nil {
		return
	}
	delete(s.watchers, id)
	p.drop(w, gone)
	s.mu.Lock()
	w.dropped = true
	s.mu.Unlock()
	s.control(nil, &pb.WatchResponse{Header: &pb.ResponseHeader{Revision: p.src.Revision()}, WatchId: id, Canceled: true})
	p.answerAsking()
}
