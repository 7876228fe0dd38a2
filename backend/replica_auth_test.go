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
