package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

const (
	watched       = "/registry/watched/"
	catchUp       = "/registry/catchup/"
	watchStreams  = 10
	watchers      = 1000
	watchPrefixes = 100 // so each write reaches ten watchers
	watchRate     = 200 // writes a second
	history       = 50_000
)

// watchScene: how soon events come, how fast a watcher catches up, and what an idle one costs.
func watchScene() scene {
	return scene{
		name: "watches",
		prepare: func(ctx context.Context, b *bed) error {
			s, err := b.load(ctx, catchUp, 1000, kib)
			if err != nil {
				return err
			}
			rev, err := b.revision(ctx)
			if err != nil {
				return err
			}
			b.marks[catchUp] = rev + 1
			// Each key has one writer, which is what fixed does with 50 clients of 20 keys each.
			return b.fixed(ctx, 50, 50, func(ctx context.Context, w *worker, i int) error {
				for k := range b.o.scale(history) / 50 {
					if err := s.update(ctx, w, i*20+k%20); err != nil {
						return err
					}
				}
				return nil
			})
		},
		workloads: []workload{
			{
				name:    "watch, 1 watcher, idle server: put sent → event here",
				metrics: []metric{{unit: "ms p50"}, {unit: "ms p99"}},
				run:     watchIdle,
			},
			{
				name:    "watch, 1000 watchers on 10 streams, 200 writes/s: put answered → event here",
				metrics: []metric{{unit: "ms p99"}},
				run:     watchMany,
			},
			{
				name:    "watch catches up over 50k events of 1 KiB",
				metrics: []metric{{unit: "events/s", more: true}},
				run:     watchCatchUp,
			},
			{
				name:    "idle with 100 watches open",
				metrics: []metric{{unit: "% of one core"}},
				run:     watchNothing,
			},
		},
	}
}

// watchStream is one open stream whose answers are read as bytes.
type watchStream struct {
	grpc.ClientStream
	answer []byte
}

// openWatches opens a stream with one watch for each range [key, end) and waits until all are created.
func openWatches(ctx context.Context, c *grpc.ClientConn, from int64, ranges ...[2]string) (*watchStream, error) {
	s, err := c.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, methodWatch)
	if err != nil {
		return nil, err
	}
	ws := &watchStream{ClientStream: s}
	for _, r := range ranges {
		req, err := proto.Marshal(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
			Key: []byte(r[0]), RangeEnd: []byte(r[1]), StartRevision: from,
		}}})
		if err != nil {
			return nil, err
		}
		if err := s.SendMsg(&req); err != nil {
			return nil, err
		}
	}
	for created := 0; created < len(ranges); {
		if err := s.RecvMsg(&ws.answer); err != nil {
			return nil, err
		}
		yes := false
		var inner error
		if err := fields(ws.answer, func(num protowire.Number, v uint64, _ []byte) {
			switch num {
			case fieldWatchCreated:
				yes = v != 0
			case fieldWatchCanceled:
				inner = errors.New("the server canceled a watch when it was created")
			case fieldWatchEvents:
				inner = errors.New("events came before all watches were created: nothing is written yet")
			}
		}); err != nil || inner != nil {
			return nil, errors.Join(err, inner)
		}
		if yes {
			created++
		}
	}
	return ws, nil
}

// next receives one answer and calls f with the encoded key-value of each event.
func (ws *watchStream) next(f func(kv []byte) error) error {
	if err := ws.RecvMsg(&ws.answer); err != nil {
		return err
	}
	return ws.events(f)
}

func (ws *watchStream) events(f func(kv []byte) error) error {
	var inner error
	err := fields(ws.answer, func(num protowire.Number, v uint64, event []byte) {
		switch {
		case num == fieldWatchCanceled && v != 0:
			inner = errors.New("the server canceled the watch")
		case num == fieldWatchEvents && inner == nil:
			if err := fields(event, func(num protowire.Number, _ uint64, kv []byte) {
				if num == fieldEventKV && inner == nil {
					inner = f(kv)
				}
			}); err != nil {
				inner = err
			}
		}
	})
	if err == nil {
		err = inner
	}
	return err
}

// putNumbered puts a value that begins with a number, for the watcher to know which write it sees.
func putNumbered(ctx context.Context, w *worker, key []byte, n uint64) error {
	v := slices.Clone(filling[:kib])
	binary.BigEndian.PutUint64(v, n)
	req, err := proto.Marshal(&pb.PutRequest{Key: key, Value: v})
	if err != nil {
		return err
	}
	return call(ctx, w.conn, methodPut, req, &w.answer)
}

// number reads what putNumbered wrote.
func number(kv []byte) (uint64, error) {
	m := &mvccpb.KeyValue{}
	if err := proto.Unmarshal(kv, m); err != nil {
		return 0, err
	}
	if len(m.Value) < 8 {
		return 0, errors.New("an event has no value")
	}
	return binary.BigEndian.Uint64(m.Value), nil
}

