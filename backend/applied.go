package backend

import (
	"time"

	"google.golang.org/protobuf/proto"
)

// Applied is what a batch of Commands did, for Hooks.Applied. Operations are counted as etcd counts them for its
// metrics (server/v3/storage/mvcc: metricsTxnWrite): an operation counts once however many keys it touches, a lease that
// ends deletes each of its keys by an operation of its own, and a Txn that writes reads in a transaction of the store
// before the one that it writes in.
type Applied struct {
	Ranges, Puts, Deletes int
	PutBytes              int // of keys and values
	Txns                  int // transactions of the store with more than one operation

	Commands []AppliedCommand // in order

	operations int // when the transaction that is running began
	last       time.Time
}

// AppliedCommand is one Command of a batch, or a round of lease expiry. It belongs to the hook until that returns.
type AppliedCommand struct {
	Request  proto.Message // nil: leases expired
	Response proto.Message // nil with an error, and where nobody waits for it
	Expired  int           // leases
	Took     time.Duration // in memory, without making it durable
	Err      error         // why it was refused
}

// begin ends the transaction that was running.
func (a *Applied) begin() {
	now := a.Ranges + a.Puts + a.Deletes
	if now-a.operations > 1 {
		a.Txns++
	}
	a.operations = now
}

// ran notes a Command that has just been applied.
func (b *batch) ran(cmd Command, resp proto.Message, expired []int64, err error) {
	if b.db.opts.Hooks.Applied == nil {
		return
	}
	now := time.Now()
	b.did.Commands = append(b.did.Commands, AppliedCommand{
		Request: cmd.Request, Response: resp, Expired: len(expired), Took: now.Sub(b.did.last), Err: err,
	})
	b.did.last = now
}

// tell calls Hooks.Applied once the batch is durable, and before anybody is answered.
func (b *batch) tell() {
	b.did.begin()
	if f := b.db.opts.Hooks.Applied; f != nil && len(b.did.Commands) > 0 {
		f(&b.did)
		clear(b.did.Commands)
		b.db.appliedRoom = b.did.Commands[:0]
	}
}
