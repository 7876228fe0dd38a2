package backend

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"modernc.org/libc"
	"modernc.org/libc/sys/types"
	sqlite3 "modernc.org/sqlite/lib"
)

// conn is one connection to a SQLite file: a thin skin over the C interface that modernc.org/sqlite translates to Go.
// The hot paths use it instead of database/sql because it copies each value once and allocates nothing per row:
// measured 126 k against 92 k rows/s in batches of 64, and scans in half the time (docs/design.md).
//
// A conn and its statements belong to one goroutine at a time; only interrupt may be called from others. Handing a conn
// to another goroutine is fine with the usual synchronization between the two.
//
// Memory: everything SQLite sees (SQL text, bound values) lies in C memory owned by the conn or the statement, never in
// Go memory, so the garbage collector neither moves nor frees what SQLite still reads. Views of C memory that are handed
// out (columnBlob) say how long they live.
type conn struct {
	tls     *libc.TLS // the C thread state; one for each conn, used by its goroutine only
	db      uintptr   // sqlite3*
	scratch uintptr   // 16 bytes of C memory for out-parameters
	open    map[*stmt]struct{}
	kept    map[string]*stmt // by SQL, see cached

	// closing orders interrupt (any goroutine) before or after close: sqlite3_interrupt must not see a closed handle.
	closing struct {
		sync.Mutex
		closed bool
	}
}

// sqliteError is what SQLite reported. It never contains keys or values: those are bound, not spliced into SQL.
type sqliteError struct {
	Code     int           // primary result code, such as SQLITE_FULL
	Extended int           // extended result code, such as SQLITE_IOERR_FSYNC
	Errno    syscall.Errno // what the operating system said, for I/O errors and files that cannot be opened; else 0
	Msg      string        // SQLite's words
	Op       string        // what was being done: open, prepare, step, ...
}

func (e *sqliteError) Error() string {
	if e.Errno != 0 {
		return fmt.Sprintf("sqlite: %s: %s (code %d, %v)", e.Op, e.Msg, e.Extended, e.Errno)
	}
	return fmt.Sprintf("sqlite: %s: %s (code %d)", e.Op, e.Msg, e.Extended)
}

// full: no space. SQLite turns ENOSPC of a write into SQLITE_FULL by itself, but not a quota, nor ENOSPC when it
// enlarges the shared memory file.
func (e *sqliteError) full() bool {
	switch e.Extended {
	case sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC:
		return false // it was written, and may be found again: not what a full disk is taken for
	}
	return e.Code == sqlite3.SQLITE_FULL || e.Errno == syscall.ENOSPC || e.Errno == syscall.EDQUOT
}

func (e *sqliteError) ioerr() bool { return e.Code == sqlite3.SQLITE_IOERR }

// corrupt: the file is damaged or is no SQLite database at all.
func (e *sqliteError) corrupt() bool {
	return e.Code == sqlite3.SQLITE_CORRUPT || e.Code == sqlite3.SQLITE_NOTADB
}

func (e *sqliteError) readonly() bool { return e.Code == sqlite3.SQLITE_READONLY }

// busy: another connection holds a lock that this one waited for in vain.
func (e *sqliteError) busy() bool {
	return e.Code == sqlite3.SQLITE_BUSY || e.Code == sqlite3.SQLITE_LOCKED
}

func (e *sqliteError) cantopen() bool { return e.Code == sqlite3.SQLITE_CANTOPEN }

func (e *sqliteError) interrupted() bool { return e.Code == sqlite3.SQLITE_INTERRUPT }

// asSQLiteError finds the *sqliteError in err's chain, nil if there is none.
func asSQLiteError(err error) *sqliteError {
	var e *sqliteError
	if errors.As(err, &e) {
		return e
	}
	return nil
}

// openConn opens the file at path, which is taken literally (no URI). Without readOnly the file is made if missing.
// No page is read yet: a damaged file shows with the first statement.
func openConn(path string, readOnly bool) (*conn, error) {
	c := &conn{tls: libc.NewTLS(), open: map[*stmt]struct{}{}, kept: map[string]*stmt{}}
	if c.scratch = c.malloc(16); c.scratch == 0 {
		c.tls.Close()
		return nil, c.noMemory("open")
	}
	name, err := libc.CString(path)
	if err != nil {
		libc.Xfree(c.tls, c.scratch)
		c.tls.Close()
		return nil, c.noMemory("open")
	}
	// NOMUTEX: a conn is used by one goroutine at a time, a mutex for each call would buy nothing.
	flags := int32(sqlite3.SQLITE_OPEN_READWRITE | sqlite3.SQLITE_OPEN_CREATE | sqlite3.SQLITE_OPEN_NOMUTEX)
	if readOnly {
		flags = sqlite3.SQLITE_OPEN_READONLY | sqlite3.SQLITE_OPEN_NOMUTEX
	}
	rc := sqlite3.Xsqlite3_open_v2(c.tls, name, c.scratch, flags, 0)
	libc.Xfree(c.tls, name)
	c.db = *(*uintptr)(cPointer(c.scratch)) // also set when open failed, and then to be closed all the same
	if rc == sqlite3.SQLITE_OK {
		rc = sqlite3.Xsqlite3_extended_result_codes(c.tls, c.db, 1)
	}
	if rc != sqlite3.SQLITE_OK {
		return nil, errors.Join(c.failure("open", rc), c.close())
	}
	return c, nil
}

