package etcdapi

import (
	"context"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
)

// Spans have etcd's names and attributes: keys, but no values.

// spanUnary is an interceptor that puts a span around requests that etcd has one for.
func (s *Server) spanUnary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	name, attributes := spanOf(req)
	if name == "" {
		return handler(ctx, req)
	}
	ctx, span := s.opts.Tracer.Start(ctx, name, trace.WithAttributes(attributes...))
	defer span.End()
	resp, err := handler(ctx, req)
	if err != nil {
		span.RecordError(err)
	}
	return resp, err
}

// spanOf returns an empty name for what has no span of its own.
func spanOf(req any) (name string, attributes []attribute.KeyValue) {
	switch r := req.(type) {
	case *pb.RangeRequest:
		return "range", rangeAttributes(r)
	case *pb.PutRequest:
		return "put", []attribute.KeyValue{attribute.String("key", string(r.GetKey()))}
	case *pb.DeleteRangeRequest:
		return "delete_range", []attribute.KeyValue{
			attribute.String("range_begin", string(r.GetKey())), attribute.String("range_end", string(r.GetRangeEnd())),
		}
	case *pb.TxnRequest:
		first, kind, lease := firstOps(r.GetSuccess())
		return "txn", []attribute.KeyValue{
			attribute.String("compare_first_key", firstCompared(r.GetCompare())),
			attribute.String("success_first_key", first),
			attribute.String("success_first_type", kind),
			attribute.Int64("success_first_lease", lease),
			attribute.Int("compare_len", len(r.GetCompare())),
			attribute.Int("success_len", len(r.GetSuccess())),
			attribute.Int("failure_len", len(r.GetFailure())),
			attribute.Bool("read_only", readOnly(r)),
		}
	case *pb.CompactionRequest:
		return "compact", []attribute.KeyValue{attribute.Bool("is_physical", r.GetPhysical()), attribute.Int64("rev", r.GetRevision())}
	case *pb.LeaseGrantRequest:
		return "lease_grant", []attribute.KeyValue{attribute.Int64("id", r.GetID()), attribute.Int64("ttl", r.GetTTL())}
	case *pb.LeaseRevokeRequest:
		return "lease_revoke", []attribute.KeyValue{attribute.Int64("id", r.GetID())}
	}
	return "", nil
}

func rangeAttributes(r *pb.RangeRequest) []attribute.KeyValue {
	return []attribute.KeyValue{
		attribute.String("range_begin", string(r.GetKey())),
		attribute.String("range_end", string(r.GetRangeEnd())),
		attribute.Int64("rev", r.GetRevision()),
		attribute.Int64("limit", r.GetLimit()),
		attribute.Bool("count_only", r.GetCountOnly()),
		attribute.Bool("keys_only", r.GetKeysOnly()),
	}
}

func firstCompared(compares []*pb.Compare) string {
	for _, c := range compares {
		if len(c.GetKey()) > 0 {
			return string(c.Key)
		}
	}
	return ""
}

// firstOps returns the first key in ops, the kind of the first of them, and the lease of the first put; -1: there is none.
func firstOps(ops []*pb.RequestOp) (key, kind string, lease int64) {
	lease = -1
	put := false
	for _, op := range ops {
		var k []byte
		var is string
		switch o := op.GetRequest().(type) {
		case *pb.RequestOp_RequestPut:
			is, k = "put", o.RequestPut.GetKey()
			if !put {
				put, lease = true, o.RequestPut.GetLease()
			}
		case *pb.RequestOp_RequestRange:
			is, k = "range", o.RequestRange.GetKey()
		case *pb.RequestOp_RequestDeleteRange:
			is, k = "delete_range", o.RequestDeleteRange.GetKey()
		case *pb.RequestOp_RequestTxn:
			is = "txn"
		}
		if kind == "" {
			kind = is
		}
		if key == "" {
			key = string(k)
		}
	}
	return key, kind, lease
}

// spanStream is an interceptor that makes spans for what goes over a stream.
func (s *Server) spanStream(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	t := &tracedStream{ServerStream: stream, tracer: s.opts.Tracer}
	err := handler(srv, t)
	t.end(err)
	return err
}

// tracedStream makes a span for each request of a stream, up to its answer. That of a watch ends when the watcher stands;
// etcd's lives as long as the watcher, and is not seen before.
type tracedStream struct {
	grpc.ServerStream
	tracer trace.Tracer

	mu    sync.Mutex // one goroutine receives, another one sends, and the first may outlive the handler
	open  []trace.Span
	ended bool
}

func (t *tracedStream) RecvMsg(m any) error {
	if err := t.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	switch r := m.(type) {
	case *pb.LeaseKeepAliveRequest:
		t.begin("lease_renew", attribute.Int64("id", r.GetID()))
	case *pb.RangeRequest:
		t.begin("range_streaming", rangeAttributes(r)[:5]...)
	case *pb.WatchRequest:
		if c := r.GetCreateRequest(); c != nil {
			t.begin("watch",
				attribute.String("key", string(c.GetKey())),
				attribute.String("range_end", string(c.GetRangeEnd())),
				attribute.Int64("start_rev", c.GetStartRevision()),
				attribute.Bool("progress_notify", c.GetProgressNotify()),
				attribute.Bool("prev_kv", c.GetPrevKv()),
				attribute.Bool("fragment", c.GetFragment()))
		}
	}
	return nil
}

// SendMsg: answers come in the order of the requests.
func (t *tracedStream) SendMsg(m any) error {
	err := t.ServerStream.SendMsg(m)
	switch r := m.(type) {
	case *pb.LeaseKeepAliveResponse:
		t.answered()
	case *pb.WatchResponse:
		if r.Created {
			t.answered()
		}
	}
	return err
}

func (t *tracedStream) begin(name string, attributes ...attribute.KeyValue) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended {
		return
	}
	_, span := t.tracer.Start(t.Context(), name, trace.WithAttributes(attributes...))
	t.open = append(t.open, span)
}

func (t *tracedStream) answered() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.open) > 0 {
		t.open[0].End()
		t.open = t.open[1:]
	}
}

func (t *tracedStream) end(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, span := range t.open {
		if err != nil {
			span.RecordError(err)
		}
		span.End()
	}
	t.open, t.ended = nil, true
}
