package backend

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// Here is what it takes to be one of several processes on one database: taking over what others have written, knowing when
// a read is up to date, noticing what becomes of the database.

// OpenPostgres opens a schema of a Postgres database that any number of quire processes may have open, makes it where it is
// missing, and loads the index. Errors say what to do.
func OpenPostgres(ctx context.Context, po PostgresOptions, o Options) (*DB, error) {
	po, err := po.withDefaults()
	if err != nil {
		return nil, err
	}
	// Another process may have the same directory: its file has lost its name already, or will not miss it.
	if err := removeSnapshots(o.withDefaults().pathOnPostgres()); err != nil {
		return nil, err
	}
	p, err := newPgLog(po)
	if err != nil {
		return nil, err
	}
	p.contact.limit = (3*po.PollInterval + 3*time.Second).Microseconds()
	db, err := openShared(ctx, p, o)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening %s: %w", RedactPostgresURL(po.URL), p.explain(err)), p.close())
	}
	return db, nil
}

func openShared(ctx context.Context, p *pgLog, o Options) (*DB, error) {
	c, err := p.reports.open(ctx)
	if err != nil {
		return nil, err
	}
	if err := checkServer(ctx, c); err != nil {
		return nil, err
	}
	if err := p.migrate(ctx); err != nil {
		return nil, err
	}
	if err := pgQuery(ctx, c, p.sql.clusterID, new(pgArgs), func(r pgRow) error { p.cluster = r.int8(0); return nil }); err != nil {
		return nil, err
	}
	// Before anything is read, so that nobody deletes what it needs.
	if err := p.report(ctx, 0, -1); err != nil {
		return nil, err
	}
	// Alarms are those of the store, not of the process that raises them, which may go away.
	o.MemberID = uint64(p.cluster)
	return openDB(ctx, newDB(p, o, nil), p)
}

// startShared begins the work of one process among several. REQUIRES: the index is loaded.
func (db *DB) startShared() {
	db.shared.show()
	db.background.Add(4)
	go db.headLoop()
	go db.followLoop()
	go db.listenLoop()
	go db.reportLoop()
}

// ClientURLs are the URLs of all processes on the database; nil where there is only one process, or the database cannot be
// asked.
func (db *DB) ClientURLs(ctx context.Context) (urls []string) {
	if db.shared == nil {
		return nil
	}
	err := db.shared.read(ctx, func(ctx context.Context, c *pgconn.PgConn) error {
		return pgQuery(ctx, c, db.shared.sql.clientURLs, new(pgArgs).int8(pgAliveFor.Microseconds()), func(r pgRow) error {
			urls = append(urls, r.text(0))
			return nil
		})
	})
	if err != nil {
		return nil
	}
	return urls
}

// ClusterID is a number that all processes on one database have in common, 0 where there is only one.
func (db *DB) ClusterID() uint64 {
	if db.shared == nil {
		return 0
	}
	return uint64(db.shared.cluster)
}

// replay takes over a batch of another process. REQUIRES: the commit token; it follows the newest batch.
func (db *DB) replay(c *committed) error {
	at := db.shared.position()
	if c.seq <= at.seq {
		return nil // it came by another way
	}
	if c.seq != at.seq+1 {
		return fmt.Errorf("batch %d follows batch %d", c.seq, at.seq)
	}
	b := db.newBatch(db.now(), c.at)
	// First the leases that keys are attached to, last those that go with their keys.
	for _, l := range c.leases {
		if !l.gone() {
			db.st.logical += leaseCharge * b.leases.take(l)
		}
	}
	for i := range c.rows {
		if err := b.replayRow(&c.rows[i]); err != nil {
			b.rollback()
			return db.shared.forget(err)
		}
	}
	if last := db.st.nextID - 1; last != c.lastID {
		b.rollback()
		return db.shared.forget(fmt.Errorf("%w: batch %d ends with row %d, the last one found is %d: %s", ErrHistoryLost, c.seq, c.lastID, last, awayTooLong))
	}
	for _, l := range c.leases {
		if l.gone() {
			db.st.logical += leaseCharge * b.leases.take(l)
		}
	}
	if c.alarms != nil {
		for k := range c.alarms {
			b.changeAlarm(k, true)
		}
		for k := range db.alarms.current() {
			if _, stands := c.alarms[k]; !stands {
				b.changeAlarm(k, false)
			}
		}
	}
	if c.auth != nil {
		b.replayAuth(c.auth)
	}
	if c.compacts {
		db.st.compact, b.compacted = c.compact, true
	}
	db.st.others++
	db.shared.moveTo(c.pgPosition)
	db.show(b)
	return nil
}

