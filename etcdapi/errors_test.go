package etcdapi

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/backend"
)

func TestBackendErrorsBecomeEtcdsAlsoWhenWrapped(t *testing.T) {
	for _, c := range []struct {
		err  error
		want error
		code codes.Code
	}{
		{backend.ErrCompacted, rpctypes.ErrGRPCCompacted, codes.OutOfRange},
		{&backend.CompactedError{CompactRevision: 7}, rpctypes.ErrGRPCCompacted, codes.OutOfRange},
		{backend.ErrFutureRev, rpctypes.ErrGRPCFutureRev, codes.OutOfRange},
		{backend.ErrKeyNotFound, rpctypes.ErrGRPCKeyNotFound, codes.InvalidArgument},
		{backend.ErrLeaseNotFound, rpctypes.ErrGRPCLeaseNotFound, codes.NotFound},
		{backend.ErrLeaseExists, rpctypes.ErrGRPCLeaseExist, codes.FailedPrecondition},
		{backend.ErrLeaseTTLTooLarge, rpctypes.ErrGRPCLeaseTTLTooLarge, codes.OutOfRange},
		{backend.ErrNoSpace, rpctypes.ErrGRPCNoSpace, codes.ResourceExhausted},
		{backend.ErrDiskFull, rpctypes.ErrGRPCNoSpace, codes.ResourceExhausted},
		{errors.Join(backend.ErrStorage, backend.ErrDiskFull), rpctypes.ErrGRPCNoSpace, codes.ResourceExhausted},
		{backend.ErrCorrupt, rpctypes.ErrGRPCCorrupt, codes.DataLoss},
		{backend.ErrDamaged, rpctypes.ErrGRPCCorrupt, codes.DataLoss},
		{backend.ErrClosed, rpctypes.ErrGRPCStopped, codes.Unavailable},
		{errors.Join(backend.ErrStorage, backend.ErrClosed), rpctypes.ErrGRPCStopped, codes.Unavailable},
	} {
		for _, err := range []error{c.err, fmt.Errorf("commit batch 7: %w", fmt.Errorf("rows: %w", c.err))} {
			got := toStatus(err)
			checkErr(t, err.Error(), got, c.want)
			if status.Code(got) != c.code {
				t.Errorf("%v: code %v, want %v", err, status.Code(got), c.code)
			}
		}
	}
}

func TestStorageFailureIsUnavailableAndTellsTheCause(t *testing.T) {
	err := toStatus(fmt.Errorf("%w: disk I/O error", backend.ErrStorage))
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "disk I/O error") {
		t.Errorf("got %v", err)
	}
}

func TestContextErrorsAreLeftToGRPC(t *testing.T) {
	for want, err := range map[codes.Code]error{codes.Canceled: context.Canceled, codes.DeadlineExceeded: context.DeadlineExceeded} {
		err = fmt.Errorf("waiting for the batch: %w", err)
		if got := status.Code(status.FromContextError(toStatus(err)).Err()); got != want {
			t.Errorf("%v becomes %v, want %v", err, got, want)
		}
	}
}

func TestOtherErrorsAreUnknownAndStatusesStay(t *testing.T) {
	checkErr(t, "nil", toStatus(nil), nil)
	checkErr(t, "status", toStatus(rpctypes.ErrGRPCEmptyKey), rpctypes.ErrGRPCEmptyKey)
	if got := toStatus(errors.New("odd")); status.Code(got) != codes.Unknown {
		t.Errorf("got %v", got)
	}
}
