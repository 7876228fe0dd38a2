package backend

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// networkFileSystem names the network file system with this magic number (statfs), empty if it is none we refuse.
//
// Refused are those where locks or shared memory lie: the WAL's index is a memory map that all processes must share, and
// a client may cache what another one has changed. Not refused: 9p, which is the root of some sandboxes and virtual
// machines with one kernel only, so that locks there are sound; and where it cannot map the index, SQLite says so at the
// start. FUSE tells nothing about what is behind it (sshfs looks like a local encryption layer). Cluster file systems
// (CephFS, GFS2, OCFS2, Lustre) have coherent locks, so that our lock file keeps a second quire out.
func networkFileSystem(magic int64) string {
	switch uint32(magic) { // the field is signed and of 32 bits on some platforms
	case unix.NFS_SUPER_MAGIC:
		return "NFS"
	case unix.SMB_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC:
		return "SMB/CIFS"
	case unix.AFS_SUPER_MAGIC, unix.AFS_FS_MAGIC:
		return "AFS"
	case unix.CODA_SUPER_MAGIC:
		return "Coda"
	case unix.NCP_SUPER_MAGIC:
		return "NCP"
	}
	return ""
}

// refuseNetworkFileSystem fails if directory lies on a file system where SQLite could lose data.
func refuseNetworkFileSystem(directory string) error {
	var st unix.Statfs_t
	for {
		err := unix.Statfs(directory, &st)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("ask for the file system of %s: %w", directory, err)
		}
		break
	}
	if name := networkFileSystem(int64(st.Type)); name != "" {
		return fmt.Errorf("%s is on a network file system (%s), where locks and shared memory cannot be trusted and data would be lost: use a local disk",
			directory, name)
	}
	return nil
}
