package backend

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"time"
	"unicode"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"

	"github.com/quire-db/quire/migrations"
)

// PostgresOptions say where the database is, and how to use it.
type PostgresOptions struct {
	// URL is a connection URL or string as libpq takes it: several hosts, TLS, client certificates and all.
	URL string
	// Schema that holds the tables. It is made if it is missing and the role may do that. Empty: "quire".
	Schema string
	// ListenURL is how the server itself is reached where URL leads to a pooler, which passes no notifications on.
	// Empty: as URL.
	ListenURL string
	// MaxConnections bounds the connections of this process, 6 or more; five are each kept for one purpose, the rest
	// reads values that are not in memory. A defragmentation has one more. 0: 8.
	MaxConnections int
	// PollInterval is how often to look for what others wrote when no notification comes. 0: 1 s.
	PollInterval time.Duration
	// Name of this process, and where it serves clients: the others tell theirs.
	Name       string
	ClientURLs []string
}

const (
	pgDefaultSchema         = "quire"
	pgDefaultMaxConnections = 8
	pgMinConnections        = 6
	pgOwnConnections        = 5 // writer, tail, heads, reports, listener
	pgDefaultPoll           = time.Second
	pgConnectTimeout        = 3 * time.Second
	pgMinVersion            = 150000
)

