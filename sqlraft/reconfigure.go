package sqlraft

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/quire-db/quire/backend"
)

// healthInterval is how long members must have been connected before the cluster counts as healthy.
const healthInterval = 5 * time.Second

// changeWaiter is the ticket of a change that a caller waits for. The first answer counts.
type changeWaiter struct{ answered chan changeAnswer }

type changeAnswer struct {
	members backend.Membership
	index   uint64
	err     error
}

func (w *changeWaiter) Fail(err error) { w.answer(changeAnswer{err: err}) }

func (w *changeWaiter) done(m backend.Membership, index uint64, err error) {
	w.answer(changeAnswer{m, index, err})
}

func (w *changeWaiter) answer(a changeAnswer) {
	select {
	case w.answered <- a:
	default:
	}
}

// change has a change of the members made, by way of the log.
func (n *Node) change(ctx context.Context, ch memberChange) changeAnswer {
	w := &changeWaiter{answered: make(chan changeAnswer, 1)}
	n.offer(offered{payload: ch.payload(), conf: true, ticket: w})
	select {
	case a := <-w.answered:
		return a
	case <-ctx.Done():
		return changeAnswer{err: errorOf(ctx)}
	}
}

// errorOf is what etcd makes of a context that is over.
func errorOf(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return rpctypes.ErrGRPCCanceled
	}
	return rpctypes.ErrGRPCTimeout
}

// Members are in the order of their ids. Linearizable ones include every change that was made before the call.
func (n *Node) Members(ctx context.Context, linearizable bool) ([]backend.Member, error) {
	if linearizable {
		index, err := n.ReadIndex(ctx)
		if err == nil {
			err = n.waitApplied(ctx, index)
		}
		if err != nil {
			return nil, err
		}
	}
	return n.members.Load().Members, nil
}

// AddMember returns the new member, which has its id from now, and all members with it.
func (n *Node) AddMember(ctx context.Context, peerURLs []string, learner bool) (added backend.Member, all []backend.Member, err error) {
	now := *n.members.Load()
	if n.o.StrictReconfigCheck {
		if !learner && !mayAddVoter(now) {
			return added, nil, rpctypes.ErrGRPCMemberNotEnoughStarted
		}
		if voters := len(votersOf(now)); voters > 1 && n.connectedVoters(time.Now().Add(-healthInterval)) < quorum(voters+1) {
			return added, nil, rpctypes.ErrGRPCUnhealthy
		}
	}
	added = backend.Member{ID: addedMemberID(peerURLs, time.Now()), PeerURLs: slices.Clone(peerURLs), Learner: learner}
	a := n.change(ctx, memberChange{Kind: changeAdd, Member: added, MaxLearners: n.o.MaxLearners})
	if a.err != nil {
		return backend.Member{}, nil, a.err
	}
	return added, a.members.Members, nil
}

// mayAddVoter says whether those that have started are a majority with one more, or the only one there is.
func mayAddVoter(m backend.Membership) bool {
	voters, started := countVoters(m, 0)
	return started == 1 && voters == 1 || started >= quorum(voters+1)
}

// countVoters counts the voters but one, and those of them that have a name because they were started.
func countVoters(m backend.Membership, but uint64) (voters, started int) {
	for _, o := range m.Members {
		if o.Learner || o.ID == but {
			continue
		}
		voters++
		if o.Name != "" {
			started++
		}
	}
	return voters, started
}

// RemoveMember returns the members that are left.
func (n *Node) RemoveMember(ctx context.Context, id uint64) ([]backend.Member, error) {
	if err := n.mayRemove(id); err != nil {
		return nil, err
	}
	a := n.change(ctx, memberChange{Kind: changeRemove, Member: backend.Member{ID: id}})
	return a.members.Members, a.err
}

func (n *Node) mayRemove(id uint64) error {
	now := *n.members.Load()
	if m := memberOf(now, id); !n.o.StrictReconfigCheck || m != nil && m.Learner {
		return nil
	}
	if voters, started := countVoters(now, id); started < quorum(voters) {
		return rpctypes.ErrGRPCMemberNotEnoughStarted
	}
	if _, active := n.t.activeSince(id); id != n.o.ID && !active {
		return nil // the others do without it already
	}
	if voters := len(votersOf(now)); n.connectedVoters(time.Now().Add(-healthInterval))-1 < quorum(voters-1) {
		return rpctypes.ErrGRPCUnhealthy
	}
	return nil
}

// UpdateMember gives a member other peer URLs.
func (n *Node) UpdateMember(ctx context.Context, id uint64, peerURLs []string) ([]backend.Member, error) {
	a := n.change(ctx, memberChange{Kind: changeUpdate, Member: backend.Member{ID: id, PeerURLs: slices.Clone(peerURLs)}})
	return a.members.Members, a.err
}

// PromoteMember makes a voter of a learner that has caught up, which only the leader can tell.
func (n *Node) PromoteMember(ctx context.Context, id uint64) ([]backend.Member, error) {
	ctx, cancel := context.WithTimeout(ctx, n.o.requestTimeout())
	defer cancel()
	for {
		lead := n.Status().Leader
		var all []backend.Member
		err := error(rpctypes.ErrGRPCNotLeader)
		switch lead {
		case 0:
		case n.o.ID:
			all, err = n.promote(ctx, id)
		default:
			all, err = n.askPromotion(ctx, lead, id)
		}
		if err == nil || !errors.Is(err, rpctypes.ErrGRPCNotLeader) {
			return all, err
		}
		select {
		case <-time.After(n.o.Tick):
		case <-n.ctx.Done():
			return nil, rpctypes.ErrGRPCStopped
		case <-ctx.Done():
			return nil, errorOf(ctx)
		}
	}
}

