package etcdapi

import (
	"cmp"
	"context"
	"errors"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	grpcprom "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/backend"
)

// Metrics are etcd's metrics under etcd's names, as far as what they measure exists here, and our own under
// quire_. The exported methods are hooks for backend.Hooks and the watchpoller; they may be called from any
// goroutine, before there is a Server too.
type Metrics struct {
	registry *prometheus.Registry
	grpc     *grpcprom.ServerMetrics
	server   atomic.Pointer[Server] // whose store and identity a scrape shows; nil: none yet

	sentBytes, receivedBytes prometheus.Counter
	clientRequests           *prometheus.CounterVec
	streamFailures           *prometheus.CounterVec
	requests                 map[string]outcome // by kind; read-only after NewMetrics
	rangeOK, rangeFailed     prometheus.Observer
	slowApplies              prometheus.Counter
	slowApplyAfter           time.Duration
	tellSlow                 func(SlowApply) // nil: nobody
	applySeconds             *prometheus.HistogramVec
	applies                  map[string]outcome // of applySeconds, by op
	pending                  prometheus.Gauge
	failed                   prometheus.Counter
	leaderChanges            prometheus.Counter
	promotions               prometheus.Counter
	promoteFailures          *prometheus.CounterVec
	peers                    peerMetrics
	maintenance              maintenanceMetrics
	sent                     sentMetrics
	features                 *prometheus.GaugeVec
	serverVersion            *prometheus.GaugeVec
	clusterVersion           *prometheus.GaugeVec
	serverID                 *prometheus.GaugeVec

	ranges, puts, deletes, txns prometheus.Counter
	putBytes                    prometheus.Gauge

	leasesGranted, leasesRevoked, leasesRenewed, leasesExpired prometheus.Counter
	leaseTTLs                                                  prometheus.Histogram

	watchStreams, watchers, slowWatchers, pendingEvents prometheus.Gauge
	events                                              prometheus.Counter

	commitDuration, syncDuration, applyDuration prometheus.Histogram
	batchCommands, batchRows                    prometheus.Histogram
	compactionDuration                          prometheus.Histogram
	compactionPause, indexCompactionPause       prometheus.Histogram
	compactedRows                               prometheus.Counter
	compactionLast                              prometheus.Gauge
	alarms                                      *prometheus.GaugeVec
	storageHealthy                              prometheus.Gauge
	storageErrors                               prometheus.Counter

	healthSuccess, healthFailures prometheus.Counter
	healthcheck                   *prometheus.GaugeVec
	healthchecks                  *prometheus.CounterVec

	clients struct {
		sync.Mutex
		known map[string]clientCounters // by API version; at most maxClientVersions, and "other"
	}
}

// MetricsOptions configure NewMetrics.
type MetricsOptions struct {
	Registry  *prometheus.Registry // nil: a new one
	Extensive bool                 // --metrics=extensive: latency histograms per gRPC method
	// SlowApplyAfter is --warning-apply-duration; 0: 100 ms.
	SlowApplyAfter time.Duration
	// SlowApply is told of what took longer; nil: it is only counted. It must not block.
	SlowApply func(SlowApply)
}

// requestKinds are the values of the label type in etcd_server_request_duration_seconds.
var requestKinds = [...]string{
	"Range", "ReadonlyTxn", "Put", "DeleteRange", "Txn", "Compaction", "LeaseGrant", "LeaseRevoke", "LeaseKeepAlive", "Alarm",
	"Authenticate", "AuthEnable", "AuthDisable", "AuthUserAdd", "AuthUserDelete", "AuthUserChangePassword", "AuthUserGrantRole",
	"AuthUserRevokeRole", "AuthRoleAdd", "AuthRoleDelete", "AuthRoleGrantPermission", "AuthRoleRevokePermission",
}

// outcome are the observers of what succeeded and what failed.
type outcome struct{ ok, failed prometheus.Observer }