// watchIdle puts one key at a time, with a pause, and measures until the event arrives.
func watchIdle(ctx context.Context, b *bed) ([]float64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ws, err := openWatches(ctx, b.conns[0], 0, [2]string{watched, watched + "\xff"})
	if err != nil {
		return nil, err
	}
	w := &worker{conn: b.conns[len(b.conns)-1]}
	var took []time.Duration
	key := []byte(watched + "idle")
	b.fresh++
	for n, end := uint64(b.fresh)<<32, time.Now().Add(b.o.seconds+b.o.warmup); time.Now().Before(end); n++ {
		arrived := make(chan error, 1)
		var at time.Time
		go func() {
			for seen := false; !seen; {
				if err := ws.next(func(kv []byte) error {
					got, err := number(kv)
					seen = seen || got == n
					return err
				}); err != nil {
					arrived <- err
					return
				}
			}
			at = time.Now()
			arrived <- nil
		}()
		sent := time.Now()
		if err := putNumbered(ctx, w, key, n); err != nil {
			return nil, err
		}
		select {
		case err := <-arrived:
			if err != nil {
				return nil, err
			}
		case <-time.After(30 * time.Second):
			return nil, errors.New("an event did not arrive within 30 s")
		}
		took = append(took, at.Sub(sent))
		sleep(ctx, 2*time.Millisecond)
	}
	slices.Sort(took)
	return []float64{quantile(took, 0.5), quantile(took, 0.99)}, nil
}

// watchMany opens a thousand watches and writes at a fixed rate.
func watchMany(ctx context.Context, b *bed) ([]float64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	perStream := watchers / watchStreams
	streams := make([]*watchStream, watchStreams)
	for i := range streams {
		var ranges [][2]string
		for k := range perStream {
			prefix := fmt.Sprintf("%smany/%03d/", watched, (i*perStream+k)%watchPrefixes)
			ranges = append(ranges, [2]string{prefix, prefix + "\xff"})
		}
		var err error
		if streams[i], err = openWatches(ctx, b.conns[i%len(b.conns)], 0, ranges...); err != nil {
			return nil, err
		}
	}
	type arrival struct {
		n  uint64
		at time.Time
	}
	// Writes are numbered from 1; each stream notes when it saw which.
	seen := make([][]arrival, watchStreams)
	var total atomic.Int64
	failed := make(chan error, watchStreams)
	var reading sync.WaitGroup
	for i, ws := range streams {
		reading.Go(func() {
			for {
				err := ws.RecvMsg(&ws.answer)
				at := time.Now()
				if err == nil {
					err = ws.events(func(kv []byte) error {
						n, err := number(kv)
						seen[i] = append(seen[i], arrival{n, at})
						total.Add(1)
						return err
					})
				}
				if err != nil {
					if ctx.Err() == nil {
						failed <- err
					}
					return
				}
			}
		})
	}
	var answered []time.Time // of write n+1
	writing, stop := context.WithTimeout(ctx, b.o.seconds+b.o.warmup)
	err := b.paced(writing, watchRate, func(_ context.Context, w *worker) error {
		n := uint64(len(answered) + 1)
		key := fmt.Appendf(nil, "%smany/%03d/key", watched, w.rng.IntN(watchPrefixes))
		if err := putNumbered(ctx, w, key, n); err != nil {
			return err
		}
		answered = append(answered, time.Now())
		return nil
	})
	stop()
	if err != nil {
		return nil, err
	}
	want := int64(len(answered) * watchers / watchPrefixes)
	for deadline := time.Now().Add(20 * time.Second); total.Load() < want && time.Now().Before(deadline) && len(failed) == 0; {
		sleep(ctx, time.Millisecond)
	}
	cancel()
	reading.Wait()
	if len(failed) > 0 {
		return nil, <-failed
	}
	if got := total.Load(); got != want {
		return nil, fmt.Errorf("%d events arrived, %d were due", got, want)
	}
	var late []time.Duration
	for _, arrivals := range seen {
		for _, a := range arrivals {
			// An event may be here before the answer: that is not late at all.
			late = append(late, max(0, a.at.Sub(answered[a.n-1])))
		}
	}
	slices.Sort(late)
	return []float64{quantile(late, 0.99)}, nil
}

// watchCatchUp opens a watch in the past and reads until it has all.
func watchCatchUp(ctx context.Context, b *bed) ([]float64, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	want := b.o.scale(history) / 50 * 50
	start := time.Now()
	s, err := b.conns[0].NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, methodWatch)
	if err != nil {
		return nil, err
	}
	req, err := proto.Marshal(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key: []byte(catchUp), RangeEnd: []byte(catchUp + "\xff"), StartRevision: b.marks[catchUp],
	}}})
	if err != nil {
		return nil, err
	}
	if err := s.SendMsg(&req); err != nil {
		return nil, err
	}
	ws := &watchStream{ClientStream: s}
	last := b.marks[catchUp] - 1
	for n := 0; n < want; {
		if err := ws.next(func(kv []byte) error {
			n++
			var rev int64
			if err := fields(kv, func(num protowire.Number, v uint64, _ []byte) {
				if num == fieldKVModRevision {
					rev = int64(v)
				}
			}); err != nil {
				return err
			}
			if rev <= last {
				return fmt.Errorf("revision %d came after %d", rev, last)
			}
			last = rev
			return nil
		}); err != nil {
			return nil, err
		}
	}
	return []float64{float64(want) / time.Since(start).Seconds()}, nil
}

// watchNothing keeps a hundred watches open while nothing happens.
func watchNothing(ctx context.Context, b *bed) ([]float64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for i := range 10 {
		var ranges [][2]string
		for k := range 10 {
			prefix := fmt.Sprintf("%sidle/%d/%d/", watched, i, k)
			ranges = append(ranges, [2]string{prefix, prefix + "\xff"})
		}
		if _, err := openWatches(ctx, b.conns[i%len(b.conns)], 0, ranges...); err != nil {
			return nil, err
		}
	}
	sleep(ctx, b.o.settle)
	before, err := b.p.CPU()
	if err != nil {
		return nil, err
	}
	start := time.Now()
	sleep(ctx, b.o.seconds)
	after, err := b.p.CPU()
	return []float64{100 * (after - before).Seconds() / time.Since(start).Seconds()}, err
}
