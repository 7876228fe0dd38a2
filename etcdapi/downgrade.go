package etcdapi

import (
	"context"
	"fmt"

	"github.com/coreos/go-semver/semver"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Downgrade answers as etcd, but for the one version that etcd could be downgraded to, the minor version before: quire's
// data has no form that an older etcd, or the quire that stood for it, would have to find. To agree (and to have the
// cluster call itself the older version) would be a promise that nothing keeps.
func (m *maintenanceServer) Downgrade(ctx context.Context, req *pb.DowngradeRequest) (*pb.DowngradeResponse, error) {
	switch req.Action {
	case pb.DowngradeRequest_VALIDATE, pb.DowngradeRequest_ENABLE:
		return nil, m.refuseDowngrade(ctx, req.Version)
	case pb.DowngradeRequest_CANCEL:
		// There is none. etcd notes that in its log, and answers as if it had cancelled one.
		return &pb.DowngradeResponse{Header: m.s.header(nil), Version: m.s.version.clusterMinor()}, nil
	}
	return nil, status.Error(codes.Unknown, "etcdserver: unknown method")
}

func (m *maintenanceServer) refuseDowngrade(ctx context.Context, target string) error {
	to, err := semver.NewVersion(target)
	if err != nil {
		to, err = semver.NewVersion(target + ".0")
	}
	if err != nil {
		return rpctypes.ErrGRPCWrongDowngradeVersionFormat
	}
	if err := m.s.ready(ctx, false); err != nil {
		return toStatus(err)
	}
	from, err := semver.NewVersion(m.s.version.Cluster)
	if err != nil || to.Major != from.Major || to.Minor != from.Minor-1 {
		return rpctypes.ErrGRPCInvalidDowngradeTargetVersion
	}
	return status.Error(codes.InvalidArgument, fmt.Sprintf("%s: this is quire, whose data no etcd reads; to go back to etcd, restore a snapshot (etcdctl snapshot save, etcdutl snapshot restore)",
		rpctypes.ErrorDesc(rpctypes.ErrGRPCInvalidDowngradeTargetVersion)))
}
