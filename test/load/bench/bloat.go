package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Bloat: does a database on PostgreSQL grow under steady updates that are compacted as kube-apiserver does it?

const (
	bloated          = "/registry/bloated/"
	bloatKeys        = 10_000
	bloatWriters     = 5
	bloatPerWriter   = 100 // updates a second
	bloatCompactions = 12  // in the whole time: in an hour one every five minutes
	bloatSamples     = 60  // lines of the report
	bloatTolerance   = 1.05
	bloatPatience    = time.Minute
	bloatFull        = time.Hour // a shorter run is not written into the document
)

var bloatMarks = marks{"<!-- bloat:begin (written by make bench-postgres ARGS=-bloat) -->", "<!-- bloat:end -->"}

// bloatSample is how things are after a part of the time. Times are since the beginning.
type bloatSample struct {
	at          time.Duration
	updates     int     // since the sample before
	perSecond   float64 // of them
	p99         float64 // of them, in ms
	bytes       int64   // of the database
	dead        int64   // tuples that autovacuum has not removed yet, as PostgreSQL estimates
	autovacuums int64   // so far
}

const bloatHeader = "| | updates/s | ms p99 | MiB of database | dead tuples | autovacuums so far |\n|---:|---:|---:|---:|---:|---:|\n"

func (s bloatSample) String() string {
	return fmt.Sprintf("| %s | %s | %s | %.1f | %d | %d |", s.at.Round(100*time.Millisecond), number3(s.perSecond), number3(s.p99),
		mebibytes(s.bytes), s.dead, s.autovacuums)
}

// runBloat measures the servers one after the other.
func (o *options) runBloat(ctx context.Context) error {
	facts, err := o.facts(ctx)
	if err != nil {
		return err
	}
	facts = append(facts, fmt.Sprintf("%d updates/s of %d keys of 1 KiB for %s; every %s a compaction to where the revision was that long before",
		bloatWriters*bloatPerWriter, o.scale(bloatKeys), o.duration, o.compactionPeriod()))
	text := "- " + strings.Join(facts, "\n- ") + "\n"
	var grown error
	for _, kind := range o.servers {
		samples, err := o.watchBloat(ctx, kind)
		if err != nil {
			return fmt.Errorf("%s: %w", kind, err)
		}
		verdict, flat := judge(samples)
		progress("%s: %s", kind, verdict)
		if !flat {
			grown = errors.Join(grown, fmt.Errorf("%s: %s", kind, verdict))
		}
		text += fmt.Sprintf("\n%s: %s\n\n%s", kind, verdict, bloatHeader)
		for i, s := range samples {
			if (i+1)%(bloatSamples/bloatCompactions) == 0 {
				text += s.String() + "\n"
			}
		}
	}
	if o.out != "" {
		if err := insert(o.out, bloatMarks, text); err != nil {
			return err
		}
	}
	return grown
}

func (o *options) compactionPeriod() time.Duration { return o.duration / bloatCompactions }

// watchBloat updates keys of one server for the whole time and prints a line for each part of it.
func (o *options) watchBloat(ctx context.Context, kind string) (samples []bloatSample, err error) {
	b, err := newBed(ctx, o, kind, "bloat")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.discard()) }()
	if _, err := b.start(ctx); err != nil {
		return nil, err
	}
	s, err := b.load(ctx, bloated, o.scale(bloatKeys), kib)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var took latencies
	var working sync.WaitGroup
	work := func(f func() error) {
		working.Go(func() {
			if err := f(); err != nil {
				cancel(err)
			}
		})
	}
	for i := range bloatWriters {
		own := s.n / bloatWriters
		work(func() error {
			return b.paced(ctx, bloatPerWriter, func(ctx context.Context, w *worker) error {
				start := time.Now()
				err := patiently(ctx, func() error { return s.update(ctx, w, i*own+w.rng.IntN(own)) })
				took.add(time.Since(start))
				return err
			})
		})
	}
	work(func() error { return b.compactNowAndThen(ctx, o.compactionPeriod()) })

	fmt.Printf("%s\n%s", kind, bloatHeader)
	start := time.Now()
	for i := range bloatSamples {
		due := o.duration * time.Duration(i+1) / bloatSamples
		if sleep(ctx, time.Until(start.Add(due))); ctx.Err() != nil {
			break
		}
		sample, err := b.bloatNow(ctx)
		if err != nil {
			cancel(err)
			break
		}
		sample.at = time.Since(start)
		before := time.Duration(0)
		if len(samples) > 0 {
			before = samples[len(samples)-1].at
		}
		part := took.take()
		sample.updates, sample.p99 = len(part), quantile(part, 0.99)
		sample.perSecond = float64(sample.updates) / (sample.at - before).Seconds()
		samples = append(samples, sample)
		fmt.Println(sample)
	}
	failed := context.Cause(ctx)
	cancel(nil)
	working.Wait()
	if failed != nil {
		return samples, errors.Join(b.alive(), failed)
	}
	return samples, nil
}

