package etcdapi

import (
	"context"
	"errors"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
)

// errSessionExpired has etcd's text (concurrency.ErrSessionExpired).
var errSessionExpired = errors.New("mutex: session is expired")

type lockServer struct {
	s                         *Server
	v3lockpb.UnsafeLockServer // a new method of the service must break the build
}

// Lock answers once the caller has the lock, with the key that is deleted to unlock it. The lock is lost with the lease; whose
// lease ends while he waits gets an error. The same lease locks the same name once.
func (l *lockServer) Lock(ctx context.Context, req *v3lockpb.LockRequest) (*v3lockpb.LockResponse, error) {
	ctx, cancel := l.s.streamContext(ctx) // it may take as long as a stream
	defer cancel()
	resp, err := l.lock(ctx, req)
	if err != nil && ctx.Err() != nil {
		return nil, streamEnd(ctx)
	}
	return resp, asOfClient(err)
}

func (l *lockServer) lock(ctx context.Context, req *v3lockpb.LockRequest) (*v3lockpb.LockResponse, error) {
	lease, err := l.s.session(ctx, req.Lease)
	if err != nil {
		return nil, err
	}
	q := &queue{s: l.s, prefix: string(req.Name) + "/"}
	p, err := q.enter(ctx, lease, nil)
	if err != nil {
		return nil, err
	}
	if p.first {
		return &v3lockpb.LockResponse{Header: p.header, Key: []byte(p.key)}, nil
	}
	header, held, err := q.wait(ctx, p)
	switch {
	case err != nil:
		q.leave(ctx, p)
		return nil, err
	case !held: // its lease has ended meanwhile, or somebody has unlocked it
		return nil, errSessionExpired
	}
	return &v3lockpb.LockResponse{Header: header, Key: []byte(p.key)}, nil
}

// Unlock deletes the key; it does not matter whether it is there.
func (l *lockServer) Unlock(ctx context.Context, req *v3lockpb.UnlockRequest) (*v3lockpb.UnlockResponse, error) {
	resp, err := (&kvServer{s: l.s}).DeleteRange(ctx, &pb.DeleteRangeRequest{Key: req.Key})
	if err != nil {
		return nil, asOfClient(err)
	}
	return &v3lockpb.UnlockResponse{Header: resp.Header}, nil
}
