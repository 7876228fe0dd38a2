package etcdapi

import (
	"context"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"
)

// admit counts a call by the API version of its client, which must be text, and tells whether it requires a leader
// (etcd's hasleader metadata).
func (s *Server) admit(ctx context.Context, count func(clientCounters)) (needsLeader bool, err error) {
	md, ok := metadata.FromIncomingContext(ctx)
	if !ok {
		return false, nil
	}
	client := "unknown"
	if vs := md.Get(rpctypes.MetadataClientAPIVersionKey); len(vs) > 0 {
		client = vs[0]
	}
	if !utf8.ValidString(client) {
		return false, rpctypes.ErrGRPCInvalidClientAPIVersion
	}
	count(s.metrics.client(client))
	vs := md.Get(rpctypes.MetadataRequireLeaderKey)
	return len(vs) > 0 && vs[0] == rpctypes.MetadataHasLeader, nil
}

// admitUnary refuses what a learner does not serve, what requires a leader while there is none, and what the caller may not
// call.
func (s *Server) admitUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	raft := s.cluster.Status()
	if raft.Learner && !learnerServes(req) {
		return nil, rpctypes.ErrGRPCNotSupportedForLearner
	}
	needsLeader, err := s.admit(ctx, func(c clientCounters) { c.unary.Inc() })
	if err != nil {
		return nil, err
	}
	if needsLeader && raft.Leader == 0 {
		return nil, rpctypes.ErrGRPCNoLeader
	}
	if err := s.guard(ctx, info.FullMethod, req); err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

// admitStream is the same for streams, of which a learner serves Snapshot alone.
func (s *Server) admitStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if s.cluster.Status().Learner && info.FullMethod != pb.Maintenance_Snapshot_FullMethodName {
		return rpctypes.ErrGRPCNotSupportedForLearner
	}
	needsLeader, err := s.admit(stream.Context(), func(c clientCounters) { c.stream.Inc() })
	if err != nil {
		return err
	}
	if needsLeader {
		led, end, err := s.whileLed(stream)
		if err != nil {
			return err
		}
		defer end()
		stream = led
	}
	if err := s.guard(stream.Context(), info.FullMethod, nil); err != nil {
		return err
	}
	return handler(srv, stream)
}

// slowUnary reports unary requests that took longer than SlowRequestAfter.
func (s *Server) slowUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if s.opts.Hooks.SlowRequest == nil {
		return handler(ctx, req)
	}
	start := time.Now()
	resp, err := handler(ctx, req)
	if took := time.Since(start); took > s.opts.SlowRequestAfter {
		s.opts.Hooks.SlowRequest(describe(ctx, info.FullMethod, req, resp, start, took, err))
	}
	return resp, err
}

// loggable is etcd's own form of a request without values, cut off after summaryBytes; empty for kinds that it does not
// know, which may carry passwords.
func loggable(req any) string {
	var text string
	switch r := req.(type) {
	case *pb.PutRequest:
		text = pb.NewLoggablePutRequest(r).String()
	case *pb.TxnRequest:
		text = pb.NewLoggableTxnRequest(r).String()
	case *pb.RangeRequest, *pb.DeleteRangeRequest, *pb.CompactionRequest, *pb.AlarmRequest,
		*pb.LeaseGrantRequest, *pb.LeaseRevokeRequest, *pb.LeaseTimeToLiveRequest:
		text = fmt.Sprint(r)
	}
	return cutOff(text)
}

// summaryBytes bounds a summary: a Txn may name hundreds of keys.
const summaryBytes = 1 << 10

func cutOff(text string) string {
	if len(text) > summaryBytes {
		return strings.ToValidUTF8(text[:summaryBytes], "") + "…"
	}
	return text
}

// SlowRequest is a unary request that took longer than Options.SlowRequestAfter, as etcd describes it.
type SlowRequest struct {
	Method, Remote string
	Start          time.Time
	Took           time.Duration
	// Operations asked for, and keys in the answer; -1 where this cannot be counted.
	RequestCount, ResponseCount int
	RequestSize, ResponseSize   int // bytes; -1: there is no answer
	Content                     string
	Err                         error
}

// describe leaves values out.
func describe(ctx context.Context, method string, req, resp any, start time.Time, took time.Duration, err error) SlowRequest {
	d := SlowRequest{Method: method, Start: start, Took: took, RequestCount: -1, ResponseCount: -1,
		RequestSize: messageSize(req), ResponseSize: -1, Content: loggable(req), Err: err}
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		d.Remote = p.Addr.String()
	}
	if err == nil {
		d.ResponseSize = messageSize(resp)
	}
	switch r := req.(type) {
	case *pb.PutRequest:
		d.RequestCount, d.ResponseCount = 1, 0
	case *pb.RangeRequest:
		d.RequestCount, d.ResponseCount = 0, 0
		if answer, ok := resp.(*rangeResponse); ok && err == nil {
			d.ResponseCount = len(answer.kvs)
		}
	case *pb.DeleteRangeRequest:
		d.RequestCount, d.ResponseCount = 0, 0
		if answer, ok := resp.(*pb.DeleteRangeResponse); ok && err == nil {
			d.ResponseCount = int(answer.GetDeleted())
		}
	case *pb.TxnRequest:
		d.RequestCount, d.ResponseCount = len(r.GetFailure()), 0
		if answer, ok := resp.(*pb.TxnResponse); ok && answer.GetSucceeded() {
			d.RequestCount = len(r.GetSuccess())
		}
	}
	return d
}

// messageSize is the encoded size in bytes; -1 for what is no message.
func messageSize(m any) int {
	switch m := m.(type) {
	case *rangeResponse:
		return m.size()
	case proto.Message:
		return proto.Size(m)
	}
	return -1
}
