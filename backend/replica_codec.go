package backend

import (
	"encoding/binary"
	"errors"
	"fmt"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// A payload is a version and then Commands: a byte that says which, the auth revision if there is one, the author and the
// request, each with its length in front. Every member must make the same of it: what a member does not know it must not pass over.
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

	kindAuthEnable           = 10
	kindAuthDisable          = 11
	kindAuthenticate         = 12
	kindUserAdd              = 13
	kindUserDelete           = 14
	kindUserChangePassword   = 15
	kindUserGrantRole        = 16
	kindUserRevokeRole       = 17
	kindRoleAdd              = 18
	kindRoleDelete           = 19
	kindRoleGrantPermission  = 20
	kindRoleRevokePermission = 21

	// authenticated is added to the kind of a Command that has an auth revision, which follows.
	authenticated = 0x80
)

// requests are the Commands with a request.
var requests = map[byte]proto.Message{
	kindPut:                  (*pb.PutRequest)(nil),
	kindDelete:               (*pb.DeleteRangeRequest)(nil),
	kindTxn:                  (*pb.TxnRequest)(nil),
	kindCompact:              (*pb.CompactionRequest)(nil),
	kindGrant:                (*pb.LeaseGrantRequest)(nil),
	kindRevoke:               (*pb.LeaseRevokeRequest)(nil),
	kindKeepAlive:            (*pb.LeaseKeepAliveRequest)(nil),
	kindAlarm:                (*pb.AlarmRequest)(nil),
	kindAuthEnable:           (*pb.AuthEnableRequest)(nil),
	kindAuthDisable:          (*pb.AuthDisableRequest)(nil),
	kindAuthenticate:         (*pb.InternalAuthenticateRequest)(nil),
	kindUserAdd:              (*pb.AuthUserAddRequest)(nil),
	kindUserDelete:           (*pb.AuthUserDeleteRequest)(nil),
	kindUserChangePassword:   (*pb.AuthUserChangePasswordRequest)(nil),
	kindUserGrantRole:        (*pb.AuthUserGrantRoleRequest)(nil),
	kindUserRevokeRole:       (*pb.AuthUserRevokeRoleRequest)(nil),
	kindRoleAdd:              (*pb.AuthRoleAddRequest)(nil),
	kindRoleDelete:           (*pb.AuthRoleDeleteRequest)(nil),
	kindRoleGrantPermission:  (*pb.AuthRoleGrantPermissionRequest)(nil),
	kindRoleRevokePermission: (*pb.AuthRoleRevokePermissionRequest)(nil),
}

var kinds = func() map[protoreflect.FullName]byte {
	kinds := make(map[protoreflect.FullName]byte, len(requests))
	for kind, m := range requests {
		kinds[m.ProtoReflect().Descriptor().FullName()] = kind
	}
	return kinds
}()

// kindOf returns 0 for a request that is no Command.
func kindOf(req proto.Message) byte { return kinds[req.ProtoReflect().Descriptor().FullName()] }

// newRequest returns nil for a kind without a request.
func newRequest(kind byte) proto.Message {
	if m := requests[kind]; m != nil {
		return m.ProtoReflect().New().Interface()
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
		b = make([]byte, 0, 1+binary.MaxVarintLen64+2*binary.MaxVarintLen32+len(p.cmd.Author)+size)
	}
	if p.cmd.AuthRevision != 0 {
		b = binary.AppendUvarint(append(b, kind|authenticated), p.cmd.AuthRevision)
	} else {
		b = append(b, kind)
	}
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
		b = b[1:]
		var revision uint64
		if kind&authenticated != 0 {
			kind -= authenticated
			var used int
			if revision, used = binary.Uvarint(b); used <= 0 {
				return nil, fmt.Errorf("%w: an auth revision does not fit", errBadPayload)
			}
			b = b[used:]
		}
		var author, request []byte
		if author, b, err = cutBytes(b); err == nil {
			request, b, err = cutBytes(b)
		}
		if err != nil {
			return nil, errors.Join(errBadPayload, err)
		}
		if kind == kindExpire {
			items = append(items, &pending{expire: &expireLeases{}})
			continue
		}
		cmd := Command{Request: newRequest(kind), Author: string(author), AuthRevision: revision}
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
