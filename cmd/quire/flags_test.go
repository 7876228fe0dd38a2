package main

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
)

func TestDefaultsAreEtcds(t *testing.T) {
	c, err := loadConfig(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct{ name, got, want string }{
		{"name", c.Name, "default"},
		{"data-dir", c.DataDir, "default.etcd"},
		{"storage", c.StoragePath, filepath.Join(wd, "default.etcd", "quire.db")},
		{"listen-client-urls", c.ListenClientURLs.String(), "http://localhost:2379"},
		{"advertise-client-urls", c.AdvertiseClientURLs.String(), "http://localhost:2379"},
		{"initial-cluster", c.InitialCluster, "default=http://localhost:2380"},
		{"etcd-version", c.EtcdVersion, "3.7.3"},
	} {
		if x.got != x.want {
			t.Errorf("--%s is %q by default, want %q", x.name, x.got, x.want)
		}
	}
	for _, n := range c.notes {
		if strings.Contains(n.msg, "no effect") {
			t.Errorf("a start without flags warns of one: %s", n.msg)
		}
	}
}

func TestFlagForms(t *testing.T) {
	for _, x := range []struct {
		args string
		env  []string
		want func(*config) bool
	}{
		{args: "--name a", want: func(c *config) bool { return c.Name == "a" && c.DataDir == "a.etcd" }},
		{args: "--name=a --data-dir d", want: func(c *config) bool { return c.DataDir == "d" }},
		{args: "-name a", want: func(c *config) bool { return c.Name == "a" }},
		{args: "-name=a", want: func(c *config) bool { return c.Name == "a" }},
		{args: "--name a --name b", want: func(c *config) bool { return c.Name == "b" }},
		{args: "--quota-backend-bytes -1", want: func(c *config) bool { return c.QuotaBackendBytes == -1 }},
		{args: "-quota-backend-bytes=0x10", want: func(c *config) bool { return c.QuotaBackendBytes == 16 }},
		{args: "--enable-pprof", want: func(c *config) bool { return c.EnablePprof }},
		{args: "--enable-pprof=true", want: func(c *config) bool { return c.EnablePprof }},
		{args: "--enable-pprof --enable-pprof=false", want: func(c *config) bool { return !c.EnablePprof }},
		{args: "-client-cert-auth", want: func(c *config) bool { return c.TLS.ClientCertAuth }},
		{args: "--name a", env: []string{"ETCD_NAME=b"}, want: func(c *config) bool {
			return c.Name == "a" && hasNote(c, "shadowed")
		}},
		{env: []string{"ETCD_NAME=b", "ETCD_ENABLE_PPROF=true"}, want: func(c *config) bool { return c.Name == "b" && c.EnablePprof }},
		{env: []string{"ETCD_NAME="}, want: func(c *config) bool { return c.Name == "default" }},
		{env: []string{"ETCD_NOBODY_KNOWS=1", "ETCD_VERSION=2"}, want: func(c *config) bool {
			return hasNote(c, "unrecognized environment variable") && !c.PrintVersion
		}},
		{env: []string{"ETCD_UNSUPPORTED_ARCH=arm", "ETCD_VERIFY=all", "GOFAIL_HTTP=x", "PATH=/bin"}, want: func(c *config) bool {
			return !hasNote(c, "unrecognized")
		}},
		{args: "--experimental-watch-progress-notify-interval=5s", want: func(c *config) bool {
			return c.WatchProgressNotifyInterval == 5*time.Second
		}},
		{args: "--initial-cluster m=http://127.0.0.1:2380 --name m --initial-cluster-state new --initial-cluster-token t --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 --snapshot-count 10 --strict-reconfig-check=false --force-new-cluster=true --peer-auto-tls --v --feature-gates InitialCorruptCheck=true,CompactHashCheck=false",
			want: func(c *config) bool {
				f := c.Cluster
				return c.Name == "m" && c.Kind == storageRaft && f.SnapshotCount == 10 && f.ForceNew && !f.StrictReconfigCheck &&
					f.InitialCorruptCheck && !f.CompactHashCheck && !hasNote(c, "no effect")
			}},
		{args: "--snapshot-count 10 --max-learners=2", want: func(c *config) bool {
			return c.Kind == storageSQLite && hasNote(c, "--snapshot-count has no effect: this is no member") && hasNote(c, "--max-learners has no effect")
		}},
		{args: "--max-snapshots=5 --v2-deprecation gone", want: func(c *config) bool {
			return hasNote(c, "--max-snapshots is deprecated") && hasNote(c, "--v2-deprecation is deprecated") && !hasNote(c, "no effect")
		}},
		{args: "--compaction-batch-limit=3 --compaction-sleep-interval=1h", want: func(c *config) bool {
			return c.CompactionBatch == 3 && c.CompactionPause == time.Hour && !hasNote(c, "no effect")
		}},
		{args: "--heartbeat-interval 10 --election-timeout 1234", want: func(c *config) bool {
			return c.Cluster.heartbeat() == 10*time.Millisecond && c.Cluster.electionTimeout() == 1230*time.Millisecond && !hasNote(c, "no effect")
		}},
		{args: "--experimental-initial-corrupt-check --experimental-corrupt-check-time=5s --experimental-compact-hash-check-enabled=true --experimental-compact-hash-check-time=7s",
			want: func(c *config) bool {
				f := c.Cluster
				return f.InitialCorruptCheck && f.CorruptCheckTime == 5*time.Second && f.CompactHashCheck && f.CompactHashCheckTime == 7*time.Second
			}},
		{args: "--feature-gates AllAlpha=true,CompactHashCheck=false,TxnModeWriteWithSharedBuffer=true", want: func(c *config) bool {
			return c.Cluster.InitialCorruptCheck && !c.Cluster.CompactHashCheck && c.notesWith("feature gate has no effect") == 1
		}},
		{args: "--corrupt-check-time=0", want: func(c *config) bool { return c.Cluster.CorruptCheckTime == 0 }},
		{args: "--listen-client-urls http://127.0.0.1:1,https://127.0.0.1:1,unix://localhost:20000", want: func(c *config) bool {
			return slices.Equal(c.AdvertiseClientURLs.Strings(), []string{"http://127.0.0.1:1", "https://127.0.0.1:1", "unix://localhost:20000"})
		}},
		{args: "--listen-metrics-urls= --listen-client-http-urls= --listen-client-urls=", want: func(c *config) bool {
			return len(c.ListenMetricsURLs) == 0 && len(c.ListenClientHTTPURLs) == 0 && c.ListenClientURLs.String() == defaultListenClientURLs
		}},
		{args: "--cipher-suites TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305", want: func(c *config) bool {
			return len(c.TLS.CipherSuites) == 2
		}},
		{args: "--storage sqlite:///var/lib/q.db", want: func(c *config) bool { return c.StoragePath == "/var/lib/q.db" }},
		{args: "--storage sqlite://q/q.db", want: func(c *config) bool { return strings.HasSuffix(c.StoragePath, "/quire/q/q.db") }},
	} {
		c, err := loadConfig(strings.Fields(x.args), x.env)
		if err != nil {
			t.Errorf("%s %v: %v", x.args, x.env, err)
		} else if !x.want(c) {
			t.Errorf("%s %v gave %+v", x.args, x.env, c)
		}
	}
}

func hasNote(c *config, part string) bool {
	return slices.ContainsFunc(c.notes, func(n note) bool { return strings.Contains(n.msg, part) })
}

// notesWith counts notes.
func (c *config) notesWith(part string) (count int) {
	for _, n := range c.notes {
		if strings.Contains(n.msg, part) {
			count++
		}
	}
	return count
}

func TestStorageIsChosen(t *testing.T) {
	plain, member := t.TempDir(), t.TempDir()
	if err := os.Mkdir(filepath.Join(member, "raft"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		args string
		want storageKind
		path string
	}{
		{"--data-dir " + plain, storageSQLite, plain + "/quire.db"},
		{"--data-dir " + plain + " --initial-cluster-token t --initial-cluster-state new --initial-advertise-peer-urls http://h:1", storageSQLite, plain + "/quire.db"},
		{"--data-dir " + plain + " --storage sqlite:///d/q.db", storageSQLite, "/d/q.db"},
		{"--data-dir " + plain + " --storage sqlite:///d/q.db --name m --initial-cluster m=http://h:1", storageSQLite, "/d/q.db"},
		{"--data-dir " + plain + " --name m --initial-cluster m=http://h:1", storageRaft, plain + "/quire.db"},
		{"--data-dir " + plain + " --initial-cluster default=http://h:1,b=http://h:2", storageRaft, plain + "/quire.db"},
		{"--data-dir " + plain + " --initial-cluster-state existing", storageRaft, plain + "/quire.db"},
		{"--data-dir " + plain + " --discovery-srv example.com", storageRaft, plain + "/quire.db"},
		{"--data-dir " + plain + " --discovery-token t --discovery-endpoints http://h:1", storageRaft, plain + "/quire.db"},
		{"--data-dir " + plain + " --force-new-cluster", storageRaft, plain + "/quire.db"},
		{"--data-dir " + member, storageRaft, member + "/quire.db"},
		{"--data-dir " + plain + " --storage sqlraft:///d/q.db", storageRaft, "/d/q.db"},
		{"--storage postgres://u@h/db", storagePostgres, "postgres://u@h/db"},
		{"--storage postgres://u@h/db --name m --initial-cluster m=http://h:1", storagePostgres, "postgres://u@h/db"},
	} {
		c, err := loadConfig(strings.Fields(x.args), nil)
		if err != nil {
			t.Errorf("%s: %v", x.args, err)
		} else if c.Kind != x.want || c.StoragePath != x.path {
			t.Errorf("%s: %v at %s, want %v at %s", x.args, c.Kind, c.StoragePath, x.want, x.path)
		}
	}
	// The log is kept beside the database, not in a directory that depends on where quire is started.
	c, err := loadConfig([]string{"--storage", "sqlraft:///d/q.db"}, nil)
	if err != nil || c.raftDir() != "/d/raft" {
		t.Errorf("sqlraft:// without --data-dir: the log is in %s, %v", c.raftDir(), err)
	}
	c, err = loadConfig([]string{"--data-dir=/d", "--wal-dir=/fast", "--initial-cluster=default=http://localhost:2380"}, nil)
	if err != nil || c.raftDir() != "/fast/raft" || c.leftDir() != "/fast/raft.left" {
		t.Errorf("--wal-dir: the log is in %s, %v", c.raftDir(), err)
	}
	plainly := []string{"--data-dir", member, "--storage", "sqlite://" + member + "/quire.db"}
	if _, err := loadConfig(plainly, nil); err == nil || !strings.Contains(err.Error(), "--force-new-cluster") {
		t.Errorf("a member's database as a plain one: %v", err)
	}
	if c, err := loadConfig(append(plainly, "--force-new-cluster"), nil); err != nil || c.Kind != storageSQLite || !c.Leave {
		t.Errorf("a member that is to leave: %+v, %v", c, err)
	}
}

func TestMinLeaseTTLIsEtcds(t *testing.T) {
	for _, x := range []struct {
		heartbeat, election uint
		want                int64
	}{{100, 1000, 2}, {10, 100, 1}, {100, 500, 1}, {100, 2000, 3}, {29, 271, 1}, {101, 521, 1}, {500, 50000, 75}, {100, 1400, 3}, {100, 1300, 2}} {
		f := clusterFlags{Heartbeat: x.heartbeat, ElectionTimeout: x.election}
		// As server/v3/etcdserver computes it.
		ticks := int(x.election / x.heartbeat)
		etcds := int64(math.Ceil((time.Duration((3*ticks)/2) * time.Duration(x.heartbeat) * time.Millisecond).Seconds()))
		if got := f.minLeaseTTL(); got != x.want || got != etcds {
			t.Errorf("%d/%d ms: %d s, want %d; etcd has %d", x.heartbeat, x.election, got, x.want, etcds)
		}
	}
}

func TestRefusedFlags(t *testing.T) {
	for _, x := range []struct {
		args  string
		env   []string
		usage bool   // exit code 2
		want  string // in the message
	}{
		{args: "--nobody-knows", usage: true, want: "unknown flag: --nobody-knows"},
		{args: "-nobody-knows=1", usage: true, want: "unknown flag: --nobody-knows"},
		{args: "--quota-backend-bytes lots", usage: true, want: "--quota-backend-bytes"},
		{args: "--snapshot-count -5", usage: true, want: "--snapshot-count"},
		{args: "--heartbeat-interval soon", usage: true, want: "--heartbeat-interval"},
		{args: "--initial-cluster-state maybe", usage: true, want: "new, existing"},
		{args: "--feature-gates Nope=true", usage: true, want: "unrecognized feature gate: Nope"},
		{args: "--listen-client-urls localhost:1", usage: true, want: "URL scheme must be http, https, unix, or unixs"},
		{args: "--listen-client-urls http://localhost", usage: true, want: `does not have the form "host:port"`},
		{args: "--listen-client-urls http://localhost:1/x", usage: true, want: "URL must not contain a path"},
		{args: "--listen-client-urls http://example.com:1", want: "expected IP in URL for binding (http://example.com:1)"},
		{args: "--advertise-client-urls http://:1", want: "unexpected empty host"},
		{args: "surplus", want: `"surplus" is not a valid flag`},
		{env: []string{"ETCD_QUOTA_BACKEND_BYTES=lots"}, want: "ETCD_QUOTA_BACKEND_BYTES"},
		{args: "--auto-compaction-mode weekly", want: `unknown auto-compaction-mode "weekly"`},
		{args: "--auto-compaction-retention often", want: "error parsing CompactionRetention"},
		{args: "--auto-compaction-mode revision --auto-compaction-retention 5m", want: "wants a number of revisions"},
		{args: "--log-level loud", want: "--log-level"},
		{args: "--log-format xml", want: "unknown log format: xml"},
		{args: "--logger capnslog", want: "removed in v3.5"},
		{args: "--log-outputs default,stdout", want: "multi logoutput"},
		{args: "--tls-min-version TLS1.3 --tls-max-version TLS1.2", want: "min version (TLS1.3) is greater than max version (TLS1.2)"},
		{args: "--tls-min-version TLS1.3 --cipher-suites TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", want: "cipher suites cannot be configured when only TLS1.3 is enabled"},
		{args: "--cipher-suites ROT13", want: `unexpected TLS cipher suite "ROT13"`},
		{args: "--cert-file c", want: "give both --cert-file and --key-file"},
		{args: "--etcd-version three", want: "not a semantic version"},
		{args: "--storage sqlraft://", want: "names no file"},
		{args: "--storage sqlite:///d/q.db --initial-cluster default=http://h:1,b=http://h:2", want: "leave --storage out"},
		{args: "--storage sqlite:///d/q.db --initial-cluster-state existing", want: "cannot join a cluster"},
		{args: "--storage sqlite:///d/q.db --discovery-srv example.com", want: "no member of a cluster"},
		{args: "--storage postgres://u@h/db --initial-cluster default=http://h:1,b=http://h:2", want: "equals already"},
		{args: "--storage postgres://u:geheim@h/db --initial-cluster-state existing", want: "cannot join a cluster"},
		{args: "--v2-deprecation=not-yet", usage: true, want: `invalid value "not-yet" for flag -v2-deprecation: invalid value "not-yet"`},
		{args: "--heartbeat-interval 0", want: "--heartbeat-interval must be >0 (set to 0ms)"},
		{args: "--election-timeout 0", want: "--election-timeout must be >0 (set to 0ms)"},
		{args: "--election-timeout 499", want: "--election-timeout[499ms] should be at least as 5 times as --heartbeat-interval[100ms]"},
		{args: "--election-timeout 50001", want: "--election-timeout[50001ms] is too long, and should be set less than 50000ms"},
		{args: "--compact-hash-check-time 0s", want: "--compact-hash-check-time must be >0 (set to 0s)"},
		{args: "--corrupt-check-time=-1s", want: "--corrupt-check-time must not be negative"},
		{args: "--initial-cluster default=http://h:1 --discovery-srv example.com", want: "multiple discovery or bootstrap flags are set"},
		{args: "--discovery-token t --discovery-endpoints http://h:1 --discovery-srv example.com", want: "multiple discovery or bootstrap flags are set"},
		{args: "--discovery-token t", want: "both --discovery-token and --discovery-endpoints must be set"},
		{args: "--discovery-endpoints http://h:1", want: "both --discovery-token and --discovery-endpoints must be set"},
		{args: "--storage sqlite:///d/q.db --discovery-token t --discovery-endpoints http://h:1", want: "no member of a cluster"},
		{args: "--feature-gates LeaseCheckpointPersist=true", want: "requires enabling feature gate LeaseCheckpoint"},
		{args: "--listen-peer-urls http://example.com:1", want: "expected IP in URL for binding (http://example.com:1)"},
		{args: "--storage mysql://h/db", want: "not known"},
		{args: "--storage /var/lib/x.db", want: "has no scheme"},
		{args: "--storage sqlite://", want: "names no file"},
		{args: "--storage sqlite:///d/q.db --initial-cluster a=http://127.0.0.1:1", want: `couldn't find local name "default"`},
	} {
		_, err := loadConfig(strings.Fields(x.args), x.env)
		var bad *usageError
		switch {
		case err == nil:
			t.Errorf("%s %v is accepted", x.args, x.env)
		case !strings.Contains(err.Error(), x.want):
			t.Errorf("%s %v: %q does not say %q", x.args, x.env, err, x.want)
		case errors.As(err, &bad) != x.usage:
			t.Errorf("%s %v: exit code 2 is %v, want %v", x.args, x.env, !x.usage, x.usage)
		case strings.Contains(err.Error(), "geheim"):
			t.Errorf("a password reached the message: %q", err)
		}
	}
}

// Every flag must be settable by its variable, and no two flags may share one.
func TestEveryFlagHasItsVariable(t *testing.T) {
	fs := newFlagSet(&config{})
	seen := map[string]string{}
	fs.VisitAll(func(f *pflag.Flag) {
		v := envName(f.Name)
		if other := seen[v]; other != "" {
			t.Errorf("%s sets --%s and --%s", v, other, f.Name)
		}
		seen[v] = f.Name
		// ETCD_VERSION is the one that etcd refuses to read.
		if got := flagOfEnv(fs, v); got != f.Name && f.Name != "version" {
			t.Errorf("%s sets %q, want --%s", v, got, f.Name)
		}
	})
	if len(seen) < 100 {
		t.Errorf("only %d flags are known; etcd has more than a hundred", len(seen))
	}
}

func TestConfigFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "etcd.conf.yml")
	const text = `
name: 'm1'
data-dir: /d
wal-dir:
snapshot-count: 10000
quota-backend-bytes: 9007199254740993
listen-client-urls: http://127.0.0.1:1,http://127.0.0.1:2
advertise-client-urls: http://127.0.0.1:1
initial-cluster-state: 'new'
watch-progress-notify-interval: 5000000000
grpc-keepalive-min-time: 7s
enable-pprof: true
nobody-knows: 1
discovery-fallback: proxy
cipher-suites: [
  TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
  TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384
]
log-outputs: [stderr]
client-transport-security:
  cert-file: /c
  key-file: /k
  client-cert-auth: true
  trusted-ca-file: /ca
  auto-tls: false
  crl-file: /crl
peer-transport-security:
  cert-file: /pc
  allowed-cn: [a, b]
socket-options:
  reuse-port: true
discovery-config:
  token: t
  client:
    endpoints: [http://127.0.0.1:3]
    dial-timeout: 3000000000
    secure:
      insecure-transport: false
    auth:
      username: u
`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, how := range []struct{ args, env []string }{
		{args: []string{"--config-file", path, "--name", "ignored"}, env: []string{"ETCD_DATA_DIR=ignored"}},
		{env: []string{"ETCD_CONFIG_FILE=" + path, "ETCD_NAME=ignored"}},
	} {
		c, err := loadConfig(how.args, how.env)
		if err != nil {
			t.Fatal(err)
		}
		want := tlsFiles{CertFile: "/c", KeyFile: "/k", TrustedCAFile: "/ca", ClientCertAuth: true, CRLFile: "/crl"}
		switch {
		case c.Name != "m1" || c.DataDir != "/d":
			t.Errorf("name %q, data-dir %q: flags or variables won over the file", c.Name, c.DataDir)
		case c.QuotaBackendBytes != 9007199254740993:
			t.Errorf("quota %d lost precision", c.QuotaBackendBytes)
		case c.WatchProgressNotifyInterval != 5*time.Second || c.GRPCKeepAliveMinTime != 7*time.Second:
			t.Errorf("durations %v, %v", c.WatchProgressNotifyInterval, c.GRPCKeepAliveMinTime)
		case !c.EnablePprof || !c.SocketReusePort || len(c.TLS.CipherSuites) != 2 || len(c.ListenClientURLs) != 2:
			t.Errorf("got %+v", c)
		case c.TLS.CertFile != want.CertFile || c.TLS.CRLFile != want.CRLFile || !c.TLS.ClientCertAuth || c.TLS.TrustedCAFile != want.TrustedCAFile:
			t.Errorf("client-transport-security gave %+v", c.TLS)
		case !hasNote(c, "unknown key"):
			t.Error("no warning of nobody-knows")
		case !hasNote(c, "ignored because a configuration file is given"):
			t.Error("no warning of what the file overrides")
		case c.Cluster.TLS.Files.CertFile != "/pc" || len(c.Cluster.TLS.Files.AllowedCNs) != 2:
			t.Errorf("peer-transport-security gave %+v", c.Cluster.TLS)
		case c.Cluster.Discovery.Token != "t" || !slices.Equal(c.Cluster.Discovery.Endpoints, []string{"http://127.0.0.1:3"}) ||
			c.Cluster.Discovery.DialTimeout != 3*time.Second || c.Cluster.Discovery.Secure.InsecureTransport || c.Cluster.Discovery.Auth.Username != "u":
			t.Errorf("discovery-config gave %+v", c.Cluster.Discovery)
		}
	}
}