// defaultSlowApply is that of etcd's --warning-apply-duration.
const defaultSlowApply = 100 * time.Millisecond

// maxClientVersions bounds the time series that clients can make us keep by sending ever new version strings.
const maxClientVersions = 32

// NewMetrics registers all metrics, with Go's and the process's own. It panics if o.Registry has one of them already.
func NewMetrics(o MetricsOptions) *Metrics {
	if o.Registry == nil {
		o.Registry = prometheus.NewRegistry()
	}
	r := registrar{o.Registry}
	m := &Metrics{registry: o.Registry, slowApplyAfter: cmp.Or(o.SlowApplyAfter, defaultSlowApply), tellSlow: o.SlowApply}
	o.Registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	var grpcOpts []grpcprom.ServerMetricsOption
	if o.Extensive {
		grpcOpts = append(grpcOpts, grpcprom.WithServerHandlingTimeHistogram())
	}
	m.grpc = grpcprom.NewServerMetrics(grpcOpts...)
	o.Registry.MustRegister(m.grpc)

	ms := prometheus.ExponentialBuckets(0.001, 2, 14)       // 1 ms to 8.2 s, etcd's for disks and requests
	tenthMs := prometheus.ExponentialBuckets(0.0001, 2, 20) // 0.1 ms to 52 s, etcd's for apply and range

	m.sentBytes = r.counter("etcd_network_client_grpc_sent_bytes_total", "The total number of bytes sent to grpc clients.")
	m.receivedBytes = r.counter("etcd_network_client_grpc_received_bytes_total", "The total number of bytes received from grpc clients.")
	m.clientRequests = r.counterVec("etcd_server_client_requests_total", "The total number of client requests per client version.", "type", "client_api_version")
	m.streamFailures = r.counterVec("etcd_network_server_stream_failures_total", "The total number of stream failures from the local server.", "Type", "API")
	requests := r.histogramVec("etcd_server_request_duration_seconds", "Response latency distribution in seconds for each type.", ms, "type", "success")
	m.requests = make(map[string]outcome)
	for _, kind := range requestKinds {
		m.requests[kind] = outcome{requests.WithLabelValues(kind, "true"), requests.WithLabelValues(kind, "false")}
	}
	ranges := r.histogramVec("etcd_server_range_duration_seconds", "The latency distributions of ranges.", tenthMs, "success")
	m.rangeOK, m.rangeFailed = ranges.WithLabelValues("true"), ranges.WithLabelValues("false")
	m.slowApplies = r.counter("etcd_server_slow_apply_total", "The total number of slow apply requests.")
	m.applySeconds = r.histogramVec("etcd_server_apply_duration_seconds", "The latency distributions of applying a request, in memory.", tenthMs, "version", "op", "success")
	m.applies = map[string]outcome{}
	m.pending = r.gauge("etcd_server_proposals_pending", "The current number of writes waiting to become durable.")
	m.failed = r.counter("etcd_server_proposals_failed_total", "The total number of writes that the storage or the cluster failed.")
	m.leaderChanges = r.counter("etcd_server_leader_changes_seen_total", "The number of leader changes seen.")
	m.promotions = r.counter("etcd_server_learner_promote_successes", "The total number of successful learner promotions while this member is leader.")
	m.promoteFailures = r.counterVec("etcd_server_learner_promote_failures", "The total number of failed learner promotions (likely learner not ready) while this member is leader.", "Reason")
	m.serverVersion = r.gaugeVec("etcd_server_version", "Which version is running. 1 for 'server_version' label with current version.", "server_version")
	m.clusterVersion = r.gaugeVec("etcd_cluster_version", "Which version is running. 1 for 'cluster_version' label with current cluster version.", "cluster_version")
	m.serverID = r.gaugeVec("etcd_server_id", "Member id in hexadecimal. 1 for 'server_id' label with current id.", "server_id")
	r.gaugeVec("etcd_server_go_version", "Which Go version the server was built with.", "server_go_version").WithLabelValues(runtime.Version()).Set(1)

	m.features = r.gaugeVec("etcd_server_feature_enabled", "Whether or not a feature is enabled. 1 is enabled, 0 is not.", "name", "stage")

	m.peers = newPeerMetrics(r)
	m.maintenance = newMaintenanceMetrics(r)
	m.sent = newSentMetrics(r)
	for _, a := range absentMetrics {
		a.register(o.Registry)
	}
	o.Registry.MustRegister(descriptorCollector{})

	m.ranges = r.counter("etcd_mvcc_range_total", "Total number of ranges seen by this member.")
	m.puts = r.counter("etcd_mvcc_put_total", "Total number of puts seen by this member.")
	m.deletes = r.counter("etcd_mvcc_delete_total", "Total number of deletes seen by this member.")
	m.txns = r.counter("etcd_mvcc_txn_total", "Total number of txns of more than one operation seen by this member.")
	m.putBytes = r.gauge("etcd_debugging_mvcc_total_put_size_in_bytes", "The total size of put kv pairs seen by this member.")

	m.leasesGranted = r.counter("etcd_debugging_lease_granted_total", "The total number of granted leases.")
	m.leasesRevoked = r.counter("etcd_debugging_lease_revoked_total", "The total number of revoked leases.")
	m.leasesRenewed = r.counter("etcd_debugging_lease_renewed_total", "The number of renewed leases.")
	m.leasesExpired = r.counter("etcd_debugging_server_lease_expired_total", "The total number of expired leases.")
	m.leaseTTLs = r.histogram("etcd_debugging_lease_ttl_total", "Bucketed histogram of lease TTLs in seconds.", prometheus.ExponentialBuckets(1, 2, 24))

	m.watchStreams = r.gauge("etcd_debugging_mvcc_watch_stream_total", "Number of open watch streams.")
	m.watchers = r.gauge("etcd_debugging_mvcc_watcher_total", "Number of watchers.")
	m.slowWatchers = r.gauge("etcd_debugging_mvcc_slow_watcher_total", "Number of watchers that read history because they are behind.")
	m.pendingEvents = r.gauge("etcd_debugging_mvcc_pending_events_total", "Number of events waiting to be sent.")
	m.events = r.counter("etcd_debugging_mvcc_events_total", "Total number of events sent by this member.")

	m.commitDuration = r.histogram("etcd_disk_backend_commit_duration_seconds", "The latency distributions of a batch, from apply to visible.", ms)
	m.syncDuration = r.histogram("etcd_disk_wal_fsync_duration_seconds", "The latency distributions of making a batch durable.", ms)
	m.applyDuration = r.histogram("quire_batch_apply_duration_seconds", "The latency distributions of applying the commands of a batch.", tenthMs)
	m.batchCommands = r.histogram("quire_batch_commands", "How many commands a batch holds.", prometheus.ExponentialBuckets(1, 2, 13))
	m.batchRows = r.histogram("quire_batch_rows", "How many rows a batch writes.", prometheus.ExponentialBuckets(1, 2, 17))
	m.compactionDuration = r.histogram("etcd_debugging_mvcc_db_compaction_total_duration_milliseconds", "Bucketed histogram of db compaction total duration.", prometheus.ExponentialBuckets(100, 2, 14))
	m.compactionPause = r.histogram("etcd_debugging_mvcc_db_compaction_pause_duration_milliseconds", "Bucketed histogram of the steps of a compaction, each of which holds up writes.", prometheus.ExponentialBuckets(1, 2, 13))
	m.indexCompactionPause = r.histogram("etcd_debugging_mvcc_index_compaction_pause_duration_milliseconds", "Bucketed histogram of how long moving the compaction revision takes.", prometheus.ExponentialBuckets(0.5, 2, 14))
	m.compactedRows = r.counter("etcd_debugging_mvcc_db_compaction_keys_total", "Total number of rows removed by compaction.")
	m.compactionLast = r.gauge("etcd_debugging_mvcc_db_compaction_last", "The unix time of the last db compaction; 0 since the start: none.")
	m.alarms = r.gaugeVec("etcd_debugging_server_alarms", "Raised alarms per member and type.", "server_id", "alarm_type")
	m.storageHealthy = r.gauge("quire_storage_healthy", "Whether the storage takes writes: 1 yes, 0 no.")
	m.storageHealthy.Set(1)
	m.storageErrors = r.counter("quire_storage_errors_total", "How often the storage failed.")

	m.healthSuccess = r.counter("etcd_server_health_success", "The total number of successful health checks.")
	m.healthFailures = r.counter("etcd_server_health_failures", "The total number of failed health checks.")
	m.healthcheck = r.gaugeVec("etcd_server_healthcheck", "The result of each kind of healthcheck.", "type", "name")
	m.healthchecks = r.counterVec("etcd_server_healthchecks_total", "The total number of each kind of healthcheck.", "type", "name", "status")

	m.clients.known = make(map[string]clientCounters)
	o.Registry.MustRegister(newStateCollector(m))
	return m
}

