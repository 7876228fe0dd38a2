// Command kube-apiserver is the real API server of Kubernetes, with one
// thing set that it has no flag for: how often it compares its watch caches
// with what its store holds.
//
// With KUBE_WATCHCACHE_CONSISTENCY_CHECKER=true the API server panics as soon
// as a watch cache differs from a list at the same revision. Left alone it
// looks every five to seven and a half minutes, which is longer than the
// whole test in test/k8s runs, so the check would never take place.
// QUIRE_TEST_CONSISTENCY_PERIOD (a Go duration) sets another period.
package main

import (
	"fmt"
	"os"
	"time"
	_ "time/tzdata" // time zones of CronJobs, as in the original command

	"k8s.io/apiserver/pkg/storage/cacher"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"          // --logging-format=json
	_ "k8s.io/component-base/metrics/prometheus/clientgo" // client-go's metrics
	_ "k8s.io/component-base/metrics/prometheus/version"  // the version metric
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
)

const periodVariable = "QUIRE_TEST_CONSISTENCY_PERIOD"

func main() {
	if text := os.Getenv(periodVariable); text != "" {
		period, err := time.ParseDuration(text)
		if err != nil || period <= 0 {
			fmt.Fprintf(os.Stderr, "%s=%q: want a positive Go duration, like 15s\n", periodVariable, text)
			os.Exit(2)
		}
		cacher.ConsistencyCheckPeriod = period
	}
	os.Exit(cli.Run(app.NewAPIServerCommand()))
}
