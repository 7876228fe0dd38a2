package etcdapi

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	"github.com/quire-db/quire/backend"
)

func methods(d *grpc.ServiceDesc) []string {
	out := []string{d.ServiceName, fmt.Sprint(d.Metadata)}
	for _, m := range d.Methods {
		out = append(out, m.MethodName)
	}
	for _, s := range d.Streams {
		out = append(out, fmt.Sprintf("%s %v %v", s.StreamName, s.ClientStreams, s.ServerStreams))
	}
	slices.Sort(out)
	return out
}

func get(t *testing.T, s *Server, path string) (code int, body string, h http.Header) {
	t.Helper()
	w := httptest.NewRecorder()
	s.HTTPHandler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w.Code, w.Body.String(), w.Result().Header
}

func scrape(t *testing.T, s *Server) string {
	t.Helper()
	code, body, _ := get(t, s, "/metrics")
	if code != http.StatusOK {
		t.Fatalf("/metrics: %d %s", code, body)
	}
	return body
}

func TestHTTPEndpointsAnswerAsEtcd(t *testing.T) {
	nospace := &pb.AlarmMember{MemberID: 1, Alarm: pb.AlarmType_NOSPACE}
	corrupt := &pb.AlarmMember{MemberID: 1, Alarm: pb.AlarmType_CORRUPT}
	const (
		healthy = `{"health":"true","reason":""}`
		live    = "[+]serializable_read ok\n"
		ready   = "[+]data_corruption ok\n[+]serializable_read ok\n[+]linearizable_read ok\n[+]non_learner ok\n"
	)
	diskFull, closed := backend.ErrDiskFull.Error(), backend.ErrClosed.Error()
	rangeError := `{"health":"false","reason":"RANGE ERROR:` + diskFull + `"}` + "\n"
	for _, c := range []struct {
		path     string
		alarms   []*pb.AlarmMember
		noLeader bool
		err      error // of the storage
		readErr  error
		code     int
		body     string
	}{
		{path: "/version", code: 200, body: `{"etcdserver":"3.7.3","etcdcluster":"3.7.0","storage":"3.7.0"}`},
		{path: "/health", code: 200, body: healthy},
		{path: "/health?serializable=true", code: 200, body: healthy},
		{path: "/health", alarms: []*pb.AlarmMember{nospace}, code: 503, body: `{"health":"false","reason":"ALARM NOSPACE"}` + "\n"},
		{path: "/health", alarms: []*pb.AlarmMember{corrupt}, code: 503, body: `{"health":"false","reason":"ALARM CORRUPT"}` + "\n"},
		{path: "/health", alarms: []*pb.AlarmMember{{Alarm: 77}}, code: 503, body: `{"health":"false","reason":"ALARM UNKNOWN"}` + "\n"},
		{path: "/health?exclude=NOSPACE", alarms: []*pb.AlarmMember{nospace}, code: 200, body: healthy},
		{path: "/health?exclude=NOSPACE", alarms: []*pb.AlarmMember{nospace, corrupt}, code: 503, body: `{"health":"false","reason":"ALARM CORRUPT"}` + "\n"},
		{path: "/health?exclude=NOSPACE&exclude=CORRUPT", alarms: []*pb.AlarmMember{nospace, corrupt}, code: 200, body: healthy},
		{path: "/health?exclude=", alarms: []*pb.AlarmMember{nospace}, code: 503, body: `{"health":"false","reason":"ALARM NOSPACE"}` + "\n"},
		{path: "/health", noLeader: true, code: 503, body: `{"health":"false","reason":"RAFT NO LEADER"}` + "\n"},
		{path: "/health?serializable=true", noLeader: true, code: 200, body: healthy},
		{path: "/health", err: backend.ErrDiskFull, code: 503, body: rangeError},
		{path: "/health?serializable=true", err: backend.ErrDiskFull, code: 200, body: healthy},
		{path: "/health?serializable=true", readErr: backend.ErrDiskFull, code: 503, body: rangeError},

		{path: "/livez", code: 200, body: "ok\n"},
		{path: "/livez?verbose", code: 200, body: live + "ok\n"},
		{path: "/livez?verbose=true", code: 200, body: live + "ok\n"},
		{path: "/livez/serializable_read", code: 200, body: "ok\n"},
		{path: "/livez/serializable_read?verbose", code: 200, body: live + "ok\n"},
		{path: "/livez", err: backend.ErrDiskFull, alarms: []*pb.AlarmMember{corrupt}, code: 200, body: "ok\n"},
		{path: "/livez", readErr: backend.ErrClosed, code: 503, body: "[-]serializable_read failed: " + closed + "\n\n"},
		{path: "/livez?exclude=serializable_read", readErr: backend.ErrClosed, code: 200, body: "ok\n"},

		{path: "/readyz", code: 200, body: "ok\n"},
		{path: "/readyz?verbose", code: 200, body: ready + "ok\n"},
		{path: "/readyz?verbose&exclude=non_learner&exclude=unknown", code: 200, body: strings.TrimSuffix(ready, "[+]non_learner ok\n") + "ok\n"},
		{path: "/readyz", alarms: []*pb.AlarmMember{nospace}, code: 200, body: "ok\n"},
		{path: "/readyz", alarms: []*pb.AlarmMember{corrupt}, code: 503,
			body: "[-]data_corruption failed: alarm activated: CORRUPT\n" + strings.TrimPrefix(ready, "[+]data_corruption ok\n") + "\n"},
		{path: "/readyz/data_corruption", alarms: []*pb.AlarmMember{corrupt}, code: 503, body: "[-]data_corruption failed: alarm activated: CORRUPT\n\n"},
		{path: "/readyz/linearizable_read", err: backend.ErrDiskFull, code: 503, body: "[-]linearizable_read failed: " + diskFull + "\n\n"},
		{path: "/readyz/serializable_read", err: backend.ErrDiskFull, code: 200, body: "ok\n"},
		{path: "/readyz/non_learner", code: 200, body: "ok\n"},

		{path: "/", code: 404, body: "404 page not found\n"},
		{path: "/livez/linearizable_read", code: 404, body: "404 page not found\n"},
		{path: "/versions", code: 404, body: "404 page not found\n"},
	} {
		f := newFakeStore()
		f.alarms, f.err, f.readErr = c.alarms, c.err, c.readErr
		s := newTestServer(t, f, func(o *Options) {
			if c.noLeader {
				o.Cluster = &fakeCluster{status: ClusterStatus{ID: testMember}}
			}
			o.View = func() View { return &failingView{f.View().(*fakeView)} }
		})
		code, body, _ := get(t, s, c.path)
		if code != c.code || body != c.body {
			t.Errorf("%s (alarms %v, storage %v, read %v): %d %q, want %d %q", c.path, c.alarms, c.err, c.readErr, code, body, c.code, c.body)
		}
	}
}

