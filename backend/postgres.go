package backend

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quire-db/quire/migrations"
)

// pgPosition is a place in the table commits: everything up to this batch. The token tells it from a batch of the same
// number in a database that has forgotten ours.
type pgPosition struct {
	seq    int64
	token  pgToken
	lastID int64 // the newest row there
}

// pgLog is the revision table and what stands beside it in a schema of a Postgres database that other quire processes
// write to as well.
//
// A batch is written behind the one that this process knows as the newest. If another process was faster, write answers
// errBehind; then catchUp takes the lock that writers queue at, reads what was missed, and the batch, applied again, is
// written before anybody else can come: it is made twice at most, but where an answer is lost. While others have written of
// late (crowded), it catches up first.
type pgLog struct {
	opts    PostgresOptions
	sql     pgStatements
	id      pgToken // of this process, drawn at every start
	cluster int64   // of the store, drawn when it was made
	pg      pgServer

	clock   pgClock
	contact pgContact

	// The connections, each for one purpose, so that none waits for another. writer belongs to the holder of the commit
	// token, tail to the follower, heads to who runs a round of checks, reports to the reporter.
	writer, tail, heads, reports pgLane
	readers                      chan *pgLane // those not in use

	closing      context.Context // done when Close has begun
	beginClosing context.CancelFunc
	// unreplicated: a commit did not wait for its standby to the end; belongs to the holder of the commit token.
	unreplicated bool

	// crowded counts down the batches before which to catch up rather than try, because other processes write too. It
	// belongs to the holder of the commit token.
	crowded int

	locked bool // the writer's lock is held, in a transaction; belongs to the holder of the commit token
	at     struct {
		sync.Mutex
		pgPosition               // changed by the holder of the commit token
		shown      int64         // the batch up to which readers see everything, which may be an earlier one
		moved      chan struct{} // closed and replaced when shown changes
	}
	lostInRow  int          // batches that were not committed although nobody was faster; belongs to the holder of the commit token
	newsAtOnce atomic.Int64 // how many batches are read at once

	down      atomic.Pointer[error] // why the database cannot be used at present
	lost      atomic.Pointer[error] // why it never can be again by this process
	kick      chan struct{}         // tells the follower to look
	writing   atomic.Bool           // a batch is being committed, which reads what others wrote if it has to
	notified  atomic.Int64          // the newest batch that a notification told of
	reportNow chan chan error       // asks the reporter to report at once
	bytes     atomic.Int64
	busy      atomic.Int64 // reads under way
}

var (
	// errBehind: another process has written since; nothing of the batch was.
	errBehind = errors.New("backend: another process was faster")
	// errUnreplicated: the server says that it did not wait for its synchronous standby.
	errUnreplicated = errors.New("the commit was told not to wait for the synchronous standby")
	// errUnresolved: the batch that ours was to follow is not there any more, so it cannot be told what became of ours.
	errUnresolved = errors.New("the batches around it are deleted or lost")
)

func newPgToken() (t pgToken) {
	if _, err := rand.Read(t[:]); err != nil {
		panic(fmt.Sprintf("backend: no random numbers: %v", err)) // crypto/rand: never returns an error
	}
	t[6], t[8] = t[6]&0x0f|0x40, t[8]&0x3f|0x80
	return t
}

func newPgLog(o PostgresOptions) (*pgLog, error) {
	config, err := o.config()
	if err != nil {
		return nil, err
	}
	p := &pgLog{opts: o, sql: newPgStatements(o.Schema), id: newPgToken(), pg: pgServer{config: withoutCancel(config), pooled: new(pgPooled)}, kick: make(chan struct{}, 1), reportNow: make(chan chan error)}
	p.at.moved = make(chan struct{})
	p.newsAtOnce.Store(pgNewsBatches)
	lanes := []*pgLane{&p.writer, &p.tail, &p.heads, &p.reports}
	p.readers = make(chan *pgLane, o.readers())
	for range o.readers() {
		lane := new(pgLane)
		lanes = append(lanes, lane)
		p.readers <- lane
	}
	for _, lane := range lanes {
		lane.server = &p.pg
	}
	writer := pgServer{config: p.pg.config.Copy(), pooled: p.pg.pooled}
	writer.config.OnNotice = p.notice
	p.writer.server = &writer
	p.closing, p.beginClosing = context.WithCancel(context.Background())
	return p, nil
}

