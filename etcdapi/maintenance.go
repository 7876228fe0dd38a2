package etcdapi

import (
	"context"
	"fmt"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// maintenanceServer: Snapshot and Downgrade have files of their own.
type maintenanceServer struct {
	s                          *Server
	pb.UnsafeMaintenanceServer // a new method of the service must break the build
}

// Status describes this member.
func (m *maintenanceServer) Status(context.Context, *pb.StatusRequest) (*pb.StatusResponse, error) {
	stats := m.s.opts.Backend.Stats()
	raft := m.s.status(&stats)
	resp := &pb.StatusResponse{
		Header:           m.s.header(nil),
		Version:          m.s.version.Server,
		DbSize:           stats.DBSize,
		DbSizeInUse:      stats.DBSizeInUse,
		DbSizeQuota:      stats.Quota,
		Leader:           raft.Leader,
		RaftIndex:        raft.Committed,
		RaftAppliedIndex: raft.Applied,
		RaftTerm:         raft.Term,
		IsLearner:        raft.Learner,
		StorageVersion:   m.s.version.Storage,
		DowngradeInfo:    &pb.DowngradeInfo{},
	}
	if raft.Leader == 0 {
		resp.Errors = append(resp.Errors, "etcdserver: no leader")
	}
	for _, a := range m.s.opts.Backend.Alarms() {
		resp.Errors = append(resp.Errors, a.String())
	}
	return resp, nil
}

// MoveLeader answers once the other member leads; only the leader can do it, as in etcd.
func (m *maintenanceServer) MoveLeader(ctx context.Context, req *pb.MoveLeaderRequest) (*pb.MoveLeaderResponse, error) {
	if raft := m.s.cluster.Status(); raft.Leader != raft.ID {
		return nil, rpctypes.ErrGRPCNotLeader
	}
	if err := m.s.cluster.MoveLeader(ctx, req.TargetID); err != nil {
		return nil, toStatus(err)
	}
	return &pb.MoveLeaderResponse{}, nil
}

// Defragment answers when it is done. It goes on when the client does not wait for it any longer, as etcd's does.
func (m *maintenanceServer) Defragment(ctx context.Context, _ *pb.DefragmentRequest) (_ *pb.DefragmentResponse, err error) {
	metrics := &m.s.metrics.maintenance
	metrics.defragInflight.Inc()
	defer metrics.defragInflight.Dec()
	defer measure(metrics.defrag, time.Now(), &err)
	ctx, cancel := m.s.streamContext(context.WithoutCancel(ctx))
	defer cancel()
	hook := m.s.opts.Hooks.Defragment
	if hook == nil {
		hook = func(bool, error) {}
	}
	hook(false, nil)
	err = m.s.opts.Backend.Defragment(ctx)
	hook(true, err)
	if ctx.Err() != nil {
		err = streamEnd(ctx)
	}
	if err != nil {
		return nil, toStatus(err)
	}
	return &pb.DefragmentResponse{}, nil
}

// Alarm lists (GET: those of the kind asked for, NONE: all), raises or clears alarms.
func (m *maintenanceServer) Alarm(ctx context.Context, req *pb.AlarmRequest) (*pb.AlarmResponse, error) {
	switch req.Action {
	case pb.AlarmRequest_GET:
		// etcd asks its leader.
		if err := m.s.ready(ctx, false); err != nil {
			return nil, toStatus(err)
		}
		resp := &pb.AlarmResponse{Header: m.s.header(nil)}
		for _, a := range m.s.opts.Backend.Alarms() {
			if req.Alarm == pb.AlarmType_NONE || req.Alarm == a.Alarm {
				resp.Alarms = append(resp.Alarms, a)
			}
		}
		return resp, nil
	case pb.AlarmRequest_ACTIVATE, pb.AlarmRequest_DEACTIVATE:
		resp, err := write[*pb.AlarmResponse](ctx, m.s, "Alarm", req)
		if err != nil {
			return nil, err
		}
		resp.Header = m.s.header(resp.Header)
		return resp, nil
	}
	return nil, status.Error(codes.InvalidArgument, fmt.Sprintf("etcdserver: unknown alarm action %d; use GET, ACTIVATE or DEACTIVATE", req.Action))
}

// HashKV answers with etcd's hash of the history up to a revision; it is that of this member, whatever the others have.
func (m *maintenanceServer) HashKV(ctx context.Context, req *pb.HashKVRequest) (_ *pb.HashKVResponse, err error) {
	defer measure(m.s.metrics.maintenance.hashRev, time.Now(), &err)
	if err := m.s.ready(ctx, true); err != nil {
		return nil, toStatus(err)
	}
	h, err := m.s.opts.Backend.HashKV(ctx, req.Revision)
	if err != nil {
		return nil, toStatus(err)
	}
	return &pb.HashKVResponse{
		Header:          m.s.header(&pb.ResponseHeader{Revision: h.Head}),
		Hash:            h.Hash,
		CompactRevision: h.CompactRevision,
		HashRevision:    h.Revision,
	}, nil
}

// Hash answers with a hash of all that this member holds. It can be compared with that of another quire, not with that of
// an etcd, which hashes its file.
func (m *maintenanceServer) Hash(ctx context.Context, _ *pb.HashRequest) (_ *pb.HashResponse, err error) {
	defer measure(m.s.metrics.maintenance.hash, time.Now(), &err)
	if err := m.s.ready(ctx, true); err != nil {
		return nil, toStatus(err)
	}
	hash, rev, err := m.s.opts.Backend.Hash(ctx)
	if err != nil {
		return nil, toStatus(err)
	}
	return &pb.HashResponse{Header: m.s.header(&pb.ResponseHeader{Revision: rev}), Hash: hash}, nil
}
