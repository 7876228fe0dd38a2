package sqlraft

import (
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/quire-db/quire/backend"
)

// Options say who a member is and how it behaves. Tick, ElectionTicks, CatchUpEntries and SnapshotEntries have etcd's
// defaults where they are 0.
type Options struct {
	// Dir holds the raft log; one process at a time may have it open, which the caller sees to.
	Dir string
	// InstallPath is where StateMachine.Install finds a copy of the state: backend.DB.InstallPath.
	InstallPath string

	ID         uint64
	Name       string   // published to the others, as are
	ClientURLs []string // these
	// Membership is that of a new cluster, or, when Joining one, what is known of it for a start; see Bootstrap. It means
	// nothing to a member that has a log.
	Membership backend.Membership
	Joining    bool
	// Lost: the others know this member, although it has nothing any more. It asks them to let it in again.
	Lost bool
	// ForceNewCluster takes all others out of the cluster, and drops what is not known to be committed.
	ForceNewCluster bool

	Tick          time.Duration // between heartbeats
	ElectionTicks int
	// InitialElectionTickAdvance shortens the first wait for a leader, once a majority is connected.
	InitialElectionTickAdvance bool
	PreVote                    bool

	// ReadTimeout is how long a connection to another member may be silent before it counts as lost; 0: 5 s.
	ReadTimeout time.Duration

	// CatchUpEntries are kept in memory for followers that lag, at most catchUpBytes of them; one
	// that is farther behind gets a copy of the state. Files of the log are removed after SnapshotEntries at the earliest.
	CatchUpEntries  int
	SnapshotEntries uint64

	MaxLearners         int
	StrictReconfigCheck bool

	// Listeners are those of the peer URLs; Open takes them, also when it fails.
	Listeners []net.Listener
	ClientTLS func() *tls.Config              // for each connection to an https or unixs peer; nil: there are none
	LocalAddr net.IP                          // that connections to peers come from; nil: the system's choice
	Server    func(http.Handler) *http.Server // makes the peer port's server; nil: a plain one
	Version   func() []byte                   // what GET /version answers on the peer port; nil: not found

	// Compare says what is compared with other members.
	Compare CompareOptions
	// Broken gives an error when the state machine cannot go on and there is no entry for it to say so; nil: never.
	Broken <-chan error

	Hooks Hooks
}

const catchUpBytes = 128 << 20

// Hooks tell what happens. Each may be nil, must return soon, and must not call the Node.
type Hooks struct {
	// Raft is what Raft itself says. Without RaftInfo nothing below warnings is put into words.
	Raft, RaftInfo func(message string)
	// LeaderChanged: another leader or term, or none.
	LeaderChanged func(Status)
	// MembersChanged is called with what is applied.
	MembersChanged func(backend.Membership)
	// Published: the others know Name and ClientURLs, or err is why not yet.
	Published func(err error)
	// LogSynced tells how long a sync of the log took, LogWritten the writing before it.
	LogSynced  func(took time.Duration)
	LogWritten func(bytes int, took time.Duration)

	// SnapshotMade: a copy of the state was made for others, or err. SnapshotFetching is told how many bytes of the copy of
	// another member are here, often; SnapshotFetched that it is here, or err. Installed: it is the state now.
	//
	// SnapshotBegun comes before SnapshotFetched. SnapshotInstalling is called with 1 when an installation begins and with -1
	// when it has ended, however. SnapshotServed: another member has fetched the copy, or what it lacked of it, or err;
	// SnapshotServing comes before it.
	SnapshotMade      func(index uint64, size int64, took time.Duration, err error)
	SnapshotFetching  func(from uint64, done, total int64)
	SnapshotFetched   func(from, index uint64, err error)
	SnapshotInstalled func(index uint64, took time.Duration)

	SnapshotBegun      func(from uint64)
	SnapshotInstalling func(n int)
	SnapshotServing    func(to uint64)
	SnapshotServed     func(to uint64, took time.Duration, err error)

	// Compared is told of each check of the history that this leader has made; with err it was not finished. Differs is told of
	// every part that was not the same on all members: see Difference.
	Compared func(done Comparison, err error)
	Differs  func(Difference)

	// Lost: the log misses what this member has acknowledged; it takes part in nothing until it was let in again.
	// Readmitted: it was, or err is why not yet.
	Lost       func()
	Readmitted func(err error)

	// Peer*: see the connections to other members. PeerRefuses: that member does not let this one in.
	PeerConnected func(id uint64)
	PeerLost      func(id uint64, err error)
	PeerUnreached func(id uint64, url string, err error)
	PeerRejected  func(remote string, from uint64, err error)
	PeerRefuses   func(id uint64, err error)
	PeerDropped   func(id uint64, packets int)
	PeerSent      func(id uint64, bytes int)
	PeerReceived  func(id uint64, bytes int)
	PeerRoundTrip func(id uint64, took time.Duration)
}

