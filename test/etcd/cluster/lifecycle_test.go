package cluster

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/metadata"
	_ "modernc.org/sqlite"
)

// put writes through m, as often as it takes while the cluster has no leader.
func put(c *Cluster, m *Member, key, value string) (revision int64) {
	c.t.Helper()
	c.Eventually("a put through "+m.Name, func(ctx context.Context) error {
		r, err := m.KV.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(value)})
		revision = r.GetHeader().GetRevision()
		return err
	})
	return revision
}

// wantValue reads linearizably through m.
func wantValue(c *Cluster, m *Member, key, value string) {
	c.t.Helper()
	c.Eventually("a read through "+m.Name, func(ctx context.Context) error {
		r, err := m.KV.Range(ctx, &pb.RangeRequest{Key: []byte(key)})
		if err != nil {
			return err
		}
		if len(r.Kvs) != 1 || string(r.Kvs[0].Value) != value {
			c.t.Errorf("%s reads %v under %q, want %q", m.Name, r.Kvs, key, value)
		}
		return nil
	})
}

// wantSameHash compares all running members at their common revision.
func wantSameHash(c *Cluster) {
	c.t.Helper()
	rev := put(c, c.Leader(), "for-the-hash", "x")
	hashes := map[uint32][]string{}
	for _, m := range c.running(nil) {
		c.Eventually("the hash of "+m.Name, func(ctx context.Context) error {
			r, err := m.Maintenance.HashKV(ctx, &pb.HashKVRequest{Revision: rev})
			if err != nil {
				return err
			}
			hashes[r.Hash] = append(hashes[r.Hash], m.Name)
			return nil
		})
	}
	if len(hashes) != 1 {
		c.t.Errorf("the members differ at revision %d: %v", rev, hashes)
	}
}

// The headers of all members bear the same cluster and term, and each its own id: etcd's.
func TestIdsAndHeadersAreEtcds(t *testing.T) {
	t.Parallel()
	c := New(t, Quire, 3)
	ids := map[uint64]bool{}
	var cluster, term uint64
	for _, m := range c.Members {
		st := m.status()
		ids[st.Header.MemberId] = true
		if cluster == 0 {
			cluster, term = st.Header.ClusterId, st.RaftTerm
		}
		if st.Header.ClusterId != cluster || st.RaftTerm != term || st.Header.RaftTerm != term || st.RaftIndex < st.RaftAppliedIndex || st.RaftAppliedIndex == 0 {
			t.Errorf("%s: %v", m.Name, st)
		}
		w, err := m.Watch.Watch(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("k")}}}); err != nil {
			t.Fatal(err)
		}
		created, err := w.Recv()
		if err != nil || created.Header.ClusterId != cluster || created.Header.MemberId != st.Header.MemberId || created.Header.RaftTerm != term {
			t.Errorf("%s: the header of a watch is %v, %v", m.Name, created.GetHeader(), err)
		}
	}
	if len(ids) != 3 {
		t.Errorf("the members' ids are %v", ids)
	}

	// The same members as etcds have the same ids.
	e := &Cluster{Program: Etcd, t: t, token: c.token}
	for _, m := range c.Members {
		m.Kill()
		copied := *m
		copied.c, copied.DataDir = e, filepath.Join(t.TempDir(), m.Name)
		e.Members = append(e.Members, &copied)
	}
	for _, m := range e.Members {
		m.Start("--initial-cluster=" + c.Initial())
	}
	for _, m := range e.Members {
		m.WaitReady()
		if st := m.status(); !ids[st.Header.MemberId] || st.Header.ClusterId != cluster {
			t.Errorf("%s: member %x of cluster %x; quire has %v of %x", m.Name, st.Header.MemberId, st.Header.ClusterId, ids, cluster)
		}
	}
}

