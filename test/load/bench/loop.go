package main

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
)

// worker is one client: it sends a request, waits for the answer, sends the next.
type worker struct {
	id, of  int // this one, and how many there are
	conn    *grpc.ClientConn
	rng     *rand.Rand
	request []byte // buffers that are used again
	answer  []byte
	took    []time.Duration // of each operation in the measured time
	done    int             // operations in the measured time
	tally   int             // what the operation itself counts, e.g. attempts; begins at 0 for each operation
	counted int             // sum of the tallies in the measured time
}

// result is what a closed loop did in its measured time.
type result struct {
	ops     int
	counted int // by the operations themselves
	seconds float64
	took    []time.Duration // sorted
	used    usage           // by the server
}

func (r result) perSecond() float64 { return float64(r.ops) / r.seconds }

// perOp divides by the number of operations; 0 operations give 0.
func (r result) perOp(x float64) float64 {
	if r.ops == 0 {
		return 0
	}
	return x / float64(r.ops)
}

// quantile of sorted durations, in milliseconds.
func quantile(sorted []time.Duration, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	i := min(int(q*float64(len(sorted))), len(sorted)-1)
	return float64(sorted[i]) / float64(time.Millisecond)
}

const (
	warming int32 = iota
	measuring
	stopping
)

// closedLoop lets n clients work: first to warm up, then for the measured time. The first error ends it.
func (b *bed) closedLoop(ctx context.Context, n int, op func(ctx context.Context, w *worker) error) (result, error) {
	return b.closedLoopDuring(ctx, n, op, func(ctx context.Context) error {
		sleep(ctx, b.o.seconds)
		return nil
	})
}

// closedLoopDuring is closedLoop whose measured time is as long as during takes.
func (b *bed) closedLoopDuring(ctx context.Context, n int, op func(context.Context, *worker) error, during func(context.Context) error) (result, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var phase atomic.Int32
	workers := make([]*worker, n)
	var working sync.WaitGroup
	for i := range workers {
		w := &worker{id: i, of: n, conn: b.conns[i%len(b.conns)], rng: rand.New(rand.NewPCG(uint64(i), uint64(time.Now().UnixNano())))}
		workers[i] = w
		working.Go(func() {
			for phase.Load() != stopping {
				counts := phase.Load() == measuring
				w.tally = 0
				start := time.Now()
				if err := op(ctx, w); err != nil {
					cancel(err)
					return
				}
				if counts && phase.Load() == measuring {
					w.took = append(w.took, time.Since(start))
					w.done++
					w.counted += w.tally
				}
			}
		})
	}
	sleep(ctx, b.o.warmup)
	before, err := b.usage()
	if err != nil {
		cancel(err)
	}
	start := time.Now()
	phase.Store(measuring)
	if err := during(ctx); err != nil {
		cancel(err)
	}
	phase.Store(stopping)
	r := result{seconds: time.Since(start).Seconds()}
	after, err := b.usage()
	if err != nil {
		cancel(err)
	}
	working.Wait()
	if ctx.Err() != nil {
		if err := b.alive(); err != nil {
			return r, err
		}
		return r, context.Cause(ctx)
	}
	r.used = after.since(before)
	for _, w := range workers {
		r.ops += w.done
		r.counted += w.counted
		r.took = append(r.took, w.took...)
	}
	slices.Sort(r.took)
	return r, nil
}

// fixed lets n clients do a number of operations in all, as fast as they can: op is called once with each index.
func (b *bed) fixed(ctx context.Context, n, total int, op func(ctx context.Context, w *worker, i int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var working sync.WaitGroup
	for k := range n {
		w := &worker{id: k, of: n, conn: b.conns[k%len(b.conns)], rng: rand.New(rand.NewPCG(uint64(k), 1))}
		working.Go(func() {
			for ctx.Err() == nil {
				i := int(next.Add(1)) - 1
				if i >= total {
					return
				}
				if err := op(ctx, w, i); err != nil {
					cancel(err)
				}
			}
		})
	}
	working.Wait()
	if err := context.Cause(ctx); err != nil {
		if dead := b.alive(); dead != nil {
			return dead
		}
		return err
	}
	return nil
}

// paced calls op perSecond times a second until ctx ends; a call that is late does not make the following ones late.
// It returns the first error of op.
func (b *bed) paced(ctx context.Context, perSecond int, op func(ctx context.Context, w *worker) error) error {
	w := &worker{conn: b.conns[len(b.conns)-1], rng: rand.New(rand.NewPCG(7, uint64(time.Now().UnixNano())))}
	tick := time.NewTicker(time.Second / time.Duration(perSecond))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if err := op(ctx, w); err != nil {
				if ctx.Err() != nil {
					return nil
				}
				return err
			}
		}
	}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
