package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

var profileMarks = marks{"<!-- profile:begin (written by make profile) -->", "<!-- profile:end -->"}

const (
	topSites      = 10
	fanOutClients = 10
	fanOutRate    = 200 // updates a second of each of them
)

// profiled is a workload under which quire is profiled.
type profiled struct {
	name    string
	op      string // what one operation is called
	clients int
	// prepare makes what the operation needs, and the operation. What it opens ends with ctx.
	prepare func(ctx context.Context, b *bed) (func(ctx context.Context, w *worker) error, error)
}

func profiledWorkloads() []profiled {
	return []profiled{
		{
			name: "Put, 64 clients", op: "put", clients: workers64,
			prepare: func(_ context.Context, b *bed) (func(context.Context, *worker) error, error) { return b.put, nil },
		},
		{
			name: "Linearizable get, 64 clients", op: "get", clients: workers64,
			prepare: func(_ context.Context, b *bed) (func(context.Context, *worker) error, error) { return b.get, nil },
		},
		{
			name: "List in pages of 500 × 2 KiB, of 10k keys, 1 client", op: "page", clients: 1,
			prepare: func(ctx context.Context, b *bed) (func(context.Context, *worker) error, error) {
				s, err := b.load(ctx, small, b.o.scale(10_000), 2*kib)
				at := &walk{}
				return func(ctx context.Context, w *worker) error { return w.page(ctx, s, at) }, err
			},
		},
		{
			name: "Watch, 1000 watchers on 10 streams, 2000 updates/s of 10 events each", op: "update", clients: fanOutClients,
			prepare: fanOut,
		},
	}
}

// runProfiles profiles quire under each of the workloads and writes what it found into the document.
func (o *options) runProfiles(ctx context.Context) (err error) {
	b, err := newBed(ctx, o, o.servers[0], "profile")
	if err != nil {
		return err
	}
	b.spec.Flags = append(b.spec.Flags, "--enable-pprof")
	defer func() { err = errors.Join(err, b.discard()) }()
	if _, err := b.start(ctx); err != nil {
		return err
	}
	if _, err := b.load(ctx, rows, o.scale(writeKeys), kib); err != nil {
		return err
	}
	facts, err := machineFacts(o.dir)
	if err != nil {
		return err
	}
	var text strings.Builder
	fmt.Fprintf(&text, "- %s\n- Each profile was taken for %s\n", strings.Join(facts, "\n- "), profileTime(o))
	for _, p := range profiledWorkloads() {
		if !o.only.MatchString(p.name) {
			continue
		}
		progress("profiling: %s", p.name)
		section, err := b.profile(ctx, p)
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		text.WriteString(section)
	}
	fmt.Println(text.String())
	if o.out == "" || o.servers[0] != "quire" {
		return nil
	}
	return insert(o.out, profileMarks, text.String())
}

// profileTime is how long each profile is taken: pprof knows whole seconds.
func profileTime(o *options) time.Duration { return max(o.seconds, time.Second).Round(time.Second) }

// profile takes the profiles one after the other, so that none shows the cost of another.
func (b *bed) profile(ctx context.Context, p profiled) (string, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	op, err := p.prepare(ctx, b)
	if err != nil {
		return "", err
	}
	cpu, r, err := b.profileDuring(ctx, p.clients, op, "profile")
	if err != nil {
		return "", err
	}
	allocs, ra, err := b.profileDuring(ctx, p.clients, op, "heap")
	if err != nil {
		return "", err
	}
	block, rb, err := b.profileDuring(ctx, p.clients, op, "block")
	if err != nil {
		return "", err
	}
	var text strings.Builder
	fmt.Fprintf(&text, "\n### %s\n\n```\n", p.name)
	fmt.Fprintf(&text, "%s %ss/s, %s µs of CPU per %s, %s objects and %s bytes allocated per %s\n",
		number3(r.perSecond()), p.op, number3(r.perOp(float64(r.used.cpu.Nanoseconds())/1000)), p.op,
		number3(allocs.total().first/opsDuring(allocs, ra)), number3(allocs.total().second/opsDuring(allocs, ra)), p.op)
	text.WriteString(cpuText(cpu))
	text.WriteString(allocText(allocs, opsDuring(allocs, ra), p.op))
	text.WriteString(blockText(block, opsDuring(block, rb), p.op))
	text.WriteString("```\n")
	return text.String(), nil
}

// profileDuring takes one profile while n clients work: "profile" (of the processor), "heap" (what was allocated) or "block".
func (b *bed) profileDuring(ctx context.Context, n int, op func(context.Context, *worker) error, kind string) (*stackProfile, result, error) {
	var got *stackProfile
	r, err := b.closedLoopDuring(ctx, n, op, func(ctx context.Context) (err error) {
		if kind == "heap" {
			got, err = b.allocated(ctx)
		} else {
			got, err = b.fetchProfile(ctx, fmt.Sprintf("%s?seconds=%d", kind, int(profileTime(b.o).Seconds())))
		}
		return err
	})
	if err == nil && r.ops == 0 {
		err = errors.New("nothing was done while the profile was taken")
	}
	if err == nil && len(got.samples) == 0 {
		err = fmt.Errorf("the profile %q is empty", kind)
	}
	return got, r, err
}

