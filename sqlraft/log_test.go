package sqlraft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"strings"
	"syscall"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

const testLogDir = "raft"

func mustOpenLog(t testing.TB, d disk) (*raftLog, *recovered) {
	t.Helper()
	l, rec, err := openLog(d, testLogDir)
	if err != nil {
		t.Fatal(err)
	}
	return l, rec
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// testEntries makes entries from first on, in one term, with data of the given sizes.
func testEntries(first, term uint64, sizes ...int) []*raftpb.Entry {
	entries := make([]*raftpb.Entry, len(sizes))
	for i, size := range sizes {
		data := make([]byte, size)
		for j := range data {
			data[j] = byte(first+uint64(i))*7 + byte(term)*31 + byte(j)
		}
		entries[i] = &raftpb.Entry{Index: new(first + uint64(i)), Term: new(term), Type: raftpb.EntryNormal.Enum(), Data: data}
	}
	return entries
}

func testHardState(term, vote, commit uint64) *raftpb.HardState {
	return &raftpb.HardState{Term: new(term), Vote: new(vote), Commit: new(commit)}
}

// describe is a log as one line: identity, hard state, start, and for each entry its index, term and size.
func (rec *recovered) describe() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%q %d/%d/%d after %d@%d:", rec.identity, rec.hard.GetTerm(), rec.hard.GetVote(), rec.hard.GetCommit(), rec.start, rec.startTerm)
	for _, e := range rec.entries {
		fmt.Fprintf(&b, " %d@%d(%d)", e.GetIndex(), e.GetTerm(), len(e.GetData()))
	}
	return b.String()
}

func expectLog(t *testing.T, rec *recovered, want string) {
	t.Helper()
	if got := rec.describe(); got != want {
		t.Fatalf("found %s\nwant  %s", got, want)
	}
	for _, e := range rec.entries {
		if want := testEntries(e.GetIndex(), e.GetTerm(), len(e.GetData()))[0]; !proto.Equal(e, want) {
			t.Fatalf("entry %v, want %v", e, want)
		}
	}
}

func TestLogIsFoundAsItWasWritten(t *testing.T) {
	d := newMemoryDisk(4096)
	l, rec := mustOpenLog(t, d)
	if rec.identity != nil || rec.hard == nil {
		t.Fatalf("a new log has identity %q, hard state %v", rec.identity, rec.hard)
	}
	expectLog(t, rec, `"" 0/0/0 after 0@0:`)
	step := func(err error, want string) {
		t.Helper()
		must(t, err)
		must(t, l.close())
		l, rec = mustOpenLog(t, d)
		expectLog(t, rec, want)
	}
	step(nil, `"" 0/0/0 after 0@0:`)
	step(l.setIdentity([]byte("me")), `"me" 0/0/0 after 0@0:`)
	step(l.append(testHardState(1, 2, 0), nil, true), `"me" 1/2/0 after 0@0:`)
	step(l.append(nil, testEntries(1, 1, 0, 10, 600), false), `"me" 1/2/0 after 0@0: 1@1(0) 2@1(10) 3@1(600)`)
	step(l.append(&raftpb.HardState{}, nil, false), `"me" 1/2/0 after 0@0: 1@1(0) 2@1(10) 3@1(600)`)
	step(l.append(testHardState(2, 0, 1), testEntries(3, 2, 5), true), `"me" 2/0/1 after 0@0: 1@1(0) 2@1(10) 3@2(5)`)
	step(l.append(testHardState(2, 0, 2), testEntries(4, 2, 3000), true), `"me" 2/0/2 after 0@0: 1@1(0) 2@1(10) 3@2(5) 4@2(3000)`) // a second segment
	step(l.append(nil, testEntries(5, 2, 9000), true), `"me" 2/0/2 after 0@0: 1@1(0) 2@1(10) 3@2(5) 4@2(3000) 5@2(9000)`)          // larger than a segment
	step(l.append(testHardState(3, 3, 3), testEntries(4, 3, 1, 2), true), `"me" 3/3/3 after 0@0: 1@1(0) 2@1(10) 3@2(5) 4@3(1) 5@3(2)`)
	step(l.setIdentity([]byte("still me")), `"still me" 3/3/3 after 0@0: 1@1(0) 2@1(10) 3@2(5) 4@3(1) 5@3(2)`)
	step(l.restart(100, 4, testHardState(4, 1, 103)), `"still me" 4/1/100 after 100@4:`)
	step(l.append(nil, testEntries(101, 4, 7), true), `"still me" 4/1/100 after 100@4: 101@4(7)`)
	step(l.restart(200, 4, nil), `"still me" 4/1/200 after 200@4:`)
	step(l.restart(201, 5, nil), `"still me" 5/0/201 after 201@5:`) // a vote of another term does not count
	must(t, l.close())
	if err := l.append(nil, testEntries(202, 5, 7), true); !errors.Is(err, backend.ErrClosed) {
		t.Errorf("append to a closed log says %v", err)
	}
}

