package main

import (
	"context"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// The load generator shares the machine with the server, so it decodes no more than it needs: requests and answers are
// bytes, and only the fields in question are looked at. All servers are driven by the same code.

// Full names of the methods in use.
const (
	methodPut     = "/etcdserverpb.KV/Put"
	methodTxn     = "/etcdserverpb.KV/Txn"
	methodRange   = "/etcdserverpb.KV/Range"
	methodCompact = "/etcdserverpb.KV/Compact"
	methodWatch   = "/etcdserverpb.Watch/Watch"
	methodGrant   = "/etcdserverpb.Lease/LeaseGrant"
	methodStatus  = "/etcdserverpb.Maintenance/Status"
)

// bytesCodec passes *[]byte through: requests as they are, answers into the given buffer, which is reused.
type bytesCodec struct{}

func (bytesCodec) Name() string { return "proto" }

func (bytesCodec) Marshal(v any) (mem.BufferSlice, error) {
	b, ok := v.(*[]byte)
	if !ok {
		return nil, fmt.Errorf("cannot send a %T", v)
	}
	return mem.BufferSlice{mem.SliceBuffer(*b)}, nil
}

func (bytesCodec) Unmarshal(data mem.BufferSlice, v any) error {
	b, ok := v.(*[]byte)
	if !ok {
		return fmt.Errorf("cannot receive into a %T", v)
	}
	n := data.Len()
	if cap(*b) < n {
		*b = make([]byte, n)
	}
	*b = (*b)[:n]
	data.CopyTo(*b)
	return nil
}

// dial opens n connections: one alone would serialize all clients in its HTTP/2 loops, one for each client is not what
// an apiserver does.
func dial(addr string, n int) ([]*grpc.ClientConn, error) {
	conns := make([]*grpc.ClientConn, n)
	for i := range conns {
		c, err := grpc.NewClient("passthrough:///"+addr,
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.ForceCodecV2(bytesCodec{}), grpc.MaxCallRecvMsgSize(1<<30)))
		if err != nil {
			return nil, err
		}
		conns[i] = c
	}
	return conns, nil
}

// call sends one unary request. The answer is in *answer, valid until it is used for the next call.
func call(ctx context.Context, c *grpc.ClientConn, method string, request []byte, answer *[]byte) error {
	return c.Invoke(ctx, method, &request, answer)
}

// callProto is call for requests that need not be cheap.
func callProto(ctx context.Context, c *grpc.ClientConn, method string, request, answer proto.Message) error {
	in, err := proto.Marshal(request)
	if err != nil {
		return err
	}
	var out []byte
	if err := call(ctx, c, method, in, &out); err != nil {
		return err
	}
	return proto.Unmarshal(out, answer)
}

// Field numbers of etcd's messages (api/v3/etcdserverpb/rpc.proto, mvccpb/kv.proto).
const (
	fieldHeader         = 1 // of every answer
	fieldHeaderRevision = 3
	fieldRangeKVs       = 2
	fieldTxnSucceeded   = 2
	fieldWatchCreated   = 3
	fieldWatchCanceled  = 4
	fieldWatchEvents    = 11
	fieldEventKV        = 2
	fieldKVKey          = 1
	fieldKVModRevision  = 3
)

// fields calls f with each field of a message: number, value of a varint, bytes of a length-delimited one.
func fields(message []byte, f func(num protowire.Number, varint uint64, bytes []byte)) error {
	for len(message) > 0 {
		num, typ, n := protowire.ConsumeTag(message)
		if n < 0 {
			return protowire.ParseError(n)
		}
		message = message[n:]
		switch typ {
		case protowire.VarintType:
			v, n := protowire.ConsumeVarint(message)
			if n < 0 {
				return protowire.ParseError(n)
			}
			f(num, v, nil)
			message = message[n:]
		case protowire.BytesType:
			b, n := protowire.ConsumeBytes(message)
			if n < 0 {
				return protowire.ParseError(n)
			}
			f(num, 0, b)
			message = message[n:]
		default:
			n := protowire.ConsumeFieldValue(num, typ, message)
			if n < 0 {
				return protowire.ParseError(n)
			}
			message = message[n:]
		}
	}
	return nil
}

// revisionOf reads header.revision of an answer.
func revisionOf(answer []byte) (int64, error) {
	var rev int64
	var inner error
	err := fields(answer, func(num protowire.Number, _ uint64, b []byte) {
		if num == fieldHeader {
			inner = fields(b, func(num protowire.Number, v uint64, _ []byte) {
				if num == fieldHeaderRevision {
					rev = int64(v)
				}
			})
		}
	})
	if err == nil {
		err = inner
	}
	return rev, err
}

// countKVs is the number of key-values in a RangeResponse.
func countKVs(answer []byte) (int, error) {
	n := 0
	err := fields(answer, func(num protowire.Number, _ uint64, _ []byte) {
		if num == fieldRangeKVs {
			n++
		}
	})
	return n, err
}

// succeeded reads TxnResponse.succeeded.
func succeeded(answer []byte) (bool, error) {
	ok := false
	err := fields(answer, func(num protowire.Number, v uint64, _ []byte) {
		if num == fieldTxnSucceeded {
			ok = v != 0
		}
	})
	return ok, err
}
