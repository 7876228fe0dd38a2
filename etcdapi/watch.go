package etcdapi

import (
	"context"
	"errors"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

type watchService interface {
	watch(stream grpc.ServerStream) error
}

// watchServiceDesc is the generated descriptor with our handler: the Watcher sends messages that are already encoded.
func watchServiceDesc() *grpc.ServiceDesc {
	return &grpc.ServiceDesc{
		ServiceName: pb.Watch_ServiceDesc.ServiceName,
		HandlerType: (*watchService)(nil),
		Streams: []grpc.StreamDesc{{
			StreamName:    "Watch",
			ServerStreams: true,
			ClientStreams: true,
			Handler: func(srv any, stream grpc.ServerStream) error {
				return srv.(watchService).watch(stream)
			},
		}},
		Metadata: pb.Watch_ServiceDesc.Metadata,
	}
}

type watchServer struct{ s *Server }

// watch hands the stream to the Watcher. The checks of a watch are answers on the stream (created and canceled at
// once), so they are the Watcher's.
func (w *watchServer) watch(stream grpc.ServerStream) error {
	ctx, cancel := w.s.streamContext(stream.Context())
	defer cancel()

	err := w.s.opts.Watcher.Serve(ctx, receiver[pb.WatchRequest](ctx, stream), stream.SendMsg)
	if ctx.Err() != nil {
		err = streamEnd(ctx) // whatever failed, failed because of this
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled) || status.Code(err) == codes.Canceled:
		return rpctypes.ErrGRPCWatchCanceled
	}
	w.s.metrics.streamFailed(ctx, "watch")
	return toStatus(err)
}

// receiver reads the stream's requests in a goroutine of its own, which ends when the handler has returned. The
// function it hands back returns when ctx is done even though the client says nothing: RecvMsg itself would block
// until the handler returns, and the handler would wait for it.
func receiver[Req any](ctx context.Context, stream grpc.ServerStream) func() (*Req, error) {
	type received struct {
		req *Req
		err error
	}
	next := make(chan received)
	go func() {
		for {
			req := new(Req)
			err := stream.RecvMsg(req)
			select {
			case next <- received{req, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	var ended error // what RecvMsg said last, if it was an error: asked again, it is said again
	return func() (*Req, error) {
		if ended != nil {
			return nil, ended
		}
		select {
		case r := <-next:
			if r.err != nil {
				ended = r.err
				return nil, r.err
			}
			return r.req, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
