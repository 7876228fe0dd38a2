// Package powercut is a file system that forgets what was not synced, for tests of real processes: it is mounted through
// FUSE, a process keeps its data on it, the power is cut, and what a disk would then hold is there at the next mount.
// Disks that fail, lie still or are slow are simulated as well (Fault).
//
// # What survives a cut
//
// Durable is
//   - the content and the length of a file as of the start of its last fsync or fdatasync that succeeded;
//   - the names in a directory as of the last fsync of that directory, and whatever those changes rest on: earlier
//     changes of the same names, and both names of a rename. The fsync of a file does not make its name durable.
//
// Of everything later an arbitrary part survives:
//   - Each sector of 512 bytes that was written holds what was there before or what any one write has left in it,
//     whatever became of its neighbours: writes are torn and reordered. A sector is never torn itself.
//   - The length is one that the file has had since. Bytes within it whose sectors did not survive are zero. What lay
//     behind a truncation that survived does not come back.
//   - Changes of names are all there, or none, or those up to some moment (as the journals of ext4 and XFS do it), or any
//     of them in any order (POSIX promises no more), but the changes of one name in their order and a rename whole.
//
// This is never kinder than ext4 with data=ordered, and harsher where a program may not rely on ext4: there the names are
// always those of one moment, a file does not grow before its data is written, and the fsync of a new file syncs its name
// (Disk.Journal is that much kinder). Modes and times are durable at once.
//
// What a process has changed through a shared memory map reaches the disk when the kernel writes it back, as elsewhere.
//
// # The tests
//
// A load of clients writes, deletes, compares, leases, compacts and raises alarms, and keeps a book of what it was told
// (load, history). The power goes at a drawn moment; what is found afterwards must agree with the book (verify), and
// `quire check` must call it sound. So for one process with its SQLite file, and for a cluster of three, where members
// lose their power one by one or all at once, are killed, or have a disk that fails.
//
// They need root, /dev/fuse and the sqlite3 shell; without FUSE they fail, unless QUIRE_NO_FUSE=1 says that they may be
// skipped. QUIRE_CUTS is about the number of power cuts of a test (15), QUIRE_SEED repeats the draws of a run (the moments
// of the cuts also depend on the machine), QUIRE_BIN names the binary, as for the packages beside this one. With etcd as the
// binary `-run AcknowledgedIsLost` tests the tests; with ETCD_UNSAFE_NO_FSYNC=true it has to fail.
package powercut
