package sqlraft

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/backend"
)

var _ History = (*backend.DB)(nil)

// startComparing starts a member that compares its database with those of the others.
func (m *nodeMember) startComparing(every time.Duration, change func(*Options)) *backend.DB {
	db := m.openDatabase()
	m.start(func(o *Options) {
		o.Compare = CompareOptions{History: db, Every: every}
		if change != nil {
			change(o)
		}
	})
	db.Join(m.node)
	m.c.t.Cleanup(func() {
		m.stop()
		if err := db.Close(); err != nil {
			m.c.t.Error(err)
		}
	})
	return db
}

// TestTheAlarmNamesWhoDiffers: a value that is changed in the file of one of three members is found while nobody writes,
// in the middle of what was compacted too; whether it is the leader's or not, the alarm is for that member.
func TestTheAlarmNamesWhoDiffers(t *testing.T) {
	for name, leads := range map[string]bool{"the leader": true, "a follower": false} {
		t.Run(name, func(t *testing.T) {
			c := newNodeCluster(t, 3, Options{})
			databases := map[*nodeMember]*backend.DB{}
			var rounds, differences atomic.Int64
			for _, m := range c.members {
				databases[m] = m.startComparing(20*time.Millisecond, func(o *Options) {
					o.Hooks.Compared = func(done Comparison, _ error) {
						if done.Whole && done.Peers == 2 {
							rounds.Add(1)
						}
					}
					o.Hooks.Differs = func(Difference) { differences.Add(1) }
				})
			}
			leader := c.leader()
			write := func(req *pb.PutRequest) {
				if _, err := databases[leader].Write(t.Context(), backend.Command{Request: req}); err != nil {
					t.Fatal(err)
				}
			}
			for i := range 100 {
				write(&pb.PutRequest{Key: fmt.Appendf(nil, "k%d", i%70), Value: fmt.Append(nil, i)})
			}
			if _, err := databases[leader].Write(t.Context(), backend.Command{Request: &pb.CompactionRequest{Revision: 90}}); err != nil {
				t.Fatal(err)
			}
			until(t, "a round through the whole history", func() bool { return rounds.Load() > 0 })

			culprit := leader
			for _, m := range c.members {
				if !leads && m != leader {
					culprit = m
				}
			}
			spoilFile(t, filepath.Join(culprit.dir, "quire.db"), "UPDATE revisions SET value = x'00' WHERE rev = 62")
			want := []*pb.AlarmMember{{MemberID: culprit.id, Alarm: pb.AlarmType_CORRUPT}}
			until(t, "all know of the alarm", func() bool {
				for _, db := range databases {
					if !slices.EqualFunc(db.Alarms(), want, func(a, b *pb.AlarmMember) bool { return a.String() == b.String() }) {
						return false
					}
				}
				return true
			})
			if differences.Load() == 0 {
				t.Error("nobody was told of the difference")
			}
			for m := range databases {
				done, err := m.node.CompareAll(t.Context())
				if done.Peers != 2 || m == culprit != errors.Is(err, ErrInconsistent) || m != culprit && err != nil {
					t.Errorf("member %x compares itself with %d others and says %v", m.id, done.Peers, err)
				}
			}
		})
	}
}

// spoilFile changes a database behind its owner's back.
func spoilFile(t *testing.T, path, statement string) {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+path+"?_pragma=busy_timeout(5000)")
	if err != nil {
		t.Fatal(err)
	}
	result, err := db.ExecContext(t.Context(), statement)
	if err != nil {
		t.Fatal(err)
	}
	if changed, err := result.RowsAffected(); err != nil || changed != 1 {
		t.Fatalf("%d rows changed, %v", changed, err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestOnlyTheLeaderCompares: the others answer.
func TestOnlyTheLeaderCompares(t *testing.T) {
	c := newNodeCluster(t, 3, Options{})
	var checks [3]atomic.Int64
	for i, m := range c.members {
		m.startComparing(5*time.Millisecond, func(o *Options) {
			o.Hooks.Compared = func(Comparison, error) { checks[i].Add(1) }
		})
	}
	until(t, "a leader has compared while it led all the time", func() bool {
		leader := c.leader()
		term := leader.node.Status().Term
		var before [3]int64
		for i := range checks {
			before[i] = checks[i].Load()
		}
		at := slices.Index(c.members, leader)
		until(t, "the leader compares", func() bool {
			return checks[at].Load() > before[at]+20 || leader.node.Status().Term != term
		})
		if leader.node.Status().Term != term {
			return false
		}
		for i, m := range c.members {
			if m != leader && checks[i].Load() > before[i]+1 { // one may have been under way
				t.Errorf("member %x, which does not lead, has compared", m.id)
			}
		}
		return true
	})
}

// TestWhoDoesNotCompareIsSkipped: an older quire, or one that was told not to.
func TestWhoDoesNotCompareIsSkipped(t *testing.T) {
	c := newNodeCluster(t, 3, Options{})
	for i, m := range c.members {
		if i < 2 {
			m.startComparing(0, nil)
			continue
		}
		m.start(nil)
	}
	c.leader()
	done, err := c.members[0].node.CompareAll(t.Context())
	if err != nil || done.Peers != 1 || done.Skipped[c.members[2].id] == nil || !done.Whole {
		t.Errorf("%+v, %v", done, err)
	}
	if _, err := c.members[2].node.CompareAll(context.Background()); err == nil {
		t.Error("a member without a history compares it")
	}
}

// TestABrokenStateMachineEndsTheNode, although nothing is written.
func TestABrokenStateMachineEndsTheNode(t *testing.T) {
	c := newNodeCluster(t, 1, Options{})
	broken := make(chan error, 1)
	c.members[0].start(func(o *Options) { o.Broken = broken })
	c.leader()
	broken <- backend.ErrDamaged
	select {
	case err := <-c.members[0].node.Failed():
		if !errors.Is(err, backend.ErrDamaged) {
			t.Errorf("it fails with %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Error("the node goes on")
	}
}
