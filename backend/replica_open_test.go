package backend

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

func copyTo(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	mustDo(t, os.WriteFile(to, b, 0o600))
}

// TestAFullDiskKeepsNobodyFromStarting: there is no room to copy the WAL into the database.
func TestAFullDiskKeepsNobodyFromStarting(t *testing.T) {
	for _, replica := range []bool{false, true} {
		open := OpenSQLite
		if replica {
			open = openLoopback
		}
		path, crashed := testPath(t), testPath(t)
		db, err := open(t.Context(), path, Options{})
		if err != nil {
			t.Fatal(err)
		}
		mustPut(t, db, "a", string(make([]byte, 100_000)))
		copyTo(t, path, crashed)
		copyTo(t, path+"-wal", crashed+"-wal")
		mustDo(t, db.Close())
		f := failWrites(t, &writeFault{file: ".db", at: 1, all: true, errno: syscall.ENOSPC})
		var again *DB
		if replica {
			again, err = OpenReplica(t.Context(), crashed, Options{})
		} else {
			again, err = OpenSQLite(t.Context(), crashed, Options{})
		}
		heal()
		if !f.hit() {
			t.Errorf("replica %v: the disk was not full: this has tested nothing", replica)
		}
		if err != nil {
			t.Errorf("replica %v: it does not start: %v", replica, err)
			continue
		}
		mustDo(t, again.Close())
	}
}

// TestAReaderKeepsNoReplicaFromStarting: another program reads the database, and a copy may lie beside it.
func TestAReaderKeepsNoReplicaFromStarting(t *testing.T) {
	for _, install := range []bool{false, true} {
		path, copied := testPath(t), testPath(t)
		db, err := openLoopback(t.Context(), path, Options{})
		if err != nil {
			t.Fatal(err)
		}
		mustPut(t, db, "a", "1")
		alone(t, db, db.settle)
		copyTo(t, path, copied)
		other, err := openConn(path, true)
		if err != nil {
			t.Fatal(err)
		}
		mustDo(t, other.exec("BEGIN; SELECT count(*) FROM revisions"))
		mustPut(t, db, "b", "2")
		mustDo(t, db.Close())
		if install {
			copyTo(t, copied, path+installSuffix)
		}
		again, err := OpenReplica(t.Context(), path, Options{})
		if err != nil {
			t.Errorf("install %v: it does not start: %v", install, err)
		} else {
			mustDo(t, again.Close())
		}
		mustDo(t, other.exec("COMMIT"))
		mustDo(t, other.close())
	}
}

// TestReplicaInstallsBesideTheFileItself: the name that it was given may be a link to another file system.
func TestReplicaInstallsBesideTheFileItself(t *testing.T) {
	shm, err := os.MkdirTemp("/dev/shm", "install")
	if err != nil {
		t.Skipf("needs a second file system, at /dev/shm: %v", err)
	}
	defer func() { mustDo(t, os.RemoveAll(shm)) }()
	source := testPath(t)
	a, err := openLoopback(t.Context(), source, Options{})
	if err != nil {
		t.Fatal(err)
	}
	mustPut(t, a, "a", "1")
	alone(t, a, a.settle)
	link := testPath(t)
	mustDo(t, os.WriteFile(filepath.Join(shm, "real.db"), nil, 0o600))
	mustDo(t, os.Symlink(filepath.Join(shm, "real.db"), link))
	b, err := OpenReplica(t.Context(), link, Options{})
	if err != nil {
		t.Fatal(err)
	}
	copyTo(t, source, b.InstallPath())
	if err := b.Install(t.Context(), b.InstallPath()); err != nil {
		t.Errorf("install: %v", err)
	}
	mustDo(t, b.Close())
	for _, installed := range []bool{true, false} { // false: the process ended when the old file was gone, and the copy not yet in its place
		if !installed {
			mustDo(t, os.Remove(filepath.Join(shm, "real.db")))
			copyTo(t, source, filepath.Join(shm, "real.db.installing"))
		}
		if b, err = OpenReplica(t.Context(), link, Options{}); err != nil {
			t.Fatal(err)
		}
		if i, _ := b.Applied(); i == 0 {
			t.Errorf("the next start finds no copy (installed %v)", installed)
		}
		mustDo(t, b.Close())
	}
	mustDo(t, a.Close())
}

// TestAStartBesideAReaderServesWhatIsDurable, also where the reader keeps every checkpoint away.
func TestAStartBesideAReaderServesWhatIsDurable(t *testing.T) {
	for _, leave := range []bool{false, true} {
		path := testPath(t)
		disk := forget(t, filepath.Dir(path))
		db, err := openLoopback(t.Context(), path, Options{})
		if err != nil {
			t.Fatal(err)
		}
		mustPut(t, db, "a", "1")
		alone(t, db, db.settle)
		disk.begin(t, path, path+"-wal")
		other, err := openConn(path, true)
		if err != nil {
			t.Fatal(err)
		}
		mustDo(t, other.exec("BEGIN; SELECT count(*) FROM revisions"))
		mustPut(t, db, "b", "2")
		want := db.Revision()
		if leave {
			mustDo(t, db.Leave())
		}
		mustDo(t, db.Close())
		open := func(path string) (*DB, error) {
			if leave {
				return OpenSQLite(t.Context(), path, Options{})
			}
			return OpenReplica(t.Context(), path, Options{})
		}
		again, err := open(path)
		if err != nil {
			t.Fatal(err)
		}
		cut := powerCut(t, disk)
		mustDo(t, again.Close())
		found, err := OpenReplica(t.Context(), filepath.Join(cut, "quire.db"), Options{})
		if err != nil {
			t.Fatal(err)
		}
		if found.Revision() != want {
			t.Errorf("plain %v: served revision %d, after a power cut it is %d", leave, want, found.Revision())
		}
		mustDo(t, found.Close())
		mustDo(t, other.exec("COMMIT"))
		mustDo(t, other.close())
	}
}
