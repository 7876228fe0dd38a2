package cluster

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// transcript is what a client sees, in words in which both programs have to agree: names for ids, no revisions.
type transcript struct {
	lines []string
	names map[string]string // of ids in hexadecimal and of URLs
}

func (tr *transcript) name(m *Member) {
	if tr.names == nil {
		tr.names = map[string]string{}
	}
	tr.names[m.PeerURL], tr.names[m.ClientURL] = m.Name+"-peer", m.Name+"-client"
}

// note writes down an answer, or the error as it was on the wire.
func (tr *transcript) note(what string, err error, format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	if err != nil {
		st := status.Convert(err)
		line = fmt.Sprintf("%v %q", st.Code(), st.Message())
		if st.Code() == codes.DeadlineExceeded {
			line = "DeadlineExceeded" // in one of several wordings, of which the client's transport picks one
		}
	}
	for from, to := range tr.names {
		line = strings.ReplaceAll(line, from, to)
	}
	tr.lines = append(tr.lines, what+": "+line)
}

// members are in the order of their peer URLs' names: ids, which order the answer, differ from run to run.
func (tr *transcript) members(all []*pb.Member) string {
	var out []string
	for _, m := range all {
		peers := strings.Join(m.PeerURLs, "+")
		for from, to := range tr.names {
			peers = strings.ReplaceAll(peers, from, to)
		}
		out = append(out, fmt.Sprintf("[%s name=%q client=%v learner=%v]", peers, m.Name, m.ClientURLs, m.IsLearner))
	}
	if !slices.IsSortedFunc(all, func(a, b *pb.Member) int {
		if a.ID < b.ID {
			return -1
		}
		return 1
	}) {
		out = append(out, "NOT IN THE ORDER OF THEIR IDS")
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// sameAnswers runs a script on a cluster of each program, and compares the transcripts.
func sameAnswers(t *testing.T, members int, script func(c *Cluster, tr *transcript), flags ...string) {
	t.Helper()
	got := map[Program][]string{}
	for _, p := range []Program{Etcd, Quire} {
		t.Run(string(p), func(t *testing.T) {
			c := New(t, p, members, flags...)
			tr := &transcript{}
			for _, m := range c.Members {
				tr.name(m)
			}
			script(c, tr)
			got[p] = tr.lines
			t.Logf("%s answers:\n%s", p, strings.Join(tr.lines, "\n"))
		})
	}
	if t.Failed() || len(got) < 2 {
		return // one of them was not to be run
	}
	for i := range max(len(got[Etcd]), len(got[Quire])) {
		want, have := "nothing", "nothing"
		if i < len(got[Etcd]) {
			want = got[Etcd][i]
		}
		if i < len(got[Quire]) {
			have = got[Quire][i]
		}
		if want != have {
			t.Errorf("etcd:  %s\nquire: %s", want, have)
		}
	}
}

func within(d time.Duration, do func(ctx context.Context)) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	do(ctx)
}

// healthInterval is how long members must have been connected before etcd's strict checks call them healthy.
const healthInterval = 5 * time.Second

func TestMembershipAnswersAreEtcds(t *testing.T) {
	t.Parallel()
	sameAnswers(t, 3, func(c *Cluster, tr *transcript) {
		leader, followers := c.Leader(), c.Followers()
		asked := map[string]*Member{"leader": leader, "follower": followers[0]}
		who := []string{"leader", "follower"}
		// Which of them leads differs.
		tr.names[leader.PeerURL], tr.names[leader.ClientURL] = "leader-peer", "leader-client"
		for i, m := range followers {
			tr.names[m.PeerURL], tr.names[m.ClientURL] = fmt.Sprintf("follower%d-peer", i), fmt.Sprintf("follower%d-client", i)
		}
		norm := func(all []*pb.Member) string {
			text := tr.members(all)
			for i, m := range append([]*Member{leader}, followers...) {
				text = strings.ReplaceAll(text, fmt.Sprintf("name=%q", m.Name), fmt.Sprintf("name=#%d", i))
			}
			return text
		}
		time.Sleep(healthInterval + time.Second) // both programs count from the moment at which members connected
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()

		for _, w := range who {
			m := asked[w]
			for _, linearizable := range []bool{true, false} {
				r, err := m.Cluster.MemberList(ctx, &pb.MemberListRequest{Linearizable: linearizable})
				tr.note(fmt.Sprintf("%s: list %v", w, linearizable), err, "revision %d, %s", r.GetHeader().GetRevision(), norm(r.GetMembers()))
			}
			for _, urls := range [][]string{nil, {"localhost:1"}, {"http://localhost"}, {"http://localhost:1/x"}, {"ftp://localhost:1"}} {
				r, err := m.Cluster.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: urls})
				tr.note(fmt.Sprintf("%s: add %q", w, urls), err, "%v", r)
			}
			r, err := m.Cluster.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{followers[1].PeerURL}})
			tr.note(w+": add with the URL of a member", err, "%v", r)
			_, err = m.Cluster.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{"http://127.0.0.1:1", leader.PeerURL}, IsLearner: true})
			tr.note(w+": add a learner with the URL of a member and another", err, "")
			_, err = m.Cluster.MemberRemove(ctx, &pb.MemberRemoveRequest{ID: 77})
			tr.note(w+": remove what is no member", err, "")
			_, err = m.Cluster.MemberUpdate(ctx, &pb.MemberUpdateRequest{ID: 77, PeerURLs: []string{"http://127.0.0.1:1"}})
			tr.note(w+": update what is no member", err, "")
			_, err = m.Cluster.MemberUpdate(ctx, &pb.MemberUpdateRequest{ID: leader.ID(), PeerURLs: []string{followers[0].PeerURL}})
			tr.note(w+": update to the URL of another member", err, "")
			_, err = m.Cluster.MemberPromote(ctx, &pb.MemberPromoteRequest{ID: 77})
			tr.note(w+": promote what is no member", err, "")
			_, err = m.Cluster.MemberPromote(ctx, &pb.MemberPromoteRequest{ID: followers[1].ID()})
			tr.note(w+": promote a voter", err, "")
			_, err = m.Maintenance.MoveLeader(ctx, &pb.MoveLeaderRequest{TargetID: 77})
			tr.note(w+": move leadership to what is no member", err, "")
		}

		// A learner, from its first day to its last.
		learner := c.Add()
		tr.names[learner.PeerURL], tr.names[learner.ClientURL] = "learner-peer", "learner-client"
		added, err := followers[0].Cluster.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{learner.PeerURL}, IsLearner: true})
		tr.note("add a learner", err, "%s of %s", norm([]*pb.Member{added.GetMember()}), norm(added.GetMembers()))
		_, err = leader.Cluster.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{"http://127.0.0.1:1"}, IsLearner: true})
		tr.note("add another learner", err, "")
		for _, w := range who {
			_, err = asked[w].Cluster.MemberPromote(ctx, &pb.MemberPromoteRequest{ID: added.Member.ID})
			tr.note(w+": promote a learner that has not started", err, "")
		}
		_, err = leader.Maintenance.MoveLeader(ctx, &pb.MoveLeaderRequest{TargetID: added.Member.ID})
		tr.note("move leadership to a learner", err, "")

		learner.Start("--initial-cluster="+c.Initial(), "--initial-cluster-state=existing")
		learner.WaitReady()
		st := learner.status()
		tr.note("status of the learner", nil, "id as promised %v, learner %v, errors %v", st.Header.MemberId == added.Member.ID, st.IsLearner, st.Errors)
		learnersAnswers(ctx, learner, tr)
		c.Eventually("a learner that has caught up", func(ctx context.Context) error {
			_, err := followers[0].Cluster.MemberPromote(ctx, &pb.MemberPromoteRequest{ID: added.Member.ID})
			return err
		})
		_, err = leader.Cluster.MemberPromote(ctx, &pb.MemberPromoteRequest{ID: added.Member.ID})
		tr.note("promote it again", err, "")
		c.Eventually("a voter that knows it", func(ctx context.Context) error {
			if st, err := learner.Maintenance.Status(ctx, &pb.StatusRequest{}); err != nil || st.IsLearner {
				return fmt.Errorf("%v, %w", st, err)
			}
			return nil
		})
		list, err := learner.Cluster.MemberList(ctx, &pb.MemberListRequest{Linearizable: true})
		tr.note("list on the new voter", err, "%s", norm(list.GetMembers()))

		// New URLs, and none.
		moved := strings.Replace(learner.PeerURL, ":2380", ":2381", 1)
		tr.names[moved] = "learner-moved"
		update, err := leader.Cluster.MemberUpdate(ctx, &pb.MemberUpdateRequest{ID: added.Member.ID, PeerURLs: []string{moved, learner.PeerURL}})
		tr.note("update", err, "%s", norm(update.GetMembers()))

		time.Sleep(healthInterval + time.Second) // the new voter counts as healthy from then on
		removed, err := followers[0].Cluster.MemberRemove(ctx, &pb.MemberRemoveRequest{ID: added.Member.ID})
		tr.note("remove", err, "%s", norm(removed.GetMembers()))
		_, err = followers[0].Cluster.MemberRemove(ctx, &pb.MemberRemoveRequest{ID: added.Member.ID})
		tr.note("remove it again", err, "")
		_, err = followers[0].Cluster.MemberUpdate(ctx, &pb.MemberUpdateRequest{ID: added.Member.ID, PeerURLs: []string{"http://127.0.0.1:1"}})
		tr.note("update what was removed", err, "")
		code, err := learner.Process.Wait(20 * time.Second)
		tr.note("the process of a removed member", err, "ended with status %d", code)
	})
}

