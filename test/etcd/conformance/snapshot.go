package conformance

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"go.etcd.io/etcd/api/v3/authpb"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/test/etcd/start"
)

// snapshot saves a snapshot as etcdctl does, and checks the form of the stream.
func (x *exam) snapshot() (file string) {
	x.Helper()
	stream, err := x.Maintenance.Snapshot(x.ctx, &pb.SnapshotRequest{})
	x.must(err, &pb.SnapshotRequest{})
	var content, last []byte
	remaining := int64(-1)
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		x.must(err, &pb.SnapshotRequest{})
		if r.Version != "3.7.0" {
			x.Errorf("the version of the snapshot is %q", r.Version)
		}
		if content = append(content, last...); remaining > 0 && int64(r.RemainingBytes) != remaining-int64(len(r.Blob)) {
			x.Errorf("after a message of %d bytes %d remain, before it were %d", len(r.Blob), r.RemainingBytes, remaining)
		}
		remaining, last = int64(r.RemainingBytes), r.Blob
	}
	if hash := sha256.Sum256(content); !bytes.Equal(last, hash[:]) || remaining != 0 || len(content)%512 != 0 || len(content) == 0 {
		x.Fatalf("%d bytes are followed by %x, their hash is %x; %d remain", len(content), last, hash, remaining)
	}
	file = filepath.Join(start.TempDir(x.T), "snapshot")
	if err := os.WriteFile(file, append(content, last...), 0o600); err != nil {
		x.Fatal(err)
	}
	return file
}

// snapshotStatus is what etcdutl says of a snapshot, which it checks.
type snapshotStatus struct {
	Hash                int64
	Revision, TotalSize int64
	TotalKey            int
	Version             string
}

func (x *exam) snapshotStatus(file string) (s snapshotStatus) {
	x.Helper()
	if err := json.Unmarshal(start.Etcdutl(x.T, "snapshot", "status", file, "--write-out=json"), &s); err != nil {
		x.Fatal(err)
	}
	equal(x, "the version of the snapshot", s.Version, "3.7.0")
	info, err := os.Stat(file)
	if err != nil {
		x.Fatal(err)
	}
	equal(x, "the size of the snapshot with its hash", info.Size(), s.TotalSize+sha256.Size)
	return s
}

// restored is a real etcd that was started with a snapshot.
func (x *exam) restored(file string) *exam {
	x.Helper()
	dir := filepath.Join(start.TempDir(x.T), "restored")
	start.Etcdutl(x.T, "snapshot", "restore", file, "--data-dir="+dir)
	return &exam{T: x.T, Server: start.EtcdIn(x.T, dir, start.Options{}), ctx: x.ctx}
}

// sameStore compares two servers: every revision from one on, the leases and the alarms.
func sameStore(x, y *exam, from int64) {
	x.Helper()
	head := x.revision()
	equal(x, "the revision of the restored etcd", y.revision(), head)
	for rev := max(from, 1); rev <= head; rev++ {
		all := &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Revision: rev}
		want, got := x.rangeRequest(all), y.rangeRequest(all)
		want.Header, got.Header = nil, nil
		same(x, fmt.Sprintf("restored, revision %d", rev), got, want)
		if rev == from {
			continue // of the compaction revision itself an etcd remembers, until it is restarted, the hash of before
		}
		ask := &pb.HashKVRequest{Revision: rev}
		hash, err := x.Maintenance.HashKV(x.ctx, ask)
		x.must(err, ask)
		again, err := y.Maintenance.HashKV(y.ctx, ask)
		x.must(err, ask)
		hash.Header, again.Header = nil, nil
		same(x, fmt.Sprintf("the hash of revision %d", rev), again, hash)
	}

	leases := func(x *exam) (all []string) {
		list, err := x.Lease.LeaseLeases(x.ctx, &pb.LeaseLeasesRequest{})
		x.must(err, &pb.LeaseLeasesRequest{})
		for _, l := range list.Leases {
			ask := &pb.LeaseTimeToLiveRequest{ID: l.ID, Keys: true}
			r, err := x.Lease.LeaseTimeToLive(x.ctx, ask)
			x.must(err, ask)
			if r.TTL > r.GrantedTTL || r.TTL < r.GrantedTTL-60 {
				x.Errorf("of lease %d there are %d s left of %d", r.ID, r.TTL, r.GrantedTTL)
			}
			slices.SortFunc(r.Keys, bytes.Compare)
			all = append(all, fmt.Sprintf("%d: %d s, %q", r.ID, r.GrantedTTL, r.Keys))
		}
		slices.Sort(all)
		return all
	}
	equal(x, "the leases", strings.Join(leases(y), "\n"), strings.Join(leases(x), "\n"))
	alarms := func(x *exam) string {
		r, err := x.Maintenance.Alarm(x.ctx, &pb.AlarmRequest{})
		x.must(err, &pb.AlarmRequest{})
		return fmt.Sprint(r.Alarms)
	}
	equal(x, "the alarms", alarms(y), alarms(x))
}

