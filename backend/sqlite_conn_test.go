package backend

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"modernc.org/libc"
	sqlite3 "modernc.org/sqlite/lib"
)

func testConn(t testing.TB, path string) *conn {
	t.Helper()
	c, err := openConn(path, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func mustPrepare(t testing.TB, c *conn, sql string) *stmt {
	t.Helper()
	s, err := c.prepare(sql)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func mustDo(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestSQLiteIsNewEnough(t *testing.T) {
	tls := libc.NewTLS()
	defer tls.Close()
	// Before 3.51.3 a WAL reset could lose committed pages.
	if v := sqlite3.Xsqlite3_libversion_number(tls); v < 3_051_003 {
		t.Errorf("built-in SQLite is version %d, want 3051003 or newer", v)
	}
}

func TestValuesComeBackAsTheyWereBound(t *testing.T) {
	c := testConn(t, filepath.Join(t.TempDir(), "db"))
	mustDo(t, c.exec("CREATE TABLE t (id INTEGER PRIMARY KEY, n INTEGER, b BLOB, x TEXT)"))
	insert := mustPrepare(t, c, "INSERT INTO t (id, n, b, x) VALUES (?, ?, ?, ?)")
	big := make([]byte, 3<<19) // 1.5 MB, etcd's default limit
	for i := range big {
		big[i] = byte(i * 7)
	}
	rows := []struct {
		n int64
		b []byte
		x string
	}{
		{0, []byte("\x00a\x00\x00"), "text"},
		{math.MaxInt64, []byte{}, ""},
		{math.MinInt64, big, "größe 日本"},
		{-1, []byte("short again"), strings.Repeat("x", 100_000)},
		{1 << 53, nil, "after a long one"},
	}
	for i, r := range rows {
		b := bytes.Clone(r.b)
		mustDo(t, insert.bindInt64(1, int64(i)))
		mustDo(t, insert.bindInt64(2, r.n))
		mustDo(t, insert.bindBlob(3, b))
		mustDo(t, insert.bindText(4, r.x))
		for j := range b {
			b[j] = 0xee // the bind has its own copy
		}
		runtime.GC()
		mustDo(t, insert.run())
	}
	read := mustPrepare(t, c, "SELECT n, b, x, typeof(b), NULL FROM t ORDER BY id")
	for i, r := range rows {
		if row, err := read.step(); err != nil || !row {
			t.Fatalf("row %d: %v, %v", i, row, err)
		}
		if got := read.columnInt64(0); got != r.n {
			t.Errorf("row %d: integer %d, want %d", i, got, r.n)
		}
		got := read.columnBlob(1)
		if !bytes.Equal(got, r.b) || got == nil {
			t.Errorf("row %d: blob of %d bytes (nil: %v), want %d", i, len(got), got == nil, len(r.b))
		}
		if cap(got) != len(got) {
			t.Errorf("row %d: appending to the view would write into SQLite's memory", i)
		}
		if got := read.columnText(2); got != r.x {
			t.Errorf("row %d: text %.20q, want %.20q", i, got, r.x)
		}
		if got := read.columnText(3); got != "blob" {
			t.Errorf("row %d: stored as %s, want blob", i, got)
		}
		if got := read.columnBlob(4); got != nil {
			t.Errorf("row %d: NULL read as %q", i, got)
		}
	}
	if row, err := read.step(); err != nil || row {
		t.Fatalf("after the last row: %v, %v", row, err)
	}
	mustDo(t, read.reset())
}

// The buffer of each parameter is reused and grows: bind ever changing lengths and compare what arrives.
func TestReusedBuffersNeverMixValues(t *testing.T) {
	c := testConn(t, filepath.Join(t.TempDir(), "db"))
	echo := mustPrepare(t, c, "SELECT ?1, ?2, ?3")
	value := func(i, salt int) []byte {
		return bytes.Repeat([]byte{byte(i), byte(salt), 0}, (i*7919+salt*104729)%5000)
	}
	for i := range 2000 {
		for p := 1; p <= 3; p++ {
			if i%3 == p%3 && i > 0 {
				continue // keeps the value of an earlier round
			}
			mustDo(t, echo.bindBlob(p, value(i, p)))
		}
		if row, err := echo.step(); err != nil || !row {
			t.Fatal(row, err)
		}
		for p := 1; p <= 3; p++ {
			bound := i
			if i%3 == p%3 && i > 0 {
				bound = i - 1
			}
			if got := echo.columnBlob(p - 1); !bytes.Equal(got, value(bound, p)) {
				t.Fatalf("round %d parameter %d: got %d bytes, want %d", i, p, len(got), len(value(bound, p)))
			}
		}
		mustDo(t, echo.reset())
	}
}

func TestMisuseIsAnErrorAndHarmless(t *testing.T) {
	c := testConn(t, filepath.Join(t.TempDir(), "db"))
	for _, sql := range []string{"", "-- nothing", "SELECT 1; SELECT 2", "SELECT FROM"} {
		if _, err := c.prepare(sql); err == nil {
			t.Errorf("prepared %q", sql)
		}
	}
	s := mustPrepare(t, c, "SELECT ?1 UNION ALL SELECT ?1")
	for _, i := range []int{-1, 0, 2} {
		if err := s.bindBlob(i, []byte("x")); asSQLiteError(err) == nil || asSQLiteError(err).Code != sqlite3.SQLITE_RANGE {
			t.Errorf("bound parameter %d: %v", i, err)
		}
		if err := s.bindInt64(i, 1); err == nil {
			t.Errorf("bound parameter %d", i)
		}
	}
	mustDo(t, s.bindBlob(1, []byte("first")))
	if row, err := s.step(); !row || err != nil {
		t.Fatal(row, err)
	}
	view := s.columnBlob(0)
	for _, err := range []error{s.bindBlob(1, []byte("second")), s.bindText(1, strings.Repeat("long", 1000))} {
		if asSQLiteError(err) == nil || asSQLiteError(err).Code != sqlite3.SQLITE_MISUSE {
			t.Errorf("bound while running: %v", err)
		}
	}
	if string(view) != "first" {
		t.Errorf("a refused bind changed the running statement: %q", view)
	}
	s.finalize()
	s.finalize()
	if err := s.bindText(1, "x"); err == nil {
		t.Error("bound a finalized statement")
	}
	if err := s.reset(); err == nil {
		t.Error("reset a finalized statement")
	}
	if err := c.exec("SELEKT"); asSQLiteError(err) == nil || !strings.Contains(err.Error(), "syntax error") {
		t.Errorf("exec of nonsense: %v", err)
	}
	if _, err := c.queryInt64("SELECT 1 WHERE 0"); err == nil {
		t.Error("a query without a row gave a number")
	}
}

func TestAValueNeverReachesAnErrorText(t *testing.T) {
	c := testConn(t, filepath.Join(t.TempDir(), "db"))
	mustDo(t, c.exec("CREATE TABLE t (k BLOB PRIMARY KEY, n INTEGER CHECK (n > 0)) WITHOUT ROWID"))
	s := mustPrepare(t, c, "INSERT INTO t VALUES (?, ?)")
	for range 2 {
		for _, n := range []int64{1, -424242} {
			mustDo(t, s.bindBlob(1, []byte("secret")))
			mustDo(t, s.bindInt64(2, n))
			if err := s.run(); err != nil && (strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "424242")) {
				t.Errorf("error shows the value: %v", err)
			}
		}
	}
	mustDo(t, s.bindBlob(1, []byte("secret")))
	mustDo(t, s.bindInt64(2, 1))
	if err := s.run(); asSQLiteError(err) == nil || asSQLiteError(err).Code != sqlite3.SQLITE_CONSTRAINT {
		t.Errorf("duplicate key: %v", err)
	}
}

func TestCachedStatementsArePreparedOnce(t *testing.T) {
	c := testConn(t, filepath.Join(t.TempDir(), "db"))
	a, err := c.cached("SELECT 1")
	mustDo(t, err)
	if _, err := a.step(); err != nil {
		t.Fatal(err)
	}
	b, err := c.cached("SELECT 1")
	mustDo(t, err)
	if a != b || b.stepped {
		t.Error("the second use prepared anew or was not reset")
	}
}

func TestAFullDatabaseFailsTheCommitAndGoesOnAfterwards(t *testing.T) {
	c := testConn(t, filepath.Join(t.TempDir(), "db"))
	mustDo(t, c.exec("PRAGMA journal_mode=WAL; CREATE TABLE t (id INTEGER PRIMARY KEY, b BLOB); PRAGMA max_page_count=20"))
	insert := mustPrepare(t, c, "INSERT INTO t (b) VALUES (?)")
	var err error
	n := 0
	for ; n < 100 && err == nil; n++ {
		mustDo(t, c.exec("BEGIN IMMEDIATE"))
		mustDo(t, insert.bindBlob(1, make([]byte, 10_000)))
		if err = insert.run(); err == nil {
			err = c.exec("COMMIT")
		}
	}
	e := asSQLiteError(err)
	if e == nil || !e.full() || e.ioerr() || e.corrupt() {
		t.Fatalf("after %d rows of 10 kB in 20 pages: %v", n, err)
	}
	if c.inTransaction() {
		mustDo(t, c.exec("ROLLBACK"))
	}
	if c.inTransaction() {
		t.Error("still in a transaction")
	}
	if got, err := c.queryInt64("SELECT count(*) FROM t"); err != nil || got != int64(n-1) {
		t.Errorf("%d rows are there (%v), %d were committed", got, err, n-1)
	}
	mustDo(t, c.exec("PRAGMA max_page_count=1000"))
	mustDo(t, insert.run())
}

func TestErrorKinds(t *testing.T) {
	directory := t.TempDir()
	if _, err := openConn(filepath.Join(directory, "missing", "db"), false); asSQLiteError(err) == nil || !asSQLiteError(err).cantopen() || asSQLiteError(err).Errno != syscall.ENOENT {
		t.Errorf("open in a missing directory: %v", err)
	}
	if _, err := openConn(filepath.Join(directory, "missing"), true); asSQLiteError(err) == nil || !asSQLiteError(err).cantopen() {
		t.Errorf("read-only open of a missing file: %v", err)
	}

	text := filepath.Join(directory, "text")
	mustDo(t, os.WriteFile(text, bytes.Repeat([]byte("no database\n"), 1000), 0o600))
	if _, err := testConn(t, text).pageCount(); asSQLiteError(err) == nil || !asSQLiteError(err).corrupt() {
		t.Errorf("a text file: %v", err)
	}

	path := filepath.Join(directory, "db")
	a, b := testConn(t, path), testConn(t, path)
	mustDo(t, a.exec("PRAGMA journal_mode=WAL; CREATE TABLE t (x); BEGIN IMMEDIATE"))
	if err := b.exec("BEGIN IMMEDIATE"); asSQLiteError(err) == nil || !asSQLiteError(err).busy() {
		t.Errorf("second writer: %v", err)
	}
	mustDo(t, a.exec("COMMIT"))
	r, err := openConn(path, true)
	mustDo(t, err)
	if err := r.exec("INSERT INTO t VALUES (1)"); asSQLiteError(err) == nil || !asSQLiteError(err).readonly() || !r.readOnlyFile() {
		t.Errorf("write on a read-only connection: %v", err)
	}
	mustDo(t, r.close())

	for _, e := range []*sqliteError{{Code: sqlite3.SQLITE_FULL}, {Code: sqlite3.SQLITE_IOERR, Errno: syscall.ENOSPC}, {Code: sqlite3.SQLITE_IOERR, Errno: syscall.EDQUOT}} {
		if !e.full() {
			t.Errorf("%+v is not seen as a full disk", e)
		}
	}
}

func TestInterruptEndsARunningStatementFromAnotherGoroutine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	c, err := openConn(path, false)
	mustDo(t, err)
	started := make(chan struct{})
	finished := make(chan error)
	go func() {
		close(started)
		_, err := c.queryInt64("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n) SELECT count(*) FROM n")
		finished <- err
	}()
	<-started
	var got error
	for waiting := true; waiting; {
		c.interrupt() // again and again: it may come before the statement runs
		select {
		case got = <-finished:
			waiting = false
		case <-time.After(time.Millisecond):
		}
	}
	if e := asSQLiteError(got); e == nil || !e.interrupted() {
		t.Errorf("the endless statement ended with %v", got)
	}
	if n, err := c.queryInt64("SELECT 7"); err != nil || n != 7 {
		t.Errorf("afterwards: %d, %v", n, err)
	}
	mustDo(t, c.close())
	c.interrupt()
	mustDo(t, c.close())
}

func TestCheckpointReportsFrames(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	c := testConn(t, path)
	mustDo(t, c.exec("PRAGMA journal_mode=WAL; PRAGMA wal_autocheckpoint=0; CREATE TABLE t (b)"))
	for range 10 {
		mustDo(t, c.exec("INSERT INTO t VALUES (zeroblob(9000))"))
	}
	r, err := openConn(path, true)
	mustDo(t, err)
	hold := mustPrepare(t, r, "SELECT b FROM t")
	if _, err := hold.step(); err != nil {
		t.Fatal(err)
	}
	mustDo(t, c.exec("INSERT INTO t VALUES (zeroblob(9000))"))
	log, done, err := c.walCheckpoint(checkpointPassive)
	if err != nil || log < 20 || done <= 0 || done >= log {
		t.Errorf("passive, with a reader on the last but one commit: log %d, done %d, %v", log, done, err)
	}
	if _, _, err := c.walCheckpoint(checkpointTruncate); asSQLiteError(err) == nil || !asSQLiteError(err).busy() {
		t.Errorf("truncate with a reader: %v", err)
	}
	mustDo(t, r.close()) // finalizes hold
	if log, done, err = c.walCheckpoint(checkpointPassive); err != nil || log != done || log == 0 {
		t.Errorf("passive without a reader: log %d, done %d, %v", log, done, err)
	}
	if _, _, err := c.walCheckpoint(checkpointTruncate); err != nil {
		t.Error(err)
	}
	if info, err := os.Stat(path + "-wal"); err != nil || info.Size() != 0 {
		t.Errorf("the WAL after truncate: %v, %v", info, err)
	}
	pages, err := c.pageCount()
	if err != nil || pages < 20 {
		t.Errorf("pageCount %d, %v", pages, err)
	}
	if free, err := c.freelistCount(); err != nil || free != 0 {
		t.Errorf("freelistCount %d, %v", free, err)
	}
	mustDo(t, c.exec("DELETE FROM t"))
	if free, err := c.freelistCount(); err != nil || free < 10 {
		t.Errorf("freelistCount after deleting all: %d, %v", free, err)
	}
}

// A conn that is closed gives back all its C memory: hold on to none, or a server that opens readers again and again grows.
func TestCloseFinalizesWhatIsLeftOpen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	for range 50 {
		c, err := openConn(path, false)
		mustDo(t, err)
		s := mustPrepare(t, c, "SELECT ?")
		mustDo(t, s.bindBlob(1, make([]byte, 1000)))
		if _, err := s.step(); err != nil {
			t.Fatal(err)
		}
		if _, err := c.cached("SELECT 1"); err != nil {
			t.Fatal(err)
		}
		mustDo(t, c.close())
		if len(c.open) != 0 || s.p != 0 || s.bound != nil {
			t.Fatal("statements survive their connection")
		}
	}
}

func TestErrorTextNamesOperationAndCause(t *testing.T) {
	e := &sqliteError{Code: sqlite3.SQLITE_IOERR, Extended: sqlite3.SQLITE_IOERR_FSYNC, Errno: syscall.EIO, Msg: "disk I/O error", Op: "step"}
	if got, want := e.Error(), "sqlite: step: disk I/O error (code 1034, input/output error)"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if wrapped := fmt.Errorf("commit: %w", e); !errors.Is(wrapped, e) || asSQLiteError(wrapped) != e {
		t.Error("lost when wrapped")
	}
	if asSQLiteError(nil) != nil || asSQLiteError(errors.New("x")) != nil {
		t.Error("found where there is none")
	}
}

// A sync that finds no room leaves what was written where it is: it may be found again after a crash.
func TestAFailedSyncIsNoFullDisk(t *testing.T) {
	for extended, full := range map[int]bool{
		sqlite3.SQLITE_IOERR_WRITE: true, sqlite3.SQLITE_IOERR_FSYNC: false, sqlite3.SQLITE_IOERR_DIR_FSYNC: false,
	} {
		e := &sqliteError{Code: sqlite3.SQLITE_IOERR, Extended: extended, Errno: syscall.ENOSPC}
		if e.full() != full {
			t.Errorf("ENOSPC with code %d counts as a full disk: %t", extended, e.full())
		}
	}
}
