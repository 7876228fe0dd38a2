package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Scale on one node: a large database is loaded, used, killed, restarted and compacted, on one server after the other, each
// alone on the machine. It is one long story, not rounds: every figure is measured once. The same operations are measured on
// a fresh store, after the creates, after the updates and after the compaction: what grows with the history shows.

// extent is one size of database.
type extent struct {
	name     string   // as in -scale
	servers  []string // that are measured if -servers does not say otherwise
	keys     int
	size     int   // of each value
	page     int   // keys of a list page
	rounds   int   // how often each key is updated
	minBytes int64 // if set, instead of rounds: the updates go on until the server says that its database is so large
	marks    marks // of the table
}

var extents = []extent{
	{
		name: "1m", servers: []string{"quire", "etcd"}, keys: 1_000_000, size: kib, page: pageSize, rounds: 2,
		marks: marks{"<!-- scale:begin (written by make bench-scale) -->", "<!-- scale:end -->"},
	},
	{
		// etcd's documentation advises no more than 8 GiB.
		name: "20g", servers: []string{"quire"}, keys: 400_000, size: 16 * kib, page: 100, minBytes: 20 << 30,
		marks: marks{"<!-- scale-20g:begin (written by make bench-scale) -->", "<!-- scale-20g:end -->"},
	},
}

const (
	scaleQuota   = 64 << 30 // bytes: the 20 GiB, and what is written while they are compacted
	loadClients  = 256
	freshKeys    = 1_000
	stepLimit    = time.Hour // a server that hangs must not hold up the run for ever
	meterPeriod  = 10 * time.Second
	killedAfter  = 2 * time.Second // of writing
	readsPerSec  = 100             // gets while the store is compacted
	shrinkPeriod = 2 * time.Second // files that are no smaller after this shrink no further
	shrinkLimit  = 3 * time.Minute
)

// parseExtents reads -scale. The sizes are divided by divide.
func parseExtents(list string, servers []string, divide int) ([]extent, error) {
	var out []extent
	for name := range strings.SplitSeq(list, ",") {
		k := slices.IndexFunc(extents, func(e extent) bool { return e.name == name })
		if k < 0 {
			return nil, fmt.Errorf("-scale: %q is unknown: use 1m, 20g or 1m,20g", name)
		}
		e := extents[k]
		e.keys /= divide
		e.minBytes /= int64(divide)
		if e.keys < loadClients {
			return nil, fmt.Errorf("-divide: %d keys are left, at least %d are needed", e.keys, loadClients)
		}
		if servers != nil {
			e.servers = servers
		}
		out = append(out, e)
	}
	return out, nil
}

// story is what has become of one server so far.
type story struct {
	o    *options
	e    extent
	kind string
	b    *bed     // nil: no server
	set  *objects // what it holds
	cut  int      // writes that may have happened though they had no answer
}

// step is one part of the story; what has metrics is a row of the table.
type step struct {
	name    string
	metrics []metric
	needed  bool // by all that follows
	run     func(ctx context.Context) ([]float64, error)
}

