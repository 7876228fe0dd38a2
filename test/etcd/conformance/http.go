package conformance

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/mod/semver"
)

// page fetches an endpoint and returns status and body.
func (x *exam) page(path string) (int, string) {
	x.Helper()
	r, err := x.Get(x.ctx, path)
	if err != nil {
		x.Fatalf("GET %s: %v", path, err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		x.Fatalf("GET %s: %v", path, err)
	}
	return r.StatusCode, string(body)
}

func (x *exam) wantPage(path string, status int, body string) {
	x.Helper()
	gotStatus, gotBody := x.page(path)
	if gotStatus != status || strings.TrimSpace(gotBody) != strings.TrimSpace(body) {
		x.Errorf("GET %s: %d %q, want %d %q", path, gotStatus, gotBody, status, body)
	}
}

// metricNames are the names that dashboards and alerts for etcd use and that mean something on one node.
var metricNames = []string{
	"etcd_server_has_leader", "etcd_server_is_leader", "etcd_server_leader_changes_seen_total", "etcd_server_version",
	"etcd_server_id", "etcd_server_go_version", "etcd_server_quota_backend_bytes", "etcd_server_health_success", "etcd_server_health_failures",
	"etcd_server_proposals_committed_total", "etcd_server_proposals_applied_total", "etcd_server_proposals_pending", "etcd_server_proposals_failed_total",
	"etcd_server_slow_apply_total", "etcd_server_slow_read_indexes_total", "etcd_server_read_indexes_failed_total",
	"etcd_server_is_learner", "etcd_server_heartbeat_send_failures_total",
	"etcd_mvcc_db_total_size_in_bytes", "etcd_mvcc_db_total_size_in_use_in_bytes", "etcd_mvcc_db_open_read_transactions",
	"etcd_mvcc_put_total", "etcd_mvcc_delete_total", "etcd_mvcc_txn_total", "etcd_mvcc_range_total",
	"etcd_debugging_mvcc_keys_total", "etcd_debugging_mvcc_current_revision", "etcd_debugging_mvcc_compact_revision",
	"etcd_debugging_mvcc_events_total", "etcd_debugging_mvcc_watcher_total", "etcd_debugging_mvcc_watch_stream_total",
	"etcd_debugging_mvcc_slow_watcher_total", "etcd_debugging_mvcc_pending_events_total",
	"etcd_debugging_mvcc_db_compaction_keys_total", "etcd_debugging_mvcc_total_put_size_in_bytes",
	"etcd_debugging_lease_granted_total", "etcd_debugging_lease_revoked_total", "etcd_debugging_lease_renewed_total",
	"etcd_disk_wal_fsync_duration_seconds", "etcd_disk_backend_commit_duration_seconds",
	"etcd_network_client_grpc_received_bytes_total", "etcd_network_client_grpc_sent_bytes_total",
	"grpc_server_handled_total", "grpc_server_started_total", "grpc_server_msg_received_total", "grpc_server_msg_sent_total",
	"process_resident_memory_bytes", "process_open_fds", "process_cpu_seconds_total", "go_goroutines", "go_memstats_alloc_bytes",
	"promhttp_metric_handler_requests_total",
}

var httpCases = []testCase{
	{name: "/health says true", run: func(x *exam) {
		x.wantPage("/health", http.StatusOK, `{"health":"true","reason":""}`)
		x.wantPage("/health?serializable=true", http.StatusOK, `{"health":"true","reason":""}`)
	}},

	{name: "/health names an alarm unless told to leave it out", run: func(x *exam) {
		s, err := x.Maintenance.Status(x.ctx, &pb.StatusRequest{})
		x.must(err, &pb.StatusRequest{})
		raise := &pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, Alarm: pb.AlarmType_NOSPACE, MemberID: s.Header.MemberId}
		_, err = x.Maintenance.Alarm(x.ctx, raise)
		x.must(err, raise)
		x.wantPage("/health", http.StatusServiceUnavailable, `{"health":"false","reason":"ALARM NOSPACE"}`)
		x.wantPage("/health?exclude=NOSPACE", http.StatusOK, `{"health":"true","reason":""}`)
		if code, body := x.page("/readyz"); code != http.StatusOK {
			x.Errorf("/readyz under NOSPACE: %d %q, want 200", code, body)
		}
	}},

	{name: "/livez and /readyz list their checks when asked", run: func(x *exam) {
		x.wantPage("/livez", http.StatusOK, "ok")
		x.wantPage("/readyz", http.StatusOK, "ok")
		x.wantPage("/livez?verbose", http.StatusOK, "[+]serializable_read ok\nok")
		code, body := x.page("/readyz?verbose")
		equal(x, "status of /readyz", code, http.StatusOK)
		for _, check := range []string{"data_corruption", "serializable_read", "linearizable_read", "non_learner"} {
			if !strings.Contains(body, "[+]"+check+" ok\n") {
				x.Errorf("/readyz?verbose has no %q: %q", check, body)
			}
		}
		x.wantPage("/livez/serializable_read", http.StatusOK, "ok")
		x.wantPage("/readyz/linearizable_read", http.StatusOK, "ok")
		code, body = x.page("/readyz?verbose&exclude=non_learner")
		if code != http.StatusOK || strings.Contains(body, "non_learner") {
			x.Errorf("/readyz without non_learner: %d %q", code, body)
		}
	}},

	{name: "/version names the versions of server, cluster and storage", run: func(x *exam) {
		var v map[string]string
		// etcd decides on the versions of cluster and storage shortly after it is ready.
		began := time.Now()
		for {
			code, body := x.page("/version")
			equal(x, "status", code, http.StatusOK)
			v = nil
			if err := json.Unmarshal([]byte(body), &v); err != nil {
				x.Fatalf("%q: %v", body, err)
			}
			old := ""
			for _, field := range []string{"etcdserver", "etcdcluster", "storage"} {
				if semver.Compare("v"+v[field], "v3.7.0") < 0 {
					old = fmt.Sprintf("%s is %q, want 3.7.0 or later", field, v[field])
				}
			}
			if old == "" {
				break
			}
			if time.Since(began) > 30*time.Second {
				x.Fatal(old)
			}
			time.Sleep(50 * time.Millisecond) // an HTTP page sends no signal
		}
		equal(x, "fields", len(v), 3)
	}},

	{name: "only GET is taken where only reading makes sense", run: func(x *exam) {
		for _, path := range []string{"/health", "/version", "/livez", "/readyz"} {
			r, err := http.Post(x.URL(path), "text/plain", nil)
			if err != nil {
				x.Fatal(err)
			}
			r.Body.Close()
			equal(x, "status of POST "+path, r.StatusCode, http.StatusMethodNotAllowed)
		}
		code, _ := x.page("/nothing-here")
		equal(x, "status of an unknown path", code, http.StatusNotFound)
	}},

	{name: "/metrics has the names that etcd's dashboards use", run: func(x *exam) {
		x.put("a", "")
		x.delete("a")
		x.rangeRequest(everything)
		x.watch(allKeys)
		code, body := x.page("/metrics")
		equal(x, "status", code, http.StatusOK)
		for _, name := range metricNames {
			if !strings.Contains(body, "# TYPE "+name+" ") {
				x.Errorf("no metric %s", name)
			}
		}
	}},
}