// compactNowAndThen compacts to the revision of one period before, which is what kube-apiserver does every five minutes.
func (b *bed) compactNowAndThen(ctx context.Context, period time.Duration) error {
	tick := time.NewTicker(period)
	defer tick.Stop()
	last, err := b.revision(ctx)
	if err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		err := patiently(ctx, func() error {
			return callProto(ctx, b.conns[0], methodCompact, &pb.CompactionRequest{Revision: last}, &pb.CompactionResponse{})
		})
		if err == nil {
			last, err = b.revision(ctx)
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("compacting: %w", err)
		}
	}
}

// patiently tries again while the server says that it cannot reach its database: an hour is long, and the machine may be busy
// with other things meanwhile.
func patiently(ctx context.Context, op func() error) error {
	for due := time.Now().Add(bloatPatience); ; sleep(ctx, time.Second) {
		err := op()
		if status.Code(err) != codes.Unavailable || time.Now().After(due) || ctx.Err() != nil {
			return err
		}
	}
}

// bloatNow asks PostgreSQL.
func (b *bed) bloatNow(ctx context.Context) (s bloatSample, err error) {
	rows, err := b.o.database.Query(ctx, b.database, "SELECT pg_database_size(current_database()), sum(n_dead_tup), sum(autovacuum_count) FROM pg_stat_all_tables")
	if err != nil {
		return s, err
	}
	if len(rows) != 1 || len(rows[0]) != 3 {
		return s, fmt.Errorf("PostgreSQL's size is %q, three figures are expected", rows)
	}
	for i, to := range []*int64{&s.bytes, &s.dead, &s.autovacuums} {
		if *to, err = strconv.ParseInt(rows[0][i], 10, 64); err != nil {
			return s, err
		}
	}
	return s, nil
}

// judge says whether the size is flat: the largest of the last third is hardly more than the largest of the middle third.
func judge(samples []bloatSample) (verdict string, flat bool) {
	largest := func(part []bloatSample) (most int64) {
		for _, s := range part {
			most = max(most, s.bytes)
		}
		return most
	}
	third := len(samples) / 3
	middle, last := largest(samples[third:2*third]), largest(samples[2*third:])
	is := "is flat"
	if flat = float64(last) <= bloatTolerance*float64(middle); !flat {
		is = "is NOT flat"
	}
	return fmt.Sprintf("the size %s: at most %.1f MiB in the middle third of the time, %.1f MiB in the last third (%+.1f %%; up to %+.0f %% counts as flat)",
		is, mebibytes(middle), mebibytes(last), 100*(float64(last)/float64(middle)-1), 100*(bloatTolerance-1)), flat
}

// latencies of operations since they were last taken.
type latencies struct {
	mu   sync.Mutex
	took []time.Duration
}

func (l *latencies) add(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.took = append(l.took, d)
}

// take returns them, sorted.
func (l *latencies) take() []time.Duration {
	l.mu.Lock()
	taken := l.took
	l.took = nil
	l.mu.Unlock()
	slices.Sort(taken)
	return taken
}
