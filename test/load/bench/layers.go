package main

import "strings"

// A layer is a part of the server, or of what it stands on, that a function belongs to.
const (
	layerGRPC    = "grpc-go and HTTP/2"
	layerProto   = "protobuf, etcd's messages"
	layerSQLite  = "SQLite (modernc.org)"
	layerPgx     = "pgx, the driver for PostgreSQL"
	layerLibrary = "Go's library (net, sync, context, …)"
	layerElse    = "others (metrics, …)"
	layerAlone   = "the Go runtime by itself"

	layerGC       = "Go runtime: garbage collection"
	layerAlloc    = "Go runtime: allocation"
	layerSchedule = "Go runtime: scheduler, channels, locks, timers"
	layerCopy     = "Go runtime: copying and clearing memory"
	layerRuntime  = "Go runtime: the rest (maps, strings, stacks, …)"
)

// layerPrefixes: the first one that fits counts.
var layerPrefixes = []struct{ prefix, layer string }{
	{"github.com/quire-db/quire/backend", "quire: backend"},
	{"github.com/quire-db/quire/etcdapi", "quire: etcdapi"},
	{"github.com/quire-db/quire/watchpoller", "quire: watchpoller"},
	{"github.com/quire-db/quire/", "quire: other packages"},
	{"main.", "quire: cmd"},
	{"google.golang.org/grpc", layerGRPC},
	{"golang.org/x/net", layerGRPC},
	{"google.golang.org/protobuf", layerProto},
	{"go.etcd.io/etcd/api", layerProto},
	{"github.com/golang/protobuf", layerProto},
	{"modernc.org/", layerSQLite},
	{"github.com/jackc/pgx", layerPgx},
	{"golang.org/x/sys/", layerLibrary}, // system calls
}

// layerOf is the layer of one function, layerLibrary for Go's own.
func layerOf(function string) string {
	for _, l := range layerPrefixes {
		if strings.HasPrefix(function, l.prefix) {
			return l.layer
		}
	}
	if first, _, _ := strings.Cut(function, "/"); strings.Contains(first, ".") && first != function {
		return layerElse // a host name before the first slash: not Go's library
	}
	return layerLibrary
}

// isRuntime: the function belongs to the Go runtime.
func isRuntime(function string) bool {
	return strings.HasPrefix(function, "runtime.") || strings.HasPrefix(function, "internal/runtime/") ||
		strings.HasPrefix(function, "runtime/internal/") || isAssembly(function)
}

// isAssembly: functions in assembly have no package in their names, or one that the runtime uses.
func isAssembly(function string) bool {
	return strings.HasPrefix(function, "internal/bytealg.") || !strings.Contains(function, ".")
}

// cpuLayer is where the processor was, by the function that ran. What of the Go runtime ran is told apart by the frames of
// the runtime below it: it is not charged to whoever called.
func cpuLayer(stack []string) string {
	if call := systemCall(stack); call != "" {
		return "system calls: " + call
	}
	if !isRuntime(stack[0]) {
		return layerOf(stack[0])
	}
	for _, f := range stack {
		if !isRuntime(f) {
			break
		}
		name := strings.TrimPrefix(f, "runtime.")
		switch {
		case hasAnyPrefix(name, "gc", "bgsweep", "bgscavenge", "scanobject", "markroot", "wbBuf", "sweepone", "(*gc", "(*mspan).sweep"):
			return layerGC
		case hasAnyPrefix(name, "mallocgc", "newobject", "makeslice", "growslice", "(*mcache)", "(*mheap)", "(*mcentral)"):
			return layerAlloc
		case hasAnyPrefix(name, "schedule", "findRunnable", "park_m", "mcall", "goready", "ready", "chan", "sel", "lock", "unlock",
			"notewakeup", "notesleep", "stealWork", "sema", "gopark", "(*timer", "casgstatus", "execute", "mstart", "sysmon", "reentersyscall",
			"exitsyscall", "entersyscall", "wakep", "startm", "goschedImpl", "gosched", "newproc", "goexit", "morestack", "runq", "netpoll"):
			return layerSchedule
		case hasAnyPrefix(name, "memmove", "memclr", "typedmemmove", "bulkBarrier"):
			return layerCopy
		}
	}
	return layerRuntime
}