// steps is the whole story.
func (t *story) steps() []step {
	e := t.e
	created := fmt.Sprintf("%s keys × %d KiB", amount(e.keys), e.size/kib)
	full := fmt.Sprintf("the same keys, %s revisions", amount(e.keys*(1+e.rounds)))
	updates := amount(e.keys*e.rounds) + " updates"
	if e.minBytes > 0 {
		full = fmt.Sprintf("the same keys in a database of %.3g GiB", float64(e.minBytes)/(1<<30))
		updates = fmt.Sprintf("updates until it has %.3g GiB", float64(e.minBytes)/(1<<30))
	} else {
		created += ", as many revisions"
	}
	loading := []metric{{unit: "s"}, {unit: "ops/s", more: true}, {unit: "MB/s of values", more: true}}
	sizes := []metric{
		{unit: "MiB resident"}, {unit: "MiB of database"}, {unit: "MiB of it in use"}, {unit: "MiB on disk, log included"},
	}
	return slices.Concat(
		[]step{{name: "start", needed: true, run: t.openFresh}},
		t.phase(fmt.Sprintf("fresh store of %s keys × %d KiB", amount(freshKeys), e.size/kib)),
		[]step{
			{name: "start", needed: true, run: t.openEmpty},
			{
				name: fmt.Sprintf("load: %s creates, %d clients", amount(e.keys), loadClients), metrics: loading, needed: true,
				run: t.loadCreates,
			},
			{name: "verify", needed: true, run: t.verify},
		},
		t.phase(created),
		[]step{
			{
				name: fmt.Sprintf("load: %s, %d clients", updates, loadClients), metrics: loading, needed: true,
				run: t.loadUpdates,
			},
			{name: "memory and disk after the load", metrics: sizes, run: t.sizes},
			{name: "verify", needed: true, run: t.verify},
		},
		t.phase(full),
		[]step{
			{
				name: "restart after kill -9 during puts → first read", needed: true, run: t.restart,
				metrics: []metric{{unit: "s"}, {unit: "MiB resident, nothing read"}},
			},
			{
				name: "compaction to the newest revision, puts of 64 clients meanwhile", run: t.compaction,
				metrics: []metric{
					{unit: "s until compacted"}, {unit: "ms put max"}, {unit: "ms put p99"}, {unit: "puts/s", more: true}, {unit: "ms get max"},
				},
			},
			{name: "verify", needed: true, run: t.verify},
		},
		t.phase("after the compaction"),
		[]step{
			{
				name: "compaction again, with nobody writing", run: t.quietCompaction,
				metrics: append([]metric{{unit: "s until compacted"}, {unit: "s more until the files shrink no further"}}, sizes...),
			},
			{name: "verify", needed: true, run: t.verify},
		},
	)
}

// phase measures the operations on the store as it is.
func (t *story) phase(store string) []step {
	return []step{
		{
			name:    store + ": put, 64 clients",
			metrics: []metric{{unit: "ops/s", more: true}, {unit: "ms p50"}, {unit: "ms p99"}},
			run: func(ctx context.Context) ([]float64, error) {
				r, err := t.b.closedLoop(ctx, workers64, t.put())
				return []float64{r.perSecond(), quantile(r.took, 0.5), quantile(r.took, 0.99)}, err
			},
		},
		{
			name:    store + ": linearizable get, 64 clients",
			metrics: []metric{{unit: "ops/s", more: true}, {unit: "ms p50"}},
			run: func(ctx context.Context) ([]float64, error) {
				r, err := t.b.closedLoop(ctx, workers64, t.set.get)
				return []float64{r.perSecond(), quantile(r.took, 0.5)}, err
			},
		},
		{
			name:    store + ": list in pages",
			metrics: []metric{{unit: "pages/s", more: true}},
			run: func(ctx context.Context) ([]float64, error) {
				at := &walk{}
				r, err := t.b.closedLoop(ctx, 1, func(ctx context.Context, w *worker) error { return t.set.nextPage(ctx, w, at) })
				return []float64{r.perSecond()}, err
			},
		},
		{
			name:    store + ": count of all keys",
			metrics: []metric{{unit: "ms p50"}},
			run: func(ctx context.Context) ([]float64, error) {
				r, err := t.b.closedLoop(ctx, 1, t.set.count)
				return []float64{quantile(r.took, 0.5)}, err
			},
		},
	}
}

