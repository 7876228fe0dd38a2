package sqlraft

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"slices"
	"sort"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

// comparedWorld is a cluster whose members compare: a log of operations, which each member has applied up to some point.
type comparedWorld struct {
	t       *testing.T
	log     []comparedOperation
	members []*comparedMember
	c       *comparer // of members[0], the leader
	// between is called whenever time goes by: others may write then.
	between func()

	mu        sync.Mutex
	asked     []part   // that were not empty
	alarms    []uint64 // in the order in which they were raised
	differed  []Difference
	alarmFail error
}

// comparedOperation is a put of so many rows of a key, or a compaction.
type comparedOperation struct {
	key     string
	rows    int
	bytes   int64
	deleted bool
	compact int64
}

type comparedRow struct {
	rev     int64
	key     string
	bytes   int64
	deleted bool
	hash    uint32
}

// comparedMember is a History in memory. Its bytes are only claimed.
type comparedMember struct {
	w       *comparedWorld
	id      uint64
	life    uint64
	rnd     *rand.Rand // nil: it applies what it has to
	down    error
	patient int64                                                    // bytes that it hashes before the time is up; 0: any number
	mishap  func(index int, o comparedOperation) []comparedOperation // what it makes of an operation; nil: the same
	answer  func(a *partAnswer)                                      // changes what it says

	mu      sync.Mutex
	applied int
	rows    []comparedRow
	rev     int64
	compact int64
	read    int
}

func newComparedWorld(t *testing.T, members int) *comparedWorld {
	w := &comparedWorld{t: t, between: func() {}}
	for i := range members {
		w.members = append(w.members, &comparedMember{w: w, id: uint64(i + 1), life: uint64(i + 100), rev: 1})
	}
	w.lead()
	return w
}

// lead has the leader begin anew.
func (w *comparedWorld) lead() {
	w.c = newComparer(1, w.members[0], w, time.Minute, func(d Difference) { w.differed = append(w.differed, d) })
}

func (w *comparedWorld) write(operations ...comparedOperation) { w.log = append(w.log, operations...) }

// fill writes rows of so many bytes each, each of a key of its own.
func (w *comparedWorld) fill(rows int, bytes int64) {
	for range rows {
		w.write(comparedOperation{key: fmt.Sprint("k", len(w.log)), rows: 1, bytes: bytes})
	}
	w.members[0].apply(len(w.log))
}

