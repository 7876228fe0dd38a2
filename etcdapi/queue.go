package etcdapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

// Locks and elections are queues: keys below a prefix, each attached to the lease of its owner, in the order of their
// creation. The first one has its turn. Keys and Txns are those of etcd's client (client/v3/concurrency), so that callers of
// these services and clients that do it by themselves stand in the same queues.
//
// Everything goes through the handlers of KV, Lease and Watch with the caller's context: who asks for a lock may do no more
// and no less than with requests of his own.
type queue struct {
	s      *Server
	prefix string
}

// place is a key in a queue. It is this one as long as the key was created at that revision: one that is taken out of the queue
// and enters again, with the same lease, has the same key at the end.
type place struct {
	key     string
	created int64  // revision
	value   []byte // what it held before, if it was there
	found   bool   // it was
	header  *pb.ResponseHeader
	first   bool // it has its turn already
}

// sessionTTL is that of a lease which a caller leaves to the server, in seconds (etcd: concurrency.defaultSessionTTL).
const sessionTTL = 60

// leaveTimeout bounds what is done for a caller who has gone.
const leaveTimeout = 5 * time.Second

// session returns the lease, or a new one where there is none, which nobody keeps alive.
func (s *Server) session(ctx context.Context, lease int64) (int64, error) {
	if lease != 0 {
		return lease, nil
	}
	granted, err := (&leaseServer{s: s}).LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: sessionTTL})
	return granted.GetID(), err
}

// enter takes a place at the end of the queue, or finds the one that the lease has. Who goes away while entering has left.
func (q *queue) enter(ctx context.Context, lease int64, value []byte) (*place, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	p := &place{key: fmt.Sprintf("%s%x", q.prefix, lease)}
	first := operation(&pb.RangeRequest{
		Key: []byte(q.prefix), RangeEnd: prefixEnd(q.prefix), Limit: 1, SortTarget: pb.RangeRequest_CREATE, SortOrder: pb.RangeRequest_ASCEND,
	})
	// The answer is waited for though the caller has gone: without it nobody could leave, and the others would wait for the
	// place until its lease ends.
	sure, cancel := outlasting(ctx)
	defer cancel()
	resp, err := q.kv().Txn(sure, &pb.TxnRequest{
		Compare: []*pb.Compare{createdAt(p.key, 0)},
		Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(p.key), Value: value, Lease: lease}}}, first},
		Failure: []*pb.RequestOp{operation(&pb.RangeRequest{Key: []byte(p.key)}), first},
	})
	if err != nil {
		return nil, err
	}
	p.header, p.created = resp.Header, resp.Header.Revision
	if p.found = !resp.Succeeded; p.found {
		kv := resp.Responses[0].GetResponseRange().Kvs[0]
		p.created, p.value = kv.CreateRevision, kv.Value
	}
	if err := ctx.Err(); err != nil && !p.found {
		q.leave(ctx, p)
		return nil, err
	}
	owner := resp.Responses[1].GetResponseRange().GetKvs()
	p.first = len(owner) == 0 || owner[0].CreateRevision == p.created
	return p, nil
}

// outlasting is ctx, and leaveTimeout more once that is done.
func outlasting(ctx context.Context) (context.Context, context.CancelFunc) {
	longer, cancel := context.WithCancel(context.WithoutCancel(ctx))
	unlink := context.AfterFunc(ctx, func() { time.AfterFunc(leaveTimeout, cancel) })
	return longer, func() { unlink(); cancel() }
}

// wait returns when nobody stands in front of a place. held is false if the place was lost meanwhile; as in etcd, that is said
// when it would have its turn.
func (q *queue) wait(ctx context.Context, p *place) (header *pb.ResponseHeader, held bool, err error) {
	look := &pb.TxnRequest{Success: []*pb.RequestOp{
		operation(&pb.RangeRequest{Key: []byte(p.key), MinCreateRevision: p.created, MaxCreateRevision: p.created}),
		operation(&pb.RangeRequest{
			Key: []byte(q.prefix), RangeEnd: prefixEnd(q.prefix), Limit: 1, MaxCreateRevision: p.created - 1,
			SortTarget: pb.RangeRequest_CREATE, SortOrder: pb.RangeRequest_DESCEND,
		}),
	}}
	for {
		resp, err := q.kv().Txn(ctx, look)
		if err != nil {
			return nil, false, err
		}
		before := resp.Responses[1].GetResponseRange().Kvs
		if len(before) == 0 {
			return resp.Header, len(resp.Responses[0].GetResponseRange().Kvs) > 0, nil
		}
		// Only the one right in front: the others have to go first anyway.
		err = q.s.follow(ctx, &pb.WatchCreateRequest{
			Key: before[0].Key, StartRevision: resp.Header.Revision, Filters: []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NOPUT},
		}, func(*pb.ResponseHeader, *mvccpb.Event) (bool, error) { return true, nil })
		if err != nil && !errors.Is(err, backend.ErrCompacted) { // then it may be gone: look again
			return nil, false, err
		}
	}
}

