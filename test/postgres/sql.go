package postgres

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"net/url"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// DSN is the URL with which a client connects over TCP. Each parameter is "name=value" as in "pool_max_conns=4".
// With TLS it checks the server (verify-full); the client's own certificate, where one is needed, is
// what Authority.ClientParameters returns.
func (s *Server) DSN(database, user string, parameters ...string) string {
	return s.DSNAt(s.Address, database, user, parameters...)
}

// DSNAt is DSN through something in between, such as a Proxy.
func (s *Server) DSNAt(address, database, user string, parameters ...string) string {
	if s.Authority == nil {
		return dsn(address, database, user, append([]string{"sslmode=disable"}, parameters...))
	}
	return dsn(address, database, user, append([]string{"sslmode=verify-full", "sslrootcert=" + s.Authority.File}, parameters...))
}

func dsn(address, database, user string, parameters []string) string {
	values := url.Values{}
	for _, parameter := range parameters {
		name, value, _ := strings.Cut(parameter, "=")
		values.Set(name, value)
	}
	// libpq does not read "+" as a space.
	u := url.URL{Scheme: "postgres", User: url.User(user), Host: address, Path: "/" + database, RawQuery: strings.ReplaceAll(values.Encode(), "+", "%20")}
	return u.String()
}

// Exec runs statements as the superuser on the server's own socket, each in a transaction of its own.
func (s *Server) Exec(ctx context.Context, database string, statements ...string) error {
	_, err := s.psql(ctx, s.socketDSN(database), statements...)
	return err
}

// Query runs a query as the superuser on the server's own socket. Values come as text, NULL as "".
func (s *Server) Query(ctx context.Context, database, query string) ([][]string, error) {
	output, err := s.psql(ctx, s.socketDSN(database), query)
	if err != nil {
		return nil, err
	}
	rows, err := csv.NewReader(strings.NewReader(output)).ReadAll()
	if err != nil {
		return nil, fmt.Errorf("reading what psql says to %q: %w", query, err)
	}
	return rows, nil
}

// QueryAt is Query through any connection, such as DSN or PgBouncer.DSN return.
func (s *Server) QueryAt(ctx context.Context, dsn, query string) ([][]string, error) {
	output, err := s.psql(ctx, dsn, query)
	if err != nil {
		return nil, err
	}
	return csv.NewReader(strings.NewReader(output)).ReadAll()
}

// socketDSN leads past TLS and past everything in between, and at a full server into the connections that
// superuser_reserved_connections keeps free.
func (s *Server) socketDSN(database string) string {
	return fmt.Sprintf("host='%s' port=%d user=%s dbname='%s'", s.dir, s.port, Superuser, strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(database))
}

func (s *Server) psql(ctx context.Context, dsn string, statements ...string) (string, error) {
	args := []string{"--no-psqlrc", "--quiet", "--csv", "--tuples-only", "--set=ON_ERROR_STOP=1", "--no-password", "--dbname=" + dsn}
	for _, statement := range statements {
		args = append(args, "--command="+statement)
	}
	cmd := exec.CommandContext(ctx, s.installation.program("psql"), args...)
	cmd.Dir = "/"
	cmd.Env = environment()
	output, err := cmd.Output()
	if err == nil {
		return string(output), nil
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	said := ""
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		said = strings.TrimSpace(string(exit.Stderr))
	}
	return "", fmt.Errorf("psql %s: %w: %s\n-- the server's log --\n%s", strings.Join(statements, "; "), err, said, s.LogTail(1000))
}

// one returns the single value of a query in the superuser's database.
func (s *Server) one(ctx context.Context, query string) (string, error) {
	rows, err := s.Query(ctx, Superuser, query)
	if err != nil {
		return "", err
	}
	if len(rows) != 1 || len(rows[0]) != 1 {
		return "", fmt.Errorf("%q returned %q, want one value", query, rows)
	}
	return rows[0][0], nil
}

// WaitFor asks until the query returns true. A failed query ends the wait: see WaitReady for a server that comes back.
func (s *Server) WaitFor(ctx context.Context, database, query string) error {
	for {
		rows, err := s.Query(ctx, database, query)
		if err != nil {
			return fmt.Errorf("waiting for %q: %w", query, err)
		}
		if len(rows) == 1 && len(rows[0]) == 1 && rows[0][0] == "t" {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %q: %w (last answer %q)", query, ctx.Err(), rows)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// WaitReady asks until the server answers.
func (s *Server) WaitReady(ctx context.Context) error {
	for {
		err := s.Exec(ctx, Superuser, "SELECT 1")
		if err == nil || ctx.Err() != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// CreateDatabase creates an empty database.
func (s *Server) CreateDatabase(ctx context.Context, name string) error {
	return s.Exec(ctx, Superuser, "CREATE DATABASE "+quote(name))
}

// NewDatabase creates an empty database whose name this server has not had yet.
func (s *Server) NewDatabase(ctx context.Context) (string, error) {
	s.databases.Lock()
	s.databases.made++
	name := "test_" + strconv.Itoa(s.databases.made)
	s.databases.Unlock()
	return name, s.CreateDatabase(ctx, name)
}

// DropDatabase drops a database and ends the connections to it.
func (s *Server) DropDatabase(ctx context.Context, name string) error {
	return s.Exec(ctx, Superuser, "DROP DATABASE "+quote(name)+" WITH (FORCE)")
}

// Role is somebody who may log in to one database and owns nothing but one schema there.
type Role struct {
	Name     string
	Database string
	Schema   string
}

// CreateRole creates a role and its schema, and takes from everybody else in the database the right to create
// anything: schemas, temporary tables, and objects in the schema public. The role's search_path stays the default.
func (s *Server) CreateRole(ctx context.Context, r Role) error {
	name, database, schema := quote(r.Name), quote(r.Database), quote(r.Schema)
	return s.Exec(ctx, r.Database,
		"CREATE ROLE "+name+" LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS",
		"REVOKE ALL ON DATABASE "+database+" FROM PUBLIC",
		"REVOKE ALL ON SCHEMA public FROM PUBLIC",
		"GRANT CONNECT ON DATABASE "+database+" TO "+name,
		"CREATE SCHEMA "+schema+" AUTHORIZATION "+name,
	)
}

// TerminateBackends ends the client connections that the condition over pg_stat_activity selects, such as
// "application_name = 'quire'" ("true" selects all), and returns how many there were. It returns when they are gone.
func (s *Server) TerminateBackends(ctx context.Context, where string) (int, error) {
	// The inner query picks before the outer one acts: Postgres may otherwise terminate before it looks at the condition.
	count, err := s.one(ctx, "WITH victim AS MATERIALIZED (SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND ("+
		where+")) SELECT count(*) FILTER (WHERE pg_terminate_backend(pid, 10000)) FROM victim")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(count)
}

// quote makes an SQL identifier.
func quote(name string) string { return `"` + strings.ReplaceAll(name, `"`, `""`) + `"` }
