package etcdapi

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
)

// maintenanceMetrics are etcd's metrics of what works on the whole store. They are taken around the calls, so that what
// a client was refused is not counted.
type maintenanceMetrics struct {
	hash, hashRev, defrag, snapshot prometheus.Histogram
	defragInflight                  prometheus.Gauge
}

func newMaintenanceMetrics(r registrar) maintenanceMetrics {
	return maintenanceMetrics{
		hash:           r.histogram("etcd_mvcc_hash_duration_seconds", "The latency distribution of storage hash operation.", prometheus.ExponentialBuckets(.01, 2, 15)),
		hashRev:        r.histogram("etcd_mvcc_hash_rev_duration_seconds", "The latency distribution of storage hash by revision operation.", prometheus.ExponentialBuckets(.01, 2, 15)),
		defrag:         r.histogram("etcd_disk_backend_defrag_duration_seconds", "The latency distribution of backend defragmentation.", prometheus.ExponentialBuckets(.1, 2, 13)),
		defragInflight: r.gauge("etcd_disk_defrag_inflight", "Whether or not defrag is active on the member. 1 means active, 0 means not."),
		snapshot:       r.histogram("etcd_disk_backend_snapshot_duration_seconds", "The latency distribution of backend snapshots.", prometheus.ExponentialBuckets(.01, 2, 17)),
	}
}

// unary is an interceptor.
func (m *maintenanceMetrics) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	var took prometheus.Histogram
	switch info.FullMethod {
	default:
		return handler(ctx, req)
	case pb.Maintenance_Hash_FullMethodName:
		took = m.hash
	case pb.Maintenance_HashKV_FullMethodName:
		took = m.hashRev
	case pb.Maintenance_Defragment_FullMethodName:
		took = m.defrag
		m.defragInflight.Inc()
		defer m.defragInflight.Dec()
	}
	start := time.Now()
	resp, err := handler(ctx, req)
	if err == nil {
		took.Observe(time.Since(start).Seconds())
	}
	return resp, err
}

// stream is an interceptor.
func (m *maintenanceMetrics) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	start := time.Now()
	err := handler(srv, stream)
	if err == nil && info.FullMethod == pb.Maintenance_Snapshot_FullMethodName {
		m.snapshot.Observe(time.Since(start).Seconds())
	}
	return err
}
