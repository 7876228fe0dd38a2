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

// statusOf is the one table from what backend and cluster say to what etcd's clients understand. The first entry that
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
	// who asks
	{backend.ErrRootUserNotExist, rpctypes.ErrGRPCRootUserNotExist},
	{backend.ErrRootRoleNotExist, rpctypes.ErrGRPCRootRoleNotExist},
	{backend.ErrUserExists, rpctypes.ErrGRPCUserAlreadyExist},
	{backend.ErrUserEmpty, rpctypes.ErrGRPCUserEmpty},
	{backend.ErrUserNotFound, rpctypes.ErrGRPCUserNotFound},
	{backend.ErrRoleExists, rpctypes.ErrGRPCRoleAlreadyExist},
	{backend.ErrRoleNotFound, rpctypes.ErrGRPCRoleNotFound},
	{backend.ErrRoleEmpty, rpctypes.ErrGRPCRoleEmpty},
	{backend.ErrAuthFailed, rpctypes.ErrGRPCAuthFailed},
	{backend.ErrPermissionNotGiven, rpctypes.ErrGRPCPermissionNotGiven},
	{backend.ErrPermissionDenied, rpctypes.ErrGRPCPermissionDenied},
	{backend.ErrRoleNotGranted, rpctypes.ErrGRPCRoleNotGranted},
	{backend.ErrPermissionNotGranted, rpctypes.ErrGRPCPermissionNotGranted},
	{backend.ErrAuthNotEnabled, rpctypes.ErrGRPCAuthNotEnabled},
	{backend.ErrInvalidAuthMgmt, rpctypes.ErrGRPCInvalidAuthMgmt},
	{backend.ErrAuthOldRevision, rpctypes.ErrGRPCAuthOldRevision},
	// etcd has no code for this one.
	{backend.ErrNoPasswordUser, status.Error(codes.Unknown, "auth: authentication failed, password was given for no password user")},
	// what the store cannot do now; a full disk is the same to a client as a full quota: nothing was written, make room
	{backend.ErrNoSpace, rpctypes.ErrGRPCNoSpace},
	{backend.ErrDiskFull, rpctypes.ErrGRPCNoSpace},
	{backend.ErrCorrupt, rpctypes.ErrGRPCCorrupt},
	{backend.ErrDamaged, rpctypes.ErrGRPCCorrupt},
	{backend.ErrClosed, rpctypes.ErrGRPCStopped},
	// etcd maps this one of the cluster's errors to its client's form of it, which grpc knows no code for.
	{rpctypes.ErrGRPCMemberNotEnoughStarted, status.Error(codes.Unknown, rpctypes.ErrorDesc(rpctypes.ErrGRPCMemberNotEnoughStarted))},
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
	// Clients know etcd's errors by their texts: whatever wraps a status is taken off.
	var st interface{ GRPCStatus() *status.Status }
	if errors.As(err, &st) {
		return st.GRPCStatus().Err()
	}
	return status.Error(codes.Unknown, err.Error())
}
