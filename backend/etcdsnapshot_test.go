package backend

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"go.etcd.io/etcd/api/v3/authpb"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/server/v3/lease/leasepb"
	"google.golang.org/protobuf/proto"
)

var testSurroundings = EtcdSurroundings{
	StorageVersion: "3.7.0", ClusterVersion: "3.7.0", Index: 1234, Term: 5,
	Members: []Member{
		{ID: 0x2bc21162cab8eb93, Name: "a", PeerURLs: []string{"http://127.0.0.1:1"}, ClientURLs: []string{"http://127.0.0.1:2"}},
		{ID: 0xf, PeerURLs: []string{"http://127.0.0.1:3"}, Learner: true},
	},
}

// saved is what an etcd's database holds, by bucket: "name=value" in the order of the names.
type saved map[string][]string

// takeEtcdSnapshot reads a snapshot, whose file must be sound, and be gone when it is closed.
func takeEtcdSnapshot(t *testing.T, db *DB) (rev int64, all saved) {
	t.Helper()
	s, err := db.EtcdSnapshot(t.Context(), testSurroundings)
	if err != nil {
		t.Fatal(err)
	}
	content, err := io.ReadAll(s)
	if err != nil {
		t.Fatal(err)
	}
	mustDo(t, s.Close())
	noSnapshotsLeft(t, db)
	if int64(len(content)) != s.Size || s.Size%512 != 0 {
		t.Fatalf("the snapshot has %d bytes, and says %d", len(content), s.Size)
	}
	path := filepath.Join(t.TempDir(), "db")
	mustDo(t, os.WriteFile(path, content, 0o600))
	file, err := bolt.Open(path, 0, &bolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	all = make(saved)
	err = file.View(func(tx *bolt.Tx) error {
		for damage := range tx.Check() {
			t.Errorf("the file is damaged: %v", damage)
		}
		return tx.ForEach(func(bucket []byte, b *bolt.Bucket) error {
			all[string(bucket)] = []string{}
			return b.ForEach(func(k, v []byte) error {
				all[string(bucket)] = append(all[string(bucket)], fmt.Sprintf("%s=%s", k, v))
				return nil
			})
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return s.Revision, all
}

// noSnapshotsLeft: whatever became of a snapshot, its file has no name.
func noSnapshotsLeft(t *testing.T, db *DB) {
	t.Helper()
	left, err := filepath.Glob(db.snapshotPath() + snapshotSuffix + "*")
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// etcdRows is what an etcd would have of everything that ever happened, once its compaction is done.
func (m *model) etcdRows(t *testing.T) (rows []string) {
	t.Helper()
	sub := uint64(0)
	for i, e := range m.events {
		rev := e.Kv.ModRevision
		if sub++; i == 0 || rev != m.events[i-1].Kv.ModRevision {
			sub = 0
		}
		deleted := e.Type == mvccpb.Event_DELETE
		if rev <= m.compact && (m.at(string(e.Kv.Key), m.compact) != e.Kv || deleted) && (rev < m.compact || !deleted) {
			continue
		}
		name := binary.BigEndian.AppendUint64(nil, uint64(rev))
		name = binary.BigEndian.AppendUint64(append(name, '_'), sub)
		kv := e.Kv
		if deleted {
			name, kv = append(name, 't'), &mvccpb.KeyValue{Key: kv.Key}
		}
		value, err := proto.Marshal(kv)
		if err != nil {
			t.Fatal(err)
		}
		rows = append(rows, fmt.Sprintf("%s=%s", name, value))
	}
	return rows
}

func TestEtcdSnapshotIsTheDatabaseOfAnEtcd(t *testing.T) {
	etcdSnapshots(t, seed(t), openTest(t, testPath(t), Options{}))
}

func TestReplicaEtcdSnapshotIsTheDatabaseOfAnEtcd(t *testing.T) {
	etcdSnapshots(t, seed(t), openReplicaTest(t, testPath(t), Options{}))
}

func TestPostgresEtcdSnapshotIsTheDatabaseOfAnEtcd(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made when it is needed")
	etcdSnapshots(t, seed(t), openPostgresTest(t, pgTestOptions(t), Options{SnapshotDir: dir}))
}

func etcdSnapshots(t *testing.T, rnd *rand.Rand, db *DB) {
	rev, all := takeEtcdSnapshot(t, db)
	if rev != 1 || len(all) != len(etcdBuckets) || len(all["key"]) > 0 {
		t.Errorf("an empty store at %d: %q", rev, all)
	}
	mustEqual(t, "meta of a store that was never compacted", all["meta"], []string{
		`confState={"voters":[3153101805118352275],"learners":[15],"auto_leave":false}`,
		"consistent_index=\x00\x00\x00\x00\x00\x00\x04\xd2", "storageVersion=3.7.0", "term=\x00\x00\x00\x00\x00\x00\x00\x05",
	})
	mustEqual(t, "cluster", all["cluster"], []string{"clusterVersion=3.7.0"})
	mustEqual(t, "members", all["members"], []string{
		`2bc21162cab8eb93={"id":3153101805118352275,"peerURLs":["http://127.0.0.1:1"],"name":"a","clientURLs":["http://127.0.0.1:2"]}`,
		`f={"id":15,"peerURLs":["http://127.0.0.1:3"],"isLearner":true}`,
	})
	mustEqual(t, "auth", all["auth"], []string{"authRevision=\x00\x00\x00\x00\x00\x00\x00\x01"})

	m := newModel()
	for range 8 {
		playWrites(t, rnd, m, 1+rnd.IntN(12), db)
		var v *View
		if rnd.IntN(2) == 0 && m.rev > max(m.compact, 1) {
			if rnd.IntN(2) == 0 {
				v = db.View() // it keeps rows from being deleted
			}
			m.compact = max(m.compact, 0) + 1 + rnd.Int64N(m.rev-max(m.compact, 0))
			mustWrite(t, db, &pb.CompactionRequest{Revision: m.compact})
		}
		rev, all := takeEtcdSnapshot(t, db)
		if rev != m.rev {
			t.Errorf("it is the snapshot of revision %d, want %d", rev, m.rev)
		}
		mustEqual(t, "rows", all["key"], m.etcdRows(t))
		if m.compact >= 0 {
			at := fmt.Sprintf("%s_%s", binary.BigEndian.AppendUint64(nil, uint64(m.compact)), make([]byte, 8))
			mustEqual(t, "compaction revisions", all["meta"][2:4], []string{"finishedCompactRev=" + at, "scheduledCompactRev=" + at})
		}
		if v != nil {
			v.Release()
		}
	}

	mustWrite(t, db, &pb.LeaseGrantRequest{ID: 7, TTL: 1000})
	mustWrite(t, db, &pb.LeaseGrantRequest{ID: 1 << 40, TTL: 9})
	for _, req := range []proto.Message{
		&pb.AuthRoleAddRequest{Name: "r"},
		&pb.AuthRoleGrantPermissionRequest{Name: "r", Perm: &authpb.Permission{PermType: authpb.Permission_READ, Key: []byte("a"), RangeEnd: []byte("b")}},
		&pb.AuthUserAddRequest{Name: "root", HashedPassword: "aGFzaA=="},
		&pb.AuthUserAddRequest{Name: "cn", Options: &authpb.UserAddOptions{NoPassword: true}},
		&pb.AuthUserGrantRoleRequest{User: "root", Role: "root"},
		&pb.AuthUserGrantRoleRequest{User: "root", Role: "r"},
		&pb.AuthEnableRequest{},
		&pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, MemberID: 0xdead00000000beef, Alarm: pb.AlarmType_CORRUPT},
	} {
		mustAuth(t, db, req)
	}
	_, all = takeEtcdSnapshot(t, db)
	encoded := func(m proto.Message) string {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	mustEqual(t, "leases", all["lease"], []string{
		"\x00\x00\x00\x00\x00\x00\x00\x07=" + encoded(&leasepb.Lease{ID: 7, TTL: 1000}),
		"\x00\x00\x01\x00\x00\x00\x00\x00=" + encoded(&leasepb.Lease{ID: 1 << 40, TTL: 9}),
	})
	mustEqual(t, "auth", all["auth"], []string{"authEnabled=\x01", "authRevision=\x00\x00\x00\x00\x00\x00\x00\x07"})
	mustEqual(t, "roles", all["authRoles"], []string{
		"r=" + encoded(&authpb.Role{Name: []byte("r"), KeyPermission: []*authpb.Permission{{PermType: authpb.Permission_READ, Key: []byte("a"), RangeEnd: []byte("b")}}}),
	})
	mustEqual(t, "users", all["authUsers"], []string{
		"cn=" + encoded(&authpb.User{Name: []byte("cn"), Options: &authpb.UserAddOptions{NoPassword: true}}),
		"root=" + encoded(&authpb.User{Name: []byte("root"), Password: []byte("hash"), Roles: []string{"r", "root"}, Options: &authpb.UserAddOptions{}}),
	})
	mustEqual(t, "alarms", all["alarm"], []string{encoded(&pb.AlarmMember{MemberID: 0xdead00000000beef, Alarm: pb.AlarmType_CORRUPT}) + "="})
}

// TestEtcdSnapshotsDuringWrites: several are written at once, while others write and compact; each is what the store was at
// its revision, and nobody waits for them.
func TestEtcdSnapshotsDuringWrites(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	// A transaction writes the same to all of these keys: a snapshot that mixes two moments shows it.
	const keys = 20
	step := func(i int) {
		var ops []*pb.RequestOp
		for k := range keys {
			ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: putReq(fmt.Sprintf("k%02d", k), fmt.Sprintf("%06d%s", i, make([]byte, 3000)))}})
		}
		mustWrite(t, db, &pb.TxnRequest{Success: ops})
	}
	for i := range 200 {
		step(i)
	}
	done := make(chan struct{})
	var writing, reading sync.WaitGroup
	writing.Go(func() {
		for i := 200; ; i++ {
			select {
			case <-done:
				return
			default:
			}
			step(i)
			if i%50 == 0 {
				mustWrite(t, db, &pb.CompactionRequest{Revision: db.Revision() - 20})
			}
		}
	})
	for range 2 {
		reading.Go(func() {
			for range 4 {
				rev, all := takeEtcdSnapshot(t, db)
				last := all["key"][len(all["key"])-keys:]
				for k, row := range last {
					want := fmt.Sprintf("%s_%s=", binary.BigEndian.AppendUint64(nil, uint64(rev)), binary.BigEndian.AppendUint64(nil, uint64(k)))
					if !strings.HasPrefix(row, want) || !strings.Contains(row, fmt.Sprintf("%06d", rev-2)) {
						t.Errorf("at revision %d key %d is %.60q", rev, k, row)
					}
				}
			}
		})
	}
	reading.Wait()
	close(done)
	writing.Wait()
}

// TestEtcdSnapshotHasTheLeasesOfItsRows: rows and leases are of one moment, while leases come and go.
func TestEtcdSnapshotHasTheLeasesOfItsRows(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	done := make(chan struct{})
	var writing sync.WaitGroup
	writing.Go(func() {
		for id := int64(1); ; id++ {
			select {
			case <-done:
				return
			default:
			}
			mustWrite(t, db, &pb.LeaseGrantRequest{ID: id, TTL: 1000})
			mustWrite(t, db, &pb.PutRequest{Key: []byte("k"), Lease: id})
			mustWrite(t, db, &pb.LeaseRevokeRequest{ID: id})
		}
	})
	attached := 0
	for range 100 {
		_, all := takeEtcdSnapshot(t, db)
		if len(all["key"]) == 0 {
			continue
		}
		row := all["key"][len(all["key"])-1]
		value := strings.TrimPrefix(row[17:], "t")[1:] // behind the revision
		kv := new(mvccpb.KeyValue)
		mustDo(t, proto.Unmarshal([]byte(value), kv))
		want := 0
		if kv.Lease != 0 {
			attached++
			want = 1
		}
		if len(all["lease"]) < want || len(all["lease"]) > 1 || want == 1 &&
			!strings.HasPrefix(all["lease"][0], string(binary.BigEndian.AppendUint64(nil, uint64(kv.Lease)))) {
			t.Errorf("the newest row is %v, the leases are %q", kv, all["lease"])
		}
	}
	close(done)
	writing.Wait()
	if attached == 0 {
		t.Error("no snapshot met a key with a lease: the test tests nothing")
	}
}

// TestEtcdSnapshotThatNobodyWants: whose context ends leaves nothing behind, and holds nothing any longer.
func TestEtcdSnapshotThatNobodyWants(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	value := strings.Repeat("v", 1<<20)
	for range 20 {
		mustPut(t, db, "k", value)
	}
	takeEtcdSnapshot(t, db) // opens the reading connections
	files := openFiles(t)
	for _, after := range []time.Duration{0, time.Millisecond, 5 * time.Millisecond, 20 * time.Millisecond} {
		ctx, cancel := context.WithTimeout(t.Context(), after)
		s, err := db.EtcdSnapshot(ctx, testSurroundings)
		if err == nil {
			mustDo(t, s.Close())
		} else if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("after %v: %v", after, err)
		}
		if after == 0 && err == nil {
			t.Error("a snapshot was made for somebody who had left")
		}
		cancel()
		noSnapshotsLeft(t, db)
	}
	if now := openFiles(t); now > files {
		t.Errorf("%d files are open, before it were %d", now, files)
	}
	// No View is held: a compaction comes to its end.
	mustWrite(t, db, &pb.CompactionRequest{Revision: db.Revision()})
	mustDo(t, db.WaitCompacted(t.Context(), db.Revision()))
}

func openFiles(t *testing.T) int {
	t.Helper()
	if runtime.GOOS != "linux" {
		return 0
	}
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// TestEtcdSnapshotTakesLittleMemory: of a store of 128 MiB, in large and in small rows.
func TestEtcdSnapshotTakesLittleMemory(t *testing.T) {
	db := openTest(t, testPath(t), Options{ValueCacheBytes: 1 << 20})
	fill := func(rows, size int) {
		value := bytes.Repeat([]byte("v"), size)
		for i := 0; i < rows; i += 128 {
			var ops []*pb.RequestOp
			for k := range 128 {
				ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: fmt.Appendf(nil, "k%06d", i+k), Value: value}}})
			}
			mustWrite(t, db, &pb.TxnRequest{Success: ops})
		}
	}
	fill(64<<10, 1<<10)
	fill(128, 512<<10)
	heap := func() int64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before, most := heap(), int64(0)
	done := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		for {
			select {
			case <-done:
				return
			case <-time.After(20 * time.Millisecond):
				most = max(most, heap()-before)
			}
		}
	})
	s, err := db.EtcdSnapshot(t.Context(), testSurroundings)
	close(done)
	watching.Wait()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	t.Logf("a snapshot of %d MiB took %d KiB of the heap", s.Size>>20, most>>10)
	if s.Size < 128<<20 || most > 64<<20 {
		t.Errorf("a snapshot of %d bytes took %d bytes of the heap", s.Size, most)
	}
}

