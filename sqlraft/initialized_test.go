package sqlraft

import (
	"os"
	"path/filepath"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
)

func TestInitializedTellsWhoseLogItIs(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "raft")
	want := func(when string, id uint64) {
		t.Helper()
		if got, err := Initialized(dir); err != nil || got != id {
			t.Errorf("%s: %x, %v, want %x", when, got, err, id)
		}
	}
	want("no directory", 0)
	if _, err := os.Stat(dir); err == nil {
		t.Error("the directory was made")
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	want("an empty directory", 0)

	d := osDisk{segment: 4 << 10}
	l, _, err := openLog(d, dir)
	if err != nil {
		t.Fatal(err)
	}
	want("a log of nobody", 0)
	if err := setLogIdentity(l, logIdentity{Member: 0xabc}); err != nil {
		t.Fatal(err)
	}
	want("a log in use", 0xabc)
	for i := range uint64(50) { // many segments
		e := &raftpb.Entry{Index: new(i + 1), Term: new(uint64(1)), Data: make([]byte, 1000)}
		if err := l.append(&raftpb.HardState{Term: new(uint64(1)), Commit: new(i)}, []*raftpb.Entry{e}, true); err != nil {
			t.Fatal(err)
		}
	}
	want("a long log in use", 0xabc)
	if err := l.close(); err != nil {
		t.Fatal(err)
	}
	want("a long log", 0xabc)
}
