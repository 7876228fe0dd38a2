package sqlraft

import (
	"fmt"
	"net"
	"testing"
)

// pickyListener ends connections that come from an address.
type pickyListener struct {
	net.Listener
	from net.IP
}

func (l *pickyListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if a, ok := conn.RemoteAddr().(*net.TCPAddr); !ok || !a.IP.Equal(l.from) {
			return conn, nil
		}
		conn.Close()
	}
}

// TestAMemberThatReachesNobodyTakesPart: the others reach it. It founds the cluster with them, writes, leads, is sent a
// copy and sends one, and is let in again with an empty disk.
func TestAMemberThatReachesNobodyTakesPart(t *testing.T) {
	c := newNodeCluster(t, 3, Options{CatchUpEntries: 10})
	alone := c.members[0]
	address := net.IPv4(127, 0, 0, 9)
	start := func(m *nodeMember) {
		t.Helper()
		m.start(func(o *Options) {
			if m == alone {
				o.LocalAddr = address
			} else {
				o.Listeners[0] = &pickyListener{o.Listeners[0], address}
			}
		})
	}
	for _, m := range c.members {
		start(m)
	}
	writes := 0
	write := func(n int, at *nodeMember) {
		t.Helper()
		for range n {
			writes++
			at.mustWrite(fmt.Sprint(writes))
		}
	}
	until(t, "the member has founded the cluster with the others", func() bool { return alone.node.Status().Leader != 0 })
	write(20, alone)
	c.same(writes)

	alone.stop()
	c.leader()
	write(50, c.members[1])
	start(alone)
	c.same(writes)

	until(t, "it leads", func() bool {
		lead := c.leader()
		if lead != alone {
			_ = lead.node.MoveLeader(t.Context(), alone.id) // again, if it did not work
		}
		return lead == alone
	})
	write(20, c.members[2])
	c.members[2].stop()
	write(50, alone)
	start(c.members[2])
	c.same(writes)

	alone.stop()
	alone.dir, alone.list = t.TempDir(), new(listMachine)
	alone.machine = alone.list
	c.leader()
	write(1, c.members[1])
	start(alone)
	c.same(writes)
	write(1, alone)
	until(t, "it is let in again", func() bool {
		alone.seen.Lock()
		defer alone.seen.Unlock()
		return alone.seen.readmitted == 1
	})
	until(t, "it was sent a copy twice", func() bool {
		alone.seen.Lock()
		defer alone.seen.Unlock()
		return alone.seen.installed >= 2
	})
}
