package postgres

import (
	"strings"
	"testing"
)

func TestAFullDisk(t *testing.T) {
	t.Parallel()
	s := New(t, Options{DiskBytes: 128 << 20})
	exec1(t, s, "CREATE TABLE t (a text)", "INSERT INTO t VALUES ('kept')")
	if err := s.FillDisk(); err != nil {
		t.Fatal(err)
	}
	err := s.Exec(t.Context(), Superuser, "INSERT INTO t SELECT repeat('x', 1000) FROM generate_series(1, 2000)")
	if err == nil || !strings.Contains(err.Error(), "No space left on device") {
		t.Errorf("2 MB into a full disk: %v, want no space left", err)
	}
	if err := s.FreeDisk(); err != nil {
		t.Fatal(err)
	}
	if !s.Running() {
		if err := s.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	exec1(t, s, "INSERT INTO t SELECT repeat('x', 1000) FROM generate_series(1, 2000)")
	if got := query(t, s, "SELECT min(a) || count(*) FROM t"); got != "kept2001" {
		t.Errorf("after the disk was freed: %s, want kept2001", got)
	}
}

func TestADiskTooFullForTheLogStopsTheServer(t *testing.T) {
	t.Parallel()
	s := New(t, Options{DiskBytes: 128 << 20})
	exec1(t, s, "CREATE TABLE t (a text)", "INSERT INTO t VALUES ('kept')")
	if err := s.FillDisk(); err != nil {
		t.Fatal(err)
	}
	// Messages are log without tables; the log's files are 16 MB.
	if err := s.Exec(t.Context(), Superuser, "SELECT pg_logical_emit_message(true, 'fill', repeat('x', 1000000)) FROM generate_series(1, 40)"); err == nil {
		t.Error("40 MB of log went into a full disk")
	}
	if err := s.FreeDisk(); err != nil {
		t.Fatal(err)
	}
	if err := s.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := query(t, s, "SELECT a FROM t"); got != "kept" {
		t.Errorf("after the disk was freed: %q, want kept", got)
	}
	if !strings.Contains(s.LogTail(1<<20), "PANIC") {
		t.Error("the server did not stop for want of room for its log")
	}
}
