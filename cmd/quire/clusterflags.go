package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3discovery"
)

// The values of --initial-cluster-state.
const (
	stateNew      = "new"
	stateExisting = "existing"
)

// maxElectionTimeout is etcd's (server/v3/embed: maxElectionMs), in milliseconds.
const maxElectionTimeout = 50000

// clusterFlags are those that mean something to a member of a cluster alone.
type clusterFlags struct {
	ListenPeerURLs urlList
	WALDir         string
	State          string // --initial-cluster-state
	DiscoverySRV   string
	SRVName        string
	Discovery      *v3discovery.DiscoveryConfig // without endpoints: none
	ForceNew       bool

	Heartbeat, ElectionTimeout uint // ms
	ReadTimeout                time.Duration
	ElectionTickAdvance        bool
	SnapshotCount              uint64
	CatchUpEntries             uint64
	PreVote                    bool
	StrictReconfigCheck        bool
	MaxLearners                int

	TLS peerTLSFlags

	CorruptCheckTime     time.Duration // 0: never
	CompactHashCheckTime time.Duration
	InitialCorruptCheck  bool
	CompactHashCheck     bool
	SetMemberLocalAddr   bool

	// given are the flags that only the first start of a member reads, as far as the operator has set them.
	given []string
}

// firstStartFlags are read until a member is initialized, and ignored from then on, as in etcd.
var firstStartFlags = []string{
	"initial-cluster", "initial-cluster-state", "initial-cluster-token", "initial-advertise-peer-urls", "discovery-srv", "discovery-srv-name",
	"discovery-endpoints", "discovery-token",
}

func addClusterFlags(fs *pflag.FlagSet, c *config) {
	f := &c.Cluster
	if err := f.ListenPeerURLs.Set(defaultListenPeerURLs); err != nil {
		panic(fmt.Sprintf("default of --listen-peer-urls is not valid: %v", err))
	}
	fs.Var(&f.ListenPeerURLs, "listen-peer-urls", "Comma-separated URLs to listen on for other members: http, https, unix or unixs.")
	fs.StringVar(&f.WALDir, "wal-dir", "", "Directory for the Raft log, on a disk of its own perhaps (default: the data directory).")
	f.State = stateNew
	fs.Var(&choice{value: &f.State, of: []string{stateNew, stateExisting}}, "initial-cluster-state", "new, or existing to join a cluster that has added this member.")
	fs.StringVar(&f.DiscoverySRV, "discovery-srv", "", "DNS domain whose SRV records name the members of the cluster.")
	fs.StringVar(&f.SRVName, "discovery-srv-name", "", "Suffix of the SRV service names: _etcd-server-<name>._tcp.")
	f.Discovery = newDiscovery(fs)
	fs.BoolVar(&f.ForceNew, "force-new-cluster", false, "Make this member, with the data it has, the only one of its cluster.")

	fs.UintVar(&f.Heartbeat, "heartbeat-interval", 100, "How often the leader tells the other members that it is there, in milliseconds.")
	fs.UintVar(&f.ElectionTimeout, "election-timeout", 1000, "How long without a leader until members elect one, in milliseconds; the same on all members.")
	fs.DurationVar(&f.ReadTimeout, "raft-read-timeout", 5*time.Second, "How long a connection to another member may be silent before it counts as lost, 5s at least.")
	fs.BoolVar(&f.ElectionTickAdvance, "initial-election-tick-advance", true, "Let a member that starts wait for less than a whole election timeout.")
	fs.Uint64Var(&f.SnapshotCount, "snapshot-count", 10000, "Entries applied between two attempts to shorten the Raft log.")
	fs.Uint64Var(&f.CatchUpEntries, "snapshot-catchup-entries", 5000, "Applied entries kept in the Raft log for members that are behind; those that are farther behind get a snapshot.")
	fs.BoolVar(&f.PreVote, "pre-vote", true, "Ask before an election whether it could be won, so that a member that was cut off does not disturb the others.")
	fs.BoolVar(&f.StrictReconfigCheck, "strict-reconfig-check", true, "Refuse changes of the membership that could cost the quorum.")
	fs.IntVar(&f.MaxLearners, "max-learners", 1, "How many learners a cluster may have.")

	// etcd compares only when asked to; a difference between members is what nobody may find out too late.
	fs.DurationVar(&f.CorruptCheckTime, "corrupt-check-time", time.Minute, "How often the leader compares a part of all members' data by hashes (0: never).")
	fs.DurationVar(&f.CompactHashCheckTime, "compact-hash-check-time", time.Minute, "The same, in addition, with the feature gate CompactHashCheck.")
	// Feature gates by the names that they had up to etcd 3.6; kubeadm's older manifests still give them.
	fs.BoolVar(&f.InitialCorruptCheck, "experimental-initial-corrupt-check", false, "Same as the feature gate InitialCorruptCheck.")
	fs.BoolVar(&f.CompactHashCheck, "experimental-compact-hash-check-enabled", false, "Same as the feature gate CompactHashCheck.")

	addPeerTLSFlags(fs, &f.TLS)

	fs.VisitAll(func(flag *pflag.Flag) {
		if slices.Contains(clusterOnlyFlags, flag.Name) || strings.HasPrefix(flag.Name, "peer-") {
			flag.Annotations = map[string][]string{clusterOnly: nil}
		}
	})
}

