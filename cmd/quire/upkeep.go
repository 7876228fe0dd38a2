package main

import (
	"context"
	"errors"
	"time"

	"go.uber.org/zap"

	"github.com/quire-db/quire/backend"
)

// The messages are etcd's: its tests and people's scripts look for them.

// logDefragment logs defragmentations.
func logDefragment(lg *zap.Logger) func(ended bool, err error) {
	return func(ended bool, err error) {
		switch {
		case !ended:
			lg.Info("starting defragment")
		case err != nil:
			lg.Warn("failed to defragment", zap.Error(err))
		default:
			lg.Info("finished defragment")
		}
	}
}

// logSnapshot logs snapshots that clients have asked for.
func logSnapshot(lg *zap.Logger) func(size int64, took time.Duration, err error) {
	return func(size int64, took time.Duration, err error) {
		if err != nil {
			lg.Warn("failed to send database snapshot to client", zap.Int64("total-bytes", size), zap.Duration("took", took), zap.Error(err))
			return
		}
		lg.Info("successfully sent database snapshot to client", zap.Int64("total-bytes", size), zap.Duration("took", took))
	}
}

// defragmentAtStart is --bootstrap-defrag-threshold-megabytes: it defragments where that is likely to free so much. etcd is
// not there for its clients meanwhile; quire does it beside its work, until ctx ends.
func defragmentAtStart(ctx context.Context, lg *zap.Logger, db *backend.DB, thresholdMegabytes uint) {
	if thresholdMegabytes == 0 {
		return
	}
	stats := db.Stats()
	// Half empty pages count as in use, so the sizes alone would tell little.
	needed := min(stats.DBSizeInUse, stats.LogicalBytes)
	if threshold := int64(thresholdMegabytes) << 20; stats.DBSize-needed < threshold {
		lg.Info("Skipping defragmentation", zap.Int64("current-db-size-bytes", stats.DBSize),
			zap.Int64("current-db-size-in-use-bytes", stats.DBSizeInUse), zap.Int64("logical-bytes", stats.LogicalBytes),
			zap.Int64("bootstrap-defrag-threshold-bytes", threshold))
		return
	}
	log := logDefragment(lg)
	log(false, nil)
	err := db.Defragment(ctx)
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		return // told to stop; the next start goes on
	}
	log(true, err)
}
