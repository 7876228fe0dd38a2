package backend

import (
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// A token that auth has ended while a member was behind is not good there again once the member has another one's state.
func TestReplicaForgetsTokensWithAnInstall(t *testing.T) {
	c := newCluster(t, Options{}, Options{})
	c.lead(0)
	a, behind := c.members[0].db, c.members[1]
	makeAuth(t, a)
	mustAuth(t, a, &pb.AuthEnableRequest{})
	give := &pb.InternalAuthenticateRequest{Name: "ann", SimpleToken: "hash"}
	mustAuth(t, a, give)
	c.same()
	if _, ok := behind.db.TokenUser("hash", behind.db.Auth()); !ok {
		t.Fatal("the token is not known at first")
	}
	behind.paused.Lock()
	mustAuth(t, a, &pb.AuthDisableRequest{}, &pb.AuthEnableRequest{})
	s, err := a.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	mustDo(t, behind.install(s))
	mustDo(t, s.Release())
	behind.paused.Unlock()
	c.same()
	for i, m := range c.members {
		if user, ok := m.db.TokenUser("hash", m.db.Auth()); ok {
			t.Errorf("member %d takes it for a token of %q", i, user)
		}
	}
}

// As long as auth was never on, a member that does not know auth understands what the others write: they can be replaced
// one after the other.
func TestReplicaWritesNoAuthRevisionWithoutAuth(t *testing.T) {
	c := newCluster(t, Options{})
	c.lead(0)
	db := c.members[0].db
	compact := Command{Request: &pb.CompactionRequest{Revision: 2}, AuthRevision: ByItself}
	mustPut(t, db, "k", "v")
	mustPut(t, db, "k", "v")
	if _, err := db.Write(t.Context(), compact); err != nil {
		t.Fatal(err)
	}
	c.mu.Lock()
	kind := c.log[len(c.log)-1].Proposals[0].Payload[1]
	c.mu.Unlock()
	if kind != kindCompact {
		t.Errorf("kind %#x, want %#x", kind, kindCompact)
	}
	makeAuth(t, db)
	mustAuth(t, db, &pb.AuthEnableRequest{})
	compact.Request = &pb.CompactionRequest{Revision: 3}
	if _, err := db.Write(t.Context(), compact); err != nil {
		t.Errorf("with auth: %v", err)
	}
}
