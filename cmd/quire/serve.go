package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"github.com/quire-db/quire/backend"
	"github.com/quire-db/quire/etcdapi"
	"github.com/quire-db/quire/watchpoller"
)

// stopGrace is how long requests may take to finish after the order to stop. etcd's tests want a member gone within
// 1.5 s, closing the database included.
const stopGrace = time.Second

// serve opens everything in order, serves until ctx is done or something breaks, and closes in reverse order.
func serve(ctx context.Context, c *config, lg *zap.Logger, env []string) (err error) {
	started := time.Now()
	c.logNotes(lg)
	id := newIdentity(c.Name, c.InitialCluster, c.InitialClusterToken, c.AdvertisePeerURLs)
	limit := tuneGC(env)
	if lookupEnv(env, "GOGC") == "" {
		defer paceGC()()
	}
	logStart(lg, c, id, limit)
	if err := checkDataDir(c); err != nil {
		return err
	}

	// Certificates and addresses are checked before the database is opened: mistakes in flags show at once, not
	// after an index of millions of keys was read.
	if c.AutoTLS {
		if c.TLS.empty() {
			urls := slices.Concat(c.ListenClientURLs, c.ListenClientHTTPURLs)
			c.TLS.CertFile, c.TLS.KeyFile, err = selfCert(lg, filepath.Join(c.DataDir, "fixtures", "client"), urls, c.SelfSignedCertValidity)
			if err != nil {
				return err
			}
		} else {
			lg.Warn("ignoring client auto TLS since certs given")
		}
	}
	var store *tlsStore
	if !c.TLS.empty() {
		if store, err = newTLSStore(c.TLS, lg); err != nil {
			return err
		}
		lg.Info("starting with client TLS", zap.String("tls-info", c.TLS.String()), zap.Strings("cipher-suites", c.TLS.CipherSuites))
	}
	endpoints, err := endpointsOf(c, store != nil, lg)
	if err != nil {
		return err
	}

	// The database. Last to close: whoever comes later may still be writing to it.
	metrics := etcdapi.NewMetrics(etcdapi.MetricsOptions{Extensive: c.Metrics == "extensive"})
	watch := &storageWatch{lg: lg, metrics: metrics}
	db, err := openStorage(ctx, c, id, watch)
	if err != nil {
		return fmt.Errorf("cannot open %s: %w", c.StoragePath, err) // the backend says what to do
	}
	if shared := db.ClusterID(); shared != 0 {
		// All processes are one member, with several doors.
		id = identity{MemberID: shared, ClusterID: clusterID([]uint64{shared})}
		lg.Info("one of several processes", zap.String("cluster-id", fmt.Sprintf("%x", id.ClusterID)), zap.String("local-member-id", fmt.Sprintf("%x", id.MemberID)))
	}
	defer func() {
		if cerr := db.Close(); cerr != nil {
			err = errors.Join(err, fmt.Errorf("closing %s: %w", c.StoragePath, cerr))
			return
		}
		lg.Info("closed the database", zap.String("storage", c.StoragePath))
	}()
	stats := db.Stats()
	lg.Info("opened the database", zap.String("storage", c.StoragePath), zap.Int64("revision", stats.Revision),
		zap.Int64("compact-revision", stats.CompactRevision), zap.Int64("keys", stats.Keys), zap.Int("leases", stats.Leases),
		zap.Int64("size-bytes", stats.DBSize), zap.Duration("took", time.Since(started)))

	// The poller reads committed rows, so it lives shorter than the database; the API's watch streams end before it.
	poller := watchpoller.Start(db, watchpoller.Options{
		Header: func() *pb.ResponseHeader {
			return &pb.ResponseHeader{ClusterId: id.ClusterID, MemberId: id.MemberID, RaftTerm: raftTerm}
		},
		ProgressInterval: c.WatchProgressNotifyInterval,
		MaxResponseBytes: int(min(c.MaxRequestBytes, 1<<30)) + 512<<10, // etcd: maxRequestBytes + grpcOverheadBytes
		Hooks: watchpoller.Hooks{
			Streams:       metrics.WatchStreams,
			Watchers:      metrics.Watchers,
			SlowWatchers:  metrics.SlowWatchers,
			PendingEvents: metrics.PendingEvents,
			EventsSent:    metrics.EventsSent,
			ReadFailed: func(err error) {
				lg.Warn("cannot read history for watchers; trying again", zap.Error(err))
			},
		},
	})
	defer poller.Close()

	api := etcdapi.New(etcdapi.Options{
		Backend: db,
		View:    func() etcdapi.View { return db.View() },
		Watcher: poller,
		Identity: etcdapi.Identity{
			ClusterID: id.ClusterID, MemberID: id.MemberID, RaftTerm: func() uint64 { return raftTerm },
			Name: c.Name, PeerURLs: c.AdvertisePeerURLs.Strings(), ClientURLs: c.AdvertiseClientURLs.Strings(),
		},
		ClientURLs:           db.ClientURLs,
		Metrics:              metrics,
		EtcdVersion:          c.EtcdVersion,
		MaxRequestBytes:      c.MaxRequestBytes,
		MaxTxnOps:            c.MaxTxnOps,
		MaxConcurrentStreams: c.MaxConcurrentStreams,
		SlowRequestAfter:     c.WarningUnaryRequestDuration,
		Keepalive: etcdapi.Keepalive{
			MinTime: c.GRPCKeepAliveMinTime, Interval: c.GRPCKeepAliveInterval, Timeout: c.GRPCKeepAliveTimeout,
		},
		Hooks: etcdapi.Hooks{SlowRequest: func(method string, took time.Duration, request string) {
			// etcd's message; its tests and dashboards look for it.
			lg.Warn("request stats", zap.String("method", method), zap.Duration("time spent", took), zap.String("request content", request))
		}},
	})
	defer api.Close()
	watch.api.Store(api)
	server := grpc.NewServer(append(api.ServerOptions(), grpc.Creds(doorCredentials{}))...)
	api.RegisterGRPC(server)

	// Only now the ports: whoever can connect is answered.
	if err := open(ctx, endpoints, c); err != nil {
		return err
	}
	profiles := c.EnablePprof || c.LogLevel == "debug"
	if profiles {
		lg.Info("pprof is enabled", zap.String("path", "/debug/pprof"))
	}
	handler := api.HTTPHandler()
	cl := serveClients(lg, clientOptions{
		Endpoints: endpoints, TLS: store, GRPC: server, Handler: clientHandler(handler, profiles), Metrics: metricsHandler(handler),
		MaxConcurrentStreams: c.MaxConcurrentStreams,
	})

	// Compaction writes like a client does, so it stops with the clients.
	keep, err := parseRetention(c.AutoCompactionMode, c.AutoCompactionRetention)
	if err != nil {
		return err // checked in config.finish; not reached
	}
	compacting, stopCompacting := context.WithCancel(context.Background())
	var background sync.WaitGroup
	background.Go(func() { compactorOf(lg, db).run(compacting, keep) })

	lg.Info("now serving client/metrics", zap.String("local-member-id", fmt.Sprintf("%x", id.MemberID)),
		zap.Strings("advertise-client-urls", c.AdvertiseClientURLs.Strings()),
		zap.Strings("listen-client-urls", c.ListenClientURLs.Strings()),
		zap.Strings("listen-client-http-urls", c.ListenClientHTTPURLs.Strings()),
		zap.Strings("listen-metrics-urls", c.ListenMetricsURLs.Strings()),
		zap.String("storage", c.StoragePath), zap.Duration("took", time.Since(started)))
	tellSystemd(lg, env, "READY=1")
	background.Go(debug.FreeOSMemory) // building the index needed more than keeping it

	select {
	case <-ctx.Done():
	case err = <-cl.failed:
		err = fmt.Errorf("listener failed: %w", err)
	}
	tellSystemd(lg, env, "STOPPING=1")
	lg.Info("closing etcd server", zap.String("name", c.Name), zap.String("data-dir", c.DataDir))
	// Health first, so that load balancers turn away. It also ends the watch and keepalive streams, which would
	// otherwise never finish, with an error that tells clients to go elsewhere.
	api.Close()
	cl.stopAccepting()
	stopCompacting()
	cl.close(stopGrace)
	background.Wait()
	return err // and the defers: poller, then database
}