func (h *Hooks) fill() {
	if h.LeaderChanged == nil {
		h.LeaderChanged = func(Status) {}
	}
	if h.MembersChanged == nil {
		h.MembersChanged = func(backend.Membership) {}
	}
	if h.Published == nil {
		h.Published = func(error) {}
	}
	if h.LogSynced == nil {
		h.LogSynced = func(time.Duration) {}
	}
	if h.LogWritten == nil {
		h.LogWritten = func(int, time.Duration) {}
	}
	if h.SnapshotBegun == nil {
		h.SnapshotBegun = func(uint64) {}
	}
	if h.SnapshotInstalling == nil {
		h.SnapshotInstalling = func(int) {}
	}
	if h.SnapshotServing == nil {
		h.SnapshotServing = func(uint64) {}
	}
	if h.SnapshotServed == nil {
		h.SnapshotServed = func(uint64, time.Duration, error) {}
	}
	if h.SnapshotMade == nil {
		h.SnapshotMade = func(uint64, int64, time.Duration, error) {}
	}
	if h.SnapshotFetching == nil {
		h.SnapshotFetching = func(uint64, int64, int64) {}
	}
	if h.SnapshotFetched == nil {
		h.SnapshotFetched = func(uint64, uint64, error) {}
	}
	if h.SnapshotInstalled == nil {
		h.SnapshotInstalled = func(uint64, time.Duration) {}
	}
	if h.Compared == nil {
		h.Compared = func(Comparison, error) {}
	}
	if h.Differs == nil {
		h.Differs = func(Difference) {}
	}
	if h.Lost == nil {
		h.Lost = func() {}
	}
	if h.Readmitted == nil {
		h.Readmitted = func(error) {}
	}
	if h.PeerUnreached == nil {
		h.PeerUnreached = func(uint64, string, error) {}
	}
	if h.PeerConnected == nil {
		h.PeerConnected = func(uint64) {}
	}
	if h.PeerRefuses == nil {
		h.PeerRefuses = func(uint64, error) {}
	}
}

// fill checks the options and puts defaults in.
func (o *Options) fill() error {
	o.Tick = cmp.Or(o.Tick, 100*time.Millisecond)
	o.ElectionTicks = cmp.Or(o.ElectionTicks, 10)
	o.CatchUpEntries = cmp.Or(o.CatchUpEntries, 5000)
	o.SnapshotEntries = cmp.Or(o.SnapshotEntries, 10000)
	switch {
	case o.Dir == "" || o.InstallPath == "":
		return errors.New("sqlraft: Dir and InstallPath must be set")
	case o.ID == 0:
		return errors.New("sqlraft: a member's id must not be 0")
	case o.ElectionTicks < 2:
		return fmt.Errorf("sqlraft: an election timeout of %d heartbeats is too short", o.ElectionTicks)
	}
	o.Hooks.fill()
	return nil
}

// electionTimeout is how long a follower waits for a heartbeat, at least.
func (o *Options) electionTimeout() time.Duration { return time.Duration(o.ElectionTicks) * o.Tick }

// requestTimeout is etcd's: for queueing and the disk, and for two elections.
func (o *Options) requestTimeout() time.Duration { return 5*time.Second + 2*o.electionTimeout() }

// ticks is how many ticks a time takes, at least.
func (o *Options) ticks(d time.Duration) uint64 { return uint64((d + o.Tick - 1) / o.Tick) }
