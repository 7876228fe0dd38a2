package backend

import (
	"modernc.org/libc"
	sqlite3 "modernc.org/sqlite/lib"
)

// backup copies a database page by page from one connection to another. What the source connection writes meanwhile goes
// into the copy too, so that when it is done the copy is what the source is at that moment, and no reader keeps the WAL from
// being emptied. (Another connection's writes would make it begin anew.)
//
// REQUIRES: both connections and the backup belong to one goroutine at a time; while a backup is not finished neither is
// closed, and there is no transaction on the source when step is called.
type backup struct {
	from, to *conn
	p        uintptr // sqlite3_backup*, 0 once finished
}

// newBackup prepares to copy a database into an empty one.
func newBackup(from, to *conn) (*backup, error) {
	name, err := libc.CString("main")
	if err != nil {
		return nil, from.noMemory("backup")
	}
	defer libc.Xfree(from.tls, name)
	p := sqlite3.Xsqlite3_backup_init(to.tls, to.db, name, from.db, name)
	if p == 0 {
		return nil, to.failure("backup", sqlite3.Xsqlite3_extended_errcode(to.tls, to.db))
	}
	return &backup{from: from, to: to, p: p}, nil
}

// step copies some pages; done says that the copy is complete and committed, but not synced.
func (b *backup) step(pages int) (done bool, err error) {
	switch rc := sqlite3.Xsqlite3_backup_step(b.from.tls, b.p, int32(pages)); rc {
	case sqlite3.SQLITE_OK:
		return false, nil
	case sqlite3.SQLITE_DONE:
		return true, nil
	default:
		return false, b.to.failure("backup", rc)
	}
}

// finish ends it, complete or not. It may be called twice.
func (b *backup) finish() error {
	if b.p == 0 {
		return nil
	}
	rc := sqlite3.Xsqlite3_backup_finish(b.from.tls, b.p)
	b.p = 0
	if rc != sqlite3.SQLITE_OK {
		return b.to.failure("backup", rc)
	}
	return nil
}
