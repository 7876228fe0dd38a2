package backend

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// Rows that a compaction made unreachable may be deleted when no process can want them any more. Each reports up to which
// compaction nobody reads through it; one that is not heard of for long is not waited for. Of those that want to delete,
// which are all, one does.
const (
	pgReportEvery  = 5 * time.Second
	pgAliveFor     = 3 * pgReportEvery // after its last report a process is taken to serve
	pgSilentFor    = 10 * time.Minute  // a process that comes back after that may have to be restarted
	pgSweepClaim   = 30 * time.Second  // how long the others leave it to one that has begun
	pgSweepRows    = 2000              // deleted at once
	pgSweepPoll    = 20 * time.Millisecond
	pgSweepPollMax = 2 * time.Second
	pgPingAfter    = 30 * time.Second
)

// errLaterCompaction: while this process waited for others, there came another compaction, whose memory is not to wait.
var errLaterCompaction = errors.New("backend: a later compaction is to be swept with this one")

// Answers of claim_sweep.
const (
	pgSwept    = 0
	pgSweepNow = 3
)

// report says that this process lives, and how far it is. REQUIRES: no other goroutine uses the reporter's connection.
func (p *pgLog) report(ctx context.Context, seq, released int64) error {
	ctx, cancel := context.WithTimeout(ctx, pgReadTimeout)
	defer cancel()
	c, err := p.reports.open(ctx)
	if err != nil {
		return err
	}
	args := new(pgArgs).uuid(p.id).text(p.opts.Name).texts(len(p.opts.ClientURLs), func(i int) string { return p.opts.ClientURLs[i] }).int8(seq).int8(released)
	sent := time.Now()
	return pgQuery(ctx, c, p.sql.report, args, func(r pgRow) error {
		p.bytes.Store(r.int8(0))
		p.clock.sample(sent, time.Now(), r.int8(1))
		return nil
	})
}

// reportLoop reports now and then, and at once when a sweep waits for it.
func (db *DB) reportLoop() {
	defer db.background.Done()
	p := db.shared
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case done := <-p.reportNow:
			done <- db.reportOnce()
			continue
		case <-db.ctx.Done():
			return
		}
		if p.usable() == nil {
			if err := db.reportOnce(); err != nil && !errors.Is(err, ErrClosed) {
				_ = p.failed(err) // the follower tells of it
			}
		}
		timer.Reset(pgReportEvery)
	}
}

func (db *DB) reportOnce() error {
	p := db.shared
	var released int64
	if _, err := db.step(func() error { released = min(db.oldestCompact(), db.compactor.memory); return nil }); err != nil {
		return err
	}
	// Close does not cut it off: a database goes on with a statement whose connection is gone, and a report that came
	// after this process's farewell would have the others wait for it until it counts as silent.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(db.ctx), pgWriteTimeout)
	defer cancel()
	return p.report(ctx, p.position().seq, released)
}

// sweepShared deletes what compactions up to target made unreachable, or waits until another process has.
// REQUIRES: it has left this process's memory.
func (db *DB) sweepShared(target int64) (rows int64, err error) {
	p := db.shared
	var ids []int64
	if _, err := db.step(func() error {
		ids, db.st.garbage = db.st.garbage, nil
		db.compactor.memory = target
		return nil
	}); err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			// They are deleted with the next attempt.
			_, _ = db.step(func() error { db.st.garbage = append(db.st.garbage, ids...); return nil })
		}
	}()
	slices.Sort(ids)
	reported := make(chan error, 1)
	select {
	case p.reportNow <- reported:
	case <-db.ctx.Done():
		return 0, db.ctx.Err()
	}
	if err := <-reported; err != nil {
		return 0, err
	}
	var mine bool
	for wait := pgSweepPoll; ; wait = min(2*wait, pgSweepPollMax) {
		answer, err := p.claimSweep(db.ctx, target)
		if err != nil {
			return 0, err
		}
		if mine = answer == pgSweepNow; mine || answer == pgSwept {
			break
		}
		select {
		case <-db.compactor.kick: // the next attempt heeds it
			return 0, errLaterCompaction
		default:
		}
		if !db.pause(wait) {
			return 0, db.ctx.Err()
		}
	}
	if !mine {
		return int64(len(ids)), nil
	}
	rest := resting{db: db, least: db.opts.CompactionPause}
	claimed := time.Now()
	for left := ids; len(left) > 0; {
		part := left[:min(len(left), cmp.Or(db.opts.CompactionBatch, pgSweepRows))]
		start := time.Now()
		err := p.read(db.ctx, func(ctx context.Context, c *pgconn.PgConn) error {
			return pgQuery(ctx, c, p.sql.delete, new(pgArgs).int8s(len(part), func(i int) int64 { return part[i] }), nil)
		})
		if err != nil {
			return 0, err
		}
		left = left[len(part):]
		if time.Since(claimed) > pgSweepClaim/3 {
			// Should another have taken over, both delete the same.
			if _, err := p.claimSweep(db.ctx, target); err != nil {
				return 0, err
			}
			claimed = time.Now()
		}
		if len(left) > 0 && !rest.after(time.Since(start)) {
			return 0, db.ctx.Err()
		}
	}
	return int64(len(ids)), p.read(db.ctx, func(ctx context.Context, c *pgconn.PgConn) error {
		return pgQuery(ctx, c, p.sql.finishSweep, new(pgArgs).uuid(p.id).int8(target).int8(pgSilentFor.Microseconds()), nil)
	})
}

func (p *pgLog) claimSweep(ctx context.Context, target int64) (answer int64, err error) {
	args := new(pgArgs).uuid(p.id).int8(target).int8(pgSilentFor.Microseconds()).int8(pgSweepClaim.Microseconds())
	err = p.read(ctx, func(ctx context.Context, c *pgconn.PgConn) error {
		return pgQuery(ctx, c, p.sql.claimSweep, args, func(r pgRow) error { answer = r.int8(0); return nil })
	})
	return answer, err
}

// listen is told of new batches until the connection ends.
func (p *pgLog) listen(ctx context.Context) error {
	config, err := pgConfig(p.opts.ListenURL)
	if err != nil {
		return err
	}
	config = withoutCancel(config)
	config.OnNotification = func(_ *pgconn.PgConn, n *pgconn.Notification) {
		seq, err := strconv.ParseInt(n.Payload, 10, 64)
		if err != nil {
			seq = 0 // resolve_commit does not say
		}
		p.tell(seq)
	}
	server := pgServer{config: config, pooled: p.pg.pooled}
	lane := pgLane{server: &server}
	defer func() {
		within, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		lane.close(within)
	}()
	c, err := lane.open(ctx)
	if err != nil {
		return err
	}
	var channel string
	if err := pgQuery(ctx, c, p.sql.channel, new(pgArgs), func(r pgRow) error { channel = r.text(0); return nil }); err != nil {
		return err
	}
	if _, err := c.Exec(ctx, "LISTEN "+quoteName(channel)).ReadAll(); err != nil {
		return err
	}
	p.wake() // for what came before
	for {
		within, cancel := context.WithTimeout(ctx, pgPingAfter)
		err := c.WaitForNotification(within)
		quiet := within.Err() != nil && ctx.Err() == nil
		cancel()
		switch {
		case err == nil:
		case quiet && !c.IsClosed():
			// Nobody writes, or the connection is dead: that would never show without a word from here.
			within, cancel := context.WithTimeout(ctx, pgConnectTimeout)
			err := c.Ping(within)
			cancel()
			if err != nil {
				return err
			}
		default:
			return err
		}
	}
}
