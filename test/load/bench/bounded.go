package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

const (
	unlimited      = "/registry/unlimited/"
	unlimitedKeys  = 10_000 // of 2 KiB: a list of all of them has 20 MB
	listClients    = 50
	listsPerClient = 4
	stalledLists   = 20
	stalledUpdates = 100_000 // of 1 KiB, and so 100 MB that a watch client does not read
)

// boundedScene: how much memory a server takes for clients that ask for too much or do not read what they asked for. Each
// measurement begins with a server that was just started on the same data.
func boundedScene() scene {
	return scene{
		name: "bounded",
		prepare: func(ctx context.Context, b *bed) error {
			if _, err := b.load(ctx, rows, b.o.scale(writeKeys), kib); err != nil {
				return err
			}
			if _, err := b.load(ctx, unlimited, b.o.scale(unlimitedKeys), 2*kib); err != nil {
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
				name:    "peak memory, 50 clients list 10k keys of 2 KiB at once, without a limit",
				metrics: []metric{{unit: "MiB resident"}, {unit: "lists/s", more: true}},
				run:     unlimitedLists,
			},
			{
				name: "peak memory, a watch client does not read, 100k updates of 1 KiB by 64 clients",
				metrics: []metric{
					{unit: "MiB resident"}, {unit: "updates/s", more: true}, {unit: "MiB resident, nobody watches"},
				},
				run: stalledWatch,
			},
			{
				name:    "peak memory, 20 clients ask for 10k keys of 2 KiB and do not read, 64 clients put",
				metrics: []metric{{unit: "MiB resident"}, {unit: "puts/s", more: true}},
				run:     stalledReaders,
			},
		},
	}
}

// again starts the server anew on the data of the preparation and begins to watch its peak of memory.
func (b *bed) again(ctx context.Context) error {
	if err := b.restore(); err != nil {
		return err
	}
	if _, err := b.start(ctx); err != nil {
		return err
	}
	if b.isKine() { // whose put is an update
		if err := b.refresh(ctx, rows); err != nil {
			return err
		}
	}
	sleep(ctx, b.o.settle)
	return b.p.ResetPeak()
}

// peak is the most memory since again, in MiB.
func (b *bed) peak() (float64, error) {
	n, err := b.p.PeakRSS()
	return mebibytes(n), err
}

// startList asks for all keys of a set at once.
func (b *bed) startList(ctx context.Context, s *keySet) (*rawCall, error) {
	req, err := proto.Marshal(&pb.RangeRequest{Key: s.key(0), RangeEnd: s.key(s.n)})
	if err != nil {
		return nil, err
	}
	return startRawCall(ctx, b.spec.Addr, methodRange, req)
}

// readList reads the rest of a list of all keys of a set. The key-values are not counted: it must be at least as long as
// its keys and values.
func readList(c *rawCall, s *keySet) error {
	n, err := c.readAll()
	if want := s.n * (s.size + len(s.key(0))); err == nil && n < want {
		err = fmt.Errorf("a list of %d keys has %d bytes, at least %d are expected", s.n, n, want)
	}
	return err
}

// unlimitedLists lets many clients list all keys at once, again and again.
func unlimitedLists(ctx context.Context, b *bed) ([]float64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := b.again(ctx); err != nil {
		return nil, err
	}
	s := b.keys[unlimited]
	start := time.Now()
	err := b.fixed(ctx, listClients, listClients*listsPerClient, func(ctx context.Context, _ *worker, _ int) error {
		c, err := b.startList(ctx, s)
		if err != nil {
			return err
		}
		return readList(c, s)
	})
	if err != nil {
		return nil, err
	}
	took := time.Since(start)
	peak, err := b.peak()
	return []float64{peak, listClients * listsPerClient / took.Seconds()}, err
}

// stalledWatch opens a watch whose events nobody reads, and writes a fixed number of them. Then the client reads on: it must
// have lost nothing. The same writes without a watch show what of the memory is the watch's.
func stalledWatch(ctx context.Context, b *bed) ([]float64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := b.again(ctx); err != nil {
		return nil, err
	}
	// Not one of the connections that the writers use: they would share its window.
	conns, err := dial(b.spec.Addr, 1)
	if err != nil {
		return nil, err
	}
	defer conns[0].Close()
	ws, err := b.openWatches(ctx, conns[0], prefixRange(rows))
	if err != nil {
		return nil, err
	}
	rev, err := b.revision(ctx)
	if err != nil {
		return nil, err
	}
	n := b.o.scale(stalledUpdates)
	watched, perSecond, err := b.peakOfPuts(ctx, n)
	if err != nil {
		return nil, err
	}
	if err := resume(ws, rev, min(n, 10_000)); err != nil {
		return nil, err
	}
	if err := b.again(ctx); err != nil {
		return nil, err
	}
	alone, _, err := b.peakOfPuts(ctx, n)
	return []float64{watched, perSecond, alone}, err
}

// peakOfPuts lets 64 clients put n times and returns the peak of memory in MiB.
func (b *bed) peakOfPuts(ctx context.Context, n int) (peak, perSecond float64, err error) {
	start := time.Now()
	if err := b.fixed(ctx, workers64, n, func(ctx context.Context, w *worker, _ int) error { return b.put(ctx, w) }); err != nil {
		return 0, 0, err
	}
	took := time.Since(start)
	peak, err = b.peak()
	return peak, float64(n) / took.Seconds(), err
}

// resume reads n events, which must be of the revisions after the given one, without a gap. Of a hundred thousand they are
// only the first: etcd takes half a minute for all.
func resume(ws *watchStream, rev int64, n int) error {
	for end := rev + int64(n); rev < end; {
		if err := ws.next(func(kv []byte) error {
			got, err := modRevision(kv)
			if err != nil {
				return err
			}
			if rev++; got != rev {
				return fmt.Errorf("a watch client that stopped reading for a while was given revision %d where %d was due", got, rev)
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// stalledReaders asks for long lists of which nobody reads more than the first window, while others write. Then the clients
// read on: each must be given the whole list.
func stalledReaders(ctx context.Context, b *bed) ([]float64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := b.again(ctx); err != nil {
		return nil, err
	}
	s := b.keys[unlimited]
	calls := make([]*rawCall, stalledLists)
	for i := range calls {
		var err error
		if calls[i], err = b.startList(ctx, s); err != nil {
			return nil, err
		}
	}
	for _, c := range calls {
		whole, err := c.readWindow()
		if err == nil && whole {
			err = errors.New("a list was over before its client stopped reading")
		}
		if err != nil {
			return nil, err
		}
	}
	r, err := b.closedLoop(ctx, workers64, b.put)
	if err != nil {
		return nil, err
	}
	peak, err := b.peak()
	if err != nil {
		return nil, err
	}
	for _, c := range calls {
		if err := readList(c, s); err != nil {
			return nil, fmt.Errorf("reading on after a pause: %w", err)
		}
	}
	return []float64{peak, r.perSecond()}, nil
}
