package etcdapi

import (
	"bytes"
	"context"
	"errors"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"

	"github.com/quire-db/quire/backend"
)

// Errors with etcd's texts (concurrency.ErrElectionNotLeader, ErrElectionNoLeader; v3election.ErrMissingLeaderKey).
var (
	errNotElected       = errors.New("election: not leader")
	errNobodyElected    = errors.New("election: no leader")
	errMissingLeaderKey = errors.New(`"leader" field must be provided`)
)

type electionServer struct {
	s                                 *Server
	v3electionpb.UnsafeElectionServer // a new method of the service must break the build
}

func (e *electionServer) queue(name []byte) *queue { return &queue{s: e.s, prefix: string(name) + "/"} }

// Campaign answers once the caller leads.
func (e *electionServer) Campaign(ctx context.Context, req *v3electionpb.CampaignRequest) (*v3electionpb.CampaignResponse, error) {
	ctx, cancel := e.s.streamContext(ctx) // it may take as long as a stream
	defer cancel()
	resp, err := e.campaign(ctx, req)
	if err != nil && ctx.Err() != nil {
		return nil, streamEnd(ctx)
	}
	return resp, asOfClient(err)
}

func (e *electionServer) campaign(ctx context.Context, req *v3electionpb.CampaignRequest) (*v3electionpb.CampaignResponse, error) {
	lease, err := e.s.session(ctx, req.Lease)
	if err != nil {
		return nil, err
	}
	q := e.queue(req.Name)
	p, err := q.enter(ctx, lease, req.Value)
	if err != nil {
		return nil, err
	}
	leader := &v3electionpb.LeaderKey{Name: req.Name, Key: []byte(p.key), Rev: p.created, Lease: lease}
	if p.found && !bytes.Equal(p.value, req.Value) {
		if _, err = e.proclaim(ctx, leader, req.Value); err != nil {
			q.leave(ctx, p)
			return nil, err
		}
	}
	_, held, err := q.wait(ctx, p)
	switch {
	case err != nil:
		// Who is told that he does not lead must not come to lead later. A place that he had before he keeps, unless he goes.
		if !p.found || ctx.Err() != nil {
			q.leave(ctx, p)
		}
		return nil, err
	case !held: // his lease has ended meanwhile, or somebody has taken him out
		return nil, errNotElected
	}
	return &v3electionpb.CampaignResponse{Header: p.header, Leader: leader}, nil
}

// Proclaim gives the leader another value.
func (e *electionServer) Proclaim(ctx context.Context, req *v3electionpb.ProclaimRequest) (*v3electionpb.ProclaimResponse, error) {
	if req.Leader == nil {
		return nil, asOfClient(errMissingLeaderKey)
	}
	header, err := e.proclaim(ctx, req.Leader, req.Value)
	if err != nil {
		return nil, asOfClient(err)
	}
	return &v3electionpb.ProclaimResponse{Header: header}, nil
}

func (e *electionServer) proclaim(ctx context.Context, l *v3electionpb.LeaderKey, value []byte) (*pb.ResponseHeader, error) {
	lease, err := e.s.session(ctx, l.Lease)
	if err != nil {
		return nil, err
	}
	resp, err := (&kvServer{s: e.s}).Txn(ctx, &pb.TxnRequest{
		Compare: []*pb.Compare{createdAt(string(l.Key), l.Rev)},
		Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: l.Key, Value: value, Lease: lease}}}},
	})
	switch {
	case err != nil:
		return nil, err
	case !resp.Succeeded:
		return nil, errNotElected
	}
	return resp.Header, nil
}

// Leader tells who leads.
func (e *electionServer) Leader(ctx context.Context, req *v3electionpb.LeaderRequest) (*v3electionpb.LeaderResponse, error) {
	resp, err := e.leader(ctx, e.queue(req.Name))
	switch {
	case err != nil:
		return nil, asOfClient(err)
	case len(resp.Kvs) == 0:
		return nil, asOfClient(errNobodyElected)
	}
	return &v3electionpb.LeaderResponse{Header: resp.Header, Kv: resp.Kvs[0]}, nil
}

func (e *electionServer) leader(ctx context.Context, q *queue) (*pb.RangeResponse, error) {
	return q.kv().read1(ctx, &pb.RangeRequest{
		Key: []byte(q.prefix), RangeEnd: prefixEnd(q.prefix), Limit: 1, SortTarget: pb.RangeRequest_CREATE, SortOrder: pb.RangeRequest_ASCEND,
	})
}

// Observe tells who leads, and what is proclaimed, from now on. Of leaders that follow each other quickly some may be left
// out; the last one is not (v3election.proto).
func (e *electionServer) Observe(req *v3electionpb.LeaderRequest, stream v3electionpb.Election_ObserveServer) error {
	ctx, cancel := e.s.streamContext(stream.Context())
	defer cancel()
	for {
		err := e.observe(ctx, e.queue(req.Name), stream)
		if ctx.Err() != nil {
			return streamEnd(ctx)
		}
		if err != nil && !errors.Is(err, backend.ErrCompacted) { // then it looks again
			return asOfClient(err)
		}
	}
}

// observe follows one leader until it is gone, or waits for the first one.
func (e *electionServer) observe(ctx context.Context, q *queue, stream v3electionpb.Election_ObserveServer) error {
	now, err := e.leader(ctx, q)
	if err != nil {
		return err
	}
	send := func(kv *mvccpb.KeyValue, rev int64) error {
		return stream.Send(&v3electionpb.LeaderResponse{Header: e.s.header(&pb.ResponseHeader{Revision: rev}), Kv: kv})
	}
	if len(now.Kvs) == 0 {
		// A leader is whom the next look finds: the first that comes may be gone by then.
		return e.s.follow(ctx, &pb.WatchCreateRequest{
			Key: []byte(q.prefix), RangeEnd: prefixEnd(q.prefix), StartRevision: now.Header.Revision + 1,
			Filters: []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NODELETE},
		}, func(*pb.ResponseHeader, *mvccpb.Event) (bool, error) { return true, nil })
	}
	if err := send(now.Kvs[0], now.Header.Revision); err != nil {
		return err
	}
	return e.s.follow(ctx, &pb.WatchCreateRequest{Key: now.Kvs[0].Key, StartRevision: now.Header.Revision + 1},
		func(_ *pb.ResponseHeader, ev *mvccpb.Event) (bool, error) {
			if ev.GetType() == mvccpb.Event_DELETE {
				return true, nil
			}
			return false, send(ev.Kv, ev.Kv.ModRevision)
		})
}

// Resign gives the leadership up, if the caller has it.
func (e *electionServer) Resign(ctx context.Context, req *v3electionpb.ResignRequest) (*v3electionpb.ResignResponse, error) {
	if req.Leader == nil {
		return nil, asOfClient(errMissingLeaderKey)
	}
	resp, err := (&kvServer{s: e.s}).Txn(ctx, &pb.TxnRequest{
		Compare: []*pb.Compare{createdAt(string(req.Leader.Key), req.Leader.Rev)},
		Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: req.Leader.Key}}}},
	})
	if err != nil {
		return nil, asOfClient(err)
	}
	return &v3electionpb.ResignResponse{Header: resp.Header}, nil
}