func hasAnyPrefix(s string, prefixes ...string) bool {
	for _, p := range prefixes {
		if strings.HasPrefix(s, p) {
			return true
		}
	}
	return false
}

// systemCall says which system call the processor was in; "" if in none.
func systemCall(stack []string) string {
	switch leaf := strings.TrimPrefix(stack[0], "runtime."); {
	case hasAnyPrefix(leaf, "futex"):
		return "futex (waking and putting to sleep threads)"
	case hasAnyPrefix(leaf, "entersyscall", "exitsyscall", "reentersyscall"):
		return "" // before and after it: the scheduler's work
	case leaf == "write1", leaf == "read": // of the descriptor that wakes it up
		return "epoll"
	case hasAnyPrefix(leaf, "madvise", "mmap", "sysMmap", "munmap"):
		return "memory (madvise, mmap)"
	case hasAnyPrefix(leaf, "usleep", "osyield", "tgkill", "sigprocmask", "rt_sig", "setitimer", "nanotime", "vdso"):
		return "clock, sleep, signals"
	case !strings.Contains(stack[0], "yscall"):
		return ""
	}
	for _, f := range stack {
		switch {
		case strings.Contains(f, "epoll") || strings.HasSuffix(f, "netpoll") || strings.Contains(f, "Epoll"):
			return "epoll"
		case strings.Contains(f, "net.(*conn).Write") || strings.Contains(f, "net.(*netFD)") && strings.Contains(f, "rite"):
			return "writing to sockets"
		case strings.Contains(f, "net.(*conn).Read") || strings.Contains(f, "net.(*netFD)") && strings.Contains(f, "ead"):
			return "reading from sockets"
		case hasCall(f, "sync"):
			return "syncing files"
		case hasCall(f, "pwrite"), hasCall(f, "writev"):
			return "writing to files"
		case hasCall(f, "pread"):
			return "reading from files"
		}
	}
	return "others"
}

// hasCall: the function is a wrapper of the system call, in whatever package and spelling.
func hasCall(function, call string) bool {
	name := function[strings.LastIndexByte(function, '.')+1:]
	return strings.Contains(strings.ToLower(name), call) && hasAnyPrefix(function, "syscall.", "golang.org/x/sys/", "modernc.org/libc", "internal/poll")
}

// owner is the innermost function that is neither the Go runtime's nor its library's: who allocated, who waits.
func owner(stack []string) string {
	for _, f := range stack {
		if !isRuntime(f) && layerOf(f) != layerLibrary {
			return f
		}
	}
	return stack[len(stack)-1]
}

// onBehalf is the layer of the owner: who had the Go runtime, its library and the kernel work.
func onBehalf(stack []string) string {
	f := owner(stack)
	if l := layerOf(f); l != layerLibrary || !isRuntime(f) {
		return l
	}
	return layerAlone
}

// shorten makes the name of a function fit for a line.
func shorten(function string) string {
	for _, r := range [][2]string{
		{"github.com/quire-db/quire/", "quire/"},
		{"google.golang.org/grpc/internal/", "grpc/"},
		{"google.golang.org/grpc", "grpc"},
		{"google.golang.org/protobuf/", "protobuf/"},
		{"golang.org/x/net/", ""},
		{"golang.org/x/sys/", ""},
		{"go.etcd.io/etcd/api/v3/", ""},
		{"modernc.org/", ""},
	} {
		if rest, ok := strings.CutPrefix(function, r[0]); ok {
			function = r[1] + rest
			break
		}
	}
	if generic := strings.Index(function, "[go.shape"); generic >= 0 {
		function = function[:generic]
	}
	const most = 70
	if len(function) > most {
		function = function[:most-3] + "..."
	}
	return function
}
