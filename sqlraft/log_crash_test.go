package sqlraft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

// forEachSeed runs test with seeds from 0 on, at least least of them and as many as fit into the time, or with QUIRE_SEED
// alone. A failure names its seed.
func forEachSeed(t *testing.T, least uint64, limit time.Duration, test func(t *testing.T, seed uint64)) {
	t.Helper()
	if text := os.Getenv("QUIRE_SEED"); text != "" {
		seed, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatalf("QUIRE_SEED: %v", err)
		}
		test(t, seed)
		return
	}
	var seed uint64
	defer func() {
		if t.Failed() {
			t.Logf("seed %d: QUIRE_SEED=%d go test -run '^%s$' ./sqlraft", seed, seed, t.Name())
		} else {
			t.Logf("seeds 0 to %d", seed-1)
		}
	}()
	for start := time.Now(); seed < least || time.Since(start) < limit; seed++ {
		test(t, seed)
	}
}

// logModel is what a log should hold. Its slices are never changed.
type logModel struct {
	identity       string
	hard           hardState
	base, baseTerm uint64 // of the last restart
	entries        []*raftpb.Entry
	purged         uint64 // the log may begin anywhere from base up to here
}

func (m *logModel) last() uint64 { return m.base + uint64(len(m.entries)) }

// matches says whether rec is this state.
func (m *logModel) matches(rec *recovered) bool {
	if string(rec.identity) != m.identity || (hardState{}).orElse(rec.hard) != m.hard {
		return false
	}
	if rec.start < m.base || rec.start > max(m.base, m.purged) || rec.start+uint64(len(rec.entries)) != m.last() {
		return false
	}
	entries, term := m.entries[rec.start-m.base:], m.baseTerm
	if rec.start > m.base {
		term = m.entries[rec.start-m.base-1].GetTerm()
	}
	return rec.startTerm == term && slices.EqualFunc(entries, rec.entries, func(a, b *raftpb.Entry) bool { return proto.Equal(a, b) })
}

func (rec *recovered) String() string { return rec.describe() }

func (m *logModel) String() string {
	rec := &recovered{identity: []byte(m.identity), hard: m.hard.message(), start: m.base, startTerm: m.baseTerm, entries: m.entries}
	return fmt.Sprintf("%s (purged up to %d)", rec.describe(), m.purged)
}

// logHistory is a log with all the states that it may be found in after a power cut, the newest last.
type logHistory struct {
	t      *testing.T
	r      *rand.Rand
	d      *memoryDisk
	l      *raftLog
	states []logModel
	trace  []note
}

// note is what was done, put into words only when it is asked for.
type note struct {
	format string
	args   []any
}

func (h *logHistory) fatalf(format string, args ...any) {
	h.t.Helper()
	var story strings.Builder
	for _, n := range h.trace[max(0, len(h.trace)-60):] {
		fmt.Fprintf(&story, "\n  "+n.format, n.args...)
	}
	h.t.Fatalf("%s\nafter%s", fmt.Sprintf(format, args...), story.String())
}

func (h *logHistory) note(format string, args ...any) {
	h.trace = append(h.trace, note{format, args})
}

// open opens the log, which must be in one of the states, and takes that for durable from now on. The power may be cut in
// the middle.
func (h *logHistory) open() {
	for {
		cut := 0
		if h.r.IntN(4) == 0 {
			cut = 1 + h.r.IntN(14)
			h.d.cutAfter(cut)
		}
		l, rec, err := openLog(h.d, testLogDir)
		if err == nil {
			h.d.cutAfter(0)
			for i := len(h.states) - 1; ; i-- {
				if i < 0 {
					h.fatalf("found %s\nwanted one of %v", rec.describe(), h.states)
				}
				if h.states[i].matches(rec) {
					h.note("found %v", rec)
					h.states = []logModel{h.states[i]}
					h.l = l
					return
				}
			}
		}
		if cut == 0 || !errors.Is(err, errPowerCut) {
			h.fatalf("openLog says %v\nwanted one of %v", err, h.states)
		}
		h.note("the power is cut while opening, operation %d", cut)
		h.d = h.d.crash(h.r)
	}
}

