package backend

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
)

// checkValues verifies what must hold of the cache between two calls: the bytes that count as live are those of the
// resident Frames whose records are the newest of their key, each slab lies within its memory, and what is in the
// table is what counts against the budget. REQUIRES: nothing else uses v.
func (v *values) check() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	var used int64
	for _, s := range v.slabs() {
		if v.slabOf(s.id<<slabOffsetBits) != s {
			return fmt.Errorf("slab %d is not where its id says", s.id)
		}
		if s.n > len(s.buf) {
			return fmt.Errorf("slab %d: %d bytes are written in %d", s.id, s.n, len(s.buf))
		}
		used += int64(len(s.buf))
		var live int64
		for _, e := range s.entries {
			if v.recs.at(e.rec).val.Load() == s.id<<slabOffsetBits|uint64(e.at) {
				live += int64(len(frameAt(s.buf[e.at:])))
			}
		}
		if got := s.live.Load(); got != live {
			return fmt.Errorf("slab %d counts %d live bytes, it has %d", s.id, got, live)
		}
	}
	if used != v.used {
		return fmt.Errorf("the slabs take %d bytes, %d count against the budget", used, v.used)
	}
	return nil
}

// slabs lists what is in the table.
func (v *values) slabs() (all []*slab) {
	table := *v.table.Load()
	for i := range table {
		if s := table[i].Load(); s != nil {
			all = append(all, s)
		}
	}
	return all
}

func mustBeSound(t *testing.T, v *values) {
	t.Helper()
	if err := v.check(); err != nil {
		t.Fatal(err)
	}
}

func testValue(n, size int) *keyValue {
	key := fmt.Appendf(nil, "k%07d", n)
	return &keyValue{key: key, value: bytes.Repeat([]byte{byte(n)}, size), create: 2, mod: int64(n) + 2, version: 1}
}

func TestValuesComeBackUntilTheBudgetIsUsedUp(t *testing.T) {
	const budget = 4 * slabBytes
	recs := newRecords()
	v := newValues(recs, budget)
	var all []uint32
	var frames []Frame
	for n := range 1000 {
		rec := recs.alloc()
		all = append(all, rec)
		f := v.add(rec, testValue(n, 10_000))
		frames = append(frames, f)
		if got := v.get(recs.at(rec)); !bytes.Equal(got, f) {
			t.Fatalf("value %d is not resident right after it was added", n)
		}
		if v.bytes() > budget {
			t.Fatalf("%d bytes are kept in a budget of %d", v.bytes(), budget)
		}
	}
	mustBeSound(t, v)
	resident := 0
	for n, rec := range all {
		switch got := v.get(recs.at(rec)); {
		case got == nil && n >= len(all)-300:
			t.Errorf("value %d is gone, though the oldest go first", n)
		case got == nil:
		case !bytes.Equal(got, frames[n]):
			t.Fatalf("value %d comes back as another", n)
		default:
			resident++
		}
	}
	if resident < 300 || resident > budget/10_000 {
		t.Errorf("%d of %d values are resident", resident, len(all))
	}
	// A Frame that was handed out stays valid though its slab is gone.
	for n, f := range frames {
		if !bytes.Equal(f.KeyValue().Value, testValue(n, 10_000).value) {
			t.Fatalf("frame %d was overwritten while it was held", n)
		}
	}
}

func TestABudgetBelowOneSlabStillWorks(t *testing.T) {
	recs := newRecords()
	v := newValues(recs, 1)
	for n := range 300 {
		rec := recs.alloc()
		if f := v.add(rec, testValue(n, 20_000)); !bytes.Equal(v.get(recs.at(rec)), f) {
			t.Fatalf("value %d is not resident right after it was added", n)
		}
		if v.bytes() > 2*slabBytes {
			t.Fatalf("%d bytes are kept", v.bytes())
		}
	}
	mustBeSound(t, v)
}

func TestAValueLargerThanASlabHasOneOfItsOwn(t *testing.T) {
	recs := newRecords()
	v := newValues(recs, 8*slabBytes)
	small := recs.alloc()
	v.add(small, testValue(0, 10))
	large := recs.alloc()
	f := v.add(large, testValue(1, 3*slabBytes))
	if !bytes.Equal(v.get(recs.at(large)), f) || len(f) < 3*slabBytes {
		t.Fatal("a large value does not come back")
	}
	// The small slab is still the one that is filled.
	next := recs.alloc()
	v.add(next, testValue(2, 10))
	if a, b := recs.at(small).val.Load()>>slabOffsetBits, recs.at(next).val.Load()>>slabOffsetBits; a != b {
		t.Errorf("small values lie in slabs %d and %d", a, b)
	}
	mustBeSound(t, v)
	// Once superseded it is the first to go.
	v.supersede(recs.at(large))
	for n := range 1000 {
		v.add(recs.alloc(), testValue(3+n, 10_000))
	}
	if v.get(recs.at(large)) != nil || v.bytes() > 8*slabBytes {
		t.Errorf("the superseded value is resident: %v; %d bytes are kept", v.get(recs.at(large)) != nil, v.bytes())
	}
	mustBeSound(t, v)
}