// accounts is what there is of users, roles and permissions.
func accounts(x *exam) string {
	x.Helper()
	enabled, revision := x.authStatus()
	all := []string{fmt.Sprintf("enabled %v, revision %d", enabled, revision)}
	users, err := x.auth().UserList(x.ctx, &pb.AuthUserListRequest{})
	x.must(err, &pb.AuthUserListRequest{})
	for _, name := range users.Users {
		r, err := x.auth().UserGet(x.ctx, &pb.AuthUserGetRequest{Name: name})
		x.must(err, &pb.AuthUserGetRequest{})
		all = append(all, fmt.Sprintf("user %s: %q", name, r.Roles))
	}
	roles, err := x.auth().RoleList(x.ctx, &pb.AuthRoleListRequest{})
	x.must(err, &pb.AuthRoleListRequest{})
	for _, name := range roles.Roles {
		r, err := x.auth().RoleGet(x.ctx, &pb.AuthRoleGetRequest{Role: name})
		x.must(err, &pb.AuthRoleGetRequest{})
		for _, p := range r.Perm {
			name += fmt.Sprintf(" %v %q %q", p.PermType, p.Key, p.RangeEnd)
		}
		all = append(all, "role "+name)
	}
	return strings.Join(all, "\n")
}

// goesOn writes to an etcd that was restored: revisions go on from where they were, leases work.
func goesOn(y *exam, head int64, lease int64, key string) {
	y.Helper()
	equal(y, "the revision of the first put", y.put("after the restore", "1").Header.Revision, head+1)
	if lease == 0 {
		return
	}
	r, err := y.Lease.LeaseRevoke(y.ctx, &pb.LeaseRevokeRequest{ID: lease})
	y.must(err, &pb.LeaseRevokeRequest{ID: lease})
	equal(y, "the revision of the revocation", r.Header.Revision, head+2)
	if y.get(key) != nil {
		y.Errorf("%s is still there after its lease", key)
	}
}

