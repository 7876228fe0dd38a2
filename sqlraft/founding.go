package sqlraft

import (
	"context"
	"encoding/json"
	"slices"

	"github.com/quire-db/quire/backend"
)

// A member that is to found a cluster with others may have been started before and have lost its disk: its flags are the
// same. Would it vote as one that has nothing, then it could help others who have as little to found the cluster a second
// time, and what a majority had acknowledged would be gone. So at first it neither votes nor acknowledges anything (it is
// lost, as far as core is concerned: see rejoin.go), and asks the other founders whether they know it as one that has been
// started, which is when its client URLs came through the log. It takes part when as many as elect a leader do not; who is
// told so has lost its disk, and asks to be let in again.
//
// A majority of the founders includes somebody who knows, if a majority of them has ever known this member and keeps what it
// knows. It costs a new cluster nothing that elections do not cost anyhow.

// startedAnswer is the answer to the question.
type startedAnswer struct {
	Known bool `json:"known"`
}

func (n *Node) serveStarted(from uint64) ([]byte, error) {
	now := n.sm.Members()
	m := memberOf(now, from)
	return json.Marshal(startedAnswer{Known: m != nil && len(m.ClientURLs) > 0 || slices.Contains(now.Removed, from)})
}

// confirmFounding ends this member's doubt, one way or the other.
func (n *Node) confirmFounding() {
	ctx, cancel := context.WithCancel(n.ctx)
	defer cancel()
	founders := n.o.Membership.Members
	answers := make(chan bool, len(founders))
	for _, m := range founders {
		if m.ID != n.o.ID {
			n.wg.Go(func() { n.askStarted(ctx, m.ID, answers) })
		}
	}
	for need := quorum(len(votersOf(backend.Membership{Members: founders}))) - 1; need > 0; need-- {
		select {
		case known := <-answers:
			if known {
				n.foundLost()
				return
			}
		case <-n.ctx.Done():
			return
		}
	}
	n.call(func(c *core) {
		err := n.identify(func(i *logIdentity) { i.Unconfirmed = false }) // before anything is acknowledged
		if err == nil {
			err = c.resume()
		}
		if err != nil {
			n.fail(err)
		}
		if n.o.InitialElectionTickAdvance {
			c.hasten()
		}
	})
}

// askStarted asks until there is an answer.
func (n *Node) askStarted(ctx context.Context, to uint64, answers chan<- bool) {
	for ctx.Err() == nil {
		var answer startedAnswer
		try, cancel := context.WithTimeout(ctx, n.o.electionTimeout())
		body, err := n.t.request(try, to, startedPath, nil)
		cancel()
		if err == nil {
			err = json.Unmarshal(body, &answer)
		}
		if err == nil {
			answers <- answer.Known
			return
		}
		n.pause(n.o.Tick / 2)
	}
}

// foundLost goes on as a member that has lost its disk.
func (n *Node) foundLost() {
	n.call(func(*core) {
		if err := n.identify(func(i *logIdentity) { i.Lost, i.Unconfirmed = true, false }); err != nil {
			n.fail(err)
			return
		}
		n.o.Hooks.Lost()
		n.wg.Go(n.rejoin)
	})
}
