package surface

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/test/etcd/start"
	"github.com/quire-db/quire/test/ports"
)

// TestPagesOfEtcd: every page, asked for in every way, is answered with a real etcd's status, type and headers, on the
// port of the clients and on that of --listen-metrics-urls.
func TestPagesOfEtcd(t *testing.T) {
	t.Parallel()
	paths := []string{
		"/", "/health", "/health/", "/health?exclude=NOSPACE", "/health?serializable=true", "/livez", "/livez/", "/livez?verbose", "/livez/nothing",
		"/readyz", "/readyz?verbose", "/readyz?exclude=non_learner&exclude=nothing&verbose", "/readyz?allowlist=non_learner&verbose",
		"/livez/serializable_read", "/readyz/data_corruption", "/readyz/serializable_read", "/readyz/linearizable_read", "/readyz/non_learner",
		"/version", "/version/", "/metrics", "/metrics/", "/debug", "/debug/", "/debug/vars", "/debug/requests", "/debug/events",
		"/debug/pprof", "/debug/pprof/", "/debug/pprof/heap", "/debug/pprof/allocs", "/debug/pprof/mutex", "/debug/pprof/block", "/debug/pprof/goroutine",
		"/debug/pprof/threadcreate", "/debug/pprof/cmdline", "/debug/pprof/symbol",
		"/config/local/log", "/v2/keys", "/members", "/raft", "/v3", "/v3/", "/v3/kv/range", "/v3beta/kv/range",
	}
	for _, flag := range []string{"--log-level=info", "--enable-pprof", "--log-level=debug"} {
		t.Run(flag, func(t *testing.T) {
			got := map[string][]string{}
			for _, p := range []program{etcd(t), quire(t)} {
				metrics := ports.FreeAddress(t)
				s := p.start(t, 1, flag, "--listen-metrics-urls=http://"+metrics)[0]
				eventually(t, "the version of the cluster is decided", func() bool {
					return strings.Contains(page(t, s.url("/version")), `"etcdcluster":"3.7.0","storage":"3.7.0"`)
				})
				for i, address := range []string{s.address, metrics} {
					for _, path := range paths {
						for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodOptions} {
							got[p.name] = append(got[p.name], fmt.Sprintf("port %d: %s %s: %s", i, method, path, ask(t, method, "http://"+address+path)))
						}
					}
				}
				s.Stop(20 * time.Second)
			}
			for i, want := range got["etcd"] {
				if got["quire"][i] != want {
					t.Errorf("quire: %s\netcd: %s", got["quire"][i], want)
				}
			}
		})
	}
}

// ask describes an answer, with its text where that is always the same.
func ask(t *testing.T, method, url string) string {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultTransport.RoundTrip(r) // follows no redirection
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	h := resp.Header
	text := fmt.Sprintf("%d type %q allow %q sniff %q location %q origin %q", resp.StatusCode, h.Get("Content-Type"), h.Get("Allow"),
		h.Get("X-Content-Type-Options"), h.Get("Location"), h.Get("Access-Control-Allow-Origin"))
	switch {
	case strings.Contains(url, "/debug/") || strings.Contains(url, "/metrics") || strings.Contains(url, "/v3"):
	case strings.Contains(url, "verbose"): // etcd lists the checks in any order
		text += fmt.Sprintf(" %d bytes", len(body))
	default:
		text += fmt.Sprintf(" %q", body)
	}
	return text
}

// TestDebugVars: etcd's own variables are there.
func TestDebugVars(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, p program) {
		s := p.start(t, 1)[0]
		var vars struct {
			Limit int64 `json:"file_descriptor_limit"`
			Raft  struct {
				ID      string
				Lead    string
				Term    uint64
				Applied uint64
				State   string `json:"raftState"`
			} `json:"raft.status"`
			Cmdline  []string       `json:"cmdline"`
			Memstats map[string]any `json:"memstats"`
		}
		if err := json.Unmarshal([]byte(page(t, s.url("/debug/vars"))), &vars); err != nil {
			t.Fatal(err)
		}
		if vars.Limit <= 0 || vars.Raft.Lead == "" || vars.Raft.Lead != vars.Raft.ID || vars.Raft.Term == 0 || vars.Raft.State != "StateLeader" ||
			len(vars.Cmdline) < 2 || len(vars.Memstats) == 0 {
			t.Errorf("/debug/vars says %+v", vars)
		}
	})
}

// TestDebugVarsWithoutRaft: what is applied is what Status says.
func TestDebugVarsWithoutRaft(t *testing.T) {
	t.Parallel()
	s := start.Quire(t, start.Options{})
	status, err := s.Maintenance.Status(within(t, 60*time.Second), &pb.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf(`"commit":%d,"applied":%d,`, status.RaftIndex, status.RaftAppliedIndex)
	if text := page(t, "http://"+s.Address+"/debug/vars"); !strings.Contains(strings.Join(strings.Fields(text), ""), want) {
		t.Errorf("/debug/vars does not say %s:\n%s", want, text)
	}
}

// TestDebugRequests: calls are listed under etcd's names at the log level debug, without values and passwords. (A real etcd
// shows values.)
func TestDebugRequests(t *testing.T) {
	t.Parallel()
	const secret = "this-is-secret"
	s := quire(t).start(t, 1, "--log-level=debug")[0]
	c, ctx := s.client(t), within(t, 60*time.Second)
	if _, err := c.Put(ctx, "the-key", secret); err != nil {
		t.Fatal(err)
	}
	if _, err := pb.NewAuthClient(c.ActiveConnection()).UserAdd(ctx, &pb.AuthUserAddRequest{Name: "somebody", Password: secret}); err != nil {
		t.Fatal(err)
	}
	if text := page(t, s.url("/debug/requests?fam=grpc.Recv.etcdserverpb.KV&b=0&exp=1")); !strings.Contains(text, "/etcdserverpb.KV/Put") ||
		!strings.Contains(text, "the-key") || strings.Contains(text, secret) {
		t.Errorf("/debug/requests shows %s", text)
	}
	if text := page(t, s.url("/debug/requests?fam=grpc.Recv.etcdserverpb.Auth&b=0&exp=1")); !strings.Contains(text, "/etcdserverpb.Auth/UserAdd") ||
		strings.Contains(text, secret) {
		t.Errorf("/debug/requests shows %s", text)
	}
	if strings.Contains(s.Output(), secret) {
		t.Error("the log shows a value or a password")
	}
}
