package etcdapi

import "github.com/prometheus/client_golang/prometheus"

// absentMetric is one of etcd's whose thing does not exist here. It is registered all the same, so that etcd's dashboards
// and alerts find it: always zero, or, where it has labels, without a series, as in an etcd to which the thing never
// happened. docs/metrics.md names each of them.
type absentMetric struct {
	name, help string
	kind       prometheus.ValueType // of a metric without buckets
	buckets    []float64            // not nil: a histogram
	labels     []string
}

const (
	counter = prometheus.CounterValue
	gauge   = prometheus.GaugeValue
)

var msBuckets = prometheus.ExponentialBuckets(0.001, 2, 14)

var absentMetrics = []absentMetric{
	// The steps in which bbolt commits.
	{name: "etcd_debugging_disk_backend_commit_rebalance_duration_seconds", help: "Always empty: there is no bbolt.", buckets: msBuckets},
	{name: "etcd_debugging_disk_backend_commit_spill_duration_seconds", help: "Always empty: there is no bbolt.", buckets: msBuckets},
	{name: "etcd_debugging_disk_backend_commit_write_duration_seconds", help: "Always empty: there is no bbolt.", buckets: msBuckets},

	// Snapshot files of the v2 store.
	{name: "etcd_debugging_snap_save_marshalling_duration_seconds", help: "Always empty: there are no .snap files.", buckets: msBuckets},
	{name: "etcd_snap_fsync_duration_seconds", help: "Always empty: there are no .snap files.", buckets: msBuckets},
	{name: "etcd_snap_db_fsync_duration_seconds", help: "Always empty: a copy is synced while it is fetched.", buckets: msBuckets},

	// The v2 store itself.
	{name: "etcd_debugging_store_expires_total", help: "Always 0: there is no v2 store.", kind: counter},
	{name: "etcd_debugging_store_watch_requests_total", help: "Always 0: there is no v2 store.", kind: counter},
	{name: "etcd_debugging_store_watchers", help: "Always 0: there is no v2 store.", kind: gauge},
	{name: "etcd_debugging_store_reads_total", help: "No series: there is no v2 store.", kind: counter, labels: []string{"action"}},
	{name: "etcd_debugging_store_writes_total", help: "No series: there is no v2 store.", kind: counter, labels: []string{"action"}},

	// etcd's proxy registers them in the server, too.
	{name: "etcd_grpc_proxy_cache_hits_total", help: "Always 0: this is no proxy.", kind: gauge},
	{name: "etcd_grpc_proxy_cache_keys_total", help: "Always 0: this is no proxy.", kind: gauge},
	{name: "etcd_grpc_proxy_cache_misses_total", help: "Always 0: this is no proxy.", kind: gauge},
	{name: "etcd_grpc_proxy_events_coalescing_total", help: "Always 0: this is no proxy.", kind: counter},
	{name: "etcd_grpc_proxy_watchers_coalescing_total", help: "Always 0: this is no proxy.", kind: gauge},

	{name: "etcd_server_heartbeat_send_failures_total", help: "Always 0: heartbeats do not wait for the disk.", kind: counter},
	{name: "etcd_server_slow_read_indexes_total", help: "Always 0: read indexes that are asked for again are not told apart.", kind: counter},
	{name: "etcd_network_peer_received_failures_total", help: "No series: a message that cannot be read ends the connection.", kind: counter, labels: []string{"From"}},
}

func (a *absentMetric) register(reg *prometheus.Registry) {
	r := registrar{reg}
	switch {
	case a.buckets != nil:
		r.histogram(a.name, a.help, a.buckets)
	case a.labels != nil:
		r.counterVec(a.name, a.help, a.labels...)
	case a.kind == gauge:
		r.gauge(a.name, a.help)
	default:
		r.counter(a.name, a.help)
	}
}
