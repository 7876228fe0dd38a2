// Bench measures quire, etcd and kine side by side and writes a table into docs/performance.md.
//
// Each server is a real process on the loopback with its own data on a real disk, driven by the same client code. The
// servers take turns, measurement by measurement: while one is measured the others are stopped (SIGSTOP), so that nothing
// they do in the background is charged to it. A figure is the median of its rounds.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quire-db/quire/test/load/proc"
)

// options of a run.
type options struct {
	only     *regexp.Regexp // workloads to run, by name
	rounds   int
	seconds  time.Duration // of a measurement
	warmup   time.Duration // before it, under load
	settle   time.Duration // before a reading that needs a quiet server
	conns    int           // connections that the clients share
	divide   int           // sizes of data sets are divided by this
	quota    int64         // in bytes, of etcd's and quire's database
	profile  bool          // profile quire instead of measuring it
	postgres bool          // measure servers on PostgreSQL, in a table of their own
	raft     bool          // every server is a cluster of three members, in a table of their own
	bloat    bool          // see whether a database on PostgreSQL grows, instead of measuring
	duration time.Duration // of bloat
	extents  []extent      // if there are any, scale is measured instead of the workloads
	servers  []string
	database *database         // nil if no server needs it
	binaries map[string]string // by server
	out      string            // document to write the table into; empty: only print
	dir      string            // of all data
}

// scale is the size of a data set in this run.
func (o *options) scale(n int) int { return n / o.divide }

// metric is one figure of a workload.
type metric struct {
	unit string
	more bool // more is better
}

// workload is one measurement, repeated in rounds. run gives one value for each metric.
type workload struct {
	name    string
	metrics []metric
	run     func(ctx context.Context, b *bed) ([]float64, error)
}

// scene is a data set and the workloads that are measured on it.
type scene struct {
	name      string
	prepare   func(ctx context.Context, b *bed) error
	workloads []workload
}

// Limits that keep one slow server from holding up the run; the table says where they took effect.
const (
	prepareLimit = 8 * time.Minute
	runLimit     = 4 * time.Minute
	slowRun      = 25 * time.Second // a measurement that takes longer is repeated slowRounds times only
	slowRounds   = 3
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) (err error) {
	// The load generator has few live objects and makes much garbage: collect it seldom.
	debug.SetGCPercent(800)
	if len(args) == 2 && args[0] == disturbCommand {
		return disturb(ctx, args[1], os.Stdin, os.Stdout)
	}
	o, err := parse(args)
	if err != nil {
		return err
	}
	if o.dir, err = proc.WorkDir("bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(o.dir)) }()

	if slices.ContainsFunc(o.servers, onPostgres) {
		if o.database, err = startDatabase(ctx, o.dir); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, o.database.Stop()) }()
	}
	if o.profile {
		return o.runProfiles(ctx)
	}
	if o.bloat {
		return o.runBloat(ctx)
	}
	if len(o.extents) > 0 {
		return o.runScale(ctx)
	}
	if o.postgres {
		return o.runScenes(ctx, postgresScenes(), postgresMarks)
	}
	if o.raft {
		return o.runScenes(ctx, raftScenes(), raftMarks)
	}
	return o.runScenes(ctx, []scene{writeScene(), listScene(), watchScene(), leaseScene(), boundedScene(), fairScene(), bigScene()}, benchMarks)
}

// runScenes measures and writes the table.
func (o *options) runScenes(ctx context.Context, scenes []scene, m marks) error {
	facts, err := o.facts(ctx)
	if err != nil {
		return err
	}
	facts = append(facts, fmt.Sprintf("%d rounds of %s in turns, medians; values of 1 KiB and %d connections unless said; in brackets the ratio to etcd, more than 1 is better",
		o.rounds, o.seconds, o.conns))

	var rows []row
	for _, s := range scenes {
		got, err := o.play(ctx, s)
		if err != nil {
			return err
		}
		rows = append(rows, got...)
	}
	text := "- " + strings.Join(facts, "\n- ") + "\n\n" + table(o.servers, rows, o.rounds)
	fmt.Println(text)
	if o.out == "" {
		return nil
	}
	return insert(o.out, m, text)
}

// facts describes the machine and the servers, as lines of Markdown.
func (o *options) facts(ctx context.Context) ([]string, error) {
	facts, err := machineFacts(o.dir)
	if err != nil {
		return nil, err
	}
	if o.database != nil {
		facts = append(facts, o.database.fact())
	}
	for _, s := range o.servers {
		if s == floor { // it has no version to ask for
			facts = append(facts, "floor: a grpc-go server that only appends each put to a file, synced, and answers gets with a ready value (test/load/floor)")
			continue
		}
		line, err := describe(ctx, o, s)
		if err != nil {
			return nil, fmt.Errorf("%s does not start: %w", s, err)
		}
		facts = append(facts, line)
	}
	return facts, nil
}

