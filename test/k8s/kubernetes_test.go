package k8s

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestKubernetes starts a store and a kube-apiserver and lets every claim of
// this package run against them.
func TestKubernetes(t *testing.T) {
	cp := startControlPlane(t)
	cp.checkEtcdChecks(t, true)
	cp.define(t, definition("widgets", "Widget"))
	old := newOldReader(t, cp)

	t.Run("api", func(t *testing.T) {
		for _, claim := range []struct {
			name string
			test func(*testing.T, *controlPlane)
		}{
			{"Namespaces", testNamespaces},
			{"Objects", testObjects},
			{"LargeObjects", testLargeObjects},
			{"OptimisticConcurrency", testOptimisticConcurrency},
			{"ServerSideApply", testServerSideApply},
			{"Finalizers", testFinalizers},
			{"DeleteCollection", testDeleteCollection},
			{"CustomResources", testCustomResources},
			{"EventsExpire", testEventsExpire},
		} {
			t.Run(claim.name, func(t *testing.T) {
				t.Parallel()
				claim.test(t, cp)
			})
		}
		for _, r := range resources {
			t.Run("Lists"+r.kind+"s", func(t *testing.T) {
				t.Parallel()
				testLists(t, cp, r)
			})
		}
	})
	t.Run("Compaction", func(t *testing.T) { testCompaction(t, cp, old) })
	t.Run("Restarts", func(t *testing.T) { testRestarts(t, cp) })
	t.Run("CachesAreConsistent", func(t *testing.T) { testConsistencyChecks(t, cp, secrets, widgets) })
	t.Run("SecondAPIServer", func(t *testing.T) { testSecondAPIServer(t, cp) })
	t.Run("Logs", func(t *testing.T) { testLogs(t, cp) })
}

// checkEtcdChecks claims that the API server's own checks of its store agree
// with whether the store is there.
func (cp *controlPlane) checkEtcdChecks(t *testing.T, want bool) {
	t.Helper()
	for _, check := range []string{"etcd", "etcd-readiness"} {
		eventually(t, 30*time.Second, func() (bool, string) {
			status, body, err := cp.get(t.Context(), cp.apiserverURL("/readyz/"+check))
			if err != nil {
				return false, err.Error()
			}
			return (status == http.StatusOK) == want, fmt.Sprintf("/readyz/%s answers %d %s, want ok: %t", check, status, body, want)
		})
	}
	if !want {
		return
	}
	eventually(t, 30*time.Second, func() (bool, string) {
		status, body, err := cp.get(t.Context(), cp.apiserverURL("/readyz?verbose"))
		if err != nil {
			return false, err.Error()
		}
		return status == http.StatusOK && strings.Contains(body, "[+]etcd ok"), fmt.Sprintf("/readyz?verbose answers %d:\n%s", status, body)
	})
}

// consistencyChecks reads the API server's count of its comparisons between
// watch caches and store, by resource, for one outcome.
func (cp *controlPlane) consistencyChecks(ctx context.Context, outcome string) (map[string]float64, error) {
	return cp.countsByResource(ctx, "apiserver_storage_consistency_checks_total", `status="`+outcome+`"`)
}

// countsByResource reads one of the API server's counters, by resource; of
// those with more labels than group and resource, the one with this label.
func (cp *controlPlane) countsByResource(ctx context.Context, counter, label string) (map[string]float64, error) {
	if label != "" {
		label = "," + label
	}
	line := regexp.MustCompile(`(?m)^` + counter + `\{group="[^"]*",resource="([^"]*)"` + label + `\} (\S+)$`)
	status, body, err := cp.get(ctx, cp.apiserverURL("/metrics"))
	if err != nil {
		return nil, err
	}
	if status != http.StatusOK {
		return nil, fmt.Errorf("/metrics answers %d", status)
	}
	counts := map[string]float64{}
	for _, match := range line.FindAllStringSubmatch(body, -1) {
		count, err := strconv.ParseFloat(match[2], 64)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", match[0], err)
		}
		counts[match[1]] = count
	}
	return counts, nil
}