// What was acknowledged is there after the leader is killed, on all members, and a restarted one is a member as before.
func TestTheLeaderIsKilledAndComesBack(t *testing.T) {
	t.Parallel()
	c := New(t, Quire, 3)
	for round := range 3 {
		leader := c.Leader()
		value := fmt.Sprint(round)
		put(c, c.Followers()[0], "k", value)
		id := leader.ID()
		leader.Kill()
		for _, m := range c.running(nil) {
			wantValue(c, m, "k", value)
		}
		put(c, c.Leader(), "while-away", value)
		leader.Restart()
		if got := leader.ID(); got != id {
			t.Errorf("%s came back as %x, it was %x", leader.Name, got, id)
		}
		wantValue(c, leader, "while-away", value)
	}
	wantSameHash(c)
}

// All at once, as when a machine room loses power; nothing but the data directories is left.
func TestTheWholeClusterIsKilledAndComesBack(t *testing.T) {
	t.Parallel()
	c := New(t, Quire, 3)
	for i := range 100 {
		put(c, c.Members[i%3], fmt.Sprintf("k%d", i), "v")
	}
	for _, m := range c.Members {
		m.Kill()
	}
	for _, m := range c.Members {
		m.Start()
	}
	for _, m := range c.Members {
		m.WaitReady()
		wantValue(c, m, "k99", "v")
	}
	wantSameHash(c)
}

// etcd's own tests give a member 1.5 s to stop, and its successor half a second.
func TestALeaderThatStopsHandsOver(t *testing.T) {
	t.Parallel()
	c := New(t, Quire, 3)
	leader := c.Leader()
	followers := c.Followers()
	term := leader.status().RaftTerm
	if took := leader.Stop(); took > 1500*time.Millisecond {
		t.Errorf("it stopped in %v", took)
	}
	stopped := time.Now()
	next := c.Leader(followers...)
	if took := time.Since(stopped); took > 500*time.Millisecond {
		t.Errorf("the next leader was there after %v", took)
	}
	if got := next.status().RaftTerm; got != term+1 {
		t.Errorf("the next leader has term %d, want %d", got, term+1)
	}
	leader.Restart()
	c.Leader()
	for _, m := range c.Members {
		if took := m.Stop(); took > 1500*time.Millisecond {
			t.Errorf("%s stopped in %v", m.Name, took)
		}
		if lines := m.Process.Lines(`"level":"error"`); len(lines) > 0 {
			t.Errorf("%s logs errors: %s", m.Name, lines)
		}
	}
}

func TestARemovedMemberEndsByItself(t *testing.T) {
	t.Parallel()
	c := New(t, Quire, 3, "--strict-reconfig-check=false")
	for _, away := range []bool{true, false} {
		gone := c.Followers()[0]
		id := gone.ID()
		if away {
			gone.Kill()
		}
		if _, err := c.Leader().Cluster.MemberRemove(t.Context(), &pb.MemberRemoveRequest{ID: id}); err != nil {
			t.Fatal(err)
		}
		if away { // it learns of it from those that do not let it in any more
			gone.Start()
		}
		code, err := gone.Process.Wait(20 * time.Second)
		if err != nil || code != 0 {
			t.Errorf("away %v: it ended with status %d, %v; etcd's ends with 0", away, code, err)
		}
		if out := gone.Process.Output(); !strings.Contains(out, "the member has been permanently removed from the cluster") || !strings.Contains(out, "data-dir used by this member must be removed") {
			t.Errorf("away %v: the log does not say what has happened and what to do:\n%s", away, out)
		}
	}
	put(c, c.Leader(), "k", "v")
}

