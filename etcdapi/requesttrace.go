package etcdapi

import (
	"context"
	"fmt"
	"strings"

	"golang.org/x/net/trace"
	"google.golang.org/grpc"
)

// The pages /debug/requests and /debug/events show calls under the names that grpc itself gives them. Its own tracing is
// left off: it shows whole messages, with values and passwords.

// traceUnary is an interceptor for --log-level=debug.
func traceUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	t := newRequestTrace(info.FullMethod)
	defer t.Finish()
	t.LazyPrintf("%s", fmt.Sprintf("request:<%s> request_size:%d", loggable(req), messageSize(req)))
	resp, err := handler(ctx, req)
	finishTrace(t, err)
	return resp, err
}

// traceStream is traceUnary for streams, of which it shows that they are there, and how they ended.
func traceStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	t := newRequestTrace(info.FullMethod)
	defer t.Finish()
	err := handler(srv, stream)
	finishTrace(t, err)
	return err
}

func newRequestTrace(method string) trace.Trace {
	service, _, _ := strings.Cut(strings.TrimPrefix(method, "/"), "/")
	return trace.New("grpc.Recv."+service, method)
}

func finishTrace(t trace.Trace, err error) {
	if err != nil {
		t.LazyPrintf("%s", fmt.Sprint(err))
		t.SetError()
	}
}