// position is up to where this process has read and written.
func (p *pgLog) position() pgPosition {
	p.at.Lock()
	defer p.at.Unlock()
	return p.at.pgPosition
}

// moveTo notes a new position. REQUIRES: the commit token.
func (p *pgLog) moveTo(to pgPosition) {
	p.at.Lock()
	defer p.at.Unlock()
	p.at.pgPosition = to
}

// show notes that readers see everything up to the position. REQUIRES: the commit token.
func (p *pgLog) show() {
	p.at.Lock()
	defer p.at.Unlock()
	if p.at.shown == p.at.seq {
		return
	}
	p.at.shown = p.at.seq
	close(p.at.moved)
	p.at.moved = make(chan struct{})
}

// usable returns why nothing can be asked of the database at present.
func (p *pgLog) usable() error {
	if err := p.lost.Load(); err != nil {
		return *err
	}
	if err := p.down.Load(); err != nil {
		return *err
	}
	return nil
}

// wake has the follower look at once.
func (p *pgLog) wake() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// failed notes a failure of the database, and returns it. What the database answered to a statement is none.
func (p *pgLog) failed(err error) error {
	if err == nil || definite(err) || errors.Is(err, context.Canceled) {
		return err
	}
	err = p.explain(err)
	p.contact.lose()
	p.down.Store(&err)
	p.wake()
	return err
}

// forget makes this process useless for good: the database is not the one any more that it has served from.
func (p *pgLog) forget(why error) error {
	p.lost.CompareAndSwap(nil, &why)
	return *p.lost.Load()
}

// notice hears what the server says beside its answers. When somebody cancels a commit that waits for a synchronous
// standby, it says so by a warning alone, and that the commit succeeded. Nothing but the function that it comes from tells
// that warning from others: it has no code of its own, and its text is translated.
func (p *pgLog) notice(_ *pgconn.PgConn, n *pgconn.Notice) {
	if n.Routine == "SyncRepWaitForLSN" {
		p.unreplicated = true
	}
}

// within is a context for what the committer does: it ends after d, and soon when the database is being closed.
func (p *pgLog) within(d time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	unlink := context.AfterFunc(p.closing, func() { time.AfterFunc(pgCloseGrace, cancel) })
	return ctx, func() { unlink(); cancel() }
}

// definite says whether err is the database's own answer that a statement had no effect. An end of the session is none:
// it can come after the commit.
func definite(err error) bool {
	var e *pgconn.PgError
	return errors.As(err, &e) && e.SeverityUnlocalized == "ERROR"
}

// How long the writer waits for an answer, and for the answer to what became of a batch: that one is counted from when the
// batch was sent, so that a network that hangs does not cost the client both, but for a last attempt.
const (
	pgWriteTimeout   = 5 * time.Second
	pgCloseGrace     = 500 * time.Millisecond // for a commit that is under way when the database is closed
	pgResolveTimeout = 5 * time.Second
	pgResolveLeast   = time.Second
	pgReadTimeout    = 10 * time.Second
)

// write appends a batch; one that changes nothing is only compared with what is there: its answers are true if nobody has
// written since.
func (p *pgLog) write(b *batch) error {
	if err := p.usable(); err != nil {
		return err
	}
	ctx, cancel := p.within(pgWriteTimeout)
	defer cancel()
	return p.append(ctx, b)
}