// step does one thing to the log, maybe while something fails, and then maybe ends the process or the power.
func (h *logHistory) step() {
	now := h.states[len(h.states)-1]
	fault := ""
	switch h.r.IntN(12) {
	case 0:
		n := 1 + h.r.IntN(6)
		fault = fmt.Sprintf("power cut in operation %d", n)
		h.d.cutAfter(n)
	case 1:
		op := []string{"write", "sync", "create", "rename", "remove", "syncDirectory", "open"}[h.r.IntN(7)]
		fault = op + " fails"
		h.d.failNext(op, syscall.EIO)
	}
	next, durable, err := h.change(now)
	switch {
	case err == nil && durable:
		h.states = []logModel{next}
	default:
		h.states = append(h.states, next)
	}
	if err != nil {
		if fault == "" {
			h.fatalf("unexpected error: %v", err)
		}
		h.note("%s: %v", fault, err)
		if again := h.l.append(testHardState(1000, 1, 0), nil, true); again != err {
			h.fatalf("after %v the log says %v", err, again)
		}
	}
	h.d.cutAfter(0)
	clear(h.d.failures)
	switch n := h.r.IntN(10); {
	case err != nil && n < 3 && !errors.Is(err, errPowerCut):
		h.note("kill")
		h.d = h.d.kill()
		h.open()
	case err != nil || n == 0:
		h.note("power cut")
		h.d = h.d.crash(h.r)
		h.open()
	case n == 1:
		h.note("kill")
		h.d = h.d.kill()
		h.open()
	case n == 2 && h.r.IntN(2) == 0:
		h.note("close")
		if err := h.l.close(); err != nil {
			h.fatalf("close says %v", err)
		}
		h.states = h.states[len(h.states)-1:] // close has synced
		h.open()
	}
}

// change does something that leads from now to next. Durable says that it should be so once it has succeeded.
func (h *logHistory) change(now logModel) (next logModel, durable bool, err error) {
	r := h.r
	next = now
	switch n := r.IntN(40); {
	case n == 0:
		next.identity = fmt.Sprintf("identity %d", r.IntN(1000))
		h.note("identity %q", next.identity)
		return next, true, h.l.setIdentity([]byte(next.identity))

	case n == 1:
		next.base = now.hard.commit + uint64(r.IntN(20))
		next.baseTerm = max(1, now.hard.term) + uint64(r.IntN(2))
		next.entries, next.purged = nil, 0
		var hs *raftpb.HardState
		switch r.IntN(3) {
		case 0: // the one it has
			next.hard = hardState{max(now.hard.term, next.baseTerm), now.hard.vote, next.base}
			if next.hard.term != now.hard.term {
				next.hard.vote = 0
			}
		case 1:
			next.hard = hardState{next.baseTerm, uint64(r.IntN(4)), next.base}
			hs = next.hard.message()
		case 2: // raft has already committed entries that follow the snapshot
			next.hard = hardState{next.baseTerm + 1, uint64(r.IntN(4)), next.base}
			hs = next.hard.message()
			hs.Commit = new(next.base + 3)
		}
		h.note("restart after %d@%d with %v", next.base, next.baseTerm, hs)
		return next, true, h.l.restart(next.base, next.baseTerm, hs)

	case n < 8:
		upTo := uint64(r.IntN(int(now.hard.commit) + 1))
		next.purged = max(now.purged, upTo)
		h.note("purge %d", upTo)
		// Whether it has written or not, what else is there need not be durable by that.
		return next, false, h.l.purge(upTo)

	default:
		// Raft keeps the terms of its entries in order and below its own.
		if r.IntN(4) == 0 {
			next.hard.term++
			next.hard.vote = uint64(r.IntN(4))
		}
		next.hard.term = max(next.hard.term, 1)
		var added []*raftpb.Entry
		if r.IntN(5) > 0 {
			first := now.last() + 1
			if low := max(now.hard.commit, now.base, now.purged); r.IntN(4) == 0 && now.last() > low {
				first = low + 1 + uint64(r.IntN(int(now.last()-low)))
			}
			sizes := make([]int, 1+r.IntN(4))
			for i := range sizes {
				sizes[i] = []int{0, r.IntN(100), r.IntN(1000), r.IntN(6000)}[min(r.IntN(10), 3)%4]
			}
			added = testEntries(first, next.hard.term, sizes...)
			for _, e := range added { // zeros, as real data has them, and other data than in an entry of the same index and term
				if n := len(e.Data); n > 0 {
					clear(e.Data[r.IntN(n):])
				}
			}
			next.entries = append(slices.Clone(now.entries[:first-1-now.base]), added...)
		}
		if last := next.last(); next.hard.commit < last {
			next.hard.commit += uint64(r.IntN(int(last-next.hard.commit) + 1))
		}
		var hs *raftpb.HardState
		if next.hard != now.hard {
			hs = next.hard.message()
		}
		sync := r.IntN(3) > 0
		h.note("append %v, %d entries, sync %t -> %v", hs, len(added), sync, &next)
		return next, sync, h.l.append(hs, added, sync)
	}
}

