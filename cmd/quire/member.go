package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/quire-db/quire/backend"
	"github.com/quire-db/quire/etcdapi"
	"github.com/quire-db/quire/sqlraft"
)

// stopTimeout bounds how long a member that ends waits for what it is applying. Handing over its leadership, which comes
// first, gives up much earlier by itself.
const stopTimeout = 10 * time.Second

// member is this process's part in a cluster, as the API sees it.
type member struct {
	*sqlraft.Node
	lg        *zap.Logger
	db        *backend.DB
	clusterID uint64        // as the flags, or another member, had it
	published chan struct{} // closed once the others know name and client URLs of this member
	check     bool          // the data with that of the others before clients come: the feature gate InitialCorruptCheck
}

var _ etcdapi.Cluster = (*member)(nil)

// Status is the node's, and the id of the cluster.
func (m *member) Status() etcdapi.ClusterStatus {
	st := m.Node.Status()
	return etcdapi.ClusterStatus{
		ClusterID: m.cluster(), ID: st.ID, Leader: st.Leader, Term: st.Term, Committed: st.Committed, Applied: st.Applied, Learner: st.Learner,
	}
}

// cluster is the id that the data has, or until there is any what was heard of it.
func (m *member) cluster() uint64 {
	if id := m.db.Members().ClusterID; id != 0 {
		return id
	}
	return m.clusterID
}

// openMember opens the peer port, finds out who this member is, opens the database and takes it into the cluster. In this
// order: mistakes in flags show before the index is read, and the others can already connect.
func openMember(ctx context.Context, c *config, watch *storageWatch) (_ *store, err error) {
	lg := watch.lg
	begin, err := c.beginning(ctx, lg)
	if err != nil {
		return nil, fmt.Errorf("error setting up initial cluster: %w", err)
	}
	listeners, err := listenPeers(ctx, c, c.Cluster.ListenPeerURLs, begin.tls, lg)
	if err != nil {
		return nil, err
	}
	dbo, broken := watch.options(c, begin.ID), make(chan error, 1)
	dbo.Hooks.Failed = func(err error) { broken <- err } // it is called once
	db, err := backend.OpenReplica(ctx, c.StoragePath, dbo)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cannot open %s: %w", c.StoragePath, err), closeAll(listeners))
	}
	tellPeers(watch.metrics, begin.ID, db.Members())
	m := &member{lg: lg, db: db, clusterID: begin.Membership.ClusterID, published: make(chan struct{})}
	lg.Info("starting local member", zap.String("local-member-id", fmt.Sprintf("%x", begin.ID)), zap.String("cluster-id", fmt.Sprintf("%x", m.cluster())))
	f := &c.Cluster
	m.check = begin.initialized && f.InitialCorruptCheck
	o := sqlraft.Options{
		Dir:         c.raftDir(),
		InstallPath: db.InstallPath(),

		ID: begin.ID, Name: c.Name, ClientURLs: c.AdvertiseClientURLs.Strings(),
		Membership: begin.Membership, Joining: begin.Joining, Lost: begin.Lost, ForceNewCluster: f.ForceNew,

		Tick: f.heartbeat(), ElectionTicks: f.electionTicks(), InitialElectionTickAdvance: f.ElectionTickAdvance, PreVote: f.PreVote,
		CatchUpEntries: int(min(f.CatchUpEntries, 1<<30)), SnapshotEntries: f.SnapshotCount,
		ReadTimeout: max(f.ReadTimeout, 5*time.Second), // etcd allows no less (server/v3/etcdmain: parse)
		MaxLearners: f.MaxLearners, StrictReconfigCheck: f.StrictReconfigCheck,

		Listeners: listeners, ClientTLS: begin.tls.client, LocalAddr: begin.localAddr,
		Server:  func(h http.Handler) *http.Server { return &http.Server{Handler: h, ErrorLog: stdLogger(lg)} },
		Version: func() []byte { return etcdapi.Versions(c.EtcdVersion) },
		Compare: compareOptions(f, db), Broken: broken,
		Hooks: m.hooks(watch.metrics, begin.ID, c),
	}
	if m.Node, err = sqlraft.Open(o, db); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	db.Join(m.Node)
	return &store{db: db, member: m, memberID: begin.ID}, nil
}