func (p *pgLog) append(ctx context.Context, b *batch) error {
	if !b.dirty() {
		if p.locked {
			return p.release()
		}
		return p.confirm(ctx)
	}
	c, err := p.writer.open(ctx)
	if err != nil {
		return p.failed(err)
	}
	from, token := p.position(), newPgToken()
	sql, args, err := p.batchStatement(b, from, token)
	if err != nil {
		return err
	}
	p.unreplicated = false
	var answer pgAnswer
	sent := time.Now()
	if p.locked {
		answer, err = p.writeLocked(ctx, c, sql, args)
	} else {
		err = p.writer.query(ctx, sql, args, answer.read)
	}
	if err != nil {
		// Whatever has happened, a transaction that is still open must end before anything else is written.
		err = errors.Join(err, p.release())
	}
	if err == nil && p.unreplicated && answer.token == token {
		// It is there, but only resolve's own commit will have waited for the standby.
		err = errUnreplicated
	}
	switch {
	case err == nil:
	case notPrepared(err):
		p.pg.pooled.Store(true)
		return p.again(err)
	case duplicate(err):
		// Two wrote at once, which the lock did not prevent: a database that ignores advisory locks.
		return p.again(err)
	case definite(err):
		return p.failed(err)
	default:
		// Not even pgconn.SafeToRetry can be believed: a connection that breaks after the batch was sent is "conn closed" to
		// it, of which it says that nothing was.
		found, rerr := p.resolve(from, token, sent)
		if rerr != nil {
			err = errors.Join(err, rerr)
			_ = p.failed(err) // others need not hear of this batch
			// Not wrapped: a time limit that ended is ours, not the client's.
			return fmt.Errorf("%w: it is not known whether the batch was committed: %v", ErrStorage, err)
		}
		if !found {
			return p.again(err)
		}
		answer = pgAnswer{seq: from.seq + 1, token: token}
	}
	if answer.required > p.sql.version {
		return p.forget(fmt.Errorf("%w: writers must know schema version %d, this quire knows %d: start the newer quire in its place", ErrNewerSchema, answer.required, p.sql.version))
	}
	if answer.token != token {
		p.crowded = pgCrowded
		return errBehind
	}
	p.lostInRow = 0
	if answer.clock != 0 {
		p.clock.sample(sent, time.Now(), answer.clock)
	}
	p.contact.made(p.clock.now())
	to := pgPosition{seq: answer.seq, token: token, lastID: from.lastID}
	if n := len(b.rows); n > 0 {
		to.lastID = b.rows[n-1].id
	}
	p.moveTo(to)
	return nil
}

// pgWriteTries is how often a batch is written that fails each time without another process being faster.
const pgWriteTries = 3

// again is the answer to a batch that certainly was not committed, because of err: it is to be made once more, but not for
// ever. A batch may be too large for the network, or end the server's process each time.
func (p *pgLog) again(err error) error {
	if p.lostInRow++; p.lostInRow < pgWriteTries {
		return errBehind
	}
	p.lostInRow = 0
	return p.failed(err)
}

// pgAnswer is what commit_batch and head return.
type pgAnswer struct {
	seq      int64
	token    pgToken
	clock    int64
	required int64 // schema version
}

func (a *pgAnswer) read(r pgRow) error {
	*a = pgAnswer{seq: r.int8(0), token: r.uuid(1), clock: r.int8(2)}
	if len(r) > 3 {
		a.required = r.int8(3)
	}
	return nil
}

// writeLocked writes a batch and commits, in one round trip.
func (p *pgLog) writeLocked(ctx context.Context, c *pgconn.PgConn, sql string, args *pgArgs) (a pgAnswer, err error) {
	var batch pgconn.Batch
	p.writer.add(&batch, sql, args)
	batch.ExecParams("COMMIT", nil, nil, nil, nil)
	results := c.ExecBatch(ctx, &batch)
	var tag pgconn.CommandTag
	for i := 0; results.NextResult(); i++ {
		r := results.ResultReader()
		for r.NextRow() {
			if err := a.read(r.Values()); err != nil {
				return a, err
			}
		}
		tag, err = r.Close()
	}
	if cerr := results.Close(); cerr != nil {
		err = cerr
	}
	if err != nil {
		return a, err
	}
	p.locked = false
	if tag.String() != "COMMIT" {
		return a, fmt.Errorf("the database answered COMMIT with %s", tag)
	}
	return a, nil
}

// duplicate: the number of the batch, or the id of its first row, is taken.
func duplicate(err error) bool {
	var e *pgconn.PgError
	return errors.As(err, &e) && e.Code == "23505"
}

