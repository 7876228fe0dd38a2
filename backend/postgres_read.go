package backend

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/jackc/pgx/v5/pgconn"
)

// pgStoredRow reads the columns of the row statements; its bytes are valid until the next row.
func pgStoredRow(r pgRow) storedRow {
	return storedRow{rev: r.int8(1), create: r.int8(3), version: r.int8(4), lease: r.int8(5), deleted: r.bool(6), key: r[8], value: r[9]}
}

// read lends a reading connection to f, which may be called a second time if the first one had died.
func (p *pgLog) read(ctx context.Context, f func(ctx context.Context, c *pgconn.PgConn) error) error {
	if err := p.usable(); err != nil {
		return err
	}
	p.busy.Add(1)
	defer p.busy.Add(-1)
	var lane *pgLane
	select {
	case lane = <-p.readers: // while closing too: for the batch that is under way
	default:
		select {
		case lane = <-p.readers:
		case <-ctx.Done():
			return ctx.Err()
		case <-p.closing.Done():
			return ErrClosed
		}
	}
	defer func() { p.readers <- lane }()
	within, cancel := context.WithTimeout(ctx, pgReadTimeout)
	defer cancel()
	err := lane.ask(within, func(c *pgconn.PgConn) error { return f(within, c) })
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	return p.explain(err)
}

// missingRow says what it means that a row is not there: another process deletes rows that a compaction made unreachable
// when all have said that they need them no more, or when this one was not heard of for long.
func missingRow(id int64) error {
	return fmt.Errorf("row %d is gone: %w", id, ErrCompacted)
}

// frame reads a row for apply.
func (p *pgLog) frame(id int64) (Frame, error) {
	ctx, cancel := p.within(pgReadTimeout)
	defer cancel()
	return p.row(ctx, id)
}

func (p *pgLog) row(ctx context.Context, id int64) (f Frame, err error) {
	err = p.read(ctx, func(ctx context.Context, c *pgconn.PgConn) error {
		return pgQuery(ctx, c, p.sql.row, new(pgArgs).int8(id), func(r pgRow) error {
			w := pgStoredRow(r)
			f = w.frame()
			return nil
		})
	})
	if err == nil && f == nil {
		err = missingRow(id)
	}
	return f, err
}

func (p *pgLog) rows(ctx context.Context, ids []int64, each func(i int, f Frame)) error {
	place := make(map[int64]int, len(ids))
	for i, id := range ids {
		place[id] = i
	}
	found := 0
	err := p.read(ctx, func(ctx context.Context, c *pgconn.PgConn) error {
		found = 0
		return pgQuery(ctx, c, p.sql.rows, new(pgArgs).int8s(len(ids), func(i int) int64 { return ids[i] }), func(r pgRow) error {
			w := pgStoredRow(r)
			found++
			each(place[r.int8(0)], w.frame())
			return nil
		})
	})
	if err == nil && found < len(place) {
		err = missingRow(ids[0])
	}
	return err
}

// How many rows a scan reads at once: few at first, as they may be long, and more while they are short.
const (
	pgScanRows    = 64
	pgScanRowsMax = 4096
	pgScanBytes   = 1 << 20
)

func (p *pgLog) scan(ctx context.Context, start, from int64, each func(w *storedRow) (more bool)) error {
	var w storedRow // one for all
	for most := int64(pgScanRows); ; {
		count, bytes, more := int64(0), 0, true
		err := p.read(ctx, func(ctx context.Context, c *pgconn.PgConn) error {
			count = 0 // start has moved
			return pgQuery(ctx, c, p.sql.rowsFrom, new(pgArgs).int8(start).int8(most).int8(from), func(r pgRow) error {
				count++
				start = r.int8(0) + 1
				w = pgStoredRow(r)
				bytes += len(w.value)
				w.id, w.sub = r.int8(0), r.int8(2)
				more = more && each(&w)
				return nil
			})
		})
		switch {
		case compactedAt(err) > 0:
			return &CompactedError{CompactRevision: compactedAt(err)}
		case err != nil:
			return err
		case !more, count < most:
			return nil
		case bytes < pgScanBytes:
			most = min(2*most, pgScanRowsMax)
		}
	}
}

// compactedAt is the revision of which rows_from says that it is compacted; 0 where err is something else.
func compactedAt(err error) int64 {
	var e *pgconn.PgError
	if !errors.As(err, &e) || e.Code != "QU001" {
		return 0
	}
	rev, err := strconv.ParseInt(e.Message, 10, 64)
	if err != nil {
		return 0
	}
	return rev
}

// pgNewsBytes is what news should come to at most: it is held in memory as a whole. One batch may be larger.
const pgNewsBytes = 16 << 20

// pgNews is what others have written after a position.
type pgNews struct {
	most    int64 // batches asked for
	from    pgPosition
	first   pgPosition // the batch at from, as the database has it
	found   bool
	commits []committed
	bytes   int // of keys and values
}

func (p *pgLog) newNews() *pgNews { return &pgNews{most: p.newsAtOnce.Load(), from: p.position()} }