func closeAll(listeners []net.Listener) error {
	var errs []error
	for _, l := range listeners {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// beginning is what a member starts with. A member that is initialized knows the rest from its data.
type beginning struct {
	sqlraft.Bootstrapped
	initialized bool
	tls         *tlsStore
	localAddr   net.IP // that connections to other members come from; nil: the system's choice
}

// beginning finds out who this member is: from its log, and where there is none from the flags, DNS, and the members of the
// cluster that it is to join.
func (c *config) beginning(ctx context.Context, lg *zap.Logger) (*beginning, error) {
	f := &c.Cluster
	b := &beginning{}
	if f.SetMemberLocalAddr {
		b.localAddr = localAddress(c.AdvertisePeerURLs)
	}
	id, err := sqlraft.Initialized(c.raftDir())
	if err != nil {
		return nil, err
	}
	if id != 0 {
		lg.Info("server has already been initialized", zap.String("data-dir", c.DataDir), zap.Strings("ignored-flags", f.given))
		b.ID, b.initialized = id, true
		b.tls, err = f.TLS.settle(c, f.ListenPeerURLs, lg)
		return b, err
	}
	if c.MustBeMember {
		return nil, fmt.Errorf("%s is not the log of a member that has been started: its first start did not come to an end; give the flags of that again, --initial-cluster and so on", c.raftDir())
	}
	initial, token := c.InitialCluster, c.InitialClusterToken
	if f.DiscoverySRV != "" {
		found, err := sqlraft.Discover(ctx, nil, f.DiscoverySRV, f.SRVName, c.Name, c.AdvertisePeerURLs.Strings())
		if err != nil {
			return nil, err
		}
		if found.Skipped != nil {
			lg.Warn("SRV records were skipped", zap.String("discovery-srv", f.DiscoverySRV), zap.Error(found.Skipped))
		}
		if initial = found.InitialCluster; found.Secure && f.TLS.Files.TrustedCAFile == "" {
			f.TLS.Files.ServerName = f.DiscoverySRV
		}
		lg.Info("got bootstrap from DNS for etcd-server", zap.String("initial-cluster", initial))
	}
	if len(f.Discovery.Endpoints) > 0 && f.State == stateNew {
		if initial, err = c.discover(ctx, lg); err != nil {
			return nil, err
		}
		token = f.Discovery.Token
	}
	if b.tls, err = f.TLS.settle(c, f.ListenPeerURLs, lg); err != nil {
		return nil, err
	}
	found, err := sqlraft.Bootstrap(ctx, sqlraft.BootstrapOptions{
		Name: c.Name, InitialCluster: initial, Existing: f.State == stateExisting, Token: token,
		PeerURLs: c.AdvertisePeerURLs.Strings(), MaxLearners: f.MaxLearners,
		ClientTLS: b.tls.client, LocalAddr: b.localAddr,
		Unreached: func(peerURL string, err error) {
			lg.Warn("failed to get cluster response", zap.String("address", peerURL), zap.Error(err))
		},
	})
	if err != nil {
		return nil, err
	}
	b.Bootstrapped = *found
	return b, nil
}

// ready returns once clients may come: the cluster has a leader, and knows this member, and if that is to be checked, they
// have the same data. As in etcd, that may take as long as there is no quorum. An error is why it will not come to that; that
// of ctx, when the order to stop came first.
func (m *member) ready(ctx context.Context) error {
	published := m.published
	for {
		changed := m.LeaderChanged()
		if published == nil && m.Status().Leader != 0 {
			return m.compareInitially(ctx)
		}
		select {
		case <-published:
			published = nil
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		case err := <-m.Failed():
			return err
		}
	}
}

// stop hands over the leadership and ends.
func (m *member) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	return m.Node.Stop(ctx)
}

// hooks tell the log, in etcd's words where etcd has them, and the metrics.
func (m *member) hooks(metrics *etcdapi.Metrics, id uint64, c *config) sqlraft.Hooks {
	lg := m.lg
	local := zap.String("local-member-id", fmt.Sprintf("%x", id))
	remote := func(id uint64) zap.Field { return zap.String("remote-peer-id", fmt.Sprintf("%x", id)) }
	var leader uint64      // as last heard of; LeaderChanged is called by one goroutine
	var fetching time.Time // when it was last told how far a copy has come; one is fetched at a time
	h := sqlraft.Hooks{
		Raft: func(message string) { lg.Warn("raft", zap.String("message", message)) },
		LeaderChanged: func(st sqlraft.Status) {
			before := leader
			switch leader = st.Leader; {
			case leader == before:
			case leader == 0:
				lg.Info("lost leader", local, zap.String("leader", fmt.Sprintf("%x", before)), zap.Uint64("term", st.Term))
			default:
				lg.Info("elected leader", local, zap.String("leader", fmt.Sprintf("%x", leader)), zap.Uint64("term", st.Term))
			}
		},
		MembersChanged: func(now backend.Membership) {
			members := make([]string, len(now.Members))
			for i, o := range now.Members {
				members[i] = fmt.Sprintf("%x name=%s peerURLs=%s isLearner=%v", o.ID, o.Name, strings.Join(o.PeerURLs, ","), o.Learner)
			}
			tellPeers(metrics, id, now)
			lg.Info("membership changed", local, zap.String("cluster-id", fmt.Sprintf("%x", now.ClusterID)), zap.Strings("members", members))
		},
		Published: func(err error) {
			if err != nil {
				lg.Warn("failed to publish local member to cluster through raft", local, zap.Error(err))
				return
			}
			lg.Info("published local member to cluster through raft", local, zap.Strings("client-urls", c.AdvertiseClientURLs.Strings()))
			close(m.published)
		},
		LogSynced:  metrics.LogSynced,
		LogWritten: metrics.LogWritten,

		SnapshotMade: func(index uint64, size int64, took time.Duration, err error) {
			if err != nil {
				lg.Warn("failed to make a snapshot for other members; trying again when they ask", zap.Error(err))
				return
			}
			metrics.SnapshotMade(took)
			lg.Info("made a snapshot for other members", zap.Uint64("index", index), zap.Int64("bytes", size), zap.Duration("took", took))
		},
		SnapshotFetching: func(from uint64, done, total int64) {
			if now := time.Now(); now.Sub(fetching) >= 10*time.Second {
				fetching = now
				lg.Info("fetching a snapshot", remote(from), zap.Int64("bytes", done), zap.Int64("of", total))
			}
		},
		SnapshotFetched: func(from, index uint64, err error) {
			metrics.SnapshotReceived(from, err)
			if err != nil {
				lg.Warn("failed to fetch a snapshot; trying again", remote(from), zap.Uint64("index", index), zap.Error(err))
				return
			}
			lg.Info("fetched a snapshot", remote(from), zap.Uint64("index", index))
		},
		SnapshotBegun:      metrics.SnapshotBegun,
		SnapshotInstalling: metrics.SnapshotInstalling,
		SnapshotServing:    metrics.SnapshotServing,
		SnapshotServed:     metrics.SnapshotServed,
		SnapshotInstalled: func(index uint64, took time.Duration) {
			lg.Info("installed a snapshot", zap.Uint64("index", index), zap.Duration("took", took))
		},

		Lost: func() {
			lg.Warn("this member has lost what it had acknowledged; it takes part in nothing until the others let it in again", local)
		},
		Readmitted: func(err error) {
			if err != nil {
				lg.Warn("not let in again yet; asking again", local, zap.Error(err))
				return
			}
			lg.Info("let in again", local)
		},

		PeerConnected: func(to uint64) {
			metrics.PeerActive(id, to, true)
			lg.Info("peer became active", remote(to))
		},
		PeerLost: func(to uint64, err error) {
			metrics.PeerActive(id, to, false)
			lg.Warn("peer became inactive (message send to peer failed)", remote(to), zap.Error(err))
		},
		PeerUnreached: func(to uint64, url string, err error) {
			lg.Warn("prober detected unhealthy status", remote(to), zap.String("peer-url", url), zap.Error(err))
		},
		PeerRejected: func(from string, id uint64, err error) {
			lg.Warn("rejected stream from remote peer", zap.String("remote-addr", from), remote(id), zap.Error(err))
		},
		PeerRefuses: func(to uint64, err error) {
			lg.Warn("a member does not let this one in", remote(to), zap.Error(err))
		},
		PeerDropped:   metrics.PeerDropped,
		PeerSent:      metrics.PeerSent,
		PeerReceived:  metrics.PeerReceived,
		PeerRoundTrip: metrics.PeerRoundTrip,
	}
	compareHooks(lg, &h)
	if c.LogLevel == "debug" {
		h.RaftInfo = func(message string) { lg.Debug("raft", zap.String("message", message)) }
	}
	return h
}

func tellPeers(metrics *etcdapi.Metrics, local uint64, known backend.Membership) {
	ids := make([]uint64, len(known.Members))
	for i := range known.Members {
		ids[i] = known.Members[i].ID
	}
	metrics.KnownPeers(local, ids)
}
