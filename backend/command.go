package backend

import (
	"math"
	"os"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// Command is one write as a value: what goes through the commit queue (and, in a cluster, through the
// Raft log), and what apply turns into rows.
//
// Request is one of *pb.PutRequest, *pb.DeleteRangeRequest, *pb.TxnRequest, *pb.CompactionRequest,
// *pb.LeaseGrantRequest, *pb.LeaseRevokeRequest, *pb.LeaseKeepAliveRequest, *pb.AlarmRequest, of the requests of the
// Auth service those that change something, and *pb.InternalAuthenticateRequest, see assignToken.
// It belongs to the caller; apply reads it and does not change it.
type Command struct {
	Request proto.Message
	// Author is who asks: the authenticated user, else the common name of the client's certificate,
	// else empty. It is kept with every row.
	Author string
	// AuthRevision is that of a Caller whose Name is Author; 0: nobody was authenticated. See ByItself.
	AuthRevision uint64
}

// ByItself is the AuthRevision of what quire does by itself, and not for a client: nobody has to allow it.
const ByItself = math.MaxUint64

// expireLeases is the Command of the lease loop: revoke what is due at the time of the batch. That
// apply decides, and not the loop, is what makes a keepalive that came first win.
type expireLeases struct{}

// Options of a database. The zero value is a usable default.
type Options struct {
	// QuotaBytes bounds the bytes of keys and values (and a little for each row) of everything that
	// is not compacted. 0: etcd's default of 2 GiB; negative: no quota.
	QuotaBytes int64
	// ValueCacheBytes bounds the memory for resident values. 0: 256 MiB.
	ValueCacheBytes int64
	// MinLeaseTTL in seconds; a smaller TTL is raised to it, as etcd does. 0: 2, which is what an etcd
	// with default timers has (1.5 election timeouts, rounded up).
	MinLeaseTTL int64
	// MemberID stands in alarms that this process raises.
	MemberID uint64
	// TokenTTL is for how long a token of Authenticate is good that is not used. 0: 5 minutes.
	TokenTTL time.Duration
	// SnapshotDir is where EtcdSnapshot writes on Postgres; it is made if missing. Empty: os.TempDir().
	SnapshotDir string
	// CompactionBatch is how many rows a compaction deletes in one transaction. 0 or less: what takes about a millisecond.
	CompactionBatch int
	// CompactionPause is how long a compaction waits between two of these, at least.
	CompactionPause time.Duration
	// NoSpaceHold is how long the NOSPACE alarm stands after compaction has made room. 0: 10 s.
	NoSpaceHold time.Duration
	Hooks       Hooks
}

const (
	defaultQuotaBytes      = 2 << 30
	defaultValueCacheBytes = 256 << 20
	defaultMinLeaseTTL     = 2
	defaultNoSpaceHold     = 10 * time.Second
)

func (o Options) withDefaults() Options {
	if o.QuotaBytes == 0 {
		o.QuotaBytes = defaultQuotaBytes
	}
	if o.ValueCacheBytes == 0 {
		o.ValueCacheBytes = defaultValueCacheBytes
	}
	if o.MinLeaseTTL == 0 {
		o.MinLeaseTTL = defaultMinLeaseTTL
	}
	if o.NoSpaceHold == 0 {
		o.NoSpaceHold = defaultNoSpaceHold
	}
	if o.TokenTTL == 0 {
		o.TokenTTL = defaultTokenTTL
	}
	if o.SnapshotDir == "" {
		o.SnapshotDir = os.TempDir()
	}
	o.CompactionBatch = max(o.CompactionBatch, 0)
	return o
}

// Hooks report what happens to the outside: this package neither logs nor counts. Any may be nil.
// They are called from the commit path or from background loops, and must not block.
type Hooks struct {
	// LoadProgress is called while a database is opened, in rows.
	LoadProgress func(done, total int64)
	// BatchCommitted is called after each durable batch: how long apply took, how long the
	// transaction with its sync took, and both together with publishing.
	BatchCommitted func(commands, rows int, apply, sync, total time.Duration)
	// Applied is called after each durable batch, before its Commands are answered. a must not be kept.
	Applied func(a *Applied)
	// CompactionStep is called after each step of a compaction: so long nothing was written.
	CompactionStep func(took time.Duration)
	// CompactionDone is called when the rows that compaction at rev made unreachable are gone.
	CompactionDone func(rev, rows int64, took time.Duration)
	LeaseExpired   func(id int64)
	// Alarm is called for every alarm that is raised or cleared, and at the start for those that stand.
	Alarm func(a *pb.AlarmMember, raised bool)
	// StorageError is called when a batch or a background step could not be written,
	// StorageHealed when the next one could.
	StorageError  func(err error)
	StorageHealed func()
	// Failed is called, once, when a member of a cluster (OpenReplica) finds out elsewhere than in Apply that it cannot go
	// on: a reader or a background step has met damage (ErrDamaged), or a sync has failed. The process has to end.
	Failed func(err error)
}
