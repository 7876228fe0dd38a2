package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"
)

// ineffective marks, as a pflag annotation, the flags of etcd that quire knows, checks and does not act on.
const ineffective = "quire-ineffective"

// addEtcdFlags registers the flags of etcd 3.7 (server/v3/embed: Config.AddFlags, server/v3/etcdmain: newConfig)
// that nothing in quire reads yet. Their values are still checked for type, so that a command line that etcd
// refuses is refused here too.
func addEtcdFlags(fs *pflag.FlagSet, c *config) {
	const usage = "Known from etcd; has no effect yet in this storage mode."
	mark := func(name string) { fs.Lookup(name).Annotations = map[string][]string{ineffective: nil} }
	str := func(name, value string) { fs.String(name, value, usage); mark(name) }
	boolean := func(name string, value bool) { fs.Bool(name, value, usage); mark(name) }
	number := func(name string, value uint64) { fs.Uint64(name, value, usage); mark(name) }
	integer := func(name string, value int) { fs.Int(name, value, usage); mark(name) }
	duration := func(name string, value time.Duration) { fs.Duration(name, value, usage); mark(name) }
	custom := func(name string, v pflag.Value) { fs.Var(v, name, usage); mark(name) }

	// Member.
	str("wal-dir", "")
	peers := &urlList{}
	if err := peers.Set(defaultListenPeerURLs); err != nil {
		panic(fmt.Sprintf("default of --listen-peer-urls is not valid: %v", err))
	}
	custom("listen-peer-urls", peers)
	number("max-snapshots", 5)
	number("max-wals", 5)
	number("snapshot-count", 10000)
	fs.Uint64Var(&c.SnapshotCatchUpEntries, "snapshot-catchup-entries", 5000, usage)
	mark("snapshot-catchup-entries")
	number("heartbeat-interval", 100)
	number("election-timeout", 1000)
	boolean("initial-election-tick-advance", true)
	custom("backend-bbolt-freelist-type", &choice{value: "map", of: []string{"array", "map"}})
	duration("backend-batch-interval", 0)
	integer("backend-batch-limit", 0)
	duration("raft-read-timeout", 5*time.Second)
	duration("raft-write-timeout", 5*time.Second)
	boolean("memory-mlock", false)
	custom("feature-gates", &featureGates{})

	// Clustering.
	custom("initial-cluster-state", &choice{value: "new", of: []string{"new", "existing"}})
	custom("discovery-fallback", &choice{value: "exit", of: []string{"exit"}})
	custom("discovery-endpoints", new(commaList))
	for _, name := range []string{"discovery-token", "discovery-cert", "discovery-key", "discovery-cacert",
		"discovery-user", "discovery-password", "discovery-srv", "discovery-srv-name"} {
		str(name, "")
	}
	duration("discovery-dial-timeout", 2*time.Second)
	duration("discovery-request-timeout", 5*time.Second)
	duration("discovery-keepalive-time", 2*time.Second)
	duration("discovery-keepalive-timeout", 6*time.Second)
	boolean("discovery-insecure-transport", true)
	boolean("discovery-insecure-skip-tls-verify", false)
	boolean("strict-reconfig-check", true)
	boolean("pre-vote", true)
	custom("v2-deprecation", &choice{value: "write-only", of: []string{"write-only", "write-only-skip-check", "write-only-drop-data", "gone", "not-yet"}})
	boolean("force-new-cluster", false)
	integer("max-learners", 1)

	// Security.
	for _, name := range []string{"client-cert-file", "client-key-file", "peer-cert-file", "peer-key-file",
		"peer-client-cert-file", "peer-client-key-file", "peer-trusted-ca-file", "peer-crl-file"} {
		str(name, "")
	}
	boolean("peer-client-cert-auth", false)
	boolean("peer-auto-tls", false)
	custom("peer-cert-allowed-cn", new(commaList))
	custom("peer-cert-allowed-hostname", new(commaList))
	boolean("peer-skip-client-san-verification", false)
	str("cors", "*")
	str("host-whitelist", "*")

	// Auth.
	str("auth-token", "simple")
	number("bcrypt-cost", 10)
	number("auth-token-ttl", 300)

	// Logging, tracing.
	boolean("enable-log-rotation", false)
	str("log-rotation-config-json", `{"maxsize": 100, "maxage": 0, "maxbackups": 0, "localtime": false, "compress": false}`)
	boolean("enable-distributed-tracing", false)
	str("distributed-tracing-address", "localhost:4317")
	str("distributed-tracing-service-name", "etcd")
	str("distributed-tracing-instance-id", "")
	integer("distributed-tracing-sampling-rate", 0)

	// Features.
	boolean("enable-grpc-gateway", true)
	duration("corrupt-check-time", 0)
	duration("compact-hash-check-time", time.Minute)
	integer("compaction-batch-limit", 0)
	duration("compaction-sleep-interval", 0)
	duration("downgrade-check-time", 5*time.Second)
	duration("warning-apply-duration", 100*time.Millisecond)
	number("bootstrap-defrag-threshold-megabytes", 0)
	boolean("unsafe-no-fsync", false)

	// Experimental in 3.5 and 3.6, feature gates since: kubeadm's older manifests still give them.
	for _, name := range []string{"experimental-initial-corrupt-check", "experimental-compact-hash-check-enabled",
		"experimental-enable-lease-checkpoint", "experimental-enable-lease-checkpoint-persist",
		"experimental-stop-grpc-service-on-defrag"} {
		boolean(name, false)
	}
	boolean("experimental-txn-mode-write-with-shared-buffer", true)

	// Flags of etcd 2 that etcd still accepts without a word (server/v3/etcdmain: ignored).
	for _, name := range []string{"cluster-active-size", "cluster-remove-delay", "cluster-sync-interval", "config", "force",
		"max-result-buffer", "max-retry-attempts", "peer-heartbeat-interval", "peer-election-timeout", "retry-interval",
		"snapshot", "v", "vv", "test.coverprofile", "test.outputdir"} {
		custom(name, new(anything))
		fs.Lookup(name).NoOptDefVal = "true"
	}
}

