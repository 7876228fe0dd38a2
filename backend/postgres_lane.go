package backend

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"regexp"
	"sync/atomic"

	"github.com/jackc/pgx/v5/pgconn"
)

// pgLane is one connection that is kept for one purpose, made when it is needed and again after it broke. It belongs to
// one goroutine at a time.
type pgLane struct {
	server *pgServer
	c      *pgconn.PgConn
	kept   map[string]string // statements that c has prepared: their names
}

func (l *pgLane) open(ctx context.Context) (*pgconn.PgConn, error) {
	if l.c != nil && !l.c.IsClosed() {
		return l.c, nil
	}
	c, err := l.server.connect(ctx)
	if err != nil {
		return nil, err
	}
	l.c, l.kept = c, make(map[string]string)
	return c, nil
}

// ask runs f on the lane's connection. Where that has died since it was last used, which shows only now, it runs f again on a
// new one; and on the same one where only a prepared statement was missing. REQUIRES: f may be run twice, as what only
// reads may, and leaves no transaction open when it fails.
func (l *pgLane) ask(ctx context.Context, f func(c *pgconn.PgConn) error) error {
	used := l.c
	c, err := l.open(ctx)
	if err != nil {
		return err
	}
	err = f(c)
	if notPrepared(err) {
		l.server.pooled.Store(true)
		return f(c)
	}
	if err == nil || c != used || !c.IsClosed() || ctx.Err() != nil {
		return err
	}
	if c, err = l.open(ctx); err != nil {
		return err
	}
	return f(c)
}

func (l *pgLane) close(ctx context.Context) {
	if l.c != nil {
		_ = l.c.Close(ctx) // it says goodbye; the server notices the end without it too
	}
}

// pgPooled is whether a pooler in transaction mode stands between this process and the server: then a statement that was
// prepared is not there when it is to be run. It is found out by trying.
type pgPooled struct{ atomic.Bool }

// notPrepared: the statement with the given name is not there, or another connection of a pooler has made it.
func notPrepared(err error) bool {
	var e *pgconn.PgError
	return errors.As(err, &e) && (e.Code == "26000" || e.Code == "42P05")
}

// calledFunction finds the function that a statement calls.
var calledFunction = regexp.MustCompile(`"\.(\w+)\(`)

// name is that of a statement which the connection has prepared, or prepares now; empty where none can be. It tells every
// text from every other: behind a pooler, that of another process with another schema may be met.
func (l *pgLane) name(ctx context.Context, sql string, oids []uint32) (string, error) {
	if l.server.pooled.Load() {
		return "", nil
	}
	if name := l.kept[sql]; name != "" || l.c.TxStatus() != 'I' {
		return name, nil
	}
	what := "statement"
	if m := calledFunction.FindStringSubmatch(sql); m != nil {
		what = m[1] // for people who look into pg_prepared_statements, or at the wire
	}
	name := fmt.Sprintf("%s_%x", what, sha256.Sum256([]byte(sql)))
	name = name[:min(len(name), 63)]
	if _, err := l.c.Prepare(ctx, name, sql, oids); err != nil {
		if notPrepared(err) {
			l.server.pooled.Store(true)
			return "", nil
		}
		return "", err
	}
	l.kept[sql] = name
	return name, nil
}

// query is pgQuery on the lane's open connection for a statement that is run often: it is parsed once for the connection,
// where that is possible.
func (l *pgLane) query(ctx context.Context, sql string, args *pgArgs, each func(pgRow) error) error {
	name, err := l.name(ctx, sql, args.oids)
	if err != nil {
		return err
	}
	if name == "" {
		return pgQuery(ctx, l.c, sql, args, each)
	}
	err = pgRead(l.c.ExecPrepared(ctx, name, args.values, args.formats, binaryResults), each)
	if notPrepared(err) {
		l.server.pooled.Store(true)
		if l.c.TxStatus() == 'I' {
			return pgQuery(ctx, l.c, sql, args, each)
		}
	}
	return err
}

// add puts a statement that is run often into a batch. What cannot be run there as it was prepared fails the batch, and is
// sent with its text the next time.
func (l *pgLane) add(batch *pgconn.Batch, sql string, args *pgArgs) {
	if name := l.kept[sql]; name != "" && !l.server.pooled.Load() {
		batch.ExecPrepared(name, args.values, args.formats, binaryResults)
		return
	}
	batch.ExecParams(sql, args.values, args.oids, args.formats, binaryResults)
}
