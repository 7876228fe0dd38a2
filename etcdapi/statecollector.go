package etcdapi

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/quire-db/quire/backend"
)

// stateCollector shows the state of store and cluster at the time of a scrape: one call for all of each, so that the
// numbers belong together. Before there is a server it shows nothing.
type stateCollector struct {
	m     *Metrics
	stats []stateMetric
}

type stateMetric struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(raft *ClusterStatus, st *backend.Stats) float64
}

func newStateCollector(m *Metrics) *stateCollector {
	c := &stateCollector{m: m}
	gauge := func(name, help string, value func(raft *ClusterStatus, st *backend.Stats) float64) {
		c.stats = append(c.stats, stateMetric{prometheus.NewDesc(name, help, nil, nil), prometheus.GaugeValue, value})
	}
	yes := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}

	gauge("etcd_server_has_leader", "Whether or not a leader exists. 1 is existence, 0 is not.",
		func(raft *ClusterStatus, _ *backend.Stats) float64 { return yes(raft.Leader != 0) })
	gauge("etcd_server_is_leader", "Whether or not this member is a leader. 1 if is, 0 otherwise.",
		func(raft *ClusterStatus, _ *backend.Stats) float64 { return yes(raft.Leader == raft.ID) })
	gauge("etcd_server_is_learner", "Whether or not this member is a learner. 1 if is, 0 otherwise.",
		func(raft *ClusterStatus, _ *backend.Stats) float64 { return yes(raft.Learner) })
	gauge("etcd_server_proposals_committed_total", "The total number of consensus proposals committed.",
		func(raft *ClusterStatus, _ *backend.Stats) float64 { return float64(raft.Committed) })
	gauge("etcd_server_proposals_applied_total", "The total number of consensus proposals applied.",
		func(raft *ClusterStatus, _ *backend.Stats) float64 { return float64(raft.Applied) })
	gauge("etcd_server_quota_backend_bytes", "Current backend storage quota size in bytes.",
		func(_ *ClusterStatus, st *backend.Stats) float64 { return float64(st.Quota) })
	// Alerts for etcd compare these with the quota, and with each other. The quota is about logical bytes, which may be more
	// than the file has: no write may be refused for want of space before they have warned.
	gauge("etcd_mvcc_db_total_size_in_bytes", "Total size of the underlying database physically allocated in bytes.",
		func(_ *ClusterStatus, st *backend.Stats) float64 { return float64(max(st.DBSize, st.LogicalBytes)) })
	gauge("etcd_mvcc_db_total_size_in_use_in_bytes", "Total size of the underlying database logically in use in bytes.",
		func(_ *ClusterStatus, st *backend.Stats) float64 {
			return float64(max(st.DBSizeInUse, st.LogicalBytes))
		})
	gauge("etcd_mvcc_db_open_read_transactions", "The number of currently open read transactions.",
		func(_ *ClusterStatus, st *backend.Stats) float64 { return float64(st.ReadTransactions) })
	gauge("etcd_debugging_mvcc_keys_total", "Total number of keys.",
		func(_ *ClusterStatus, st *backend.Stats) float64 { return float64(st.Keys) })
	gauge("etcd_debugging_mvcc_current_revision", "The current revision of store.",
		func(_ *ClusterStatus, st *backend.Stats) float64 { return float64(st.Revision) })
	gauge("etcd_debugging_mvcc_compact_revision", "The revision of the last compaction in store.",
		func(_ *ClusterStatus, st *backend.Stats) float64 { return float64(st.CompactRevision) })
	gauge("etcd_debugging_auth_revision", "The current revision of auth store.",
		func(_ *ClusterStatus, st *backend.Stats) float64 { return float64(st.AuthRevision) })
	gauge("quire_logical_bytes", "Key and value bytes of all rows not yet compacted: what the quota counts.",
		func(_ *ClusterStatus, st *backend.Stats) float64 { return float64(st.LogicalBytes) })
	gauge("quire_leases", "Number of leases.",
		func(_ *ClusterStatus, st *backend.Stats) float64 { return float64(st.Leases) })
	gauge("quire_value_cache_bytes", "Bytes of values kept in memory.",
		func(_ *ClusterStatus, st *backend.Stats) float64 { return float64(st.ValueCacheBytes) })
	return c
}

func (c *stateCollector) Describe(out chan<- *prometheus.Desc) {
	for _, s := range c.stats {
		out <- s.desc
	}
}

func (c *stateCollector) Collect(out chan<- prometheus.Metric) {
	s := c.m.server.Load()
	if s == nil {
		return
	}
	stats := s.opts.Backend.Stats()
	raft := s.status(&stats)
	for _, m := range c.stats {
		out <- prometheus.MustNewConstMetric(m.desc, m.kind, m.value(&raft, &stats))
	}
}