// askNews adds two statements to a batch. Each sees what is committed when it begins, so the second may see more than the
// first: it is bounded by what the first can see, which does not change.
func (p *pgLog) askNews(ctx context.Context, lane *pgLane, batch *pgconn.Batch, n *pgNews) error {
	from, most := n.from, n.most+1
	for _, q := range []struct {
		sql  string
		args *pgArgs
	}{
		{p.sql.commitsFrom, new(pgArgs).int8(from.seq).int8(most)},
		{p.sql.rowsOfCommits, new(pgArgs).int8(from.seq).int8(most).int8(from.lastID)},
	} {
		if _, err := lane.name(ctx, q.sql, q.args.oids); err != nil {
			return err
		}
		lane.add(batch, q.sql, q.args)
	}
	return nil
}

// readNews is read, which asks for less the next time where there was no time for so much.
func (p *pgLog) readNews(n *pgNews, results *pgconn.MultiResultReader, skip int) error {
	err := n.read(results, skip)
	switch {
	case err == nil && n.bytes < pgNewsBytes:
		p.newsAtOnce.Store(min(2*n.most, pgNewsBatches))
	case err == nil:
		p.newsAtOnce.Store(max(n.most/4, 1))
	case errors.Is(err, context.DeadlineExceeded):
		p.newsAtOnce.Store(max(n.most/4, 1))
	}
	return err
}

// read takes in the results of a batch of statements, of which the first so many are others than askNews's.
func (n *pgNews) read(results *pgconn.MultiResultReader, skip int) error {
	at := 0 // the commit that the next row belongs to
	for i := 0; results.NextResult(); i++ {
		err := pgRead(results.ResultReader(), func(r pgRow) error {
			switch i - skip {
			case 0:
				return n.addCommit(r)
			case 1:
				id := r.int8(0)
				for at < len(n.commits) && n.commits[at].lastID < id {
					at++
				}
				if at < len(n.commits) {
					n.commits[at].rows = append(n.commits[at].rows, newsRow(r))
					n.bytes += len(r[8]) + len(r[9])
				}
			}
			return nil
		})
		if err != nil {
			return errors.Join(err, results.Close())
		}
	}
	return results.Close()
}

func (n *pgNews) addCommit(r pgRow) error {
	at := pgPosition{seq: r.int8(0), token: r.uuid(1), lastID: r.int8(2)}
	if !n.found {
		n.first, n.found = at, true
		return nil
	}
	c := committed{pgPosition: at, at: r.int8(3), compacts: !r.null(9), compact: r.int8(9)}
	ids, ttls, deadlines := r.int8s(4), r.int8s(5), r.int8s(6)
	for i := range ids {
		c.leases = append(c.leases, leaseChange{id: ids[i], ttl: ttls[i], deadline: deadlines[i]})
	}
	if !r.null(7) {
		c.alarms = make(alarmSet)
		members, kinds := r.int8s(7), r.int8s(8)
		for i := range members {
			c.alarms[alarmKey{uint64(members[i]), pb.AlarmType(kinds[i])}] = struct{}{}
		}
	}
	if !r.null(10) {
		change, err := decodeAuthChange(r[10])
		if err != nil {
			return err
		}
		c.auth = change
	}
	n.commits = append(n.commits, c)
	return nil
}

// newsRow copies a row: what it is read into is used again.
func newsRow(r pgRow) row {
	buf := make([]byte, 0, len(r[8])+len(r[9]))
	buf = append(append(buf, r[8]...), r[9]...)
	key := buf[:len(r[8]):len(r[8])]
	return row{
		id: r.int8(0), rev: r.int8(1), sub: r.int8(2), create: r.int8(3), version: r.int8(4), lease: r.int8(5),
		deleted: r.bool(6), author: r.text(7), key: key, value: buf[len(r[8]):],
	}
}

// check makes sure that what was read follows what this process knows.
func (n *pgNews) check() error {
	if !n.found || n.first.seq == n.from.seq && n.first.token != n.from.token {
		return fmt.Errorf("%w: batch %d is not there any more, or is another one. The database was restored from a backup, or a standby that lacked the newest transactions was promoted. This process goes on refusing all requests rather than go back in time: restart every quire and then every client, such as kube-apiserver, which must forget what it has read (docs/postgres.md)",
			ErrHistoryLost, n.from.seq)
	}
	if n.first.seq != n.from.seq {
		return fmt.Errorf("%w: this process was away for so long that batches after %d, which it has not read, are deleted: restart it", ErrHistoryLost, n.from.seq)
	}
	for i, next := 0, n.from.seq+1; i < len(n.commits); i, next = i+1, next+1 {
		if n.commits[i].seq != next {
			return fmt.Errorf("%w: batch %d is missing: restart this process", ErrHistoryLost, next)
		}
	}
	return nil
}

// more says whether there may be more than was asked for.
func (n *pgNews) more() bool { return int64(len(n.commits)) == n.most }