var clusterOnlyFlags = []string{
	"listen-peer-urls", "wal-dir", "raft-read-timeout", "force-new-cluster", "initial-election-tick-advance", "snapshot-count", "snapshot-catchup-entries", "pre-vote",
	"strict-reconfig-check", "max-learners", "corrupt-check-time", "compact-hash-check-time",
}

// clusterOnly marks, as a pflag annotation, flags that only a member of a cluster acts on.
const clusterOnly = "quire-cluster"

// check is the part of etcd's Config.Validate about clusters, with its texts and in its order.
func (f *clusterFlags) check(fs *pflag.FlagSet, gates *featureGates) error {
	ways := 0
	for _, chosen := range []bool{fs.Changed("initial-cluster"), f.DiscoverySRV != "", len(f.Discovery.Endpoints) > 0} {
		if chosen {
			ways++
		}
	}
	if ways > 1 {
		return errors.New(`multiple discovery or bootstrap flags are set. Choose one of "initial-cluster", "discovery-endpoints" or "discovery-srv"`)
	}
	if err := checkDiscovery(f.Discovery); err != nil {
		return err
	}
	switch {
	case f.Heartbeat == 0:
		return fmt.Errorf("--heartbeat-interval must be >0 (set to %dms)", f.Heartbeat)
	case f.ElectionTimeout == 0:
		return fmt.Errorf("--election-timeout must be >0 (set to %dms)", f.ElectionTimeout)
	case 5*f.Heartbeat > f.ElectionTimeout:
		return fmt.Errorf("--election-timeout[%vms] should be at least as 5 times as --heartbeat-interval[%vms]", f.ElectionTimeout, f.Heartbeat)
	case f.ElectionTimeout > maxElectionTimeout:
		return fmt.Errorf("--election-timeout[%vms] is too long, and should be set less than %vms", f.ElectionTimeout, maxElectionTimeout)
	case gates.enabled("LeaseCheckpointPersist") && !gates.enabled("LeaseCheckpoint"):
		return errors.New("enabling feature gate LeaseCheckpointPersist requires enabling feature gate LeaseCheckpoint")
	case f.CompactHashCheckTime <= 0:
		return fmt.Errorf("--compact-hash-check-time must be >0 (set to %v)", f.CompactHashCheckTime)
	case f.CorruptCheckTime < 0:
		return fmt.Errorf("--corrupt-check-time must not be negative (set to %v); 0 switches it off", f.CorruptCheckTime)
	case f.MaxLearners < 0:
		return fmt.Errorf("--max-learners must not be negative (set to %d)", f.MaxLearners)
	}
	f.InitialCorruptCheck = f.InitialCorruptCheck || gates.enabled("InitialCorruptCheck")
	f.CompactHashCheck = f.CompactHashCheck || gates.enabled("CompactHashCheck")
	f.SetMemberLocalAddr = gates.enabled("SetMemberLocalAddr")
	for _, name := range firstStartFlags {
		if fs.Changed(name) {
			f.given = append(f.given, "--"+name)
		}
	}
	return nil
}

// electionTimeout is in whole heartbeats, as in etcd.
func (f *clusterFlags) electionTimeout() time.Duration {
	return time.Duration(f.electionTicks()) * f.heartbeat()
}

func (f *clusterFlags) electionTicks() int { return int(f.ElectionTimeout / f.Heartbeat) }

