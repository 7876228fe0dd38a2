package main

import (
	"context"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

const (
	big          = "/registry/big/"
	bigKeys      = 200_000
	bigHot       = 1_000   // of them, the ones that are updated
	bigUpdates   = 300_000 // so 500,000 revisions
	bigCompacted = 200_000 // revisions that one compaction drops
)

// bigScene: a database of 200,000 keys and 500,000 revisions.
func bigScene() scene {
	return scene{
		name: "big",
		prepare: func(ctx context.Context, b *bed) error {
			if err := loadBig(ctx, b); err != nil {
				return err
			}
			if err := b.save(); err != nil {
				return err
			}
			_, err := b.start(ctx)
			return err
		},
		workloads: []workload{
			{
				name:    "restart after kill -9 → first read, 200k keys, 500k revisions of 1 KiB",
				metrics: []metric{{unit: "s"}, {unit: "MiB resident"}},
				run:     restart,
			},
			{
				name: "update of other keys, 64 clients, while 200k revisions are compacted",
				metrics: []metric{
					{unit: "ms max"}, {unit: "ms p99"}, {unit: "ops/s", more: true}, {unit: "s until compacted"},
				},
				run: compaction,
			},
		},
	}
}

func loadBig(ctx context.Context, b *bed) error {
	n, updates := b.o.scale(bigKeys), b.o.scale(bigUpdates)
	s, err := b.load(ctx, big, n, kib)
	if err != nil {
		return err
	}
	if b.marks[big], err = b.revision(ctx); err != nil {
		return err
	}
	return b.fixed(ctx, 50, 50, func(ctx context.Context, w *worker, i int) error {
		for k := range updates / 50 {
			if err := s.update(ctx, w, i*(bigHot/50)+k%(bigHot/50)); err != nil {
				return err
			}
		}
		return nil
	})
}

// coolUpdate updates a key that is not among the hot ones; each worker has its own.
func (b *bed) coolUpdate(ctx context.Context, w *worker) error {
	s := b.keys[big]
	own := (s.n - bigHot) / w.of
	return s.update(ctx, w, bigHot+w.id*own+w.rng.IntN(own))
}

// restart kills the server in the middle of writing and measures until it answers again.
func restart(ctx context.Context, b *bed) ([]float64, error) {
	if err := b.refresh(ctx, big); err != nil {
		return nil, err
	}
	writing, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan error, 1)
	go func() {
		_, err := b.closedLoop(writing, workers64, b.coolUpdate)
		ended <- err
	}()
	sleep(ctx, time.Second)
	b.p.Kill()
	<-ended // with the error that the server is gone, as it should
	if err := b.kill(); err != nil {
		return nil, err
	}
	took, err := b.start(ctx)
	if err != nil {
		return nil, err
	}
	sleep(ctx, b.o.settle)
	rss, err := b.p.RSS()
	return []float64{took.Seconds(), mebibytes(rss)}, err
}

// compaction starts from the saved database each time, so that there is always as much to drop.
func compaction(ctx context.Context, b *bed) ([]float64, error) {
	if err := b.restore(); err != nil {
		return nil, err
	}
	if _, err := b.start(ctx); err != nil {
		return nil, err
	}
	if err := b.refresh(ctx, big); err != nil {
		return nil, err
	}
	var took time.Duration
	r, err := b.closedLoopDuring(ctx, workers64, b.coolUpdate, func(ctx context.Context) error {
		start := time.Now()
		at := b.marks[big] + int64(b.o.scale(bigCompacted))
		req := &pb.CompactionRequest{Revision: at, Physical: true}
		if err := callProto(ctx, b.conns[0], methodCompact, req, &pb.CompactionResponse{}); err != nil {
			return err
		}
		took = time.Since(start)
		sleep(ctx, b.o.seconds-took)
		return nil
	})
	return []float64{quantile(r.took, 1), quantile(r.took, 0.99), r.perSecond(), took.Seconds()}, err
}