func (w *comparedWorld) check() Comparison {
	w.t.Helper()
	done, err := w.c.check(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return done
}

func (w *comparedWorld) membership() (m backend.Membership) {
	for _, one := range w.members {
		m.Members = append(m.Members, backend.Member{ID: one.id})
	}
	return m
}

func (w *comparedWorld) barrier(context.Context) (uint64, error) {
	w.between()
	w.members[0].apply(len(w.log))
	return uint64(len(w.log)), nil
}

func (w *comparedWorld) askPart(ctx context.Context, id uint64, q part) (partAnswer, error) {
	m := w.members[id-1]
	if m.down != nil {
		return partAnswer{}, m.down
	}
	m.apply(max(int(q.Index), m.somewhere()))
	a, err := answerPart(ctx, m, m.life, q)
	if m.answer != nil {
		m.answer(&a)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if q.UpTo > q.After {
		w.asked = append(w.asked, q)
	}
	return a, err
}

// somewhere is a place in the log.
func (m *comparedMember) somewhere() int {
	if m.rnd == nil {
		return 0
	}
	return m.rnd.IntN(len(m.w.log) + 1)
}

// goOn lets time go by at the leader. The others are asked at the same time, and go on when they answer.
func (m *comparedMember) goOn() {
	if m == m.w.members[0] {
		m.w.between()
		m.apply(m.somewhere())
	}
}

func (m *comparedMember) apply(upTo int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for ; m.applied < upTo; m.applied++ {
		all := []comparedOperation{m.w.log[m.applied]}
		if m.mishap != nil {
			all = m.mishap(m.applied, all[0])
		}
		for _, o := range all {
			if o.compact != 0 {
				m.compact = max(m.compact, o.compact)
				continue
			}
			m.rev++
			for sub := range o.rows {
				sum := crc32.ChecksumIEEE(fmt.Appendf(nil, "%d.%d %s %t", m.rev, sub, o.key, o.deleted))
				m.rows = append(m.rows, comparedRow{rev: m.rev, key: o.key, bytes: o.bytes, deleted: o.deleted, hash: sum})
			}
		}
	}
}

func (m *comparedMember) Revision() int64 {
	m.goOn()
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rev
}

func (m *comparedMember) CompactRevision() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.compact
}

func (m *comparedMember) HashSome(_ context.Context, after, upTo int64, maxRows int, maxBytes int64) (reached int64, hash uint32, compact int64, err error) {
	m.goOn()
	m.mu.Lock()
	defer m.mu.Unlock()
	if upTo > m.rev {
		return 0, 0, 0, backend.ErrFutureRev
	}
	newest := map[string]int64{} // of the keys at the compaction revision
	for _, r := range m.rows {
		if r.rev <= m.compact {
			newest[r.key] = r.rev
		}
	}
	first := sort.Search(len(m.rows), func(i int) bool { return m.rows[i].rev > after })
	rows, bytes, reached := 0, int64(0), upTo
	for i := first; i < len(m.rows) && m.rows[i].rev <= upTo; i++ {
		r := m.rows[i]
		if i > first && r.rev != m.rows[i-1].rev && (rows >= maxRows || bytes >= maxBytes) {
			reached = r.rev - 1
			break
		}
		rows++
		bytes += r.bytes
		if r.rev > m.compact || newest[r.key] == r.rev && (!r.deleted || r.rev == m.compact) {
			hash = hash*31 + r.hash
		}
	}
	m.read += rows
	if m.patient != 0 && bytes > m.patient {
		return 0, 0, 0, context.DeadlineExceeded
	}
	if compact = m.compact; compact == 0 {
		compact = -1
	}
	return reached, hash, compact, nil
}

func (m *comparedMember) Write(_ context.Context, cmd backend.Command) (proto.Message, error) {
	if m.w.alarmFail != nil {
		return nil, m.w.alarmFail
	}
	alarm := cmd.Request.(*pb.AlarmRequest)
	if alarm.Action != pb.AlarmRequest_ACTIVATE || alarm.Alarm != pb.AlarmType_CORRUPT {
		m.w.t.Errorf("wrote %v", alarm)
	}
	m.w.alarms = append(m.w.alarms, alarm.MemberID)
	return &pb.AlarmResponse{}, nil
}

// spoil changes a row of a member behind its back.
func (m *comparedMember) spoil(row int) {
	m.apply(len(m.w.log))
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rows[row].hash += uint32(m.id)
}

// covered says up to which revision the parts that were asked for leave no gap.
func covered(parts []part) (upTo int64) {
	sorted := slices.Clone(parts)
	slices.SortFunc(sorted, func(a, b part) int { return int(a.After - b.After) })
	for _, p := range sorted {
		if p.After > upTo {
			break
		}
		upTo = max(upTo, p.UpTo)
	}
	return upTo
}

// TestARoundComparesEverything in parts of bounded size, and then nothing more until it is time again.
func TestARoundComparesEverything(t *testing.T) {
	w := newComparedWorld(t, 3)
	w.fill(6*maxPartBytes>>20+3, 1<<20)
	w.write(comparedOperation{key: "k3", rows: 40, bytes: maxPartBytes >> 4}) // larger than a part
	w.fill(3*maxPartRows/2, 1)
	leader := w.members[0]
	checks := 0
	for done := (Comparison{}); !done.Whole; checks++ {
		before := leader.read
		if done = w.check(); done.Peers != 2 || len(done.Skipped) != 0 {
			t.Fatalf("check %d: %+v", checks, done)
		}
		if read := leader.read - before; read > 2*maxPartRows+1000 {
			t.Errorf("check %d has read %d rows", checks, read)
		}
		if checks == 0 && w.asked[len(w.asked)-1].UpTo != leader.rev {
			t.Error("the first check leaves out the newest revisions")
		}
	}
	if checks < 8 || checks > 10 { // 6 of many bytes, the large revision, 2 of many rows
		t.Errorf("a round took %d checks", checks)
	}
	if got := covered(w.asked); got != leader.rev {
		t.Errorf("a round went without a gap up to revision %d of %d", got, leader.rev)
	}
	for _, p := range w.asked {
		var bytes int64
		for _, r := range leader.rows {
			if r.rev > p.After && r.rev < p.UpTo { // the last one in any case
				bytes += r.bytes
			}
		}
		if bytes >= maxPartBytes {
			t.Errorf("revisions after %d up to %d hold %d bytes, without the last", p.After, p.UpTo-1, bytes)
		}
	}

	read := leader.read
	for range roundRest - 1 {
		w.check()
	}
	if leader.read != read {
		t.Errorf("%d rows were read again although nothing was written", leader.read-read)
	}
	if w.check(); leader.read == read {
		t.Error("nothing was read again after a long time")
	}
	if len(w.differed) != 0 || len(w.alarms) != 0 {
		t.Errorf("equal members differ: %+v, alarms %x", w.differed, w.alarms)
	}
}

// TestTheNewestIsAlwaysCompared: however long a round takes, and however much is written between two checks.
func TestTheNewestIsAlwaysCompared(t *testing.T) {
	w := newComparedWorld(t, 3)
	w.fill(500, 1<<20)
	for i := range 8 {
		w.fill(1+i*40, 1<<20)
		w.asked = nil
		w.check()
		newest := slices.ContainsFunc(w.asked, func(p part) bool { return p.UpTo == w.members[0].rev })
		if !newest {
			t.Errorf("check %d asks for %v, the newest revision is %d", i, w.asked, w.members[0].rev)
		}
	}
}

// TestWhoCameBackIsCompared: a member that was away or was started again is compared from the beginning, at once.
func TestWhoCameBackIsCompared(t *testing.T) {
	for name, comesBack := range map[string]func(w *comparedWorld){
		"started again": func(w *comparedWorld) { w.members[2].life++ },
		"was away":      func(w *comparedWorld) { w.members[2].down = errors.New("away"); w.check(); w.members[2].down = nil },
		"new": func(w *comparedWorld) {
			m := &comparedMember{w: w, id: 4, life: 1, rev: 1}
			w.members = append(w.members, m)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newComparedWorld(t, 3)
			w.fill(10, 1)
			for range 3 {
				w.check()
			}
			read := w.members[0].read
			comesBack(w)
			last := w.members[len(w.members)-1]
			last.spoil(4)
			w.check()
			if !slices.Equal(w.alarms, []uint64{last.id}) {
				t.Errorf("alarms for %x, %d rows read", w.alarms, w.members[0].read-read)
			}
		})
	}
}