// etcd's own way from one member to three and back: remove, wipe, add, start with existing.
func TestAMemberIsReplaced(t *testing.T) {
	t.Parallel()
	c := New(t, Quire, 3)
	put(c, c.Members[0], "k", "v")
	old := c.Followers()[1]
	leader := c.Leader()
	id := old.ID()
	old.Kill()
	time.Sleep(healthInterval + time.Second) // until the others count as healthy
	if _, err := leader.Cluster.MemberRemove(t.Context(), &pb.MemberRemoveRequest{ID: id}); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(old.DataDir); err != nil {
		t.Fatal(err)
	}
	added, err := leader.Cluster.MemberAdd(t.Context(), &pb.MemberAddRequest{PeerURLs: []string{old.PeerURL}})
	if err != nil {
		t.Fatal(err)
	}
	old.Start("--initial-cluster="+c.Initial(), "--initial-cluster-state=existing")
	old.WaitReady()
	if got := old.ID(); got != added.Member.ID || got == id {
		t.Errorf("the new member is %x, want %x; the old one was %x", got, added.Member.ID, id)
	}
	wantValue(c, old, "k", "v")
	wantSameHash(c)
}

// Members that speak TLS to each other, with a member added and one that comes back.
func TestPeersSpeakTLS(t *testing.T) {
	t.Parallel()
	c := New(t, Quire, 3, "--peer-auto-tls")
	put(c, c.Members[0], "k", "v")
	time.Sleep(healthInterval + time.Second) // until they count as healthy
	if _, err := c.Leader().Cluster.MemberAdd(t.Context(), &pb.MemberAddRequest{PeerURLs: []string{c.Add().PeerURL}}); err != nil {
		t.Fatal(err)
	}
	m := c.Members[3]
	m.Start("--initial-cluster="+c.Initial(), "--initial-cluster-state=existing")
	m.WaitReady()
	wantValue(c, m, "k", "v")
	m.Kill()
	put(c, c.Leader(), "k", "w")
	m.Restart()
	wantValue(c, m, "k", "w")
	wantSameHash(c)
}

func TestAWrongWayToJoinIsRefused(t *testing.T) {
	t.Parallel()
	c := New(t, Quire, 1)
	stranger := c.Add()
	stranger.Start("--initial-cluster="+c.Initial(), "--initial-cluster-state=existing")
	if code, err := stranger.Process.Wait(30 * time.Second); err != nil || code != 1 {
		t.Errorf("a member that was never added: status %d, %v, want 1\n%s", code, err, stranger.Process.Output())
	}
	stranger.Start("--initial-cluster=other=http://127.0.0.1:1", "--initial-cluster-state=new")
	if code, err := stranger.Process.Wait(30 * time.Second); err != nil || code != 1 || !strings.Contains(stranger.Process.Output(), "couldn't find local name") {
		t.Errorf("a member whose name is not in --initial-cluster: status %d, %v, want 1\n%s", code, err, stranger.Process.Output())
	}
}

