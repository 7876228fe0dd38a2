package backend

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// powerCut writes what was synced, and nothing else, into a directory.
func powerCut(t *testing.T, d *forgetful) string {
	t.Helper()
	dir := t.TempDir()
	d.mu.Lock()
	defer d.mu.Unlock()
	for name, f := range d.files {
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(name)), f.synced, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestLeavingIsDurable goes the way of cmd/quire: Sync, the log is put away, Leave, Close, the log is deleted. Power cuts in
// between leave everything that was acknowledged, also while another program reads.
func TestLeavingIsDurable(t *testing.T) {
	for _, reader := range []bool{false, true} {
		path := testPath(t)
		disk := forget(t, filepath.Dir(path))
		db, err := openLoopback(t.Context(), path, Options{})
		if err != nil {
			t.Fatal(err)
		}
		mustPut(t, db, "a", "1")
		alone(t, db, db.settle)
		disk.begin(t, path, path+"-wal")
		var other *conn
		if reader {
			if other, err = openConn(path, true); err != nil {
				t.Fatal(err)
			}
			mustDo(t, other.exec("BEGIN; SELECT count(*) FROM revisions"))
		}
		mustPut(t, db, "b", "acknowledged")
		want := db.Revision()
		mustDo(t, db.Sync())
		check := func(when string, dir string) {
			p := filepath.Join(dir, "quire.db")
			again, err := OpenReplica(t.Context(), p, Options{})
			if err != nil {
				t.Errorf("%s: %v", when, err)
				return
			}
			if again.Revision() != want {
				t.Errorf("reader %v, %s: revision %d is found, want %d", reader, when, again.Revision(), want)
			}
			mustDo(t, again.Close())
		}
		before := powerCut(t, disk)
		mustDo(t, db.Leave())
		left := powerCut(t, disk)
		mustDo(t, db.Close())
		closed := powerCut(t, disk)
		check("power cut before Leave, when the log is away", before)
		check("power cut after Leave", left)
		check("power cut after Close, when the log is deleted", closed)
		p := filepath.Join(closed, "quire.db")
		if plain, err := OpenSQLite(t.Context(), p, Options{}); err != nil {
			t.Errorf("reader %v: after Leave and Close: %v", reader, err)
		} else {
			mustDo(t, plain.Close())
		}
		if other != nil {
			mustDo(t, other.exec("COMMIT"))
			mustDo(t, other.close())
		}
	}
}

// TestAlarmsOfOthersEndWithLeaving: nobody is left who would lower the NOSPACE alarm of another member.
func TestAlarmsOfOthersEndWithLeaving(t *testing.T) {
	path := testPath(t)
	db, err := openLoopback(t.Context(), path, Options{MemberID: 1})
	if err != nil {
		t.Fatal(err)
	}
	mustPut(t, db, "a", "1")
	mustWrite(t, db, &pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, MemberID: 5, Alarm: pb.AlarmType_NOSPACE})
	mustDo(t, db.Leave())
	mustDo(t, db.Close())
	plain, err := OpenSQLite(t.Context(), path, Options{MemberID: 1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := plain.Write(t.Context(), Command{Request: putReq("b", "2")}); errors.Is(err, ErrNoSpace) {
		t.Errorf("there is room, and nobody but us, but: %v (%v)", err, plain.Alarms())
	}
	mustDo(t, plain.Close())
}