// Registry is where the metrics are registered; others may add theirs.
func (m *Metrics) Registry() *prometheus.Registry { return m.registry }

// Feature tells whether a feature gate is on. stage is etcd's word for how far it has come: ALPHA, BETA or empty.
func (m *Metrics) Feature(name, stage string, on bool) {
	g := m.features.WithLabelValues(name, stage)
	if on {
		g.Set(1)
		return
	}
	g.Set(0)
}

// attach makes s the server whose state a scrape shows.
func (m *Metrics) attach(s *Server) {
	m.serverVersion.WithLabelValues(s.version.Server).Set(1)
	m.clusterVersion.WithLabelValues(s.version.clusterMinor()).Set(1)
	m.serverID.WithLabelValues(strconv.FormatUint(s.opts.Identity.MemberID, 16)).Set(1)
	m.server.Store(s)
}

// BatchCommitted is for backend.Hooks.
func (m *Metrics) BatchCommitted(commands, rows int, apply, sync, total time.Duration) {
	m.EntryApplied(commands, rows, apply, sync, total)
	m.syncDuration.Observe(sync.Seconds())
}

// CompactionDone is for backend.Hooks.
func (m *Metrics) CompactionDone(_ int64, rows int64, took time.Duration) {
	m.compactedRows.Add(float64(rows))
	m.compactionDuration.Observe(milliseconds(took))
	m.compactionLast.SetToCurrentTime()
}