const awayTooLong = "this process was away for so long that rows which it has not read are compacted, restart it"

// replayRow makes a row of another process ours.
func (b *batch) replayRow(w *row) error {
	if w.id != b.st.nextID || w.rev != b.st.rev+1 && w.rev != b.st.rev {
		return fmt.Errorf("%w: row %d (revision %d) follows row %d (revision %d): %s", ErrHistoryLost, w.id, w.rev, b.st.nextID-1, b.st.rev, awayTooLong)
	}
	b.author, b.begin, b.sub = w.author, w.rev-1, w.sub
	slot, live, known := b.st.keys.get(w.key)
	var oldLease int64
	if live {
		oldLease = b.db.index.recs.at(b.db.index.slots.head(slot)).lease
	}
	b.write(slot, known, &keyValue{key: w.key, value: w.value, create: w.create, version: w.version, lease: w.lease}, w.deleted)
	b.leases.move(w.key, oldLease, w.lease)
	return nil
}

// Linearizable returns when a View holds everything that was committed, by whatever process, when it was called. It costs
// nothing where only this process writes. Reads that wait at the same time share one question to the database.
func (db *DB) Linearizable(ctx context.Context) error {
	if db.shared == nil && db.replica == nil {
		return nil
	}
	if db.shared != nil {
		if err := db.shared.usable(); err != nil {
			return err
		}
	}
	r := db.heads.join()
	select {
	case <-r.done:
		if r.err != nil || db.replica == nil {
			return r.err
		}
		return db.replica.applied.wait(ctx, db.ctx, r.index)
	case <-ctx.Done():
		return ctx.Err()
	case <-db.ctx.Done():
		return ErrClosed
	}
}

// Ready returns when what is read from now on may be answered: Linearizable, or, for a serializable read, at once. It
// returns an error wrapping ErrHistoryLost where not even what is in memory may be: the database does not know it any more.
func (db *DB) Ready(ctx context.Context, serializable bool) error {
	if !serializable {
		return db.Linearizable(ctx)
	}
	if db.shared != nil {
		if err := db.shared.lost.Load(); err != nil {
			return *err
		}
	}
	return nil
}

// headRound is one question to the database, or to the log, and everybody who waits for its answer.
type headRound struct {
	done  chan struct{}
	index uint64 // of the log, in a replica: who asked waits until it is applied
	err   error
}

// headRounds are asked one after the other. Who comes while one is under way waits for the next: the answer must not be
// older than the call.
type headRounds struct {
	mu   sync.Mutex
	next *headRound
	wake chan struct{} // there is a next one
}

func (h *headRounds) init() { h.wake = make(chan struct{}, 1) }

func (h *headRounds) join() *headRound {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.next == nil {
		h.next = &headRound{done: make(chan struct{})}
		h.wake <- struct{}{}
	}
	return h.next
}

// take begins the next round. REQUIRES: wake told of it.
func (h *headRounds) take() *headRound {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.next
	h.next = nil
	return r
}

// headLoop asks for those who wait.
func (db *DB) headLoop() {
	defer db.background.Done()
	for {
		select {
		case <-db.heads.wake:
		case <-db.ctx.Done():
			return
		}
		r := db.heads.take()
		if db.replica != nil {
			r.index, r.err = db.replica.readIndex(db.ctx)
		} else {
			r.err = db.checkHead()
		}
		close(r.done)
	}
}