// TestWhoIsCorrupt: the majority is right; without one, in a cluster of two it is the other one, else nobody knows.
func TestWhoIsCorrupt(t *testing.T) {
	for _, c := range []struct {
		members      int
		spoilt, down []uint64
		want         []uint64
		fits         bool // for the leader, whom it asks at its start
	}{
		{2, []uint64{2}, nil, []uint64{2}, false},
		{2, []uint64{1}, nil, []uint64{2}, false},
		{3, []uint64{2}, nil, []uint64{2}, true},
		{3, []uint64{3}, nil, []uint64{3}, true},
		{3, []uint64{1}, nil, []uint64{1}, false},
		{3, []uint64{2}, []uint64{3}, []uint64{0}, false},
		{3, []uint64{1, 2}, nil, []uint64{0}, false},
		{3, []uint64{2}, []uint64{2}, nil, true},
		{4, []uint64{4}, []uint64{3}, []uint64{0}, false},
		{4, []uint64{4}, nil, []uint64{4}, true},
		{5, []uint64{2, 4}, nil, []uint64{2, 4}, true},
		{5, []uint64{1, 5}, nil, []uint64{1, 5}, false},
		{5, []uint64{2, 4}, []uint64{5}, []uint64{0}, false},
		{5, []uint64{1}, []uint64{2}, []uint64{1}, false},
	} {
		t.Run(fmt.Sprintf("%d members, %d spoilt, %d down", c.members, c.spoilt, c.down), func(t *testing.T) {
			w := newComparedWorld(t, c.members)
			w.fill(10, 1)
			for _, id := range c.spoilt {
				w.members[id-1].spoil(5)
			}
			for _, id := range c.down {
				w.members[id-1].down = errors.New("away")
			}
			done := w.check()
			if !slices.Equal(w.alarms, c.want) {
				t.Errorf("alarms for %x, want %x", w.alarms, c.want)
			}
			if done.Peers != c.members-1-len(c.down) || len(done.Skipped) != len(c.down) {
				t.Errorf("%+v", done)
			}
			if c.want != nil {
				if len(w.differed) != 1 || w.differed[0].After != 0 || w.differed[0].UpTo != 11 || len(w.differed[0].Found) != c.members-len(c.down) {
					t.Errorf("told of %+v", w.differed)
				}
			}
			w.alarms = nil
			w.lead()
			if _, err := w.c.checkWhole(t.Context()); (err == nil) != c.fits || err != nil && err.Error() != "1 found data inconsistency with peers" {
				t.Errorf("the initial check says %v", err)
			}
			if len(w.alarms) != 0 {
				t.Errorf("the initial check raises alarms for %x", w.alarms)
			}
		})
	}
}

