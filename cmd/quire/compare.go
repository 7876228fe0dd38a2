package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/quire-db/quire/sqlraft"
)

// compareOptions: etcd's feature gate CompactHashCheck adds checks. They compare what the others compare too: the hash of
// a part depends on what compaction has left of it.
func compareOptions(f *clusterFlags, history sqlraft.History) sqlraft.CompareOptions {
	o := sqlraft.CompareOptions{History: history, Every: f.CorruptCheckTime}
	if f.CompactHashCheck {
		o.Compactions = f.CompactHashCheckTime
	}
	return o
}

// comparedLogEvery: how often the log tells, but for debug messages, that all members are equal.
const comparedLogEvery = time.Hour

// compareHooks tell the log what comes of comparing the members' data, in etcd's words where it has them. Keys and values do
// not get there.
func compareHooks(lg *zap.Logger, h *sqlraft.Hooks) {
	var told time.Time // Compared is called by one goroutine
	h.Compared = func(done sqlraft.Comparison, err error) {
		peers := zap.Int("number-of-peers-checked", done.Peers)
		for id, err := range done.Skipped {
			lg.Warn("failed hash kv request", zap.String("remote-peer-id", fmt.Sprintf("%x", id)), zap.Error(err))
		}
		if err != nil {
			lg.Warn("failed to check hash KV", peers, zap.Error(err))
			return
		}
		level := zapcore.DebugLevel
		if done.Whole && time.Since(told) >= comparedLogEvery {
			level, told = zapcore.InfoLevel, time.Now()
		}
		lg.Log(level, "finished peer corruption check", peers, zap.Bool("whole-history", done.Whole))
		if done.ForCompactions {
			lg.Info("finished compaction hash check", peers)
		}
	}
	h.Differs = func(d sqlraft.Difference) {
		found := make([]string, len(d.Found))
		for i, f := range d.Found {
			found[i] = fmt.Sprintf("%x: hash %d, at revision %d, compacted at %d", f.ID, f.Hash, f.Revision, f.CompactRevision)
		}
		corrupt := make([]string, len(d.Corrupt))
		for i, id := range d.Corrupt {
			corrupt[i] = fmt.Sprintf("%x", id)
		}
		level, message := zapcore.ErrorLevel, "found hash mismatch"
		if len(corrupt) == 0 {
			level, message = zapcore.WarnLevel, "found hash mismatch, but none when looking again"
		}
		lg.Log(level, message, zap.Int64("after-revision", d.After), zap.Int64("up-to-revision", d.UpTo),
			zap.Strings("members", found), zap.Strings("corrupt-members", corrupt))
	}
}

// compareInitially is etcd's feature gate InitialCorruptCheck: an error says that this member has other data than the others.
func (m *member) compareInitially(ctx context.Context) error {
	if !m.check {
		return nil
	}
	m.lg.Info("starting initial corruption check")
	done, err := m.CompareAll(ctx)
	switch {
	case errors.Is(err, sqlraft.ErrInconsistent):
		m.lg.Error("checkInitialHashKV failed", zap.Error(err))
		return fmt.Errorf("%w: replace this member, as docs/raft.md says", err)
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil || !done.Whole && done.Peers > 0:
		m.lg.Warn("the initial corruption check was not finished", zap.Int("number-of-peers-checked", done.Peers), zap.Error(err))
	default:
		m.lg.Info("initial corruption checking passed; no corruption", zap.Int("number-of-peers-checked", done.Peers))
	}
	return nil
}