// TestSupersededValuesMakeRoom: a slab with little left that counts goes first, and what counts in it moves.
func TestSupersededValuesMakeRoom(t *testing.T) {
	recs := newRecords()
	v := newValues(recs, 4*slabBytes)
	var kept []uint32
	for n := 0; n < 390; n++ { // four slabs, all but one in ten values superseded
		rec := recs.alloc()
		v.add(rec, testValue(n, 10_000))
		if n%10 == 0 {
			kept = append(kept, rec)
		} else {
			v.supersede(recs.at(rec))
		}
	}
	mustBeSound(t, v)
	for n := range 50 {
		v.add(recs.alloc(), testValue(1000+n, 10_000))
		mustBeSound(t, v)
	}
	for i, rec := range kept {
		if f := v.get(recs.at(rec)); f == nil || f.KeyValue().ModRevision != int64(i*10)+2 {
			t.Errorf("value %d was dropped although superseded ones made enough room", i*10)
		}
	}
}

// TestSupersededValuesDoNotFillTheBudget: values that are written over again and again leave room in memory, but for
// the newest of them.
func TestSupersededValuesDoNotFillTheBudget(t *testing.T) {
	recs := newRecords()
	v := newValues(recs, 256<<20)
	last := map[int]uint32{}
	for i := range 100_000 {
		rec := recs.alloc()
		v.add(rec, testValue(i, 2000))
		if old, ok := last[i%100]; ok {
			v.supersede(recs.at(old))
		}
		last[i%100] = rec
	}
	if used := v.bytes(); used < keepSuperseded-slabBytes || used > keepSuperseded+2*slabBytes {
		t.Errorf("200 MB of values, 200 kB of them the newest, take %d MiB", used>>20)
	}
	for i, rec := range last {
		if v.get(recs.at(rec)) == nil {
			t.Errorf("the newest value of key %d is not in memory", i)
		}
	}
	mustBeSound(t, v)
}

func TestALargeValueBesideRescuedOnes(t *testing.T) {
	recs := newRecords()
	v := newValues(recs, 2*slabBytes)
	for n := range 250 {
		rec := recs.alloc()
		v.add(rec, testValue(n, 10_000))
		if n%5 < 3 {
			v.supersede(recs.at(rec))
		}
	}
	for n := range 10 {
		v.add(recs.alloc(), testValue(1000+n, 900_000))
		mustBeSound(t, v)
	}
}

func TestStaleMarks(t *testing.T) {
	recs := newRecords()
	v := newValues(recs, 4*slabBytes)
	kv := testValue(1, 100)
	frame := Frame(kv.appendFrame(nil))
	live := func() int64 { return v.slabs()[0].live.Load() }

	rec := recs.alloc()
	r := recs.at(rec)
	v.add(rec, kv)
	for range 2 { // also twice
		v.supersede(r)
		if !bytes.Equal(v.get(r), frame) || live() != 0 {
			t.Fatalf("superseded: resident %v, %d live bytes", v.get(r) != nil, live())
		}
	}
	for range 2 {
		v.restore(r)
		if !bytes.Equal(v.get(r), frame) || live() != int64(len(frame)) {
			t.Fatalf("restored: resident %v, %d live bytes", v.get(r) != nil, live())
		}
	}
	v.drop(r)
	if v.get(r) != nil || live() != 0 {
		t.Fatalf("dropped: resident %v, %d live bytes", v.get(r) != nil, live())
	}

	// A value that is read from SQL after its key was written again is kept, and does not count.
	v.supersede(r)
	v.fill(rec, frame)
	if !bytes.Equal(v.get(r), frame) || live() != 0 {
		t.Fatalf("filled when superseded: resident %v, %d live bytes", v.get(r) != nil, live())
	}
	v.drop(r)
	if live() != 0 {
		t.Fatalf("%d live bytes", live())
	}

	// The first of two readers wins.
	v.fill(rec, frame)
	at := r.val.Load()
	v.fill(rec, frame)
	if r.val.Load() != at || live() != int64(len(frame)) {
		t.Errorf("filled twice: at %x and %x, %d live bytes", at, r.val.Load(), live())
	}
	// Not resident, superseded and restored: nothing to count.
	v.drop(r)
	v.supersede(r)
	v.restore(r)
	if r.val.Load() != 0 || live() != 0 {
		t.Errorf("handle %x, %d live bytes", r.val.Load(), live())
	}
	mustBeSound(t, v)
}

