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
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"github.com/quire-db/quire/etcdapi"
	"github.com/quire-db/quire/sqlraft"
	"github.com/quire-db/quire/watchpoller"
)

// stopGrace is how long requests may take to finish after the order to stop. etcd's tests want a member gone within
// 1.5 s, closing the database included.
const stopGrace = time.Second

// serve opens everything in order, serves until ctx is done or something breaks, and closes in reverse order.
func serve(ctx context.Context, c *config, lg *zap.Logger, env []string) (err error) {
	started := time.Now()
	c.logNotes(lg)
	limit := tuneGC(env)
	if lookupEnv(env, "GOGC") == "" {
		defer paceGC()()
	}
	logStart(lg, c, limit)
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
	var certs *tlsStore // nil: no TLS
	if !c.TLS.empty() {
		if certs, err = newTLSStore(c.TLS, lg); err != nil {
			return err
		}
		lg.Info("starting with client TLS", zap.String("tls-info", c.TLS.String()), zap.Strings("cipher-suites", c.TLS.CipherSuites))
	}
	endpoints, err := endpointsOf(c, certs != nil, lg)
	if err != nil {
		return err
	}

	tokens, err := authTokens(c, lg)
	if err != nil {
		return lastWords(err, lg)
	}

	// The database, and this member's part in its cluster. Last to close: whoever comes later may still be writing to it.
	metrics := etcdapi.NewMetrics(etcdapi.MetricsOptions{
		Extensive: c.Metrics == "extensive", SlowApplyAfter: max(c.WarningApplyDuration, 1), SlowApply: slowApply(lg, c.WarningApplyDuration),
	})
	c.gates.tell(metrics.Feature)
	watch := &storageWatch{lg: lg, metrics: metrics}
	st, err := openStore(ctx, c, watch)
	if err != nil {
		return lastWords(err, lg)
	}
	defer func() {
		if cerr := st.close(); cerr != nil {
			err = errors.Join(err, fmt.Errorf("closing %s: %w", c.StoragePath, cerr))
			return
		}
		lg.Info("closed the database", zap.String("storage", c.StoragePath))
		lg.Info("closed etcd server", zap.String("name", c.Name), zap.String("data-dir", c.DataDir)) // etcd's last word
	}()
	db := st.db
	stats := db.Stats()
	lg.Info("opened the database", zap.String("storage", c.StoragePath), zap.Int64("revision", stats.Revision),
		zap.Int64("compact-revision", stats.CompactRevision), zap.Int64("keys", stats.Keys), zap.Int("leases", stats.Leases),
		zap.Int64("size-bytes", stats.DBSize), zap.Duration("took", time.Since(started)))

	// The poller reads committed rows, so it lives shorter than the database; the API's watch streams end before it.
	var api *etcdapi.Server
	poller := watchpoller.Start(db, watchpoller.Options{
		Permit:           func(ctx context.Context, req *pb.WatchCreateRequest) string { return api.PermitWatch(ctx, req) },
		Header:           st.header,
		ProgressInterval: c.WatchProgressNotifyInterval,
		MaxResponseBytes: int(min(c.MaxRequestBytes, 1<<30)) + 512<<10, // etcd: maxRequestBytes + grpcOverheadBytes
		Hooks: watchpoller.Hooks{
			Streams:       metrics.WatchStreams,
			Watchers:      metrics.Watchers,
			SlowWatchers:  metrics.SlowWatchers,
			PendingEvents: metrics.PendingEvents,
			EventsSent:    metrics.EventsSent,
			Sent: func(events int, kind watchpoller.SentKind, took time.Duration) {
				switch kind {
				case watchpoller.SentEvents:
					metrics.WatchEventsSent(events, took)
				case watchpoller.SentProgress:
					metrics.WatchProgressSent(took)
				case watchpoller.SentControl:
					metrics.WatchControlSent(took)
				}
			},
			ReadFailed: func(err error) {
				lg.Warn("cannot read history for watchers; trying again", zap.Error(err))
			},
		},
	})
	defer poller.Close()

	var spans *tracing // nil: none
	if c.Tracing.Enabled {
		if spans, err = startTracing(ctx, &c.Tracing, lg); err != nil {
			return err
		}
		defer func() {
			if err := spans.stop(); err != nil {
				lg.Warn("distributed tracing", zap.Error(err))
			}
		}()
	}
	api = etcdapi.New(etcdapi.Options{
		Backend:         db,
		View:            func() etcdapi.View { return db.View() },
		Watcher:         poller,
		Cluster:         st.cluster(),
		ElectionTimeout: c.Cluster.electionTimeout(),
		Identity: etcdapi.Identity{
			MemberID: st.memberID, ClusterID: st.clusterID,
			Name: c.Name, PeerURLs: c.AdvertisePeerURLs.Strings(), ClientURLs: c.AdvertiseClientURLs.Strings(),
		},
		ClientURLs:           db.ClientURLs,
		Metrics:              metrics,
		Tracer:               spans.tracer(),
		TraceRequests:        c.LogLevel == "debug",
		EtcdVersion:          c.EtcdVersion,
		MaxRequestBytes:      c.MaxRequestBytes,
		MaxTxnOps:            c.MaxTxnOps,
		MaxConcurrentStreams: c.MaxConcurrentStreams,
		SlowRequestAfter:     c.WarningUnaryRequestDuration,
		Tokens:               tokens,
		BcryptCost:           bcryptCost(c, lg),
		ClientCertAuth:       c.TLS.ClientCertAuth,
		Keepalive: etcdapi.Keepalive{
			MinTime: c.GRPCKeepAliveMinTime, Interval: c.GRPCKeepAliveInterval, Timeout: c.GRPCKeepAliveTimeout,
		},
		Hooks: etcdapi.Hooks{SlowRequest: slowRequest(lg), SnapshotSent: logSnapshot(lg), Defragment: logDefragment(lg), AuthFailed: logAuthFailed(lg)},
	})
	defer api.Close()
	watch.api.Store(api)
	options := append(api.ServerOptions(), grpc.Creds(doorCredentials{}))
	server := grpc.NewServer(append(options, spans.serverOptions()...)...)
	api.RegisterGRPC(server)

	pages := debugPages{Profiles: c.EnablePprof || c.LogLevel == "debug", Requests: c.LogLevel == "debug", Raft: st.raft}
	if pages.Profiles {
		lg.Info("pprof is enabled", zap.String("path", "/debug/pprof"))
	}
	handler := api.HTTPHandler()
	var gate *gateway
	if c.EnableGateway {
		if gate, err = newGateway(lg); err != nil {
			return err
		}
	}
	access := etcdapi.Access{Origins: c.CORS, Hosts: c.HostWhitelist, Rejected: func(host string) {
		lg.Warn("rejecting HTTP request to prevent DNS rebinding attacks", zap.String("host", host))
	}}
	if c.TLS.ClientCertAuth && c.EnableGateway {
		access.NamedByCertificate = func() bool { return db.Auth().Enabled() }
	}
	cl := newClients(lg, clientOptions{
		TLS: certs, GRPC: server, Handler: access.Handler(clientHandler(handler, gate, pages)), Metrics: metricsHandler(handler), Gateway: gate,
		MaxConcurrentStreams: c.MaxConcurrentStreams,
	})
	// Only now the ports: whoever can connect is answered. Probes at once, as in etcd, so that nobody restarts a member
	// that waits for its cluster; clients once it is one, because they would wait along with it instead of going elsewhere.
	isProbe := func(e *endpoint) bool { return e.metrics }
	isDoor := func(e *endpoint) bool { return !e.metrics }
	err = begin(ctx, c, cl, slices.DeleteFunc(slices.Clone(endpoints), isDoor))
	if err == nil {
		err = st.ready(ctx)
	}
	if err == nil {
		err = begin(ctx, c, cl, slices.DeleteFunc(endpoints, isProbe))
	}

	// What works in the background reads and writes like a client does, so it stops with the clients.
	working, stopWorking := context.WithCancel(context.Background())
	defer stopWorking()
	var background sync.WaitGroup
	if err == nil {
		keep, kerr := parseRetention(c.AutoCompactionMode, c.AutoCompactionRetention)
		if kerr != nil {
			panic(fmt.Sprintf("checked in config.finish: %v", kerr))
		}
		background.Go(func() { compactorOf(lg, db, st.leads).run(working, keep) })
		background.Go(func() { defragmentAtStart(working, lg, db, c.BootstrapDefragMegabytes) })

		lg.Info("now serving peer/client/metrics", zap.String("local-member-id", fmt.Sprintf("%x", st.memberID)),
			zap.Strings("initial-advertise-peer-urls", c.AdvertisePeerURLs.Strings()),
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
		case err = <-st.failed():
		}
	}
	tellSystemd(lg, env, "STOPPING=1")
	lg.Info("closing etcd server", zap.String("name", c.Name), zap.String("data-dir", c.DataDir))
	// Health first, so that load balancers turn away. It also ends the watch and keepalive streams, which would
	// otherwise never finish, with an error that tells clients to go elsewhere.
	api.Close()
	cl.stopAccepting()
	stopWorking()
	cl.close(stopGrace)
	background.Wait()
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		err = nil // it was told to stop before it was ready
	}
	return lastWords(err, lg) // and the defers: poller, then leadership, then database
}