// promote is PromoteMember on the leader.
func (n *Node) promote(ctx context.Context, id uint64) ([]backend.Member, error) {
	if err := n.onLoop(ctx, func(c *core) error { return c.mayPromote(id) }); err != nil {
		return nil, err
	}
	if voters, started := countVoters(*n.members.Load(), 0); n.o.StrictReconfigCheck && started+1 < quorum(voters+1) {
		return nil, rpctypes.ErrGRPCMemberNotEnoughStarted
	}
	a := n.change(ctx, memberChange{Kind: changePromote, Member: backend.Member{ID: id}})
	return a.members.Members, a.err
}

// promotion is what a leader answers.
type promotion struct {
	Members []backend.Member `json:"members,omitempty"`
	Error   string           `json:"error,omitempty"`
}

// promotionErrors are those that go from member to member by their texts.
var promotionErrors = []error{
	rpctypes.ErrGRPCNotLeader, rpctypes.ErrGRPCLearnerNotReady, rpctypes.ErrGRPCMemberNotFound, rpctypes.ErrGRPCMemberNotLearner,
	rpctypes.ErrGRPCMemberNotEnoughStarted, rpctypes.ErrGRPCTimeout, rpctypes.ErrGRPCTimeoutDueToLeaderFail,
	rpctypes.ErrGRPCTimeoutDueToConnectionLost, rpctypes.ErrGRPCStopped, rpctypes.ErrGRPCRequestTooManyRequests,
}

func (n *Node) servePromote(ctx context.Context, body []byte) ([]byte, error) {
	id, err := strconv.ParseUint(string(body), 16, 64)
	if err != nil {
		return nil, fmt.Errorf("sqlraft: %q is no member's id", body)
	}
	var p promotion
	if n.Status().Leader != n.o.ID {
		p.Error = rpctypes.ErrorDesc(rpctypes.ErrGRPCNotLeader)
	} else if p.Members, err = n.promote(ctx, id); err != nil {
		p.Error = rpctypes.ErrorDesc(err)
	}
	return json.Marshal(p)
}

func (n *Node) askPromotion(ctx context.Context, leader, id uint64) ([]backend.Member, error) {
	answer, err := n.t.request(ctx, leader, promotePath, []byte(hexID(id)))
	if err != nil {
		if ctx.Err() != nil {
			return nil, rpctypes.ErrGRPCTimeout
		}
		return nil, rpctypes.ErrGRPCNotLeader // asked again: it may be another one by now
	}
	var p promotion
	if err := json.Unmarshal(answer, &p); err != nil {
		return nil, fmt.Errorf("sqlraft: what member %x answers: %w", leader, err)
	}
	if p.Error == "" {
		return p.Members, nil
	}
	for _, err := range promotionErrors {
		if rpctypes.ErrorDesc(err) == p.Error {
			return nil, err
		}
	}
	return nil, errors.New(p.Error)
}

// MoveLeader hands leadership to another voter, and returns once that leads.
func (n *Node) MoveLeader(ctx context.Context, to uint64) error {
	if n.Status().Leader != n.o.ID {
		return rpctypes.ErrGRPCNotLeader
	}
	if m := memberOf(*n.members.Load(), to); m == nil || m.Learner {
		return rpctypes.ErrGRPCBadLeaderTransferee
	}
	ctx, cancel := context.WithTimeout(ctx, n.o.requestTimeout())
	defer cancel()
	again := time.NewTicker(n.o.electionTimeout())
	defer again.Stop()
	for {
		changed := n.LeaderChanged()
		switch n.Status().Leader {
		case to:
			return nil
		case n.o.ID: // also again: Raft gives up after an election timeout
			n.call(func(c *core) { c.transfer(to) })
		}
		select {
		case <-changed:
		case <-again.C:
		case <-ctx.Done():
			return errorOf(ctx)
		case <-n.ctx.Done():
			return rpctypes.ErrGRPCStopped
		}
	}
}

// publish tells the others this member's name and client URLs, until it has worked.
func (n *Node) publish() {
	self := backend.Member{ID: n.o.ID, Name: n.o.Name, ClientURLs: slices.Clone(n.o.ClientURLs)}
	for n.ctx.Err() == nil {
		if m := memberOf(n.sm.Members(), n.o.ID); m != nil && m.Name == self.Name && slices.Equal(m.ClientURLs, self.ClientURLs) {
			n.o.Hooks.Published(nil)
			return
		}
		ctx, cancel := context.WithTimeout(n.ctx, n.o.requestTimeout())
		// Not before it would see that it has worked: each try is an entry.
		_, err := n.Members(ctx, true)
		a := changeAnswer{err: err}
		if err == nil {
			a = n.change(ctx, memberChange{Kind: changePublish, Member: self})
		}
		cancel()
		switch {
		case n.ctx.Err() != nil:
			return
		case a.err == nil:
			n.o.Hooks.Published(nil)
			return
		}
		n.o.Hooks.Published(a.err)
		select {
		case <-time.After(n.o.electionTimeout()):
		case <-n.ctx.Done():
		}
	}
}