func TestPurgeRemovesWholeSegments(t *testing.T) {
	d := newMemoryDisk(4096)
	l, _ := mustOpenLog(t, d)
	must(t, l.setIdentity([]byte("me")))
	for i := uint64(1); i <= 40; i++ {
		must(t, l.append(testHardState(1, 1, i-1), testEntries(i, 1, 700), true)) // two sectors: three entries in the first segment and the head of the next
	}
	segments := slices.Clone(l.segments)
	if len(segments) < 10 || l.size() != int64(len(segments))*4096 {
		t.Fatalf("%d segments, %d bytes", len(segments), l.size())
	}
	must(t, l.purge(0))
	must(t, l.purge(segments[1].start-1))
	if len(l.segments) != len(segments) {
		t.Fatal("a segment was removed that holds more")
	}
	must(t, l.purge(segments[5].start))
	if len(l.segments) != len(segments)-5 {
		t.Fatalf("%d segments of %d are left after a purge of five", len(l.segments), len(segments))
	}
	if want := int64(len(l.segments)+1) * 4096; l.size() != want {
		t.Errorf("%d bytes, want %d: one file is kept for the next segment", l.size(), want)
	}
	before := l.size()
	for i := uint64(41); len(l.segments) == len(segments)-5; i++ {
		must(t, l.append(testHardState(1, 1, i-1), testEntries(i, 1, 700), true))
	}
	if l.size() != before {
		t.Errorf("%d bytes, want %d: the spare file becomes the next segment", l.size(), before)
	}
	last := l.last
	must(t, l.close())
	l, rec := mustOpenLog(t, d)
	if rec.start != segments[5].start || rec.startTerm != 1 || rec.start+uint64(len(rec.entries)) != last {
		t.Fatalf("found %s", rec.describe())
	}
	must(t, l.purge(math.MaxUint64))
	must(t, l.close())
	l, rec = mustOpenLog(t, d)
	if len(l.segments) != 1 || rec.start+uint64(len(rec.entries)) != last || rec.hard.GetCommit() != last-1 || string(rec.identity) != "me" {
		t.Fatalf("found %s in %d segments", rec.describe(), len(l.segments))
	}
	if names, err := d.list(testLogDir); err != nil || len(names) != 1 {
		t.Errorf("left in the directory: %v, %v", names, err)
	}
}

// The start of a segment can lie behind entries that the segment itself overwrites.
func TestPurgeUpToAnOverwrittenTail(t *testing.T) {
	d := newMemoryDisk(8192)
	l, _ := mustOpenLog(t, d)
	must(t, l.append(testHardState(1, 1, 2), testEntries(1, 1, 10, 10, 10, 10, 5000), true))
	must(t, l.append(nil, testEntries(6, 1, 3000), true)) // segment 2 goes on after 5@1
	must(t, l.append(testHardState(2, 0, 2), testEntries(3, 2, 1, 1), true))
	must(t, l.append(testHardState(2, 0, 4), nil, true))
	must(t, l.purge(4))
	if len(l.segments) != 2 {
		t.Fatal("the first segment holds entry 5")
	}
	must(t, l.append(testHardState(2, 0, 6), testEntries(5, 2, 1, 1), true))
	must(t, l.purge(6))
	must(t, l.close())
	l, rec := mustOpenLog(t, d)
	expectLog(t, rec, `"" 2/0/6 after 5@2: 6@2(1)`)
	must(t, l.close())
}

