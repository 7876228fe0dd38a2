package backend

import (
	"encoding/binary"
	"errors"
	"fmt"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// A payload is a version and then Commands: a byte that says which, the author and the request, each with its length in
// front. Every member must make the same of it: what a member does not know it must not pass over.
const payloadVersion = 1

// Kinds of Commands in the log. A number is never given to another.
const (
	kindPut       = 1
	kindDelete    = 2
	kindTxn       = 3
	kindCompact   = 4
	kindGrant     = 5
	kindRevoke    = 6
	kindKeepAlive = 7
	kindAlarm     = 8
	kindExpire    = 9 // expireLeases; it has no request
)

// kindOf returns 0 for a request that is no Command.
func kindOf(req proto.Message) byte {
	switch req.(type) {
	case *pb.PutRequest:
		return kindPut
	case *pb.DeleteRangeRequest:
		return kindDelete
	case *pb.TxnRequest:
		return kindTxn
	case *pb.CompactionRequest:
		return kindCompact
	case *pb.LeaseGrantRequest:
		return kindGrant
	case *pb.LeaseRevokeRequest:
		return kindRevoke
	case *pb.LeaseKeepAliveRequest:
		return kindKeepAlive
	case *pb.AlarmRequest:
		return kindAlarm
	}
	return 0
}

// newRequest returns nil for a kind without a request.
func newRequest(kind byte) proto.Message {
	switch kind {
	case kindPut:
		return new(pb.PutRequest)
	case kindDelete:
		return new(pb.DeleteRangeRequest)
	case kindTxn:
		return new(pb.TxnRequest)
	case kindCompact:
		return new(pb.CompactionRequest)
	case kindGrant:
		return new(pb.LeaseGrantRequest)
	case kindRevoke:
		return new(pb.LeaseRevokeRequest)
	case kindKeepAlive:
		return new(pb.LeaseKeepAliveRequest)
	case kindAlarm:
		return new(pb.AlarmRequest)
	}
	return nil
}

// appendCommand appends one entry of the queue as a payload holds it.
func appendCommand(b []byte, p *pending) ([]byte, error) {
	if p.expire != nil {
		return append(b, kindExpire, 0, 0), nil
	}
	kind := kindOf(p.cmd.Request)
	if kind == 0 {
		return nil, fmt.Errorf("backend: no command for a %T", p.cmd.Request)
	}
	size := proto.Size(p.cmd.Request)
	if b == nil {
		b = make([]byte, 0, 1+2*binary.MaxVarintLen32+len(p.cmd.Author)+size)
	}
	b = append(b, kind)
	b = binary.AppendUvarint(b, uint64(len(p.cmd.Author)))
	b = append(b, p.cmd.Author...)
	b = binary.AppendUvarint(b, uint64(size))
	return proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(b, p.cmd.Request)
}

var (
	errNewerPayload = fmt.Errorf("%w: the log holds commands that this quire does not know: start the quire that the other members run", ErrNewerSchema)
	errBadPayload   = fmt.Errorf("%w: the log holds commands that cannot be read: replace this member", ErrDamaged)
)

// decodePayload reads what payload has put together. What it returns keeps no part of b.
func decodePayload(b []byte) (items []*pending, err error) {
	if len(b) == 0 {
		return nil, nil
	}
	if b[0] != payloadVersion {
		return nil, errNewerPayload
	}
	for b = b[1:]; len(b) > 0; {
		kind := b[0]
		var author, request []byte
		if author, b, err = cutBytes(b[1:]); err == nil {
			request, b, err = cutBytes(b)
		}
		if err != nil {
			return nil, errors.Join(errBadPayload, err)
		}
		if kind == kindExpire {
			items = append(items, &pending{expire: &expireLeases{}})
			continue
		}
		cmd := Command{Request: newRequest(kind), Author: string(author)}
		if cmd.Request == nil {
			return nil, fmt.Errorf("%w (kind %d)", errNewerPayload, kind)
		}
		if err := proto.Unmarshal(request, cmd.Request); err != nil {
			return nil, errors.Join(errBadPayload, err)
		}
		items = append(items, &pending{cmd: cmd})
	}
	return items, nil
}

// cutBytes reads a length and so many bytes.
func cutBytes(b []byte) (value, rest []byte, err error) {
	n, used := binary.Uvarint(b)
	if used <= 0 || n > uint64(len(b)-used) {
		return nil, nil, errors.New("a length does not fit")
	}
	return b[used : used+int(n)], b[used+int(n):], nil
}
