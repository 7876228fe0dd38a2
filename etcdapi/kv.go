package etcdapi

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

// kvService is what grpc checks the registered server against. The generated pb.KVServer does not fit: Range and
// RangeStream answer with messages that are already encoded.
type kvService interface {
	rangeUnary(ctx context.Context, req *pb.RangeRequest) (*rangeResponse, error)
	rangeStream(req *pb.RangeRequest, stream grpc.ServerStream) error
	Put(ctx context.Context, req *pb.PutRequest) (*pb.PutResponse, error)
	DeleteRange(ctx context.Context, req *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error)
	Txn(ctx context.Context, req *pb.TxnRequest) (*pb.TxnResponse, error)
	Compact(ctx context.Context, req *pb.CompactionRequest) (*pb.CompactionResponse, error)
}

// kvServiceDesc is the generated descriptor with our handlers.
func kvServiceDesc() *grpc.ServiceDesc {
	return &grpc.ServiceDesc{
		ServiceName: pb.KV_ServiceDesc.ServiceName,
		HandlerType: (*kvService)(nil),
		Methods: []grpc.MethodDesc{
			unaryMethod(pb.KV_Range_FullMethodName, "Range", kvService.rangeUnary),
			unaryMethod(pb.KV_Put_FullMethodName, "Put", kvService.Put),
			unaryMethod(pb.KV_DeleteRange_FullMethodName, "DeleteRange", kvService.DeleteRange),
			unaryMethod(pb.KV_Txn_FullMethodName, "Txn", kvService.Txn),
			unaryMethod(pb.KV_Compact_FullMethodName, "Compact", kvService.Compact),
		},
		Streams: []grpc.StreamDesc{{
			StreamName:    "RangeStream",
			ServerStreams: true,
			Handler: func(srv any, stream grpc.ServerStream) error {
				req := new(pb.RangeRequest)
				if err := stream.RecvMsg(req); err != nil {
					return err
				}
				return srv.(kvService).rangeStream(req, stream)
			},
		}},
		Metadata: pb.KV_ServiceDesc.Metadata,
	}
}

// unaryMethod is what protoc-gen-go-grpc writes out for each unary method of a service S.
func unaryMethod[S any, Req any, Resp any](full, name string, call func(S, context.Context, *Req) (Resp, error)) grpc.MethodDesc {
	return grpc.MethodDesc{MethodName: name, Handler: func(srv any, ctx context.Context, dec func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
		req := new(Req)
		if err := dec(req); err != nil {
			return nil, err
		}
		if interceptor == nil {
			return call(srv.(S), ctx, req)
		}
		info := &grpc.UnaryServerInfo{Server: srv, FullMethod: full}
		return interceptor(ctx, req, info, func(ctx context.Context, req any) (any, error) {
			return call(srv.(S), ctx, req.(*Req))
		})
	}}
}

type kvServer struct{ s *Server }

func (k *kvServer) rangeUnary(ctx context.Context, req *pb.RangeRequest) (_ *rangeResponse, err error) {
	if err := checkRange(req); err != nil {
		return nil, err
	}
	defer k.s.metrics.request("Range", time.Now(), &err)
	res, err := k.read(ctx, req, View.Range)
	if err != nil {
		return nil, toStatus(err)
	}
	return &rangeResponse{
		header: k.s.header(&pb.ResponseHeader{Revision: res.Revision}),
		kvs:    res.KVs,
		more:   res.More,
		count:  res.Count,
	}, nil
}

// firstChunkKeys is how many keys the first message of a RangeStream holds (etcd: initialStreamChunkLimit).
const firstChunkKeys = 10

