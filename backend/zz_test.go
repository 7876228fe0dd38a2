package backend

import (
	"os"
	"syscall"
	"testing"
)

func TestZZ(t *testing.T) {
	for n := int64(1); n < 80; n++ {
		path := testPath(t)
		f := failWrites(t, &writeFault{at: n, errno: syscall.ENOSPC})
		db, err := OpenSQLite(t.Context(), path, Options{})
		heal()
		if err == nil {
			db.Close()
		}
		if !f.hit() {
			break
		}
		st, _ := os.Stat(path)
		db, err2 := OpenSQLite(t.Context(), path, Options{})
		if err2 != nil {
			t.Logf("write %d failed (%v), left %d bytes: next: %v", n, err, st.Size(), err2)
		} else {
			db.Close()
		}
	}
}
