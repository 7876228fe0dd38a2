package surface

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	clientv3 "go.etcd.io/etcd/client/v3"
	_ "go.etcd.io/etcd/server/v3/embed" // registers its metrics
	_ "go.etcd.io/etcd/server/v3/proxy/grpcproxy"
)

// TestMetricsOfEtcd: whatever a real etcd shows after the same requests, quire shows, of the same type and with the same
// labels.
func TestMetricsOfEtcd(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		members int
		level   string
	}{{1, "basic"}, {1, "extensive"}, {3, "extensive"}} {
		t.Run(fmt.Sprintf("%d %s", c.members, c.level), func(t *testing.T) {
			seen := map[string]map[string]*dto.MetricFamily{}
			for _, p := range []program{etcd(t), quire(t)} {
				all := p.start(t, c.members, "--metrics="+c.level)
				traffic(t, all[0])
				if c.members > 1 {
					eventually(t, "bytes are counted that went to the others", func() bool {
						return len(metrics(t, all[0])["etcd_network_peer_sent_bytes_total"].GetMetric()) == c.members-1
					})
				}
				seen[p.name] = metrics(t, all[0])
				for _, s := range all {
					s.Stop(20 * time.Second)
				}
			}
			if len(seen["etcd"]) < 120 {
				t.Fatalf("etcd shows only %d metrics", len(seen["etcd"]))
			}
			for _, name := range slices.Sorted(maps.Keys(seen["etcd"])) {
				theirs, ours := seen["etcd"][name], seen["quire"][name]
				switch {
				case ours == nil:
					t.Errorf("no %s", name)
				case ours.GetType() != theirs.GetType():
					t.Errorf("%s is a %s, want a %s", name, ours.GetType(), theirs.GetType())
				case labels(ours) != labels(theirs):
					t.Errorf("%s has labels %s, want %s", name, labels(ours), labels(theirs))
				}
			}
		})
	}
}

// TestMetricsCountAsEtcd: the counters that etcd's own tests look at, after the same requests.
func TestMetricsCountAsEtcd(t *testing.T) {
	t.Parallel()
	counted := []string{"etcd_mvcc_put_total", "etcd_mvcc_delete_total", "etcd_mvcc_txn_total", "etcd_debugging_mvcc_keys_total",
		"etcd_debugging_mvcc_total_put_size_in_bytes", "etcd_debugging_mvcc_current_revision", "etcd_debugging_mvcc_compact_revision",
		"etcd_debugging_lease_granted_total", "etcd_debugging_lease_revoked_total", "etcd_debugging_auth_revision"}
	onEach := map[string][]string{}
	for _, p := range []program{etcd(t), quire(t)} {
		all := p.start(t, 3)
		traffic(t, all[0])
		// What a follower has applied it counts, too.
		for i, s := range all {
			var got string
			eventually(t, fmt.Sprintf("member %d of %s has revoked the lease that expired", i, p.name), func() bool {
				shown := metrics(t, s)
				got = ""
				for _, name := range counted {
					got += fmt.Sprintf("%s %v\n", name, value(shown, name))
				}
				return value(shown, "etcd_debugging_lease_revoked_total") == 2
			})
			onEach[p.name] = append(onEach[p.name], got)
		}
		for _, s := range all {
			s.Stop(20 * time.Second)
		}
	}
	for i, want := range onEach["etcd"] {
		if got := onEach["quire"][i]; got != want {
			t.Errorf("member %d: quire has\n%s\netcd has\n%s", i, got, want)
		}
	}
}