// TestMistakesInApply: a member that does not make of an entry what others make of it is found, whatever that is.
func TestMistakesInApply(t *testing.T) {
	for name, mishap := range map[string]func(index int, o comparedOperation) []comparedOperation{
		"another key": func(_ int, o comparedOperation) []comparedOperation {
			o.key += "?"
			return []comparedOperation{o}
		},
		"left out":              func(int, comparedOperation) []comparedOperation { return nil },
		"done twice":            func(_ int, o comparedOperation) []comparedOperation { return []comparedOperation{o, o} },
		"compacted instead":     func(int, comparedOperation) []comparedOperation { return []comparedOperation{{compact: 5}} },
		"compacted in addition": func(_ int, o comparedOperation) []comparedOperation { return []comparedOperation{o, {compact: 5}} },
	} {
		for _, who := range []uint64{1, 3} {
			t.Run(fmt.Sprint(name, " at member ", who), func(t *testing.T) {
				w := newComparedWorld(t, 3)
				w.fill(10, 1)
				w.members[who-1].mishap = func(index int, o comparedOperation) []comparedOperation {
					if index != 10 {
						return []comparedOperation{o}
					}
					return mishap(index, o)
				}
				w.check()
				w.fill(1, 1)
				if w.check(); !slices.Equal(w.alarms, []uint64{who}) {
					t.Errorf("alarms for %x: %+v", w.alarms, w.differed)
				}
			})
		}
	}
	t.Run("a compaction left out", func(t *testing.T) {
		w := newComparedWorld(t, 3)
		w.members[1].mishap = func(_ int, o comparedOperation) []comparedOperation {
			if o.compact != 0 {
				return nil
			}
			return []comparedOperation{o}
		}
		w.fill(10, 1)
		w.write(comparedOperation{compact: 8})
		if w.check(); !slices.Equal(w.alarms, []uint64{2}) {
			t.Errorf("alarms for %x: %+v", w.alarms, w.differed)
		}
	})
}

// TestADifferenceIsLookedAtTwice: one that is not there the second time is told of, and nothing else.
func TestADifferenceIsLookedAtTwice(t *testing.T) {
	w := newComparedWorld(t, 3)
	w.fill(10, 1)
	wrong := true
	w.members[1].answer = func(a *partAnswer) {
		if a.Hash != 0 && wrong {
			a.Hash++
			wrong = false
		}
	}
	w.check()
	if len(w.alarms) != 0 || len(w.differed) != 1 || len(w.differed[0].Corrupt) != 0 {
		t.Errorf("alarms for %x, told of %+v", w.alarms, w.differed)
	}
	if len(w.asked) != 4 {
		t.Errorf("%d questions, want 2 for each of 2 members", len(w.asked))
	}
}

// TestAnAlarmThatCannotBeRaised is raised by the next check.
func TestAnAlarmThatCannotBeRaised(t *testing.T) {
	w := newComparedWorld(t, 3)
	w.fill(10, 1)
	w.members[1].spoil(3)
	w.alarmFail = errors.New("no leader")
	if _, err := w.c.check(t.Context()); !errors.Is(err, w.alarmFail) {
		t.Errorf("got %v", err)
	}
	w.alarmFail = nil
	if w.check(); !slices.Equal(w.alarms, []uint64{2}) {
		t.Errorf("alarms for %x", w.alarms)
	}
}

