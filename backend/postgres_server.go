package backend

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

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
	// reads values that are not in memory. 0: 8.
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
	if len(o.Schema) > 63 || strings.ContainsRune(o.Schema, 0) {
		return o, fmt.Errorf("%q is no name for a schema of Postgres: at most 63 bytes, no NUL", o.Schema)
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
		c.ConnectTimeout = pgConnectTimeout
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
	if err != nil || u.Scheme == "" {
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
type pgServer struct{ config *pgx.ConnConfig }

func (s *pgServer) connect(ctx context.Context) (*pgconn.PgConn, error) {
	ctx, cancel := context.WithTimeout(ctx, s.config.ConnectTimeout)
	defer cancel()
	return pgconn.ConnectConfig(ctx, &s.config.Config)
}

// checkServer refuses a server on which quire would not be safe.
func checkServer(ctx context.Context, c *pgconn.PgConn) error {
	const ask = `SELECT current_setting('server_version_num')::bigint, current_setting('default_transaction_isolation'),
		current_setting('server_encoding'), current_setting('fsync') = 'on' AND current_setting('full_page_writes') = 'on'`
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

// pgLane is one connection that is kept for one purpose, made when it is needed and again after it broke. It belongs to
// one goroutine at a time.
type pgLane struct {
	server *pgServer
	c      *pgconn.PgConn
}

func (l *pgLane) open(ctx context.Context) (*pgconn.PgConn, error) {
	if l.c != nil && !l.c.IsClosed() {
		return l.c, nil
	}
	c, err := l.server.connect(ctx)
	if err != nil {
		return nil, err
	}
	l.c = c
	return c, nil
}

func (l *pgLane) close(ctx context.Context) {
	if l.c != nil {
		_ = l.c.Close(ctx) // it says goodbye; the server notices the end without it too
	}
}

// migrate makes the schema and brings it up to date. Of processes that start at once one does it and the others wait:
// the lock is that of a transaction, which a pooler keeps on one connection, and the work is done on another.
func (s *pgServer) migrate(ctx context.Context, schema string) (err error) {
	db := stdlib.OpenDB(*s.config)
	defer func() { err = errors.Join(err, db.Close()) }()
	db.SetMaxOpenConns(2)
	dialect := migrations.Postgres(quoteName(schema))
	if version, err := migrations.Version(ctx, db, dialect); err != nil || version >= migrations.Latest(dialect) {
		if err != nil {
			return err
		}
		return migrations.Up(ctx, db, dialect) // which may refuse it
	}
	lock, err := db.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelReadCommitted})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Rollback()) }()
	if _, err := lock.ExecContext(ctx, `SELECT pg_advisory_xact_lock(hashtextextended('quire.migrations.' || $1, 0))`, schema); err != nil {
		return err
	}
	var there bool
	if err := lock.QueryRowContext(ctx, `SELECT to_regnamespace($1) IS NOT NULL`, quoteName(schema)).Scan(&there); err != nil {
		return err
	}
	if !there {
		if _, err := db.ExecContext(ctx, `CREATE SCHEMA `+quoteName(schema)); err != nil {
			return fmt.Errorf("making the schema %s: %w", quoteName(schema), err)
		}
	}
	return migrations.Up(ctx, db, dialect)
}

// explain gives an error of the database its sentinel and its advice. Errors of a context pass as they are.
func (p *pgLog) explain(err error) error {
	for _, sorted := range []error{nil, context.Canceled, ErrClosed, ErrDiskFull, ErrStorage, ErrUnavailable, ErrHistoryLost, ErrNewerSchema, ErrDamaged, ErrCompacted} {
		if errors.Is(err, sorted) {
			return err
		}
	}
	var e *pgconn.PgError
	if !errors.As(err, &e) {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	advice := ""
	switch {
	case e.Code == "53100":
		return fmt.Errorf("%w: on the database server: %w", ErrDiskFull, err)
	case e.Code == "53300":
		advice = "raise max_connections or lower --postgres-max-connections"
	case e.Code == "55P03":
		advice = "another session holds a lock on quire's tables: look into pg_locks"
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