// learnersAnswers asks a learner for everything.
func learnersAnswers(ctx context.Context, m *Member, tr *transcript) {
	_, err := m.KV.Range(ctx, &pb.RangeRequest{Key: []byte("k"), Serializable: true})
	tr.note("learner: serializable Range", err, "")
	_, err = m.KV.Range(ctx, &pb.RangeRequest{Key: []byte("k")})
	tr.note("learner: Range", err, "")
	_, err = m.KV.Put(ctx, &pb.PutRequest{Key: []byte("k")})
	tr.note("learner: Put", err, "")
	_, err = m.KV.Txn(ctx, &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte("k"), Serializable: true}}}}})
	tr.note("learner: serializable Txn", err, "")
	_, err = m.Lease.LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: 10})
	tr.note("learner: LeaseGrant", err, "")
	_, err = m.Cluster.MemberList(ctx, &pb.MemberListRequest{})
	tr.note("learner: MemberList", err, "")
	_, err = m.Maintenance.Alarm(ctx, &pb.AlarmRequest{})
	tr.note("learner: Alarm", err, "")
	_, err = m.Maintenance.MoveLeader(ctx, &pb.MoveLeaderRequest{})
	tr.note("learner: MoveLeader", err, "")
	_, err = m.Maintenance.HashKV(ctx, &pb.HashKVRequest{})
	tr.note("learner: HashKV", err, "")
	_, err = m.Maintenance.Defragment(ctx, &pb.DefragmentRequest{})
	tr.note("learner: Defragment", err, "")
	_, err = m.Maintenance.Downgrade(ctx, &pb.DowngradeRequest{Action: pb.DowngradeRequest_CANCEL})
	tr.note("learner: Downgrade", err, "")
	tr.note("learner: Snapshot", wholeSnapshot(ctx, m), "")
	if w, err := m.Watch.Watch(ctx); err == nil {
		_, err = w.Recv()
		tr.note("learner: Watch", err, "")
	}
	if s, err := m.KV.RangeStream(ctx, &pb.RangeRequest{Key: []byte("k"), Serializable: true}); err == nil {
		_, err = s.Recv()
		tr.note("learner: serializable RangeStream", err, "")
	}
	for _, path := range []string{"/readyz", "/readyz/non_learner", "/livez", "/health", "/health?serializable=true", "/version"} {
		code, body := m.Get(path)
		if path == "/version" {
			body, _, _ = strings.Cut(body, `,"storage"`) // etcd does not know that for its first seconds
		}
		if path == "/readyz" {
			body = fmt.Sprintf("non_learner failed: %v, others ok: %v", strings.Contains(body, "[-]non_learner failed: not supported for learner\n"), strings.Count(body, "[+]") == 3)
		}
		tr.note("learner: "+path, nil, "%d %s", code, body)
	}
}

