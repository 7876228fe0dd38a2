package main

import (
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"sync/atomic"
)

// Collecting garbage at the default of 100% costs a quarter of the CPU of a busy gRPC server. 300% is near the
// optimum measured (docs/performance.md), of what the collector has to walk; the soft limit makes the collector
// work harder before the kernel would kill the process.
const (
	gcPercent          = 300
	gcHeadroom         = 64 << 20 // bytes; as much garbage may always pile up
	memoryLimitPercent = 80
)

// paceGC sets the collector's percentage anew after each collection, so that the garbage that may pile up goes by
// what costs time to collect: the part of the heap that holds pointers. Values and most of the index hold none: a fixed
// percentage would let three times as much garbage pile up on their account alone. The pacing ends with stop.
func paceGC() (stop func()) {
	var stopped atomic.Bool
	var next func()
	next = func() {
		after := new([4]*byte) // dies with the next collection, which is how that is noticed
		runtime.AddCleanup(after, func(struct{}) {
			if stopped.Load() {
				return
			}
			s := []metrics.Sample{
				{Name: "/gc/heap/live:bytes"}, {Name: "/gc/scan/heap:bytes"},
				{Name: "/gc/scan/stack:bytes"}, {Name: "/gc/scan/globals:bytes"},
			}
			metrics.Read(s)
			// Stacks and globals are walked, and the runtime adds them to what it takes the percentage of.
			roots := int64(s[2].Value.Uint64() + s[3].Value.Uint64())
			debug.SetGCPercent(percentFor(int64(s[0].Value.Uint64())+roots, int64(s[1].Value.Uint64())+roots))
			next()
		}, struct{}{})
	}
	next()
	return func() { stopped.Store(true) }
}

// percentFor is GOGC for a live heap of that many bytes, of which scanned are walked.
func percentFor(live, scanned int64) int {
	if live <= 0 {
		return gcPercent
	}
	headroom := max(min(live, scanned)*gcPercent/100, gcHeadroom)
	return int(min(max(100*headroom/live, 10), 10_000))
}

// tuneGC sets the garbage collector, except for what GOGC and GOMEMLIMIT in env decide. It returns the soft
// limit in bytes, 0 when none was set.
func tuneGC(env []string) (limit int64) {
	if lookupEnv(env, "GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	if lookupEnv(env, "GOMEMLIMIT") != "" {
		return 0
	}
	total := memoryTotal(os.ReadFile)
	if total <= 0 {
		return 0
	}
	limit = total / 100 * memoryLimitPercent
	debug.SetMemoryLimit(limit)
	return limit
}

// memoryTotal is the smallest of the host's memory and the limits of the control group that this process is
// in, in bytes; 0 when nothing is known (not Linux).
func memoryTotal(read func(string) ([]byte, error)) int64 {
	total := int64(math.MaxInt64)
	if data, err := read("/proc/meminfo"); err == nil {
		for line := range strings.Lines(string(data)) {
			if rest, ok := strings.CutPrefix(line, "MemTotal:"); ok {
				kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
				if err == nil && kb > 0 {
					total = min(total, kb<<10)
				}
			}
		}
	}
	files := []string{"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}
	if data, err := read("/proc/self/cgroup"); err == nil {
		for line := range strings.Lines(string(data)) {
			// "0::/system.slice/quire.service" (v2) or "9:memory:/docker/…" (v1); a limit on any
			// ancestor binds too.
			parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
			if len(parts) != 3 {
				continue
			}
			root, name := "", ""
			switch {
			case parts[0] == "0" && parts[1] == "":
				root, name = "/sys/fs/cgroup", "/memory.max"
			case parts[1] == "memory":
				root, name = "/sys/fs/cgroup/memory", "/memory.limit_in_bytes"
			default:
				continue
			}
			for dir := parts[2]; dir != "" && dir != "/"; dir = dir[:strings.LastIndexByte(dir, '/')] {
				files = append(files, root+dir+name)
			}
		}
	}
	for _, f := range files {
		data, err := read(f)
		if err != nil {
			continue
		}
		if v, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64); err == nil && v > 0 { // "max" fails to parse
			total = min(total, v)
		}
	}
	if total == math.MaxInt64 {
		return 0
	}
	return total
}