// revisionsOf is everything that m has.
func revisionsOf(c *Cluster, m *Member) (all []string) {
	c.t.Helper()
	c.Eventually("all keys of "+m.Name, func(ctx context.Context) error {
		all = nil
		r, err := m.KV.Range(ctx, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
		for _, kv := range r.GetKvs() {
			all = append(all, fmt.Sprintf("%s=%s created %d modified %d version %d lease %d", kv.Key, kv.Value, kv.CreateRevision, kv.ModRevision, kv.Version, kv.Lease))
		}
		return err
	})
	return all
}

// A plain SQLite file becomes the first member's, others join, and one of them becomes a cluster of its own again.
// Revisions, versions, leases and history are the same all the way.
func TestASQLiteFileBecomesAClusterAndOneMemberAgain(t *testing.T) {
	t.Parallel()
	c := &Cluster{Program: Quire, t: t, token: "t"}
	first := c.Add()
	first.Start()
	first.WaitReady()
	if _, err := os.Stat(filepath.Join(first.DataDir, "raft")); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("a quire without cluster flags is a member of a cluster: %v", err)
	}
	lease, err := first.Lease.LeaseGrant(t.Context(), &pb.LeaseGrantRequest{TTL: 3600})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		put(c, first, fmt.Sprintf("k%d", i%7), fmt.Sprint(i))
	}
	if _, err := first.KV.Put(t.Context(), &pb.PutRequest{Key: []byte("leased"), Lease: lease.ID}); err != nil {
		t.Fatal(err)
	}
	before := revisionsOf(c, first)
	id := first.ID()
	first.Stop()

	first.Start("--initial-cluster=" + c.Initial(first))
	first.WaitReady()
	if got := revisionsOf(c, first); !slices.Equal(got, before) {
		t.Errorf("as a member it has\n%s\nit had\n%s", strings.Join(got, "\n"), strings.Join(before, "\n"))
	}
	if got := first.ID(); got != id {
		t.Errorf("as a member it is %x, it was %x", got, id)
	}
	for range 2 {
		m := c.Add()
		c.Eventually("room for "+m.Name, func(ctx context.Context) error {
			_, err := first.Cluster.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{m.PeerURL}})
			return err
		})
		m.Start("--initial-cluster="+c.Initial(), "--initial-cluster-state=existing")
		m.WaitReady()
		if got := revisionsOf(c, m); !slices.Equal(got, before) {
			t.Errorf("%s has\n%s\nwant\n%s", m.Name, strings.Join(got, "\n"), strings.Join(before, "\n"))
		}
		// History comes along.
		r, err := m.KV.Range(t.Context(), &pb.RangeRequest{Key: []byte("k0"), Revision: 2})
		if err != nil || len(r.Kvs) != 1 || string(r.Kvs[0].Value) != "0" {
			t.Errorf("%s at revision 2: %v, %v", m.Name, r, err)
		}
		ttl, err := m.Lease.LeaseTimeToLive(t.Context(), &pb.LeaseTimeToLiveRequest{ID: lease.ID, Keys: true})
		if err != nil || ttl.TTL < 3000 || len(ttl.Keys) != 1 {
			t.Errorf("%s: the lease is %v, %v", m.Name, ttl, err)
		}
	}
	wantSameHash(c)
	put(c, c.Members[2], "in-the-cluster", "yes")

	// The quorum is lost for good.
	last := c.Members[2]
	before = revisionsOf(c, last)
	for _, m := range c.Members {
		m.Kill()
	}
	last.Start("--force-new-cluster")
	last.WaitReady()
	if got := revisionsOf(c, last); !slices.Equal(got, before) {
		t.Errorf("alone it has\n%s\nit had\n%s", strings.Join(got, "\n"), strings.Join(before, "\n"))
	}
	list, err := last.Cluster.MemberList(t.Context(), &pb.MemberListRequest{Linearizable: true})
	if err != nil || len(list.Members) != 1 || list.Members[0].Name != last.Name {
		t.Errorf("members after --force-new-cluster: %v, %v", list, err)
	}
	put(c, last, "alone", "yes")
	last.Stop()
	last.Restart() // without the flag, which is for once
	wantValue(c, last, "alone", "yes")

	// And others can join again.
	again := c.Add()
	c.Eventually("room for "+again.Name, func(ctx context.Context) error {
		_, err := last.Cluster.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{again.PeerURL}})
		return err
	})
	again.Start("--initial-cluster="+c.Initial(last, again), "--initial-cluster-state=existing")
	again.WaitReady()
	wantValue(c, again, "alone", "yes")
	wantSameHash(c)
}

// The way back: a member leaves its cluster and is a plain SQLite database again, with the same revisions and leases; and it
// can become a member once more.
func TestAMemberBecomesAPlainSQLiteFile(t *testing.T) {
	t.Parallel()
	c := New(t, Quire, 3)
	lease, err := c.Members[0].Lease.LeaseGrant(t.Context(), &pb.LeaseGrantRequest{TTL: 3600})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Members[0].KV.Put(t.Context(), &pb.PutRequest{Key: []byte("leased"), Lease: lease.ID}); err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		put(c, c.Members[i%3], fmt.Sprintf("k%d", i%7), fmt.Sprint(i))
	}
	m := c.Followers()[0]
	before := revisionsOf(c, m)
	for _, o := range c.Members {
		o.Kill()
	}
	m.Start("--storage=sqlite://"+filepath.Join(m.DataDir, "quire.db"), "--force-new-cluster")
	m.WaitReady()
	same := func(when string) {
		t.Helper()
		if got := revisionsOf(c, m); !slices.Equal(got, before) {
			t.Errorf("%s it has\n%s\nit had\n%s", when, strings.Join(got, "\n"), strings.Join(before, "\n"))
		}
		ttl, err := m.Lease.LeaseTimeToLive(t.Context(), &pb.LeaseTimeToLiveRequest{ID: lease.ID})
		if err != nil || ttl.TTL < 3500 || ttl.TTL > 3600 {
			t.Errorf("%s the lease is %v, %v", when, ttl, err)
		}
	}
	same("as a plain database")
	for _, dir := range []string{"raft", "raft.left"} {
		if _, err := os.Stat(filepath.Join(m.DataDir, dir)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", dir, err)
		}
	}
	m.Stop()
	m.Restart()
	same("after a restart")
	m.Stop()
	m.Start("--initial-cluster=" + c.Initial(m))
	m.WaitReady()
	same("as a member again")
}

