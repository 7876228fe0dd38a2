// Package migrations holds the schema of quire's database as numbered SQL files, one folder per dialect, and brings a
// database up to the newest of them.
//
// Promises: the version stands in the database itself (table schema_version). Each file runs in one transaction together
// with the row that records it, so a step is done or not done, and Up may be repeated after any failure. A database newer
// than this binary is refused before anything in it is changed. There is no way down: restore a backup.
//
// Up must be called by one process at a time; the caller holds the database's lock.
package migrations

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"

	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/database"
)

// Dialect names a database and the folder with its files.
type Dialect string

// SQLite is for databases opened with the database/sql driver "sqlite" (modernc.org/sqlite).
const SQLite Dialect = "sqlite"

// versionTable is where the database keeps its version. Its name is a public API like those of the other tables.
const versionTable = "schema_version"

//go:embed sqlite/*.sql
var files embed.FS

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
	names, err := fs.Glob(files, string(dialect)+"/*.sql")
	if err != nil {
		panic(fmt.Sprintf("migrations: dialect %q is no folder name: %v", string(dialect), err))
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
	gooseDialect, err := dialect.goose()
	if err != nil {
		return 0, err
	}
	// Not the provider's GetDBVersion: that one creates the table when it is missing. And asked here, because goose's
	// store for SQLite cannot tell a missing table from another failure.
	var exists bool
	const find = `SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?)`
	if err := db.QueryRowContext(ctx, find, versionTable).Scan(&exists); err != nil {
		return 0, fmt.Errorf("read the schema version: %w", err)
	}
	if !exists {
		return 0, nil
	}
	store, err := database.NewStore(gooseDialect, versionTable)
	if err != nil {
		return 0, fmt.Errorf("read the schema version: %w", err)
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
// A newer one is refused with a *NewerSchemaError.
func Up(ctx context.Context, db *sql.DB, dialect Dialect) error {
	gooseDialect, err := dialect.goose()
	if err != nil {
		return err
	}
	version, err := Version(ctx, db, dialect)
	if err != nil {
		return err
	}
	latest := Latest(dialect)
	if version > latest {
		return &NewerSchemaError{Database: version, Latest: latest}
	}
	if version == latest {
		return nil
	}
	folder, err := fs.Sub(files, string(dialect))
	if err != nil {
		return fmt.Errorf("migrate the schema: %w", err)
	}
	provider, err := goose.NewProvider(gooseDialect, db, folder,
		goose.WithTableName(versionTable),
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

func (d Dialect) goose() (goose.Dialect, error) {
	switch d {
	case SQLite:
		return goose.DialectSQLite3, nil
	default:
		return "", fmt.Errorf("no schema for dialect %q", string(d))
	}
}