// lastWords are etcd's where this member cannot go on. One that was removed has done its duty: no error, as in etcd.
func lastWords(err error, lg *zap.Logger) error {
	if !errors.Is(err, sqlraft.ErrRemoved) {
		return err
	}
	lg.Warn("server error", zap.Error(err))
	lg.Warn("data-dir used by this member must be removed")
	return nil
}

// begin opens endpoints and serves them.
func begin(ctx context.Context, c *config, cl *clients, endpoints []*endpoint) error {
	if err := open(ctx, endpoints, c); err != nil {
		return err
	}
	cl.serve(endpoints)
	return nil
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

// logStart is etcd's start-up line with etcd's names, as far as they mean something here, and where the data lies.
func logStart(lg *zap.Logger, c *config, memoryLimit int64) {
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
		zap.Stringer("storage-kind", c.Kind),
		zap.Bool("force-new-cluster", c.Cluster.ForceNew),
		zap.Duration("heartbeat-interval", c.Cluster.heartbeat()),
		zap.Duration("election-timeout", c.Cluster.electionTimeout()),
		zap.Bool("initial-election-tick-advance", c.Cluster.ElectionTickAdvance),
		zap.Uint64("snapshot-count", c.Cluster.SnapshotCount),
		zap.Uint64("snapshot-catchup-entries", c.Cluster.CatchUpEntries),
		zap.Strings("initial-advertise-peer-urls", c.AdvertisePeerURLs.Strings()),
		zap.Strings("listen-peer-urls", c.Cluster.ListenPeerURLs.Strings()),
		zap.Strings("advertise-client-urls", c.AdvertiseClientURLs.Strings()),
		zap.Strings("listen-client-urls", c.ListenClientURLs.Strings()),
		zap.Strings("listen-metrics-urls", c.ListenMetricsURLs.Strings()),
		zap.String("initial-cluster", c.InitialCluster),
		zap.String("initial-cluster-state", c.Cluster.State),
		zap.String("initial-cluster-token", c.InitialClusterToken),
		zap.Bool("pre-vote", c.Cluster.PreVote),
		zap.Bool("strict-reconfig-check", c.Cluster.StrictReconfigCheck),
		zap.Int("max-learners", c.Cluster.MaxLearners),
		zap.Duration("corrupt-check-time-interval", c.Cluster.CorruptCheckTime),
		zap.Int64("quota-backend-bytes", c.QuotaBackendBytes),
		zap.Uint("max-request-bytes", c.MaxRequestBytes),
		zap.Uint32("max-concurrent-streams", c.MaxConcurrentStreams),
		zap.String("auto-compaction-mode", c.AutoCompactionMode),
		zap.String("auto-compaction-retention", c.AutoCompactionRetention),
		zap.String("v2-deprecation", v2Deprecation),
	)
}

