package differential

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quire-db/quire/test/etcd/start"
)

var (
	seedFlag      = flag.Uint64("seed", 0, "seed of the first sequence; 0 draws one")
	countFlag     = flag.Int("n", 20_000, "operations to play")
	lengthFlag    = flag.Int("length", 1000, "operations in one sequence; each begins with an empty store")
	pairsFlag     = flag.Int("pairs", 8, "pairs of servers that play at once; most of the time is spent waiting for etcd's watchers to catch up")
	processesFlag = flag.Int("processes", 1, "quire processes on one database, of which each operation goes to one drawn at random; more than one needs QUIRE_STORAGE=postgres")
	againstFlag   = flag.String("against", "quire", "server to compare with etcd: quire, or etcd to try the test itself")
	shrinkFlag    = flag.Duration("shrink", 90*time.Second, "time to look for a shorter sequence with the same outcome; 0 does not look")
)

// TestSameAnswersAsEtcd plays random operations of the KV, Watch and Lease services on etcd and on quire
// and demands the same answers, errors and events. A failure prints the seed of its sequence:
//
//	go test ./differential -args -seed=… -n=… -pairs=1
//
// plays that one again. With -processes=3 quire is three processes on one database: together they must give the
// answers of one etcd, and the watchers of each must be told the same.
func TestSameAnswersAsEtcd(t *testing.T) {
	second := start.Func(start.Quire)
	switch {
	case *againstFlag == "etcd":
		second = start.Etcd
	case *processesFlag > 1:
		second = start.Several(*processesFlag)
	}
	seed := *seedFlag
	if seed == 0 {
		seed = rand.Uint64N(1 << 40)
	}
	t.Logf("seed %d, %d operations", seed, *countFlag)

	var next, played atomic.Int64
	var failed atomic.Bool
	began := time.Now()
	count, length := int64(*countFlag), int64(*lengthFlag)
	sequences := (count + length - 1) / length
	stopReport := reportProgress(t, &played, count)
	defer stopReport()

	var workers sync.WaitGroup
	var pairs []*pair
	for range min(int64(*pairsFlag), sequences) {
		// The servers live as long as t; starting them here keeps t.Fatal on its own goroutine.
		p, err := newPair(start.Etcd(t, start.Options{}), second(t, start.Options{}))
		if err != nil {
			t.Fatal(err)
		}
		defer p.close()
		pairs = append(pairs, p)
		workers.Go(func() {
			for !failed.Load() {
				i := next.Add(1) - 1
				if i >= sequences {
					return
				}
				mine := seed + uint64(i)
				n := min(length, count-i*length)
				q := random(p, mine, int(n))
				played.Add(int64(len(q.operations)))
				if q.err == nil {
					continue
				}
				if failed.Swap(true) {
					return // one report is enough
				}
				report(t, q, mine, second)
				return
			}
		})
	}
	workers.Wait()
	elapsed := time.Since(began)
	counts, events := make(map[string]int), 0
	for _, p := range pairs {
		events += p.events
		for what, n := range p.counts {
			counts[what] += n
		}
	}
	for _, what := range slices.Sorted(maps.Keys(counts)) {
		t.Logf("%8d %s", counts[what], what)
	}
	t.Logf("%8d events on watches", events)
	t.Logf("%d operations in %v, %.0f/s", played.Load(), elapsed.Round(time.Millisecond), float64(played.Load())/elapsed.Seconds())
}

func report(t *testing.T, q sequence, seed uint64, second start.Func) {
	var d *difference
	if !errors.As(q.err, &d) {
		t.Errorf("sequence %d could not go on: %v\n%s", seed, q.err, tail(q))
		return
	}
	t.Errorf("difference; play again with -args -seed=%d -n=%d -pairs=1 -processes=%d\n%s\n%v", seed, len(q.operations), *processesFlag, tail(q), d)
	if *shrinkFlag == 0 {
		return
	}
	short := shrink(t, q, start.Etcd, second, time.Now().Add(*shrinkFlag))
	if len(short.operations) < len(q.operations) {
		t.Errorf("shorter, with the store at revision %d (all before it compacted):\n%s\n%v", short.base, tail(short), short.err)
	}
}

// tail prints the last operations of q.
func tail(q sequence) string {
	const most = 20
	from := max(len(q.operations)-most, 0)
	var b strings.Builder
	for i, o := range q.operations[from:] {
		fmt.Fprintf(&b, "%6d  %s\n", from+i, o)
	}
	return b.String()
}

// reportProgress says every half minute how far a long run is.
func reportProgress(t *testing.T, played *atomic.Int64, count int64) (stop func()) {
	done := make(chan struct{})
	var ended sync.WaitGroup
	ended.Go(func() {
		tick := time.NewTicker(30 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				fmt.Printf("%s: %d of %d operations\n", t.Name(), played.Load(), count)
			}
		}
	})
	return func() { close(done); ended.Wait() }
}
