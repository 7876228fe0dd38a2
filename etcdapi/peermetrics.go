package etcdapi

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// peerMetrics are etcd's metrics of what goes on between members, which are labelled with their ids in hexadecimal.
// Where there are no peers the labelled ones have no values, as in etcd.
type peerMetrics struct {
	failedReadIndexes prometheus.Counter

	active                                     *prometheus.GaugeVec
	disconnected                               *prometheus.CounterVec
	sentBytes, receivedBytes                   *prometheus.CounterVec
	sendFailures                               *prometheus.CounterVec
	roundTrips                                 *prometheus.HistogramVec
	snapshotsReceived, snapshotReceiveFailures *prometheus.CounterVec
	snapshotsSent, snapshotSendFailures        *prometheus.CounterVec
	sending, receiving                         *prometheus.GaugeVec
	sendSeconds, receiveSeconds                *prometheus.HistogramVec
	fetched, made                              prometheus.Histogram
	installing                                 prometheus.Gauge

	known            *prometheus.GaugeVec
	logBytes         prometheus.Gauge
	logWriteDuration prometheus.Histogram
	received         map[uint64]time.Time // when the copies that are being fetched were begun
}

func newPeerMetrics(r registrar) peerMetrics {
	transfer := prometheus.ExponentialBuckets(0.1, 2, 10) // 0.1 s to 51 s, as in etcd
	return peerMetrics{
		failedReadIndexes: r.counter("etcd_server_read_indexes_failed_total", "The total number of failed read indexes seen."),

		active:        r.gaugeVec("etcd_network_active_peers", "The current number of active peer connections.", "Local", "Remote"),
		disconnected:  r.counterVec("etcd_network_disconnected_peers_total", "The total number of disconnected peers.", "Local", "Remote"),
		sentBytes:     r.counterVec("etcd_network_peer_sent_bytes_total", "The total number of bytes sent to peers.", "To"),
		receivedBytes: r.counterVec("etcd_network_peer_received_bytes_total", "The total number of bytes received from peers.", "From"),
		sendFailures:  r.counterVec("etcd_network_peer_sent_failures_total", "The total number of send failures from peers.", "To"),
		roundTrips: r.histogramVec("etcd_network_peer_round_trip_time_seconds", "Round-Trip-Time histogram between peers.",
			prometheus.ExponentialBuckets(0.0001, 2, 16), "To"), // 0.1 ms to 3.3 s, as in etcd
		snapshotsReceived:    r.counterVec("etcd_network_snapshot_receive_success", "Total number of successful snapshot receives.", "From"),
		snapshotsSent:        r.counterVec("etcd_network_snapshot_send_success", "Total number of successful snapshot sends.", "To"),
		snapshotSendFailures: r.counterVec("etcd_network_snapshot_send_failures", "Total number of snapshot send failures.", "To"),
		sending:              r.gaugeVec("etcd_network_snapshot_send_inflights_total", "Total number of inflight snapshot sends.", "To"),
		receiving:            r.gaugeVec("etcd_network_snapshot_receive_inflights_total", "Total number of inflight snapshot receives.", "From"),
		sendSeconds:          r.histogramVec("etcd_network_snapshot_send_total_duration_seconds", "Total latency distributions of v3 snapshot sends.", transfer, "To"),
		receiveSeconds:       r.histogramVec("etcd_network_snapshot_receive_total_duration_seconds", "Total latency distributions of v3 snapshot receives.", transfer, "From"),
		fetched:              r.histogram("etcd_snap_db_save_total_duration_seconds", "The total latency distributions of fetching a snapshot.", transfer),
		made:                 r.histogram("etcd_debugging_snap_save_total_duration_seconds", "The total latency distributions of making a snapshot for other members.", msBuckets),
		installing:           r.gauge("etcd_server_snapshot_apply_in_progress_total", "1 if the server is applying the incoming snapshot. 0 if none."),
		received:             map[uint64]time.Time{},

		known:            r.gaugeVec("etcd_network_known_peers", "The current number of known peers.", "Local", "Remote"),
		logBytes:         r.gauge("etcd_disk_wal_write_bytes_total", "Total number of bytes written to the Raft log."),
		logWriteDuration: r.histogram("etcd_disk_wal_write_duration_seconds", "The latency distributions of writing to the Raft log.", msBuckets),

		snapshotReceiveFailures: r.counterVec("etcd_network_snapshot_receive_failures", "Total number of snapshot receive failures.", "From"),
	}
}

func hexID(id uint64) string { return strconv.FormatUint(id, 16) }