func (o PostgresOptions) withDefaults() (PostgresOptions, error) {
	if o.Schema == "" {
		o.Schema = pgDefaultSchema
	}
	if o.ListenURL == "" {
		o.ListenURL = o.URL
	}
	if o.PollInterval <= 0 {
		o.PollInterval = pgDefaultPoll
	}
	if o.MaxConnections == 0 {
		o.MaxConnections = pgDefaultMaxConnections
	}
	if o.MaxConnections < pgMinConnections {
		return o, fmt.Errorf("%d connections are too few for Postgres: %d at least", o.MaxConnections, pgMinConnections)
	}
	// It is put into the text of statements and functions, between quotes of every kind.
	if len(o.Schema) > 63 || strings.ContainsAny(o.Schema, `'$\`) || strings.Contains(o.Schema, "--") || strings.ContainsFunc(o.Schema, unicode.IsControl) {
		return o, fmt.Errorf("%q cannot be the name of the schema: at most 63 bytes, without ', $, \\, -- and control characters", o.Schema)
	}
	return o, nil
}

// Check returns what is wrong with the options, without asking any server.
func (o PostgresOptions) Check() error {
	o, err := o.withDefaults()
	if err != nil {
		return err
	}
	_, err = pgConfig(o.URL)
	if err == nil {
		_, err = pgConfig(o.ListenURL)
	}
	return err
}

func (o PostgresOptions) readers() int { return o.MaxConnections - pgOwnConnections }

func (o PostgresOptions) config() (*pgx.ConnConfig, error) { return pgConfig(o.URL) }

// pgConfig reads a URL. Its errors do not contain a password.
func pgConfig(text string) (*pgx.ConnConfig, error) {
	c, err := pgx.ParseConfig(text)
	if err != nil {
		var parse *pgconn.ParseConfigError
		if errors.As(err, &parse) {
			err = errors.New("check its form: postgres://user@host:5432/database?sslmode=verify-full")
		}
		return nil, fmt.Errorf("the URL of the Postgres database (%s) is not understood: %w", RedactPostgresURL(text), err)
	}
	if c.ConnectTimeout == 0 {
		// It is for each host: one that does not answer must leave time for the others.
		hosts := 1
		for i, f := range c.Fallbacks {
			if i == 0 && (f.Host != c.Host || f.Port != c.Port) || i > 0 && (f.Host != c.Fallbacks[i-1].Host || f.Port != c.Fallbacks[i-1].Port) {
				hosts++
			}
		}
		c.ConnectTimeout = pgConnectTimeout / time.Duration(hosts)
	}
	// A statement that a pooler passes on must not be one that it has to remember.
	c.DefaultQueryExecMode = pgx.QueryExecModeExec
	// Where several hosts are named, or one has become a standby, only the one that takes writes will do.
	if c.ValidateConnect == nil {
		c.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	}
	if c.RuntimeParams["application_name"] == "" {
		c.RuntimeParams["application_name"] = "quire"
	}
	return c, nil
}

// RedactPostgresURL is a connection URL or string as it may be shown: without its password.
func RedactPostgresURL(text string) string {
	u, err := url.Parse(text)
	switch {
	case err == nil && u.Opaque != "", strings.Contains(text, "'"):
		return "(not shown: it may hold a password)"
	case err != nil || u.Scheme == "":
		// key=value pairs, or something that is broken
		var shown []string
		for _, word := range strings.Fields(text) {
			if key, _, ok := strings.Cut(word, "="); ok && (key == "host" || key == "port" || key == "dbname" || key == "user") {
				shown = append(shown, word)
			}
		}
		return strings.Join(shown, " ")
	}
	q := u.Query()
	if q.Has("password") || q.Has("sslpassword") {
		q.Del("password")
		q.Del("sslpassword")
		u.RawQuery = q.Encode()
	}
	if u.User != nil {
		u.User = url.User(u.User.Username())
	}
	return u.String()
}

// pgServer opens connections.
type pgServer struct {
	config *pgx.ConnConfig // see withoutCancel
	pooled *pgPooled
}

func (s *pgServer) connect(ctx context.Context) (*pgconn.PgConn, error) {
	return pgconn.ConnectConfig(context.WithValue(ctx, connecting{}, true), &s.config.Config)
}

// connecting marks the context of a connection that is made to be used, and not to cancel what another one does.
type connecting struct{}

// withoutCancel makes connections that never have the server cancel a statement, as pgconn does when the time of one is up:
//   - A commit that waits for a synchronous standby is not undone by that: it is done without the standby, and everybody
//     sees what is lost if the standby is promoted next.
//   - PgBouncer 1.18 ends with "server in bad state" when it is to pass it on at the wrong moment.
//
// What writes and the questions for news may wait for is bounded by lock_timeout (migrations/postgres). Any other statement
// whose time is up stays with the server until it is done: then there is one session more for so long.
func withoutCancel(config *pgx.ConnConfig) *pgx.ConnConfig {
	config = config.Copy()
	dial := config.DialFunc
	config.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		if ctx.Value(connecting{}) == nil {
			return nil, errors.New("nothing is cancelled")
		}
		return dial(ctx, network, address)
	}
	return config
}

// checkServer refuses a server on which quire would not be safe.
func checkServer(ctx context.Context, c *pgconn.PgConn) error {
	const ask = `SELECT current_setting('server_version_num')::bigint, current_setting('default_transaction_isolation'),
		current_setting('server_encoding')`
	return pgQuery(ctx, c, ask, new(pgArgs), func(r pgRow) error {
		switch {
		case r.int8(0) < pgMinVersion:
			return fmt.Errorf("this is Postgres %d: quire needs 15 or newer", r.int8(0)/10000)
		case r.text(1) != "read committed":
			return fmt.Errorf("the default isolation of transactions is %q here: set it back for quire's role, ALTER ROLE … SET default_transaction_isolation = 'read committed'", r.text(1))
		case r.text(2) != "UTF8":
			return fmt.Errorf("the encoding of this database is %s: make one with ENCODING 'UTF8'", r.text(2))
		}
		return nil
	})
}

// pgMigratePoll is how often a process that starts looks whether another one is done with migrating.
const pgMigratePoll = 100 * time.Millisecond

// migrate makes the schema and brings it up to date. Of processes that start at once one does it and the others wait:
// the lock is that of a transaction, which a pooler keeps on one connection, and the work is done on another. Who waits
// keeps none: a small pool would have none left for the work.
func (o PostgresOptions) migrate(ctx context.Context) (err error) {
	config, err := pgConfig(o.URL)
	if err != nil {
		return err
	}
	schema := o.Schema
	db := stdlib.OpenDB(*config)
	defer func() { err = errors.Join(err, db.Close()) }()
	db.SetMaxOpenConns(2)
	dialect := migrations.Postgres(quoteName(schema))
	for {
		if version, err := migrations.Version(ctx, db, dialect); err != nil || version >= migrations.Latest(dialect) {
			if err != nil {
				return err
			}
			return migrations.Up(ctx, db, dialect) // which may refuse it
		}
		if done, err := migrateLocked(ctx, db, dialect, schema); done || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pgMigratePoll):
		}
	}
}

// migrateLocked migrates, unless another process is at it.
func migrateLocked(ctx context.Context, db *sql.DB, dialect migrations.Dialect, schema string) (done bool, err error) {
	lock, err := db.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelReadCommitted})
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, lock.Rollback()) }()
	const try = `SELECT pg_try_advisory_xact_lock(hashtextextended('quire.migrations.' || $1, 0))`
	if err := lock.QueryRowContext(ctx, try, schema).Scan(&done); err != nil || !done {
		return false, err
	}
	var there bool
	if err := lock.QueryRowContext(ctx, `SELECT to_regnamespace($1) IS NOT NULL`, quoteName(schema)).Scan(&there); err != nil {
		return false, err
	}
	if !there {
		if _, err := db.ExecContext(ctx, `CREATE SCHEMA `+quoteName(schema)); err != nil {
			return false, fmt.Errorf("making the schema %s: %w", quoteName(schema), err)
		}
	}
	return true, migrations.Up(ctx, db, dialect)
}

// explain gives an error of the database its sentinel and its advice. Errors of a context pass as they are.
func (p *pgLog) explain(err error) error {
	for _, sorted := range []error{nil, context.Canceled, ErrClosed, ErrDiskFull, ErrStorage, ErrUnavailable, ErrHistoryLost, ErrNewerSchema, ErrDamaged, ErrCompacted} {
		if errors.Is(err, sorted) {
			return err
		}
	}
	var e *pgconn.PgError
	answered := errors.As(err, &e)
	if errors.Is(err, context.DeadlineExceeded) {
		// The time limit was ours. Wrapped it would be taken for the client's, who would not try again.
		err = fmt.Errorf("%v: no answer in time; where the database is well, look into pg_locks for a session that holds a lock on quire's tables", err)
	}
	if !answered {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	advice := ""
	switch {
	case e.Code == "53100":
		return fmt.Errorf("%w: on the database server: %w", ErrDiskFull, err)
	case e.Code == "53300":
		advice = "raise max_connections or lower --postgres-max-connections"
	case e.Code == "55P03":
		advice = "another session holds a lock on quire's tables, or a commit waits for its synchronous standby: look into pg_locks"
	case e.Code == "25006":
		advice = "the server takes no writes: name the primary, or all hosts, in --storage"
	case e.Code == "42501":
		advice = "quire's role must own its schema"
	case e.Code == "3D000":
		advice = "make the database first: CREATE DATABASE"
	case strings.HasPrefix(e.Code, "28"):
		advice = "check the role and its password or certificate"
	}
	if advice != "" {
		return fmt.Errorf("%w: %w: %s", ErrUnavailable, err, advice)
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}