// A watch that requires a leader ends when there is none for long; one that does not goes on.
func TestWatchesWithoutALeader(t *testing.T) {
	t.Parallel()
	c := New(t, Quire, 3)
	m := c.Followers()[0]
	open := func(ctx context.Context) pb.Watch_WatchClient {
		w, err := m.Watch.Watch(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("k")}}}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Recv(); err != nil {
			t.Fatal(err)
		}
		return w
	}
	required := open(metadata.AppendToOutgoingContext(t.Context(), rpctypes.MetadataRequireLeaderKey, rpctypes.MetadataHasLeader))
	free := open(t.Context())
	var away []*Member
	for _, other := range c.Members {
		if other != m {
			other.Pause()
			away = append(away, other)
		}
	}
	begin := time.Now()
	_, err := required.Recv()
	if !isError(err, rpctypes.ErrGRPCNoLeader) {
		t.Errorf("the watch that requires a leader ended with %v", err)
	}
	if took := time.Since(begin); took < 3*time.Second || took > 10*time.Second {
		t.Errorf("it ended after %v; an election timeout until the leader is missed, and three more, are 4 to 5 s", took)
	}
	for _, other := range away {
		other.Resume()
	}
	put(c, m, "k", "v")
	if r, err := free.Recv(); err != nil || len(r.Events) != 1 {
		t.Errorf("the watch that requires none got %v, %v", r, err)
	}
}

func isError(got, want error) bool {
	return got != nil && got.Error() == want.Error()
}

// Leases are granted, kept alive and revoked through any member, and expire on all of them.
func TestLeasesThroughFollowers(t *testing.T) {
	t.Parallel()
	c := New(t, Quire, 3)
	followers := c.Followers()
	ctx := t.Context()
	lease, err := followers[0].Lease.LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: 4})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := followers[1].KV.Put(ctx, &pb.PutRequest{Key: []byte("leased"), Lease: lease.ID}); err != nil {
		t.Fatal(err)
	}
	keep, err := followers[1].Lease.LeaseKeepAlive(ctx)
	if err != nil {
		t.Fatal(err)
	}
	w, err := followers[0].Watch.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("leased")}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Recv(); err != nil {
		t.Fatal(err)
	}
	for range 6 { // longer than its time to live
		time.Sleep(time.Second)
		if err := keep.Send(&pb.LeaseKeepAliveRequest{ID: lease.ID}); err != nil {
			t.Fatal(err)
		}
		if r, err := keep.Recv(); err != nil || r.TTL != 4 {
			t.Fatalf("kept alive: %v, %v", r, err)
		}
	}
	begin := time.Now()
	r, err := w.Recv()
	if err == nil && r.Events[0].Type.String() == "PUT" { // the watcher's member heard of it after the writer's
		r, err = w.Recv()
	}
	if err != nil || len(r.Events) != 1 || r.Events[0].Type.String() != "DELETE" {
		t.Fatalf("the lease's end is %v, %v", r, err)
	}
	if took := time.Since(begin); took < 3*time.Second || took > 8*time.Second {
		t.Errorf("it came %v after the last keepalive, want about 4s", took)
	}
	for _, m := range c.Members {
		ttl, err := m.Lease.LeaseTimeToLive(ctx, &pb.LeaseTimeToLiveRequest{ID: lease.ID})
		if err != nil || ttl.TTL != -1 {
			t.Errorf("%s: time to live %v, %v, want -1", m.Name, ttl, err)
		}
	}
}

