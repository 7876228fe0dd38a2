package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"go.uber.org/zap"

	"github.com/quire-db/quire/backend"
)

// leaveCluster makes a plain SQLite database of a member's: with everything that the member has or knows to be committed,
// and without the others. It can be done again after a crash anywhere in it.
func leaveCluster(ctx context.Context, c *config, watch *storageWatch) (err error) {
	var db *backend.DB
	if exists(c.raftDir()) {
		if db, err = appliedAlone(ctx, c, watch); err != nil {
			return err
		}
		// Then the log goes, before anything else: it must not be applied once more to what has left it.
		err := db.Sync()
		if err == nil {
			err = errors.Join(os.Rename(c.raftDir(), c.leftDir()), backend.SyncDirectory(filepath.Dir(c.raftDir())))
		}
		if err != nil {
			return errors.Join(err, db.Close())
		}
	} else if db, err = backend.OpenReplica(ctx, c.StoragePath, watch.options(c, 0)); err != nil {
		return fmt.Errorf("cannot open %s: %w", c.StoragePath, err)
	}
	if err := errors.Join(db.Leave(), db.Close()); err != nil {
		return err
	}
	if err := os.RemoveAll(c.leftDir()); err != nil {
		return err
	}
	watch.lg.Info("left the cluster; this is a SQLite database of its own now", zap.String("storage", c.StoragePath))
	return nil
}

// appliedAlone takes everybody else out of the cluster, and returns the database once everything is applied and nothing
// follows any more.
func appliedAlone(ctx context.Context, c *config, watch *storageWatch) (*backend.DB, error) {
	st, err := openMember(ctx, c, watch)
	if err != nil {
		return nil, err
	}
	err = st.ready(ctx)
	if err == nil {
		err = st.db.Ready(ctx, false)
	}
	if err = errors.Join(err, st.member.stop()); err != nil {
		return nil, errors.Join(err, st.db.Close())
	}
	return st.db, nil
}