// TestPartsShrinkForTheSlow: until whoever took too long can answer; and they grow again.
func TestPartsShrinkForTheSlow(t *testing.T) {
	for slow := range 2 { // the leader, a follower
		t.Run(fmt.Sprint("member ", slow+1), func(t *testing.T) {
			w := newComparedWorld(t, 3)
			w.fill(5*maxPartBytes>>21, 1<<20)
			m := w.members[slow]
			m.patient = maxPartBytes / 8
			late, answered := 0, 0
			whole := false
			for range 60 {
				at := w.c.round.at
				done := w.check()
				whole = whole || done.Whole
				if len(done.Skipped) != 0 || w.c.round.at == at && w.c.round.running {
					late++
				} else {
					answered++
				}
			}
			if !whole || late < 3 || answered < 40 {
				t.Fatalf("%d checks of 60 without an answer, %d with one, a whole round %t", late, answered, whole)
			}
			m.patient = 0
			for range maxShrink * growAfter {
				w.fill(1, 1)
				w.check()
			}
			if w.c.shrink != 0 {
				t.Errorf("parts are halved %d times still", w.c.shrink)
			}
		})
	}
}

// TestNobodyToCompareWith: nothing is read then.
func TestNobodyToCompareWith(t *testing.T) {
	alone := newComparedWorld(t, 1)
	alone.fill(10, 1)
	deserted := newComparedWorld(t, 3)
	deserted.fill(10, 1)
	deserted.members[1].down, deserted.members[2].down = errors.New("away"), errors.New("away")
	for _, w := range []*comparedWorld{alone, deserted} {
		for range 3 {
			if done := w.check(); done.Peers != 0 || done.Whole {
				t.Errorf("%+v", done)
			}
		}
		if _, err := w.c.checkWhole(t.Context()); err != nil {
			t.Error(err)
		}
		if w.members[0].read != 0 {
			t.Errorf("%d members: %d rows were read", len(w.members), w.members[0].read)
		}
	}
}

// TestMembersAreElsewhereInTheLog: while others write and compact, and members are anywhere between what they must have
// applied and the end of the log, equal ones are never told apart; and one that differs is found by two rounds.
func TestMembersAreElsewhereInTheLog(t *testing.T) {
	forEachSeed(t, 40, 2*time.Second, func(t *testing.T, seed uint64) {
		rnd := rand.New(rand.NewPCG(seed, 5))
		w := newComparedWorld(t, 2+rnd.IntN(4))
		for _, m := range w.members {
			m.rnd = rand.New(rand.NewPCG(seed, m.id))
		}
		rev, compact := int64(1), int64(0)
		busy := rnd.IntN(4)
		w.between = func() {
			for range rnd.IntN(2 + busy) {
				o := comparedOperation{key: fmt.Sprint("k", rnd.IntN(9)), rows: 1, bytes: rnd.Int64N(maxPartBytes / 10)}
				o.deleted = rnd.IntN(4) == 0
				if rnd.IntN(20) < busy && rev > compact+1 {
					compact += 1 + rnd.Int64N(rev-compact)
					o = comparedOperation{compact: compact}
				} else {
					rev++
				}
				w.write(o)
			}
		}
		for range 60 {
			w.between()
		}
		w.members[0].apply(len(w.log))
		rounds := 0
		for range 30 {
			if w.check().Whole {
				rounds++
			}
			if len(w.alarms) != 0 || len(w.differed) != 0 {
				t.Fatalf("equal members differ: %+v, alarms %x", w.differed, w.alarms)
			}
		}
		if rounds == 0 {
			t.Fatal("no round was finished")
		}
		// A row that stays.
		w.write(comparedOperation{key: "stays", rows: 1, bytes: 1})
		culprit := w.members[rnd.IntN(len(w.members))]
		for _, m := range w.members {
			m.apply(len(w.log))
		}
		rev++
		for range rnd.IntN(3) {
			w.check()
		}
		culprit.spoil(slices.IndexFunc(culprit.rows, func(r comparedRow) bool { return r.key == "stays" }))
		for rounds = 0; len(w.alarms) == 0 && rounds < 3; {
			w.between() // else there may be no reason for another round yet
			w.write(comparedOperation{key: "k0", rows: 1})
			rev++
			w.members[0].apply(len(w.log))
			if w.check().Whole {
				rounds++
			}
		}
		want := culprit.id
		if len(w.members) == 2 {
			want = 2
		}
		if !slices.Equal(slices.Compact(w.alarms), []uint64{want}) { // two parts may hold the row
			t.Errorf("alarms for %x, want %x", w.alarms, want)
		}
	})
}