// CompactionStep is for backend.Hooks.
func (m *Metrics) CompactionStep(took time.Duration) { m.compactionPause.Observe(milliseconds(took)) }

// LeaseExpired is for backend.Hooks.
func (m *Metrics) LeaseExpired(int64) { m.leasesExpired.Inc() }

// Alarm is for backend.Hooks.
func (m *Metrics) Alarm(a *pb.AlarmMember, raised bool) {
	g := m.alarms.WithLabelValues(strconv.FormatUint(a.MemberID, 16), a.Alarm.String())
	if raised {
		g.Set(1)
	} else {
		g.Set(0)
	}
}

// StorageError is for backend.Hooks.
func (m *Metrics) StorageError(error) {
	m.storageErrors.Inc()
	m.storageHealthy.Set(0)
}

// StorageHealed is for backend.Hooks.
func (m *Metrics) StorageHealed() { m.storageHealthy.Set(1) }

// WatchStreams counts watch streams: +1 opened, -1 closed.
func (m *Metrics) WatchStreams(delta int) { m.watchStreams.Add(float64(delta)) }

// Watchers counts watchers: +1 created, -1 cancelled.
func (m *Metrics) Watchers(delta int) { m.watchers.Add(float64(delta)) }

// SlowWatchers counts watchers that fell behind (+1) or caught up (-1).
func (m *Metrics) SlowWatchers(delta int) { m.slowWatchers.Add(float64(delta)) }