// wholeSnapshot reads a snapshot to its end, which must be its hash.
func wholeSnapshot(ctx context.Context, m *Member) error {
	stream, err := m.Maintenance.Snapshot(ctx, &pb.SnapshotRequest{})
	if err != nil {
		return err
	}
	hash, last := sha256.New(), []byte(nil)
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		hash.Write(last)
		last = r.Blob
	}
	if !bytes.Equal(hash.Sum(nil), last) {
		return errors.New("the snapshot does not end with its hash")
	}
	return nil
}

// knownTimeout is ErrGRPCTimeout for a write that waited for a leader in vain. etcd lets go of its own context's error there,
// which a client takes for its own deadline; quire says that it was the server's, with the error that etcd has for it.
func knownTimeout(err error) error {
	if status.Code(err) == codes.DeadlineExceeded {
		return rpctypes.ErrGRPCTimeout
	}
	return err
}

// Two of three members are gone.
func TestAnswersWithoutAQuorumAreEtcds(t *testing.T) {
	t.Parallel()
	sameAnswers(t, 3, func(c *Cluster, tr *transcript) {
		leader := c.Leader()
		for _, m := range c.Followers() {
			m.Kill()
		}
		alone := leader
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		c.Eventually("a member that knows that it has no leader", func(ctx context.Context) error {
			st, err := alone.Maintenance.Status(ctx, &pb.StatusRequest{})
			if err == nil && st.Leader != 0 {
				err = fmt.Errorf("leader %x", st.Leader)
			}
			return err
		})
		st := alone.status()
		tr.note("status", nil, "leader %d, errors %q", st.Leader, st.Errors)
		required := metadata.AppendToOutgoingContext(ctx, rpctypes.MetadataRequireLeaderKey, rpctypes.MetadataHasLeader)
		_, err := alone.KV.Range(required, &pb.RangeRequest{Key: []byte("k"), Serializable: true})
		tr.note("serializable Range that requires a leader", err, "")
		_, err = alone.KV.Range(ctx, &pb.RangeRequest{Key: []byte("k"), Serializable: true})
		tr.note("serializable Range", err, "")
		r, err := alone.Cluster.MemberList(ctx, &pb.MemberListRequest{})
		tr.note("serializable MemberList", err, "%d members", len(r.GetMembers()))
		if w, err := alone.Watch.Watch(required); err == nil {
			_, err = w.Recv()
			tr.note("watch that requires a leader", err, "")
		}
		if s, err := alone.Lease.LeaseKeepAlive(required); err == nil {
			_, err = s.Recv()
			tr.note("keepalive that requires a leader", err, "")
		}
		_, err = alone.Maintenance.MoveLeader(ctx, &pb.MoveLeaderRequest{TargetID: 1})
		tr.note("MoveLeader", err, "")
		_, err = alone.KV.Put(ctx, &pb.PutRequest{Key: []byte("k")})
		tr.note("Put", knownTimeout(err), "")
		_, err = alone.KV.Range(ctx, &pb.RangeRequest{Key: []byte("k")})
		tr.note("Range", err, "")
		_, err = alone.Cluster.MemberList(ctx, &pb.MemberListRequest{Linearizable: true})
		tr.note("linearizable MemberList", err, "")
		_, err = alone.Cluster.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{"http://127.0.0.1:1"}})
		tr.note("MemberAdd", err, "")
		_, err = alone.Cluster.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{"http://127.0.0.1:1"}, IsLearner: true})
		tr.note("MemberAdd of a learner", err, "")
		_, err = alone.Cluster.MemberRemove(ctx, &pb.MemberRemoveRequest{ID: alone.ID()})
		tr.note("MemberRemove of the last one there", err, "")
		within(3*time.Second, func(ctx context.Context) {
			_, err = alone.Cluster.MemberPromote(ctx, &pb.MemberPromoteRequest{ID: 1})
			tr.note("MemberPromote", knownTimeout(err), "") // the client's deadline and the server's are the same
		})
		_, err = alone.Lease.LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: 10})
		tr.note("LeaseGrant", knownTimeout(err), "")
		tr.note("Snapshot", wholeSnapshot(ctx, alone), "")
		_, err = alone.Maintenance.Defragment(ctx, &pb.DefragmentRequest{})
		tr.note("Defragment", err, "")
		_, err = alone.Maintenance.Downgrade(ctx, &pb.DowngradeRequest{Version: "3.6"})
		tr.note("Downgrade", err, "")
		for _, path := range []string{"/health", "/health?serializable=true", "/livez", "/readyz/non_learner"} {
			code, body := alone.Get(path)
			tr.note(path, nil, "%d %s", code, body)
		}
	})
}

