package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

const (
	small    = "/registry/small/"
	large    = "/registry/large/"
	pageSize = 500
)

// walk is a list in pages, as client-go does it: the first page names the revision, the others ask for it. A walk that did
// not reach its end goes on in the next round.
type walk struct {
	from int   // first key of the next page
	rev  int64 // 0: the next page is the first one
}

// listScene: lists of 10,000 and of 100,000 keys of 2 KiB.
func listScene() scene {
	pages := []metric{{unit: "pages/s", more: true}, {unit: "ms of server CPU per page"}}
	return scene{
		name: "lists",
		prepare: func(ctx context.Context, b *bed) error {
			if _, err := b.load(ctx, small, b.o.scale(10_000), 2*kib); err != nil {
				return err
			}
			_, err := b.load(ctx, large, b.o.scale(100_000), 2*kib)
			return err
		},
		workloads: []workload{
			{
				name:    "list pages of 500 × 2 KiB, 10k keys",
				metrics: pages,
				run:     func(ctx context.Context, b *bed) ([]float64, error) { return b.walkPages(ctx, small) },
			},
			{
				name:    "list pages of 500 × 2 KiB, 100k keys",
				metrics: pages,
				run:     func(ctx context.Context, b *bed) ([]float64, error) { return b.walkPages(ctx, large) },
			},
			{
				name:    "one Range of 10k × 2 KiB",
				metrics: []metric{{unit: "ms p50"}, {unit: "ms of server CPU"}},
				run: func(ctx context.Context, b *bed) ([]float64, error) {
					s := b.keys[small]
					req, err := proto.Marshal(&pb.RangeRequest{Key: s.key(0), RangeEnd: s.key(s.n)})
					if err != nil {
						return nil, err
					}
					r, err := b.closedLoop(ctx, 1, func(ctx context.Context, w *worker) error {
						if err := call(ctx, w.conn, methodRange, req, &w.answer); err != nil {
							return err
						}
						return expectKVs(w.answer, s.n)
					})
					return []float64{quantile(r.took, 0.5), r.perOp(float64(r.used.cpu.Microseconds()) / 1000)}, err
				},
			},
			{
				name:    "list pages at an old revision, 10k keys, during 500 updates/s",
				metrics: []metric{{unit: "pages/s", more: true}, {unit: "updates/s reached", more: true}},
				run:     oldPages,
			},
			{
				name: "memory with 100k keys of 2 KiB, after a restart",
				metrics: []metric{
					{unit: "MiB resident"}, {unit: "MiB resident, listed once"},
				},
				run: memory,
			},
		},
	}
}

func expectKVs(answer []byte, want int) error {
	n, err := countKVs(answer)
	if err == nil && n != want {
		err = fmt.Errorf("a list has %d key-values, %d are there", n, want)
	}
	return err
}

// page reads the next page of a walk over a key set.
func (w *worker) page(ctx context.Context, s *keySet, at *walk) error {
	req, err := proto.Marshal(&pb.RangeRequest{Key: s.key(at.from), RangeEnd: s.key(s.n), Limit: pageSize, Revision: at.rev})
	if err != nil {
		return err
	}
	if err := call(ctx, w.conn, methodRange, req, &w.answer); err != nil {
		return err
	}
	if err := expectKVs(w.answer, min(pageSize, s.n-at.from)); err != nil {
		return err
	}
	if at.rev == 0 {
		if at.rev, err = revisionOf(w.answer); err != nil {
			return err
		}
	}
	if at.from += pageSize; at.from >= s.n {
		*at = walk{}
	}
	return nil
}

func (b *bed) walkPages(ctx context.Context, prefix string) ([]float64, error) {
	s := b.keys[prefix]
	if b.walks[prefix] == nil {
		b.walks[prefix] = &walk{}
	}
	at := b.walks[prefix]
	r, err := b.closedLoop(ctx, 1, func(ctx context.Context, w *worker) error { return w.page(ctx, s, at) })
	return []float64{r.perSecond(), r.perOp(float64(r.used.cpu.Microseconds()) / 1000)}, err
}

// oldPages lists at one revision while the same keys are updated.
func oldPages(ctx context.Context, b *bed) ([]float64, error) {
	const updaters, perUpdater = 5, 100
	s := b.keys[small]
	if err := b.refresh(ctx, small); err != nil {
		return nil, err
	}
	rev, err := b.revision(ctx)
	if err != nil {
		return nil, err
	}
	own := s.n / updaters
	var updates atomic.Int64
	updating, stop := context.WithCancel(ctx)
	var running sync.WaitGroup
	errs := make([]error, updaters)
	start := time.Now()
	for i := range updaters {
		running.Go(func() {
			errs[i] = b.paced(updating, perUpdater, func(ctx context.Context, w *worker) error {
				defer updates.Add(1)
				return s.update(ctx, w, i*own+w.rng.IntN(own))
			})
		})
	}
	at := &walk{rev: rev}
	r, err := b.closedLoop(ctx, 1, func(ctx context.Context, w *worker) error {
		if at.rev == 0 {
			at.rev = rev // from the beginning again, still at the old revision
		}
		return w.page(ctx, s, at)
	})
	rate := float64(updates.Load()) / time.Since(start).Seconds()
	stop()
	running.Wait()
	return []float64{r.perSecond(), rate}, errors.Join(append(errs, err)...)
}

// memory restarts the server on what it has and reads its resident memory, before and after all keys were listed.
func memory(ctx context.Context, b *bed) ([]float64, error) {
	if err := b.kill(); err != nil {
		return nil, err
	}
	if _, err := b.start(ctx); err != nil {
		return nil, err
	}
	sleep(ctx, b.o.settle)
	first, err := b.p.RSS()
	if err != nil {
		return nil, err
	}
	w := &worker{conn: b.conns[0]}
	s := b.keys[large]
	for at := (&walk{}); ; {
		if err := w.page(ctx, s, at); err != nil {
			return nil, err
		}
		if at.from == 0 {
			break
		}
	}
	sleep(ctx, b.o.settle)
	listed, err := b.p.RSS()
	return []float64{mebibytes(first), mebibytes(listed)}, err
}

// medianOf is the median of some values, which it sorts.
func medianOf(v []float64) float64 {
	slices.Sort(v)
	n := len(v)
	if n%2 == 1 {
		return v[n/2]
	}
	return (v[n/2-1] + v[n/2]) / 2
}