// Broke, in turn: nothing synced is lost; nothing is invented; no crash is taken for damage.
func TestLogSurvivesPowerCuts(t *testing.T) {
	forEachSeed(t, 1000, 5*time.Second, func(t *testing.T, seed uint64) {
		r := rand.New(rand.NewPCG(seed, 1))
		h := &logHistory{t: t, r: r, d: newMemoryDisk(int64(4+r.IntN(28)) * sectorBytes), states: []logModel{{}}}
		h.open()
		for range 40 {
			h.step()
		}
		if err := h.l.close(); err != nil {
			h.fatalf("close says %v", err)
		}
	})
}

// damagedLog is a closed log of several segments.
func damagedLog(t *testing.T, r *rand.Rand) (d *memoryDisk, l *raftLog, state string) {
	t.Helper()
	d = newMemoryDisk(int64(6+r.IntN(10)) * sectorBytes)
	l, _ = mustOpenLog(t, d)
	must(t, l.setIdentity([]byte("me")))
	index := uint64(0)
	for range 4 + r.IntN(12) {
		first := index + 1
		if index > 2 && r.IntN(5) == 0 {
			first--
		}
		sizes := make([]int, 1+r.IntN(3))
		for i := range sizes {
			sizes[i] = r.IntN(900)
		}
		entries := testEntries(first, 1, sizes...)
		if r.IntN(2) == 0 {
			clear(entries[0].Data)
		}
		index = first + uint64(len(sizes)) - 1
		must(t, l.append(testHardState(1, 1, first-1), entries, true))
		if r.IntN(6) == 0 {
			must(t, l.purge(first-1))
		}
	}
	must(t, l.close())
	again, rec := mustOpenLog(t, d.copy())
	must(t, again.close())
	return d, l, rec.describe()
}

func TestDamageIsReported(t *testing.T) {
	forEachSeed(t, 300, 2*time.Second, func(t *testing.T, seed uint64) {
		r := rand.New(rand.NewPCG(seed, 2))
		original, l, state := damagedLog(t, r)
		for range 12 {
			d := original.copy()
			nth := r.IntN(len(l.segments))
			newest := nth == len(l.segments)-1
			s := l.segments[nth]
			path := testLogDir + "/" + segmentName(s.seq)
			// The sectors that were synced, and where the last batch of the log begins.
			used, lastBatch := uint32(0), uint32(0)
			m := segmentImage{raw: overwrite(slices.Clone(d.names[path].now), nil, s.size), seq: s.seq}
			for {
				_, _, after, err := m.batch(used)
				must(t, err)
				if after == used {
					break
				}
				used, lastBatch = after, used
			}
			at := uint32(r.IntN(int(used)))
			last := newest && at >= lastBatch // here, sectors that were never written look the same
			what, forgivable := "", false
			d.change(path, func(content []byte) []byte {
				sector := content[int(at)*sectorBytes : (int(at)+1)*sectorBytes]
				switch r.IntN(6) {
				case 0, 1:
					bit := r.IntN(sectorBytes * 8)
					what = fmt.Sprintf("bit %d flipped", bit)
					sector[bit/8] ^= 1 << (bit % 8)
				case 2:
					what = "random bytes"
					for i := range 1 + r.IntN(sectorBytes) {
						sector[sectorBytes-1-i] = byte(1 + r.IntN(255))
					}
				case 3:
					what, forgivable = "zeros", last || m.tag(at)&1 == 1 && at == used-1 && !newest
					clear(sector)
				case 4:
					what = "another sector"
					other := r.IntN(int(used))
					if other == int(at) {
						what = ""
					}
					copy(sector, content[other*sectorBytes:])
				case 5:
					what = "end of the file"
					content = content[:int(at)*sectorBytes]
				}
				return content
			})
			if what == "" {
				continue
			}
			again, rec, err := openLog(d, testLogDir)
			switch {
			case errors.Is(err, backend.ErrDamaged):
				if !strings.Contains(err.Error(), "docs/raft.md") || !strings.Contains(err.Error(), testLogDir) {
					t.Fatalf("%s: %v", what, err)
				}
			case err != nil:
				t.Fatalf("%s in sector %d of %s: openLog says %v, want ErrDamaged", what, at, path, err)
			case !forgivable:
				t.Fatalf("%s in sector %d of %d, segment %d of %d: openLog finds\n%s\nof\n%s", what, at, used, nth+1, len(l.segments), rec.describe(), state)
			case last && strings.Count(rec.describe(), "@") > strings.Count(state, "@"):
				t.Fatalf("%s: openLog invents: %s of %s", what, rec.describe(), state)
			default:
				must(t, again.close())
			}
		}
	})
}

