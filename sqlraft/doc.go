// Package sqlraft is where quire's replicated storage will live: the same
// commands and the same SQLite rows as the embedded default, but put in order
// by Raft first (go.etcd.io/raft/v3), so that several quire processes form one
// cluster and a majority of them survives the loss of the rest.
//
// At present the package holds no code. quire runs as one process on one
// SQLite file (package backend); the flags of etcd that concern peers and
// clusters are accepted with a warning and change nothing.
//
// What it will promise:
//
//   - A write is a backend.Command. It is acknowledged once its log entry is
//     synced on a majority of the members and applied on the one that answers.
//   - Every member applies the same entries in the same order with the same
//     deterministic code, so that the rows of all members are equal.
//   - The index of the last applied entry is written in the transaction that
//     writes the rows: a member that restarts applies each entry exactly once.
//   - Linearizable reads are answered by any member, after asking the leader
//     which entry they have to wait for.
package sqlraft