// Only the leader compacts by itself.
func TestAutoCompactionRunsOnTheLeader(t *testing.T) {
	t.Parallel()
	c := New(t, Quire, 3, "--auto-compaction-mode=periodic", "--auto-compaction-retention=2s")
	for i := range 10 {
		put(c, c.Members[i%3], "k", fmt.Sprint(i))
	}
	c.Eventually("a compaction", func(ctx context.Context) error {
		_, err := c.Members[0].KV.Range(ctx, &pb.RangeRequest{Key: []byte("k"), Revision: 2})
		if !isError(err, rpctypes.ErrGRPCCompacted) {
			return fmt.Errorf("revision 2 is still there: %v", err)
		}
		return nil
	})
	leader := c.Leader()
	for _, m := range c.Members {
		if n := len(m.Process.Lines("completed auto periodic compaction")); (n > 0) != (m == leader) {
			t.Errorf("%s (leads: %v) has compacted %d times", m.Name, m == leader, n)
		}
	}
}

func TestMetricsOfACluster(t *testing.T) {
	t.Parallel()
	c := New(t, Quire, 3)
	put(c, c.Members[0], "k", "v")
	leader := c.Leader()
	for _, m := range c.Members {
		leads := 0
		if m == leader {
			leads = 1
		}
		wants := []string{
			`^etcd_server_has_leader 1$`, fmt.Sprintf(`^etcd_server_is_leader %d$`, leads), `^etcd_server_is_learner 0$`,
			`^etcd_server_leader_changes_seen_total [1-9]`, `^etcd_server_proposals_applied_total [1-9]`, `^etcd_server_proposals_committed_total [1-9]`,
			fmt.Sprintf(`^etcd_server_id\{server_id="%x"\} 1$`, m.ID()),
		}
		for _, other := range c.Members {
			if other == m {
				continue
			}
			some := "[0-9]"
			if m == leader || other == leader {
				some = "[1-9]"
			}
			wants = append(wants,
				fmt.Sprintf(`^etcd_network_active_peers\{Local="%x",Remote="%x"\} 1$`, m.ID(), other.ID()),
				fmt.Sprintf(`^etcd_network_peer_sent_bytes_total\{To="%x"\} %s`, other.ID(), some),
				fmt.Sprintf(`^etcd_network_peer_received_bytes_total\{From="%x"\} %s`, other.ID(), some))
		}
		c.Eventually("the metrics of "+m.Name, func(context.Context) error {
			_, page := m.Get("/metrics")
			for _, want := range wants {
				if !regexp.MustCompile("(?m)" + want).MatchString(page) {
					return fmt.Errorf("no line %s", want)
				}
			}
			return nil
		})
	}
}