// checkDataDir refuses the data directory of a real etcd: starting empty beside its data would look to a client as
// if everything had been deleted.
func checkDataDir(c *config) error {
	if _, err := os.Stat(filepath.Join(c.DataDir, "member")); err != nil || c.Storage != "" {
		return nil
	}
	if _, err := os.Stat(c.StoragePath); err == nil {
		return nil
	}
	return fmt.Errorf("--data-dir %s holds the data of an etcd (member/), which quire does not read; use another --data-dir, or name the database with --storage", c.DataDir)
}

// openStorage opens the database and tells every few seconds how far it is.
func openStorage(ctx context.Context, c *config, id identity, watch *storageWatch) (*backend.DB, error) {
	var last atomic.Int64
	begin := time.Now()
	options := backend.Options{
		QuotaBytes:      c.QuotaBackendBytes,
		ValueCacheBytes: c.ValueCacheBytes,
		MemberID:        id.MemberID,
		Hooks: backend.Hooks{
			LoadProgress: func(done, total int64) {
				const every = 3 * time.Second
				now := int64(time.Since(begin))
				if before := last.Load(); now-before >= int64(every) && last.CompareAndSwap(before, now) {
					watch.lg.Info("loading the index", zap.Int64("rows", done), zap.Int64("of", total))
				}
			},
			BatchCommitted: watch.metrics.BatchCommitted,
			CompactionDone: func(rev, rows int64, took time.Duration) {
				watch.metrics.CompactionDone(rev, rows, took)
				// etcd's message.
				watch.lg.Info("finished scheduled compaction", zap.Int64("compact-revision", rev), zap.Int64("rows", rows), zap.Duration("took", took))
			},
			LeaseExpired: watch.metrics.LeaseExpired,
			Alarm: func(a *pb.AlarmMember, raised bool) {
				watch.metrics.Alarm(a, raised)
				watch.lg.Warn("alarm", zap.String("alarm", a.Alarm.String()), zap.String("member-id", fmt.Sprintf("%x", a.MemberID)), zap.Bool("raised", raised))
			},
			StorageError:  watch.failed,
			StorageHealed: watch.healed,
		},
	}
	if c.Postgres.URL != "" {
		return backend.OpenPostgres(ctx, c.Postgres, options)
	}
	return backend.OpenSQLite(ctx, c.StoragePath, options)
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

// logStart is etcd's start-up line with etcd's names, as far as they mean something here, and where the data lies.
func logStart(lg *zap.Logger, c *config, id identity, memoryLimit int64) {
	quire, sha := buildVersion()
	if c.ConfigFile != "" {
		lg.Info("loaded server configuration, other configuration command line flags and environment variables will be ignored if provided",
			zap.String("path", c.ConfigFile))
	}
	lg.Info("starting an etcd server",
		zap.String("etcd-version", c.EtcdVersion),
		zap.String("quire-version", quire),
		zap.String("git-sha", sha),
		zap.String("go-version", runtime.Version()),
		zap.String("go-os", runtime.GOOS),
		zap.String("go-arch", runtime.GOARCH),
		zap.Int("max-cpu-set", runtime.GOMAXPROCS(0)),
		zap.Int64("memory-limit-bytes", memoryLimit),
		zap.String("name", c.Name),
		zap.String("data-dir", c.DataDir),
		zap.String("storage", c.StoragePath),
		zap.String("cluster-id", fmt.Sprintf("%x", id.ClusterID)),
		zap.String("local-member-id", fmt.Sprintf("%x", id.MemberID)),
		zap.Uint64("snapshot-catchup-entries", c.SnapshotCatchUpEntries),
		zap.Strings("initial-advertise-peer-urls", c.AdvertisePeerURLs.Strings()),
		zap.Strings("advertise-client-urls", c.AdvertiseClientURLs.Strings()),
		zap.Strings("listen-client-urls", c.ListenClientURLs.Strings()),
		zap.Strings("listen-metrics-urls", c.ListenMetricsURLs.Strings()),
		zap.String("initial-cluster", c.InitialCluster),
		zap.String("initial-cluster-token", c.InitialClusterToken),
		zap.Int64("quota-backend-bytes", c.QuotaBackendBytes),
		zap.Uint("max-request-bytes", c.MaxRequestBytes),
		zap.Uint32("max-concurrent-streams", c.MaxConcurrentStreams),
		zap.String("auto-compaction-mode", c.AutoCompactionMode),
		zap.String("auto-compaction-retention", c.AutoCompactionRetention),
	)
}

// tellSystemd: a service manager that cannot be told is no reason not to serve.
func tellSystemd(lg *zap.Logger, env []string, state string) {
	if err := notifySystemd(env, state); err != nil {
		lg.Warn("failed to notify systemd", zap.String("state", state), zap.Error(err))
	}
}
