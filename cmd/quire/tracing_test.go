package main

import (
	"strings"
	"testing"
)

// TestTracingFlags: what is sent is compared with a real etcd in test/etcd/surface.
func TestTracingFlags(t *testing.T) {
	c, err := loadConfig([]string{"--experimental-enable-distributed-tracing", "--distributed-tracing-sampling-rate=1000000"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if want := (tracingFlags{Enabled: true, Address: "localhost:4317", ServiceName: "etcd", SamplingRate: 1_000_000}); c.Tracing != want {
		t.Errorf("%+v, want %+v", c.Tracing, want)
	}
	for _, rate := range []string{"-1", "1000001"} {
		_, err := loadConfig([]string{"--enable-distributed-tracing", "--distributed-tracing-sampling-rate=" + rate}, nil)
		if err == nil || !strings.Contains(err.Error(), "use 0 to 1000000") {
			t.Errorf("a rate of %s: %v", rate, err)
		}
	}
	if _, err := loadConfig([]string{"--distributed-tracing-sampling-rate=-1"}, nil); err != nil {
		t.Errorf("a rate that nobody uses, as in etcd: %v", err)
	}
}