// rangeStream answers in chunks: the key-values disjoint and in order, header, more and count on the last one only
// (rpc.proto, RangeStreamResponse). All chunks are read at the revision of the first. Each takes a View of its own,
// so that a slow client holds none; if a compaction passes the revision meanwhile the stream ends with
// ErrGRPCCompacted, as in etcd.
func (k *kvServer) rangeStream(req *pb.RangeRequest, stream grpc.ServerStream) error {
	if err := checkRangeStream(req); err != nil {
		return err
	}
	ctx := stream.Context()

	limit := req.Limit
	if limit == 0 {
		limit = math.MaxInt64
	}
	chunk := View.Page
	if req.CountOnly {
		chunk = View.Range
	} else {
		req.Limit = min(firstChunkKeys, limit)
	}
	var sent, headerRevision int64
	for {
		res, err := k.read(ctx, req, chunk)
		if err != nil && ctx.Err() != nil {
			return streamEnd(ctx)
		}
		if err != nil {
			return toStatus(err)
		}
		if headerRevision == 0 {
			headerRevision = res.Revision
			if req.Revision == 0 {
				req.Revision = res.Revision
			}
			req.Serializable = true // the revision is there
		}
		out := &rangeResponse{kvs: res.KVs, stream: true}
		done := req.CountOnly || !res.More || len(res.KVs) == 0 || sent+int64(len(res.KVs)) == limit
		if done {
			out.header = k.s.headerWithoutRevision(&pb.ResponseHeader{Revision: headerRevision})
			out.more = res.More && !req.CountOnly
			if out.count, err = k.streamCount(ctx, req, sent, res); err != nil {
				return toStatus(err)
			}
		}
		if err := stream.SendMsg(out); err != nil {
			return err
		}
		if done {
			return nil
		}
		sent += int64(len(res.KVs))
		last := frameKey(res.KVs[len(res.KVs)-1])
		req.Key = append(append(make([]byte, 0, len(last)+1), last...), 0)
		req.Limit = min(nextChunkKeys(req.Limit, out.size(), int(k.s.opts.MaxRequestBytes)), limit-sent)
	}
}

// streamCount is the number of keys in the range of a RangeStream whose last chunk, read by req, is last. Only where a
// limit has cut the stream off are there keys that it has not seen.
func (k *kvServer) streamCount(ctx context.Context, req *pb.RangeRequest, sent int64, last *backend.RangeResult) (int64, error) {
	switch {
	case req.CountOnly:
		return last.Count, nil
	case !last.More:
		return sent + int64(len(last.KVs)), nil
	}
	rest, err := k.read(ctx, &pb.RangeRequest{Key: req.Key, RangeEnd: req.RangeEnd, Revision: req.Revision, CountOnly: true, Serializable: true}, View.Range)
	if err != nil {
		return 0, err
	}
	return sent + rest.Count, nil
}

// read answers req from the newest View, by its method how.
func (k *kvServer) read(ctx context.Context, req *pb.RangeRequest, how func(View, context.Context, *pb.RangeRequest) (*backend.RangeResult, error)) (*backend.RangeResult, error) {
	start := time.Now()
	if err := k.s.ready(ctx, req.Serializable); err != nil {
		return nil, err
	}
	view := k.s.opts.View()
	defer view.Release()
	err := k.s.permit(ctx, view.Auth(), func(a *backend.Auth, who backend.Caller) error {
		return a.CheckRead(who, req.Key, req.RangeEnd)
	})
	if err != nil {
		return nil, err
	}
	res, err := how(view, ctx, req)
	k.s.metrics.ranged(req, res, time.Since(start), err)
	return res, err
}

// nextChunkKeys steers the size of a chunk toward target bytes by doubling and halving, leaving it alone between
// half and double the target so that it does not swing. Never 0: that would mean "no limit".
func nextChunkKeys(last int64, lastBytes, target int) int64 {
	switch {
	case lastBytes < target/2:
		return last * 2
	case lastBytes > target*2:
		return max(last/2, 1)
	}
	return last
}

func (k *kvServer) Put(ctx context.Context, req *pb.PutRequest) (*pb.PutResponse, error) {
	if err := checkPut(req); err != nil {
		return nil, err
	}
	resp, err := write[*pb.PutResponse](ctx, k.s, "Put", req)
	if err != nil {
		return nil, err
	}
	resp.Header = k.s.header(resp.Header)
	return resp, nil
}

func (k *kvServer) DeleteRange(ctx context.Context, req *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error) {
	if err := checkDelete(req); err != nil {
		return nil, err
	}
	resp, err := write[*pb.DeleteRangeResponse](ctx, k.s, "DeleteRange", req)
	if err != nil {
		return nil, err
	}
	resp.Header = k.s.header(resp.Header)
	return resp, nil
}

func (k *kvServer) Txn(ctx context.Context, req *pb.TxnRequest) (_ *pb.TxnResponse, err error) {
	if err := checkTxn(req, int(k.s.opts.MaxTxnOps)); err != nil {
		return nil, err
	}
	if err := checkOverlaps(req); err != nil {
		return nil, err
	}
	var resp *pb.TxnResponse
	if readOnly(req) {
		resp, err = k.readTxn(ctx, req)
	} else {
		resp, err = write[*pb.TxnResponse](ctx, k.s, "Txn", req)
	}
	if err != nil {
		return nil, err
	}
	resp.Header = k.s.header(resp.Header)
	return resp, nil
}

