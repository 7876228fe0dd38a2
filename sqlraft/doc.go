// Package sqlraft keeps the database of several quire processes equal: each write is put in order by Raft
// (go.etcd.io/raft/v3) first, and then applied by every member to its own SQLite file. A majority of the members
// survives the loss of the rest.
//
// # Promises
//
//   - A write is acknowledged once its entry is synced on a majority of the members and applied on the one that
//     answers. What was acknowledged is not lost as long as a majority keeps its disks, whatever else happens: kill -9
//     and power cuts at any instruction included.
//   - Every member applies the same entries in the same order with the same deterministic code. Time, and all else that
//     is not the same on every member, comes with the entry: the leader stamps it.
//   - A proposal is applied at most once, wherever it was made and however often leaders change meanwhile. When its
//     leader is lost, the member proposes it anew by itself as soon as it is certain that it is not in the log, so that
//     clients see a delay. Forward.go proves it.
//   - The index of the last applied entry is written in the transaction that writes the rows: a member that restarts
//     applies each entry exactly once.
//   - ReadIndex, on any member, covers everything that was committed, by whatever member, when it was called. No clock is
//     part of it.
//   - Members are added, removed and promoted one at a time, by entries of the log. Whether a change has an effect is
//     decided where it stands in the log, on all members alike.
//   - A member whose log misses what it has acknowledged never votes and never acknowledges anything until the others
//     have let it in again. Rejoin.go says why that is safe, and what cannot be found out.
//
// Not promised: that a proposal which has failed is not applied later (unless its error says so), any order between
// proposals that are under way at the same time, and that two members whose disks are put back to older copies at
// the same time lose nothing.
//
// # Reading the source
//
// core.go is the member as a plain state machine around raft.RawNode: no goroutine, clock, disk or network of its own.
// Its parts: forward.go (proposals on their way to the leader and into entries), entry.go (what an entry looks like),
// read.go, member.go (changes of the members), snapshot.go (copies of the state for who lags), rejoin.go, storage.go (the
// log as Raft reads it).
//
// node.go runs it (options.go): one goroutine takes what comes in, writes the log (log.go, on disk.go) and sends (transport.go,
// packet.go; peers.go is what the transport asks of a Node); apply.go is the one that owns the state machine (machine.go). What
// operators ask for is in reconfigure.go, copies are made and fetched in copies.go, lost members let in in readmit.go; compare.go
// and compare_node.go have members compare their rows. bootstrap.go, discovery.go and identity.go are what the first start needs
// to know, start.go makes a member of a state and a log, founding.go keeps one with an empty disk from founding a cluster twice,
// initialized.go looks into a log without opening it.
//
// A write, from backend's commit queue: Node.Propose → core.propose → dispatch, to the leader → its leaderQueue → seal:
// one entry, stamped → log.append, synced, while the followers write theirs → committed → core.handOut → the applier →
// StateMachine.Apply, which answers the ticket.
//
// # Simulation
//
// TestSimulation drives cores on simulated disks, a simulated network and a fake clock through thousands of random
// histories with faults, and checks each for all of the above (QUIRE_SIMULATE is how many, QUIRE_SEED plays one again).
package sqlraft