// leave gives a place up, also when its owner's context is over.
func (q *queue) leave(ctx context.Context, p *place) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTimeout)
	defer cancel()
	// If it fails, the end of the lease does it.
	_, _ = q.kv().Txn(ctx, &pb.TxnRequest{
		Compare: []*pb.Compare{createdAt(p.key, p.created)},
		Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(p.key)}}}},
	})
}

func (q *queue) kv() *kvServer { return &kvServer{s: q.s} }

// read1 is a Range as a message.
func (k *kvServer) read1(ctx context.Context, req *pb.RangeRequest) (*pb.RangeResponse, error) {
	resp, err := k.Txn(ctx, &pb.TxnRequest{Success: []*pb.RequestOp{operation(req)}})
	if err != nil {
		return nil, err
	}
	found := resp.Responses[0].GetResponseRange()
	found.Header = resp.Header
	return found, nil
}

// follow gives each event of a watcher to a function until that says that it is done. Errors are those of the function, of
// the context, or backend.ErrCompacted.
func (s *Server) follow(ctx context.Context, req *pb.WatchCreateRequest, each func(*pb.ResponseHeader, *mvccpb.Event) (done bool, err error)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	asked := false
	recv := func() (*pb.WatchRequest, error) {
		if asked {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		asked = true
		return &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: req}}, nil
	}
	var ended error
	send := func(msg any) error {
		resp, err := watchResponse(msg)
		if err != nil {
			return err
		}
		switch {
		case resp.CompactRevision != 0:
			ended = backend.ErrCompacted
			return ended
		case resp.Canceled:
			ended = errors.New(resp.CancelReason)
			return ended
		}
		for _, ev := range resp.Events {
			if done, err := each(resp.Header, ev); done || err != nil {
				if ended = err; err == nil {
					ended = io.EOF
				}
				return ended
			}
		}
		return nil
	}
	err := s.opts.Watcher.Serve(ctx, recv, send)
	switch {
	case errors.Is(ended, io.EOF):
		return nil
	case ended != nil:
		return ended
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return err
}

// asOfClient is what callers of these services get of an error of the other ones: etcd's are built upon its client, whose errors
// have no code on the wire.
func asOfClient(err error) error {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return status.Error(codes.Unknown, status.Convert(toStatus(err)).Message())
}

// watchResponse is what a Watcher sends, as a message.
func watchResponse(msg any) (*pb.WatchResponse, error) {
	switch m := msg.(type) {
	case *pb.WatchResponse:
		return m, nil
	case wireBuffers:
		var wire []byte
		for _, b := range m.WireBuffers() {
			wire = append(wire, b...)
		}
		resp := new(pb.WatchResponse)
		return resp, proto.Unmarshal(wire, resp)
	}
	return nil, fmt.Errorf("etcdapi: a watcher has sent a %T", msg)
}

func operation(r *pb.RangeRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: r}}
}

// createdAt holds while key was created at that revision; 0: while it is not there.
func createdAt(key string, rev int64) *pb.Compare {
	return &pb.Compare{
		Key: []byte(key), Result: pb.Compare_EQUAL, Target: pb.Compare_CREATE, TargetUnion: &pb.Compare_CreateRevision{CreateRevision: rev},
	}
}

// prefixEnd is the end of the range of all keys that begin with prefix.
func prefixEnd(prefix string) []byte {
	end := []byte(prefix)
	for i := len(end) - 1; i >= 0; i-- {
		if end[i] < 0xff {
			end[i]++
			return end[:i+1]
		}
	}
	return []byte{0}
}
