package backend

import (
	"unsafe"

	"modernc.org/libc"
	sqlite3 "modernc.org/sqlite/lib"
)

// checkpointMode says how hard walCheckpoint tries.
type checkpointMode int32

const (
	checkpointNone     checkpointMode = sqlite3.SQLITE_CHECKPOINT_NOOP     // copy nothing, only count
	checkpointPassive  checkpointMode = sqlite3.SQLITE_CHECKPOINT_PASSIVE  // what is possible without waiting for anybody
	checkpointTruncate checkpointMode = sqlite3.SQLITE_CHECKPOINT_TRUNCATE // wait for readers, copy all, empty the WAL file
)

// walCheckpoint syncs the WAL, copies committed pages from it into the database file and syncs that. It returns the number
// of frames in the WAL and how many of them are in the database file now. Fewer than all, or an error that is busy(), means
// that a reader still needs an older state: nothing is lost, try again later. All of them means that the database file is
// synced with all of them. REQUIRES: no transaction on this conn.
func (c *conn) walCheckpoint(mode checkpointMode) (logFrames, checkpointed int, err error) {
	logAt, doneAt := c.scratch, c.scratch+4
	rc := sqlite3.Xsqlite3_wal_checkpoint_v2(c.tls, c.db, 0, int32(mode), logAt, doneAt)
	logFrames, checkpointed = int(*(*int32)(cPointer(logAt))), int(*(*int32)(cPointer(doneAt)))
	if rc != sqlite3.SQLITE_OK {
		return logFrames, checkpointed, c.failure("checkpoint", rc)
	}
	return logFrames, checkpointed, nil
}

// syncWAL makes every commit so far durable, whoever is reading: with synchronous=NORMAL only a checkpoint does so by
// itself, and only one that no reader holds up copies everything.
func (c *conn) syncWAL() error {
	name, err := libc.CString("main")
	if err != nil {
		return c.noMemory("sync")
	}
	defer libc.Xfree(c.tls, name)
	if rc := sqlite3.Xsqlite3_file_control(c.tls, c.db, name, sqlite3.SQLITE_FCNTL_JOURNAL_POINTER, c.scratch); rc != sqlite3.SQLITE_OK {
		return c.failure("sync", rc)
	}
	file := *(*uintptr)(cPointer(c.scratch))
	methods := uintptr(0)
	if file != 0 {
		methods = (*sqlite3.Tsqlite3_file)(cPointer(file)).FpMethods
	}
	if methods == 0 {
		return nil // nothing has been read or written yet
	}
	sync := (*sqlite3.Tsqlite3_io_methods)(cPointer(methods)).FxSync
	call := *(*func(tls *libc.TLS, file uintptr, flags int32) int32)(unsafe.Pointer(&struct{ uintptr }{sync}))
	if rc := call(c.tls, file, sqlite3.SQLITE_SYNC_NORMAL); rc != sqlite3.SQLITE_OK {
		return c.failure("sync", rc)
	}
	return nil
}

// syncFailed: what was written may be lost, and whatever the next sync says cannot be believed (the kernel drops what it
// could not write, and reports that once).
func (e *sqliteError) syncFailed() bool {
	return e.Extended == sqlite3.SQLITE_IOERR_FSYNC || e.Extended == sqlite3.SQLITE_IOERR_DIR_FSYNC
}