// allocated is what the server allocated in the time of a profile. pprof's own difference (?seconds=) lacks what was allocated
// since the last garbage collection, which may be all.
func (b *bed) allocated(ctx context.Context) (*stackProfile, error) {
	const collected = "heap?gc=1"
	before, err := b.fetchProfile(ctx, collected)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	sleep(ctx, profileTime(b.o))
	after, err := b.fetchProfile(ctx, collected)
	if err != nil {
		return nil, err
	}
	d := after.minus(before)
	d.seconds = time.Since(start).Seconds()
	return d, nil
}

func (b *bed) fetchProfile(ctx context.Context, profile string) (*stackProfile, error) {
	url := fmt.Sprintf("http://%s/debug/pprof/%s", b.spec.Addr, profile)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s: %s", url, resp.Status, body)
	}
	return parseProfile(body)
}

// opsDuring is how many operations fell into a profile's own time, which is a little shorter than the measurement.
func opsDuring(p *stackProfile, r result) float64 { return r.perSecond() * p.seconds }

// percent of a whole; 0 of nothing.
func percent(part, whole float64) float64 {
	if whole == 0 {
		return 0
	}
	return 100 * part / whole
}

func cpuText(p *stackProfile) string {
	var text strings.Builder
	all := p.total()
	write := func(title string, sums []share) {
		fmt.Fprintf(&text, "\n%s\n", title)
		for _, s := range sums {
			fmt.Fprintf(&text, "%6.1f %%  %s\n", percent(s.second, all.second), shorten(s.name))
		}
	}
	write(fmt.Sprintf("CPU by what ran, %.0f samples", all.first), p.by(cpuLayer))
	write("CPU by whose code ran it or called it", p.by(onBehalf))
	write("CPU by function that ran", first(p.by(func(stack []string) string { return stack[0] }), topSites))
	return text.String()
}

func allocText(p *stackProfile, ops float64, op string) string {
	var text strings.Builder
	write := func(title string, sums []share) {
		fmt.Fprintf(&text, "\n%s\n", title)
		for _, s := range sums {
			fmt.Fprintf(&text, "%8s %7s  %s\n", brief(s.second/ops), brief(s.first/ops), shorten(s.name))
		}
	}
	write(fmt.Sprintf("Bytes and objects allocated per %s, by whose code asked for them", op), p.by(onBehalf))
	write("the functions", first(p.by(owner), topSites))
	return text.String()
}

func blockText(p *stackProfile, ops float64, op string) string {
	var text strings.Builder
	fmt.Fprintf(&text, "\nWaits per %s and ms of each on average, the most time first; who waits for work is among them\n", op)
	sums := p.by(func(stack []string) string { return shorten(owner(stack)) + ": " + waitKind(stack) })
	sums = slices.DeleteFunc(sums, func(s share) bool { return s.first/ops < 0.005 })
	for _, s := range first(sums, topSites) {
		fmt.Fprintf(&text, "%8s %7s  %s\n", brief(s.first/ops), brief(s.second/s.first/float64(time.Millisecond)), s.name)
	}
	return text.String()
}

// brief writes a figure for a column: samples are not exact enough for more.
func brief(v float64) string {
	if v < 100 {
		return fmt.Sprintf("%.2f", v)
	}
	return number3(v)
}

// waitKind is what a blocked goroutine did: the function it called in the runtime or the library.
func waitKind(stack []string) string {
	name := stack[0]
	for _, f := range stack {
		if !isRuntime(f) && layerOf(f) != layerLibrary {
			break
		}
		name = f
	}
	switch strings.TrimPrefix(name, "runtime.") {
	case "chanrecv1", "chanrecv2":
		return "receive from a channel"
	case "chansend1":
		return "send to a channel"
	case "selectgo":
		return "select"
	}
	return name
}

func first(sums []share, n int) []share { return sums[:min(n, len(sums))] }

// fanOut opens the watches and returns the operation that updates what they watch, at a fixed rate. The events are read all
// the while; the operation fails once they no longer come.
func fanOut(ctx context.Context, b *bed) (func(context.Context, *worker) error, error) {
	s, err := b.load(ctx, watchedMany, watchedKeys, kib)
	if err != nil {
		return nil, err
	}
	var sent, received atomic.Int64
	broken := make(chan error, watchStreams)
	perStream := watchers / watchStreams
	for i := range watchStreams {
		var ranges [][2]string
		for k := range perStream {
			prefix := string(s.key((i*perStream + k) % s.n))
			ranges = append(ranges, prefixRange(prefix))
		}
		ws, err := b.openWatches(ctx, b.conns[i%len(b.conns)], ranges...)
		if err != nil {
			return nil, err
		}
		go func() {
			for {
				if err := ws.next(func([]byte) error { received.Add(1); return nil }); err != nil {
					broken <- err
					return
				}
			}
		}()
	}
	var next [fanOutClients]time.Time // when each client's next update is due
	return func(ctx context.Context, w *worker) error {
		select {
		case err := <-broken: // for one of the clients: its failure ends the others
			return err
		default:
		}
		perUpdate := int64(watchers / s.n)
		if missing := sent.Load()*perUpdate - received.Load(); missing > 10*fanOutClients*fanOutRate*perUpdate {
			return fmt.Errorf("%d events did not come within 10 s", missing)
		}
		now := time.Now()
		if next[w.id].Before(now.Add(-time.Second)) {
			next[w.id] = now // the first update, or far behind: do not catch up
		}
		sleep(ctx, next[w.id].Sub(now))
		next[w.id] = next[w.id].Add(time.Second / fanOutRate)
		own := s.n / w.of
		err := s.update(ctx, w, w.id*own+w.rng.IntN(own))
		sent.Add(1)
		return err
	}, nil
}