// The commands that operators use, by the real etcdctl.
func TestEtcdctlWorks(t *testing.T) {
	t.Parallel()
	c := New(t, Quire, 3)
	all := c.Members
	leader, followers := c.Leader(), c.Followers()
	time.Sleep(healthInterval + time.Second) // see TestMembershipAnswersAreEtcds

	for _, m := range all {
		if out := c.MustEtcdctl([]*Member{m}, "member", "list"); strings.Count(out, "started, m") != 3 || !strings.Contains(out, m.ClientURL) {
			t.Errorf("member list of %s:\n%s", m.Name, out)
		}
	}
	var statuses []struct {
		Endpoint string
		Status   *struct {
			Leader   uint64 `json:"leader"`
			RaftTerm uint64 `json:"raftTerm"`
			DBSize   int64  `json:"dbSize"`
			Header   struct {
				MemberID uint64 `json:"member_id"`
			} `json:"header"`
		}
	}
	out := c.MustEtcdctl(all[:1], "endpoint", "status", "--cluster", "-w", "json")
	if err := json.Unmarshal([]byte(out), &statuses); err != nil || len(statuses) != 3 {
		t.Fatalf("endpoint status --cluster: %v\n%s", err, out)
	}
	for _, s := range statuses {
		if s.Status.Leader != leader.ID() || s.Status.RaftTerm == 0 || s.Status.DBSize == 0 {
			t.Errorf("endpoint status --cluster: %+v", s.Status)
		}
	}
	if _, err := c.Etcdctl(all[:1], "endpoint", "health", "--cluster"); err != nil {
		t.Error(err)
	}
	if out := c.MustEtcdctl(all[:1], "endpoint", "hashkv", "--cluster", "-w", "simple"); strings.Count(out, "\n") != 3 {
		t.Errorf("endpoint hashkv --cluster:\n%s", out)
	}

	out = c.MustEtcdctl([]*Member{leader}, "move-leader", fmt.Sprintf("%x", followers[0].ID()))
	if !strings.Contains(out, "Leadership transferred from") {
		t.Errorf("move-leader: %s", out)
	}
	if got := c.Leader(); got != followers[0] {
		t.Errorf("%s leads, leadership was moved to %s", got.Name, followers[0].Name)
	}
	if _, err := c.Etcdctl([]*Member{leader}, "move-leader", fmt.Sprintf("%x", leader.ID())); err == nil || !strings.Contains(err.Error(), "no leader endpoint given") {
		t.Errorf("move-leader on a follower: %v", err)
	}

	m := c.Add()
	out = c.MustEtcdctl(all[:1], "member", "add", m.Name, "--learner", "--peer-urls="+m.PeerURL)
	id := regexp.MustCompile(`Member\s+([0-9a-f]+) added as learner to cluster`).FindStringSubmatch(out)
	initial := regexp.MustCompile(`ETCD_INITIAL_CLUSTER="(.*)"`).FindStringSubmatch(out)
	if id == nil || initial == nil {
		t.Fatalf("member add:\n%s", out)
	}
	m.Start("--initial-cluster="+initial[1], "--initial-cluster-state=existing")
	m.WaitReady()
	c.Eventually("member promote", func(context.Context) error {
		_, err := c.Etcdctl(all[:1], "member", "promote", id[1])
		return err
	})
	time.Sleep(healthInterval + time.Second) // see above
	c.MustEtcdctl(all[:1], "member", "update", id[1], "--peer-urls="+m.PeerURL+",http://127.0.0.1:1")
	c.MustEtcdctl(all[:1], "member", "remove", id[1])
	if _, err := m.Process.Wait(20 * time.Second); err != nil {
		t.Errorf("the removed member: %v", err)
	}
}

// A member that is started with the flags of another first start goes on as what it is, and says so.
func TestFlagsOfTheFirstStartAreIgnoredLater(t *testing.T) {
	t.Parallel()
	c := New(t, Quire, 1)
	m := c.Members[0]
	id := m.ID()
	put(c, m, "k", "v")
	m.Stop()
	m.Start("--initial-cluster=other=http://127.0.0.1:1,another=http://127.0.0.1:2", "--initial-cluster-token=other", "--initial-cluster-state=existing")
	m.WaitReady()
	if got := m.ID(); got != id {
		t.Errorf("it is %x, it was %x", got, id)
	}
	wantValue(c, m, "k", "v")
	if lines := m.Process.Lines("server has already been initialized"); len(lines) != 1 || !strings.Contains(lines[0], "--initial-cluster-token") {
		t.Errorf("the log says %s", lines)
	}
}