// runScale measures the extents asked for. Each table is written as soon as it is complete.
func (o *options) runScale(ctx context.Context) error {
	for _, e := range o.extents {
		o.servers = e.servers
		facts, err := o.facts(ctx)
		if err != nil {
			return err
		}
		facts = append(facts, fmt.Sprintf("one round, each server alone on the machine; operations for %s each, %d connections; pages of %d; in brackets the ratio to etcd, more than 1 is better",
			o.seconds, o.conns, e.page))
		var rows []row
		for _, s := range (&story{e: e}).steps() {
			rows = append(rows, row{w: workload{name: s.name, metrics: s.metrics}, cells: map[string]*cell{}})
		}
		for _, kind := range e.servers {
			t := &story{o: o, e: e, kind: kind}
			err := t.tell(ctx, t.steps(), rows)
			if err := errors.Join(err, t.close()); err != nil {
				return err
			}
		}
		text := "- " + strings.Join(facts, "\n- ") + "\n\n" + table(e.servers, rows, 1)
		fmt.Println(text)
		if o.out != "" {
			if err := insert(o.out, e.marks, text); err != nil {
				return err
			}
		}
	}
	return nil
}

// tell goes through the story of one server and notes the outcome in the rows' cells. Only the end of ctx is an error.
func (t *story) tell(ctx context.Context, steps []step, rows []row) error {
	var broken error
	for i, s := range steps {
		if !s.needed && !t.o.only.MatchString(s.name) {
			continue
		}
		c := &cell{err: broken}
		rows[i].cells[t.kind] = c
		if broken != nil {
			continue
		}
		start := time.Now()
		values, err := t.step(ctx, s)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		took := time.Since(start).Round(100 * time.Millisecond)
		if err != nil {
			progress("%s: %s: %s fails after %s: %v", t.e.name, t.kind, s.name, took, err)
			c.err = err
			t.cut += loadClients // whatever was under way
			if s.needed || t.b == nil || t.b.p == nil || t.b.alive() != nil {
				broken = fmt.Errorf("not reached: %s failed: %w", s.name, err)
			}
			if errors.Is(err, errDataLost) {
				broken = fmt.Errorf("%s: %w", s.name, err)
				// Figures of a server that lost data are not worth a table.
				for _, r := range rows[:i+1] {
					r.cells[t.kind] = &cell{err: broken}
				}
			}
			continue
		}
		c.rounds = [][]float64{values}
		var text []string
		for k, m := range s.metrics {
			text = append(text, number3(values[k])+" "+m.unit)
		}
		progress("%s: %s: %s (%s): %s", t.e.name, t.kind, s.name, took, strings.Join(text, ", "))
	}
	return nil
}

func (t *story) step(ctx context.Context, s step) ([]float64, error) {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	return s.run(ctx)
}

// open puts a new server in the place of the one that runs.
func (t *story) open(ctx context.Context, name string, keys int) error {
	if err := t.close(); err != nil {
		return err
	}
	b, err := newBed(ctx, t.o, t.kind, t.e.name+"-"+name)
	if err != nil {
		return err
	}
	t.b = b
	t.set = newObjects(keys, t.e.size, t.e.page)
	t.cut = 0
	_, err = b.start(ctx)
	return err
}

func (t *story) close() error {
	if t.b == nil {
		return nil
	}
	err := t.b.discard()
	t.b = nil
	return err
}

func (t *story) openFresh(ctx context.Context) ([]float64, error) {
	if err := t.open(ctx, "fresh", freshKeys); err != nil {
		return nil, err
	}
	return nil, t.b.fixed(ctx, workers64, t.set.n, t.set.create)
}

func (t *story) openEmpty(ctx context.Context) ([]float64, error) {
	return nil, t.open(ctx, "full", t.e.keys)
}

// verify fails if the server has lost anything.
func (t *story) verify(ctx context.Context) ([]float64, error) {
	err := t.set.verify(ctx, t.b, t.cut)
	if err == nil {
		t.cut = 0
	}
	return nil, err
}

// put is the write that the server knows.
func (t *story) put() func(context.Context, *worker) error {
	if t.b.isKine() {
		return t.set.updateOwn
	}
	return t.set.put
}

func (t *story) loadCreates(ctx context.Context) ([]float64, error) {
	start, next := time.Now(), order(t.set.n, 0)
	m := t.startMeter("creates")
	defer m.stop()
	err := t.b.fixed(ctx, loadClients, t.set.n, func(ctx context.Context, w *worker, k int) error {
		m.done.Add(1)
		return t.set.create(ctx, w, next(k))
	})
	return t.loaded(t.set.n, time.Since(start)), err
}

