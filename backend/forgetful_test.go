package backend

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"modernc.org/libc"
	sqlite3 "modernc.org/sqlite/lib"
)

// forgetful is a disk that can lose its power: it knows what SQLite has written to the files of one directory, and what of
// that was synced. Only what SQLite itself writes counts. It is put under SQLite's own file methods.
type forgetful struct {
	directory string

	mu    sync.Mutex
	files map[string]*forgetfulFile
	ops   int         // writes, truncations and syncs so far
	each  func(n int) // called after each of them, with mu held
}

type forgetfulFile struct {
	synced []byte
	since  []diskWrite // not synced, in order
}

type diskWrite struct {
	at   int64
	data []byte // nil: the file was cut off at at
}

// forget puts a forgetful disk under the files of a directory, until the test ends. REQUIRES: no database is open.
func forget(t *testing.T, directory string) *forgetful {
	t.Helper()
	d := &forgetful{directory: directory, files: make(map[string]*forgetfulFile)}
	c, err := openConn(filepath.Join(t.TempDir(), "methods.db"), false)
	if err != nil {
		t.Fatal(err)
	}
	mustDo(t, c.exec("PRAGMA journal_mode = WAL; CREATE TABLE t (x)"))
	name, err := libc.CString("main")
	if err != nil {
		t.Fatal(err)
	}
	defer libc.Xfree(c.tls, name)
	tables := map[uintptr]bool{}
	for _, op := range []int32{sqlite3.SQLITE_FCNTL_FILE_POINTER, sqlite3.SQLITE_FCNTL_JOURNAL_POINTER} {
		if rc := sqlite3.Xsqlite3_file_control(c.tls, c.db, name, op, c.scratch); rc != sqlite3.SQLITE_OK {
			t.Fatal(c.failure("file control", rc))
		}
		tables[(*sqlite3.Tsqlite3_file)(cPointer(*(*uintptr)(cPointer(c.scratch)))).FpMethods] = true
	}
	mustDo(t, c.close())
	for p := range tables {
		d.wrap(t, (*sqlite3.Tsqlite3_io_methods)(cPointer(p)))
	}
	return d
}

type (
	xWrite    = func(tls *libc.TLS, file, buf uintptr, n int32, at int64) int32
	xTruncate = func(tls *libc.TLS, file uintptr, at int64) int32
	xSync     = func(tls *libc.TLS, file uintptr, flags int32) int32
)

// goFunction makes a function of a pointer of C.
func goFunction[F any](p uintptr) F { return *(*F)(unsafe.Pointer(&struct{ uintptr }{p})) }

// begin takes the files as they are for synced. (That files come and go is not followed before, nor after.)
func (d *forgetful) begin(t *testing.T, names ...string) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.files)
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		d.files[name] = &forgetfulFile{synced: b}
	}
}

func (d *forgetful) wrap(t *testing.T, m *sqlite3.Tsqlite3_io_methods) {
	t.Helper()
	was := *m
	write, truncate, sync := goFunction[xWrite](m.FxWrite), goFunction[xTruncate](m.FxTruncate), goFunction[xSync](m.FxSync)
	var newWrite xWrite = func(tls *libc.TLS, file, buf uintptr, n int32, at int64) int32 {
		rc := write(tls, file, buf, n, at)
		if rc == sqlite3.SQLITE_OK {
			d.note(file, func(f *forgetfulFile) {
				f.since = append(f.since, diskWrite{at, append([]byte{}, unsafe.Slice((*byte)(cPointer(buf)), n)...)})
			})
		}
		return rc
	}
	var newTruncate xTruncate = func(tls *libc.TLS, file uintptr, at int64) int32 {
		rc := truncate(tls, file, at)
		if rc == sqlite3.SQLITE_OK {
			d.note(file, func(f *forgetfulFile) { f.since = append(f.since, diskWrite{at: at}) })
		}
		return rc
	}
	var newSync xSync = func(tls *libc.TLS, file uintptr, flags int32) int32 {
		rc := sync(tls, file, flags)
		if rc == sqlite3.SQLITE_OK {
			d.note(file, func(f *forgetfulFile) {
				for _, w := range f.since {
					f.synced = w.do(f.synced)
				}
				f.since = nil
			})
		}
		return rc
	}
	m.FxWrite, m.FxTruncate, m.FxSync = cFunction(newWrite), cFunction(newTruncate), cFunction(newSync)
	t.Cleanup(func() {
		m.FxWrite, m.FxTruncate, m.FxSync = was.FxWrite, was.FxTruncate, was.FxSync
		_, _, _ = newWrite, newTruncate, newSync // reachable until here
	})
}

func (d *forgetful) note(file uintptr, f func(*forgetfulFile)) {
	name := libc.GoString((*sqlite3.TunixFile)(cPointer(file)).FzPath)
	if !strings.HasPrefix(name, d.directory) {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.files[name] == nil {
		return
	}
	f(d.files[name])
	d.ops++
	if d.each != nil {
		d.each(d.ops)
	}
}

func (w diskWrite) do(b []byte) []byte {
	end := w.at + int64(len(w.data))
	if w.data == nil {
		if int64(len(b)) > w.at {
			return append([]byte(nil), b[:w.at]...)
		}
		return b
	}
	if int64(len(b)) < end {
		b = append(b, make([]byte, end-int64(len(b)))...)
	}
	copy(b[w.at:], w.data)
	return b
}

// crash writes what is found when the power is back into a directory: what was synced, and of what was not as the disk
// liked: nothing, some in order, or any. REQUIRES: d.mu is held.
func (d *forgetful) crash(t *testing.T, rnd *rand.Rand, directory string) {
	for name, f := range d.files {
		b := append([]byte(nil), f.synced...)
		kind := rnd.IntN(3)
		some := rnd.IntN(len(f.since) + 1)
		for i, w := range f.since {
			if kind == 0 || kind == 1 && i >= some || kind == 2 && rnd.IntN(2) == 0 {
				continue
			}
			b = w.do(b)
		}
		if err := os.WriteFile(filepath.Join(directory, filepath.Base(name)), b, 0o600); err != nil {
			t.Error(fmt.Errorf("the crash was not written down: %w", err))
		}
	}
}
