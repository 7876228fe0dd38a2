package postgres

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"time"
)

// Standby starts a hot standby of this server, copied with pg_basebackup and fed over the server's socket, and
// returns when it streams. With synchronous, every commit from then on waits for it to have the log on its disk
// (synchronous_standby_names; commits wait for ever while no synchronous standby is there).
func (s *Server) Standby(ctx context.Context, synchronous bool) (*Server, error) {
	standby, err := newServer(Options{Dir: filepath.Dir(s.workspace.dir), TLS: s.tls, Settings: s.settings})
	if err != nil {
		return nil, fmt.Errorf("a standby of PostgreSQL: %w", err)
	}
	s.standbys++
	name := "standby" + strconv.Itoa(s.standbys)
	if err := standby.follow(ctx, s, name); err != nil {
		return nil, errors.Join(fmt.Errorf("a standby of PostgreSQL: %w", err), standby.Stop())
	}
	if synchronous {
		err = s.waitForSynchronous(ctx, name)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("a synchronous standby of PostgreSQL: %w", err), standby.Stop())
	}
	return standby, nil
}

// follow copies the primary and starts as its standby.
func (s *Server) follow(ctx context.Context, primary *Server, name string) error {
	if err := s.workspace.account.mkdir(s.dataDir(), 0o700); err != nil {
		return err
	}
	// The slot makes the primary keep the log that the standby has not read yet.
	err := run(s.workspace.account.command(s.dir, s.installation.program("pg_basebackup"),
		"--dbname="+primary.socketDSN(Superuser), "--pgdata="+s.dataDir(), "--checkpoint=fast",
		"--wal-method=stream", "--create-slot", "--slot="+name, "--no-sync", "--no-password"))
	if err != nil {
		return err
	}
	s.Authority = primary.Authority
	delete(s.settings, "synchronous_standby_names") // it has no standby of its own after its promotion
	s.settings["primary_conninfo"] = fmt.Sprintf("host='%s' port=%d user=%s application_name=%s", primary.dir, primary.port, Superuser, name)
	s.settings["primary_slot_name"] = name
	if err := s.workspace.account.write(filepath.Join(s.dataDir(), "standby.signal"), ""); err != nil {
		return err
	}
	if err := s.startOnFreePort(ctx); err != nil {
		return err
	}
	return primary.WaitFor(ctx, Superuser,
		"SELECT count(*) = 1 FROM pg_stat_replication WHERE application_name = '"+name+"' AND state = 'streaming'")
}

func (s *Server) waitForSynchronous(ctx context.Context, name string) error {
	if err := s.SetSynchronousStandbys(ctx, name); err != nil {
		return err
	}
	return s.WaitFor(ctx, Superuser,
		"SELECT count(*) = 1 FROM pg_stat_replication WHERE application_name = '"+name+"' AND sync_state = 'sync'")
}

// SetSynchronousStandbys sets synchronous_standby_names: the standbys, called standby1, standby2, … in the order
// in which Standby made them, that commits wait for. "" is none.
func (s *Server) SetSynchronousStandbys(ctx context.Context, names string) error {
	if err := s.Set(ctx, "synchronous_standby_names", names); err != nil {
		return err
	}
	// It is the checkpointer that tells the backends to wait, and it reads new settings before it does what it is asked.
	return s.Exec(ctx, Superuser, "CHECKPOINT")
}

// StopFollowing makes a standby stop reading the primary's log and returns when it has: what the primary commits
// from then on, a promotion loses.
func (s *Server) StopFollowing(ctx context.Context) error {
	if err := s.Set(ctx, "primary_conninfo", ""); err != nil {
		return err
	}
	return s.WaitFor(ctx, Superuser, "SELECT count(*) = 0 FROM pg_stat_wal_receiver")
}

// WaitCaughtUp waits until a standby shows everything that this server, its primary, has committed by now.
func (s *Server) WaitCaughtUp(ctx context.Context, standby *Server) error {
	position, err := s.one(ctx, "SELECT pg_current_wal_flush_lsn()")
	if err != nil {
		return err
	}
	return standby.WaitFor(ctx, Superuser, "SELECT pg_last_wal_replay_lsn() >= '"+position+"'")
}

// Promote makes a standby a primary, on a timeline of its own, and returns when it takes writes. The old primary
// is not touched: stop it first, or there are two.
func (s *Server) Promote(ctx context.Context) error {
	limit := startLimit
	if deadline, ok := ctx.Deadline(); ok {
		limit = time.Until(deadline)
	}
	promoted, err := s.one(ctx, fmt.Sprintf("SELECT pg_promote(true, %d)", max(1, int(limit.Seconds()))))
	if err != nil {
		return err
	}
	if promoted != "t" {
		return fmt.Errorf("the standby is still one %s after its promotion\n%s", limit.Round(time.Second), s.LogTail(4000))
	}
	return nil
}