// batchStatement is the statement that appends a batch, and its parameters.
func (p *pgLog) batchStatement(b *batch, from pgPosition, token pgToken) (string, *pgArgs, error) {
	args := p.batchArgs(b, from, token)
	if !b.authChanged() && len(b.tokens) == 0 {
		return p.sql.commitBatch, args, nil
	}
	text, err := json.Marshal(b.authChange())
	if err != nil {
		return "", nil, err
	}
	return p.sql.commitAuthBatch, args.text(string(text)), nil
}

func (p *pgLog) batchArgs(b *batch, from pgPosition, token pgToken) *pgArgs {
	a := new(pgArgs)
	rows := b.rows
	n := len(rows)
	a.int8(from.seq).uuid(from.token).uuid(token).int8(p.sql.version).int8(b.at)
	a.int8s(n, func(i int) int64 { return rows[i].id })
	a.int8s(n, func(i int) int64 { return rows[i].rev })
	a.int8s(n, func(i int) int64 { return rows[i].sub })
	a.int8s(n, func(i int) int64 { return rows[i].create })
	a.int8s(n, func(i int) int64 { return rows[i].version })
	a.int8s(n, func(i int) int64 { return rows[i].lease })
	a.int8s(n, func(i int) int64 {
		if rows[i].deleted {
			return 1
		}
		return 0
	})
	// Postgres takes no text that is not UTF-8, and no NUL in it.
	a.texts(n, func(i int) string {
		return strings.ToValidUTF8(strings.ReplaceAll(rows[i].author, "\x00", "�"), "�")
	})
	a.byteas(n, func(i int) []byte { return rows[i].key })
	a.byteas(n, func(i int) []byte { return rows[i].value })
	leases := b.leases.list()
	some := len(leases) > 0
	a.int8sOrNull(some, len(leases), func(i int) int64 { return leases[i].id })
	a.int8sOrNull(some, len(leases), func(i int) int64 { return leases[i].ttl })
	a.int8sOrNull(some, len(leases), func(i int) int64 { return leases[i].deadline })
	alarms := b.alarms.sorted()
	changed := len(b.alarmChanges) > 0
	a.int8sOrNull(changed, len(alarms), func(i int) int64 { return int64(alarms[i].member) })
	a.int8sOrNull(changed, len(alarms), func(i int) int64 { return int64(alarms[i].alarm) })
	return a.int8OrNull(b.st.compact, b.compacted)
}

// confirm returns errBehind if anybody has written since.
func (p *pgLog) confirm(ctx context.Context) error {
	head, err := p.askHead(ctx, &p.writer)
	if err != nil {
		return err
	}
	if at := p.position(); head.seq != at.seq || head.token != at.token {
		return errBehind
	}
	return nil
}

// askHead asks for the newest batch.
func (p *pgLog) askHead(ctx context.Context, lane *pgLane) (head pgAnswer, err error) {
	var sent time.Time
	err = lane.ask(ctx, func(*pgconn.PgConn) error {
		sent = time.Now()
		return lane.query(ctx, p.sql.head, new(pgArgs), head.read)
	})
	if err != nil {
		return head, p.failed(err)
	}
	p.clock.sample(sent, time.Now(), head.clock)
	p.contact.made(p.clock.now())
	return head, nil
}

// resolve finds out what became of a batch whose answer was lost, and makes sure that it stays so.
func (p *pgLog) resolve(from pgPosition, token pgToken, sent time.Time) (found bool, err error) {
	ctx, cancel := p.within(max(time.Until(sent.Add(pgResolveTimeout)), pgResolveLeast))
	defer cancel()
	var told error // others need not wait with us
	defer func() {
		if err == nil && told != nil {
			if down := p.down.Load(); down != nil && *down == told {
				p.down.CompareAndSwap(down, nil)
			}
		}
	}()
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		var c *pgconn.PgConn
		if c, err = p.writer.open(ctx); err == nil {
			args := new(pgArgs).int8(from.seq).uuid(token).uuid(newPgToken())
			p.unreplicated = false
			err = pgQuery(ctx, c, p.sql.resolve, args, func(r pgRow) error {
				if r.null(0) {
					return errUnresolved
				}
				found = r.bool(0)
				return nil
			})
			if err == nil && p.unreplicated {
				err = errUnreplicated
			}
		}
		if err == nil || errors.Is(err, errUnresolved) {
			return found, err
		}
		if told == nil {
			told = p.failed(err)
		}
		select {
		case <-ctx.Done():
			return false, err
		case <-time.After(wait):
		}
	}
}

