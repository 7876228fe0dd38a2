// Package migrations holds the schema of quire's database as numbered SQL files, one folder per dialect, and brings a
// database up to the newest of them.
//
// Promises: the version stands in the database itself (table schema_version). Each file runs in one transaction together
// with the row that records it, so a step is done or not done, and Up may be repeated after any failure. A database newer
// than this binary is refused before anything in it is changed. There is no way down: restore a backup.
//
// Up must be called by one process at a time; the caller holds the database's lock.
//
// A Postgres schema may be in use by several processes while one of them brings it up. A file says whether older ones may
// go on writing after it: what it leaves in meta, writer_schema, is the oldest schema version that a writer must know.
package migrations

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"
	"testing/fstest"

	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/database"
)

// Dialect names a kind of database, and where in it the tables lie.
type Dialect struct {
	folder string // with its files
	schema string // quoted; empty where there are none
}

// SQLite is for databases opened with the database/sql driver "sqlite" (modernc.org/sqlite).
var SQLite = Dialect{folder: "sqlite"}

// Postgres is for a schema of a database opened with pgx. Its name is quoted already where that is needed. The schema must be there.
func Postgres(schema string) Dialect { return Dialect{folder: "postgres", schema: schema} }

// versionTable is where the database keeps its version. Its name is a public API like those of the other tables.
const versionTable = "schema_version"

// table is the name of one of our tables as statements write it.
func (d Dialect) table(name string) string {
	if d.schema == "" {
		return name
	}
	return d.schema + "." + name
}

//go:embed sqlite/*.sql postgres/*.sql
var files embed.FS

// source returns the files, with the name of the schema put in.
func (d Dialect) source() (fs.FS, error) {
	if d.schema == "" {
		return fs.Sub(files, d.folder)
	}
	names, err := fs.Glob(files, d.folder+"/*.sql")
	if err != nil {
		return nil, err
	}
	filled := make(fstest.MapFS)
	for _, name := range names {
		text, err := files.ReadFile(name)
		if err != nil {
			return nil, err
		}
		filled[strings.TrimPrefix(name, d.folder+"/")] = &fstest.MapFile{Data: []byte(strings.ReplaceAll(string(text), "${schema}", d.schema))}
	}
	return filled, nil
}

// NewerSchemaError says that the database was written by a newer quire than this one.
type NewerSchemaError struct {
	Database int64 // schema version found in the database
	Latest   int64 // newest schema version this binary knows
}

func (e *NewerSchemaError) Error() string {
	return fmt.Sprintf("the database has schema version %d, this quire knows versions up to %d: start the newer quire or restore a backup",
		e.Database, e.Latest)
}

// Latest is the newest schema version this binary knows, 0 for a dialect without files.
func Latest(dialect Dialect) int64 {
	names, err := fs.Glob(files, dialect.folder+"/*.sql")
	if err != nil {
		panic(fmt.Sprintf("migrations: dialect %q is no folder name: %v", dialect.folder, err))
	}
	var latest int64
	for _, name := range names {
		version, err := goose.NumericComponent(name)
		if err != nil {
			panic(fmt.Sprintf("migrations: embedded file %s: %v", name, err)) // its name is fixed at build time
		}
		latest = max(latest, version)
	}
	return latest
}

// Version reads the schema version of db and changes nothing. It is 0 for an empty database.
func Version(ctx context.Context, db *sql.DB, dialect Dialect) (int64, error) {
	store, err := dialect.store()
	if err != nil {
		return 0, err
	}
	// Not the provider's GetDBVersion: that one creates the table when it is missing. And asked here, because goose's
	// store for SQLite cannot tell a missing table from another failure.
	exists, err := store.TableExists(ctx, db)
	if err != nil {
		return 0, fmt.Errorf("read the schema version: %w", err)
	}
	if !exists {
		return 0, nil
	}
	version, err := store.GetLatestVersion(ctx, db)
	if errors.Is(err, database.ErrVersionNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read the schema version: %w", err)
	}
	return version, nil
}

// Up brings db to the latest schema version. A database that is there already is only read.
// A newer one is refused with a *NewerSchemaError, unless it says that this binary may still write to it.
func Up(ctx context.Context, db *sql.DB, dialect Dialect) error {
	version, err := Version(ctx, db, dialect)
	if err != nil {
		return err
	}
	latest := Latest(dialect)
	if version > latest {
		return refuseNewer(ctx, db, dialect, version, latest)
	}
	if version == latest {
		return nil
	}
	folder, err := dialect.source()
	if err != nil {
		return fmt.Errorf("migrate the schema: %w", err)
	}
	store, err := dialect.store()
	if err != nil {
		return fmt.Errorf("migrate the schema: %w", err)
	}
	provider, err := goose.NewProvider("", db, folder,
		goose.WithStore(store),
		goose.WithSlog(slog.New(slog.DiscardHandler)), // nothing below etcdapi logs
		goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return fmt.Errorf("migrate the schema: %w", err)
	}
	if _, err := provider.Up(ctx); err != nil {
		return fmt.Errorf("migrate the schema from version %d to %d: %w", version, latest, err)
	}
	return nil
}

// refuseNewer returns why a database with a newer schema cannot be used, nil when it can.
func refuseNewer(ctx context.Context, db *sql.DB, dialect Dialect, version, latest int64) error {
	newer := &NewerSchemaError{Database: version, Latest: latest}
	if dialect.schema == "" {
		return newer
	}
	var writer int64
	query := "SELECT value FROM " + dialect.table("meta") + " WHERE name = 'writer_schema'"
	if err := db.QueryRowContext(ctx, query).Scan(&writer); err != nil {
		return errors.Join(newer, fmt.Errorf("and it does not say who may write to it: %w", err))
	}
	if writer > latest {
		return newer
	}
	return nil
}

// store is goose's, but for how it looks for its table: goose takes quotes for a part of the name.
type store struct {
	database.Store
	find string
}

func (s *store) TableExists(ctx context.Context, db database.DBTxConn) (exists bool, err error) {
	return exists, db.QueryRowContext(ctx, s.find, s.Tablename()).Scan(&exists)
}

func (d Dialect) store() (*store, error) {
	name, find := database.DialectSQLite3, `SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?)`
	switch d.folder {
	case "sqlite":
	case "postgres":
		name, find = database.DialectPostgres, `SELECT to_regclass($1) IS NOT NULL`
	default:
		return nil, fmt.Errorf("no schema for dialect %q", d.folder)
	}
	s, err := database.NewStore(name, d.table(versionTable))
	return &store{s, find}, err
}