// A member alone, which others may join.
func TestAnswersOfAOneMemberClusterAreEtcds(t *testing.T) {
	t.Parallel()
	sameAnswers(t, 1, func(c *Cluster, tr *transcript) {
		m := c.Members[0]
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		_, err := m.Cluster.MemberRemove(ctx, &pb.MemberRemoveRequest{ID: m.ID()})
		tr.note("remove the only member", err, "")
		_, err = m.Maintenance.MoveLeader(ctx, &pb.MoveLeaderRequest{TargetID: m.ID()})
		tr.note("move leadership to it", err, "")
		_, err = m.Cluster.MemberPromote(ctx, &pb.MemberPromoteRequest{ID: m.ID()})
		tr.note("promote it", err, "")
		// The second member of two is needed for everything, and is not there.
		added, err := m.Cluster.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{"http://127.0.0.1:1"}})
		tr.note("add a voter", err, "%s of %s", tr.members([]*pb.Member{added.GetMember()}), tr.members(added.GetMembers()))
		within(3*time.Second, func(ctx context.Context) {
			_, err = m.KV.Range(ctx, &pb.RangeRequest{Key: []byte("k")})
			tr.note("linearizable Range", err, "")
		})
		_, err = m.KV.Range(ctx, &pb.RangeRequest{Key: []byte("k"), Serializable: true})
		tr.note("serializable Range", err, "")
		r, err := m.Cluster.MemberList(ctx, &pb.MemberListRequest{})
		tr.note("serializable list", err, "%s", tr.members(r.GetMembers()))
		_, err = m.Cluster.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{"http://127.0.0.1:3"}})
		tr.note("add a third voter", err, "")
	})
}

