package main

import (
	"errors"
	"fmt"
	"io"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/quire-db/quire/backend"
	"github.com/quire-db/quire/etcdapi"
)

// etcd's defaults (server/v3/embed, the const block above Config), which are ours too.
const (
	defaultName                 = "default"
	defaultListenClientURLs     = "http://localhost:2379"
	defaultListenPeerURLs       = "http://localhost:2380"
	defaultInitialCluster       = "default=http://localhost:2380"
	defaultClusterToken         = "etcd-cluster"
	defaultEtcdVersion          = "3.7.3"
	defaultMaxRequestBytes      = 1536 * 1024
	defaultMaxTxnOps            = 128
	defaultMaxConcurrentStreams = 1<<32 - 1
)

// config is everything that the command line, the environment or the configuration file can say,
// checked once. Only flags that change what quire does have a field; the others are in etcdflags.go.
type config struct {
	Name    string
	DataDir string // never empty after load: "<name>.etcd" is etcd's default
	Storage string // as given; path in StoragePath
	// StoragePath is the database file, or the URL of the Postgres database without its password.
	StoragePath  string
	Kind         storageKind
	MustBeMember bool                    // only the data directory says that this is a member of a cluster
	Leave        bool                    // the data is that of a member of a cluster, and is to be a plain SQLite database again
	Postgres     backend.PostgresOptions // where Kind is storagePostgres

	ListenClientURLs     urlList
	ListenClientHTTPURLs urlList // not empty: HTTP is served only here, gRPC only on ListenClientURLs
	ListenMetricsURLs    urlList
	AdvertiseClientURLs  urlList
	AdvertisePeerURLs    urlList
	InitialCluster       string // without --initial-cluster: this member alone; empty with --discovery-srv
	InitialClusterToken  string
	Cluster              clusterFlags
	SocketReusePort      bool
	SocketReuseAddress   bool

	TLS                    tlsFiles
	AutoTLS                bool
	SelfSignedCertValidity uint // years

	AuthToken    string
	AuthTokenTTL uint // seconds
	BcryptCost   uint

	MaxRequestBytes             uint
	MaxTxnOps                   uint
	EnableGateway               bool
	CORS, HostWhitelist         []string
	MaxConcurrentStreams        uint32
	QuotaBackendBytes           int64
	ValueCacheBytes             int64
	AutoCompactionMode          string
	AutoCompactionRetention     string
	CompactionBatch             int
	CompactionPause             time.Duration
	WatchProgressNotifyInterval time.Duration // 0: etcd's ten minutes
	WarningUnaryRequestDuration time.Duration
	BootstrapDefragMegabytes    uint // 0: never at the start
	WarningApplyDuration        time.Duration
	GRPCKeepAliveMinTime        time.Duration
	GRPCKeepAliveInterval       time.Duration
	GRPCKeepAliveTimeout        time.Duration

	Logger      string
	LogLevel    string
	LogFormat   string
	LogOutputs  []string
	LogRotation logRotation
	Metrics     string
	EnablePprof bool
	Tracing     tracingFlags

	ConfigFile   string
	EtcdVersion  string
	PrintVersion bool

	gates featureGates

	// notes are warnings that were found before there was a logger.
	notes []note
}

// note is a warning about the configuration, logged once the logger stands.
type note struct {
	msg    string
	fields map[string]string
}

func (c *config) note(msg string, keysAndValues ...string) {
	n := note{msg: msg, fields: map[string]string{}}
	for i := 0; i+1 < len(keysAndValues); i += 2 {
		n.fields[keysAndValues[i]] = keysAndValues[i+1]
	}
	c.notes = append(c.notes, n)
}

