package surface

import (
	"encoding/json"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/quire-db/quire/test/etcd/start"
	"github.com/quire-db/quire/test/ports"
)

// entries are the lines of a log, each of which must be a JSON object with etcd's keys.
func entries(t *testing.T, s *server) (all []map[string]any) {
	t.Helper()
	for _, line := range strings.Split(strings.TrimSpace(s.Output()), "\n") {
		var e map[string]any
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Errorf("a line of the log is not JSON: %q", line)
			continue
		}
		for _, key := range []string{"level", "ts", "caller", "msg"} {
			if text, ok := e[key].(string); !ok || text == "" {
				t.Errorf("no %s in %q", key, line)
			}
		}
		if ts, _ := e["ts"].(string); !regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d{4})$`).MatchString(ts) {
			t.Errorf("ts is %q", ts)
		}
		all = append(all, e)
	}
	return all
}

// TestLogLinesOfEtcd: what etcd's tools and tests wait for in its log is in quire's, with the same message. Neither shows
// values in them.
func TestLogLinesOfEtcd(t *testing.T) {
	t.Parallel()
	const secret = "this-is-a-value"
	onBoth(t, func(t *testing.T, p program) {
		metrics := ports.FreeAddress(t)
		s := p.start(t, 1, "--warning-unary-request-duration=1us", "--warning-apply-duration=1ns", "--snapshot-catchup-entries=1000",
			"--bootstrap-defrag-threshold-megabytes=1000", "--listen-metrics-urls=http://"+metrics)[0]
		c, ctx := s.client(t), within(t, 60*time.Second)
		for range 3 {
			if _, err := c.Put(ctx, "key", secret); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := c.Get(ctx, "key"); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Compact(ctx, 3); err != nil {
			t.Fatal(err)
		}
		found := func(want string) bool { return len(s.Lines(want)) > 0 }
		for _, want := range []string{
			`"msg":"starting an etcd server"`, `"snapshot-catchup-entries":1000`, `"msg":"Skipping defragmentation"`,
			`"msg":"published local member to cluster through raft"`,
			`"msg":"ready to serve client requests"`, `"msg":"serving client traffic insecurely; this is strongly discouraged!"`,
			`"traffic":"grpc+http"`, `"msg":"serving peer traffic"`, `"msg":"serving metrics"`, `"msg":"now serving peer/client/metrics"`,
			`"msg":"finished scheduled compaction"`, `"msg":"request stats"`, `"msg":"apply request took too long"`, `"expected-duration":"1ns"`,
			`"prefix":"read-only range "`, `"response type":"/etcdserverpb.KV/Put","request count":1,"request size":22,"response count":0,`,
			`"response type":"/etcdserverpb.KV/Range","request count":0,"request size":5,"response count":1,`,
		} {
			eventually(t, "the log of "+p.name+" says "+want, func() bool { return found(want) })
		}
		if code, err := s.Stop(20 * time.Second); err != nil {
			t.Fatalf("status %d: %v", code, err)
		}
		for _, want := range []string{`"msg":"closing etcd server"`, `"msg":"closed etcd server"`} {
			if !found(want) {
				t.Errorf("the log of %s does not say %s", p.name, want)
			}
		}
		for _, e := range entries(t, s) {
			if p.name == "etcd" {
				break // it logs as errors that its listeners were closed
			}
			if e["level"] == "error" || e["level"] == "panic" || e["level"] == "fatal" {
				t.Errorf("a start and a stop log %v", e)
			}
		}
		if found(secret) {
			t.Error("the log shows a value")
		}
	})
}

// TestDebugLogIsJSON: not a line of plain text by a library.
func TestDebugLogIsJSON(t *testing.T) {
	t.Parallel()
	s := quire(t).start(t, 1, "--log-level=debug", "--enable-distributed-tracing", "--distributed-tracing-address=127.0.0.1:1",
		"--distributed-tracing-sampling-rate=1000000")[0]
	c, ctx := s.client(t), within(t, 60*time.Second)
	if _, err := c.Put(ctx, "key", "value"); err != nil {
		t.Fatal(err)
	}
	page(t, s.url("/health"))
	s.Stop(20 * time.Second)
	if all := entries(t, s); len(all) < 10 {
		t.Errorf("only %d entries", len(all))
	}
}

// TestLoggingFlagsAreRefusedAsByEtcd: the same mistakes, and what is said about them.
func TestLoggingFlagsAreRefusedAsByEtcd(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, p program) {
		dir := t.TempDir()
		for _, c := range []struct{ flags, want string }{
			{"--logger=capnslog", "--logger=capnslog is removed in v3.5"},
			{"--logger=other", `unknown logger option \"other\"`},
			{"--log-format=xml", "unknown log format: xml, supported values json, console"},
			{"--log-outputs=default,stderr", `multi logoutput for \"default\" is not supported yet`},
			{"--enable-log-rotation", "--log-outputs requires a single file path when --log-rotate-config-json is defined"},
			{"--enable-log-rotation --log-outputs=" + dir + "/a," + dir + "/b", "--log-outputs requires a single file path when --log-rotate-config-json is defined"},
			{"--enable-log-rotation --log-outputs=" + dir + "/a --log-rotation-config-json={", "improperly formatted log rotation config"},
			{"--enable-log-rotation --log-outputs=" + dir + `/a --log-rotation-config-json={"maxsize":true}`, "invalid log rotation config"},
			{"--enable-distributed-tracing --distributed-tracing-sampling-rate=1000001", "sampling"},
		} {
			s := start.RunProgram(t, p.path, nil, append(strings.Fields(c.flags), "--data-dir="+filepath.Join(dir, "d"))...)
			code, err := s.Wait(20 * time.Second)
			if err != nil || code != 1 {
				t.Errorf("%s: status %d (%v), want 1", c.flags, code, err)
			}
			if !strings.Contains(s.Output(), c.want) {
				t.Errorf("%s: the log does not say %q:\n%s", c.flags, c.want, s.Output())
			}
		}
	})
}
