package etcdapi

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// maintenanceMetrics are etcd's metrics of what works on the whole store.
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

// measure is deferred by a handler with the address of its error: a call that failed is not measured.
func measure(h prometheus.Histogram, start time.Time, err *error) {
	if *err == nil {
		h.Observe(time.Since(start).Seconds())
	}
}