// PendingEvents counts events that wait to be sent.
func (m *Metrics) PendingEvents(delta int) { m.pendingEvents.Add(float64(delta)) }

// EventsSent counts events handed to the wire.
func (m *Metrics) EventsSent(n int) { m.events.Add(float64(n)) }

// request is deferred by a handler with the address of its error. kind is one of requestKinds.
func (m *Metrics) request(kind string, start time.Time, err *error) {
	o := m.requests[kind]
	if *err == nil {
		o.ok.Observe(time.Since(start).Seconds())
	} else {
		o.failed.Observe(time.Since(start).Seconds())
	}
}

// writeFailed counts a write that failed for no fault of the request: the storage's, or the cluster's.
func (m *Metrics) writeFailed(err error) {
	for _, e := range [...]error{
		backend.ErrStorage, backend.ErrDiskFull, backend.ErrClosed, context.Canceled, context.DeadlineExceeded,
		rpctypes.ErrGRPCTimeout, rpctypes.ErrGRPCTimeoutDueToLeaderFail, rpctypes.ErrGRPCTimeoutDueToConnectionLost,
		rpctypes.ErrGRPCNoLeader, rpctypes.ErrGRPCLeaderChanged, rpctypes.ErrGRPCStopped,
	} {
		if errors.Is(err, e) {
			m.failed.Inc()
			return
		}
	}
}

// streamFailed counts a stream that broke, unless the client just left. Whether it broke while receiving or
// sending does not come through the Watcher, so both are counted as etcd's "receive".
func (m *Metrics) streamFailed(ctx context.Context, api string) {
	if ctx.Err() == nil {
		m.streamFailures.WithLabelValues("receive", api).Inc()
	}
}

// promoted counts an attempt to make a voter of a learner.
func (m *Metrics) promoted(err error) {
	if err == nil {
		m.promotions.Inc()
		return
	}
	m.promoteFailures.WithLabelValues(status.Convert(err).Message()).Inc()
}

// clientCounters count the calls of clients of one API version.
type clientCounters struct{ unary, stream prometheus.Counter }

// client are the counters of clients of that API version; beyond maxClientVersions those of "other".
func (m *Metrics) client(version string) clientCounters {
	m.clients.Lock()
	defer m.clients.Unlock()
	c, ok := m.clients.known[version]
	if ok {
		return c
	}
	if len(m.clients.known) >= maxClientVersions {
		version = "other"
	}
	c = clientCounters{m.clientRequests.WithLabelValues("unary", version), m.clientRequests.WithLabelValues("stream", version)}
	m.clients.known[version] = c
	return c
}

func (m *Metrics) healthChecked(kind, name string, ok bool) {
	if ok {
		m.healthcheck.WithLabelValues(kind, name).Set(1)
		m.healthchecks.WithLabelValues(kind, name, "success").Inc()
		return
	}
	m.healthcheck.WithLabelValues(kind, name).Set(0)
	m.healthchecks.WithLabelValues(kind, name, "error").Inc()
}

// registrar makes and registers in one go.
type registrar struct{ reg *prometheus.Registry }

func (r registrar) counter(name, help string) prometheus.Counter {
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	r.reg.MustRegister(c)
	return c
}

func (r registrar) gauge(name, help string) prometheus.Gauge {
	g := prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	r.reg.MustRegister(g)
	return g
}

func (r registrar) histogram(name, help string, buckets []float64) prometheus.Histogram {
	h := prometheus.NewHistogram(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets})
	r.reg.MustRegister(h)
	return h
}

func (r registrar) counterVec(name, help string, labels ...string) *prometheus.CounterVec {
	c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	r.reg.MustRegister(c)
	return c
}

func (r registrar) gaugeVec(name, help string, labels ...string) *prometheus.GaugeVec {
	g := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, labels)
	r.reg.MustRegister(g)
	return g
}

func (r registrar) histogramVec(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
	h := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets}, labels)
	r.reg.MustRegister(h)
	return h
}
