package sqlraft

import (
	"fmt"
	"testing"

	"github.com/quire-db/quire/backend"
)

// TestAVoteThatWasTakenComesBack: the request of a member that had lost its log may be put in the log once more when it
// has its vote again, by another leader than the one that was asked. Nobody but the member knows that this was not meant.
func TestAVoteThatWasTakenComesBack(t *testing.T) {
	for name, meanwhile := range map[string]func(c *nodeCluster, m *nodeMember, take func()){
		"while it follows": func(_ *nodeCluster, _ *nodeMember, take func()) { take() },
		"while it is down": func(_ *nodeCluster, m *nodeMember, take func()) {
			m.stop()
			take()
			m.start(nil)
		},
		"while it is down, and the log is gone": func(c *nodeCluster, m *nodeMember, take func()) {
			m.stop()
			take()
			for i := range 50 {
				c.leader().mustWrite(fmt.Sprint(i))
			}
			m.start(nil)
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newNodeCluster(t, 3, Options{CatchUpEntries: 10})
			c.startAll()
			c.leader().mustWrite("first")
			c.same(1)
			m := c.members[0]
			if m == c.leader() {
				m = c.members[1]
			}
			meanwhile(c, m, func() {
				lead := c.leader()
				for _, ch := range []memberChange{
					{Kind: changeForget, Member: backend.Member{ID: m.id}},
					{Kind: changeReadmit, Member: *memberOf(*lead.node.members.Load(), m.id)},
				} {
					if a := lead.node.change(t.Context(), ch); a.err != nil {
						t.Fatal(a.err)
					}
				}
			})
			until(t, "it has its vote again", func() bool {
				for _, x := range c.members {
					if at := memberOf(*x.node.members.Load(), m.id); at == nil || at.Learner {
						return false
					}
				}
				return true
			})
			until(t, "it does not ask for it any more", func() bool {
				asks := make(chan bool, 1)
				m.node.call(func(*core) { asks <- m.node.identity.Rejoining })
				return !<-asks
			})
		})
	}
}
