package etcdapi

import (
	"context"
	"errors"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

// However many passwords are sent, some CPU is left: who waits for a turn gets none once they have gone.
func TestPasswordsAreHashedInTurn(t *testing.T) {
	f := newFakeStore()
	f.onWrite = func(backend.Command) (proto.Message, error) {
		return &pb.AuthUserAddResponse{Header: &pb.ResponseHeader{}}, nil
	}
	a := newAuthServer(newTestServer(t, f, func(o *Options) { o.BcryptCost = 4 }))
	for range cap(a.hashing) {
		a.hashing <- struct{}{}
	}
	req := &pb.AuthUserAddRequest{Name: "ann", Password: "secret"}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := a.UserAdd(ctx, req); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while others have all turns: %v", err)
	}
	<-a.hashing
	if _, err := a.UserAdd(t.Context(), req); err != nil {
		t.Error(err)
	}
	if len(f.commands) != 1 || len(a.hashing) != cap(a.hashing)-1 {
		t.Errorf("%d commands, want 1; %d of %d turns are taken, want all but one", len(f.commands), len(a.hashing), cap(a.hashing))
	}
}
