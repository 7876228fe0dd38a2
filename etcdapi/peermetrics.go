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
}

func newPeerMetrics(r registrar) peerMetrics {
	r.counter("etcd_server_heartbeat_send_failures_total", "The total number of leader heartbeat send failures; 0, heartbeats do not wait for the disk.")
	r.counter("etcd_server_slow_read_indexes_total", "The total number of slow read indexes; 0, those asked for again are not told apart.")
	return peerMetrics{
		failedReadIndexes: r.counter("etcd_server_read_indexes_failed_total", "The total number of failed read indexes seen."),

		active:        r.gaugeVec("etcd_network_active_peers", "The current number of active peer connections.", "Local", "Remote"),
		disconnected:  r.counterVec("etcd_network_disconnected_peers_total", "The total number of disconnected peers.", "Local", "Remote"),
		sentBytes:     r.counterVec("etcd_network_peer_sent_bytes_total", "The total number of bytes sent to peers.", "To"),
		receivedBytes: r.counterVec("etcd_network_peer_received_bytes_total", "The total number of bytes received from peers.", "From"),
		sendFailures:  r.counterVec("etcd_network_peer_sent_failures_total", "The total number of send failures from peers.", "To"),
		roundTrips: r.histogramVec("etcd_network_peer_round_trip_time_seconds", "Round-Trip-Time histogram between peers.",
			prometheus.ExponentialBuckets(0.0001, 2, 16), "To"), // 0.1 ms to 3.3 s, as in etcd
		snapshotsReceived:       r.counterVec("etcd_network_snapshot_receive_success", "Total number of successful snapshot receives.", "From"),
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

// SnapshotReceived counts a snapshot that was fetched from a member, or could not be.
func (m *Metrics) SnapshotReceived(from uint64, err error) {
	if err != nil {
		m.peers.snapshotReceiveFailures.WithLabelValues(hexID(from)).Inc()
		return
	}
	m.peers.snapshotsReceived.WithLabelValues(hexID(from)).Inc()
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
	if apply > slowApplyAfter {
		m.slowApplies.Inc()
	}
}