// noteIneffective leaves a warning for each such flag that asks for something other than its default.
func noteIneffective(fs *pflag.FlagSet, c *config) {
	fs.Visit(func(f *pflag.Flag) {
		if _, ok := f.Annotations[ineffective]; ok && f.Value.String() != f.DefValue {
			c.note(fmt.Sprintf("flag --%s has no effect yet in this storage mode", f.Name), "flag", f.Name)
		}
	})
}

// choice is a flag with a fixed set of values.
type choice struct {
	value string
	of    []string
}

func (v *choice) String() string { return v.value }
func (v *choice) Type() string   { return "string" }
func (v *choice) Set(s string) error {
	if !slices.Contains(v.of, s) {
		return fmt.Errorf("%q is not one of %s", s, strings.Join(v.of, ", "))
	}
	v.value = s
	return nil
}

// anything takes whatever it is given.
type anything struct{}

func (*anything) String() string   { return "" }
func (*anything) Type() string     { return "bool" }
func (*anything) Set(string) error { return nil }

// featureGates is --feature-gates: Name=true,Name=false. The names are those of etcd 3.7
// (server/v3/features), and those of etcd 3.6 that 3.7 dropped are refused as etcd refuses them.
type featureGates struct{ value string }

var knownFeatureGates = []string{
	"AllAlpha", "AllBeta", "CompactHashCheck", "FastLeaseKeepAlive", "InitialCorruptCheck", "LeaseCheckpoint",
	"LeaseCheckpointPersist", "PriorityRequest", "SetMemberLocalAddr", "StopGRPCServiceOnDefrag",
	"TxnModeWriteWithSharedBuffer",
}

func (g *featureGates) String() string { return g.value }
func (g *featureGates) Type() string   { return "list" }
func (g *featureGates) Set(s string) error {
	for _, entry := range strings.Split(s, ",") {
		if entry = strings.TrimSpace(entry); entry == "" {
			continue
		}
		name, value, ok := strings.Cut(entry, "=")
		if !ok {
			return fmt.Errorf("missing bool value for %s; write %s=true or %s=false", name, name, name)
		}
		if v := strings.ToLower(strings.TrimSpace(value)); !slices.Contains([]string{"true", "false", "1", "0", "t", "f"}, v) {
			return fmt.Errorf("invalid value of %s: %q; use true or false", name, value)
		}
		if !slices.Contains(knownFeatureGates, strings.TrimSpace(name)) {
			return fmt.Errorf("unrecognized feature gate: %s", name)
		}
	}
	g.value = s
	return nil
}
