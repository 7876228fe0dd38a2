package sqlraft

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/backend"
)

var _ StateMachine = (*backend.DB)(nil)

// openDatabase gives a member a real database, which start then uses.
func (m *nodeMember) openDatabase() *backend.DB {
	m.c.t.Helper()
	db, err := backend.OpenReplica(context.Background(), filepath.Join(m.dir, "quire.db"), backend.Options{MemberID: m.id})
	if err != nil {
		m.c.t.Fatal(err)
	}
	m.machine = db
	return db
}

// TestNodesOverDatabases: three real databases stay equal while a member is away, comes back and installs a copy.
func TestNodesOverDatabases(t *testing.T) {
	c := newNodeCluster(t, 3, Options{CatchUpEntries: 20})
	databases := make([]*backend.DB, len(c.members))
	open := func(i int) {
		databases[i] = c.members[i].openDatabase()
		c.members[i].start(nil)
		databases[i].Join(c.members[i].node)
	}
	shut := func(i int) {
		c.members[i].stop()
		if err := databases[i].Close(); err != nil {
			t.Error(err)
		}
	}
	for i := range c.members {
		open(i)
	}
	t.Cleanup(func() {
		for i := range c.members {
			shut(i)
		}
	})
	c.leader()
	put := func(i int, key, value string) {
		if _, err := databases[i].Write(context.Background(), backend.Command{Request: &pb.PutRequest{Key: []byte(key), Value: []byte(value)}}); err != nil {
			t.Errorf("member %d: putting %s: %v", i, key, err)
		}
	}
	load := func(members ...int) {
		var wg sync.WaitGroup
		for w := range 8 {
			wg.Go(func() {
				for n := range 40 {
					i := members[(w+n)%len(members)]
					put(i, fmt.Sprint(w, "/", n%7), fmt.Sprint(i, n))
				}
			})
		}
		wg.Wait()
	}
	load(0, 1, 2)
	away := 0
	for i, m := range c.members {
		if m != c.leader() {
			away = i
		}
	}
	others := []int{(away + 1) % 3, (away + 2) % 3}
	shut(away)
	load(others...)
	open(away)
	load(0, 1, 2)
	until(t, "the databases have the same hash", func() bool {
		for _, db := range databases {
			if db.Revision() != databases[0].Revision() {
				return false
			}
		}
		return databases[0].Revision() == 1+3*8*40
	})
	var hashes []uint32
	for _, db := range databases {
		h, err := db.HashKV(t.Context(), 0)
		if err != nil {
			t.Fatal(err)
		}
		hashes = append(hashes, h.Hash)
	}
	if hashes[0] != hashes[1] || hashes[0] != hashes[2] {
		t.Errorf("the hashes differ: %x", hashes)
	}
}

// TestOwnDataIsNotMixed: a database that was written to before belongs to the only founder of a cluster, or to none.
func TestOwnDataIsNotMixed(t *testing.T) {
	written := func(m *nodeMember) {
		t.Helper()
		plain, err := backend.OpenSQLite(t.Context(), filepath.Join(m.dir, "quire.db"), backend.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := plain.Write(t.Context(), backend.Command{Request: &pb.PutRequest{Key: []byte("own")}}); err != nil {
			t.Fatal(err)
		}
		if err := plain.Close(); err != nil {
			t.Fatal(err)
		}
	}
	try := func(m *nodeMember, change func(*Options)) error {
		t.Helper()
		db := m.openDatabase()
		err := m.tryStart(change)
		if err == nil {
			db.Join(m.node)
			m.c.leader()
			m.stop()
		}
		if err := db.Close(); err != nil {
			t.Error(err)
		}
		return err
	}
	three := newNodeCluster(t, 3, Options{})
	written(three.members[0])
	if err := try(three.members[0], nil); !errors.Is(err, errOwnData) {
		t.Errorf("one of three founders: %v", err)
	}
	joiner := three.add("n4")
	joiner.id = MemberID(joiner.urls(), "token")
	written(joiner)
	for name, change := range map[string]func(*Options){
		"joining": func(o *Options) { o.Joining = true },
		"lost":    func(o *Options) { o.Lost = true },
	} {
		if err := try(joiner, change); !errors.Is(err, errOwnData) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// It is a plain database still.
	written(joiner)
	one := newNodeCluster(t, 1, Options{})
	written(one.members[0])
	for range 2 {
		if err := try(one.members[0], nil); err != nil {
			t.Errorf("the only founder: %v", err)
		}
	}
}
