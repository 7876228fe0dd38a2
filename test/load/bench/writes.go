package main

import (
	"context"
	"fmt"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

const (
	kib       = 1024
	writeKeys = 10_000 // loaded before the writes and point reads
	workers64 = 64
	hotKeys   = 8
	rows      = "/registry/rows/"
	hot       = "/registry/hot/"
)

// writeScene: writes and point reads on 10,000 keys of 1 KiB.
func writeScene() scene {
	perSecond := []metric{{unit: "ops/s", more: true}}
	return scene{
		name: "writes",
		prepare: func(ctx context.Context, b *bed) error {
			if _, err := b.load(ctx, rows, b.o.scale(writeKeys), kib); err != nil {
				return err
			}
			_, err := b.load(ctx, hot, hotKeys, kib)
			return err
		},
		workloads: []workload{
			{
				name:    "put, 1 client",
				metrics: []metric{{unit: "ms p50"}, {unit: "ms p99"}},
				run: func(ctx context.Context, b *bed) ([]float64, error) {
					r, err := b.writing(ctx, 1, b.put)
					return []float64{quantile(r.took, 0.5), quantile(r.took, 0.99)}, err
				},
			},
			{
				name: "put, 64 clients",
				metrics: []metric{
					{unit: "ops/s", more: true}, {unit: "ms p99"}, {unit: "µs of server CPU per put"}, {unit: "bytes written per put"},
				},
				run: func(ctx context.Context, b *bed) ([]float64, error) {
					r, err := b.writing(ctx, workers64, b.put)
					return []float64{
						r.perSecond(), quantile(r.took, 0.99), r.perOp(float64(r.used.cpu.Nanoseconds()) / 1000), r.perOp(float64(r.used.written)),
					}, err
				},
			},
			{
				name:    "put, 256 clients",
				metrics: perSecond,
				run: func(ctx context.Context, b *bed) ([]float64, error) {
					r, err := b.writing(ctx, 256, b.put)
					return []float64{r.perSecond()}, err
				},
			},
			{
				name:    "k8s create Txn, 64 clients",
				metrics: perSecond,
				run: func(ctx context.Context, b *bed) ([]float64, error) {
					r, err := b.writing(ctx, workers64, b.createNew())
					return []float64{r.perSecond()}, err
				},
			},
			{
				name:    "k8s update Txn, 64 clients",
				metrics: []metric{{unit: "ops/s", more: true}, {unit: "ms p99"}, {unit: "µs of server CPU per update"}},
				run: func(ctx context.Context, b *bed) ([]float64, error) {
					r, err := b.writing(ctx, workers64, b.updateOwn)
					return []float64{r.perSecond(), quantile(r.took, 0.99), r.perOp(float64(r.used.cpu.Nanoseconds()) / 1000)}, err
				},
			},
			{
				name:    "compare-and-swap of 8 hot keys, 64 clients",
				metrics: []metric{{unit: "wins/s", more: true}, {unit: "attempts per win"}},
				run: func(ctx context.Context, b *bed) ([]float64, error) {
					r, err := b.closedLoop(ctx, workers64, b.swapHot(workers64))
					return []float64{r.perSecond(), r.perOp(float64(r.counted))}, err
				},
			},
			{
				name:    "linearizable get, 64 clients",
				metrics: []metric{{unit: "ops/s", more: true}, {unit: "µs of server CPU per get"}},
				run: func(ctx context.Context, b *bed) ([]float64, error) {
					r, err := b.closedLoop(ctx, workers64, b.get)
					return []float64{r.perSecond(), r.perOp(float64(r.used.cpu.Nanoseconds()) / 1000)}, err
				},
			},
			{
				name:    "80 % get, 20 % k8s update, 64 clients",
				metrics: perSecond,
				run: func(ctx context.Context, b *bed) ([]float64, error) {
					r, err := b.mixed(ctx)
					return []float64{r.perSecond()}, err
				},
			},
		},
	}
}

// put overwrites a random key. On kine it is an update Txn instead: kine answers a Put of an existing key with success, but
// the update inside it is conditional on a revision that is seldom the key's, and its result is ignored (put.go of v0.16.4).
func (b *bed) put(ctx context.Context, w *worker) error {
	if b.isKine() {
		return b.updateOwn(ctx, w)
	}
	s := b.keys[rows]
	req, err := proto.Marshal(&pb.PutRequest{Key: s.key(w.rng.IntN(s.n)), Value: filling[:s.size]})
	if err != nil {
		return err
	}
	return call(ctx, w.conn, methodPut, req, &w.answer)
}

// createNew makes an operation that creates a key which was never there.
func (b *bed) createNew() func(ctx context.Context, w *worker) error {
	b.fresh++
	return func(ctx context.Context, w *worker) error {
		w.request = fmt.Appendf(w.request[:0], "/registry/new/%d/%d/%d", b.fresh, w.id, w.rng.Uint64())
		_, err := create(ctx, w, w.request, kib)
		return err
	}
}

// mixed lets 64 clients do one update to four gets.
func (b *bed) mixed(ctx context.Context) (result, error) {
	if err := b.refresh(ctx, rows); err != nil {
		return result{}, err
	}
	return b.closedLoop(ctx, workers64, func(ctx context.Context, w *worker) error {
		if w.rng.IntN(5) == 0 {
			return b.updateOwn(ctx, w)
		}
		return b.get(ctx, w)
	})
}

// writing is closedLoop for operations that write once each: the store's revision tells whether they did.
func (b *bed) writing(ctx context.Context, n int, op func(context.Context, *worker) error) (result, error) {
	if err := b.refresh(ctx, rows); err != nil {
		return result{}, err
	}
	before, err := b.revision(ctx)
	if err != nil {
		return result{}, err
	}
	r, err := b.closedLoop(ctx, n, op)
	if err != nil {
		return r, err
	}
	after, err := b.revision(ctx)
	if err == nil && after-before < int64(r.ops) {
		err = fmt.Errorf("%d writes were acknowledged, the revision rose by %d", r.ops, after-before)
	}
	return r, err
}

// get reads a random key.
func (b *bed) get(ctx context.Context, w *worker) error {
	s := b.keys[rows]
	req, err := proto.Marshal(&pb.RangeRequest{Key: s.key(w.rng.IntN(s.n)), Limit: 1})
	if err != nil {
		return err
	}
	if err := call(ctx, w.conn, methodRange, req, &w.answer); err != nil {
		return err
	}
	if n, err := countKVs(w.answer); err != nil || n != 1 {
		return fmt.Errorf("a key that is there was not read: %d key-values, %v", n, err)
	}
	return nil
}

// updateOwn updates a random one of the keys that belong to the worker alone.
func (b *bed) updateOwn(ctx context.Context, w *worker) error {
	s := b.keys[rows]
	own := s.n / w.of
	return s.update(ctx, w, w.id*own+w.rng.IntN(own))
}

// refresh reads the mod_revision of every key of the set: plain puts and updates cut off at the end of a measurement
// have moved them.
func (b *bed) refresh(ctx context.Context, prefix string) error {
	s := b.keys[prefix]
	const page = 1000
	for from := 0; from < s.n; from += page {
		n := min(page, s.n-from)
		r := &pb.RangeResponse{}
		req := &pb.RangeRequest{Key: s.key(from), RangeEnd: s.key(from + n)}
		if err := callProto(ctx, b.conns[0], methodRange, req, r); err != nil {
			return err
		}
		if len(r.Kvs) != n {
			return fmt.Errorf("%d keys of %q are expected from %d on, %d are there", n, prefix, from, len(r.Kvs))
		}
		for i, kv := range r.Kvs {
			s.revs[from+i] = kv.ModRevision
		}
	}
	return nil
}

// swapHot makes an operation that replaces a hot key if it is still as this client saw it last. Who loses is told what it is
// now and tries that key again, until it wins: so does kube-apiserver's GuaranteedUpdate. Attempts are counted.
func (b *bed) swapHot(clients int) func(ctx context.Context, w *worker) error {
	s := b.keys[hot]
	seen := make([][hotKeys]int64, clients)
	for i := range seen {
		copy(seen[i][:], s.revs)
	}
	return func(ctx context.Context, w *worker) error {
		i := w.rng.IntN(hotKeys)
		for {
			w.tally++
			won, rev, err := s.swap(ctx, w, i, seen[w.id][i])
			if err != nil {
				return err
			}
			seen[w.id][i] = rev
			if won {
				return nil
			}
		}
	}
}

// swap tries once to replace key i, seen at a revision. It returns the key's revision afterwards.
func (s *keySet) swap(ctx context.Context, w *worker, i int, seen int64) (won bool, rev int64, err error) {
	req, err := updateRequest(s.key(i), seen, s.size)
	if err != nil {
		return false, 0, err
	}
	if err := call(ctx, w.conn, methodTxn, req, &w.answer); err != nil {
		return false, 0, err
	}
	r := &pb.TxnResponse{}
	if err := proto.Unmarshal(w.answer, r); err != nil {
		return false, 0, err
	}
	if r.Succeeded {
		return true, r.Header.Revision, nil
	}
	kvs := r.Responses[0].GetResponseRange().GetKvs()
	if len(kvs) != 1 {
		return false, 0, fmt.Errorf("the loser of a compare-and-swap was told %d key-values, 1 is expected", len(kvs))
	}
	return false, kvs[0].ModRevision, nil
}