func TestEveryFlippedBitIsReported(t *testing.T) {
	original, l, _ := damagedLog(t, rand.New(rand.NewPCG(1, 1)))
	flipped := 0
	for nth, s := range l.segments {
		path := testLogDir + "/" + segmentName(s.seq)
		content := original.names[path].now
		used := len(content) / sectorBytes * sectorBytes
		if nth == len(l.segments)-1 {
			used = int(l.tail.end) * sectorBytes
		}
		for bit := 0; bit < used*8; bit += 5 {
			at := bit / 8
			if tag := binary.LittleEndian.Uint32(content[at/sectorBytes*sectorBytes+4:]); uint64(tag>>1) != s.seq {
				continue // of an earlier life of the file
			}
			content[at] ^= 1 << (bit % 8)
			again, rec, err := openLog(original, testLogDir)
			if !errors.Is(err, backend.ErrDamaged) {
				t.Fatalf("byte %d of %s: openLog finds %v (%v)", at, path, rec, err)
			}
			if again != nil {
				t.Fatal("openLog returns a log and an error")
			}
			content[at] ^= 1 << (bit % 8)
			flipped++
		}
	}
	again, _ := mustOpenLog(t, original)
	must(t, again.close())
	if flipped < 1000 {
		t.Fatalf("flipped only %d bits", flipped)
	}
}

func TestMissingSegmentIsReported(t *testing.T) {
	for seed := range uint64(50) {
		original, l, _ := damagedLog(t, rand.New(rand.NewPCG(seed, 3)))
		for i, s := range l.segments {
			if len(l.segments) == 1 {
				continue // without any file it is a new log
			}
			d := original.copy()
			must(t, d.remove(testLogDir+"/"+segmentName(s.seq)))
			if _, _, err := openLog(d, testLogDir); !errors.Is(err, backend.ErrDamaged) || !strings.Contains(err.Error(), segmentName(s.seq)+" is missing") {
				t.Fatalf("seed %d, segment %d of %d is missing: openLog says %v", seed, i+1, len(l.segments), err)
			}
			d = original.copy()
			must(t, d.rename(testLogDir+"/"+segmentName(s.seq), testLogDir+"/"+segmentName(s.seq+100)))
			if _, _, err := openLog(d, testLogDir); !errors.Is(err, backend.ErrDamaged) {
				t.Fatalf("seed %d, segment %d of %d has another name: openLog says %v", seed, i+1, len(l.segments), err)
			}
		}
	}
}

// A segment of another log, which looks just like it, or another copy does not pass for one of this.
func TestForeignSegmentIsReported(t *testing.T) {
	write := func(identity string, hard hardState, term uint64) (*memoryDisk, *raftLog) {
		d := newMemoryDisk(4096)
		l, _ := mustOpenLog(t, d)
		must(t, l.setIdentity([]byte(identity)))
		must(t, l.append(hard.message(), testEntries(1, term, 700, 700), true))
		for index := uint64(3); index < 20; index++ {
			must(t, l.append(nil, testEntries(index, term, 700), true))
		}
		must(t, l.close())
		return d, l
	}
	mine, l := write("me", hardState{2, 1, 1}, 1)
	for _, c := range []struct {
		identity string
		hard     hardState
		term     uint64
	}{{"he", hardState{2, 1, 1}, 1}, {"me", hardState{2, 2, 1}, 1}, {"me", hardState{2, 1, 2}, 1}, {"me", hardState{2, 1, 1}, 2}} {
		other, k := write(c.identity, c.hard, c.term)
		for i, s := range l.segments[1:] {
			path := testLogDir + "/" + segmentName(s.seq)
			d := mine.copy()
			d.change(path, func([]byte) []byte { return overwrite(slices.Clone(other.names[path].now), nil, k.segments[i+1].size) })
			if _, _, err := openLog(d, testLogDir); !errors.Is(err, backend.ErrDamaged) {
				t.Errorf("openLog takes another log's %s: %v", path, err)
			}
		}
	}
}
