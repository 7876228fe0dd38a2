package backend

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pipeline is a log as a node has it: one goroutine makes entries of what waits and syncs them, one after the other; each
// is committed a round trip later, while the next ones are on their way; another goroutine applies what is committed.
type pipeline struct {
	loopback
	trip    time.Duration
	written chan writtenEntry
}

type writtenEntry struct {
	Entry
	at time.Time
}

// rest sleeps for as long as is said: time.Sleep makes a millisecond of everything on an idle machine.
func rest(d time.Duration) {
	if d > 0 {
		ts := unix.NsecToTimespec(d.Nanoseconds())
		_ = unix.Nanosleep(&ts, nil)
	}
}

func openPipeline(b *testing.B, path string, keep, trip time.Duration) (*DB, *pipeline) {
	b.Helper()
	db, err := OpenReplica(b.Context(), path, Options{QuotaBytes: -1})
	if err != nil {
		b.Fatal(err)
	}
	l := &pipeline{loopback: loopback{db: db, wake: make(chan struct{}, 1), keep: keep}, trip: trip, written: make(chan writtenEntry, 256)}
	l.index, l.term = db.Applied()
	l.index++
	l.term++
	if err := db.ApplyMembers(l.index, l.term, nil); err != nil {
		b.Fatal(err)
	}
	db.Join(l)
	db.Lead(l.term)
	go l.write()
	go l.apply()
	return db, l
}

func (l *pipeline) write() {
	for {
		select {
		case <-l.wake:
		case <-l.db.ctx.Done():
			return
		}
		l.mu.Lock()
		proposals := l.waiting
		l.waiting = nil
		l.mu.Unlock()
		if len(proposals) == 0 {
			continue
		}
		l.index++
		l.entries.Add(1)
		e := Entry{Index: l.index, Term: l.term, Stamp: l.db.Stamp(), Proposals: proposals}
		rest(l.keep)
		l.written <- writtenEntry{e, time.Now()}
	}
}

func (l *pipeline) apply() {
	for {
		var group []Entry
		select {
		case e := <-l.written:
			rest(l.trip - time.Since(e.at))
			group = append(group, e.Entry)
		case <-l.db.ctx.Done():
			return
		}
		for more := true; more; {
			select {
			case e := <-l.written:
				rest(l.trip - time.Since(e.at))
				group = append(group, e.Entry)
			default:
				more = false
			}
		}
		if l.db.Apply(group) != nil {
			return
		}
	}
}

// BenchmarkReplicaPut: puts of 1 KiB over 10,000 keys through a log that takes so long for a sync and a round trip.
func BenchmarkReplicaPut(b *testing.B) {
	for _, trip := range []time.Duration{200 * time.Microsecond, 2 * time.Millisecond} {
		for _, writers := range []int{1, 64, 256} {
			b.Run(fmt.Sprintf("trip=%v/writers=%d", trip, writers), func(b *testing.B) {
				db, l := openPipeline(b, filepath.Join(b.TempDir(), "quire.db"), 200*time.Microsecond, trip)
				value := string(make([]byte, 1<<10))
				var next atomic.Int64
				var wg sync.WaitGroup
				b.ResetTimer()
				for range writers {
					wg.Go(func() {
						for next.Add(1) <= int64(b.N) {
							if _, err := db.Write(b.Context(), Command{Request: putReq(benchKey(next.Load()%10_000), value)}); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
				b.StopTimer()
				b.ReportMetric(float64(b.N)/float64(max(l.entries.Load(), 1)), "puts/entry")
				if err := db.Close(); err != nil {
					b.Fatal(err)
				}
			})
		}
	}
}

// BenchmarkReplicaSnapshot: how long puts wait while a copy of 1 GiB (or QUIRE_BENCH_MIB) is made.
func BenchmarkReplicaSnapshot(b *testing.B) {
	mib := 1024
	if s := os.Getenv("QUIRE_BENCH_MIB"); s != "" {
		var err error
		if mib, err = strconv.Atoi(s); err != nil {
			b.Fatal(err)
		}
	}
	db, _ := openPipeline(b, filepath.Join(b.TempDir(), "quire.db"), 200*time.Microsecond, 200*time.Microsecond)
	fillBench(b, db, mib*256, 4<<10)
	var waits []time.Duration
	var took time.Duration
	var size int64
	for b.Loop() {
		ctx, cancel := context.WithCancel(b.Context())
		var mu sync.Mutex
		var wg sync.WaitGroup
		var next atomic.Int64
		for range 16 {
			wg.Go(func() {
				for ctx.Err() == nil {
					start := time.Now()
					if _, err := db.Write(b.Context(), Command{Request: putReq(benchKey(next.Add(7919)%int64(mib*256)), string(make([]byte, 4<<10)))}); err != nil {
						b.Error(err)
					}
					mu.Lock()
					waits = append(waits, time.Since(start))
					mu.Unlock()
				}
			})
		}
		start := time.Now()
		s, err := db.Snapshot(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		took += time.Since(start)
		size = s.Size()
		cancel()
		wg.Wait()
		if err := s.Release(); err != nil {
			b.Fatal(err)
		}
	}
	slices.Sort(waits)
	b.ReportMetric(float64(took.Milliseconds())/float64(b.N), "ms/snapshot")
	b.ReportMetric(float64(size>>20), "MiB")
	b.ReportMetric(float64(len(waits))/took.Seconds(), "puts/s")
	for name, q := range map[string]float64{"p50": 0.5, "p99": 0.99, "max": 1} {
		b.ReportMetric(float64(waits[min(len(waits)-1, int(q*float64(len(waits))))].Microseconds())/1000, "ms-"+name)
	}
	if err := db.Close(); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkReplicaReplay: entries of one put of 1 KiB that are committed already, as after a restart, each given to Apply
// alone or so many together.
func BenchmarkReplicaReplay(b *testing.B) {
	for _, together := range []int{1, 10, 100} {
		b.Run(fmt.Sprintf("together=%d", together), func(b *testing.B) {
			db, err := OpenReplica(b.Context(), filepath.Join(b.TempDir(), "quire.db"), Options{QuotaBytes: -1})
			if err != nil {
				b.Fatal(err)
			}
			value := string(make([]byte, 1<<10))
			index := uint64(0)
			var group []Entry
			for i := range b.N {
				index++
				payload, err := appendCommand([]byte{payloadVersion}, &pending{cmd: Command{Request: putReq(benchKey(int64(i%10_000)), value)}})
				if err != nil {
					b.Fatal(err)
				}
				s := stamp{clock: int64(i), wall: int64(i), space: -1}
				group = append(group, Entry{Index: index, Term: 1, Stamp: s.encode(), Proposals: []Proposal{{Payload: payload}}})
				if len(group) == together || i == b.N-1 {
					if err := db.Apply(group); err != nil {
						b.Fatal(err)
					}
					group = group[:0]
				}
			}
			b.StopTimer()
			if err := db.Close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}