func TestHTTPTakesOnlyGET(t *testing.T) {
	s := newTestServer(t, newFakeStore(), nil)
	for _, path := range []string{"/health", "/livez", "/readyz", "/readyz/non_learner", "/version"} {
		w := httptest.NewRecorder()
		s.HTTPHandler().ServeHTTP(w, httptest.NewRequest(http.MethodPost, path, nil))
		if w.Code != http.StatusMethodNotAllowed || w.Result().Header.Get("Allow") != http.MethodGet {
			t.Errorf("POST %s: %d, Allow %q", path, w.Code, w.Result().Header.Get("Allow"))
		}
	}
}

func TestVersionsOf(t *testing.T) {
	for in, want := range map[string]versions{
		"3.7.3":         {"3.7.3", "3.7.0", "3.7.0"},
		"3.8.0-alpha.0": {"3.8.0-alpha.0", "3.8.0", "3.8.0"},
		"4":             {"4", "4.0.0", "4.0.0"},
	} {
		if got := versionsOf(in); got != want {
			t.Errorf("%s: %v", in, got)
		}
	}
	if got := versionsOf("3.7.3").clusterMinor(); got != "3.7" {
		t.Errorf("clusterMinor: %s", got)
	}
}

func TestMetricsHaveEtcdsNamesAndCountWhatHappened(t *testing.T) {
	f := newFakeStore()
	f.stats = backend.Stats{DBSize: 4096, DBSizeInUse: 2048, Quota: 1 << 20, AppliedIndex: 9, CompactRevision: 3, Leases: 2, ValueCacheBytes: 11, LogicalBytes: 12}
	m := NewMetrics(MetricsOptions{Extensive: true})
	s := newTestServer(t, f, func(o *Options) { o.Metrics = m })
	conn := dial(t, s)
	kv, ctx := pb.NewKVClient(conn), t.Context()

	mustDo := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		_, err := kv.Put(ctx, &pb.PutRequest{Key: []byte("a"), Value: []byte("12345")})
		mustDo(err)
	}
	_, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte("a")})
	mustDo(err)
	f.onWrite = nil
	_, err = kv.Txn(ctx, &pb.TxnRequest{Success: ops(opPut("x"), opRange("y"), opDelete("z", "")), Failure: ops(opPut("x"))})
	mustDo(err)
	if _, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte("a"), Revision: 999}); err == nil {
		t.Fatal("no error")
	}
	lease := pb.NewLeaseClient(conn)
	_, err = lease.LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: 5, TTL: 60})
	mustDo(err)
	_, err = lease.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: 5})
	mustDo(err)

	m.BatchCommitted(3, 5, 200*time.Millisecond, 2*time.Millisecond, 5*time.Millisecond)
	m.Applied(&backend.Applied{Ranges: 1, Puts: 3, Deletes: 1, Txns: 1, PutBytes: 13, Commands: []backend.AppliedCommand{
		{Request: &pb.PutRequest{Key: []byte("a"), Value: []byte("secret")}, Response: &pb.PutResponse{}, Took: time.Second},
		{Request: &pb.LeaseGrantRequest{ID: 5, TTL: 60}},
		{Request: &pb.LeaseRevokeRequest{ID: 5}},
		{Request: &pb.LeaseRevokeRequest{ID: 6}, Err: backend.ErrLeaseNotFound},
		{Expired: 2}, {},
		{Request: &pb.CompactionRequest{Revision: 3}, Err: backend.ErrCompacted, Took: time.Millisecond},
		{Request: &pb.CompactionRequest{Revision: 4}},
	}})
	m.CompactionStep(time.Millisecond)
	m.WatchEventsSent(4, time.Millisecond)
	m.WatchControlSent(time.Millisecond)
	m.WatchProgressSent(time.Millisecond)
	m.Feature("AllAlpha", "ALPHA", true)
	m.KnownPeers(0xa, []uint64{0xa, 0xb})
	m.LogWritten(512, time.Millisecond)
	m.SnapshotMade(time.Millisecond)
	m.SnapshotServing(0xb)
	m.SnapshotServed(0xb, time.Millisecond, nil)
	m.SnapshotServed(0xc, time.Millisecond, io.EOF)
	m.SnapshotBegun(0xb)
	m.SnapshotReceived(0xb, nil)
	m.SnapshotInstalling(1)
	m.CompactionDone(3, 100, 300*time.Millisecond)
	m.LeaseExpired(1)
	m.Alarm(&pb.AlarmMember{MemberID: 0xabc, Alarm: pb.AlarmType_NOSPACE}, true)
	m.StorageError(backend.ErrDiskFull)
	m.WatchStreams(2)
	m.Watchers(3)
	m.SlowWatchers(1)
	m.PendingEvents(4)
	m.EventsSent(6)
	_, err = pb.NewMaintenanceClient(conn).HashKV(ctx, &pb.HashKVRequest{})
	mustDo(err)
	get(t, s, "/health")
	get(t, s, "/readyz")

	text := scrape(t, s)
	for _, want := range []string{
		"etcd_server_has_leader 1", "etcd_server_is_leader 1", "etcd_server_is_learner 0", "etcd_server_leader_changes_seen_total 1",
		`etcd_server_version{server_version="3.7.3"} 1`, `etcd_cluster_version{cluster_version="3.7"} 1`,
		`etcd_server_id{server_id="dead00000000beef"} 1`,
		"etcd_server_proposals_committed_total 10", "etcd_server_proposals_applied_total 10", "etcd_server_proposals_pending 0", "etcd_server_proposals_failed_total 0",
		"etcd_mvcc_put_total 3", "etcd_mvcc_delete_total 1", "etcd_mvcc_range_total 3", "etcd_mvcc_txn_total 1",
		"etcd_debugging_mvcc_total_put_size_in_bytes 13",
		"etcd_mvcc_db_total_size_in_bytes 4096", "etcd_mvcc_db_total_size_in_use_in_bytes 2048", "etcd_server_quota_backend_bytes 1.048576e+06",
		"etcd_debugging_mvcc_keys_total 1", "etcd_debugging_mvcc_current_revision 4", "etcd_debugging_mvcc_compact_revision 3",
		"etcd_debugging_lease_granted_total 1", "etcd_debugging_lease_revoked_total 3", "etcd_debugging_lease_renewed_total 0", "etcd_debugging_server_lease_expired_total 1",
		"etcd_debugging_lease_ttl_total_sum 60", "etcd_debugging_auth_revision 0",
		`etcd_server_apply_duration_seconds_count{op="Put",success="true",version="v3"} 1`,
		`etcd_server_apply_duration_seconds_count{op="LeaseRevoke",success="true",version="v3"} 2`,
		`etcd_server_apply_duration_seconds_count{op="LeaseRevoke",success="false",version="v3"} 1`,
		`etcd_server_apply_duration_seconds_count{op="Compaction",success="true",version="v3"} 2`,
		"etcd_debugging_mvcc_index_compaction_pause_duration_milliseconds_count 1", "etcd_debugging_mvcc_db_compaction_pause_duration_milliseconds_count 1",
		"etcd_debugging_server_watch_send_loop_watch_stream_duration_seconds_count 1",
		"etcd_debugging_server_watch_send_loop_watch_stream_duration_per_event_seconds_sum 0.00025",
		"etcd_debugging_server_watch_send_loop_control_stream_duration_seconds_count 1", "etcd_debugging_server_watch_send_loop_progress_duration_seconds_count 1",
		`etcd_server_feature_enabled{name="AllAlpha",stage="ALPHA"} 1`,
		`etcd_network_known_peers{Local="a",Remote="a"} 1`, `etcd_network_known_peers{Local="a",Remote="b"} 1`,
		"etcd_disk_wal_write_bytes_total 512", "etcd_disk_wal_write_duration_seconds_count 1", "etcd_debugging_snap_save_total_duration_seconds_count 1",
		`etcd_network_snapshot_send_success{To="b"} 1`, `etcd_network_snapshot_send_failures{To="c"} 1`, `etcd_network_snapshot_send_inflights_total{To="b"} 0`,
		`etcd_network_snapshot_receive_success{From="b"} 1`, `etcd_network_snapshot_receive_inflights_total{From="b"} 0`, "etcd_snap_db_save_total_duration_seconds_count 1",
		"etcd_server_snapshot_apply_in_progress_total 1", "os_fd_used ", "os_fd_limit ", "etcd_mvcc_hash_rev_duration_seconds_count 1", "etcd_mvcc_hash_duration_seconds_count 0",
		"etcd_debugging_mvcc_watch_stream_total 2", "etcd_debugging_mvcc_watcher_total 3", "etcd_debugging_mvcc_slow_watcher_total 1",
		"etcd_debugging_mvcc_pending_events_total 4", "etcd_debugging_mvcc_events_total 6",
		"etcd_disk_backend_commit_duration_seconds_count 1", "etcd_disk_wal_fsync_duration_seconds_count 1",
		"etcd_debugging_mvcc_db_compaction_keys_total 100", "etcd_server_slow_apply_total 1", "etcd_server_slow_read_indexes_total 0",
		`etcd_debugging_server_alarms{alarm_type="NOSPACE",server_id="abc"} 1`,
		`etcd_server_range_duration_seconds_count{success="false"} 1`, `etcd_server_range_duration_seconds_count{success="true"} 1`,
		`etcd_server_request_duration_seconds_count{success="true",type="Put"} 2`,
		`etcd_server_client_requests_total{client_api_version="unknown",type="unary"} 8`,
		"etcd_server_health_success 1", "etcd_server_health_failures 0",
		`etcd_server_healthcheck{name="data_corruption",type="readyz"} 1`, `etcd_server_healthchecks_total{name="non_learner",status="success",type="readyz"} 1`,
		`grpc_server_handled_total{grpc_code="OK",grpc_method="Put",grpc_service="etcdserverpb.KV",grpc_type="unary"} 2`,
		`grpc_server_handled_total{grpc_code="OutOfRange",grpc_method="Range",grpc_service="etcdserverpb.KV",grpc_type="unary"} 1`,
		`grpc_server_handled_total{grpc_code="OK",grpc_method="Watch",grpc_service="etcdserverpb.Watch",grpc_type="bidi_stream"} 0`,
		`grpc_server_handling_seconds_count{grpc_method="Put",grpc_service="etcdserverpb.KV",grpc_type="unary"} 2`,
		"quire_storage_healthy 0", "quire_storage_errors_total 1", "quire_leases 2", "quire_value_cache_bytes 11", "quire_logical_bytes 12",
		"quire_batch_commands_sum 3", "quire_batch_rows_sum 5", "go_goroutines ", "process_open_fds ",
	} {
		if !strings.Contains(text, "\n"+want) {
			t.Errorf("no line %q", want)
		}
	}
	for _, name := range []string{"etcd_network_client_grpc_received_bytes_total", "etcd_network_client_grpc_sent_bytes_total"} {
		if strings.Contains(text, "\n"+name+" 0\n") {
			t.Errorf("%s is 0", name)
		}
	}
	m.StorageHealed()
	m.Alarm(&pb.AlarmMember{MemberID: 0xabc, Alarm: pb.AlarmType_NOSPACE}, false)
	text = scrape(t, s)
	for _, want := range []string{"quire_storage_healthy 1", `etcd_debugging_server_alarms{alarm_type="NOSPACE",server_id="abc"} 0`} {
		if !strings.Contains(text, "\n"+want) {
			t.Errorf("after healing: no line %q", want)
		}
	}
}

