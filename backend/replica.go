package backend

import (
	"context"
	"io"
)

// A replica is a database whose writes go through a log that several processes keep together: package sqlraft.

// ReplicatedLog is what a replica asks of the log. Any number of goroutines do so at once.
type ReplicatedLog interface {
	// Propose has payload put into the log, once, and returns at once. Afterwards the replica's Apply sees it, with
	// ticket, or ticket's Fail is called.
	Propose(payload []byte, ticket Ticket)
	// ReadIndex returns the index up to which a replica has to have applied so that what it answers holds everything
	// that was committed, by whatever member, when ReadIndex was called. Errors are etcd's (rpctypes).
	ReadIndex(ctx context.Context) (index uint64, err error)
}

// Entry is one committed entry: a number of proposals that take effect one after the other, under one stamp.
type Entry struct {
	Index, Term uint64
	Stamp       []byte
	Proposals   []Proposal
}

// Proposal is what a member wants done.
type Proposal struct {
	Payload []byte
	// Ticket is what was given to Propose, on the member that made the proposal; nil elsewhere, and after a restart.
	Ticket Ticket
}

// Ticket stands for those who wait for a proposal. Apply answers it; else Fail is called, once.
type Ticket interface {
	// Fail says that the proposal was not applied in time. It may still be, unless err says otherwise. It may be called by any
	// goroutine, within Propose too, and does nothing once the ticket is answered.
	Fail(err error)
}

// Snapshot is a copy of the state in a file.
type Snapshot interface {
	Index() uint64
	Term() uint64
	Members() Membership
	Size() int64
	// ReaderAt reads the file; any number of members may read it at once.
	io.ReaderAt
	// Release deletes the file; it is called once.
	Release() error
}

// Member is one member of the cluster.
type Member struct {
	ID         uint64   `json:"id"`
	Name       string   `json:"name,omitempty"` // empty until it has started
	PeerURLs   []string `json:"peerURLs"`
	ClientURLs []string `json:"clientURLs,omitempty"`
	Learner    bool     `json:"isLearner,omitempty"`
}

// Membership is who belongs to the cluster. Members are in the order of their ids.
type Membership struct {
	ClusterID uint64   `json:"clusterID"`
	Members   []Member `json:"members"`
	// Removed are ids that may never come back.
	Removed []uint64 `json:"removed,omitempty"`
}
