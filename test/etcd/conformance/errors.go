package conformance

import (
	"context"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/test/etcd/start"
)

var errorCases = []testCase{
	{name: "a request of up to the limit is taken, a larger one refused", run: func(x *exam) {
		const limit = 3 << 19 // 1.5 MiB
		x.put("k", strings.Repeat("v", limit-200))
		_, err := x.KV.Put(x.ctx, &pb.PutRequest{Key: []byte("k"), Value: make([]byte, limit)})
		x.wantError(err, rpctypes.ErrGRPCRequestTooLarge)
		_, err = x.KV.Txn(x.ctx, &pb.TxnRequest{Success: []*pb.RequestOp{putOp("a", strings.Repeat("v", limit/2)), putOp("b", strings.Repeat("v", limit/2))}})
		x.wantError(err, rpctypes.ErrGRPCRequestTooLarge)
		_, err = x.KV.DeleteRange(x.ctx, &pb.DeleteRangeRequest{Key: make([]byte, limit)})
		x.wantError(err, rpctypes.ErrGRPCRequestTooLarge)
		// Beyond the overhead of 512 KiB gRPC itself says no.
		_, err = x.KV.Put(x.ctx, &pb.PutRequest{Key: []byte("k"), Value: make([]byte, limit+1<<20)})
		equal(x, "the code", status.Code(err), codes.ResourceExhausted)
		if !strings.Contains(status.Convert(err).Message(), "received message larger than max") {
			x.Errorf("the error is %v", err)
		}
		equal(x, "the revision", x.revision(), 2)
		x.put("k", "")
	}},

	{name: "max-request-bytes sets another limit", options: start.Options{MaxRequestBytes: 10_000}, run: func(x *exam) {
		x.put("k", strings.Repeat("v", 9_800))
		_, err := x.KV.Put(x.ctx, &pb.PutRequest{Key: []byte("k"), Value: make([]byte, 10_001)})
		x.wantError(err, rpctypes.ErrGRPCRequestTooLarge)
	}},

	{name: "etcd's own client knows the errors again", run: func(x *exam) {
		c := x.Client(x.T)
		_, err := c.Put(x.ctx, "", "")
		equal(x, "an empty key", err, error(rpctypes.ErrEmptyKey))
		_, err = c.Put(x.ctx, "a", "", clientv3.WithLease(404))
		equal(x, "an unknown lease", err, error(rpctypes.ErrLeaseNotFound))
		_, err = c.Get(x.ctx, "a", clientv3.WithRev(404))
		equal(x, "a future revision", err, error(rpctypes.ErrFutureRev))
		_, err = c.Compact(x.ctx, 404)
		equal(x, "a future compaction", err, error(rpctypes.ErrFutureRev))
		_, err = c.KeepAliveOnce(x.ctx, 404)
		equal(x, "a keepalive of an unknown lease", err, error(rpctypes.ErrLeaseNotFound))
	}},

	{name: "a call that requires a leader is served while there is one", run: func(x *exam) {
		ctx := metadata.AppendToOutgoingContext(x.ctx, rpctypes.MetadataRequireLeaderKey, rpctypes.MetadataHasLeader)
		if _, err := x.KV.Put(ctx, &pb.PutRequest{Key: []byte("a")}); err != nil {
			x.Error(err)
		}
	}},

	{name: "a deadline that is over ends the call with DeadlineExceeded", run: func(x *exam) {
		ctx, cancel := context.WithDeadline(x.ctx, time.Now().Add(-time.Second))
		defer cancel()
		_, err := x.KV.Put(ctx, &pb.PutRequest{Key: []byte("a")})
		equal(x, "the code", status.Code(err), codes.DeadlineExceeded)
		equal(x, "the revision", x.revision(), 1)
	}},

	{name: "an unknown method is Unimplemented", run: func(x *exam) {
		err := x.Conn.Invoke(x.ctx, "/etcdserverpb.KV/NoSuchMethod", &pb.PutRequest{}, &pb.PutResponse{})
		equal(x, "the code", status.Code(err), codes.Unimplemented)
		err = x.Conn.Invoke(x.ctx, "/no.such.Service/Method", &pb.PutRequest{}, &pb.PutResponse{})
		equal(x, "the code", status.Code(err), codes.Unimplemented)
	}},
}
