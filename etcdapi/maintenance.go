package etcdapi

import (
	"context"
	"fmt"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// maintenanceServer has Status and Alarm; the other methods answer Unimplemented.
type maintenanceServer struct {
	s *Server
	pb.UnimplementedMaintenanceServer
}

// Status describes this member. The applied index stands for etcd's Raft indexes: a command that is applied here is
// committed, and none is committed that is not applied.
func (m *maintenanceServer) Status(context.Context, *pb.StatusRequest) (*pb.StatusResponse, error) {
	header := m.s.header(nil)
	stats := m.s.opts.Backend.Stats()
	resp := &pb.StatusResponse{
		Header:           header,
		Version:          m.s.version.Server,
		DbSize:           stats.DBSize,
		DbSizeInUse:      stats.DBSizeInUse,
		DbSizeQuota:      stats.Quota,
		RaftIndex:        stats.AppliedIndex,
		RaftAppliedIndex: stats.AppliedIndex,
		RaftTerm:         header.RaftTerm,
		StorageVersion:   m.s.version.Storage,
		DowngradeInfo:    &pb.DowngradeInfo{},
	}
	if m.s.opts.Leader() {
		resp.Leader = header.MemberId
	} else {
		resp.Errors = append(resp.Errors, "etcdserver: no leader")
	}
	for _, a := range m.s.opts.Backend.Alarms() {
		resp.Errors = append(resp.Errors, a.String())
	}
	return resp, nil
}

// Alarm lists (GET: those of the kind asked for, NONE: all), raises or clears alarms.
func (m *maintenanceServer) Alarm(ctx context.Context, req *pb.AlarmRequest) (*pb.AlarmResponse, error) {
	switch req.Action {
	case pb.AlarmRequest_GET:
		// etcd asks its leader.
		if err := m.s.opts.Backend.Ready(ctx, false); err != nil {
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