// TestValuesRandom compares the cache with a map: a value is the one that was last given for its record, or not
// resident; and after each step the cache is sound.
func TestValuesRandom(t *testing.T) {
	rnd := seed(t)
	const budget = 3 * slabBytes
	recs := newRecords()
	v := newValues(recs, budget)
	type given struct {
		kv    *keyValue
		stale bool
	}
	held := map[uint32]*given{}
	var ids []uint32
	for step := range 6000 {
		pick := func() (uint32, *given) {
			rec := ids[rnd.IntN(len(ids))]
			return rec, held[rec]
		}
		op := rnd.IntN(8)
		if len(ids) == 0 {
			op = 0
		}
		switch op {
		case 0, 1:
			size := rnd.IntN(20_000)
			if rnd.IntN(100) == 0 {
				size = rnd.IntN(slabBytes / 4)
				if rnd.IntN(2) == 0 {
					size += slabBytes // a slab of its own
				}
			}
			rec := recs.alloc()
			kv := testValue(step, size)
			v.add(rec, kv)
			held[rec] = &given{kv: kv}
			ids = append(ids, rec)
		case 2, 3:
			rec, g := pick()
			v.supersede(recs.at(rec))
			g.stale = true
		case 4:
			rec, g := pick()
			v.restore(recs.at(rec))
			g.stale = false
		case 5:
			i := rnd.IntN(len(ids))
			rec := ids[i]
			v.drop(recs.at(rec))
			recs.at(rec).val.Store(0) // as freeRecord does
			recs.release(rec)
			delete(held, rec)
			ids[i] = ids[len(ids)-1]
			ids = ids[:len(ids)-1]
		default:
			rec, g := pick()
			if f := v.get(recs.at(rec)); f == nil {
				v.fill(rec, Frame(g.kv.appendFrame(nil)))
			}
		}
		if step%50 == 0 {
			mustBeSound(t, v)
			for rec, g := range held {
				h := recs.at(rec).val.Load()
				if h&stale != 0 != g.stale {
					t.Fatalf("step %d: record %d: handle %x, superseded %v", step, rec, h, g.stale)
				}
				if f := v.get(recs.at(rec)); f != nil && !bytes.Equal(f, g.kv.appendFrame(nil)) {
					t.Fatalf("step %d: record %d has another value", step, rec)
				}
			}
		}
		// One value of more than a slab may have come on top.
		if v.bytes() > budget+slabBytes {
			t.Fatalf("step %d: %d bytes are kept in a budget of %d", step, v.bytes(), budget)
		}
	}
}

// TestValuesConcurrently: readers get and fill, while one goroutine, as the committer does, adds, supersedes,
// restores and drops. What a reader gets is the value of its record, and nothing is counted twice.
func TestValuesConcurrently(t *testing.T) {
	rnd := seed(t)
	recs := newRecords()
	v := newValues(recs, 3*slabBytes)
	const keys = 400
	var numbers [keys]uint32
	value := func(k int) *keyValue { return testValue(k, 5_000+k*20) }
	for k := range numbers {
		numbers[k] = recs.alloc()
		v.add(numbers[k], value(k))
	}
	var stop atomic.Bool
	var wg sync.WaitGroup
	var filled atomic.Int64 // how often a value was found evicted
	for range 4 {
		rnd := rand.New(rand.NewPCG(rnd.Uint64(), 0))
		wg.Add(1)
		go func() {
			defer wg.Done()
			for !stop.Load() {
				k := rnd.IntN(keys)
				want := Frame(value(k).appendFrame(nil))
				f := v.get(recs.at(numbers[k]))
				if f == nil {
					v.fill(numbers[k], want)
					filled.Add(1)
				} else if !bytes.Equal(f, want) {
					t.Errorf("value %d comes back as another", k)
					return
				}
			}
		}()
	}
	for step := 0; (step < 20_000 || filled.Load() < 2_000) && !t.Failed(); step++ {
		k := rnd.IntN(keys)
		v.supersede(recs.at(numbers[k]))
		if rnd.IntN(3) > 0 {
			v.restore(recs.at(numbers[k]))
		}
		if step%100 == 0 { // others come and go
			rec := recs.alloc()
			v.add(rec, value(rnd.IntN(keys)))
			v.drop(recs.at(rec))
			recs.release(rec)
		}
	}
	stop.Store(true)
	wg.Wait()
	for k := range numbers {
		v.supersede(recs.at(numbers[k]))
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, s := range v.slabs() {
		if live := s.live.Load(); live != 0 {
			t.Errorf("slab %d counts %d live bytes after everything in it was superseded", s.id, live)
		}
	}
}