// The strict checks leave an operator who knows better a way.
func TestAnswersWithoutStrictChecksAreEtcds(t *testing.T) {
	t.Parallel()
	sameAnswers(t, 3, func(c *Cluster, tr *transcript) {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		leader, followers := c.Leader(), c.Followers()
		r, err := leader.Cluster.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{"http://127.0.0.1:1"}})
		tr.note("add a voter at once", err, "%d members", len(r.GetMembers()))
		removed, err := leader.Cluster.MemberRemove(ctx, &pb.MemberRemoveRequest{ID: r.GetMember().GetID()})
		tr.note("remove it before it has started", err, "%d members", len(removed.GetMembers()))
		followers[0].Kill()
		r, err = leader.Cluster.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{"http://127.0.0.1:2"}, IsLearner: true})
		tr.note("add a learner while one is gone", err, "%d members", len(r.GetMembers()))
	}, "--strict-reconfig-check=false")
}

// The strict checks themselves, at the moments at which they refuse.
func TestStrictChecksAreEtcds(t *testing.T) {
	t.Parallel()
	sameAnswers(t, 3, func(c *Cluster, tr *transcript) {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		leader, followers := c.Leader(), c.Followers()
		_, err := leader.Cluster.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{"http://127.0.0.1:1"}})
		tr.note("add a voter to a cluster that is too young", err, "")
		time.Sleep(healthInterval + time.Second) // see above
		gone := followers[0].ID()
		followers[0].Kill()
		time.Sleep(time.Second) // the connections to it break at once, and nothing tells from outside when they have
		_, err = leader.Cluster.MemberRemove(ctx, &pb.MemberRemoveRequest{ID: followers[1].ID()})
		tr.note("remove another than the one that is gone", err, "")
		_, err = leader.Cluster.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{"http://127.0.0.1:1"}})
		tr.note("add a voter while one is gone", err, "")
		_, err = leader.Cluster.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{"http://127.0.0.1:1"}, IsLearner: true})
		tr.note("add a learner while one is gone", err, "")
		removed, err := leader.Cluster.MemberRemove(ctx, &pb.MemberRemoveRequest{ID: gone})
		tr.note("remove the one that is gone", err, "%d members", len(removed.GetMembers()))
		added, err := leader.Cluster.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{"http://127.0.0.1:1"}})
		tr.note("add a voter in its place", err, "%d members", len(added.GetMembers()))
		_, err = leader.Cluster.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{"http://127.0.0.1:2"}})
		tr.note("add another while that has not started", err, "")
		_, err = leader.Cluster.MemberRemove(ctx, &pb.MemberRemoveRequest{ID: followers[1].ID()})
		tr.note("remove one of two that have started", err, "")
	})
}
