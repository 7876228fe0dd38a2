package main

import (
	"slices"
	"testing"
)

// A workload with another name would silently be left out, or measured without what it needs.
func TestFloorTakesPartWhereItCan(t *testing.T) {
	var got []string
	for _, s := range []scene{writeScene(), listScene(), watchScene(), leaseScene(), boundedScene(), fairScene(), bigScene()} {
		for _, w := range s.workloads {
			if !able("quire", w) {
				t.Errorf("quire is left out of %q", w.name)
			}
			if able(floor, w) {
				got = append(got, w.name)
			}
		}
	}
	want := []string{
		"put, 1 client", "put, 64 clients", "put, 256 clients", "k8s create Txn, 64 clients", "k8s update Txn, 64 clients",
		"linearizable get, 64 clients", "80 % get, 20 % k8s update, 64 clients",
		"watch, 1 watcher, idle server: update sent → event here",
		"watch, 1000 watchers on 10 streams, 200 updates/s: answered → event here", "idle with 100 watches open",
	}
	if !slices.Equal(got, want) {
		t.Errorf("floor takes part in %q, expected %q", got, want)
	}
}