// testConsistencyChecks claims that the API server compared its caches of these
// resources with the store from now on and found them equal. (It would have
// panicked otherwise; the point is that it did look.)
func testConsistencyChecks(t *testing.T, cp *controlPlane, cached ...resource) {
	before, err := cp.consistencyChecks(t.Context(), "success")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range cached {
		resource := r.Resource
		eventually(t, 3*consistencyPeriod, func() (bool, string) {
			now, err := cp.consistencyChecks(t.Context(), "success")
			if err != nil {
				return false, err.Error()
			}
			return now[resource] > before[resource], fmt.Sprintf("the API server has not compared its cache of %s with the store; comparisons that went well: %v", resource, now)
		})
	}
	failed, err := cp.consistencyChecks(t.Context(), "failure")
	if err != nil {
		t.Fatal(err)
	}
	if len(failed) > 0 {
		t.Errorf("caches that differed from the store: %v", failed)
	}
}

// testSecondAPIServer claims that what one API server has shown, the next one
// finds: it reads all from the store and shows the same lists.
func testSecondAPIServer(t *testing.T, cp *controlPlane) {
	const namespace = "testkubernetes-restarts" // what the writers of testRestarts left
	want := map[string]listing{}
	for _, r := range resources {
		want[r.kind] = listPages(t, cp, r, namespace, nil)
		if len(want[r.kind].items) == 0 {
			t.Fatalf("there are no %s in %s to compare", r.Resource, namespace)
		}
	}
	cp.apiserver.signal(t, syscall.SIGTERM, 90*time.Second)
	cp.store.signal(t, syscall.SIGTERM, 30*time.Second)
	cp.checkStore(t)
	cp.startStore(t)
	cp.startAPIServer(t)
	for _, r := range resources {
		var got listing
		eventually(t, 30*time.Second, func() (bool, string) {
			// A custom resource is served a moment after /readyz.
			_, err := r.in(cp, namespace).List(t.Context(), listOne)
			return err == nil, fmt.Sprintf("listing %s: %v", r.Resource, err)
		})
		got = listPages(t, cp, r, namespace, nil)
		compareStates(t, r.Resource+" after the restart of both", got.items, want[r.kind].items)
		if got.revision < want[r.kind].revision {
			t.Errorf("%s: revision %d after the restart, %d before", r.Resource, got.revision, want[r.kind].revision)
		}
	}
}

// checkStore lets quire read its whole database, after all that was done to
// it. The store must not be running.
func (cp *controlPlane) checkStore(t *testing.T) {
	t.Helper()
	if cp.isEtcd() {
		return // has no such command
	}
	where := "--data-dir=" + cp.storeDataDir()
	if cp.storage != "" && cp.storage != onlyMember {
		where = "--storage=" + cp.storage
	}
	output, err := exec.CommandContext(t.Context(), cp.storeBinary, "check", where).CombinedOutput()
	if err != nil {
		t.Errorf("quire check: %v\n%s", err, output)
	}
}

// badLine is what neither server may print.
var badLine = regexp.MustCompile(`(?i)\bpanic(?:[^-\w]|$)|^fatal error:|consistency check failed|DATA RACE|"level":"(panic|fatal)"`)

// testLogs claims that nothing in the logs of both servers tells of a crash or
// of a cache that differed from the store.
func testLogs(t *testing.T, cp *controlPlane) {
	for _, p := range []*process{cp.apiserver, cp.store} {
		text, err := os.ReadFile(p.logPath)
		if err != nil {
			t.Fatal(err)
		}
		if len(text) == 0 {
			t.Errorf("%s printed nothing at all", p.name)
		}
		for line := range strings.Lines(string(text)) {
			if badLine.MatchString(line) {
				t.Errorf("%s: %s", p.name, line)
			}
		}
	}
}
