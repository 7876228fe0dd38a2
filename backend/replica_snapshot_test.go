package backend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// leftovers lists the files beside a database that are none of SQLite's, nor the lock.
func leftovers(t *testing.T, path string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		rest, ours := strings.CutPrefix(e.Name(), filepath.Base(path))
		if !ours || !slices.Contains([]string{"", "-wal", "-shm", ".lock"}, rest) {
			names = append(names, e.Name())
		}
	}
	return names
}

// busy writes to a cluster until it is told to stop, a bit of everything.
func busy(t *testing.T, db *DB) (stop func()) {
	var wg sync.WaitGroup
	done := make(chan struct{})
	for w := range 4 {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-done:
					return
				default:
				}
				key := fmt.Appendf(nil, "k%02d", (i*7+w)%60)
				var req Command
				switch i % 10 {
				case 3:
					req.Request = &pb.DeleteRangeRequest{Key: key}
				case 7:
					req.Request = &pb.CompactionRequest{Revision: max(1, db.Revision()-20)}
				default:
					req.Request = &pb.PutRequest{Key: key, Value: make([]byte, 2000*(i%7)), PrevKv: true}
				}
				if _, err := db.Write(context.Background(), req); err != nil && !errors.Is(err, ErrCompacted) {
					t.Error(err)
					return
				}
			}
		})
	}
	return func() { close(done); wg.Wait() }
}

// TestReplicaInstallsASnapshot: a copy made while writes go on is the state as of its index, and a member that was left
// behind goes on from there. Its watchers miss nothing that is not compacted.
func TestReplicaInstallsASnapshot(t *testing.T) {
	alarms := make(chan bool, 10)
	c := newCluster(t, Options{}, Options{ValueCacheBytes: 1 << 20, Hooks: Hooks{Alarm: func(_ *pb.AlarmMember, raised bool) { alarms <- raised }}})
	c.lead(0)
	a, behind := c.members[0].db, c.members[1]
	for i := range 60 {
		mustPut(t, a, fmt.Sprintf("k%02d", i), strings.Repeat("x", 60_000))
	}
	c.same()
	members := &Membership{ClusterID: 1<<63 + 7, Members: []Member{{ID: 1, PeerURLs: []string{"http://a"}}, {ID: 1<<63 + 1, Learner: true}}, Removed: []uint64{5}}
	for turn := range 5 {
		behind.paused.Lock()
		db := behind.db
		view := db.View()
		last := db.Revision()
		var told atomic.Int64
		cancel := db.Subscribe(func(rev int64) { told.Store(rev) })
		grantAll(t, a, 1000, int64(turn+1))
		if turn == 1 {
			mustWrite(t, a, &pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, MemberID: 3, Alarm: pb.AlarmType_NOSPACE})
			mustWrite(t, a, &pb.AlarmRequest{Action: pb.AlarmRequest_DEACTIVATE, MemberID: 3, Alarm: pb.AlarmType_NOSPACE})
			mustWrite(t, a, &pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, MemberID: 4, Alarm: pb.AlarmType_NOSPACE})
			mustWrite(t, a, &pb.AlarmRequest{Action: pb.AlarmRequest_DEACTIVATE, MemberID: 4, Alarm: pb.AlarmType_NOSPACE})
		}
		stop := busy(t, a)
		s, err := a.Snapshot(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond) // some writes more
		stop()
		if index, _ := a.Applied(); s.Index() == 0 || s.Index() > index || s.Term() != 1 {
			t.Errorf("a snapshot at entry %d in term %d, %d is applied", s.Index(), s.Term(), index)
		}
		if err := behind.install(s); err != nil {
			t.Fatal(err)
		}
		if index, term := db.Applied(); index != s.Index() || term != s.Term() || db.Durable() != index {
			t.Errorf("installed entry %d in term %d, durable %d, want %d", index, term, db.Durable(), s.Index())
		}
		mustDo(t, s.Release())
		if told.Load() != db.Revision() {
			t.Errorf("subscribers heard of revision %d, it is at %d", told.Load(), db.Revision())
		}
		cancel()
		if turn == 0 {
			// Of the View from before, what is in memory is there, and nothing else.
			if n, err := view.Range(t.Context(), &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l"), CountOnly: true}); err != nil || n.Count != 60 {
				t.Errorf("a View from before counts %v, %v", n, err)
			}
			if _, err := view.Range(t.Context(), &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l")}); !errors.Is(err, ErrUnavailable) {
				t.Errorf("what it does not have in memory: %v, want ErrUnavailable", err)
			}
		}
		view.Release()
		// A watcher that had seen everything reads on.
		from := max(last+1, db.CompactRevision())
		got, err := db.History(t.Context(), everything(from))
		if err != nil {
			t.Fatal(err)
		}
		want, err := a.History(t.Context(), everything(from))
		for i, e := range got.Events {
			if eventText(e) != eventText(want.Events[i]) {
				t.Fatalf("event %d is %s, want %s", i, eventText(e), eventText(want.Events[i]))
			}
		}
		if err != nil || len(got.Events) == 0 {
			t.Errorf("%d events from revision %d, %v", len(got.Events), from, err)
		}
		if db.CompactRevision() > last+1 {
			if _, err := db.History(t.Context(), everything(last+1)); !errors.Is(err, ErrCompacted) {
				t.Errorf("history that is compacted: %v", err)
			}
		}
		behind.paused.Unlock()
		mustPut(t, db, "after", "it") // through the log, and back
		if turn == 2 {
			c.mu.Lock()
			c.log = append(c.log, clusterEntry{Entry: Entry{Index: uint64(len(c.log) + 1), Term: c.term}, members: members})
			c.changed()
			c.mu.Unlock()
		}
		c.same()
		mustEqual(t, "after the snapshot", contents(t, db), contents(t, a))
		if left := append(leftovers(t, c.members[0].path), leftovers(t, behind.path)...); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
		if turn == 3 {
			behind.close()
			behind.start()
			if got := behind.db.Members(); fmt.Sprint(got) != fmt.Sprint(*members) {
				t.Errorf("members %v, want %v", got, *members)
			}
		}
	}
	if got := behind.db.Members(); fmt.Sprint(got) != fmt.Sprint(*members) {
		t.Errorf("members %v, want %v", got, *members)
	}
}

