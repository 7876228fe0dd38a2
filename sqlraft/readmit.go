package sqlraft

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/quire-db/quire/backend"
)

// How a lost member (rejoin.go) gets the leader to let it in again: it asks, over and over, whoever it knows.

// readmission is the question and the answer.
type readmission struct {
	// Self is what the member knows of itself. If CheckOnly is set it is not lost, but hears nothing any more, and asks
	// whether it is still a member.
	Self      backend.Member `json:"self"`
	CheckOnly bool           `json:"checkOnly,omitempty"`

	Leader uint64 `json:"leader,omitempty"` // who leads, as far as the one knows that was asked
	Member bool   `json:"member,omitempty"` // CheckOnly: it is
	Term   uint64 `json:"term,omitempty"`
	UpTo   uint64 `json:"upTo,omitempty"` // index of the entry that lets the member in; 0: not yet
	Voter  bool   `json:"voter,omitempty"`
	Error  string `json:"error,omitempty"`
}

// rejoin asks until this member is let in.
func (n *Node) rejoin() {
	for n.ctx.Err() == nil {
		answer, err := n.ask(readmission{})
		if err == nil {
			err = n.readmitted(answer)
		}
		if n.ctx.Err() != nil {
			return
		}
		n.o.Hooks.Readmitted(err)
		if err == nil {
			return
		}
		n.pause(n.o.electionTimeout())
	}
}

func (n *Node) pause(d time.Duration) {
	select {
	case <-time.After(d):
	case <-n.ctx.Done():
	}
}

// ask finds the leader and asks it. A nil error comes with an answer to the question.
func (n *Node) ask(question readmission) (readmission, error) {
	now := *n.members.Load()
	question.Self = backend.Member{ID: n.o.ID, Name: n.o.Name, ClientURLs: n.o.ClientURLs}
	for _, m := range slices.Concat(now.Members, n.o.Membership.Members) {
		if m.ID == n.o.ID {
			question.Self.PeerURLs, question.Self.Learner = m.PeerURLs, m.Learner
			break
		}
	}
	var ask []uint64
	for _, m := range now.Members {
		if m.ID != n.o.ID {
			ask = append(ask, m.ID)
		}
	}
	last := error(rpctypes.ErrGRPCNoLeader)
	for asked := 0; len(ask) > 0 && asked < 16; asked++ {
		to := ask[0]
		ask = ask[1:]
		answer, err := n.askOne(to, question)
		switch {
		case err != nil:
			last = err
		case answer.Error != "": // whatever else it says
			last = errors.New(answer.Error)
		case answer.UpTo != 0 || question.CheckOnly && answer.Leader == to:
			return answer, nil
		case answer.Leader != 0 && answer.Leader != to:
			ask = append([]uint64{answer.Leader}, ask...)
		}
	}
	return question, last
}

func (n *Node) askOne(to uint64, question readmission) (answer readmission, err error) {
	body, err := json.Marshal(question)
	if err != nil {
		return answer, err
	}
	ctx, cancel := context.WithTimeout(n.ctx, 2*n.o.requestTimeout())
	defer cancel()
	data, err := n.t.request(ctx, to, rejoinPath, body)
	if err != nil {
		return answer, err
	}
	if err := json.Unmarshal(data, &answer); err != nil {
		return answer, fmt.Errorf("sqlraft: what member %x answers: %w", to, err)
	}
	return answer, nil
}

// readmitted makes a leader's answer durable and takes part again.
func (n *Node) readmitted(answer readmission) error {
	return n.onLoop(n.ctx, func(c *core) error {
		voter := answer.Voter || n.identity.Rejoining
		hs := c.readmitted(answer.Term, answer.Leader, answer.UpTo)
		err := n.log.append(hs, nil, true)
		if err == nil {
			err = n.identify(func(i *logIdentity) { i.Lost, i.Rejoining = false, voter })
		}
		if err == nil {
			err = c.resume()
		}
		if err != nil {
			n.fail(err)
		} else if voter {
			n.wg.Go(n.regainVote)
		}
		return err
	})
}