func TestConfigFileMistakes(t *testing.T) {
	dir := t.TempDir()
	for text, want := range map[string]string{
		"quota-backend-bytes: lots":     "quota-backend-bytes",
		"client-transport-security: x":  "client-transport-security",
		"discovery-config: {client: x}": "discovery-config",
		// Ignored, it would let in clients that it keeps out.
		"client-transport-security: {allowed-cn: [a]}": "allowed-cn is not supported",
		"name: {a: b}":                           "one value is expected",
		"\tname: a":                              "yaml",
		"listen-client-urls: http://localhost/x": "listen-client-urls",
	} {
		path := filepath.Join(dir, "c")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := loadConfig([]string{"--config-file", path}, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v, want one that says %q", text, err, want)
		}
	}
	if _, err := loadConfig([]string{"--config-file", filepath.Join(dir, "none")}, nil); err == nil || !strings.Contains(err.Error(), "--config-file") {
		t.Errorf("missing file: %v", err)
	}
}

// Vectors: the first is what etcd's CtlV3GetFormat expects of https://localhost:20001 with token "new".
func TestIdentityIsEtcds(t *testing.T) {
	id := newIdentity("m", "m=https://localhost:20001", "new", nil)
	if id.MemberID != 0x00a8f3458387986d {
		t.Errorf("member %x, want a8f3458387986d", id.MemberID)
	}
	// A default etcd answers with these two (member list and header of `etcd` without flags).
	id = newIdentity("default", "default=http://localhost:2380", "etcd-cluster", nil)
	if id.MemberID != 0x8e9e05c52164694d || id.ClusterID != 0xcdf818194e3a8c32 {
		t.Errorf("member %x, cluster %x; etcd has 8e9e05c52164694d, cdf818194e3a8c32", id.MemberID, id.ClusterID)
	}
}