// usageError is a command line that cannot be understood: exit status 2, as Go's flag package and
// therefore etcd answer it. Every other configuration error exits with 1.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// newFlagSet registers every flag of quire and of etcd 3.7, writing into c.
func newFlagSet(c *config) *pflag.FlagSet {
	fs := pflag.NewFlagSet("quire", pflag.ContinueOnError)
	fs.SetOutput(io.Discard) // errors are printed by main, in one place
	fs.SortFlags = false
	// Go's flag package, which etcd uses, stops at the first word that is not a flag; such a word is an error.
	fs.SetInterspersed(false)

	fs.StringVar(&c.Name, "name", defaultName, "Human-readable name for this member.")
	fs.StringVar(&c.DataDir, "data-dir", "", "Path to the data directory (default \"${name}.etcd\").")
	fs.StringVar(&c.Storage, "storage", "", "Where the data is kept: sqlite:///absolute/path (or sqlite://relative/path), sqlraft:///absolute/path for a member of a cluster, or postgres://user@host:5432/database (default \"${data-dir}/quire.db\": sqlraft with --initial-cluster, else sqlite).")
	fs.StringVar(&c.Postgres.Schema, "postgres-schema", "quire", "Schema of the Postgres database that holds the tables; all processes that name the same one serve the same data.")
	fs.StringVar(&c.Postgres.ListenURL, "postgres-listen-url", "", "How to reach the Postgres server itself, for notifications, where --storage names a pooler (empty: as --storage).")
	fs.IntVar(&c.Postgres.MaxConnections, "postgres-max-connections", 8, "Connections to Postgres that this process opens at most, 6 or more.")
	fs.DurationVar(&c.Postgres.PollInterval, "postgres-poll-interval", time.Second, "How often to look for what other processes wrote when no notification comes.")
	fs.Int64Var(&c.ValueCacheBytes, "value-cache-bytes", 0, "Memory for values kept resident, in bytes (0: quire chooses).")

	urls := func(p *urlList, name, value, usage string) {
		if err := p.Set(value); err != nil {
			panic(fmt.Sprintf("default of --%s is not valid: %v", name, err))
		}
		fs.Var(p, name, usage)
	}
	urls(&c.ListenClientURLs, "listen-client-urls", defaultListenClientURLs, "Comma-separated URLs to listen on for clients: http, https, unix or unixs.")
	urls(&c.ListenClientHTTPURLs, "listen-client-http-urls", "", "Comma-separated URLs to listen on for HTTP only; gRPC alone is then served on --listen-client-urls.")
	urls(&c.ListenMetricsURLs, "listen-metrics-urls", "", "Comma-separated URLs to listen on for metrics and health only.")
	urls(&c.AdvertiseClientURLs, "advertise-client-urls", defaultListenClientURLs, "Comma-separated client URLs that MemberList answers with.")
	urls(&c.AdvertisePeerURLs, "initial-advertise-peer-urls", defaultListenPeerURLs, "Comma-separated URLs at which other members reach this one; they determine the member id.")
	fs.StringVar(&c.InitialCluster, "initial-cluster", defaultInitialCluster, "Members of the cluster, this one among them, as name=peerURL, comma-separated.")
	fs.StringVar(&c.InitialClusterToken, "initial-cluster-token", defaultClusterToken, "Token of the cluster; it determines the cluster id.")
	fs.BoolVar(&c.SocketReusePort, "socket-reuse-port", false, "Set SO_REUSEPORT on listeners.")
	fs.BoolVar(&c.SocketReuseAddress, "socket-reuse-address", false, "Set SO_REUSEADDR on listeners.")

	fs.StringVar(&c.TLS.CertFile, "cert-file", "", "Path to the server's TLS certificate (PEM). Reloaded when it changes.")
	fs.StringVar(&c.TLS.KeyFile, "key-file", "", "Path to the server's TLS key (PEM). Reloaded when it changes.")
	fs.StringVar(&c.TLS.TrustedCAFile, "trusted-ca-file", "", "Path to the CA certificates (PEM) that client certificates must be signed by; requires client certificates.")
	fs.StringVar(&c.AuthToken, "auth-token", "simple", "Tokens of users: simple, or jwt,pub-key=FILE,priv-key=FILE,sign-method=RS256,ttl=5m.")
	fs.UintVar(&c.AuthTokenTTL, "auth-token-ttl", 300, "Seconds for which a simple token is good that is not used.")
	fs.UintVar(&c.BcryptCost, "bcrypt-cost", uint(etcdapi.DefaultBcryptCost), "How long the hash of a password takes: each step doubles it.")
	fs.BoolVar(&c.TLS.ClientCertAuth, "client-cert-auth", false, "Require client certificates.")
	fs.StringVar(&c.TLS.CRLFile, "client-crl-file", "", "Path to the revocation list (DER or PEM) for client certificates.")
	fs.Var((*commaList)(&c.TLS.AllowedHostnames), "client-cert-allowed-hostname", "Comma-separated host names, one of which a client certificate must bear.")
	fs.Var((*commaList)(&c.TLS.CipherSuites), "cipher-suites", "Comma-separated TLS cipher suites by their Go names (empty: Go's choice).")
	fs.StringVar(&c.TLS.MinVersion, "tls-min-version", "TLS1.2", "Minimum TLS version: TLS1.2 or TLS1.3.")
	fs.StringVar(&c.TLS.MaxVersion, "tls-max-version", "", "Maximum TLS version: TLS1.2 or TLS1.3 (empty: Go's choice).")
	fs.BoolVar(&c.AutoTLS, "auto-tls", false, "Serve https with a certificate that is generated in the data directory.")
	fs.UintVar(&c.SelfSignedCertValidity, "self-signed-cert-validity", 1, "Validity of generated certificates, in years.")

	fs.UintVar(&c.MaxRequestBytes, "max-request-bytes", defaultMaxRequestBytes, "Largest client request accepted, in bytes.")
	fs.BoolVar(&c.EnableGateway, "enable-grpc-gateway", true, "Serve the API as JSON over HTTP, below /v3/.")
	c.CORS, c.HostWhitelist = []string{"*"}, []string{"*"}
	fs.Var((*commaList)(&c.CORS), "cors", "Comma-separated origins whose web pages may use the HTTP endpoints (empty or *: all).")
	fs.Var((*commaList)(&c.HostWhitelist), "host-whitelist", "Comma-separated host names that HTTP requests without TLS may be for (empty or *: all).")
	fs.UintVar(&c.MaxTxnOps, "max-txn-ops", defaultMaxTxnOps, "Largest number of operations in a transaction.")
	fs.Uint32Var(&c.MaxConcurrentStreams, "max-concurrent-streams", defaultMaxConcurrentStreams, "Streams that one client connection may have open at a time.")
	fs.Int64Var(&c.QuotaBackendBytes, "quota-backend-bytes", 0, "Size at which the NOSPACE alarm is raised, in bytes (0: 2 GiB; negative: none).")
	fs.StringVar(&c.AutoCompactionMode, "auto-compaction-mode", modePeriodic, "What --auto-compaction-retention means: periodic (a duration) or revision (a number of revisions).")
	fs.StringVar(&c.AutoCompactionRetention, "auto-compaction-retention", "0", "History kept by automatic compaction: a duration such as 30m, hours when without unit, or revisions (0: off).")
	fs.IntVar(&c.CompactionBatch, "compaction-batch-limit", 0, "Rows that a compaction deletes at a time (0: quire chooses).")
	fs.DurationVar(&c.CompactionPause, "compaction-sleep-interval", 0, "How long a compaction waits between two of these, at least.")
	fs.DurationVar(&c.WatchProgressNotifyInterval, "watch-progress-notify-interval", 0, "How often idle watches with progress_notify are told the revision (0: 10m).")
	fs.DurationVar(&c.WarningUnaryRequestDuration, "warning-unary-request-duration", 300*time.Millisecond, "Unary requests slower than this are logged.")
	fs.UintVar(&c.BootstrapDefragMegabytes, "bootstrap-defrag-threshold-megabytes", 0, "Defragment after the start if that is likely to free as many megabytes (0: never).")
	fs.DurationVar(&c.WarningApplyDuration, "warning-apply-duration", 100*time.Millisecond, "Requests that take longer than this to read, or to apply in memory, are logged.")
	fs.DurationVar(&c.GRPCKeepAliveMinTime, "grpc-keepalive-min-time", 5*time.Second, "Shortest interval at which a client may ping.")
	fs.DurationVar(&c.GRPCKeepAliveInterval, "grpc-keepalive-interval", 2*time.Hour, "How often the server pings an idle client (0: never).")
	fs.DurationVar(&c.GRPCKeepAliveTimeout, "grpc-keepalive-timeout", 20*time.Second, "How long the server waits for the answer to its ping.")

	fs.StringVar(&c.Logger, "logger", "zap", "Only 'zap' is supported.")
	fs.StringVar(&c.LogLevel, "log-level", "info", "debug, info, warn, error, panic or fatal.")
	fs.StringVar(&c.LogFormat, "log-format", "json", "json or console.")
	c.LogOutputs = []string{"default"}
	fs.Var((*commaList)(&c.LogOutputs), "log-outputs", "Comma-separated: default (stderr), stderr, stdout, systemd/journal or file paths.")
	fs.BoolVar(&c.LogRotation.Enabled, "enable-log-rotation", false, "Rotate the file that --log-outputs names.")
	fs.StringVar(&c.LogRotation.JSON, "log-rotation-config-json", defaultLogRotation, "How the log file is rotated: sizes in megabytes, ages in days.")
	fs.StringVar(&c.Metrics, "metrics", "basic", "basic, or extensive for gRPC latency histograms.")
	fs.BoolVar(&c.EnablePprof, "enable-pprof", false, "Serve runtime profiles under /debug/pprof/ on the client port.")

	fs.StringVar(&c.ConfigFile, "config-file", "", "Path to a configuration file (YAML, etcd's names); other flags and the environment are then ignored.")
	fs.StringVar(&c.EtcdVersion, "etcd-version", defaultEtcdVersion, "The etcd version that quire answers with.")
	fs.BoolVar(&c.PrintVersion, "version", false, "Print the version and exit.")

	addTracingFlags(fs, &c.Tracing)
	addClusterFlags(fs, c)
	addEtcdFlags(fs, c)
	fs.SetNormalizeFunc(normalizeName(fs))
	return fs
}

