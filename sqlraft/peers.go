package sqlraft

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"syscall"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/quire-db/quire/backend"
)

// What the transport wants of a Node: peerHandler.

func (n *Node) transportOptions() transportOptions {
	h := n.o.Hooks
	return transportOptions{
		id: n.o.ID, clusterID: n.clusterID, listeners: n.o.Listeners, handler: n,
		clientTLS: n.o.ClientTLS, localAddr: n.o.LocalAddr, version: n.o.Version, server: n.o.Server,
		readTimeout: n.o.ReadTimeout, dialTimeout: max(2*time.Second, time.Second+n.o.electionTimeout()),
		hooks: transportHooks{
			connected: n.connected, lost: h.PeerLost, unreached: n.unreached, rejected: h.PeerRejected,
			dropped: h.PeerDropped, sent: h.PeerSent, received: h.PeerReceived, roundTrip: h.PeerRoundTrip,
			serving: h.SnapshotServing, served: h.SnapshotServed,
		},
	}
}

// clusterID is 0 as long as a member that joins has not been told.
func (n *Node) clusterID() uint64 { return n.members.Load().ClusterID }

func (n *Node) receive(packets []packet) {
	n.inbox.Lock()
	if !n.inbox.closed {
		n.inbox.packets = append(n.inbox.packets, packets...)
	}
	n.inbox.Unlock()
	n.wake()
}

func (n *Node) unreached(id uint64, url string, err error) {
	n.o.Hooks.PeerUnreached(id, url, err)
	if errors.Is(err, syscall.ECONNREFUSED) {
		n.call(func(c *core) { c.ended(id) })
	}
}

func (n *Node) unreachable(id uint64) {
	n.call(func(c *core) { c.unreachable(id) })
}

func (n *Node) refused(id uint64, err error) {
	n.o.Hooks.PeerRefuses(id, err)
	if errors.Is(err, ErrRemoved) && n.leaving.CompareAndSwap(false, true) {
		n.wg.Go(func() {
			defer n.leaving.Store(false)
			if !n.belongs() {
				n.leave()
			}
		})
	}
}

// belongs says whether a majority holds this member for one of theirs, now, whatever somebody else may say: who was made the
// only member of his cluster (ForceNewCluster) sends everybody away.
func (n *Node) belongs() bool {
	ctx, cancel := context.WithTimeout(n.ctx, 2*n.o.electionTimeout())
	defer cancel()
	all, err := n.Members(ctx, true)
	return err == nil && slices.ContainsFunc(all, func(m backend.Member) bool { return m.ID == n.o.ID })
}

func (n *Node) membership() backend.Membership { return *n.members.Load() }

func (n *Node) openSnapshot(name string) (io.ReaderAt, int64, func(), error) {
	f, release, err := n.copies.open(name)
	if err != nil {
		return nil, 0, nil, err
	}
	n.call(func(c *core) { c.snapshotRead() })
	return f, f.Size(), release, nil
}

// Paths of requests to other members.
const (
	rejoinPath  = "sqlraft/rejoin"
	startedPath = "sqlraft/started"
	promotePath = "sqlraft/promote"
)

func (n *Node) serve(ctx context.Context, from uint64, path string, body []byte) ([]byte, error) {
	<-n.started
	switch path {
	case rejoinPath:
		return n.serveRejoin(ctx, from, body)
	case startedPath:
		return n.serveStarted(from)
	case promotePath:
		return n.servePromote(ctx, body)
	case comparePath:
		return n.serveCompare(ctx, body)
	}
	return nil, fmt.Errorf("sqlraft: this member does not answer %q", path)
}

// connected is called when packets go to a member and back again.
func (n *Node) connected(id uint64) {
	n.o.Hooks.PeerConnected(id)
	n.call(func(c *core) {
		c.connected(id)
		if n.o.InitialElectionTickAdvance && n.connectedVoters(time.Now()) >= quorum(len(votersOf(*n.members.Load()))) {
			c.hasten()
		}
	})
}

// connectedVoters counts the voters, this member among them, that packets have gone to and back ever since a time.
func (n *Node) connectedVoters(since time.Time) (count int) {
	for _, id := range votersOf(*n.members.Load()) {
		if id == n.o.ID || n.activeSince(id, since) {
			count++
		}
	}
	return count
}

func (n *Node) activeSince(id uint64, since time.Time) bool {
	at, active := n.t.activeSince(id)
	return active && at.Before(since)
}

func quorum(members int) int { return members/2 + 1 }

// connectedSince is coreOptions.connectedSince.
func (n *Node) connectedSince(id, tick uint64) bool {
	return n.activeSince(id, time.Now().Add(-time.Duration(n.core.now-tick)*n.o.Tick))
}

// ReadIndex returns the index up to which everything that was committed before the call, by whatever member, lies.
func (n *Node) ReadIndex(ctx context.Context) (uint64, error) {
	type answer struct {
		index uint64
		err   error
	}
	answered := make(chan answer, 1)
	n.call(func(c *core) {
		c.readIndex(func(index uint64, err error) { answered <- answer{index, err} })
	})
	select {
	case a := <-answered:
		return a.index, a.err
	case <-ctx.Done():
		return 0, errorOf(ctx)
	case <-n.looping:
		// The loop has answered all it knew of.
		select {
		case a := <-answered:
			return a.index, a.err
		default:
			return 0, rpctypes.ErrGRPCStopped
		}
	}
}