var snapshotCases = []testCase{
	{name: "an etcd starts with the same store from a snapshot", run: func(x *exam) {
		x.grant(7, 1000)
		x.grant(1<<40, 500)
		x.put("a", "1")
		x.put("b", "")
		x.txn(&pb.TxnRequest{Success: []*pb.RequestOp{putOp("c", ""), deleteOp("b", ""), putOp("a", "")}})
		x.putRequest(&pb.PutRequest{Key: []byte("d\x00\xff"), Value: []byte("leased"), Lease: 7})
		x.putRequest(&pb.PutRequest{Key: []byte("e"), Value: bytes.Repeat([]byte("long"), 100_000), Lease: 1 << 40})
		x.deleteRequest(&pb.DeleteRangeRequest{Key: []byte("a"), RangeEnd: []byte("d")})
		x.put("a", "again")
		x.put("k", "a value that was put in place of another")
		head := x.revision()

		file := x.snapshot()
		s := x.snapshotStatus(file)
		equal(x, "the revision of the snapshot", s.Revision, head)
		equal(x, "its keys", s.TotalKey, 4)
		y := x.restored(file)
		sameStore(x, y, 0)
		goesOn(y, head, 7, "d\x00\xff")
	}},

	{name: "a snapshot has what a compaction has left", run: func(x *exam) {
		x.grant(7, 1000)
		for i := range 40 {
			x.put(fmt.Sprintf("k%d", i%7), fmt.Sprint(i))
			if i%5 == 0 {
				x.delete(fmt.Sprintf("k%d", (i+3)%7))
			}
		}
		x.delete("k1")
		at := x.revision()
		x.put("k2", "later")
		x.delete("k2")
		x.putRequest(&pb.PutRequest{Key: []byte("k3"), IgnoreValue: true, Lease: 7})
		head := x.revision()
		x.compact(at - 10)
		x.compact(at)

		file := x.snapshot()
		equal(x, "the revision of the snapshot", x.snapshotStatus(file).Revision, head)
		y := x.restored(file)
		sameStore(x, y, at)
		ask := &pb.RangeRequest{Key: []byte("k1"), Revision: at - 1}
		_, want := x.KV.Range(x.ctx, ask)
		_, got := y.KV.Range(x.ctx, ask)
		x.wantError(got, want)
		goesOn(y, head, 7, "k3")
	}},

	{name: "a snapshot of an empty store", run: func(x *exam) {
		file := x.snapshot()
		s := x.snapshotStatus(file)
		equal(x, "the revision of the snapshot", s.Revision, 0)
		equal(x, "its keys", s.TotalKey, 0)
		y := x.restored(file)
		sameStore(x, y, 0)
		goesOn(y, 1, 0, "")
	}},

	{name: "a snapshot has the alarms", run: func(x *exam) {
		x.put("a", "")
		status, err := x.Maintenance.Status(x.ctx, &pb.StatusRequest{})
		x.must(err, &pb.StatusRequest{})
		raise := &pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, Alarm: pb.AlarmType_NOSPACE, MemberID: status.Header.MemberId}
		_, err = x.Maintenance.Alarm(x.ctx, raise)
		x.must(err, raise)
		y := x.restored(x.snapshot())
		sameStore(x, y, 0)
		end := proto.CloneOf(raise)
		end.Action = pb.AlarmRequest_DEACTIVATE
		for _, e := range []*exam{x, y} {
			_, err = e.Maintenance.Alarm(x.ctx, end)
			x.must(err, end)
		}
		goesOn(y, 2, 0, "")
	}},

	{name: "a snapshot has users and roles, and only root gets one", options: cheap, run: func(x *exam) {
		x.addRole(x.ctx, "empty")
		x.addRole(x.ctx, "some", perm(read, "a", "c"), perm(readWrite, "d", ""), perm(writing, "e", "\x00"))
		x.addUser(x.ctx, "ann", "some", "empty")
		x.addUser(x.ctx, "bob")
		nobody := &pb.AuthUserAddRequest{Name: "cn", Options: &authpb.UserAddOptions{NoPassword: true}}
		_, err := x.auth().UserAdd(x.ctx, nobody)
		x.must(err, nobody)
		x.put("a", "1")
		root := &exam{T: x.T, Server: x.Server, ctx: x.enable()}
		for who, want := range map[string]error{"ann": rpctypes.ErrGRPCPermissionDenied, "": rpctypes.ErrGRPCUserEmpty} {
			ctx := x.ctx
			if who != "" {
				ctx = x.login(who)
			}
			stream, err := x.Maintenance.Snapshot(ctx, &pb.SnapshotRequest{})
			if err == nil {
				_, err = stream.Recv()
			}
			x.wantError(err, want)
			_, err = x.Maintenance.Defragment(ctx, &pb.DefragmentRequest{})
			x.wantError(err, want)
			_, err = x.Maintenance.Downgrade(ctx, &pb.DowngradeRequest{Version: "3.5"})
			x.wantError(err, want)
		}
		root.defragment()

		restored := x.restored(root.snapshot())
		admin := &exam{T: x.T, Server: restored.Server, ctx: restored.login("root")}
		sameStore(root, admin, 0)
		equal(x, "users and roles", accounts(admin), accounts(root))
		_, err = restored.KV.Range(restored.login("ann"), &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("b")})
		x.must(err, &pb.RangeRequest{})
		_, err = restored.KV.Put(restored.login("ann"), &pb.PutRequest{Key: []byte("a")})
		x.wantError(err, rpctypes.ErrGRPCPermissionDenied)
		_, err = restored.KV.Put(restored.login("ann"), &pb.PutRequest{Key: []byte("d")})
		x.must(err, &pb.PutRequest{})
		for _, who := range []string{"bob", "cn"} {
			wrong := &pb.AuthenticateRequest{Name: who, Password: "wrong"}
			_, want := x.auth().Authenticate(x.ctx, wrong)
			_, got := restored.auth().Authenticate(x.ctx, wrong)
			x.wantError(got, want)
		}
	}},

	{name: "a snapshot of a store whose auth was switched off", options: cheap, run: func(x *exam) {
		root := x.enable()
		_, err := x.auth().AuthDisable(root, &pb.AuthDisableRequest{})
		x.must(err, &pb.AuthDisableRequest{})
		y := x.restored(x.snapshot())
		sameStore(x, y, 0)
		equal(x, "users and roles", accounts(y), accounts(x))
		goesOn(y, 1, 0, "")
	}},

	{name: "a snapshot that is taken during writes is the store at one revision", run: func(x *exam) {
		const keys = 10
		done := make(chan struct{})
		var writing sync.WaitGroup
		stop := sync.OnceFunc(func() { close(done); writing.Wait() })
		defer stop()
		writing.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-done:
					return
				default:
				}
				txn := &pb.TxnRequest{}
				for k := range keys {
					txn.Success = append(txn.Success, putOp(fmt.Sprintf("k%d", k), fmt.Sprintf("%d%s", i, make([]byte, 1000))))
				}
				if _, err := x.KV.Txn(x.ctx, txn); err != nil {
					x.Errorf("a write: %v", err)
					return
				}
			}
		})
		var file string
		for before := int64(0); before < 3; before++ {
			for x.revision() < 50*(before+1) {
			}
			file = x.snapshot()
			if s := x.snapshotStatus(file); s.Revision < 50*(before+1) || s.TotalKey != keys {
				x.Errorf("the snapshot: %+v", s)
			}
		}
		stop()
		y := x.restored(file)
		head := y.revision()
		all := &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Revision: head}
		got, want := y.rangeRequest(all), x.rangeRequest(all)
		got.Header, want.Header = nil, nil
		same(x, "the snapshot", got, want)
		if differs := slices.ContainsFunc(got.Kvs, func(kv *mvccpb.KeyValue) bool { return kv.ModRevision != head }); differs || len(got.Kvs) != keys {
			x.Errorf("the snapshot of revision %d has parts of another", head)
		}
	}},
}