// TestEtcdSnapshotLeavesRoomToTheStore: one that would fill the disk ends before that, and the store goes on all the while.
func TestEtcdSnapshotLeavesRoomToTheStore(t *testing.T) {
	const size = 96 << 20
	directory := t.TempDir()
	if err := syscall.Mount("quire-test", directory, "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
		t.Skipf("needs the right to mount a small tmpfs (root): %v", err)
	}
	t.Cleanup(func() { mustDo(t, syscall.Unmount(directory, 0)) })
	db := openTest(t, filepath.Join(directory, "quire.db"), Options{})
	value := strings.Repeat("v", 1<<20)
	for i := range 44 {
		mustPut(t, db, fmt.Sprint(i), value)
	}
	room := func() uint64 {
		f, err := os.Open(directory)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		free, _, err := diskRoom(f)
		if err != nil {
			t.Fatal(err)
		}
		return free
	}
	before := room()
	least, done := before, make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		for {
			select {
			case <-done:
				return
			case <-time.After(100 * time.Microsecond):
				least = min(least, room())
			}
		}
	})
	s, err := db.EtcdSnapshot(t.Context(), testSurroundings)
	close(done)
	watching.Wait()
	if err == nil {
		t.Fatal(s.Close(), "there was room for a snapshot: the test tests nothing")
	}
	if !errors.Is(err, ErrDiskFull) || !strings.Contains(err.Error(), directory) {
		t.Errorf("the snapshot failed with %v", err)
	}
	if least > before/2 || least < leastRoom(size) {
		t.Errorf("%d bytes were free, at worst %d, and in the end %d; %d are for the store", before, least, room(), leastRoom(size))
	}
	if now := room(); now < before-1<<20 {
		t.Errorf("%d bytes were free before it and %d after", before, now)
	}
	noSnapshotsLeft(t, db)
	mustWrite(t, db, &pb.CompactionRequest{Revision: db.Revision()})
	mustDo(t, db.WaitCompacted(t.Context(), db.Revision()))
	mustGoOn(t, db)
}