// close finalizes all statements and closes the connection. Nothing of it may be used afterwards. Closing the last
// connection of all processes to a file copies the WAL into it and removes the WAL.
func (c *conn) close() error {
	c.closing.Lock()
	defer c.closing.Unlock()
	if c.closing.closed {
		return nil
	}
	for s := range c.open {
		s.finalize()
	}
	var err error
	if rc := sqlite3.Xsqlite3_close(c.tls, c.db); rc != sqlite3.SQLITE_OK {
		err = c.failure("close", rc)
	}
	c.closing.closed = true
	libc.Xfree(c.tls, c.scratch)
	c.tls.Close()
	c.db, c.scratch = 0, 0
	return err
}

// interrupt makes the statement that runs now end with SQLITE_INTERRUPT; without one it does nothing.
// It may be called from any goroutine at any time, also after close.
func (c *conn) interrupt() {
	c.closing.Lock()
	defer c.closing.Unlock()
	if c.closing.closed {
		return
	}
	tls := libc.NewTLS() // not c.tls: that one is in use by the conn's goroutine
	sqlite3.Xsqlite3_interrupt(tls, c.db)
	tls.Close()
}

// exec runs one or more statements without parameters and drops their rows. It parses them each time: on the hot path,
// use a statement (BEGIN and COMMIT too).
func (c *conn) exec(sql string) error {
	text, err := libc.CString(sql)
	if err != nil {
		return c.noMemory("exec")
	}
	defer libc.Xfree(c.tls, text)
	if rc := sqlite3.Xsqlite3_exec(c.tls, c.db, text, 0, 0, 0); rc != sqlite3.SQLITE_OK {
		return c.failure("exec", rc)
	}
	return nil
}

// prepare compiles one statement, meant to be used many times. It is finalized by finalize, at the latest by close.
func (c *conn) prepare(sql string) (*stmt, error) {
	sql = strings.TrimSpace(sql)
	text, err := libc.CString(sql)
	if err != nil {
		return nil, c.noMemory("prepare")
	}
	defer libc.Xfree(c.tls, text)
	tail := c.scratch + 8
	rc := sqlite3.Xsqlite3_prepare_v3(c.tls, c.db, text, -1, sqlite3.SQLITE_PREPARE_PERSISTENT, c.scratch, tail)
	if rc != sqlite3.SQLITE_OK {
		return nil, c.failure("prepare", rc)
	}
	p := *(*uintptr)(cPointer(c.scratch))
	if rest := *(*uintptr)(cPointer(tail)); p == 0 || rest != text+uintptr(len(sql)) {
		sqlite3.Xsqlite3_finalize(c.tls, p)
		return nil, &sqliteError{Code: sqlite3.SQLITE_MISUSE, Extended: sqlite3.SQLITE_MISUSE, Op: "prepare",
			Msg: fmt.Sprintf("not exactly one statement: %q", sql)}
	}
	s := &stmt{c: c, p: p}
	s.bound = make([]cBuffer, sqlite3.Xsqlite3_bind_parameter_count(c.tls, p))
	c.open[s] = struct{}{}
	return s, nil
}

// cached returns the statement for sql, prepared with its first use and kept until close. It is returned reset; its
// parameters still have the values bound before. It belongs to the conn: do not finalize it.
func (c *conn) cached(sql string) (*stmt, error) {
	if s := c.kept[sql]; s != nil {
		return s, s.reset()
	}
	s, err := c.prepare(sql)
	if err != nil {
		return nil, err
	}
	c.kept[sql] = s
	return s, nil
}

// queryInt64 runs a statement without parameters that answers with one integer, such as PRAGMA page_count.
func (c *conn) queryInt64(sql string) (int64, error) {
	var v int64
	err := c.queryOne(sql, func(s *stmt) { v = s.columnInt64(0) })
	return v, err
}

// queryText does the same for one text.
func (c *conn) queryText(sql string) (string, error) {
	var v string
	err := c.queryOne(sql, func(s *stmt) { v = s.columnText(0) })
	return v, err
}

