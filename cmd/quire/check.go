package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/quire-db/quire/backend"
)

// runCheck is `quire check`: exit code 0 when the database is sound, 1 when it is not or cannot be read.
func runCheck(ctx context.Context, c *config, stdout, stderr io.Writer) int {
	check := func(progress func(done, total int64)) (backend.CheckReport, error) {
		return backend.CheckPostgres(ctx, c.Postgres, progress)
	}
	if c.Postgres.URL == "" {
		if _, err := os.Stat(c.StoragePath); errors.Is(err, fs.ErrNotExist) {
			return report(stderr, fmt.Errorf("there is no database at %s; name it with --data-dir or --storage", c.StoragePath))
		}
		check = func(progress func(done, total int64)) (backend.CheckReport, error) {
			return backend.CheckSQLite(ctx, c.StoragePath, progress)
		}
	}
	progress, clear := progressLine(stderr)
	found, err := check(progress)
	clear()
	if err != nil {
		return report(stderr, fmt.Errorf("check %s: %w", c.StoragePath, err))
	}
	for _, p := range found.Problems {
		fmt.Fprintln(stdout, "problem:", p)
	}
	verdict, code := "sound", exitOK
	if len(found.Problems) > 0 {
		verdict, code = fmt.Sprintf("NOT SOUND, %d problems", len(found.Problems)), exitFailed
	}
	fmt.Fprintf(stdout, "%s: %s; revision %d, compacted to %d, %d rows, %d keys, %d leases\n",
		c.StoragePath, verdict, found.Revision, found.CompactRevision, found.Rows, found.Keys, found.Leases)
	return code
}

// progressLine rewrites one line when w is a terminal, and does nothing otherwise. clear wipes the line.
func progressLine(w io.Writer) (progress func(done, total int64), clear func()) {
	f, ok := w.(*os.File)
	if !ok {
		return nil, func() {}
	}
	if info, err := f.Stat(); err != nil || info.Mode()&fs.ModeCharDevice == 0 {
		return nil, func() {}
	}
	var last time.Time
	return func(done, total int64) {
			if time.Since(last) < 200*time.Millisecond {
				return
			}
			last = time.Now()
			if total > 0 {
				fmt.Fprintf(f, "\r\x1b[Kchecked %d of %d rows (%d%%)", done, total, done*100/total)
			} else {
				fmt.Fprintf(f, "\r\x1b[Kchecked %d rows", done)
			}
		}, func() {
			if !last.IsZero() {
				fmt.Fprint(f, "\r\x1b[K")
			}
		}
}
