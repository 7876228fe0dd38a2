package etcdapi

import (
	"context"
	"errors"
	"io"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/backend"
)

type leaseServer struct {
	s                    *Server
	pb.UnsafeLeaseServer // a new method of the service must break the build
}

// LeaseGrant grants a lease. Where the client leaves the id to the server, the backend draws it.
func (l *leaseServer) LeaseGrant(ctx context.Context, req *pb.LeaseGrantRequest) (*pb.LeaseGrantResponse, error) {
	resp, err := write[*pb.LeaseGrantResponse](ctx, l.s, "LeaseGrant", req)
	if err != nil {
		return nil, err
	}
	resp.Header = l.s.header(resp.Header)
	return resp, nil
}

func (l *leaseServer) LeaseRevoke(ctx context.Context, req *pb.LeaseRevokeRequest) (*pb.LeaseRevokeResponse, error) {
	resp, err := write[*pb.LeaseRevokeResponse](ctx, l.s, "LeaseRevoke", req)
	if err != nil {
		return nil, err
	}
	resp.Header = l.s.header(resp.Header)
	return resp, nil
}

// LeaseTimeToLive answers TTL -1 for a lease that does not exist or has expired (rpc.proto).
func (l *leaseServer) LeaseTimeToLive(ctx context.Context, req *pb.LeaseTimeToLiveRequest) (*pb.LeaseTimeToLiveResponse, error) {
	if err := l.s.ready(ctx, false); err != nil {
		return nil, toStatus(err)
	}
	status, ok := l.s.opts.Backend.Lease(req.ID, req.Keys)
	err := l.s.permit(ctx, l.s.opts.Backend.Auth(), func(a *backend.Auth, who backend.Caller) error {
		return a.CheckLeaseRead(who, status.Keys)
	})
	if err != nil {
		return nil, toStatus(err)
	}
	resp := &pb.LeaseTimeToLiveResponse{Header: l.s.header(nil), ID: req.ID, TTL: -1}
	if ok {
		resp.TTL, resp.GrantedTTL = status.TTL, status.GrantedTTL
		if req.Keys {
			resp.Keys = status.Keys
		}
	}
	return resp, nil
}

func (l *leaseServer) LeaseLeases(ctx context.Context, _ *pb.LeaseLeasesRequest) (*pb.LeaseLeasesResponse, error) {
	if err := l.s.ready(ctx, false); err != nil {
		return nil, toStatus(err)
	}
	ids := l.s.opts.Backend.Leases()
	if err := l.s.permit(ctx, l.s.opts.Backend.Auth(), l.readable(ids)); err != nil {
		return nil, toStatus(err)
	}
	resp := &pb.LeaseLeasesResponse{Header: l.s.header(nil), Leases: make([]*pb.LeaseStatus, len(ids))}
	for i, id := range ids {
		resp.Leases[i] = &pb.LeaseStatus{ID: id}
	}
	return resp, nil
}

// readable allows to see leases to whom may read all keys that hang on them.
func (l *leaseServer) readable(ids []int64) func(*backend.Auth, backend.Caller) error {
	return func(a *backend.Auth, who backend.Caller) error {
		if err := a.CheckAdmin(who); err == nil {
			return nil
		}
		for _, id := range ids {
			status, _ := l.s.opts.Backend.Lease(id, true)
			if err := a.CheckLeaseRead(who, status.Keys); err != nil {
				return err
			}
		}
		return a.CheckKnown(who)
	}
}

// LeaseKeepAlive renews leases in the order asked, one answer each. A lease that does not exist is answered with
// TTL 0; the stream goes on.
func (l *leaseServer) LeaseKeepAlive(stream pb.Lease_LeaseKeepAliveServer) error {
	ctx, cancel := l.s.streamContext(stream.Context())
	defer cancel()
	recv := receiver[pb.LeaseKeepAliveRequest](ctx, stream)
	for {
		req, err := recv()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case ctx.Err() != nil:
			return streamEnd(ctx)
		case err != nil:
			l.s.metrics.streamFailed(ctx, "lease-keepalive")
			return err
		}
		resp, err := l.keepAlive(ctx, req)
		if err != nil {
			if ctx.Err() != nil {
				return streamEnd(ctx)
			}
			return err
		}
		if err := stream.Send(resp); err != nil {
			l.s.metrics.streamFailed(ctx, "lease-keepalive")
			return err
		}
	}
}

func (l *leaseServer) keepAlive(ctx context.Context, req *pb.LeaseKeepAliveRequest) (*pb.LeaseKeepAliveResponse, error) {
	// The header is of before the renewal, as in etcd: else a client could see a renewal succeed at a revision
	// after the one at which the lease was revoked.
	header := l.s.header(nil)
	resp, err := write[*pb.LeaseKeepAliveResponse](ctx, l.s, "LeaseKeepAlive", req)
	switch {
	case errors.Is(err, toStatus(backend.ErrLeaseNotFound)):
		return &pb.LeaseKeepAliveResponse{Header: header, ID: req.ID}, nil
	case err != nil:
		return nil, err
	}
	l.s.metrics.leasesRenewed.Inc()
	return &pb.LeaseKeepAliveResponse{Header: header, ID: req.ID, TTL: resp.TTL}, nil
}
