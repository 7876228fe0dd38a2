package sqlraft

import (
	"errors"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/quire-db/quire/backend"
)

func TestLogOnAFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Skipf("needs the right to mount a small tmpfs (root): %v", err)
	}
	t.Cleanup(func() { must(t, syscall.Unmount(dir, 0)) })
	d := osDisk{segment: 64 << 10}
	l, _, err := openLog(d, filepath.Join(dir, "raft"))
	must(t, err)
	written := uint64(0)
	for err == nil && written < 100 {
		if err = l.append(nil, testEntries(written+1, 1, 10_000), true); err == nil {
			written++
		}
	}
	if !errors.Is(err, backend.ErrDiskFull) || !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "free space") {
		t.Fatalf("append to a full disk says %v", err)
	}
	must(t, l.close())
	l, rec, err := openLog(d, filepath.Join(dir, "raft"))
	must(t, err)
	if uint64(len(rec.entries)) != written {
		t.Errorf("found %d entries of %d", len(rec.entries), written)
	}
	must(t, l.purge(written-1))
	must(t, l.append(nil, testEntries(written+1, 1, 10_000), true))
	must(t, l.close())
}