// committed is a batch that another process has written.
type committed struct {
	pgPosition
	at       int64 // µs
	rows     []row
	leases   []leaseChange
	alarms   alarmSet    // nil: unchanged
	auth     *authChange // nil: unchanged
	compacts bool        // the compaction revision moved
	compact  int64       // to there
}

// pgNewsBatches is how many batches are read at once.
const pgNewsBatches = 256

// pgCrowded is after how many batches that nobody was in front of the next is tried without catching up first.
const pgCrowded = 4

// begin is called before a batch is applied, with the commit token, and end after it was written or not.
func (p *pgLog) begin(replay func(*committed) error) error {
	p.writing.Store(true)
	if p.crowded == 0 || p.usable() != nil {
		return nil
	}
	return p.catchUp(replay)
}

func (p *pgLog) end() {
	p.writing.Store(false)
	if p.notified.Load() > p.position().seq {
		p.wake()
	}
}

// tell is told of a batch by the listener, 0 of an unknown one. Our own batches come too, often before their answer is here.
func (p *pgLog) tell(seq int64) {
	if seq > p.notified.Load() {
		p.notified.Store(seq)
	}
	if seq == 0 || seq > p.position().seq && !p.writing.Load() {
		p.wake()
	}
}

// catchUp reads what other processes have written and passes it to replay in order, until there is no more; then the
// writers' lock is held, by which write will end. REQUIRES: the commit token.
func (p *pgLog) catchUp(replay func(*committed) error) error {
	for {
		ctx, cancel := p.within(pgWriteTimeout)
		more, err := p.catchUpOnce(ctx, replay)
		cancel()
		if err != nil || !more {
			return err
		}
	}
}

func (p *pgLog) catchUpOnce(ctx context.Context, replay func(*committed) error) (more bool, err error) {
	var news *pgNews
	err = p.writer.ask(ctx, func(c *pgconn.PgConn) error {
		var batch pgconn.Batch
		batch.ExecParams("BEGIN ISOLATION LEVEL READ COMMITTED", nil, nil, nil, nil)
		batch.ExecParams(p.sql.lock, nil, nil, nil, nil)
		news = p.newNews()
		if err := p.askNews(ctx, &p.writer, &batch, news); err != nil {
			return err
		}
		err := p.readNews(news, c.ExecBatch(ctx, &batch), 2)
		if err != nil {
			err = errors.Join(err, p.endTransaction(c))
		}
		return err
	})
	if err != nil {
		return false, p.failed(err)
	}
	p.locked = true
	p.contact.made(p.clock.now())
	if err := news.check(); err != nil {
		return false, errors.Join(p.forget(err), p.release())
	}
	if len(news.commits) == 0 {
		p.crowded = max(p.crowded-1, 0)
	} else {
		p.crowded = pgCrowded
	}
	more = news.more()
	if more {
		// Nobody is kept waiting while we are far behind.
		if err := p.release(); err != nil {
			return false, err
		}
	}
	for i := range news.commits {
		if err := replay(&news.commits[i]); err != nil {
			return false, errors.Join(err, p.release())
		}
	}
	return more, nil
}

// release gives up the writers' lock.
func (p *pgLog) release() error {
	if !p.locked {
		return nil
	}
	p.locked = false
	return p.failed(p.endTransaction(p.writer.c))
}

// endTransaction leaves the connection outside of any transaction, or closed.
func (p *pgLog) endTransaction(c *pgconn.PgConn) error {
	if c == nil || c.IsClosed() || c.TxStatus() == 'I' {
		return nil
	}
	ctx, cancel := p.within(pgWriteTimeout)
	defer cancel()
	_, err := c.Exec(ctx, "ROLLBACK").ReadAll()
	if err != nil {
		_ = c.Close(ctx) // err says why
	}
	return err
}

// resume: a batch that failed has left nothing behind, or will be read with what others have written.
func (p *pgLog) resume(*state) error { return p.release() }