func parse(args []string) (*options, error) {
	root, err := proc.RepoRoot()
	if err != nil {
		return nil, err
	}
	o := &options{warmup: 500 * time.Millisecond, settle: time.Second, quota: 8 << 30}
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	only := f.String("only", "", "measure only the workloads whose name matches this expression; the document is left alone")
	servers := f.String("servers", "", "servers to measure: quire, etcd, kine, kine-full (kine with synchronous=FULL), floor (does nothing but gRPC and a synced file); with -postgres, -bloat and -profile also quire-pg, quire-pg3 (three processes) and kine-pg, on PostgreSQL; without it quire,etcd,kine, for -scale quire,etcd (1m) or quire (20g), for -postgres quire-pg,quire-pg3,kine-pg,etcd, for -raft quire,etcd, for -bloat quire-pg, for -profile quire")
	scale := f.String("scale", "", "measure large databases instead, in tables of their own: 1m (1M keys, 3M revisions), 20g (20 GiB) or 1m,20g")
	f.BoolVar(&o.profile, "profile", false, "profile quire under some workloads instead of measuring; of another server than quire it is only printed")
	f.BoolVar(&o.postgres, "postgres", false, "measure servers that keep their data in PostgreSQL, in a table of their own")
	f.BoolVar(&o.raft, "raft", false, "measure clusters of three members, in a table of their own")
	f.BoolVar(&o.bloat, "bloat", false, "see whether a database on PostgreSQL grows under 500 updates/s with 12 compactions, a line for each sixtieth of -duration")
	f.DurationVar(&o.duration, "duration", bloatFull, "how long -bloat lasts; if less than 1h the document is left alone")
	f.IntVar(&o.divide, "divide", 1, "divide the sizes of data sets by this; above 1 the document is left alone")
	quick := f.Bool("quick", false, "small data sets and one short round, to see that everything works; the document is left alone")
	f.IntVar(&o.rounds, "rounds", 5, "rounds of each measurement")
	f.DurationVar(&o.seconds, "seconds", 3*time.Second, "length of a measurement, e.g. 3s")
	f.IntVar(&o.conns, "conns", 8, "connections that the clients share")
	f.StringVar(&o.out, "out", filepath.Join(root, "docs", "performance.md"), "document to write the table into")
	quire := f.String("quire", filepath.Join(root, "bin", "quire"), "quire's binary")
	etcd := f.String("etcd", filepath.Join(root, "bin", "peers", "etcd"), "etcd's binary")
	kine := f.String("kine", filepath.Join(root, "bin", "peers", "kine"), "kine's binary")
	floorBin := f.String(floor, filepath.Join(root, "bin", "floor"), "floor's binary")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	if o.only, err = regexp.Compile(*only); err != nil {
		return nil, fmt.Errorf("-only: %w", err)
	}
	if *quick {
		o.rounds, o.seconds, o.warmup, o.settle, o.divide = 1, 500*time.Millisecond, 100*time.Millisecond, 200*time.Millisecond, 20
	}
	if *quick || *only != "" || o.divide > 1 || o.bloat && o.duration < bloatFull {
		o.out = ""
	}
	if o.rounds < 1 || o.conns < 1 || o.seconds <= 0 || o.divide < 1 || o.duration <= 0 {
		return nil, errors.New("-rounds, -conns, -seconds, -divide and -duration must be positive")
	}
	if *servers != "" {
		o.servers = strings.Split(*servers, ",")
	}
	if *scale == "" && o.servers == nil {
		o.servers = o.usualServers()
	}
	if *scale != "" {
		o.quota = scaleQuota
		if o.extents, err = parseExtents(*scale, o.servers, o.divide); err != nil {
			return nil, err
		}
		o.servers = nil
		for _, e := range o.extents {
			o.servers = append(o.servers, e.servers...)
		}
	}
	o.binaries = map[string]string{
		"quire": *quire, "etcd": *etcd, "kine": *kine, "kine-full": *kine, floor: *floorBin,
		quirePostgres: *quire, quirePostgres3: *quire, kinePostgres: *kine,
	}
	for _, s := range o.servers {
		if o.binaries[s] == "" {
			return nil, fmt.Errorf("-servers: %q is unknown: use quire, etcd, kine, kine-full, floor, quire-pg, quire-pg3 or kine-pg", s)
		}
		if err := o.suits(s); err != nil {
			return nil, fmt.Errorf("-servers: %w", err)
		}
		if _, err := os.Stat(o.binaries[s]); err != nil {
			return nil, fmt.Errorf("no binary of %s: %w (build it with `make build peers`, floor with `make bench`, or leave it out with -servers)", s, err)
		}
	}
	return o, nil
}