func (f *clusterFlags) heartbeat() time.Duration {
	return time.Duration(f.Heartbeat) * time.Millisecond
}

// minLeaseTTL, in seconds, is etcd's: a lease must outlive an election (server/v3/etcdserver: NewServer, minTTL).
func (f *clusterFlags) minLeaseTTL() int64 {
	d := time.Duration(3*f.electionTicks()/2) * f.heartbeat()
	return int64((d + time.Second - 1) / time.Second)
}

// storageKind is where the data is, and who orders the writes.
type storageKind int

const (
	storageSQLite   storageKind = iota // this process alone
	storageRaft                        // the members of a cluster, this one among them
	storagePostgres                    // the database
)

func (k storageKind) String() string {
	return [...]string{"sqlite", "sqlraft", "postgres"}[k]
}

// raftDir holds what a member of a cluster keeps beside its database; leftDir is what becomes of it when the member leaves.
func (c *config) raftDir() string { return filepath.Join(cmp.Or(c.Cluster.WALDir, c.DataDir), "raft") }
func (c *config) leftDir() string { return c.raftDir() + ".left" }

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// chooseStorage decides on the storage: what --storage says; else that of a cluster, if flags speak of one or the data
// directory is that of a member; else one SQLite file.
func (c *config) chooseStorage(fs *pflag.FlagSet) error {
	scheme, _, _ := strings.Cut(c.Storage, "://")
	member := exists(c.raftDir()) || exists(c.leftDir())
	clustered := fs.Changed("initial-cluster") || c.Cluster.State == stateExisting || c.Cluster.discovers() || c.Cluster.ForceNew
	switch {
	case exists(c.leftDir()) && !exists(c.raftDir()) && !(c.Storage != "" && c.Cluster.ForceNew):
		return fmt.Errorf("this member was leaving its cluster (%s) when it was interrupted: start it once more with --storage sqlite://PATH --force-new-cluster", c.leftDir())
	case scheme == "sqlraft":
		c.Kind = storageRaft
	case scheme == "postgres" || scheme == "postgresql":
		c.Kind = storagePostgres
		return c.refuseCluster("all processes on one Postgres database are equals already: give each the same --storage and no --initial-cluster")
	case c.Storage != "" && member && c.Cluster.ForceNew:
		c.Leave = true
	case c.Storage != "" && member:
		return fmt.Errorf("--data-dir %s is that of a member of a cluster (raft/), whose writes must go through its log; leave --storage out, or, if it is to leave its cluster and to be a plain SQLite database again, add --force-new-cluster once", c.DataDir)
	case c.Storage != "":
		c.Kind = storageSQLite
		return c.refuseCluster("leave --storage out, or write sqlraft:///path instead; the file becomes that of the first member")
	case clustered || member:
		c.Kind = storageRaft
		c.MustBeMember = !clustered
	}
	return nil
}

// refuseCluster is for storages that are no member's: whoever asks for a cluster must not believe to have one. A cluster
// of this member alone is what they are.
func (c *config) refuseCluster(instead string) error {
	switch {
	case len(c.initialNames()) > 1:
		return fmt.Errorf("--initial-cluster %q names other members, with which a %s storage shares nothing; %s", c.InitialCluster, c.Kind, instead)
	case c.Cluster.State == stateExisting:
		return fmt.Errorf("--initial-cluster-state=%s: a %s storage cannot join a cluster; %s", stateExisting, c.Kind, instead)
	case c.Cluster.DiscoverySRV != "":
		return fmt.Errorf("--discovery-srv: a %s storage is no member of a cluster; %s", c.Kind, instead)
	case c.Cluster.discovers():
		return fmt.Errorf("--discovery-endpoints: a %s storage is no member of a cluster; %s", c.Kind, instead)
	}
	return nil
}

// discovers tells whether the members of the cluster are to be found elsewhere than in --initial-cluster.
func (f *clusterFlags) discovers() bool {
	return f.DiscoverySRV != "" || len(f.Discovery.Endpoints) > 0
}

// initialNames are the different names in --initial-cluster.
func (c *config) initialNames() []string {
	var names []string
	for entry := range strings.SplitSeq(c.InitialCluster, ",") {
		if name, _, ok := strings.Cut(strings.TrimSpace(entry), "="); ok && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}