// What is written, synced and renamed, in this order, is what the promises rest on.
func TestLogTrace(t *testing.T) {
	var b strings.Builder
	d := newMemoryDisk(4096)
	d.trace = func(s string) { fmt.Fprintln(&b, strings.ReplaceAll(s, "00000000000000", "")) }
	title := func(s string) { fmt.Fprintln(&b, "-- "+s) }
	title("new")
	l, _ := mustOpenLog(t, d)
	title("append without and with sync")
	must(t, l.append(testHardState(1, 1, 0), nil, false))
	must(t, l.append(nil, testEntries(1, 1, 100, 1000), true))
	title("nothing new to sync")
	must(t, l.append(testHardState(1, 1, 0), nil, true))
	title("append that does not fit")
	must(t, l.append(testHardState(1, 1, 2), nil, false))
	must(t, l.append(nil, testEntries(3, 1, 1000), true))
	title("purge")
	must(t, l.purge(2))
	title("append that does not fit, with a spare file")
	must(t, l.append(nil, testEntries(4, 1, 2000), true))
	title("restart")
	must(t, l.restart(10, 2, nil))
	title("close")
	must(t, l.append(nil, testEntries(11, 2, 1), false))
	must(t, l.close())
	title("open")
	l, _ = mustOpenLog(t, d)
	must(t, l.close())
	const want = `-- new
create next.log 4096
write next.log 0+512
sync next.log
rename next.log 01.log
syncDirectory raft
-- append without and with sync
write 01.log 512+512
write 01.log 1024+1536
sync 01.log
-- nothing new to sync
-- append that does not fit
write 01.log 2560+512
sync 01.log
create next.log 4096
write next.log 0+512
sync next.log
rename next.log 02.log
syncDirectory raft
write 01.log 3072+512
sync 01.log
write 02.log 512+1536
sync 02.log
-- purge
write 02.log 2048+512
sync 02.log
rename 01.log spare.log
-- append that does not fit, with a spare file
write spare.log 0+512
sync spare.log
rename spare.log 03.log
syncDirectory raft
write 02.log 2560+512
sync 02.log
write 03.log 512+2560
sync 03.log
-- restart
create next.log 4096
write next.log 0+512
sync next.log
rename next.log 04.log
syncDirectory raft
rename 02.log spare.log
remove 03.log
-- close
write 04.log 512+512
sync 04.log
-- open
write 04.log 512+512
sync 04.log
syncDirectory raft
remove spare.log
`
	if got := b.String(); got != want {
		t.Errorf("the durable path is\n%s\nwant\n%s", got, want)
	}
}

func TestAppendPanicsOnABrokenInvariant(t *testing.T) {
	for _, c := range []struct {
		name    string
		hs      *raftpb.HardState
		entries []*raftpb.Entry
	}{
		{"a gap", nil, testEntries(12, 1, 1)},
		{"a gap inside", nil, append(testEntries(11, 1, 1), testEntries(13, 1, 1)...)},
		{"a committed entry overwritten", nil, testEntries(10, 2, 1)},
		{"more committed than there is", testHardState(1, 1, 12), testEntries(11, 1, 1)},
	} {
		l, _ := mustOpenLog(t, newMemoryDisk(4096))
		must(t, l.restart(10, 1, nil))
		func() {
			defer func() {
				if message := fmt.Sprint(recover()); !strings.Contains(message, "sqlraft: ") {
					t.Errorf("%s: append panics with %q", c.name, message)
				}
			}()
			err := l.append(c.hs, c.entries, true)
			t.Errorf("%s: append returns %v", c.name, err)
		}()
	}
}