// regainVote asks for this member's promotion as soon as it has caught up, until it is a voter again. Until then what it
// knows of itself may be from before it lost its log.
func (n *Node) regainVote() {
	for n.ctx.Err() == nil {
		all, err := n.Members(n.ctx, true)
		at := slices.IndexFunc(all, func(m backend.Member) bool { return m.ID == n.o.ID })
		if err == nil && at >= 0 {
			if all[at].Learner {
				_, err = n.PromoteMember(n.ctx, n.o.ID)
			}
			if err == nil {
				break
			}
		}
		n.pause(n.o.electionTimeout())
	}
	if n.ctx.Err() != nil {
		return
	}
	n.call(func(c *core) {
		if !c.votes() { // it was taken out again meanwhile
			n.wg.Go(n.regainVote)
		} else if err := n.identify(func(i *logIdentity) { i.Rejoining = false }); err != nil {
			n.fail(err)
		}
	})
}

// askMembership finds out, when no leader was heard of for long, whether this member was forgotten: taken out to be let
// in again by a leader that did not get to the second part.
func (n *Node) askMembership() {
	if answer, err := n.ask(readmission{CheckOnly: true}); err == nil && !answer.Member {
		n.call(func(c *core) { c.lose() })
	}
}

// serveRejoin is the leader's part: out, in, and an answer.
func (n *Node) serveRejoin(ctx context.Context, from uint64, body []byte) ([]byte, error) {
	var question readmission
	if err := json.Unmarshal(body, &question); err != nil || question.Self.ID != from {
		return nil, fmt.Errorf("sqlraft: %q is no question of member %x", body, from)
	}
	answer := readmission{Leader: n.Status().Leader}
	if answer.Leader == n.o.ID {
		// One at a time: two for the same member would be in each other's way.
		n.readmitting.Lock()
		defer n.readmitting.Unlock()
		var err error
		if question.CheckOnly {
			err = n.checkMember(ctx, from, &answer)
		} else {
			err = n.readmit(ctx, question.Self, &answer)
		}
		if err != nil {
			answer = readmission{Leader: n.o.ID, Error: rpctypes.ErrorDesc(err)}
		}
	}
	return json.Marshal(answer)
}

// checkMember finds out whether id is a member, now and not some time ago.
func (n *Node) checkMember(ctx context.Context, id uint64, answer *readmission) error {
	all, err := n.Members(ctx, true)
	answer.Member = slices.ContainsFunc(all, func(m backend.Member) bool { return m.ID == id })
	return err
}

// readmit takes a member out of the cluster and lets it in again.
func (n *Node) readmit(ctx context.Context, self backend.Member, answer *readmission) error {
	now := *n.members.Load()
	voter := !self.Learner // it may be a learner by now only because it is let in a second time
	if m := memberOf(now, self.ID); m != nil {
		self = *m
		voter = voter || !m.Learner
		if !m.Learner {
			// Without its vote the others have to be able to go on.
			others := 0
			for _, v := range votersOf(now) {
				if v != m.ID && (v == n.o.ID || n.activeSince(v, time.Now())) {
					others++
				}
			}
			if others < quorum(len(votersOf(now))) {
				return rpctypes.ErrGRPCUnhealthy
			}
		}
	}
	a := n.change(ctx, memberChange{Kind: changeForget, Member: backend.Member{ID: self.ID}})
	if a.err != nil && (a.index == 0 || !errors.Is(a.err, rpctypes.ErrGRPCMemberNotFound)) {
		return a.err
	}
	a = n.change(ctx, memberChange{Kind: changeReadmit, Member: self})
	if a.err != nil && (a.index == 0 || !errors.Is(a.err, rpctypes.ErrGRPCMemberExist)) {
		return a.err // if it exists, another leader has let it in meanwhile
	}
	var term uint64
	err := n.onLoop(ctx, func(c *core) error {
		if !c.leading {
			return rpctypes.ErrGRPCNotLeader
		}
		term = c.hard.term
		return nil
	})
	if err == nil {
		answer.Term, answer.UpTo, answer.Voter = term, a.index, voter
	}
	return err
}
