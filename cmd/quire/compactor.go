package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.uber.org/zap"

	"github.com/quire-db/quire/backend"
)

// The modes of --auto-compaction-mode.
const (
	modePeriodic = "periodic"
	modeRevision = "revision"
)

// revisionInterval is how often revision mode looks (etcd: v3compactor, revInterval).
const revisionInterval = 5 * time.Minute

// retention is --auto-compaction-retention, read according to the mode. At most one field is not zero; with
// both zero there is no automatic compaction.
type retention struct {
	Period    time.Duration
	Revisions int64
}

// parseRetention follows etcd's parseCompactionRetention (server/v3/embed): a plain number is hours in periodic mode
// and revisions in revision mode; everything else is a duration.
func parseRetention(mode, text string) (retention, error) {
	if text == "" {
		text = "0"
	}
	n, err := strconv.Atoi(text)
	if err == nil && n >= 0 {
		if mode == modeRevision {
			return retention{Revisions: int64(n)}, nil
		}
		if int64(n) > int64((1<<63-1)/time.Hour) {
			return retention{}, fmt.Errorf("error parsing CompactionRetention: --auto-compaction-retention %q is too large", text)
		}
		return retention{Period: time.Duration(n) * time.Hour}, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		return retention{}, fmt.Errorf("error parsing CompactionRetention: %w; set --auto-compaction-retention to a duration such as 30m, or to a number", err)
	}
	if d < 0 {
		return retention{}, fmt.Errorf("error parsing CompactionRetention: --auto-compaction-retention %q must not be negative", text)
	}
	if mode == modeRevision {
		// etcd takes the duration's nanoseconds for revisions. Nobody can mean that.
		if d == 0 {
			return retention{}, nil
		}
		return retention{}, fmt.Errorf("error parsing CompactionRetention: --auto-compaction-mode=revision wants a number of revisions, not the duration %q", text)
	}
	return retention{Period: d}, nil
}

// compactor keeps history short on its own, as etcd's v3compactor does.
type compactor struct {
	lg *zap.Logger
	// leads tells whether this member is to compact: one of them is enough. A member that does not lead notes revisions
	// all the same, so that it can go on where the last leader stopped.
	leads    func() bool
	revision func() int64
	compact  func(ctx context.Context, rev int64) error
}

// compactorOf compacts db through the path that a client's Compact takes, while leads says so.
func compactorOf(lg *zap.Logger, db *backend.DB, leads func() bool) *compactor {
	return &compactor{
		lg:       lg,
		leads:    leads,
		revision: db.Revision,
		compact: func(ctx context.Context, rev int64) error {
			_, err := db.Write(ctx, backend.Command{Request: &pb.CompactionRequest{Revision: rev}, AuthRevision: backend.ByItself})
			return err
		},
	}
}

// run compacts until ctx is done. It returns at once when r asks for nothing.
func (c *compactor) run(ctx context.Context, r retention) {
	switch {
	case r.Period > 0:
		c.runPeriodic(ctx, r.Period)
	case r.Revisions > 0:
		c.runRevision(ctx, r.Revisions)
	}
}

// runPeriodic notes the revision every tenth of the period, or of an hour when the period is longer. Once a whole
// period has passed it compacts to the oldest note, a period old or a little more, and from then on once per period, or once per
// hour when the period is longer. After a failure it tries again with the next note.
func (c *compactor) runPeriodic(ctx context.Context, period time.Duration) {
	interval := min(period, time.Hour)
	step := max(interval/10, 1)
	window := int(period/step) + 1 // notes that span one period

	var notes []int64 // oldest first
	var last int64    // the revision compacted to
	lastSuccess := time.Now()
	wait := period // before the first compaction; interval afterwards
	tick := time.NewTimer(step)
	defer tick.Stop()
	for {
		notes = append(notes, c.revision())
		if len(notes) > window {
			notes = notes[1:]
		}
		tick.Reset(step)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		rev := notes[0]
		if time.Since(lastSuccess) < wait || rev == last || !c.leads() {
			continue
		}
		wait = interval

		start := time.Now()
		c.lg.Info("starting auto periodic compaction", zap.Int64("revision", rev), zap.Duration("compact-period", period))
		if err := c.compact(ctx, rev); err != nil && !errors.Is(err, backend.ErrCompacted) {
			if ctx.Err() != nil {
				return
			}
			c.lg.Warn("failed auto periodic compaction", zap.Int64("revision", rev), zap.Duration("compact-period", period),
				zap.Duration("retry-interval", step), zap.Error(err))
			continue
		}
		last, lastSuccess = rev, time.Now()
		c.lg.Info("completed auto periodic compaction", zap.Int64("revision", rev), zap.Duration("compact-period", period),
			zap.Duration("took", time.Since(start)))
	}
}

// runRevision keeps the last so many revisions, looking every five minutes.
func (c *compactor) runRevision(ctx context.Context, keep int64) {
	var last int64
	tick := time.NewTicker(revisionInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		rev := c.revision() - keep
		if rev <= 0 || rev == last || !c.leads() {
			continue
		}
		start := time.Now()
		c.lg.Info("starting auto revision compaction", zap.Int64("revision", rev), zap.Int64("revision-compaction-retention", keep))
		if err := c.compact(ctx, rev); err != nil && !errors.Is(err, backend.ErrCompacted) {
			if ctx.Err() != nil {
				return
			}
			c.lg.Warn("failed auto revision compaction", zap.Int64("revision", rev), zap.Int64("revision-compaction-retention", keep),
				zap.Duration("retry-interval", revisionInterval), zap.Error(err))
			continue
		}
		last = rev
		c.lg.Info("completed auto revision compaction", zap.Int64("revision", rev), zap.Int64("revision-compaction-retention", keep),
			zap.Duration("took", time.Since(start)))
	}
}
