package etcdapi

import (
	"context"
	"errors"
	"fmt"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/backend"
)

// statusOf is the one table from what the backend says to what etcd's clients understand. The first entry that
// errors.Is matches decides, so an error that wraps two is answered by the more specific one, which stands first.
var statusOf = []struct {
	err    error
	status error
}{
	// what the client asked for
	{backend.ErrCompacted, rpctypes.ErrGRPCCompacted},
	{backend.ErrFutureRev, rpctypes.ErrGRPCFutureRev},
	{backend.ErrDuplicateKey, rpctypes.ErrGRPCDuplicateKey},
	{backend.ErrKeyNotFound, rpctypes.ErrGRPCKeyNotFound},
	{backend.ErrLeaseNotFound, rpctypes.ErrGRPCLeaseNotFound},
	{backend.ErrLeaseExists, rpctypes.ErrGRPCLeaseExist},
	{backend.ErrLeaseTTLTooLarge, rpctypes.ErrGRPCLeaseTTLTooLarge},
	// what the store cannot do now; a full disk is the same to a client as a full quota: nothing was written, make room
	{backend.ErrNoSpace, rpctypes.ErrGRPCNoSpace},
	{backend.ErrDiskFull, rpctypes.ErrGRPCNoSpace},
	{backend.ErrCorrupt, rpctypes.ErrGRPCCorrupt},
	{backend.ErrDamaged, rpctypes.ErrGRPCCorrupt},
	{backend.ErrClosed, rpctypes.ErrGRPCStopped},
}

// toStatus turns err into what a gRPC handler returns. Errors that already are a status, and those of the
// context (grpc makes them Canceled and DeadlineExceeded, as etcd lets it), stay as they are.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	for _, e := range statusOf {
		if errors.Is(err, e.err) {
			return e.status
		}
	}
	if errors.Is(err, backend.ErrStorage) {
		return status.Error(codes.Unavailable, fmt.Sprintf("etcdserver: the storage failed, a write may or may not have been kept: %v", err))
	}
	if errors.Is(err, backend.ErrUnavailable) || errors.Is(err, backend.ErrHistoryLost) || errors.Is(err, backend.ErrNewerSchema) {
		return status.Error(codes.Unavailable, fmt.Sprintf("etcdserver: nothing was changed: %v", err))
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(codes.Unknown, err.Error())
}