// TestReplicaRefusesAnOlderSnapshot: and goes on as before.
func TestReplicaRefusesAnOlderSnapshot(t *testing.T) {
	c := newCluster(t, Options{}, Options{})
	c.lead(0)
	a, b := c.members[0].db, c.members[1]
	mustPut(t, a, "k", "1")
	s, err := a.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { mustDo(t, s.Release()) }()
	mustPut(t, a, "k", "2")
	c.same()
	b.paused.Lock()
	if err := b.install(s); err == nil {
		t.Error("an older state was installed")
	} else {
		t.Log(err)
	}
	if err := os.WriteFile(b.path+installSuffix, []byte(strings.Repeat("no database", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := b.db.Install(t.Context(), b.path+installSuffix); !errors.Is(err, ErrDamaged) {
		t.Errorf("what is no database: %v", err)
	}
	b.paused.Unlock()
	mustPut(t, b.db, "k", "3")
	c.same()
	if left := leftovers(t, b.path); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// TestReplicaInstallAfterACrash: whenever the process ends, the next start finds the old state or the new one, whole.
func TestReplicaInstallAfterACrash(t *testing.T) {
	build := func(path string, puts int) {
		db, err := OpenReplica(t.Context(), path, Options{})
		if err != nil {
			t.Fatal(err)
		}
		maker := &entryMaker{rnd: seed(t), term: 1, clock: 1, rev: 5}
		for range puts {
			if err := db.Apply([]Entry{bigEntry(t, maker)}); err != nil {
				t.Fatal(err)
			}
		}
		closeAndCheck(t, db, path)
	}
	older, newer := testPath(t), testPath(t)
	build(older, 3)
	build(newer, 9)
	// A database that was not closed: all of it is in the WAL.
	crashed := testPath(t)
	mustDo(t, os.MkdirAll(filepath.Dir(crashed), 0o700))
	db, err := OpenReplica(t.Context(), crashed, Options{})
	if err != nil {
		t.Fatal(err)
	}
	maker := &entryMaker{rnd: seed(t), term: 1, clock: 1, rev: 5}
	for range 6 {
		if err := db.Apply([]Entry{bigEntry(t, maker)}); err != nil {
			t.Fatal(err)
		}
	}
	type file struct{ from, to string }
	for _, c := range []struct {
		name  string
		files []file
		want  uint64
	}{
		{"nothing has begun", []file{{older, ""}}, 3},
		{"an older copy", []file{{newer, ""}, {older, ".install"}}, 9},
		{"the same", []file{{newer, ""}, {newer, ".install"}}, 9},
		{"a newer copy", []file{{older, ""}, {newer, ".install"}}, 9},
		{"a newer copy, and the database was not closed", []file{{crashed, ""}, {crashed + "-wal", "-wal"}, {newer, ".install"}}, 9},
		{"an older copy, and the database was not closed", []file{{crashed, ""}, {crashed + "-wal", "-wal"}, {older, ".install"}}, 6},
		{"a copy that was being loaded", []file{{older, ""}, {crashed, ".install"}, {crashed + "-wal", ".install-wal"}}, 6},
		{"a copy, and no database", []file{{newer, ".install"}}, 9},
		{"it is taken", []file{{crashed, ""}, {crashed + "-wal", "-wal"}, {newer, ".installing"}}, 9},
		{"it is taken, although it is older", []file{{crashed, ""}, {crashed + "-wal", "-wal"}, {older, ".installing"}}, 3},
		{"the WAL is gone", []file{{crashed, ""}, {newer, ".installing"}}, 9},
		{"and then the next one was there", []file{{crashed, ""}, {older, ".installing"}, {newer, ".install"}}, 9},
		{"done", []file{{newer, ""}}, 9},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := testPath(t)
			for _, f := range c.files {
				b, err := os.ReadFile(f.from)
				if err != nil {
					t.Fatal(err)
				}
				mustDo(t, os.WriteFile(path+f.to, b, 0o600))
			}
			mustDo(t, os.WriteFile(path+snapshotSuffix+"123", []byte("unfinished"), 0o600))
			if len(c.files) == 1 { // else this would disturb what is tested
				if got, err := OpenSQLite(t.Context(), path, Options{}); err == nil {
					t.Error("opened as if it were alone")
					mustDo(t, got.Close())
				}
			}
			for range 2 {
				db, err := OpenReplica(t.Context(), path, Options{})
				if err != nil {
					t.Fatal(err)
				}
				if got, _ := db.Applied(); got != c.want {
					t.Errorf("entry %d is applied, want %d", got, c.want)
				}
				closeAndCheck(t, db, path)
			}
			if left := leftovers(t, path); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
	closeAndCheck(t, db, crashed)
}

// TestReplicaInstallThatCannotBeFinished: the member stops, and its next start finishes it.
func TestReplicaInstallThatCannotBeFinished(t *testing.T) {
	c := newCluster(t, Options{}, Options{})
	c.lead(0)
	a, b := c.members[0].db, c.members[1]
	mustPut(t, a, "k", "1")
	c.same()
	b.paused.Lock()
	mustPut(t, a, "k", "2")
	s, err := a.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { mustDo(t, s.Release()) }()
	// The database cannot be replaced by a file.
	alone(t, b.db, func() error {
		file := sqliteOf(b.db).file
		file.path += ".away"
		return os.MkdirAll(filepath.Join(file.path, "in the way"), 0o700)
	})
	wrong := b.path + ".away"
	moved := &clusterMember{c: c, path: wrong, db: b.db}
	if err := moved.install(s); err == nil {
		t.Error("it was installed")
	} else {
		t.Log(err)
	}
	if err := b.db.Apply([]Entry{{Index: s.Index() + 1, Term: 1, Stamp: a.Stamp()}}); err == nil {
		t.Error("it goes on")
	}
	if _, err := b.db.Snapshot(t.Context()); err == nil {
		t.Error("it hands out snapshots")
	}
	if _, err := b.db.Write(t.Context(), Command{Request: putReq("k", "v")}); err == nil {
		t.Error("it takes writes")
	}
	close(b.stop)
	b.paused.Unlock()
	<-b.ended
	mustDo(t, b.db.Close())
	mustDo(t, os.RemoveAll(wrong))
	mustDo(t, os.Rename(wrong+installingSuffix, b.path+installingSuffix))
	b.start()
	if index, _ := b.db.Applied(); index < s.Index() {
		t.Errorf("entry %d is applied, want %d", index, s.Index())
	}
	c.same()
}

// TestReplicaSnapshotsThatEnd: when nobody wants one any more, when the database is replaced or closed, nothing is left.
func TestReplicaSnapshotsThatEnd(t *testing.T) {
	c := newCluster(t, Options{}, Options{})
	c.lead(0)
	a, b := c.members[0].db, c.members[1]
	for i := range 100 {
		mustPut(t, a, fmt.Sprint(i), string(make([]byte, 100_000)))
	}
	c.same()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := a.Snapshot(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	// One that is under way while the database is replaced.
	b.paused.Lock()
	mustPut(t, a, "k", "2")
	s, err := a.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, io.NewSectionReader(s, 0, s.Size())); err != nil {
		t.Error(err)
	}
	begun := make(chan error, 1)
	go func() {
		_, err := b.db.Snapshot(context.Background())
		begun <- err
	}()
	eventually(t, "the copy has begun", func() bool { return len(leftovers(t, b.path)) > 0 })
	if err := b.install(s); err != nil {
		t.Fatal(err)
	}
	if err := <-begun; err != nil && !errors.Is(err, ErrUnavailable) {
		t.Errorf("a copy of what was replaced: %v", err)
	}
	mustDo(t, s.Release())
	// And while it is closed.
	go func() {
		_, err := b.db.Snapshot(context.Background())
		begun <- err
	}()
	eventually(t, "the copy has begun", func() bool { return len(leftovers(t, b.path)) > 0 || len(begun) > 0 })
	close(b.stop)
	b.paused.Unlock()
	<-b.ended
	closeAndCheck(t, b.db, b.path)
	if err := <-begun; err != nil && !errors.Is(err, ErrClosed) {
		t.Errorf("a copy of what was closed: %v", err)
	}
	b.db = nil
	if left := append(leftovers(t, c.members[0].path), leftovers(t, b.path)...); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// TestReplicaReadersDuringInstalls: readers get what they ask for, or are told to ask again.
func TestReplicaReadersDuringInstalls(t *testing.T) {
	c := newCluster(t, Options{}, Options{ValueCacheBytes: 1})
	c.lead(0)
	a, b := c.members[0].db, c.members[1]
	for i := range 200 {
		mustPut(t, a, fmt.Sprintf("k%03d", i), strings.Repeat(fmt.Sprint(i), 2000))
	}
	c.same()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var read, refused atomic.Int64
	for range 3 {
		wg.Go(func() {
			next := b.db.Revision() + 1
			for {
				select {
				case <-stop:
					return
				default:
				}
				v := b.db.View()
				res, err := v.Range(context.Background(), &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l")})
				v.Release()
				switch {
				case errors.Is(err, ErrUnavailable):
					refused.Add(1)
				case err != nil:
					t.Error(err)
				case len(res.KVs) != 200:
					t.Errorf("%d keys at revision %d", len(res.KVs), res.Revision)
				default:
					read.Add(1)
				}
				h, err := b.db.History(context.Background(), everything(next))
				if err != nil {
					if !errors.Is(err, ErrUnavailable) {
						t.Error(err)
					}
					continue
				}
				for _, e := range h.Events {
					if e.Rev != next {
						t.Errorf("the event of revision %d comes after that of %d", e.Rev, next-1)
					}
					next = e.Rev + 1
				}
				next = h.Next
				if _, _, err := b.db.HashRows(context.Background(), 0, b.db.Revision()); err != nil && !errors.Is(err, ErrUnavailable) {
					t.Error(err)
				}
			}
		})
	}
	for turn := range 10 {
		b.paused.Lock()
		for i := range 20 {
			mustPut(t, a, fmt.Sprintf("k%03d", (turn*31+i*7)%200), fmt.Sprint(turn))
		}
		s, err := a.Snapshot(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := b.install(s); err != nil {
			t.Fatal(err)
		}
		mustDo(t, s.Release())
		b.paused.Unlock()
	}
	close(stop)
	wg.Wait()
	t.Logf("%d reads, %d were refused", read.Load(), refused.Load())
	c.same()
}