// TestMetricsAreDocumented: docs/metrics.md names every metric that an etcd can show, with its labels.
func TestMetricsAreDocumented(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile(filepath.Join("..", "..", "..", "docs", "metrics.md"))
	if err != nil {
		t.Fatal(err)
	}
	description := regexp.MustCompile(`fqName: "([^"]+)".*variableLabels: \{([^}]*)\}`)
	descs := make(chan *prometheus.Desc)
	go func() {
		prometheus.DefaultRegisterer.(*prometheus.Registry).Describe(descs)
		close(descs)
	}()
	found := 0
	for d := range descs {
		m := description.FindStringSubmatch(d.String())
		if m == nil {
			t.Fatalf("cannot read %s", d)
		}
		if !strings.HasPrefix(m[1], "etcd_") && !strings.HasPrefix(m[1], "os_") {
			continue // of Go and of Prometheus: what is not labelled shows in TestMetricsOfEtcd
		}
		found++
		labels := strings.Split(m[2], ",")
		slices.Sort(labels)
		if row := fmt.Sprintf("| `%s` | %s |", m[1], cmp.Or(strings.Join(labels, ", "), "–")); !strings.Contains(string(page), row) {
			t.Errorf("docs/metrics.md has no row that begins with %q", row)
		}
	}
	if found < 100 {
		t.Errorf("etcd registers only %d metrics", found)
	}
}

// traffic makes most of an etcd's metrics appear.
func traffic(t *testing.T, s *server) {
	t.Helper()
	c, ctx := s.client(t), within(t, 60*time.Second)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for i := range 3 {
		_, err := c.Put(ctx, fmt.Sprintf("key_%d", i), "value")
		must(err)
	}
	_, err := c.Get(ctx, "key_1")
	must(err)
	_, err = c.Delete(ctx, "key_", clientv3.WithPrefix())
	must(err)
	_, err = c.Txn(ctx).If(clientv3.Compare(clientv3.Version("a"), "=", 0)).Then(clientv3.OpPut("a", "1"), clientv3.OpPut("b", "2")).Commit()
	must(err)
	_, err = c.Txn(ctx).Then(clientv3.OpGet("a"), clientv3.OpGet("b")).Commit()
	must(err)
	for _, ttl := range []int64{2, 1000} {
		lease, err := c.Grant(ctx, ttl)
		must(err)
		for _, key := range []string{"x", "y"} {
			_, err = c.Put(ctx, fmt.Sprint(key, ttl), "v", clientv3.WithLease(lease.ID))
			must(err)
		}
		if ttl == 2 {
			continue // expires
		}
		_, err = c.KeepAliveOnce(ctx, lease.ID)
		must(err)
		_, err = c.Revoke(ctx, lease.ID)
		must(err)
	}
	_, err = c.Compact(ctx, 3)
	must(err)
	_, err = c.HashKV(ctx, s.address, 0)
	must(err)
	events := c.Watch(ctx, "a", clientv3.WithRev(4))
	if r := <-events; len(r.Events) == 0 {
		t.Fatalf("a watch brought %+v", r)
	}
	for _, path := range []string{"/health", "/livez", "/readyz", "/metrics"} { // the last shows itself the next time
		page(t, s.url(path))
	}
	eventually(t, "a lease expires", func() bool {
		r, err := c.Get(ctx, "x2")
		must(err)
		return r.Count == 0
	})
}

// page fetches what must be there.
func page(t *testing.T, url string) string {
	t.Helper()
	r, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK {
		t.Fatalf("%s: %d %q (%v)", url, r.StatusCode, body, err)
	}
	return string(body)
}

func metrics(t *testing.T, s *server) map[string]*dto.MetricFamily {
	t.Helper()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(page(t, s.url("/metrics"))))
	if err != nil {
		t.Fatal(err)
	}
	return families
}

// value is that of a metric without labels.
func value(families map[string]*dto.MetricFamily, name string) float64 {
	for _, m := range families[name].GetMetric() {
		return m.GetCounter().GetValue() + m.GetGauge().GetValue()
	}
	return -1
}

// labels are all the names of labels in a family.
func labels(f *dto.MetricFamily) string {
	names := map[string]bool{}
	for _, m := range f.Metric {
		for _, l := range m.Label {
			names[l.GetName()] = true
		}
	}
	return strings.Join(slices.Sorted(maps.Keys(names)), ",")
}