// TestEtcdFileEndsSoonWhenTheDiskIsFull: not after it has read again what it has written.
func TestEtcdFileEndsSoonWhenTheDiskIsFull(t *testing.T) {
	file, err := os.Create(filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	f, err := newEtcdFile(file)
	if err != nil {
		t.Fatal(err)
	}
	value := make([]byte, 64<<10)
	const rows = 1024
	for rev := range int64(rows) {
		mustDo(t, f.row(&storedRow{rev: rev, key: []byte("k"), value: value}))
	}
	var before, after runtime.MemStats
	mustDo(t, f.next())
	mustDo(t, f.row(&storedRow{rev: rows, key: []byte("k")}))
	mustDo(t, file.Close()) // what is written now is refused
	runtime.ReadMemStats(&before)
	if err := f.tx.Commit(); err == nil {
		t.Fatal("it was written")
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 768<<10 {
		t.Errorf("a commit that fails after %d rows takes %d bytes of memory", rows, n)
	}
	if err := f.close(); err == nil {
		t.Error("a file was closed twice")
	}
}

// TestEtcdSnapshotsOfACrashAreRemoved: what has a name still when the process ends is gone with the next start.
func TestEtcdSnapshotsOfACrashAreRemoved(t *testing.T) {
	path := testPath(t)
	db := openTest(t, path, Options{})
	mustDo(t, db.Close())
	mustDo(t, os.WriteFile(path+snapshotSuffix+"123", []byte("unfinished"), 0o600))
	noSnapshotsLeft(t, openTest(t, path, Options{}))
}

func TestPostgresEtcdSnapshotsOfACrashAreRemoved(t *testing.T) {
	dir := t.TempDir()
	mustDo(t, os.WriteFile(filepath.Join(dir, "quire.db"+snapshotSuffix+"123"), []byte("unfinished"), 0o600))
	noSnapshotsLeft(t, openPostgresTest(t, pgTestOptions(t), Options{SnapshotDir: dir}))
}