func (p *pgLog) vacuum(int) (time.Duration, bool, error) { return 0, true, nil } // autovacuum does it

// deleteRows is not used: see sweep.
func (p *pgLog) deleteRows([]int64) error { return errors.New("rows of Postgres are deleted by sweep") }

func (p *pgLog) size() (total, inUse int64) { return p.bytes.Load(), p.bytes.Load() }
func (p *pgLog) reading() int               { return int(p.busy.Load()) }

// close tells the others that this process is gone, and closes all connections.
func (p *pgLog) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if p.down.Load() == nil {
		if c, err := p.reports.open(ctx); err == nil {
			// Should it fail, the others wait for us for a while before they delete anything.
			_ = pgQuery(ctx, c, p.sql.leave, new(pgArgs).uuid(p.id), nil)
		}
	}
	for _, lane := range []*pgLane{&p.writer, &p.tail, &p.heads, &p.reports} {
		lane.close(ctx)
	}
	for range cap(p.readers) {
		select {
		case lane := <-p.readers:
			lane.close(ctx)
			continue
		default:
		}
		select {
		case lane := <-p.readers:
			lane.close(ctx)
		case <-ctx.Done():
			return errors.New("a read from the database did not end")
		}
	}
	return nil
}

// load reads the whole store in one transaction, so that the rows, what stands beside them and the position fit.
func (p *pgLog) load(ctx context.Context, beside func(loadBeside) error, page func(*loadPage) error) (err error) {
	c, err := p.writer.open(ctx)
	if err != nil {
		return err
	}
	if _, err := c.Exec(ctx, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").ReadAll(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.endTransaction(c)) }()
	all := loadBeside{compact: -1, alarms: make(alarmSet)}
	var head pgAnswer
	sent := time.Now()
	if err := pgQuery(ctx, c, p.sql.head, new(pgArgs), head.read); err != nil {
		return err
	}
	p.clock.sample(sent, time.Now(), head.clock)
	p.contact.made(p.clock.now())
	to := pgPosition{seq: head.seq, token: head.token}
	none := new(pgArgs)
	for _, q := range []struct {
		sql  string
		each func(pgRow) error
	}{
		{p.sql.lastID, func(r pgRow) error { to.lastID = r.int8(0); return nil }},
		{p.sql.compactRevision, func(r pgRow) error { all.compact = r.int8(0); return nil }},
		{p.sql.leases, func(r pgRow) error {
			all.leases = append(all.leases, leaseChange{id: r.int8(0), ttl: r.int8(1), deadline: r.int8(2)})
			return nil
		}},
		{p.sql.alarms, func(r pgRow) error {
			all.alarms[alarmKey{uint64(r.int8(0)), pb.AlarmType(r.int8(1))}] = struct{}{}
			return nil
		}},
		{p.sql.countRows, func(r pgRow) error { all.total = r.int8(0); return nil }},
	} {
		if err := pgQuery(ctx, c, q.sql, none, q.each); err != nil {
			return err
		}
	}
	if all.auth, err = p.readAuth(ctx, c); err != nil {
		return err
	}
	all.others = uint64(head.seq)
	if err := beside(all); err != nil {
		return err
	}
	part := newLoadPage(0)
	err = pgQuery(ctx, c, p.sql.loadRows, none, func(r pgRow) error {
		part.add(loadRow{
			id: r.int8(0), rev: r.int8(1), create: r.int8(2), version: r.int8(3), lease: r.int8(4), deleted: r.bool(5),
			size: uint32(min(r.int8(6), math.MaxUint32)), at: r.int8(7),
		}, r[8])
		if !part.full() {
			return nil
		}
		full := part
		part = newLoadPage(cap(full.keys))
		return page(full)
	})
	if err == nil {
		err = page(part)
	}
	if err == nil {
		p.moveTo(to)
	}
	return err
}

// migrate brings the schema up to date.
func (p *pgLog) migrate(ctx context.Context) error {
	err := p.opts.migrate(ctx)
	var newer *migrations.NewerSchemaError
	if errors.As(err, &newer) {
		return fmt.Errorf("%w: %w", ErrNewerSchema, err)
	}
	return err
}