// tellSystemd: a service manager that cannot be told is no reason not to serve.
func tellSystemd(lg *zap.Logger, env []string, state string) {
	if err := notifySystemd(env, state); err != nil {
		lg.Warn("failed to notify systemd", zap.String("state", state), zap.Error(err))
	}
}

// slowApply logs etcd's message about what took long to read or to apply.
func slowApply(lg *zap.Logger, expected time.Duration) func(etcdapi.SlowApply) {
	return func(s etcdapi.SlowApply) {
		lg.Warn("apply request took too long", zap.Duration("took", s.Took), zap.Duration("expected-duration", expected),
			zap.String("prefix", s.Prefix), zap.String("request", s.Request), zap.String("response", s.Response), zap.Error(s.Err))
	}
}

// slowRequest logs etcd's message, with its fields; its tests and dashboards look for it.
func slowRequest(lg *zap.Logger) func(etcdapi.SlowRequest) {
	return func(r etcdapi.SlowRequest) {
		lg.Warn("request stats", zap.Time("start time", r.Start), zap.Duration("time spent", r.Took), zap.String("remote", r.Remote),
			zap.String("response type", r.Method), zap.Int("request count", r.RequestCount), zap.Int("request size", r.RequestSize),
			zap.Int("response count", r.ResponseCount), zap.Int("response size", r.ResponseSize), zap.String("request content", r.Content),
			zap.Error(r.Err))
	}
}
