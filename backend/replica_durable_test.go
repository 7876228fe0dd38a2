package backend

import (
	"context"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// bigEntry is an entry with values that fill the WAL.
func bigEntry(t *testing.T, m *entryMaker) Entry {
	t.Helper()
	var requests []proto.Message
	for range 1 + m.rnd.IntN(3) {
		if m.rnd.IntN(8) == 0 {
			requests = append(requests, &pb.CompactionRequest{Revision: max(1, m.rev-m.rnd.Int64N(10))})
		} else {
			requests = append(requests, putReq(string(m.key()), string(make([]byte, m.rnd.IntN(60_000)))))
		}
	}
	return entryOf(t, m, requests...)
}

func entryOf(t *testing.T, m *entryMaker, requests ...proto.Message) Entry {
	t.Helper()
	m.index++
	m.clock += m.rnd.Int64N(1e6)
	e := Entry{Index: m.index, Term: m.term, Stamp: (&stamp{clock: m.clock, wall: m.clock, space: -1, member: 1}).encode()}
	payload := []byte{payloadVersion}
	for _, r := range requests {
		var err error
		if payload, err = appendCommand(payload, &pending{cmd: Command{Request: r}}); err != nil {
			t.Fatal(err)
		}
	}
	e.Proposals = []Proposal{{Payload: payload}}
	return e
}

// TestReplicaDurable: whenever the power is cut, at whatever write of SQLite's, everything up to Durable is found, and what
// is found is the state as of the applied index in it: applying the rest of the log leads to what the others have.
func TestReplicaDurable(t *testing.T) {
	rnd := seed(t)
	path := testPath(t)
	disk := forget(t, filepath.Dir(path))
	db, err := OpenReplica(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	type cut struct {
		directory string
		durable   uint64
	}
	var cuts []cut
	armed := false
	disk.each = func(int) {
		if armed && rnd.IntN(200) == 0 && len(cuts) < 20 {
			c := cut{t.TempDir(), db.Durable()}
			disk.crash(t, rnd, c.directory)
			cuts = append(cuts, c)
		}
	}
	disk.begin(t, path, path+"-wal")
	disk.mu.Lock()
	armed = true
	disk.mu.Unlock()
	maker := &entryMaker{rnd: rnd, term: 1, clock: time.Now().UnixMicro()}
	var log []Entry
	var held *conn
	durable := uint64(0)
	var steps int
	for range 300 {
		maker.rev = db.Revision()
		disk.mu.Lock() // rnd is used under it too
		e := bigEntry(t, maker)
		reader, settle := rnd.IntN(60) == 0, rnd.IntN(50) == 0
		disk.mu.Unlock()
		log = append(log, e)
		if err := db.Apply([]Entry{e}); err != nil {
			t.Fatal(err)
		}
		if now := db.Durable(); now < durable {
			t.Fatalf("Durable fell from %d to %d", durable, now)
		} else if now > durable {
			steps++
			durable = now
		}
		if reader && held == nil {
			// Somebody who reads for long keeps the WAL from being copied.
			if held, err = sqliteOf(db).file.acquireReader(t.Context()); err != nil {
				t.Fatal(err)
			}
			mustDo(t, held.exec("BEGIN; SELECT count(*) FROM revisions"))
		} else if reader {
			mustDo(t, held.exec("COMMIT"))
			mustDo(t, sqliteOf(db).file.releaseReader(held, true))
			held = nil
		}
		if settle {
			alone(t, db, db.settle)
			if got, _ := db.Applied(); db.Durable() != got {
				t.Fatalf("Durable is %d after a sync at %d", db.Durable(), got)
			}
		}
	}
	if held != nil {
		mustDo(t, held.exec("COMMIT"))
		mustDo(t, sqliteOf(db).file.releaseReader(held, true))
	}
	disk.mu.Lock()
	armed = false
	disk.mu.Unlock()
	want := dump(t, db)
	closeAndCheck(t, db, path)
	lost := 0
	for i, c := range cuts {
		again, err := OpenReplica(t.Context(), filepath.Join(c.directory, filepath.Base(path)), Options{})
		if err != nil {
			t.Fatalf("cut %d: %v", i, err)
		}
		index, _ := again.Applied()
		if index < c.durable {
			t.Errorf("cut %d: entry %d is the last one found, but %d was said to be durable", i, index, c.durable)
		}
		if index < uint64(len(log)) {
			lost++
			if err := again.Apply(log[index:]); err != nil {
				t.Fatal(err)
			}
		}
		mustEqual(t, fmt.Sprintf("cut %d, found with entry %d", i, index), dump(t, again), want)
		closeAndCheck(t, again, filepath.Join(c.directory, filepath.Base(path)))
	}
	t.Logf("%d cuts, Durable moved %d times", len(cuts), steps)
	if len(cuts) < 10 || steps < 5 {
		t.Error("the test tests little")
	}
}

// TestReplicaBecomesDurableWhenIdle: some seconds after the last write, without another one.
func TestReplicaBecomesDurableWhenIdle(t *testing.T) {
	db := openReplicaTest(t, testPath(t), Options{})
	mustPut(t, db, "k", "v")
	index, _ := db.Applied()
	if db.Durable() >= index {
		t.Fatalf("Durable is %d right after entry %d", db.Durable(), index)
	}
	eventually(t, "it is durable", func() bool { return db.Durable() >= index })
}

// TestReplicaThatCannotBeWritten: entries are not passed over. Apply waits until there is room, readers go on, and those
// who wait for their write are told by whoever watches the clock.
func TestReplicaThatCannotBeWritten(t *testing.T) {
	var failed, healed atomic.Int64
	path := testPath(t)
	db := openReplicaTest(t, path, Options{Hooks: Hooks{
		StorageError:  func(error) { failed.Add(1) },
		StorageHealed: func() { healed.Add(1) },
	}})
	mustPut(t, db, "a", "1")
	alone(t, db, func() error {
		pages, err := sqliteOf(db).w.pageCount()
		if err != nil {
			return err
		}
		return sqliteOf(db).w.exec(fmt.Sprintf("PRAGMA max_page_count = %d", pages))
	})
	done := make(chan error, 1)
	go func() {
		_, err := db.Write(t.Context(), Command{Request: putReq("a", string(make([]byte, 100_000)))})
		done <- err
	}()
	eventually(t, "the write fails a few times", func() bool { return failed.Load() > 2 })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := db.Write(ctx, Command{Request: putReq("b", "2")}); err == nil {
		t.Error("a write overtook one that cannot be written")
	}
	if db.Err() == nil {
		t.Error("Err says that all is well")
	}
	v := db.View()
	res, err := v.Range(t.Context(), &pb.RangeRequest{Key: []byte("a")})
	v.Release()
	if err != nil || len(res.KVs) != 1 || string(res.KVs[0].Value()) != "1" {
		t.Errorf("meanwhile a reader gets %v, %v", res, err)
	}
	execAlone(t, db, "PRAGMA max_page_count = 1073741823")
	if err := <-done; err != nil {
		t.Errorf("in the end the write got %v", err)
	}
	eventually(t, "the other write is there too", func() bool { return db.Revision() == 4 })
	if healed.Load() != 1 || db.Err() != nil {
		t.Errorf("it healed %d times, Err is %v", healed.Load(), db.Err())
	}
}

// TestReplicaClosesWhileItCannotBeWritten: nobody waits for ever.
func TestReplicaClosesWhileItCannotBeWritten(t *testing.T) {
	path := testPath(t)
	db, err := OpenReplica(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	execAlone(t, db, "CREATE TEMP TRIGGER refuse BEFORE INSERT ON revisions BEGIN SELECT RAISE(ABORT, 'refused'); END")
	maker := &entryMaker{rnd: seed(t), term: 1, clock: 1, rev: 2}
	applied := make(chan error, 1)
	go func() { applied <- db.Apply([]Entry{entryOf(t, maker, putReq("a", "1"))}) }()
	eventually(t, "it fails", func() bool { return db.Err() != nil })
	closeAndCheck(t, db, path)
	if err := <-applied; err == nil {
		t.Error("an entry that was never written was applied")
	}
}

// TestReplicaThatIsDamagedStops: a row that cannot be read is no answer to a Command. The member stops, and answers nothing.
func TestReplicaThatIsDamagedStops(t *testing.T) {
	path := testPath(t)
	db, err := openLoopback(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	mustPut(t, db, "a", "1")
	mustPut(t, db, "b", "1")
	mustDo(t, db.Close())
	if db, err = openLoopback(t.Context(), path, Options{}); err != nil { // so that no value is in memory
		t.Fatal(err)
	}
	execAlone(t, db, "DELETE FROM revisions WHERE rev = 2")
	index, _ := db.Applied()
	for range 2 {
		if _, err := db.Write(t.Context(), Command{Request: &pb.PutRequest{Key: []byte("a"), PrevKv: true}}); err == nil {
			t.Error("a write is answered")
		} else {
			t.Log(err)
		}
	}
	if now, _ := db.Applied(); now != index {
		t.Errorf("entry %d was applied after entry %d", now, index)
	}
	if err := db.ApplyMembers(index+10, 9, nil); err == nil {
		t.Error("it goes on")
	}
	mustDo(t, db.Close())
}