// checkHead asks for the newest batch, and waits until this process has it.
func (db *DB) checkHead() error {
	p := db.shared
	if err := p.usable(); err != nil {
		return err // found out while these readers waited for the round before
	}
	ctx, cancel := context.WithTimeout(db.ctx, pgWriteTimeout)
	defer cancel()
	before := p.position()
	head, err := p.askHead(ctx, &p.heads)
	if err != nil {
		return err
	}
	if head.seq < before.seq || head.seq == before.seq && head.token != before.token {
		return p.forget((&pgNews{from: before}).check())
	}
	for {
		p.at.Lock()
		shown, moved := p.at.shown, p.at.moved
		p.at.Unlock()
		if shown >= head.seq {
			return nil
		}
		p.wake()
		select {
		case <-moved:
		case <-ctx.Done():
			if err := p.usable(); err != nil {
				return err
			}
			return fmt.Errorf("%w: what other processes wrote could not be read in time", ErrUnavailable)
		}
	}
}

// followRetry is how long the follower waits after it could not read.
const followRetry = 250 * time.Millisecond

// followLoop takes over what others write: at once when it is told, and else after the poll interval. It is also what
// finds out that the database is back.
func (db *DB) followLoop() {
	defer db.background.Done()
	p := db.shared
	timer := time.NewTimer(p.opts.PollInterval)
	defer timer.Stop()
	for {
		select {
		case <-p.kick:
		case <-timer.C:
		case <-db.ctx.Done():
			return
		}
		wait := p.opts.PollInterval
		before := p.down.Load()
		err := db.follow()
		if db.ctx.Err() != nil {
			return
		}
		if p.lost.Load() != nil {
			db.tellStorage(*p.lost.Load())
			return
		}
		if err != nil {
			err = p.failed(err)
			wait = followRetry
		} else if !p.down.CompareAndSwap(before, nil) {
			// Somebody has failed meanwhile, or has found out that all is well: what was read may be older than that, as its
			// batches waited for the commit token. The timer may have run out already.
			p.wake()
			continue
		}
		db.tellStorage(err)
		if err != nil && !db.pause(followRetry) {
			return
		}
		timer.Reset(wait)
	}
}

// tellStorage has Err and the hooks know.
func (db *DB) tellStorage(err error) {
	if err == nil && (db.Err() == nil || errors.Is(db.Err(), ErrDiskFull)) {
		return // that there is room again only a write can tell
	}
	err = db.log.explain(err)
	_, _ = db.step(func() error { db.noteStorage(err); return nil }) // it fails only when the database is being closed
}

// follow reads until there is nothing new.
func (db *DB) follow() error {
	p := db.shared
	for {
		ctx, cancel := context.WithTimeout(db.ctx, pgReadTimeout)
		var news *pgNews
		err := p.tail.ask(ctx, func(c *pgconn.PgConn) error {
			news = p.newNews()
			var batch pgconn.Batch
			if err := p.askNews(ctx, &p.tail, &batch, news); err != nil {
				return err
			}
			return p.readNews(news, c.ExecBatch(ctx, &batch), 0)
		})
		cancel()
		if err != nil {
			return err
		}
		p.contact.made(p.clock.now())
		if err := news.check(); err != nil {
			return p.forget(err)
		}
		if len(news.commits) > 0 {
			if _, err := db.step(func() error { return db.replayAll(news.commits) }); err != nil {
				return err
			}
		}
		if !news.more() {
			return nil
		}
	}
}

func (db *DB) replayAll(commits []committed) error {
	for i := range commits {
		if err := db.replay(&commits[i]); err != nil {
			return err
		}
	}
	return nil
}

// listenRetry is how long the listener waits before it connects again.
const listenRetry = 2 * time.Second

// listenLoop is told of new batches by the database. That is a hint: where it does not work, the follower looks by itself.
func (db *DB) listenLoop() {
	defer db.background.Done()
	p := db.shared
	for db.ctx.Err() == nil {
		_ = p.listen(db.ctx) // followLoop notices and reports whatever is wrong with the database
		if !db.pause(listenRetry) {
			return
		}
	}
}
