package main

import (
	"fmt"
	"slices"
	"strconv"
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
	const usage = "Known from etcd; has no effect."
	mark := func(name string) { fs.Lookup(name).Annotations = map[string][]string{ineffective: nil} }
	str := func(name, value string) { fs.String(name, value, usage); mark(name) }
	boolean := func(name string, value bool) { fs.Bool(name, value, usage); mark(name) }
	number := func(name string, value uint64) { fs.Uint64(name, value, usage); mark(name) }
	integer := func(name string, value int) { fs.Int(name, value, usage); mark(name) }
	duration := func(name string, value time.Duration) { fs.Duration(name, value, usage); mark(name) }
	custom := func(name string, v pflag.Value) { fs.Var(v, name, usage); mark(name) }

	// Member.
	number("max-snapshots", 5)
	number("max-wals", 5)
	custom("backend-bbolt-freelist-type", &choice{value: new("map"), of: []string{"array", "map"}})
	duration("backend-batch-interval", 0)
	integer("backend-batch-limit", 0)
	duration("raft-write-timeout", 5*time.Second)
	boolean("memory-mlock", false)
	fs.Var(&c.gates, "feature-gates", "Comma-separated Name=true or Name=false; InitialCorruptCheck, CompactHashCheck and SetMemberLocalAddr have an effect.")

	// Clustering.
	custom("discovery-fallback", &choice{value: new("exit"), of: []string{"exit"}})
	custom("v2-deprecation", &choice{value: new(v2Deprecation), of: []string{"write-only", "write-only-skip-check", "write-only-drop-data", "gone"}})

	// Security.
	str("client-cert-file", "")
	str("client-key-file", "")

	// Features.
	duration("downgrade-check-time", 5*time.Second)
	boolean("unsafe-no-fsync", false)

	// Experimental in 3.5 and 3.6, feature gates since: kubeadm's older manifests still give them.
	for _, name := range []string{"experimental-enable-lease-checkpoint", "experimental-enable-lease-checkpoint-persist",
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

// v2Deprecation is what --v2-deprecation always is in etcd 3.7, whatever was asked for. quire has no store of etcd 2.
const v2Deprecation = "write-only"

// deprecated are the flags that etcd ignores and warns of (server/v3/etcdmain: deprecatedFlags). Its words, which its tests wait for.
var deprecated = map[string]string{
	"max-snapshots":  "--max-snapshots is deprecated in 3.6 and will be decommissioned in 3.8.",
	"v2-deprecation": "--v2-deprecation is deprecated and scheduled for removal in v3.8. The default value is enforced, ignoring user input.",
}

// noteIneffective leaves a warning for each such flag that asks for something other than its default.
func noteIneffective(fs *pflag.FlagSet, c *config) {
	fs.Visit(func(f *pflag.Flag) {
		if message, ok := deprecated[f.Name]; ok {
			c.note(message, "flag", f.Name)
			return
		}
		if f.Value.String() == f.DefValue {
			return
		}
		if _, ok := f.Annotations[ineffective]; ok {
			c.note(fmt.Sprintf("flag --%s has no effect", f.Name), "flag", f.Name)
		}
		if _, ok := f.Annotations[clusterOnly]; ok && c.Kind != storageRaft {
			c.note(fmt.Sprintf("flag --%s has no effect: this is no member of a cluster", f.Name), "flag", f.Name)
		}
	})
	// What LeaseCheckpoint… ask for is always so.
	for _, name := range c.gates.without("InitialCorruptCheck", "CompactHashCheck", "SetMemberLocalAddr", "LeaseCheckpoint", "LeaseCheckpointPersist") {
		c.note("feature gate has no effect", "feature-gate", name)
	}
}

// choice is a flag with a fixed set of values.
type choice struct {
	value *string
	of    []string
}

func (v *choice) String() string { return *v.value }
func (v *choice) Type() string   { return "string" }
func (v *choice) Set(s string) error {
	if !slices.Contains(v.of, s) {
		return fmt.Errorf("invalid value %q; it may be %s", s, strings.Join(v.of, ", "))
	}
	*v.value = s
	return nil
}

// anything takes whatever it is given.
type anything struct{}

func (*anything) String() string   { return "" }
func (*anything) Type() string     { return "bool" }
func (*anything) Set(string) error { return nil }

// featureGates is --feature-gates: Name=true,Name=false. The names are those of etcd 3.7
// (server/v3/features), and those of etcd 3.6 that 3.7 dropped are refused as etcd refuses them.
type featureGates struct {
	text string
	set  map[string]bool
}

// knownFeatureGates, with their defaults.
var knownFeatureGates = map[string]bool{
	"AllAlpha": false, "AllBeta": false, "CompactHashCheck": false, "FastLeaseKeepAlive": true, "InitialCorruptCheck": false,
	"LeaseCheckpoint": false, "LeaseCheckpointPersist": false, "PriorityRequest": false, "SetMemberLocalAddr": false,
	"StopGRPCServiceOnDefrag": false, "TxnModeWriteWithSharedBuffer": true,
}

func (g *featureGates) String() string { return g.text }
func (g *featureGates) Type() string   { return "list" }
func (g *featureGates) Set(s string) error {
	set := map[string]bool{}
	for entry := range strings.SplitSeq(s, ",") {
		if entry = strings.TrimSpace(entry); entry == "" {
			continue
		}
		name, value, ok := strings.Cut(entry, "=")
		if !ok {
			return fmt.Errorf("missing bool value for %s; write %s=true or %s=false", name, name, name)
		}
		on, err := strconv.ParseBool(strings.ToLower(strings.TrimSpace(value)))
		if err != nil {
			return fmt.Errorf("invalid value of %s: %q; use true or false", name, value)
		}
		name = strings.TrimSpace(name)
		if _, ok := knownFeatureGates[name]; !ok {
			return fmt.Errorf("unrecognized feature gate: %s", name)
		}
		set[name] = on
	}
	g.text, g.set = s, set
	return nil
}

// tell hands every gate, with etcd's word for its stage, to report.
func (g *featureGates) tell(report func(name, stage string, on bool)) {
	for name, byDefault := range knownFeatureGates {
		stage, on := "ALPHA", byDefault
		if byDefault || name == "AllBeta" {
			stage = "BETA"
		}
		if set, ok := g.set[name]; ok {
			on = set
		} else if all, ok := g.set["All"+stage[:1]+strings.ToLower(stage[1:])]; ok {
			on = all
		}
		report(name, stage, on)
	}
}

// enabled is for gates in their alpha stage, for which AllAlpha speaks where they are not named.
func (g *featureGates) enabled(name string) bool {
	if on, ok := g.set[name]; ok {
		return on
	}
	return g.set["AllAlpha"]
}

// without are the gates that differ from their defaults, but for those named.
func (g *featureGates) without(names ...string) []string {
	var others []string
	for name, on := range g.set {
		if on != knownFeatureGates[name] && !slices.Contains(names, name) {
			others = append(others, name)
		}
	}
	slices.Sort(others)
	return others
}
