package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/quire-db/quire/test/load/proc"
	"github.com/quire-db/quire/test/postgres"
)

// The servers that keep their data in PostgreSQL.
const (
	quirePostgres  = "quire-pg"  // one process
	quirePostgres3 = "quire-pg3" // three, and the clients are spread over them
	kinePostgres   = "kine-pg"
)

func onPostgres(kind string) bool {
	return kind == quirePostgres || kind == quirePostgres3 || kind == kinePostgres
}

// processes is how many processes of a server there are.
func processes(kind string) int {
	if kind == quirePostgres3 {
		return 3
	}
	return 1
}

// database is the PostgreSQL server that all servers on Postgres share. Each has an empty database of its own in it. As they
// do, it takes turns: while one that does not use it is measured, it is frozen.
type database struct {
	*postgres.Server
	family  proc.Family
	version string // as `SHOW server_version` says
}

// databaseSettings are all that is not PostgreSQL's default: kine opens as many connections as it has requests.
var databaseSettings = map[string]string{"max_connections": "400"}

func startDatabase(ctx context.Context, dir string) (d *database, err error) {
	// The server runs as somebody else if this program runs as root.
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	s, err := postgres.Start(ctx, postgres.Options{Dir: dir, Settings: databaseSettings})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Stop())
		}
	}()
	d = &database{Server: s}
	if d.version, err = d.value(ctx, postgres.Superuser, "SHOW server_version"); err != nil {
		return nil, err
	}
	data, err := d.value(ctx, postgres.Superuser, "SHOW data_directory")
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(filepath.Join(data, "postmaster.pid"))
	if err != nil {
		return nil, err
	}
	first, _, _ := strings.Cut(string(text), "\n")
	pid, err := strconv.Atoi(first)
	if err != nil {
		return nil, fmt.Errorf("the first line of PostgreSQL's postmaster.pid is %q, a process id is expected", first)
	}
	d.family = proc.Family(pid)
	return d, nil
}

// value is the single value of a query.
func (d *database) value(ctx context.Context, name, query string) (string, error) {
	rows, err := d.Query(ctx, name, query)
	if err != nil {
		return "", err
	}
	if len(rows) != 1 || len(rows[0]) != 1 {
		return "", fmt.Errorf("%q returned %q, one value is expected", query, rows)
	}
	return rows[0][0], nil
}

// fact describes the server, as a line of Markdown.
func (d *database) fact() string {
	return fmt.Sprintf("PostgreSQL: %s, one server, a database for each of those that use it; fsync is on, and its only setting that is not the default is max_connections=%s",
		d.version, databaseSettings["max_connections"])
}

// vacuumLimit is how long a measurement waits for the end of work that others have left to PostgreSQL.
const vacuumLimit = time.Minute

// attend has PostgreSQL run if the server is on it, and freezes it if not. It waits until no autovacuum is at work in the
// database of another server, which would be charged to this one.
func (o *options) attend(ctx context.Context, b *bed) error {
	switch {
	case o.database == nil:
		return nil
	case !onPostgres(b.kind):
		return o.database.Pause()
	}
	if err := o.database.Resume(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, vacuumLimit)
	defer cancel()
	return o.database.WaitFor(ctx, postgres.Superuser,
		"SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'autovacuum worker' AND datname <> '"+b.database+"')")
}

// costs are the metrics of what one operation costs on the server's side.
func costs(op string) []metric {
	return []metric{{unit: "µs of server CPU per " + op}, {unit: "µs of PostgreSQL's CPU per " + op}}
}

// costs are the values of the metrics of that name.
func (r result) costs() []float64 {
	return []float64{r.perOp(float64(r.used.cpu.Nanoseconds()) / 1000), r.perOp(1e6 * r.used.database)}
}
