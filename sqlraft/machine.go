package sqlraft

import (
	"context"

	"github.com/quire-db/quire/backend"
)

// StateMachine is what the log is applied to: *backend.DB in replica mode, a small model in the simulation.
//
// Apply, ApplyMembers, Lead, Follow and Install are called by one goroutine, in the order of the log; the others may be
// called at any time. Everything that Apply makes of an entry follows from the entries before it alone.
type StateMachine interface {
	// Applied is the index and the term of the newest entry that is applied, 0 before the first.
	Applied() (index, term uint64)
	// Empty says whether nothing was ever written to the store; only asked before the first entry is applied.
	Empty() bool
	// Durable is the index up to which everything applied survives a power cut. It never falls while the process runs.
	Durable() uint64
	// Members is the membership as of Applied.
	Members() backend.Membership

	// Stamp is what the leader puts in front of an entry: whatever apply may need that is not the same on every member
	// (time, free space, who leads). REQUIRES: between Lead and Follow.
	Stamp() []byte
	// Apply applies entries, in their order, and answers the tickets in them. All that are committed at the time are best
	// given together: they become durable in one transaction, or a few. It returns an error only when this member cannot go
	// on at all; what can be mended (a full disk) it waits for. Then, and after an error, tickets that it has not answered
	// still have to be failed.
	Apply(entries []backend.Entry) error
	// ApplyMembers makes m the membership, together with the applied index. Entries that change neither the store nor
	// the members (a leader's first) come here too, with m nil.
	ApplyMembers(index, term uint64, m *backend.Membership) error
	// Lead is called once everything up to the first entry of the term is applied on the member that leads it; no entry
	// is stamped before. Follow is called when it does not lead any more. Term is that of Raft.
	Lead(term uint64)
	Follow()

	// Snapshot makes a consistent copy of the state at some applied index. It does not hold up Apply.
	Snapshot(ctx context.Context) (backend.Snapshot, error)
	// Install replaces the state by the file at path, a copy that Snapshot of another member has made, and takes the
	// file. The file is durable, its name is Options.InstallPath; after a crash in the middle
	// either the old or the new state is found: the next start takes the newer one (see backend.OpenReplica).
	Install(ctx context.Context, path string) error
}

// Status is what a member knows of itself and its cluster.
type Status struct {
	ID, Leader uint64 // Leader is 0 while there is none
	Term       uint64
	Committed  uint64
	Applied    uint64
	Learner    bool
}