// normalizeName lets the names that etcd 3.5 and 3.6 had before a flag left its experimental stage stand for
// the name it has now: --experimental-watch-progress-notify-interval and so on.
func normalizeName(fs *pflag.FlagSet) func(*pflag.FlagSet, string) pflag.NormalizedName {
	known := map[string]bool{}
	fs.VisitAll(func(f *pflag.Flag) { known[f.Name] = true })
	return func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		if rest, ok := strings.CutPrefix(name, "experimental-"); ok && !known[name] && known[rest] {
			return pflag.NormalizedName(rest)
		}
		return pflag.NormalizedName(name)
	}
}

// doubleDash turns Go's -flag into the --flag that pflag reads. A value that begins with a dash
// (--quota-backend-bytes -1) is left alone: a flag that takes a value swallows the next word, as in Go.
func doubleDash(fs *pflag.FlagSet, args []string) []string {
	out := make([]string, 0, len(args))
	for i := 0; i < len(args); i++ {
		a := args[i]
		if len(a) < 2 || a[0] != '-' || a == "--" {
			return append(out, args[i:]...) // no flag: whatever follows is not read as flags either
		}
		if a == "-h" || a == "-help" {
			a = "--help"
		}
		if a[1] != '-' {
			a = "-" + a
		}
		out = append(out, a)
		name, _, hasValue := strings.Cut(a[2:], "=")
		if f := fs.Lookup(name); f != nil && !hasValue && f.NoOptDefVal == "" && i+1 < len(args) {
			i++
			out = append(out, args[i])
		}
	}
	return out
}

