//go:build linux

package main

import (
	"testing"
	"time"
)

func TestQuantile(t *testing.T) {
	var sorted []time.Duration
	for i := range 50 {
		sorted = append(sorted, time.Duration(i+1))
	}
	for share, want := range map[float64]time.Duration{0.5: 25, 0.9: 45, 0.99: 50, 0.98: 49, 1: 50, 0: 1} {
		if got := quantile(sorted, share); got != want {
			t.Errorf("quantile %v is %d, want %d", share, got, want)
		}
	}
}

func TestResult(t *testing.T) {
	got := result("quire", []time.Duration{1500 * time.Millisecond, time.Second, 1499 * time.Millisecond})
	if want := "| quire | 3 | 1499 ms | 1500 ms | 1500 ms | 1500 ms | 1 |"; got != want {
		t.Errorf("the row is %s, want %s", got, want)
	}
}
