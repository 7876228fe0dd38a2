// Package backend is the meaning of etcd, written once, over a SQL revision table.
//
// # Promises
//
//   - A write is one value, a Command. Write returns when the rows it made are durable and visible. Until then
//     nobody sees any part of it.
//   - Revisions have no gaps: they are numbered in the order in which Commands are committed, and a revision
//     whose rows are not committed does not exist. The first write of an empty store makes revision 2, as in etcd.
//   - Reads never wait for writes. A View is the whole store at one revision; it does not change, and reading
//     it takes no lock. A View taken after a Write has returned contains that write.
//   - History hands out every event of every revision since the compaction revision, in order, whole revisions
//     only. What is kept in memory is a copy; the rows are the truth.
//   - apply is deterministic: the clock is an argument.
//
// In a replica (OpenReplica) the log of the cluster is what makes a write durable, Write returns when its rows are visible
// here, and a View may be behind that of another member: see Ready.
//
// Not promised: that a read at an old revision succeeds for ever (compaction), that Subscribe is called once for
// each revision (it is a hint), and any order between Writes that are under way at the same time.
//
// # Reading the source
//
// A put: commit.go (queue, batch) → apply.go → batch.go (record, row) → sqlite.go (durable) → view.go (visible).
// In a replica: replica_write.go → the log → replica_apply.go, replica_stamp.go → batch.go and on as above.
// A range: view.go → range.go → record.go; values.go or, where a value is not resident, sqlite.go.
// A watch reads history.go. What goes away and when: compact.go. Opening: load.go. The whole soundness: check.go.
package backend