// errHelp asks main to print the usage and exit with 0.
var errHelp = errors.New("help requested")

// loadConfig reads the command line, then the environment, then checks the whole.
//
// Precedence is etcd's (server/v3/etcdmain: config.parse): a flag wins over its ETCD_ variable, which wins over
// the default; with --config-file or ETCD_CONFIG_FILE the file alone counts. Where etcd refuses to start
// because a flag and its variable are both given, quire warns and takes the flag.
func loadConfig(args, env []string) (*config, error) {
	c := &config{}
	fs := newFlagSet(c)
	if err := fs.Parse(doubleDash(fs, args)); err != nil {
		if errors.Is(err, pflag.ErrHelp) {
			return nil, errHelp
		}
		return nil, &usageError{explain(fs, err)}
	}
	if fs.NArg() != 0 {
		return nil, fmt.Errorf("%q is not a valid flag", fs.Arg(0))
	}
	if c.PrintVersion {
		return c, nil
	}
	file := c.ConfigFile
	if file == "" {
		file = lookupEnv(env, envName("config-file"))
	}
	if file != "" {
		fromFile := &config{}
		ffs := newFlagSet(fromFile)
		if err := readConfigFile(file, fromFile, ffs); err != nil {
			return nil, err
		}
		fromFile.ConfigFile = file
		var ignored []string
		fs.Visit(func(f *pflag.Flag) {
			if f.Name != "config-file" {
				ignored = append(ignored, "--"+f.Name)
			}
		})
		for _, kv := range env {
			if name, value, _ := strings.Cut(kv, "="); value != "" && flagOfEnv(fs, name) != "" && name != envName("config-file") {
				ignored = append(ignored, name)
			}
		}
		if len(ignored) > 0 {
			fromFile.note("ignored because a configuration file is given; move them into the file",
				"ignored", strings.Join(ignored, ","), "config-file", file)
		}
		return fromFile, fromFile.finish(ffs, true)
	}
	if err := readEnv(c, fs, env); err != nil {
		return nil, err
	}
	return c, c.finish(fs, false)
}

