package watchpoller

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// seeded returns the random numbers of a test, and says how to have them again: QUIRE_SEED=n go test -run name.
func seeded(t *testing.T) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	if s := envSeed(t); s != 0 {
		seed = s
	}
	t.Logf("replay with QUIRE_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

func randomRange(r *rand.Rand) keyRange {
	key := func() []byte {
		b := make([]byte, 1+r.IntN(3))
		for i := range b {
			b[i] = "\x00abc\xff"[r.IntN(5)]
		}
		return b
	}
	for {
		rng := keyRange{key: key()}
		switch r.IntN(4) {
		case 0:
			return rng
		case 1:
			rng.end = []byte{}
			return rng
		}
		rng.end = key()
		if string(rng.key) < string(rng.end) {
			return rng
		}
	}
}

func TestGroupMatchesExactlyTheRangesThatContainAKey(t *testing.T) {
	r := seeded(t)
	g := newGroup()
	var all []*watcher
	for step := range 20000 {
		if len(all) < 5 || len(all) < 200 && r.IntN(2) == 0 {
			w := &watcher{id: int64(step), rng: randomRange(r)}
			g.add(w)
			all = append(all, w)
		} else {
			i := r.IntN(len(all))
			g.remove(all[i])
			all = slices.Delete(all, i, i+1)
		}
		if g.size != len(all) || g.empty() != (len(all) == 0) {
			t.Fatalf("step %d: the group counts %d watchers, it has %d", step, g.size, len(all))
		}
		key := randomRange(r).key
		var want, got []int64
		for _, w := range all {
			if w.rng.contains(key) {
				want = append(want, w.id)
			}
		}
		for _, w := range g.match(nil, key) {
			got = append(got, w.id)
		}
		slices.Sort(want)
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Fatalf("step %d: key %q matches watchers %v, want %v", step, key, got, want)
		}
	}
	for _, w := range all {
		g.remove(w)
	}
	if g.ranges != nil || len(g.keys) != 0 {
		t.Fatalf("an empty group holds a tree %v and keys %v", g.ranges, g.keys)
	}
}

func TestManyWatchersOfOneRangeLeaveInAnyOrder(t *testing.T) {
	r := seeded(t)
	g := newGroup()
	var all []*watcher
	for i := range 500 {
		w := &watcher{id: int64(i), rng: keyRange{key: []byte("k")}}
		all = append(all, w)
		g.add(w)
	}
	r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for i, w := range all {
		g.remove(w)
		if got := g.match(nil, []byte("k")); len(got) != len(all)-i-1 || slices.Contains(got, w) {
			t.Fatalf("after %d removals %d watchers are left", i+1, len(got))
		}
	}
}

func TestRemovingAStrangerPanics(t *testing.T) {
	for _, rng := range []keyRange{{key: []byte("a")}, {key: []byte("a"), end: []byte("c")}} {
		t.Run(fmt.Sprintf("%q", rng), func(t *testing.T) {
			g := newGroup()
			g.add(&watcher{rng: rng})
			defer func() {
				if recover() == nil {
					t.Error("removing a watcher that is not in the group did not panic")
				}
			}()
			g.remove(&watcher{rng: rng})
		})
	}
}

func TestHullContainsBothAndNothingNeedless(t *testing.T) {
	r := seeded(t)
	for range 20000 {
		a, b := randomRange(r), randomRange(r)
		h := a.hull(b)
		key := randomRange(r).key
		if (a.contains(key) || b.contains(key)) && !h.contains(key) {
			t.Fatalf("the hull of %q and %q is %q, without %q", a, b, h, key)
		}
		if string(h.key) != min(string(a.key), string(b.key)) {
			t.Fatalf("the hull of %q and %q is %q: it begins too early", a, b, h)
		}
		if h.unbounded() != (a.unbounded() || b.unbounded()) {
			t.Fatalf("the hull of %q and %q is %q: it ends too late", a, b, h)
		}
		if same := a.hull(a); same.single() != a.single() || string(same.key) != string(a.key) || string(same.end) != string(a.end) {
			t.Fatalf("the hull of %q with itself is %q", a, same)
		}
	}
}
