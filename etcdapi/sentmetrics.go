package etcdapi

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// sentMetrics are how long the responses of watch streams took to go out.
type sentMetrics struct{ events, perEvent, control, progress prometheus.Histogram }

func newSentMetrics(r registrar) sentMetrics {
	return sentMetrics{
		events:   r.histogram("etcd_debugging_server_watch_send_loop_watch_stream_duration_seconds", "The total duration in seconds of sending a watch response with all its events.", msBuckets),
		perEvent: r.histogram("etcd_debugging_server_watch_send_loop_watch_stream_duration_per_event_seconds", "The average duration in seconds of sending a watch response, per event.", msBuckets),
		control:  r.histogram("etcd_debugging_server_watch_send_loop_control_stream_duration_seconds", "The total duration in seconds of sending a control response of a watch.", msBuckets),
		progress: r.histogram("etcd_debugging_server_watch_send_loop_progress_duration_seconds", "The total duration in seconds of sending a progress notification.", msBuckets),
	}
}

// WatchEventsSent is how long a response with so many events took to go out.
func (m *Metrics) WatchEventsSent(events int, took time.Duration) {
	m.sent.events.Observe(took.Seconds())
	m.sent.perEvent.Observe(took.Seconds() / float64(max(events, 1)))
}

// WatchControlSent is how long the answer to a request of a watch stream took to go out.
func (m *Metrics) WatchControlSent(took time.Duration) { m.sent.control.Observe(took.Seconds()) }

// WatchProgressSent is how long a progress notification took to go out.
func (m *Metrics) WatchProgressSent(took time.Duration) { m.sent.progress.Observe(took.Seconds()) }