// explain says what is wrong with a flag as Go's flag package does, and so etcd, and adds what the flag wants.
func explain(fs *pflag.FlagSet, err error) error {
	var bad *pflag.InvalidValueError
	if errors.As(err, &bad) {
		if f := bad.GetFlag(); f != nil {
			return fmt.Errorf("invalid value %q for flag -%s: %w; --%s: %s", bad.GetValue(), f.Name, bad.Unwrap(), f.Name, f.Usage)
		}
	}
	return err
}

func envName(flag string) string {
	return "ETCD_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// flagOfEnv returns the flag that the variable sets, empty when there is none.
func flagOfEnv(fs *pflag.FlagSet, variable string) string {
	rest, ok := strings.CutPrefix(variable, "ETCD_")
	if !ok {
		return ""
	}
	name := strings.ToLower(strings.ReplaceAll(rest, "_", "-"))
	if name == "version" { // etcd: "cannot set special environment variable"
		return ""
	}
	if f := fs.Lookup(name); f != nil && envName(f.Name) == envName(name) && envName(name) == variable {
		return f.Name
	}
	return ""
}

func lookupEnv(env []string, name string) string {
	for _, kv := range slices.Backward(env) { // the last one wins, as in os.Environ consumers
		if k, v, ok := strings.Cut(kv, "="); ok && k == name {
			return v
		}
	}
	return ""
}

// readEnv sets from ETCD_* what the command line left open. An empty variable counts as unset, as in etcd.
func readEnv(c *config, fs *pflag.FlagSet, env []string) error {
	for _, kv := range env {
		variable, value, ok := strings.Cut(kv, "=")
		if !ok || !strings.HasPrefix(variable, "ETCD_") {
			continue
		}
		name := flagOfEnv(fs, variable)
		switch {
		case variable == "ETCD_UNSUPPORTED_ARCH", variable == "ETCD_VERIFY":
			// Set by every test framework of etcd; they mean nothing here and deserve no warning.
		case name == "":
			// The name only: who knows what secret the value is.
			c.note("unrecognized environment variable", "environment-variable", variable)
		case value == "":
		case fs.Changed(name):
			c.note("conflicting environment variable is shadowed by corresponding command-line flag (either unset environment variable or disable flag)",
				"environment-variable", variable)
		default:
			if err := fs.Set(name, value); err != nil {
				return fmt.Errorf("invalid value %q for %s: %w", value, variable, err)
			}
		}
	}
	return nil
}

// finish fills in what depends on other flags and checks the whole. The order of the checks is etcd's
// (server/v3/embed: Config.Validate), so that of two mistakes the same one is reported.
func (c *config) finish(fs *pflag.FlagSet, fromFile bool) error {
	for _, check := range []func() error{
		c.checkLogging,
		func() error { return checkBindURLs(c.Cluster.ListenPeerURLs) },
		func() error { return checkBindURLs(c.ListenClientURLs) },
		func() error { return checkBindURLs(c.ListenClientHTTPURLs) },
		func() error { return checkBindURLs(c.ListenMetricsURLs) },
	} {
		if err := check(); err != nil {
			return err
		}
	}
	if err := checkHostURLs(c.AdvertisePeerURLs); err != nil {
		return fmt.Errorf(`--initial-advertise-peer-urls %q must be "host:port" (%w)`, c.AdvertisePeerURLs.String(), err)
	}
	if fs.Changed("listen-client-urls") && !fs.Changed("advertise-client-urls") && !fromFile {
		// etcd refuses to start here. What is listened on is an address at least.
		c.AdvertiseClientURLs = slices.Clone(c.ListenClientURLs)
		c.note("--advertise-client-urls is not set; advertising --listen-client-urls", "advertise-client-urls", c.AdvertiseClientURLs.String())
	}
	if err := checkHostURLs(c.AdvertiseClientURLs); err != nil {
		return fmt.Errorf(`--advertise-client-urls %q must be in the format "host:port", "unix:/path/to/socket" or "unixs:/path/to/socket" (%w)`, c.AdvertiseClientURLs.String(), err)
	}
	if err := c.Cluster.check(fs, &c.gates); err != nil {
		return err
	}
	switch {
	case fs.Changed("initial-cluster"):
	case c.Cluster.discovers():
		c.InitialCluster = ""
	default:
		// etcd's InitialClusterFromName: without --initial-cluster the member is its own cluster.
		parts := make([]string, len(c.AdvertisePeerURLs))
		for i, u := range c.AdvertisePeerURLs {
			parts[i] = c.Name + "=" + u.String()
		}
		c.InitialCluster = strings.Join(parts, ",")
	}
	switch c.AutoCompactionMode {
	case modePeriodic, modeRevision:
	case "":
		return errors.New("undefined auto-compaction-mode")
	default:
		return fmt.Errorf("unknown auto-compaction-mode %q; use periodic or revision", c.AutoCompactionMode)
	}
	if _, err := parseRetention(c.AutoCompactionMode, c.AutoCompactionRetention); err != nil {
		return err
	}
	if err := c.Tracing.check(); err != nil {
		return err
	}
	if err := c.TLS.check(); err != nil {
		return err
	}
	if c.SelfSignedCertValidity == 0 {
		return errors.New("--self-signed-cert-validity must be greater than 0 (years)")
	}
	if !validVersion(c.EtcdVersion) {
		return fmt.Errorf("--etcd-version %q is not a semantic version; use for example %s", c.EtcdVersion, defaultEtcdVersion)
	}
	if c.WarningUnaryRequestDuration == 0 { // etcd: parseWarningUnaryRequestDuration
		c.WarningUnaryRequestDuration = 300 * time.Millisecond
	}
	if c.Name == defaultName {
		c.note("it isn't recommended to use default name, please set a value for --name", "name", c.Name)
	}
	if len(c.ListenClientURLs) == 0 {
		return errors.New("--listen-client-urls is empty; name at least one URL, for example " + defaultListenClientURLs)
	}
	if err := c.finishStorage(fs); err != nil {
		return err
	}
	noteIneffective(fs, c)
	return nil
}

// finishStorage settles where the data is.
func (c *config) finishStorage(fs *pflag.FlagSet) error {
	var file string // of a SQLite database, if --storage names one
	scheme, rest, ok := strings.Cut(c.Storage, "://")
	switch {
	case c.Storage == "":
	case !ok:
		return fmt.Errorf("--storage %q has no scheme; write sqlite:///absolute/path or sqlite://relative/path", redactURL(c.Storage))
	case scheme == "postgres" || scheme == "postgresql":
		c.Postgres.URL, c.Postgres.Name, c.Postgres.ClientURLs = c.Storage, c.Name, c.AdvertiseClientURLs.Strings()
		c.StoragePath = backend.RedactPostgresURL(c.Storage)
		if err := c.Postgres.Check(); err != nil {
			return fmt.Errorf("--storage, --postgres-…: %w", err)
		}
	case scheme == "sqlite" || scheme == "sqlraft":
		var err error
		if file, err = filePath(c.Storage, rest); err != nil {
			return err
		}
	default:
		return fmt.Errorf("--storage %s:// is not known; use sqlite:///absolute/path, sqlraft:///absolute/path or postgres://user@host:5432/database", scheme)
	}
	if c.DataDir == "" {
		c.DataDir = c.Name + ".etcd"
		if scheme == "sqlraft" {
			c.DataDir = filepath.Dir(file) // beside the database, where it is looked for
		}
	}
	if err := c.chooseStorage(fs); err != nil {
		return err
	}
	if c.Kind == storagePostgres {
		return c.checkInitialCluster()
	}
	if file == "" {
		file = filepath.Join(c.DataDir, "quire.db")
	}
	// Absolute, so that the log tells where the data lies whatever the working directory was.
	var err error
	if c.StoragePath, err = filepath.Abs(file); err != nil {
		return err
	}
	if c.Kind == storageRaft {
		return nil // a member that is initialized reads none of it
	}
	return c.checkInitialCluster()
}

// filePath is the path in --storage sqlite:///abs/path or sqlite://relative/path; rest is what follows the slashes.
func filePath(storage, rest string) (string, error) {
	if strings.Contains(rest, "?") {
		return "", fmt.Errorf("--storage %q: a sqlite path takes no ?options", storage)
	}
	path, err := url.PathUnescape(rest)
	if err != nil {
		return "", fmt.Errorf("--storage %q: %w", storage, err)
	}
	if path == "" || strings.HasSuffix(path, "/") {
		return "", fmt.Errorf("--storage %q names no file; write for example sqlite:///var/lib/quire/quire.db", storage)
	}
	return path, nil
}

// redactURL keeps a password that someone put into --storage out of the error.
func redactURL(s string) string {
	if i := strings.LastIndex(s, "@"); i >= 0 {
		return "…" + s[i:]
	}
	return s
}

// checkInitialCluster checks the form of --initial-cluster where it only serves to find the member's id.
func (c *config) checkInitialCluster() error {
	for entry := range strings.SplitSeq(c.InitialCluster, ",") {
		if entry = strings.TrimSpace(entry); entry == "" {
			continue
		}
		if n, u, ok := strings.Cut(entry, "="); !ok || n == "" || u == "" {
			return fmt.Errorf("--initial-cluster %q: %q is not name=peerURL", c.InitialCluster, entry)
		}
	}
	if names := c.initialNames(); len(names) > 0 && !slices.Contains(names, c.Name) {
		return fmt.Errorf("couldn't find local name %q in the initial cluster configuration; put it into --initial-cluster %q or change --name", c.Name, c.InitialCluster)
	}
	return nil
}

// validVersion accepts major.minor.patch, with a pre-release or build suffix.
func validVersion(v string) bool {
	core, _, _ := strings.Cut(v, "+")
	core, _, _ = strings.Cut(core, "-")
	parts := strings.Split(core, ".")
	if len(parts) != 3 {
		return false
	}
	for _, p := range parts {
		if p == "" || strings.Trim(p, "0123456789") != "" {
			return false
		}
	}
	return true
}

// commaList is a flag of comma-separated words; setting it replaces what was there.
type commaList []string

func (l *commaList) Set(s string) error {
	*l = nil
	for _, w := range strings.Split(s, ",") {
		if w = strings.TrimSpace(w); w != "" && !slices.Contains(*l, w) {
			*l = append(*l, w)
		}
	}
	return nil
}
func (l *commaList) String() string { return strings.Join(*l, ",") }
func (l *commaList) Type() string   { return "list" }