// usualServers are those measured if nothing else is said.
func (o *options) usualServers() []string {
	switch {
	case o.profile:
		return []string{"quire"}
	case o.bloat:
		return []string{quirePostgres}
	case o.postgres:
		return []string{quirePostgres, quirePostgres3, kinePostgres, "etcd"}
	case o.raft:
		return []string{"quire", "etcd"}
	default:
		return []string{"quire", "etcd", "kine"}
	}
}

// suits says why a server cannot be measured as asked.
func (o *options) suits(server string) error {
	switch {
	case server == floor && len(o.extents) > 0:
		return errors.New("floor has no values and no history, which -scale measures: leave it out")
	case o.profile && (len(o.servers) > 1 || server != "quire" && server != quirePostgres):
		return errors.New("-profile takes one server, quire or quire-pg")
	case o.raft && server != "quire" && server != "etcd":
		return fmt.Errorf("-raft measures clusters of quire and of etcd, and %s is none", server)
	case o.bloat && !onPostgres(server):
		return fmt.Errorf("-bloat asks PostgreSQL for its size, and %s does not use it", server)
	case onPostgres(server) && !o.postgres && !o.bloat && !o.profile:
		return fmt.Errorf("%s is measured with -postgres, -bloat or -profile", server)
	}
	return nil
}

// play runs one scene on all servers. Only what makes the whole run senseless is an error.
func (o *options) play(ctx context.Context, s scene) ([]row, error) {
	var rows []row
	for _, w := range s.workloads {
		if o.only.MatchString(w.name) {
			rows = append(rows, row{w: w, cells: map[string]*cell{}})
		}
	}
	if len(rows) == 0 {
		return nil, nil
	}
	beds := map[string]*bed{}
	failed := map[string]error{}
	for _, kind := range o.servers {
		if !slices.ContainsFunc(rows, func(r row) bool { return able(kind, r.w) }) {
			continue
		}
		b, err := newBed(ctx, o, kind, s.name)
		if err != nil {
			return nil, err
		}
		start := time.Now()
		if err := prepare(ctx, b, s); err != nil {
			failed[kind] = fmt.Errorf("preparation: %w", err)
			progress("%s: %s fails: %v", s.name, kind, err)
			if err := b.discard(); err != nil {
				return nil, err
			}
			continue
		}
		progress("%s: %s prepared in %s", s.name, kind, time.Since(start).Round(10*time.Millisecond))
		beds[kind] = b
		defer b.discard() // again at an early return; twice does no harm
		if err := b.p.Pause(); err != nil {
			return nil, err
		}
	}
	for _, r := range rows {
		for n := range o.rounds {
			for k := range o.servers {
				kind := o.servers[(k+n)%len(o.servers)] // another one begins each round
				if !able(kind, r.w) {
					continue
				}
				if r.cells[kind] == nil {
					r.cells[kind] = &cell{err: failed[kind]}
				}
				if ctx.Err() != nil {
					return nil, ctx.Err()
				}
				o.measure(ctx, r.w, n, beds[kind], r.cells[kind])
			}
		}
	}
	for _, b := range beds {
		if err := b.discard(); err != nil {
			return nil, err
		}
	}
	return rows, nil
}

func prepare(ctx context.Context, b *bed, s scene) error {
	ctx, cancel := context.WithTimeout(ctx, prepareLimit)
	defer cancel()
	if _, err := b.start(ctx); err != nil {
		return err
	}
	return s.prepare(ctx, b)
}

// measure runs one round of a workload on one server and notes the outcome in the cell.
func (o *options) measure(ctx context.Context, w workload, n int, b *bed, c *cell) {
	if c.err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, runLimit)
	defer cancel()
	start := time.Now()
	values, err := func() ([]float64, error) {
		if b.p == nil {
			return nil, errors.New("the server did not come back in an earlier measurement")
		}
		if err := o.attend(ctx, b); err != nil {
			return nil, err
		}
		if err := b.p.Resume(); err != nil {
			return nil, err
		}
		time.Sleep(100 * time.Millisecond) // timers that were due while it was stopped
		if err := b.awake(ctx); err != nil {
			return nil, err
		}
		return w.run(ctx, b)
	}()
	if b.p != nil {
		// The process may have ended in the meantime: then the next measurement says so.
		_ = b.p.Pause()
	}
	if err != nil {
		c.err = err
		progress("%s: %s fails: %v", w.name, b.kind, err)
		return
	}
	c.rounds = append(c.rounds, values)
	var text []string
	for i, m := range w.metrics {
		text = append(text, number3(values[i])+" "+m.unit)
	}
	progress("%s: %s, round %d: %s", w.name, b.kind, n+1, strings.Join(text, ", "))
	if time.Since(start) > slowRun && len(c.rounds) >= slowRounds {
		c.err = fmt.Errorf("too slow for more than %d rounds", slowRounds)
	}
}

func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, time.Now().Format("15:04:05 ")+format+"\n", args...)
}
