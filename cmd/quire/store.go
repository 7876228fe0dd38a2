package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.uber.org/zap"

	"github.com/quire-db/quire/backend"
	"github.com/quire-db/quire/etcdapi"
	"github.com/quire-db/quire/sqlraft"
)

// store is what the API serves: the database, and where it is a member's of a cluster, what puts its writes in order.
type store struct {
	db       *backend.DB
	memberID uint64
	member   *member // nil: this process, or Postgres, puts them in order
	// clusterID is that of an only member.
	clusterID uint64
}

// openStore opens the database and tells every few seconds how far it is.
func openStore(ctx context.Context, c *config, watch *storageWatch) (*store, error) {
	if c.Kind == storageRaft {
		return openMember(ctx, c, watch)
	}
	if c.Leave {
		if err := leaveCluster(ctx, c, watch); err != nil {
			return nil, fmt.Errorf("leaving the cluster: %w", err)
		}
	}
	id := newIdentity(c.Name, c.InitialCluster, c.InitialClusterToken, c.AdvertisePeerURLs)
	s := &store{memberID: id.MemberID, clusterID: id.ClusterID}
	var err error
	if c.Kind == storagePostgres {
		s.db, err = backend.OpenPostgres(ctx, c.Postgres, watch.options(c, id.MemberID))
	} else {
		s.db, err = backend.OpenSQLite(ctx, c.StoragePath, watch.options(c, id.MemberID))
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", c.StoragePath, err) // the backend says what to do
	}
	if shared := s.db.ClusterID(); shared != 0 {
		// All processes are one member, with several doors.
		s.memberID, s.clusterID = shared, sqlraft.ClusterID([]uint64{shared})
	}
	watch.metrics.KnownPeers(s.memberID, []uint64{s.memberID})
	watch.lg.Info("starting local member", zap.String("local-member-id", fmt.Sprintf("%x", s.memberID)), zap.String("cluster-id", fmt.Sprintf("%x", s.clusterID)))
	return s, nil
}

// header is that of watch responses.
func (s *store) header() *pb.ResponseHeader {
	if s.member == nil {
		return &pb.ResponseHeader{ClusterId: s.clusterID, MemberId: s.memberID, RaftTerm: etcdapi.OneMemberTerm}
	}
	st := s.member.Status()
	return &pb.ResponseHeader{ClusterId: st.ClusterID, MemberId: st.ID, RaftTerm: st.Term}
}

// raft is what /debug/vars shows.
func (s *store) raft() raftVars {
	applied := s.db.Stats().AppliedIndex + 1 // as Status answers: the founding of the store is the first
	v := raftVars{ID: fmt.Sprintf("%x", s.memberID), Lead: fmt.Sprintf("%x", s.memberID), Term: etcdapi.OneMemberTerm,
		Commit: applied, Applied: applied, State: "StateLeader"}
	if s.member != nil {
		st := s.member.Status()
		v.Lead, v.Term, v.Commit, v.Applied = fmt.Sprintf("%x", st.Leader), st.Term, st.Committed, st.Applied
		if st.Leader != st.ID {
			v.State = "StateFollower"
		}
	}
	return v
}

// leads tells whether it is on this process to do what one of all has to do.
func (s *store) leads() bool {
	if s.member == nil {
		return true
	}
	st := s.member.Status()
	return st.Leader == st.ID
}

// cluster is what the API asks; nil where there is none.
func (s *store) cluster() etcdapi.Cluster {
	if s.member == nil {
		return nil
	}
	return s.member
}

// ready returns once clients may come; see member.ready.
func (s *store) ready(ctx context.Context) error {
	if s.member == nil {
		return nil
	}
	return s.member.ready(ctx)
}

// failed receives why this process can be a member no longer.
func (s *store) failed() <-chan error {
	if s.member == nil {
		return nil // never
	}
	return s.member.Failed()
}

// close hands the leadership over, if this member has it, and closes the database.
func (s *store) close() error {
	var err error
	if s.member != nil {
		err = s.member.stop()
	}
	return errors.Join(err, s.db.Close())
}

// options of a database of the member id, which watch is told of.
func (w *storageWatch) options(c *config, id uint64) backend.Options {
	var last atomic.Int64
	begin := time.Now()
	committed := w.metrics.BatchCommitted
	if c.Kind == storageRaft {
		committed = w.metrics.EntryApplied
	}
	return backend.Options{
		QuotaBytes:      c.QuotaBackendBytes,
		ValueCacheBytes: c.ValueCacheBytes,
		MinLeaseTTL:     c.Cluster.minLeaseTTL(),
		TokenTTL:        time.Duration(c.AuthTokenTTL) * time.Second,
		MemberID:        id,
		SnapshotDir:     c.DataDir,
		CompactionBatch: c.CompactionBatch,
		CompactionPause: c.CompactionPause,
		Hooks: backend.Hooks{
			LoadProgress: func(done, total int64) {
				const every = 3 * time.Second
				now := int64(time.Since(begin))
				if before := last.Load(); now-before >= int64(every) && last.CompareAndSwap(before, now) {
					w.lg.Info("loading the index", zap.Int64("rows", done), zap.Int64("of", total))
				}
			},
			BatchCommitted: committed,
			Applied:        w.metrics.Applied,
			CompactionStep: w.metrics.CompactionStep,
			CompactionDone: func(rev, rows int64, took time.Duration) {
				w.metrics.CompactionDone(rev, rows, took)
				// etcd's message.
				w.lg.Info("finished scheduled compaction", zap.Int64("compact-revision", rev), zap.Int64("rows", rows), zap.Duration("took", took))
			},
			LeaseExpired: w.metrics.LeaseExpired,
			Alarm: func(a *pb.AlarmMember, raised bool) {
				w.metrics.Alarm(a, raised)
				w.lg.Warn("alarm", zap.String("alarm", a.Alarm.String()), zap.String("member-id", fmt.Sprintf("%x", a.MemberID)), zap.Bool("raised", raised))
			},
			StorageError:  w.failed,
			StorageHealed: w.healed,
		},
	}
}

// storageWatch tells log, metrics and health how the storage does. A storage that fails does so at every batch: the
// log hears of it at most every ten seconds.
type storageWatch struct {
	lg      *zap.Logger
	metrics *etcdapi.Metrics
	api     atomic.Pointer[etcdapi.Server] // nil until the API stands

	mu struct {
		sync.Mutex
		logged time.Time
		lost   bool // ErrHistoryLost was logged
	}
}

func (w *storageWatch) failed(err error) {
	w.metrics.StorageError(err)
	if api := w.api.Load(); api != nil {
		api.StorageFailed(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if errors.Is(err, backend.ErrHistoryLost) {
		if !w.mu.lost {
			w.mu.lost = true
			w.lg.Error("nothing is served any more", zap.Error(err))
		}
		return
	}
	if now := time.Now(); now.Sub(w.mu.logged) >= 10*time.Second {
		w.mu.logged = now
		w.lg.Error("the storage failed; writes are refused until it works again", zap.Error(err))
	}
}

func (w *storageWatch) healed() {
	w.metrics.StorageHealed()
	if api := w.api.Load(); api != nil {
		api.StorageHealed()
	}
	w.mu.Lock()
	w.mu.logged = time.Time{}
	w.mu.Unlock()
	w.lg.Info("the storage works again")
}