func (c *conn) queryOne(sql string, read func(s *stmt)) error {
	s, err := c.cached(sql)
	if err != nil {
		return err
	}
	row, err := s.step()
	if err != nil {
		return errors.Join(err, s.reset())
	}
	if !row {
		return &sqliteError{Code: sqlite3.SQLITE_ERROR, Extended: sqlite3.SQLITE_ERROR, Op: "query", Msg: fmt.Sprintf("no row: %q", sql)}
	}
	read(s)
	return s.reset()
}

// inTransaction says whether a BEGIN is in force. SQLite rolls back by itself after some errors (full disk, I/O error,
// out of memory): ask before a ROLLBACK, which would fail then.
func (c *conn) inTransaction() bool { return sqlite3.Xsqlite3_get_autocommit(c.tls, c.db) == 0 }

// readOnlyFile says that the file cannot be written: SQLite opens it all the same, for reading.
func (c *conn) readOnlyFile() bool { return sqlite3.Xsqlite3_db_readonly(c.tls, c.db, 0) == 1 }

// pageCount is the size of the database in pages, pages still in the WAL and free ones included.
func (c *conn) pageCount() (int64, error) { return c.queryInt64("PRAGMA page_count") }

// freelistCount is how many of the pages hold nothing.
func (c *conn) freelistCount() (int64, error) { return c.queryInt64("PRAGMA freelist_count") }

// failure turns the result code of the call that has just failed into an error.
func (c *conn) failure(op string, rc int32) *sqliteError {
	e := &sqliteError{Code: int(rc & 0xff), Extended: int(rc), Op: op}
	e.Msg = libc.GoString(sqlite3.Xsqlite3_errstr(c.tls, rc))
	if c.db == 0 {
		return e
	}
	// The text kept by the connection belongs to this call only if the code does too.
	if sqlite3.Xsqlite3_extended_errcode(c.tls, c.db)&0xff == rc&0xff {
		e.Msg = libc.GoString(sqlite3.Xsqlite3_errmsg(c.tls, c.db))
	}
	if e.ioerr() || e.cantopen() {
		e.Errno = syscall.Errno(sqlite3.Xsqlite3_system_errno(c.tls, c.db))
	}
	return e
}

func (c *conn) noMemory(op string) *sqliteError {
	return &sqliteError{Code: sqlite3.SQLITE_NOMEM, Extended: sqlite3.SQLITE_NOMEM, Op: op, Msg: "out of memory"}
}

func (c *conn) malloc(n int) uintptr { return libc.Xmalloc(c.tls, types.Size_t(n)) }

// stmt is a compiled statement. Its life: bind, step until there is no row, reset, bind again.
// Bound values stay bound over reset until they are bound anew.
type stmt struct {
	c       *conn
	p       uintptr   // sqlite3_stmt*, 0 once finalized
	bound   []cBuffer // of parameter i+1; only used for blobs and texts
	stepped bool      // step was called since the last reset
}

// cBuffer is C memory that a parameter is bound to. Each parameter has its own, which grows as needed and is kept until
// finalize: SQLite reads it in place (SQLITE_STATIC), so a bind costs one copy and no allocation.
type cBuffer struct {
	p    uintptr
	size int
}

// bindInt64 sets parameter i, counted from 1. REQUIRES, here and for the other binds: reset after the last step.
func (s *stmt) bindInt64(i int, v int64) error {
	if rc := sqlite3.Xsqlite3_bind_int64(s.c.tls, s.p, int32(i), v); rc != sqlite3.SQLITE_OK {
		return s.c.failure("bind", rc)
	}
	return nil
}

// bindBlob sets parameter i to a copy of b. An empty b is bound as an empty blob, never as NULL, and so is a nil b: to
// etcd an absent value and an empty one are the same, and the columns are NOT NULL.
func (s *stmt) bindBlob(i int, b []byte) error {
	return bindCopy(s, i, unsafe.SliceData(b), len(b), sqlite3.Xsqlite3_bind_blob)
}

// bindText sets parameter i to a copy of v, which should be valid UTF-8.
func (s *stmt) bindText(i int, v string) error {
	return bindCopy(s, i, unsafe.StringData(v), len(v), sqlite3.Xsqlite3_bind_text)
}

