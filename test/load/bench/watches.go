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
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

const (
	watchedOne   = "/registry/one/"
	watchedMany  = "/registry/many/"
	watchedIdle  = "/registry/idle/"
	catchUp      = "/registry/catchup/"
	watchStreams = 10
	watchers     = 1000
	watchedKeys  = 100 // so each write reaches ten watchers
	watchRate    = 200 // writes a second
	history      = 50_000
)

// watchScene: how soon events come, how fast a watcher catches up, and what an idle one costs.
func watchScene() scene {
	return scene{
		name: "watches",
		prepare: func(ctx context.Context, b *bed) error {
			if _, err := b.load(ctx, watchedOne, 1, kib); err != nil {
				return err
			}
			if _, err := b.load(ctx, watchedMany, watchedKeys, kib); err != nil {
				return err
			}
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
				name:    "watch, 1 watcher, idle server: update sent → event here",
				metrics: []metric{{unit: "ms p50"}, {unit: "ms p99"}},
				run:     watchIdle,
			},
			{
				name:    "watch, 1000 watchers on 10 streams, 200 updates/s: answered → event here",
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
				run: func(ctx context.Context, b *bed) ([]float64, error) {
					v, err := watchNothing(ctx, b)
					return v[:1], err
				},
			},
		},
	}
}

// watchStream is one open stream whose answers are read as bytes.
type watchStream struct {
	grpc.ClientStream
	answer []byte
}

// openWatches opens a stream with one watch for each range [key, end), from the next revision on, and waits until all are
// created. Nothing must be written meanwhile. The revision is named because kine takes 0 for the beginning of history.
func (b *bed) openWatches(ctx context.Context, c *grpc.ClientConn, ranges ...[2]string) (*watchStream, error) {
	now, err := b.revision(ctx)
	if err != nil {
		return nil, err
	}
	s, err := c.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, methodWatch)
	if err != nil {
		return nil, err
	}
	ws := &watchStream{ClientStream: s}
	for _, r := range ranges {
		req, err := proto.Marshal(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
			Key: []byte(r[0]), RangeEnd: []byte(r[1]), StartRevision: now + 1,
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

// modRevision reads the mod_revision of an encoded key-value.
func modRevision(kv []byte) (int64, error) {
	var rev int64
	err := fields(kv, func(num protowire.Number, v uint64, _ []byte) {
		if num == fieldKVModRevision {
			rev = int64(v)
		}
	})
	return rev, err
}

// arrival is an event as a watcher saw it.
type arrival struct {
	rev int64
	at  time.Time
}

// arrivals receives one answer and appends its events to seen.
func (ws *watchStream) arrivals(seen []arrival) ([]arrival, error) {
	if err := ws.RecvMsg(&ws.answer); err != nil {
		return seen, err
	}
	at := time.Now()
	err := ws.events(func(kv []byte) error {
		rev, err := modRevision(kv)
		seen = append(seen, arrival{rev, at})
		return err
	})
	return seen, err
}

// watchIdle updates one key at a time, with a pause, and measures until the event arrives.
func watchIdle(ctx context.Context, b *bed) ([]float64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := b.keys[watchedOne]
	if err := b.refresh(ctx, watchedOne); err != nil {
		return nil, err
	}
	ws, err := b.openWatches(ctx, b.conns[0], prefixRange(watchedOne))
	if err != nil {
		return nil, err
	}
	arrived := make(chan arrival, 16)
	failed := make(chan error, 1)
	go func() {
		for {
			seen, err := ws.arrivals(nil)
			if err != nil {
				failed <- err // the last thing: nobody need take it
				return
			}
			for _, a := range seen {
				arrived <- a
			}
		}
	}()
	w := &worker{conn: b.conns[len(b.conns)-1]}
	var took []time.Duration
	for end := time.Now().Add(b.o.seconds + b.o.warmup); time.Now().Before(end); {
		sent := time.Now()
		if err := s.update(ctx, w, 0); err != nil {
			return nil, err
		}
		select {
		case a := <-arrived:
			if a.rev != s.revs[0] {
				return nil, fmt.Errorf("an event of revision %d arrived, %d was due", a.rev, s.revs[0])
			}
			took = append(took, a.at.Sub(sent))
		case err := <-failed:
			return nil, err
		case <-time.After(30 * time.Second):
			return nil, errors.New("an event did not arrive within 30 s")
		}
		sleep(ctx, 2*time.Millisecond)
	}
	slices.Sort(took)
	return []float64{quantile(took, 0.5), quantile(took, 0.99)}, nil
}

// watchMany opens a thousand watches and writes at a fixed rate.
func watchMany(ctx context.Context, b *bed) ([]float64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := b.keys[watchedMany]
	if err := b.refresh(ctx, watchedMany); err != nil {
		return nil, err
	}
	perStream := watchers / watchStreams
	streams := make([]*watchStream, watchStreams)
	for i := range streams {
		var ranges [][2]string
		for k := range perStream {
			prefix := string(s.key((i*perStream + k) % s.n))
			ranges = append(ranges, prefixRange(prefix))
		}
		var err error
		if streams[i], err = b.openWatches(ctx, b.conns[i%len(b.conns)], ranges...); err != nil {
			return nil, err
		}
	}
	seen := make([][]arrival, watchStreams)
	var total atomic.Int64
	failed := make(chan error, watchStreams)
	var reading sync.WaitGroup
	for i, ws := range streams {
		reading.Go(func() {
			for {
				before := len(seen[i])
				var err error
				if seen[i], err = ws.arrivals(seen[i]); err != nil {
					if ctx.Err() == nil {
						failed <- err
					}
					return
				}
				total.Add(int64(len(seen[i]) - before))
			}
		})
	}
	answered := map[int64]time.Time{} // by revision
	writing, stop := context.WithTimeout(ctx, b.o.seconds+b.o.warmup)
	err := b.paced(writing, watchRate, func(_ context.Context, w *worker) error {
		i := w.rng.IntN(s.n)
		err := s.update(ctx, w, i) // not with the context that ends the writing: a write that is cut off has no answer
		answered[s.revs[i]] = time.Now()
		return err
	})
	stop()
	if err != nil {
		return nil, err
	}
	want := int64(len(answered) * watchers / s.n)
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
			late = append(late, max(0, a.at.Sub(answered[a.rev])))
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
		Key: []byte(catchUp), RangeEnd: []byte(prefixEnd(catchUp)), StartRevision: b.marks[catchUp],
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
			rev, err := modRevision(kv)
			if err != nil {
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

// watchNothing keeps a hundred watches open while nothing happens. Its second value is PostgreSQL's.
func watchNothing(ctx context.Context, b *bed) (busy [2]float64, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for i := range 10 {
		var ranges [][2]string
		for k := range 10 {
			prefix := fmt.Sprintf("%s%d/%d/", watchedIdle, i, k)
			ranges = append(ranges, prefixRange(prefix))
		}
		if _, err := b.openWatches(ctx, b.conns[i%len(b.conns)], ranges...); err != nil {
			return busy, err
		}
	}
	sleep(ctx, b.o.settle)
	before, err := b.usage()
	if err != nil {
		return busy, err
	}
	start := time.Now()
	sleep(ctx, b.o.seconds)
	after, err := b.usage()
	used, took := after.since(before), time.Since(start).Seconds()
	return [2]float64{100 * used.cpu.Seconds() / took, 100 * used.database / took}, err
}