// Fails the first operation of each kind, then the second, until all goes well.
func TestFailedLogWritesNothingMore(t *testing.T) {
	for _, op := range []string{"create", "open", "write", "sync", "rename", "remove", "syncDirectory"} {
		failures := 0
		for _, cause := range []error{syscall.EIO, syscall.ENOSPC, syscall.EROFS} {
			for n := 0; ; n++ {
				d := newMemoryDisk(4096)
				l, _ := mustOpenLog(t, d)
				for range n {
					d.failNext(op, nil)
				}
				d.failNext(op, cause)
				first := writeHistory(l)
				if len(d.failures[op]) > 0 {
					break
				}
				failures++
				want := backend.ErrStorage
				if cause == syscall.ENOSPC {
					want = backend.ErrDiskFull
				}
				if !errors.Is(first, want) || !errors.Is(first, cause) || !strings.Contains(first.Error(), testLogDir) {
					t.Fatalf("%s %d fails with %v, the log says %v", op, n, cause, first)
				}
				var changed []string
				d.trace = func(s string) { changed = append(changed, s) }
				for _, err := range []error{l.append(nil, nil, true), l.append(testHardState(9, 9, 0), nil, false), l.setIdentity(nil), l.restart(1000, 9, nil), l.purge(1000)} {
					if err != first {
						t.Fatalf("%s %d failed with %v, later the log says %v", op, n, first, err)
					}
				}
				if err := l.close(); err != nil || len(changed) > 0 {
					t.Fatalf("the failed log was written to: %v; close says %v", changed, err)
				}
				l, _ = mustOpenLog(t, d.kill())
				must(t, l.close())
			}
		}
		if failures < 3 {
			t.Errorf("%s failed only %d times", op, failures)
		}
	}
}

// writeHistory does everything that a log can do and returns the first error.
func writeHistory(l *raftLog) error {
	if err := l.setIdentity([]byte("me")); err != nil {
		return err
	}
	for i := uint64(1); i < 20; i++ {
		if err := l.append(testHardState(1, 1, i-1), testEntries(i, 1, 700), i%3 > 0); err != nil {
			return err
		}
		if i%6 == 0 {
			if err := l.purge(i - 2); err != nil {
				return err
			}
		}
	}
	if err := l.restart(50, 2, nil); err != nil {
		return err
	}
	return l.append(nil, testEntries(51, 2, 10), true)
}

func TestOpenFailsWithAdvice(t *testing.T) {
	for _, op := range []string{"list", "open", "size", "read", "write", "sync", "syncDirectory", "remove"} {
		d := newMemoryDisk(4096)
		l, _ := mustOpenLog(t, d)
		must(t, writeHistory(l))
		must(t, l.close())
		d.failNext(op, syscall.EIO)
		if _, _, err := openLog(d, testLogDir); !errors.Is(err, backend.ErrStorage) || !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "disk errors") {
			t.Errorf("openLog says %v where %s fails", err, op)
		}
		_, rec := mustOpenLog(t, d)
		expectLog(t, rec, `"me" 2/0/50 after 50@2: 51@2(10)`)
	}
}

func TestFilesOfOthersAreLeftAlone(t *testing.T) {
	d := newMemoryDisk(4096)
	must(t, d.makeDirectory(testLogDir))
	others := []string{"snapshot.part", "1.log", "000000000000000g.log", "000000000000000A.log", "0000000000000000.log", "README"}
	for _, name := range others {
		_, err := d.create(testLogDir+"/"+name, 100)
		must(t, err)
	}
	for range 2 {
		l, _ := mustOpenLog(t, d)
		must(t, l.close())
	}
	for _, name := range others {
		if _, err := d.open(testLogDir + "/" + name); errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s was removed", name)
		}
	}
}