func bindCopy(s *stmt, i int, from *byte, n int, bind func(*libc.TLS, uintptr, int32, uintptr, int32, uintptr) int32) error {
	switch {
	case s.stepped || s.p == 0:
		// SQLite would refuse as well, but only after the buffer that it still reads was overwritten.
		return &sqliteError{Code: sqlite3.SQLITE_MISUSE, Extended: sqlite3.SQLITE_MISUSE, Op: "bind", Msg: "statement is running or finalized"}
	case i < 1 || i > len(s.bound):
		return &sqliteError{Code: sqlite3.SQLITE_RANGE, Extended: sqlite3.SQLITE_RANGE, Op: "bind", Msg: fmt.Sprintf("no parameter %d of %d", i, len(s.bound))}
	case n > math.MaxInt32:
		return &sqliteError{Code: sqlite3.SQLITE_TOOBIG, Extended: sqlite3.SQLITE_TOOBIG, Op: "bind", Msg: fmt.Sprintf("%d bytes are too many", n)}
	}
	buffer := &s.bound[i-1]
	to, outgrown := *buffer, cBuffer{}
	if to.p == 0 || to.size < n {
		to.size = max(64, n+n/4)
		if to.p = s.c.malloc(to.size); to.p == 0 {
			return s.c.noMemory("bind")
		}
		*buffer, outgrown = to, *buffer
	}
	copy(unsafe.Slice((*byte)(cPointer(to.p)), n), unsafe.Slice(from, n))
	rc := bind(s.c.tls, s.p, int32(i), to.p, int32(n), sqlite3.SQLITE_STATIC)
	if outgrown.p != 0 {
		// Not earlier: until now the parameter was bound to it. A bind that failed has bound NULL, as the checks above
		// leave no failure that keeps the old value.
		libc.Xfree(s.c.tls, outgrown.p)
	}
	if rc != sqlite3.SQLITE_OK {
		return s.c.failure("bind", rc)
	}
	return nil
}

// step runs the statement up to its next row; false: it is done. After an error, reset before anything else.
func (s *stmt) step() (row bool, err error) {
	s.stepped = true
	switch rc := sqlite3.Xsqlite3_step(s.c.tls, s.p); rc {
	case sqlite3.SQLITE_ROW:
		return true, nil
	case sqlite3.SQLITE_DONE:
		return false, nil
	default:
		return false, s.c.failure("step", rc)
	}
}

// run steps a statement that returns no rows (or whose rows do not matter) to its end and resets it.
func (s *stmt) run() error {
	for {
		row, err := s.step()
		if err != nil {
			return errors.Join(err, s.reset())
		}
		if !row {
			return s.reset()
		}
	}
}

// reset makes the statement ready for binding and stepping anew and ends the read transaction that a SELECT holds.
// An error that step has reported already is not reported again.
func (s *stmt) reset() error {
	if s.p == 0 {
		return &sqliteError{Code: sqlite3.SQLITE_MISUSE, Extended: sqlite3.SQLITE_MISUSE, Op: "reset", Msg: "statement is finalized"}
	}
	s.stepped = false
	// The result code of sqlite3_reset is that of the last step, once more; reset itself cannot fail.
	sqlite3.Xsqlite3_reset(s.c.tls, s.p)
	return nil
}

// columnInt64 is column i of the current row, counted from 0.
func (s *stmt) columnInt64(i int) int64 {
	return sqlite3.Xsqlite3_column_int64(s.c.tls, s.p, int32(i))
}

// columnBlob is column i of the current row as a view of SQLite's memory: valid only until the next step, reset or
// finalize of this statement, never to be written to. Copy what must live longer. NULL is nil, an empty
// blob is empty and not nil.
func (s *stmt) columnBlob(i int) []byte {
	p := sqlite3.Xsqlite3_column_blob(s.c.tls, s.p, int32(i))
	if p == 0 {
		if sqlite3.Xsqlite3_column_type(s.c.tls, s.p, int32(i)) == sqlite3.SQLITE_NULL {
			return nil
		}
		return []byte{}
	}
	n := int(sqlite3.Xsqlite3_column_bytes(s.c.tls, s.p, int32(i)))
	return unsafe.Slice((*byte)(cPointer(p)), n)[:n:n]
}

// columnText is column i of the current row as a string of its own.
func (s *stmt) columnText(i int) string {
	p := sqlite3.Xsqlite3_column_text(s.c.tls, s.p, int32(i))
	if p == 0 {
		return ""
	}
	return string(unsafe.Slice((*byte)(cPointer(p)), sqlite3.Xsqlite3_column_bytes(s.c.tls, s.p, int32(i))))
}

// finalize frees the statement. It may be called twice.
func (s *stmt) finalize() {
	if s.p == 0 {
		return
	}
	// The result code is that of the last step, once more.
	sqlite3.Xsqlite3_finalize(s.c.tls, s.p)
	s.p = 0
	for _, b := range s.bound {
		if b.p != 0 {
			libc.Xfree(s.c.tls, b.p)
		}
	}
	s.bound = nil
	delete(s.c.open, s)
}

// cPointer makes a pointer of an address of C memory. REQUIRES: p was handed out by libc or SQLite and is not freed yet.
// That memory is mapped outside the Go heap: the collector ignores the pointer and neither moves nor frees what it points
// to. (Written so that vet's check, which is about addresses of Go memory, keeps its eyes on the rest of the file.)
func cPointer(p uintptr) unsafe.Pointer { return *(*unsafe.Pointer)(unsafe.Pointer(&p)) }