func (k *kvServer) readTxn(ctx context.Context, req *pb.TxnRequest) (_ *pb.TxnResponse, err error) {
	start := time.Now()
	defer k.s.metrics.request("ReadonlyTxn", start, &err)
	if err := k.s.ready(ctx, serializable(req)); err != nil {
		return nil, toStatus(err)
	}
	view := k.s.opts.View()
	defer view.Release()
	err = k.s.permit(ctx, view.Auth(), func(a *backend.Auth, who backend.Caller) error { return a.CheckReadTxn(who, req) })
	if err != nil {
		return nil, toStatus(err)
	}
	resp, err := view.Txn(ctx, req)
	k.s.metrics.transacted(req, resp, time.Since(start), err)
	if err != nil {
		return nil, toStatus(err)
	}
	return resp, nil
}

// Compact answers when the compaction is durable; with physical set, when the rows are gone too.
func (k *kvServer) Compact(ctx context.Context, req *pb.CompactionRequest) (*pb.CompactionResponse, error) {
	resp, err := write[*pb.CompactionResponse](ctx, k.s, "Compaction", req)
	if err != nil {
		return nil, err
	}
	if req.Physical {
		if err := k.s.opts.Backend.WaitCompacted(ctx, req.Revision); err != nil {
			return nil, toStatus(err)
		}
	}
	// etcd answers with the store's revision at the end, not with that of the compaction.
	resp.Header = k.s.header(&pb.ResponseHeader{Revision: k.s.opts.Backend.Revision()})
	return resp, nil
}

// write sends req down the one way of all writes, as the caller of ctx may, and hands back its answer. kind names it in
// etcd's request_duration metric.
//
// What this process knows of users and roles may be behind what is committed, so that it took the caller for somebody of an
// older auth revision, or for nobody. Nothing was written then, and it is tried again by what it knows after a look at what
// is committed; unless that makes no difference, as for a token that is itself of an old revision.
func write[Resp proto.Message](ctx context.Context, s *Server, kind string, req proto.Message) (resp Resp, err error) {
	cmd, err := s.command(ctx, req)
	for err == nil {
		resp, err = propose[Resp](ctx, s, kind, cmd)
		if !errors.Is(err, rpctypes.ErrGRPCAuthOldRevision) && !errors.Is(err, rpctypes.ErrGRPCUserEmpty) {
			return resp, err
		}
		refused, by := err, cmd.AuthRevision
		if err = s.ready(ctx, false); err == nil {
			cmd, err = s.command(ctx, req)
		}
		if err == nil && cmd.AuthRevision <= by {
			return resp, refused
		}
	}
	return resp, toStatus(err)
}

func propose[Resp proto.Message](ctx context.Context, s *Server, kind string, cmd backend.Command) (resp Resp, err error) {
	defer s.metrics.request(kind, time.Now(), &err)
	if err := s.checkSize(cmd.Request); err != nil {
		return resp, err
	}
	s.metrics.pending.Inc()
	answer, err := s.opts.Backend.Write(ctx, cmd)
	s.metrics.pending.Dec()
	if err != nil {
		s.metrics.writeFailed(err)
		return resp, toStatus(err)
	}
	resp, ok := answer.(Resp)
	if !ok {
		panic(fmt.Sprintf("etcdapi: the backend answered %s with a %T", kind, answer))
	}
	return resp, nil
}

// readOnly tells whether no branch of the Txn can write.
func readOnly(req *pb.TxnRequest) bool {
	return onlyReads(req.GetSuccess()) && onlyReads(req.GetFailure())
}

func onlyReads(ops []*pb.RequestOp) bool {
	for _, op := range ops {
		switch r := op.Request.(type) {
		case *pb.RequestOp_RequestRange:
		case *pb.RequestOp_RequestTxn:
			if !readOnly(r.RequestTxn) {
				return false
			}
		default:
			return false
		}
	}
	return true
}

// serializable tells whether every read of a Txn that only reads asks for no more than what this server has (etcd:
// txn.IsTxnSerializable).
func serializable(req *pb.TxnRequest) bool {
	for _, ops := range [][]*pb.RequestOp{req.GetSuccess(), req.GetFailure()} {
		for _, op := range ops {
			if r := op.GetRequestRange(); r == nil || !r.Serializable {
				return false
			}
		}
	}
	return true
}