func TestSegmentOfANewerQuireIsRefused(t *testing.T) {
	d := newMemoryDisk(4096)
	l, _ := mustOpenLog(t, d)
	must(t, l.close())
	d.change(testLogDir+"/"+segmentName(1), func([]byte) []byte {
		batch := addRecord(newBatch(nil), kindHead, binary.LittleEndian.AppendUint32(nil, segmentVersion+1))
		finishBatch(batch, 0)
		return appendSectors(nil, batch, 1, 0)
	})
	if _, _, err := openLog(d, testLogDir); !errors.Is(err, backend.ErrNewerSchema) || errors.Is(err, backend.ErrDamaged) || !strings.Contains(err.Error(), "newer") {
		t.Errorf("openLog says %v", err)
	}
}

// Intact sectors do not make sense of what is in them.
func TestImpossibleRecordsAreDamage(t *testing.T) {
	message := func(kind byte, m proto.Message) []byte {
		record, err := addMessage(nil, kind, m)
		must(t, err)
		return record
	}
	for name, records := range map[string][]byte{
		"commit beyond the end":    message(kindHard, testHardState(1, 1, 3)),
		"gap":                      message(kindEntry, testEntries(4, 1, 10)[0]),
		"entry 0":                  message(kindEntry, testEntries(0, 1, 10)[0]),
		"entry that is none":       addRecord(nil, kindEntry, []byte{0xff}),
		"hard state that is none":  addRecord(nil, kindHard, []byte{0xff}),
		"head in the middle":       addRecord(nil, kindHead, segmentHead{seq: 1, size: 4096, first: 1}.encode()),
		"unknown kind":             addRecord(nil, 99, nil),
		"cut off":                  addRecord(nil, kindIdentity, []byte("me"))[:6],
		"first segment to come":    addRecord(nil, kindFirst, binary.LittleEndian.AppendUint64(nil, 2)),
		"first segment of nothing": addRecord(nil, kindFirst, nil),
	} {
		d := newMemoryDisk(4096)
		l, _ := mustOpenLog(t, d)
		must(t, l.append(testHardState(1, 1, 2), testEntries(1, 1, 10, 10), true))
		must(t, l.put(l.tail, append(newBatch(nil), records...)))
		must(t, l.close())
		if _, _, err := openLog(d, testLogDir); !errors.Is(err, backend.ErrDamaged) || !strings.Contains(err.Error(), "at byte 1024") {
			t.Errorf("%s: openLog says %v", name, err)
		}
	}
}

// nowhere takes everything and keeps nothing.
type nowhere struct{ disk }

func (nowhere) write([]byte, int64) error { return nil }
func (nowhere) sync() error               { return nil }
func (nowhere) close() error              { return nil }
func (nowhere) size() (int64, error)      { return 0, nil }
func (nowhere) read([]byte, int64) error  { return nil }

func TestAppendDoesNotAllocate(t *testing.T) {
	l, _ := mustOpenLog(t, newMemoryDisk(1<<30))
	l.tail.f = nowhere{}
	entries := testEntries(1, 1, 1024, 1024, 100, 100<<10)
	hs := testHardState(1, 1, 0)
	index := uint64(0)
	allocs := testing.AllocsPerRun(100, func() {
		for _, e := range entries {
			index++
			*e.Index = index
		}
		*hs.Commit = index - 1
		if err := l.append(hs, entries, true); err != nil {
			t.Fatal(err)
		}
	})
	if allocs > 0 {
		t.Errorf("an append allocates %v times", allocs)
	}
}

// segmentOf makes a segment of any records: each four bytes are one, or the end of a batch.
func segmentOf(t *testing.T, seq uint64, script []byte) []byte {
	var content []byte
	batch := newBatch(nil)
	flush := func() {
		at := uint32(len(content) / sectorBytes)
		finishBatch(batch, at)
		content = appendSectors(content, batch, seq, at)
		batch = newBatch(batch)
	}
	for ; len(script) >= 4; script = script[4:] {
		var err error
		a, b, c := uint64(script[1]), uint64(script[2]), uint64(script[3])
		switch script[0] % 9 {
		case 0:
			flush()
		case 1:
			head := segmentHead{seq: seq, size: 4096, first: a % 4, previousEnd: uint32(b % 8), last: c % 16, lastTerm: c / 16}
			batch = addRecord(batch, kindHead, head.encode())
		case 2:
			batch = addRecord(batch, kindIdentity, script[1:1+a%4])
		case 3:
			batch, err = addMessage(batch, kindHard, testHardState(a, b, c%16))
		case 4, 5:
			batch, err = addMessage(batch, kindEntry, testEntries(a%16, b, int(c)*4)[0])
		case 6:
			batch = addRecord(batch, kindFirst, binary.LittleEndian.AppendUint64(nil, a%4))
		case 7:
			batch = addRecord(batch, kindSeal, nil)
		case 8:
			batch = append(batch, script[1:4]...)
		}
		must(t, err)
	}
	if len(batch) > batchHeaderBytes {
		flush()
	}
	return content
}