// loadUpdates updates every key once in each round. It goes in parts: a key is not updated again before the update of the
// round before has ended.
func (t *story) loadUpdates(ctx context.Context) ([]float64, error) {
	start, total := time.Now(), 0
	m := t.startMeter("updates")
	defer m.stop()
	for round := 1; t.e.minBytes > 0 || round <= t.e.rounds; round++ {
		next := order(t.set.n, round)
		for from, part := 0, t.set.n/20; from < t.set.n; from += part {
			n := min(part, t.set.n-from)
			if err := t.b.fixed(ctx, loadClients, n, func(ctx context.Context, w *worker, k int) error {
				m.done.Add(1)
				return t.set.update(ctx, w, next(from+k))
			}); err != nil {
				return nil, err
			}
			total += n
			if t.e.minBytes == 0 {
				continue
			}
			st, err := t.status(ctx)
			if err != nil {
				return nil, err
			}
			if st.DbSize >= t.e.minBytes {
				return t.loaded(total, time.Since(start)), nil
			}
			if written := int64(total) * int64(t.set.size); written > 2*t.e.minBytes {
				return nil, fmt.Errorf("after %d bytes of updates the database has %d bytes, expected %d: does the server compact by itself?", written, st.DbSize, t.e.minBytes)
			}
		}
	}
	return t.loaded(total, time.Since(start)), nil
}

// loaded gives the metrics of a load.
func (t *story) loaded(n int, took time.Duration) []float64 {
	rate := float64(n) / took.Seconds()
	return []float64{took.Seconds(), rate, rate * float64(t.set.size) / 1e6}
}

func (t *story) status(ctx context.Context) (*pb.StatusResponse, error) {
	r := &pb.StatusResponse{}
	return r, callProto(ctx, t.b.conns[0], methodStatus, &pb.StatusRequest{}, r)
}

func (t *story) sizes(ctx context.Context) ([]float64, error) {
	sleep(ctx, t.o.settle)
	rss, err := t.b.p.RSS()
	if err != nil {
		return nil, err
	}
	st, err := t.status(ctx)
	if err != nil {
		return nil, err
	}
	disk, err := diskUsage(t.b.spec.DataDir())
	return []float64{mebibytes(rss), mebibytes(st.DbSize), mebibytes(st.DbSizeInUse), mebibytes(disk)}, err
}

func mebibytes(n int64) float64 { return float64(n) / (1 << 20) }

// diskUsage is what the files below a directory occupy, in bytes.
func diskUsage(dir string) (int64, error) {
	var total int64
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return ignoreGone(err)
		}
		info, err := d.Info()
		if err != nil {
			return ignoreGone(err)
		}
		total += info.Sys().(*syscall.Stat_t).Blocks * 512 // stat(2): in units of 512 bytes, whatever the file system's are
		return nil
	})
	return total, err
}

// ignoreGone: a server removes and renames files of its log while others look.
func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// restart kills the server in the middle of writing, measures until it answers again, and looks for every key.
func (t *story) restart(ctx context.Context) ([]float64, error) {
	ended := make(chan error, 1)
	go func() {
		_, err := t.b.closedLoopDuring(ctx, workers64, t.put(), func(ctx context.Context) error {
			<-ctx.Done()
			return nil
		})
		ended <- err
	}()
	select {
	case err := <-ended:
		return nil, fmt.Errorf("writing before the kill: %w", err)
	case <-time.After(killedAfter):
	}
	t.b.p.Kill()
	<-ended // with the error that the server is gone, as it should
	if err := t.b.kill(); err != nil {
		return nil, err
	}
	took, err := t.b.start(ctx)
	if err != nil {
		return nil, err
	}
	sleep(ctx, t.o.settle)
	rss, err := t.b.p.RSS()
	if err != nil {
		return nil, err
	}
	t.cut += workers64
	_, err = t.verify(ctx)
	return []float64{took.Seconds(), mebibytes(rss)}, err
}