// /version, /health and the metrics port of a member that waits for its cluster: a probe must not have it killed.
func TestAMemberThatWaitsForItsClusterServesItsProbes(t *testing.T) {
	t.Parallel()
	c := &Cluster{Program: Quire, t: t, token: "t"}
	m, other := c.Add(), c.Add()
	metrics := strings.Replace(m.ClientURL, ":2379", ":2378", 1)
	m.Start("--initial-cluster="+c.Initial(), "--listen-metrics-urls="+metrics)
	probe := *m
	probe.ClientURL = metrics
	c.Eventually("the metrics port", func(context.Context) error {
		if len(m.Process.Lines("serving metrics")) == 0 {
			return errors.New("is not open")
		}
		return nil
	})
	if code, body := probe.Get("/health?serializable=true"); code != 200 {
		t.Errorf("/health?serializable=true: %d %s", code, body)
	}
	if code, body := probe.Get("/health"); code != 503 || !strings.Contains(body, "RAFT NO LEADER") {
		t.Errorf("/health: %d %s", code, body)
	}
	if code, body := probe.Get("/metrics"); code != 200 || !strings.Contains(body, "\netcd_server_has_leader 0\n") {
		t.Errorf("/metrics: %d, %d bytes", code, len(body))
	}
	if err := m.Process.WaitReady(2 * time.Second); err == nil {
		t.Error("it is ready without a quorum")
	}
	other.Start("--initial-cluster=" + c.Initial())
	m.WaitReady()
	other.WaitReady()
	if code, body := probe.Get("/health"); code != 200 {
		t.Errorf("/health of a cluster: %d %s", code, body)
	}
}

// A value that is not what it was written as, on one member: the others find out, and all stop writing, as with etcd.
func TestADifferentMemberRaisesTheAlarm(t *testing.T) {
	t.Parallel()
	c := New(t, Quire, 3, "--corrupt-check-time=1s")
	for i := range 20 {
		put(c, c.Members[i%3], fmt.Sprintf("k%d", i), "v")
	}
	wrong := c.Followers()[0]
	id := wrong.ID()
	wrong.Stop()
	db, err := sql.Open("sqlite", filepath.Join(wrong.DataDir, "quire.db"))
	if err != nil {
		t.Fatal(err)
	}
	if r, err := db.Exec("UPDATE revisions SET value = ? WHERE key = ?", []byte("w"), []byte("k7")); err != nil {
		t.Fatal(err)
	} else if n, err := r.RowsAffected(); err != nil || n != 1 {
		t.Fatalf("%d rows changed, %v", n, err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	wrong.Restart()
	leader := c.Leader()
	c.Eventually("the alarm", func(ctx context.Context) error {
		r, err := leader.Maintenance.Alarm(ctx, &pb.AlarmRequest{})
		if err == nil && (len(r.Alarms) != 1 || r.Alarms[0].Alarm != pb.AlarmType_CORRUPT || r.Alarms[0].MemberID != id) {
			err = fmt.Errorf("alarms %v, want CORRUPT of %x", r.Alarms, id)
		}
		return err
	})
	for _, m := range c.Members {
		c.Eventually("the alarm on "+m.Name, func(ctx context.Context) error {
			if code, body := m.Get("/health"); code != 503 || !strings.Contains(body, "ALARM CORRUPT") {
				return fmt.Errorf("/health: %d %s", code, body)
			}
			return nil
		})
		if _, err := m.KV.Put(t.Context(), &pb.PutRequest{Key: []byte("k")}); !isError(err, rpctypes.ErrGRPCCorrupt) {
			t.Errorf("a put on %s: %v", m.Name, err)
		}
	}

	// It does not come back by itself with the check at the start.
	wrong.Stop()
	wrong.Start("--feature-gates=InitialCorruptCheck=true")
	if code, err := wrong.Process.Wait(30 * time.Second); err != nil || code != 1 || !strings.Contains(wrong.Process.Output(), "found data inconsistency with peers") {
		t.Errorf("with InitialCorruptCheck: status %d, %v\n%s", code, err, wrong.Process.Output())
	}
	right := c.Followers()[0]
	right.Stop()
	right.Start("--feature-gates=InitialCorruptCheck=true")
	right.WaitReady()
}