// FuzzSegment opens a log of one or two segments that hold anything, be it in intact sectors or not.
func FuzzSegment(f *testing.F) {
	d := newMemoryDisk(4096)
	l, _ := mustOpenLog(f, d)
	for i := uint64(1); i < 5; i++ { // the third entry begins the second segment
		must(f, l.append(testHardState(1, 1, i-1), testEntries(i, 1, 700), true))
	}
	f.Add(d.names[testLogDir+"/"+segmentName(1)].now, d.names[testLogDir+"/"+segmentName(2)].now, true)
	one := []byte{1, 1, 0, 0, 0, 0, 0, 0, 2, 2, 'm', 'e', 3, 1, 1, 1, 4, 1, 1, 0, 4, 2, 1, 9, 0, 0, 0, 0, 4, 3, 1, 0, 4, 4, 1, 0, 0, 0, 0, 0}
	f.Add(one, []byte{}, false)
	two := []byte{1, 1, 3, 4 + 16, 2, 2, 'm', 'e', 3, 1, 1, 1, 0, 0, 0, 0, 3, 2, 1, 2, 4, 3, 2, 0}
	f.Add(one, two, false)
	f.Add(append(one, 7, 0, 0, 0), append(two, 4, 4, 2, 0, 4, 5, 2, 0), false)
	f.Add(one, append(two, 4, 4, 2, 0, 4, 5, 2, 0, 0, 0, 0, 0, 6, 2, 0, 0), false)
	f.Add([]byte{}, append([]byte{1, 2, 0, 4 + 16}, two[4:]...), false) // a restart

	f.Fuzz(func(t *testing.T, one, two []byte, raw bool) {
		d := newMemoryDisk(4096)
		must(t, d.makeDirectory(testLogDir))
		for i, content := range [][]byte{one, two} {
			if i == 1 && len(content) == 0 {
				continue
			}
			seq := uint64(i + 1)
			if !raw {
				content = segmentOf(t, seq, content)
			}
			if n := len(content); n < 4096 { // so that a head can be right about the size
				content = append(slices.Clone(content), make([]byte, 4096-n)...)
			}
			path := testLogDir + "/" + segmentName(seq)
			_, err := d.create(path, 0)
			must(t, err)
			d.change(path, func([]byte) []byte { return content })
		}
		l, rec, err := openLog(d, testLogDir)
		if err != nil {
			if !errors.Is(err, backend.ErrDamaged) && !errors.Is(err, backend.ErrNewerSchema) {
				t.Fatalf("openLog says %v", err)
			}
			return
		}
		for i, e := range rec.entries {
			if e.GetIndex() != rec.start+uint64(i)+1 {
				t.Fatalf("entry %d after %d has index %d", i, rec.start, e.GetIndex())
			}
		}
		if last := rec.start + uint64(len(rec.entries)); rec.hard.GetCommit() > last || l.last != last {
			t.Fatalf("the log ends at %d, or %d, and %d is committed", last, l.last, rec.hard.GetCommit())
		}
		must(t, l.append(nil, testEntries(l.last+1, rec.hard.GetTerm(), 700), true))
		must(t, l.close())
		_, again := mustOpenLog(t, d)
		if len(again.entries) != len(rec.entries)+1 {
			t.Fatalf("found %s\nafter %s and an entry", again.describe(), rec.describe())
		}
	})
}