// PeerActive tells that messages go to and fro between local and remote, or do not any more.
func (m *Metrics) PeerActive(local, remote uint64, active bool) {
	if active {
		m.peers.active.WithLabelValues(hexID(local), hexID(remote)).Set(1)
		// Followers have little to say to each other: the series are there all the same.
		m.PeerSent(remote, 0)
		m.PeerReceived(remote, 0)
		return
	}
	m.peers.active.WithLabelValues(hexID(local), hexID(remote)).Set(0)
	m.peers.disconnected.WithLabelValues(hexID(local), hexID(remote)).Inc()
}

// PeerSent counts bytes written to a member.
func (m *Metrics) PeerSent(to uint64, bytes int) {
	m.peers.sentBytes.WithLabelValues(hexID(to)).Add(float64(bytes))
}

// PeerReceived counts bytes read from a member.
func (m *Metrics) PeerReceived(from uint64, bytes int) {
	m.peers.receivedBytes.WithLabelValues(hexID(from)).Add(float64(bytes))
}

// PeerDropped counts messages that could not be sent.
func (m *Metrics) PeerDropped(to uint64, messages int) {
	m.peers.sendFailures.WithLabelValues(hexID(to)).Add(float64(messages))
}

// PeerRoundTrip is how long a member took to answer.
func (m *Metrics) PeerRoundTrip(to uint64, took time.Duration) {
	m.peers.roundTrips.WithLabelValues(hexID(to)).Observe(took.Seconds())
}

// KnownPeers shows which members local knows of, itself among them, and no others.
func (m *Metrics) KnownPeers(local uint64, members []uint64) {
	m.peers.known.Reset()
	for _, id := range members {
		m.peers.known.WithLabelValues(hexID(local), hexID(id)).Set(1)
	}
}

// SnapshotBegun tells that a snapshot of a member is being fetched. One is at a time; SnapshotReceived is called by the
// same goroutine.
func (m *Metrics) SnapshotBegun(from uint64) {
	m.peers.received[from] = time.Now()
	m.peers.receiving.WithLabelValues(hexID(from)).Set(1)
}

// SnapshotMade is how long it took to make a snapshot for other members.
func (m *Metrics) SnapshotMade(took time.Duration) { m.peers.made.Observe(took.Seconds()) }

// SnapshotInstalling counts installations under way: 1 for one that begins, -1 for one that ends.
func (m *Metrics) SnapshotInstalling(n int) { m.peers.installing.Add(float64(n)) }

// SnapshotServing tells that a member has begun to fetch a snapshot.
func (m *Metrics) SnapshotServing(to uint64) { m.peers.sending.WithLabelValues(hexID(to)).Inc() }

// SnapshotServed tells that a member has fetched a snapshot, or what it lacked of it, or that this failed.
func (m *Metrics) SnapshotServed(to uint64, took time.Duration, err error) {
	m.peers.sending.WithLabelValues(hexID(to)).Dec()
	if err != nil {
		m.peers.snapshotSendFailures.WithLabelValues(hexID(to)).Inc()
		return
	}
	m.peers.snapshotsSent.WithLabelValues(hexID(to)).Inc()
	m.peers.sendSeconds.WithLabelValues(hexID(to)).Observe(took.Seconds())
}

// LogWritten counts what was written to the Raft log, and how long that took.
func (m *Metrics) LogWritten(bytes int, took time.Duration) {
	m.peers.logBytes.Add(float64(bytes))
	m.peers.logWriteDuration.Observe(took.Seconds())
}

// SnapshotReceived counts a snapshot that was fetched from a member, or could not be.
func (m *Metrics) SnapshotReceived(from uint64, err error) {
	took := time.Since(m.peers.received[from])
	m.peers.receiving.WithLabelValues(hexID(from)).Set(0)
	if err != nil {
		m.peers.snapshotReceiveFailures.WithLabelValues(hexID(from)).Inc()
		return
	}
	m.peers.snapshotsReceived.WithLabelValues(hexID(from)).Inc()
	m.peers.receiveSeconds.WithLabelValues(hexID(from)).Observe(took.Seconds())
	m.peers.fetched.Observe(took.Seconds())
}

// LogSynced is how long it took to make the Raft log durable.
func (m *Metrics) LogSynced(took time.Duration) { m.syncDuration.Observe(took.Seconds()) }

// EntryApplied is for backend.Hooks.BatchCommitted where the Raft log makes durable what is committed, and not the
// database.
func (m *Metrics) EntryApplied(commands, rows int, apply, _, total time.Duration) {
	m.batchCommands.Observe(float64(commands))
	m.batchRows.Observe(float64(rows))
	m.applyDuration.Observe(apply.Seconds())
	m.commitDuration.Observe(total.Seconds())
}
