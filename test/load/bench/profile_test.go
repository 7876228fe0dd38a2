package main

import (
	"bytes"
	"runtime"
	"runtime/pprof"
	"strings"
	"testing"
)

var kept [64][]byte // of a fixed size: a slice that grows would allocate too

//go:noinline
func allocateForProfile() {
	for i := range kept {
		kept[i] = make([]byte, 1<<20)
	}
}

// heapProfile is this process's own, as a server sends it.
func heapProfile(t *testing.T) *stackProfile {
	t.Helper()
	runtime.GC() // what was allocated since the last collection is not in it
	var b bytes.Buffer
	if err := pprof.Lookup("heap").WriteTo(&b, 0); err != nil {
		t.Fatal(err)
	}
	p, err := parseProfile(b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestProfileOfAllocationsIsRead(t *testing.T) {
	rate := runtime.MemProfileRate
	runtime.MemProfileRate = 1 // every object, so that nothing is left to chance
	t.Cleanup(func() { runtime.MemProfileRate = rate })
	before := heapProfile(t)
	allocateForProfile()
	kept = [64][]byte{}
	d := heapProfile(t).minus(before)
	mine := func(stack []string) string {
		for _, f := range stack {
			if strings.HasSuffix(f, ".allocateForProfile") {
				return "mine"
			}
		}
		return "not mine"
	}
	for _, s := range d.by(mine) {
		// The runtime may allocate something small for itself on the way.
		if s.name == "mine" && s.second >= 64<<20 && s.second < 65<<20 && s.first >= 64 && s.first < 72 {
			return
		}
	}
	t.Errorf("64 objects of 1 MiB were allocated, the profile says %+v", d.by(mine))
}

func TestCutProfileIsRefused(t *testing.T) {
	var b bytes.Buffer
	if err := pprof.Lookup("heap").WriteTo(&b, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := parseProfile(b.Bytes()[:b.Len()/2]); err == nil {
		t.Error("half a profile was accepted")
	}
}

func TestDifferenceOfProfilesAddsUpOneStackOfSeveralSizes(t *testing.T) {
	stack := []string{"f", "g"}
	before := &stackProfile{samples: []stackSample{{stack, []int64{1, 10}}, {stack, []int64{2, 40}}, {[]string{"same"}, []int64{5, 5}}}}
	after := &stackProfile{samples: []stackSample{{stack, []int64{4, 80}}, {stack, []int64{3, 30}}, {[]string{"same"}, []int64{5, 5}}}}
	d := after.minus(before)
	if len(d.samples) != 1 || d.samples[0].values[0] != 4 || d.samples[0].values[1] != 60 {
		t.Errorf("7 - 3 objects of 110 - 50 bytes, and nothing else: got %+v", d.samples)
	}
}

func TestStacksAreToldApart(t *testing.T) {
	const put = "github.com/quire-db/quire/etcdapi.(*kvService).Put"
	for _, c := range []struct {
		stack       []string
		cpu, behalf string
	}{
		{[]string{"github.com/quire-db/quire/backend.(*batch).write", put}, "quire: backend", "quire: backend"},
		{[]string{"google.golang.org/grpc/internal/transport.(*loopyWriter).run"}, layerGRPC, layerGRPC},
		{[]string{"google.golang.org/protobuf/proto.Unmarshal", put}, layerProto, layerProto},
		{[]string{"modernc.org/sqlite/lib._sqlite3VdbeExec", put}, layerSQLite, layerSQLite},
		{[]string{"github.com/prometheus/client_golang/prometheus.(*counter).Inc", put}, layerElse, layerElse},
		{[]string{"strings.Index", put}, layerLibrary, "quire: etcdapi"},
		{[]string{"runtime.memmove", put}, layerCopy, "quire: etcdapi"},
		{[]string{"runtime.scanobject", "runtime.gcDrain", "runtime.gcBgMarkWorker"}, layerGC, layerAlone},
		{[]string{"runtime.greyobject", "runtime.gcAssistAlloc", "runtime.mallocgc", put}, layerGC, "quire: etcdapi"},
		{[]string{"runtime.nextFreeFast", "runtime.mallocgc", "runtime.newobject", put}, layerAlloc, "quire: etcdapi"},
		{[]string{"runtime.findRunnable", "runtime.schedule", "runtime.park_m", "runtime.mcall"}, layerSchedule, layerAlone},
		{[]string{"runtime.ready", "runtime.goready", "runtime.send", "runtime.chansend", put}, layerSchedule, "quire: etcdapi"},
		{[]string{"runtime.exitsyscall", "syscall.Syscall", "syscall.write", "net.(*conn).Write", put}, layerSchedule, "quire: etcdapi"},
		{[]string{"runtime.mapaccess2_faststr", put}, layerRuntime, "quire: etcdapi"},
		{[]string{"runtime.futex", "runtime.futexwakeup", "runtime.notewakeup"}, "system calls: futex (waking and putting to sleep threads)", layerAlone},
		{[]string{"internal/runtime/syscall/linux.Syscall6", "internal/runtime/syscall/linux.EpollWait", "runtime.netpoll"}, "system calls: epoll", layerAlone},
		{
			[]string{"internal/runtime/syscall/linux.Syscall6", "syscall.write", "internal/poll.(*FD).Write", "net.(*conn).Write", "google.golang.org/grpc/internal/transport.(*bufWriter).flush"},
			"system calls: writing to sockets", layerGRPC,
		},
		{
			[]string{"internal/runtime/syscall/linux.Syscall6", "golang.org/x/sys/unix.Fdatasync", "modernc.org/libc.Xfdatasync", "modernc.org/sqlite/lib._unixSync"},
			"system calls: syncing files", layerSQLite,
		},
		{
			[]string{"internal/runtime/syscall/linux.Syscall6", "syscall.pwrite", "os.(*File).WriteAt", "github.com/quire-db/quire/backend.(*log).append"},
			"system calls: writing to files", "quire: backend",
		},
	} {
		if got := cpuLayer(c.stack); got != c.cpu {
			t.Errorf("%v ran %q, expected %q", c.stack, got, c.cpu)
		}
		if got := onBehalf(c.stack); got != c.behalf {
			t.Errorf("%v ran on behalf of %q, expected %q", c.stack, got, c.behalf)
		}
	}
}

func TestFunctionNamesFitALine(t *testing.T) {
	for in, want := range map[string]string{
		"github.com/quire-db/quire/backend.(*DB).submit":                     "quire/backend.(*DB).submit",
		"google.golang.org/grpc/internal/transport.(*controlBuffer).get":     "grpc/transport.(*controlBuffer).get",
		"github.com/quire-db/quire/etcdapi.gather[go.shape.[]uint8,go.shape": "quire/etcdapi.gather",
		strings.Repeat("x", 80): strings.Repeat("x", 67) + "...",
	} {
		if got := shorten(in); got != want {
			t.Errorf("%q is shortened to %q, expected %q", in, got, want)
		}
	}
}