// compaction drops all of the history while puts and gets go on.
func (t *story) compaction(ctx context.Context) ([]float64, error) {
	var at int64
	var took, slowestGet time.Duration
	r, err := t.b.closedLoopDuring(ctx, workers64, t.put(), func(ctx context.Context) error {
		reading, stop := context.WithCancel(ctx)
		ended := make(chan error, 1)
		go func() {
			ended <- t.b.paced(reading, readsPerSec, func(ctx context.Context, w *worker) error {
				start := time.Now()
				err := t.set.get(ctx, w)
				slowestGet = max(slowestGet, time.Since(start))
				return err
			})
		}()
		var err error
		at, took, err = t.compact(ctx)
		sleep(ctx, t.o.seconds-took)
		stop()
		return errors.Join(err, <-ended)
	})
	if err != nil {
		return nil, err
	}
	old := &pb.RangeRequest{Key: t.set.key(0), Revision: at - 1}
	if err := callProto(ctx, t.b.conns[0], methodRange, old, &pb.RangeResponse{}); status.Code(err) != codes.OutOfRange {
		return nil, fmt.Errorf("a read at revision %d, before the compaction at %d, gave %v, expected that it is compacted", at-1, at, err)
	}
	return []float64{took.Seconds(), quantile(r.took, 1), quantile(r.took, 0.99), r.perSecond(), float64(slowestGet) / float64(time.Millisecond)}, nil
}

// compact compacts to the newest revision and waits until the rows before it are gone.
func (t *story) compact(ctx context.Context) (at int64, took time.Duration, err error) {
	if at, err = t.b.revision(ctx); err != nil {
		return 0, 0, err
	}
	start := time.Now()
	err = callProto(ctx, t.b.conns[0], methodCompact, &pb.CompactionRequest{Revision: at, Physical: true}, &pb.CompactionResponse{})
	return at, time.Since(start), err
}

// quietCompaction leaves the newest value of each key alone, waits as long as the files become smaller, and measures what is
// left.
func (t *story) quietCompaction(ctx context.Context) ([]float64, error) {
	_, took, err := t.compact(ctx)
	if err != nil {
		return nil, err
	}
	start, shrunk := time.Now(), time.Duration(0)
	disk, err := diskUsage(t.b.spec.DataDir())
	for err == nil && time.Since(start) < shrinkLimit && ctx.Err() == nil {
		before := disk
		sleep(ctx, max(t.o.seconds, shrinkPeriod))
		if disk, err = diskUsage(t.b.spec.DataDir()); disk >= before {
			break
		}
		shrunk = time.Since(start)
	}
	if err != nil {
		return nil, err
	}
	sizes, err := t.sizes(ctx)
	return append([]float64{took.Seconds(), shrunk.Seconds()}, sizes...), err
}

// meter says now and then how far a load is.
type meter struct {
	done atomic.Int64 // operations begun
	stop func()
}

func (t *story) startMeter(what string) *meter {
	m := &meter{}
	quit := make(chan struct{})
	var telling sync.WaitGroup
	telling.Go(func() {
		tick := time.NewTicker(meterPeriod)
		defer tick.Stop()
		for before := int64(0); ; {
			select {
			case <-quit:
				return
			case <-tick.C:
				now := m.done.Load()
				progress("%s: %s: %d %s, now %s/s", t.e.name, t.kind, now, what, number3(float64(now-before)/meterPeriod.Seconds()))
				before = now
			}
		}
	})
	m.stop = func() { close(quit); telling.Wait() }
	return m
}

// amount writes a number shortly: 1M, 50k.
func amount(n int) string {
	switch {
	case n >= 1_000_000 && n%100_000 == 0:
		return fmt.Sprintf("%gM", float64(n)/1e6)
	case n >= 1000 && n%1000 == 0:
		return fmt.Sprintf("%dk", n/1000)
	default:
		return fmt.Sprint(n)
	}
}
