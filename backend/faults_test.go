package backend

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"unsafe"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"modernc.org/libc"
	sqlite3 "modernc.org/sqlite/lib"
)

// The means by which tests look at a connection and make it fail: a real one, bent, not an imitation.

// statements watches one connection: it keeps what runs on it, and can make one statement fail.
type statements struct {
	c       *conn
	ran     []string // each statement's first words, in order
	pragmas bool     // count PRAGMAs too: background work of a database just opened runs some
	failAt  int      // the statement, counted from 1, that is interrupted; 0: none
	failed  string   // the one that was
	f       func(tls *libc.TLS, mask uint32, ctx, p, x uintptr) int32
}

// watch starts watching c until the test ends or unwatch. REQUIRES: the caller owns c whenever it looks at the result.
func watch(t *testing.T, c *conn) *statements {
	t.Helper()
	s := &statements{c: c}
	s.f = func(tls *libc.TLS, _ uint32, _, _, text uintptr) int32 {
		sql := firstWords(libc.GoString(text))
		if strings.HasPrefix(sql, "PRAGMA") && !s.pragmas {
			return 0
		}
		s.ran = append(s.ran, sql)
		if len(s.ran) == s.failAt {
			s.failed = sql
			// The statement has begun; it ends with SQLITE_INTERRUPT at its first jump.
			sqlite3.Xsqlite3_interrupt(tls, c.db)
		}
		return 0
	}
	if rc := sqlite3.Xsqlite3_trace_v2(c.tls, c.db, sqlite3.SQLITE_TRACE_STMT, cFunction(s.f), 0); rc != sqlite3.SQLITE_OK {
		t.Fatal(c.failure("trace", rc))
	}
	return s
}

func (s *statements) unwatch() {
	sqlite3.Xsqlite3_trace_v2(s.c.tls, s.c.db, 0, 0, 0)
	// An interrupt holds until a statement begins while none runs, for a checkpoint too, which is none.
	if _, err := s.c.queryInt64("PRAGMA page_count"); err != nil {
		panic(err)
	}
}

// firstWords names a statement: its verb, and the table or pragma it is about.
func firstWords(sql string) string {
	words := strings.Fields(sql)
	for i, w := range words {
		switch strings.ToUpper(w) {
		case "INTO", "FROM", "PRAGMA":
			if i+1 < len(words) {
				return words[0] + " " + strings.SplitN(words[i+1], "(", 2)[0]
			}
		}
	}
	return strings.Join(words[:min(2, len(words))], " ")
}

// cFunction makes a pointer for C of a Go function, as the translated SQLite expects it.
// The caller keeps f reachable as long as C may call it.
func cFunction[F any](f F) uintptr {
	p := any(f)
	return (*[2]uintptr)(unsafe.Pointer(&p))[1]
}

// writeFault makes writes of this process to a database or its WAL fail, in place of the operating system.
type writeFault struct {
	file  string // how the name of the file ends: "-wal", ".db" or "" for both
	at    int64  // the write, counted from 1, that fails
	all   bool   // and all that follow
	errno syscall.Errno
	n     atomic.Int64
}

// hit says whether the fault was met.
func (f *writeFault) hit() bool { return f.n.Load() >= f.at }

func (f *writeFault) fails(fd int32) bool {
	name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil || !strings.HasSuffix(name, f.file) {
		return false
	}
	n := f.n.Add(1)
	return n == f.at || f.all && n > f.at
}

var (
	installFaults sync.Once
	currentFault  atomic.Pointer[writeFault]
	faultyWrite   func(tls *libc.TLS, fd int32, buf uintptr, n sqlite3.Tsize_t, at sqlite3.Toff_t) sqlite3.Tssize_t
)

// failWrites lets f happen from now on, until heal.
func failWrites(t testing.TB, f *writeFault) *writeFault {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("which file SQLite writes to is asked from Linux's /proc")
	}
	installFaults.Do(func() { replaceWrite(t) })
	t.Cleanup(heal)
	currentFault.Store(f)
	return f
}

func heal() { currentFault.Store(nil) }

// replaceWrite puts faultyWrite in front of the system call that SQLite's unix VFS writes with. SQLite has the
// hook for just this (sqlite3_vfs.xSetSystemCall).
func replaceWrite(t testing.TB) {
	t.Helper()
	tls := libc.NewTLS()
	defer tls.Close()
	name, err := libc.CString("pwrite")
	if err != nil {
		t.Fatal(err)
	}
	defer libc.Xfree(tls, name)
	at := sqlite3.Xsqlite3_vfs_find(tls, 0)
	vfs := (*sqlite3.Tsqlite3_vfs)(cPointer(at))
	get := *(*func(*libc.TLS, uintptr, uintptr) uintptr)(unsafe.Pointer(&struct{ uintptr }{vfs.FxGetSystemCall}))
	real := get(tls, at, name)
	if real == 0 {
		t.Fatal("SQLite does not write by pwrite any more: its writes cannot be made to fail like this")
	}
	write := *(*func(*libc.TLS, int32, uintptr, sqlite3.Tsize_t, sqlite3.Toff_t) sqlite3.Tssize_t)(unsafe.Pointer(&struct{ uintptr }{real}))
	faultyWrite = func(tls *libc.TLS, fd int32, buf uintptr, n sqlite3.Tsize_t, at sqlite3.Toff_t) sqlite3.Tssize_t {
		if f := currentFault.Load(); f != nil && f.fails(fd) {
			*(*int32)(cPointer(libc.X__errno_location(tls))) = int32(f.errno)
			return -1
		}
		return write(tls, fd, buf, n, at)
	}
	set := *(*func(*libc.TLS, uintptr, uintptr, uintptr) int32)(unsafe.Pointer(&struct{ uintptr }{vfs.FxSetSystemCall}))
	if rc := set(tls, at, name, cFunction(faultyWrite)); rc != sqlite3.SQLITE_OK {
		t.Fatal(fmt.Errorf("SQLite refuses to have pwrite replaced: code %d", rc))
	}
}

func putReq(key, value string) *pb.PutRequest {
	return &pb.PutRequest{Key: []byte(key), Value: []byte(value)}
}