func TestHandlingHistogramOnlyWhenExtensive(t *testing.T) {
	s := newTestServer(t, newFakeStore(), nil)
	dial(t, s)
	if text := scrape(t, s); strings.Contains(text, "grpc_server_handling_seconds") || !strings.Contains(text, "grpc_server_started_total") {
		t.Error("basic metrics must have grpc_server_started_total and not grpc_server_handling_seconds")
	}
}

// Alerts for etcd compare the size with the quota: they must come before a write is refused.
func TestSizesAreNoLessThanWhatTheQuotaCounts(t *testing.T) {
	f := newFakeStore()
	f.stats = backend.Stats{DBSize: 100, DBSizeInUse: 50, LogicalBytes: 120, Quota: 200}
	text := scrape(t, newTestServer(t, f, func(*Options) {}))
	for _, want := range []string{"etcd_mvcc_db_total_size_in_bytes 120\n", "etcd_mvcc_db_total_size_in_use_in_bytes 120\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q", want)
		}
	}
}

func TestMetricsBeforeThereIsAServer(t *testing.T) {
	m := NewMetrics(MetricsOptions{})
	m.BatchCommitted(1, 1, 0, 0, 0)
	families, err := m.Registry().Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "etcd_server_has_leader" {
			t.Error("state without a server")
		}
	}
}
