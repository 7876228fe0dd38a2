package etcdapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// versions is the answer of /version.
type versions struct {
	Server  string `json:"etcdserver"`
	Cluster string `json:"etcdcluster"`
	Storage string `json:"storage"`
}

// Versions is what /version answers, on the peer port too.
func Versions(etcd string) []byte { return []byte(encodeJSON(versionsOf(etcd))) }

// versionsOf derives cluster and storage version from the server's: major and minor count (etcd: 3.7.3 → 3.7.0).
func versionsOf(etcd string) versions {
	parts := strings.SplitN(etcd, ".", 3)
	for len(parts) < 2 {
		parts = append(parts, "0")
	}
	minor := parts[0] + "." + parts[1] + ".0"
	return versions{Server: etcd, Cluster: minor, Storage: minor}
}

// clusterMinor is the cluster version as etcd's metric shows it: "3.7".
func (v versions) clusterMinor() string { return strings.TrimSuffix(v.Cluster, ".0") }

// requestTimeout is etcd's: for a request itself, and for two elections meanwhile.
func (s *Server) requestTimeout() time.Duration {
	return 5*time.Second + 2*s.opts.ElectionTimeout
}

// HTTPHandler serves etcd's HTTP endpoints: /health, /livez, /readyz (each check also under its own path), /version
// and /metrics. Other paths are 404.
func (s *Server) HTTPHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/version", onlyGet(s.serveVersion))
	mux.HandleFunc("/health", onlyGet(s.serveHealth))
	mux.Handle("/metrics", s.MetricsHandler())
	s.installChecks(mux, "livez",
		check{"serializable_read", s.readCheck(true)},
	)
	s.installChecks(mux, "readyz",
		check{"data_corruption", s.corruptionCheck},
		check{"serializable_read", s.readCheck(true)},
		check{"linearizable_read", s.readCheck(false)},
		check{"non_learner", s.learnerCheck},
	)
	return mux
}

// MetricsHandler serves the metrics in Prometheus' text form (--listen-metrics-urls has them on a port of their own).
func (s *Server) MetricsHandler() http.Handler {
	reg := s.metrics.Registry()
	return promhttp.InstrumentMetricHandler(reg, promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
}

func onlyGet(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet {
			w.Header().Set("Allow", http.MethodGet)
			http.Error(w, "Method Not Allowed", http.StatusMethodNotAllowed)
			return
		}
		h(w, r)
	}
}

func (s *Server) serveVersion(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	fmt.Fprint(w, encodeJSON(s.version))
}

func encodeJSON(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("etcdapi: cannot encode a %T: %v", v, err)) // only our own plain structs come here
	}
	return string(b)
}

type healthAnswer struct {
	Health string `json:"health"` // "true" or "false", a string as in etcd
	Reason string `json:"reason"`
}

// serveHealth is etcd's old /health: alarms (less those in ?exclude=), leader, a read. ?serializable=true asks for
// this member alone.
func (s *Server) serveHealth(w http.ResponseWriter, r *http.Request) {
	reason := s.unhealthy(r)
	if reason == "" {
		s.metrics.healthSuccess.Inc()
		fmt.Fprint(w, encodeJSON(healthAnswer{Health: "true"}))
		return
	}
	s.metrics.healthFailures.Inc()
	http.Error(w, encodeJSON(healthAnswer{Health: "false", Reason: reason}), http.StatusServiceUnavailable)
}

func (s *Server) unhealthy(r *http.Request) (reason string) {
	excluded := querySet(r, "exclude")
	for _, a := range s.opts.Backend.Alarms() {
		if excluded[a.Alarm.String()] {
			continue
		}
		switch a.Alarm {
		case pb.AlarmType_NOSPACE, pb.AlarmType_CORRUPT:
			return "ALARM " + a.Alarm.String()
		}
		return "ALARM UNKNOWN"
	}
	serializable := r.URL.Query().Get("serializable") == "true"
	if !serializable && s.cluster.Status().Leader == 0 {
		return "RAFT NO LEADER"
	}
	ctx, cancel := context.WithTimeout(r.Context(), s.requestTimeout())
	defer cancel()
	if err := s.readCheck(serializable)(ctx); err != nil {
		return "RANGE ERROR:" + err.Error()
	}
	return ""
}

// querySet is the set of the non-empty values of a query parameter that may be given several times.
func querySet(r *http.Request, name string) map[string]bool {
	set := map[string]bool{}
	for _, v := range r.URL.Query()[name] {
		if v != "" {
			set[v] = true
		}
	}
	return set
}

// check is one part of /livez or /readyz.
type check struct {
	name string
	run  func(ctx context.Context) error
}

// readCheck reads the first key. The linearizable one also asks whether the storage takes writes: in etcd it needs
// the cluster's agreement, which a member whose disk fails does not get.
func (s *Server) readCheck(serializable bool) func(context.Context) error {
	return func(ctx context.Context) error {
		if !serializable {
			if err := s.opts.Backend.Err(); err != nil {
				return err
			}
		}
		if err := s.ready(ctx, serializable); err != nil {
			return err
		}
		view := s.opts.View()
		defer view.Release()
		_, err := view.Range(ctx, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Limit: 1, KeysOnly: true, Serializable: serializable})
		return err
	}
}

func (s *Server) learnerCheck(context.Context) error {
	if s.cluster.Status().Learner {
		return errors.New("not supported for learner")
	}
	return nil
}

func (s *Server) corruptionCheck(context.Context) error {
	for _, a := range s.opts.Backend.Alarms() {
		if a.Alarm == pb.AlarmType_CORRUPT {
			return fmt.Errorf("alarm activated: %s", a.Alarm)
		}
	}
	return nil
}

// installChecks serves all checks under /<kind> (less those in ?exclude=) and each under /<kind>/<name>.
func (s *Server) installChecks(mux *http.ServeMux, kind string, checks ...check) {
	mux.HandleFunc("/"+kind, onlyGet(func(w http.ResponseWriter, r *http.Request) {
		excluded := querySet(r, "exclude")
		var wanted []check
		for _, c := range checks {
			if !excluded[c.name] {
				wanted = append(wanted, c)
			}
		}
		s.serveChecks(w, r, kind, wanted)
	}))
	for _, c := range checks {
		mux.HandleFunc("/"+kind+"/"+c.name, onlyGet(func(w http.ResponseWriter, r *http.Request) {
			s.serveChecks(w, r, kind, []check{c})
		}))
	}
}

// serveChecks answers "ok", with a line per check if ?verbose is given or one failed (then 503).
func (s *Server) serveChecks(w http.ResponseWriter, r *http.Request, kind string, checks []check) {
	var report strings.Builder
	failed := false
	for _, c := range checks {
		err := c.run(r.Context())
		s.metrics.healthChecked(kind, c.name, err == nil)
		if err != nil {
			failed = true
			fmt.Fprintf(&report, "[-]%s failed: %v\n", c.name, err)
		} else {
			fmt.Fprintf(&report, "[+]%s ok\n", c.name)
		}
	}
	if failed {
		http.Error(w, report.String(), http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if _, verbose := r.URL.Query()["verbose"]; verbose {
		fmt.Fprint(w, report.String())
	}
	fmt.Fprint(w, "ok\n")
}
