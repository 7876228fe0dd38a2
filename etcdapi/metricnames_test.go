package etcdapi

import (
	"cmp"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// TestMetricsAreAsDocumented: docs/metrics.md has a row for each metric of etcd and of our own that is registered, and for
// no other, and says which of them mean nothing.
func TestMetricsAreAsDocumented(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "docs", "metrics.md"))
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]string{} // labels by name
	empty := map[string]bool{}
	for _, row := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| ([^|]+) \\| ([^|]+) \\|$").FindAllStringSubmatch(string(page), -1) {
		documented[row[1]] = row[2]
		if strings.HasPrefix(row[3], "always 0") || strings.HasPrefix(row[3], "always empty") || strings.HasPrefix(row[3], "no series") {
			empty[row[1]] = true
		}
	}
	descs := make(chan *prometheus.Desc)
	m := NewMetrics(MetricsOptions{})
	go func() {
		m.Registry().Describe(descs)
		close(descs)
	}()
	description := regexp.MustCompile(`fqName: "([^"]+)".*variableLabels: \{([^}]*)\}`)
	for d := range descs {
		found := description.FindStringSubmatch(d.String())
		if found == nil {
			t.Fatalf("cannot read %s", d)
		}
		name := found[1]
		if !strings.HasPrefix(name, "etcd_") && !strings.HasPrefix(name, "os_") && !strings.HasPrefix(name, "quire_") {
			continue
		}
		labels := strings.Split(found[2], ",")
		slices.Sort(labels)
		want := cmp.Or(strings.Join(labels, ", "), "–")
		if got, ok := documented[name]; !ok || got != want {
			t.Errorf("%s with labels %s: documented is %q", name, want, got)
		}
		delete(documented, name)
	}
	for name := range documented {
		t.Errorf("%s is documented, and not registered", name)
	}
	for _, a := range absentMetrics {
		if !empty[a.name] {
			t.Errorf("docs/metrics.md does not say that %s means nothing here", a.name)
		}
		delete(empty, a.name)
	}
	for name := range empty {
		t.Errorf("docs/metrics.md says that %s means nothing, and it may have values", name)
	}
}
