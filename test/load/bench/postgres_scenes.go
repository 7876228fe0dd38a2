package main

import (
	"context"
	"slices"
)

// postgresScenes are those of the ordinary table that a storage of several processes changes, with PostgreSQL's share of
// the processor.
func postgresScenes() []scene {
	return []scene{postgresWriteScene(), postgresListScene(), postgresWatchScene(), leaseScene(), postgresRestartScene()}
}

const clients192 = 192 // 64 on each of three processes

func postgresWriteScene() scene {
	perSecond := metric{unit: "ops/s", more: true}
	return scene{
		name:    "writes",
		prepare: writeScene().prepare,
		workloads: []workload{
			{
				name:    "put, 1 client",
				metrics: slices.Concat([]metric{{unit: "ms p50"}, {unit: "ms p99"}}, costs("put")),
				run: func(ctx context.Context, b *bed) ([]float64, error) {
					r, err := b.writing(ctx, 1, b.put)
					return append([]float64{quantile(r.took, 0.5), quantile(r.took, 0.99)}, r.costs()...), err
				},
			},
			{
				name: "put, 64 clients",
				metrics: slices.Concat([]metric{perSecond, {unit: "ms p99"}}, costs("put"),
					[]metric{{unit: "bytes written per put, PostgreSQL's too"}}),
				run: func(ctx context.Context, b *bed) ([]float64, error) {
					r, err := b.writing(ctx, workers64, b.put)
					return slices.Concat([]float64{r.perSecond(), quantile(r.took, 0.99)}, r.costs(), []float64{r.perOp(float64(r.used.written))}), err
				},
			},
			{
				name:    "put, 256 clients",
				metrics: []metric{perSecond, {unit: "ms p99"}},
				run: func(ctx context.Context, b *bed) ([]float64, error) {
					r, err := b.writing(ctx, 256, b.put)
					return []float64{r.perSecond(), quantile(r.took, 0.99)}, err
				},
			},
			{
				name:    "k8s create Txn, 64 clients",
				metrics: []metric{perSecond},
				run: func(ctx context.Context, b *bed) ([]float64, error) {
					r, err := b.writing(ctx, workers64, b.createNew())
					return []float64{r.perSecond()}, err
				},
			},
			{
				name:    "k8s update Txn, 64 clients",
				metrics: slices.Concat([]metric{perSecond, {unit: "ms p99"}}, costs("update")),
				run: func(ctx context.Context, b *bed) ([]float64, error) {
					r, err := b.writing(ctx, workers64, b.updateOwn)
					return append([]float64{r.perSecond(), quantile(r.took, 0.99)}, r.costs()...), err
				},
			},
			swapping("compare-and-swap of 8 hot keys, 64 clients", workers64),
			swapping("compare-and-swap of 8 hot keys, 192 clients (quire-pg3: 64 on each process)", clients192),
			{
				name:    "linearizable get, 64 clients",
				metrics: slices.Concat([]metric{perSecond, {unit: "ms p50"}}, costs("get")),
				run: func(ctx context.Context, b *bed) ([]float64, error) {
					r, err := b.closedLoop(ctx, workers64, b.get)
					return append([]float64{r.perSecond(), quantile(r.took, 0.5)}, r.costs()...), err
				},
			},
			{
				name:    "80 % get, 20 % k8s update, 64 clients",
				metrics: []metric{perSecond},
				run: func(ctx context.Context, b *bed) ([]float64, error) {
					r, err := b.mixed(ctx)
					return []float64{r.perSecond()}, err
				},
			},
		},
	}
}

// swapping is the race for a few keys. Its latency is that of a win, with all its attempts.
func swapping(name string, clients int) workload {
	return workload{
		name:    name,
		metrics: []metric{{unit: "wins/s", more: true}, {unit: "attempts per win"}, {unit: "ms p99"}},
		run: func(ctx context.Context, b *bed) ([]float64, error) {
			r, err := b.closedLoop(ctx, clients, b.swapHot(clients))
			return []float64{r.perSecond(), r.perOp(float64(r.counted)), quantile(r.took, 0.99)}, err
		},
	}
}

func postgresListScene() scene {
	return scene{
		name: "lists",
		prepare: func(ctx context.Context, b *bed) error {
			_, err := b.load(ctx, small, b.o.scale(10_000), 2*kib)
			return err
		},
		workloads: []workload{
			{
				name:    "list pages of 500 × 2 KiB, 10k keys",
				metrics: slices.Concat([]metric{{unit: "pages/s", more: true}}, costs("page")),
				run: func(ctx context.Context, b *bed) ([]float64, error) {
					s, at := b.keys[small], &walk{}
					r, err := b.closedLoop(ctx, 1, func(ctx context.Context, w *worker) error { return w.page(ctx, s, at) })
					return append([]float64{r.perSecond()}, r.costs()...), err
				},
			},
			{
				name:    "list pages at an old revision, 10k keys, during 500 updates/s",
				metrics: []metric{{unit: "pages/s", more: true}, {unit: "updates/s reached", more: true}},
				run:     oldPages,
			},
		},
	}
}

func postgresWatchScene() scene {
	return scene{
		name: "watches",
		prepare: func(ctx context.Context, b *bed) error {
			if _, err := b.load(ctx, watchedOne, 1, kib); err != nil {
				return err
			}
			_, err := b.load(ctx, watchedMany, watchedKeys, kib)
			return err
		},
		workloads: []workload{
			{
				// watchIdle watches on the first connection and writes on the last: not the same process.
				name:    "watch, 1 watcher, idle server (quire-pg3: another process writes): update sent → event here",
				metrics: []metric{{unit: "ms p50"}, {unit: "ms p99"}},
				run:     watchIdle,
			},
			{
				name:    "watch, 1000 watchers on 10 streams, 200 updates/s: answered → event here",
				metrics: []metric{{unit: "ms p99"}},
				run:     watchMany,
			},
			{
				name:    "idle with 100 watches open",
				metrics: []metric{{unit: "% of one core"}, {unit: "% of one core, PostgreSQL"}},
				run: func(ctx context.Context, b *bed) ([]float64, error) {
					v, err := watchNothing(ctx, b)
					return v[:], err
				},
			},
		},
	}
}

func postgresRestartScene() scene {
	return scene{
		name:    "big",
		prepare: loadBig,
		workloads: []workload{{
			name:    "restart after kill -9 → first read, 200k keys, 500k revisions of 1 KiB",
			metrics: []metric{{unit: "s"}, {unit: "MiB resident, without PostgreSQL"}},
			run:     restart,
		}},
	}
}
