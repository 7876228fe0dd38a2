package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

const (
	listed      = "/registry/listed/"
	changed     = "/registry/changed/"
	listedKeys  = 100_000
	changedKeys = 1000 // each is watched by one watcher
	changes     = 50   // of each of them: 50,000 revisions of history
	putClients  = 8
)

// fairScene: what those who list and watch cost those who write.
//
// They are a process of their own, as other clients are: within the process that measures they would hold up the goroutines
// that put, and that would be charged to the server. It receives pages and events as bytes, looks at no more of them than it
// needs to count, and has the lowest priority: on a machine of its own it would take nothing from the server and from those who
// put, here it takes only what they leave. Still the server's work for them and the puts share few cores: even if another
// server did that work the puts would be slower, on two cores about four times at p99.
func fairScene() scene {
	return scene{
		name: "fairness",
		prepare: func(ctx context.Context, b *bed) error {
			if _, err := b.load(ctx, rows, b.o.scale(writeKeys), kib); err != nil {
				return err
			}
			if _, err := b.load(ctx, listed, b.o.scale(listedKeys), kib); err != nil {
				return err
			}
			s, err := b.load(ctx, changed, changedKeys, kib)
			if err != nil {
				return err
			}
			// Each key has one writer; the rounds go over all keys, so that what one watcher wants lies all over the history.
			const own = changedKeys / 50
			return b.fixed(ctx, 50, 50, func(ctx context.Context, w *worker, i int) error {
				for k := range own * b.changes() {
					if err := s.update(ctx, w, i*own+k%own); err != nil {
						return err
					}
				}
				return nil
			})
		},
		workloads: []workload{{
			name: "put, 8 clients, while one client lists 100k keys in pages and one opens 1000 watches from revision 1",
			metrics: []metric{
				{unit: "ms p99, quiet"}, {unit: "ms p99, disturbed"}, {unit: "disturbed ÷ quiet"},
				{unit: "puts/s, disturbed", more: true}, {unit: "pages/s", more: true}, {unit: "events/s", more: true},
			},
			run: fairness,
		}},
	}
}

// changes is how often each key was updated.
func (b *bed) changes() int { return max(1, b.o.scale(changes)) }

// fairness measures puts alone, then while others list and watch as fast as they can.
func fairness(ctx context.Context, b *bed) ([]float64, error) {
	quiet, err := b.writing(ctx, putClients, b.put)
	if err != nil {
		return nil, err
	}
	d, err := b.startDisturbers(ctx)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	disturbed, err := b.writing(ctx, putClients, b.put)
	seconds := time.Since(start).Seconds()
	did, stopErr := d.stop()
	if err := errors.Join(err, stopErr); err != nil {
		return nil, err
	}
	before, after := quantile(quiet.took, 0.99), quantile(disturbed.took, 0.99)
	return []float64{
		before, after, after / before, disturbed.perSecond(), float64(did.Pages) / seconds, float64(did.Events) / seconds,
	}, nil
}

// disturbance is what the disturbers are to do, and what they did.
type disturbance struct {
	Addr   string // of the server
	Listed int    // keys there are to list
	PerKey int    // events there are of each watched key
	Pages  int64  // read until the end
	Events int64
}

// disturbers are the process of those who list and watch.
type disturbers struct {
	cmd   *exec.Cmd
	input io.Closer
	out   bytes.Buffer
	logs  bytes.Buffer
}

// startDisturbers runs this program again with the argument disturbCommand.
func (b *bed) startDisturbers(ctx context.Context) (*disturbers, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	task, err := json.Marshal(disturbance{Addr: b.spec.Addr, Listed: b.keys[listed].n, PerKey: 1 + b.changes()})
	if err != nil {
		return nil, err
	}
	d := &disturbers{cmd: exec.CommandContext(ctx, "nice", "-n", "19", self, disturbCommand, string(task))}
	d.cmd.Stdout, d.cmd.Stderr = &d.out, &d.logs
	if d.input, err = d.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	return d, d.cmd.Start()
}

// stop ends the disturbers and returns what they did. That they failed is an error.
func (d *disturbers) stop() (did disturbance, err error) {
	err = errors.Join(d.input.Close(), d.cmd.Wait())
	if err == nil {
		err = json.Unmarshal(d.out.Bytes(), &did)
	}
	if err == nil && (did.Pages == 0 || did.Events == 0) {
		err = fmt.Errorf("%d pages were listed and %d events read: that disturbs nobody", did.Pages, did.Events)
	}
	if err != nil {
		err = fmt.Errorf("the clients that list and watch: %w: %s", err, bytes.TrimSpace(d.logs.Bytes()))
	}
	return did, err
}

// disturbCommand as the first argument makes this program the disturbers, until its standard input ends.
const disturbCommand = "disturb"

// disturb lists and watches until the input ends and then writes what it did to out.
func disturb(ctx context.Context, task string, in io.Reader, out io.Writer) error {
	var d disturbance
	if err := json.Unmarshal([]byte(task), &d); err != nil {
		return fmt.Errorf("%s is only for this program itself: %w", disturbCommand, err)
	}
	conns, err := dial(d.Addr, 2)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		_, err := io.Copy(io.Discard, in)
		cancel(err) // nil is context.Canceled: all is well
	}()
	var pages, events atomic.Int64
	var running sync.WaitGroup
	running.Go(func() { cancel(listForever(ctx, conns[0], d.Listed, &pages)) })
	running.Go(func() { cancel(watchForever(ctx, conns[1], d.PerKey, &events)) })
	running.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	d.Pages, d.Events = pages.Load(), events.Load()
	return json.NewEncoder(out).Encode(d)
}

// listForever lists all keys in pages, over and over until it fails.
func listForever(ctx context.Context, c *grpc.ClientConn, n int, pages *atomic.Int64) error {
	s, w := &keySet{prefix: listed, n: n}, &worker{conn: c}
	for at := (&walk{}); ; pages.Add(1) {
		if err := w.page(ctx, s, at); err != nil {
			return err
		}
	}
}

// watchForever opens all watches, reads until each has its whole history, closes them and begins anew, until it fails.
func watchForever(ctx context.Context, c *grpc.ClientConn, perKey int, events *atomic.Int64) error {
	s := &keySet{prefix: changed, n: changedKeys}
	for {
		var reading sync.WaitGroup
		errs := make([]error, watchStreams)
		for i := range errs {
			reading.Go(func() { errs[i] = s.readHistory(ctx, c, i, perKey, events) })
		}
		reading.Wait()
		if err := errors.Join(errs...); err != nil {
			return err
		}
	}
}

// readHistory opens the i-th stream with its share of one watch for each key, from revision 1 on, and reads until it has all
// events there are, so many of each key.
func (s *keySet) readHistory(ctx context.Context, c *grpc.ClientConn, i, perKey int, events *atomic.Int64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, methodWatch)
	if err != nil {
		return err
	}
	share := s.n / watchStreams
	for k := i * share; k < (i+1)*share; k++ {
		req, err := proto.Marshal(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
			Key: s.key(k), RangeEnd: append(s.key(k), 0xff), StartRevision: 1,
		}}})
		if err != nil {
			return err
		}
		if err := stream.SendMsg(&req); err != nil {
			return err
		}
	}
	ws := &watchStream{ClientStream: stream}
	for n := 0; n < share*perKey; {
		if err := ws.next(func([]byte) error {
			n++
			events.Add(1)
			return nil
		}); err != nil {
			return fmt.Errorf("after %d of %d events: %w", n, share*perKey, err)
		}
	}
	return nil
}
