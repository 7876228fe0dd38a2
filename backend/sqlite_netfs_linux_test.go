package backend

import (
	"errors"
	"io/fs"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestNetworkFileSystemsAreRefused(t *testing.T) {
	for magic, want := range map[int64]string{
		unix.NFS_SUPER_MAGIC: "NFS", unix.CIFS_SUPER_MAGIC: "SMB/CIFS", unix.SMB2_SUPER_MAGIC: "SMB/CIFS", unix.SMB_SUPER_MAGIC: "SMB/CIFS",
		-11317950 /* CIFS where the field is a signed 32 bits */ : "SMB/CIFS",
		unix.EXT4_SUPER_MAGIC:                                     "", unix.XFS_SUPER_MAGIC: "", unix.BTRFS_SUPER_MAGIC: "", unix.TMPFS_MAGIC: "", unix.OVERLAYFS_SUPER_MAGIC: "",
		unix.V9FS_MAGIC: "", unix.FUSE_SUPER_MAGIC: "",
	} {
		if got := networkFileSystem(magic); got != want {
			t.Errorf("file system %#x is taken for %q, want %q", magic, got, want)
		}
	}
	mustDo(t, refuseNetworkFileSystem(t.TempDir()))
	if err := refuseNetworkFileSystem(filepath.Join(t.TempDir(), "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing directory: %v", err)
	}
}
