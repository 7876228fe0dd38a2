package main

import (
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// answerWith starts a gRPC server that answers every request in the same way.
func answerWith(t *testing.T, answer []byte, err error) (addr string) {
	t.Helper()
	l, listenErr := net.Listen("tcp", "127.0.0.1:0")
	if listenErr != nil {
		t.Fatal(listenErr)
	}
	s := grpc.NewServer(grpc.ForceServerCodecV2(bytesCodec{}), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		var request []byte
		if err := stream.RecvMsg(&request); err != nil {
			return err
		}
		if string(request) != "the request" {
			return status.Errorf(codes.InvalidArgument, "the request is %q", request)
		}
		if err != nil {
			return err
		}
		return stream.SendMsg(&answer)
	}))
	go s.Serve(l)
	t.Cleanup(s.Stop)
	return l.Addr().String()
}

func TestRawCallStopsAtTheWindowAndReadsOn(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	const size = 1 << 20
	c, err := startRawCall(ctx, answerWith(t, make([]byte, size), nil), "/any/Method", []byte("the request"))
	if err != nil {
		t.Fatal(err)
	}
	if whole, err := c.readWindow(); whole || err != nil || c.received != rawWindow {
		t.Errorf("the first window: whole %v, %d bytes, %v", whole, c.received, err)
	}
	if n, err := c.readAll(); n != size || err != nil {
		t.Errorf("an answer of %d bytes was read as %d, %v", size, n, err)
	}
}

func TestRawCallReportsTheServersError(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := startRawCall(ctx, answerWith(t, nil, status.Error(codes.Unavailable, "come back later")), "/any/Method", []byte("the request"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.readAll(); err == nil || !strings.Contains(err.Error(), "come back later") {
		t.Errorf("the call ended with %v", err)
	}
}

// canned is a stream of answers that were written before.
type canned struct {
	grpc.ClientStream
	answers [][]byte
}

func (c *canned) RecvMsg(m any) error {
	if len(c.answers) == 0 {
		return io.EOF
	}
	*m.(*[]byte), c.answers = c.answers[0], c.answers[1:]
	return nil
}

func TestResumedWatchMustHaveNoGap(t *testing.T) {
	events := func(revs ...int64) []byte {
		r := &pb.WatchResponse{}
		for _, rev := range revs {
			r.Events = append(r.Events, &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte("k"), ModRevision: rev}})
		}
		b, err := proto.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, c := range []struct {
		answers [][]byte
		wrong   string
	}{
		{[][]byte{events(8, 9), events(10)}, ""},
		{[][]byte{events(8), events(10)}, "revision 10 where 9 was due"},
		{[][]byte{events(8, 8)}, "revision 8 where 9 was due"},
		{[][]byte{events(8)}, "EOF"},
	} {
		err := resume(&watchStream{ClientStream: &canned{answers: c.answers}}, 7, 3)
		if (err == nil) != (c.wrong == "") || err != nil && !strings.Contains(err.Error(), c.wrong) {
			t.Errorf("expected %q, got %v", c.wrong, err)
		}
	}
}
