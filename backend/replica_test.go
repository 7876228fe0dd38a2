package backend

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/protobuf/proto"
)

// loopback is the log of a cluster of one member. It keeps nothing: what was applied is in the database.
type loopback struct {
	db          *DB
	index, term uint64
	// keep is how long an entry takes until it is committed.
	keep time.Duration

	mu      sync.Mutex
	waiting []Proposal
	wake    chan struct{}
	asked   atomic.Int64 // ReadIndex
	entries atomic.Int64
}

// join makes a replica the leader of a cluster of its own.
func join(db *DB) (*loopback, error) {
	l := &loopback{db: db, wake: make(chan struct{}, 1)}
	l.index, l.term = db.Applied()
	l.index++
	l.term++
	if err := db.ApplyMembers(l.index, l.term, nil); err != nil {
		return nil, err
	}
	db.Join(l)
	db.Lead(l.term)
	go l.run()
	return l, nil
}

// openLoopback is OpenSQLite for a cluster of one.
func openLoopback(ctx context.Context, path string, o Options) (*DB, error) {
	db, err := OpenReplica(ctx, path, o)
	if err != nil {
		return nil, err
	}
	if _, err := join(db); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return db, nil
}

func (l *loopback) Propose(payload []byte, t Ticket) {
	l.mu.Lock()
	l.waiting = append(l.waiting, Proposal{payload, t})
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

func (l *loopback) ReadIndex(context.Context) (uint64, error) {
	l.asked.Add(1)
	index, _ := l.db.Applied()
	return index, nil
}

func (l *loopback) run() {
	for {
		select {
		case <-l.wake:
		case <-l.db.ctx.Done():
			return
		}
		l.mu.Lock()
		proposals := l.waiting
		l.waiting = nil
		l.mu.Unlock()
		if len(proposals) == 0 {
			continue
		}
		if l.keep > 0 {
			time.Sleep(l.keep)
		}
		l.index++
		l.entries.Add(1)
		err := l.db.Apply([]Entry{{Index: l.index, Term: l.term, Stamp: l.db.Stamp(), Proposals: proposals}})
		if err != nil {
			for _, p := range proposals {
				p.Ticket.Fail(err)
			}
			return
		}
	}
}

// openReplicaTest opens a cluster of one that is closed, and checked as a whole, when the test ends.
func openReplicaTest(t *testing.T, path string, o Options) *DB {
	t.Helper()
	db, err := openLoopback(t.Context(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeAndCheck(t, db, path) })
	return db
}

// TestReplica runs what the store has to do in every mode with one whose writes go through a log.
func TestReplica(t *testing.T) {
	openStore = openLoopback
	defer func() { openStore = OpenSQLite }()
	for name, test := range map[string]func(*testing.T){
		"Model":                         TestModel,
		"ReadersDuringWrites":           TestReadersDuringWrites,
		"CompactionFreesMemory":         TestCompactionFreesMemory,
		"Quota":                         TestQuotaRaisesNoSpaceAndClearsIt,
		"LeaseIDs":                      TestALeaseIDThatIsTakenIsDrawnAgainButNotOneTheClientChose,
		"TxnWritesAKeyOnce":             TestTxnWritesAKeyOnce,
		"CorruptAlarmKeepsLeases":       TestCorruptAlarmKeepsLeases,
		"EventsDoNotPinValues":          TestEventsDoNotPinValues,
		"HeldViewKeepsNoOthers":         TestHeldViewKeepsNoOthers,
		"HistoryPages":                  TestHistoryPages,
		"RingOverflowByEvents":          TestRingOverflowByEvents,
		"RingOverflowByBytes":           TestRingOverflowByBytes,
		"HugeRevision":                  TestAHugeRevisionIsNeverSplit,
		"HistoryFromTheCompactRevision": TestHistoryFromTheCompactRevision,
		"CompactionDuringPagedReads":    TestCompactionDuringPagedReads,
		"ManyLeasesDueAtOnce":           TestManyLeasesDueAtOnce,
		"KeepAliveOrExpiry":             TestKeepAliveOrExpiry,
		"RangeAgainstTheNaiveRule":      TestRangeAgainstTheNaiveRule,
	} {
		t.Run(name, test)
	}
}

// TestReplicaOfADatabase: a file that was not a member's keeps everything; and a member's is not opened as if it were alone.
func TestReplicaOfADatabase(t *testing.T) {
	path := testPath(t)
	db, err := OpenSQLite(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		mustPut(t, db, fmt.Sprintf("k%d", i%7), fmt.Sprint(i))
	}
	want := contents(t, db)
	closeAndCheck(t, db, path)

	replica, err := OpenReplica(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if index, term := replica.Applied(); index != 0 || term != 0 || replica.Durable() != 0 {
		t.Errorf("applied %d in term %d, durable %d: the log has said nothing yet", index, term, replica.Durable())
	}
	mustEqual(t, "as a replica", contents(t, replica), want)
	if _, err := replica.Write(t.Context(), Command{Request: putReq("k", "v")}); !errors.Is(err, ErrUnavailable) {
		t.Errorf("a write before Join: %v", err)
	}
	if err := replica.Ready(t.Context(), false); !errors.Is(err, ErrUnavailable) {
		t.Errorf("a linearizable read before Join: %v", err)
	}
	closeAndCheck(t, replica, path)
	if db, err = OpenSQLite(t.Context(), path, Options{}); err != nil {
		t.Fatalf("nothing of a log was applied to it, but: %v", err)
	}
	closeAndCheck(t, db, path)

	if replica, err = openLoopback(t.Context(), path, Options{}); err != nil {
		t.Fatal(err)
	}
	if rev := mustPut(t, replica, "k", "v"); rev != 22 {
		t.Errorf("the first write has revision %d, want 22", rev)
	}
	closeAndCheck(t, replica, path)
	if _, err := OpenSQLite(t.Context(), path, Options{}); err == nil {
		t.Error("a member's database was opened as if it were alone")
	} else {
		t.Log(err)
	}
}

// TestReplicaLeaves: what a member has becomes a database of its own, with everything as it was.
func TestReplicaLeaves(t *testing.T) {
	path := testPath(t)
	db, err := openLoopback(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		mustPut(t, db, fmt.Sprintf("k%d", i%7), fmt.Sprint(i))
	}
	hurry(db, time.Hour)
	grantAll(t, db, 1000, 7)
	if err := db.ApplyMembers(db.st.replica.index+1, 1, &Membership{ClusterID: 7, Members: []Member{{ID: 9}}}); err != nil {
		t.Fatal(err)
	}
	applied, revision := db.Stats().AppliedIndex, db.Revision()
	mustDo(t, db.Leave())
	if _, err := db.Write(t.Context(), Command{Request: putReq("k", "v")}); !errors.Is(err, ErrUnavailable) {
		t.Errorf("a write afterwards: %v", err)
	}
	closeAndCheck(t, db, path)
	alone, err := OpenSQLite(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if s, ok := alone.Lease(7, true); !ok || s.TTL < 990 || s.TTL > 1000 || len(s.Keys) != 1 {
		t.Errorf("the lease: %v, %+v", ok, s)
	}
	if s := alone.Stats(); s.Revision != revision || s.AppliedIndex < applied {
		t.Errorf("at revision %d with %d applied, want %d and at least %d", s.Revision, s.AppliedIndex, revision, applied)
	}
	mustPut(t, alone, "k", "v")
	closeAndCheck(t, alone, path)
	if db, err = OpenReplica(t.Context(), path, Options{}); err != nil {
		t.Fatal(err)
	}
	if index, _ := db.Applied(); index != 0 || len(db.Members().Members) != 0 {
		t.Errorf("as a replica again: entry %d, members %v", index, db.Members())
	}
	closeAndCheck(t, db, path)
}

// tickets is a log that keeps the tickets of what is proposed.
type tickets struct{ ch chan Ticket }

func (l *tickets) Propose(_ []byte, t Ticket) { l.ch <- t }
func (l *tickets) ReadIndex(ctx context.Context) (uint64, error) {
	<-ctx.Done()
	return 0, ctx.Err()
}

// TestReplicaProposalsThatFail: everybody gets the log's error; who comes while the log does nothing is proposed all the
// same, so that his time runs too; who leaves is withdrawn if he was not proposed yet.
func TestReplicaProposalsThatFail(t *testing.T) {
	path := testPath(t)
	db, err := OpenReplica(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	l := &tickets{make(chan Ticket, 100)}
	db.Join(l)
	const writers = 20
	failed := make(chan error, writers)
	for range writers {
		go func() {
			_, err := db.Write(t.Context(), Command{Request: putReq("k", "v")})
			failed <- err
		}()
	}
	var all []*ticket
	for n := 0; n < writers; {
		tk := (<-l.ch).(*ticket) // of which none is answered so far
		n += len(tk.items)
		all = append(all, tk)
	}
	if len(all) > writers/2 {
		t.Errorf("%d writes that came together were proposed in %d parts", writers, len(all))
	}
	for _, tk := range all {
		tk.Fail(rpctypes.ErrGRPCNoLeader)
		tk.Fail(errors.New("twice")) // changes nothing
	}
	for range writers {
		if err := <-failed; !errors.Is(err, rpctypes.ErrGRPCNoLeader) {
			t.Errorf("a write got %v", err)
		}
	}
	// As many as may be on their way, and one more.
	ctx, cancel := context.WithCancel(t.Context())
	for range proposalsInFlight {
		go func() {
			_, err := db.Write(t.Context(), Command{Request: putReq("k", "v")})
			failed <- err
		}()
		<-l.ch
	}
	go func() {
		_, err := db.Write(ctx, Command{Request: putReq("k", "v")})
		failed <- err
	}()
	q := &db.replica.proposals
	for waiting := 0; waiting == 0; {
		q.mu.Lock()
		waiting = len(q.waiting)
		q.mu.Unlock()
	}
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Errorf("who has left got %v", err)
	}
	select {
	case <-l.ch:
		t.Error("a write was proposed that had been withdrawn")
	case <-time.After(2 * proposalPatience): // it would be by then
	}
	// Close answers those whose proposals nobody has answered.
	closeAndCheck(t, db, path)
	for range proposalsInFlight {
		if err := <-failed; !errors.Is(err, ErrClosed) {
			t.Errorf("a write that was on its way got %v", err)
		}
	}
}

// TestReplicaStatements is the trace of what an entry writes: what it changes, and the position in the log, in one
// transaction.
func TestReplicaStatements(t *testing.T) {
	db := openReplicaTest(t, testPath(t), Options{})
	mustPut(t, db, "k", "v")
	settled(t, db)
	apply := func(reqs ...proto.Message) func() {
		return func() {
			index, term := db.Applied()
			var entries []Entry
			for i, req := range reqs {
				payload, err := appendCommand([]byte{payloadVersion}, &pending{cmd: Command{Request: req}})
				if err != nil {
					t.Fatal(err)
				}
				entries = append(entries, Entry{Index: index + 1 + uint64(i), Term: term, Stamp: db.Stamp(), Proposals: []Proposal{{Payload: payload}}})
			}
			if err := db.Apply(entries); err != nil {
				t.Error(err)
			}
		}
	}
	members := func(m *Membership) func() {
		return func() {
			index, term := db.Applied()
			if err := db.ApplyMembers(index+1, term, m); err != nil {
				t.Error(err)
			}
		}
	}
	for _, c := range []struct {
		name string
		do   func()
		want string
	}{
		{"put", apply(putReq("k", "w")), "BEGIN IMMEDIATE; INSERT revisions; INSERT raft; COMMIT"},
		{"two entries", apply(putReq("k", "w"), putReq("l", "w")), "BEGIN IMMEDIATE; 2 × INSERT revisions; INSERT raft; COMMIT"},
		{"grant", apply(&pb.LeaseGrantRequest{ID: 7, TTL: 100}), "BEGIN IMMEDIATE; INSERT lease; INSERT raft; COMMIT"},
		{"what changes nothing", apply(&pb.LeaseRevokeRequest{ID: 99}), "BEGIN IMMEDIATE; INSERT raft; COMMIT"},
		{"a leader's first entry", members(nil), "BEGIN IMMEDIATE; INSERT raft; COMMIT"},
		{"another member", members(&Membership{Members: []Member{{ID: 1}, {ID: 2}}, Removed: []uint64{3}}),
			"BEGIN IMMEDIATE; DELETE member; 3 × INSERT member; INSERT raft; COMMIT"},
	} {
		if got := traced(t, db, c.do); got != c.want {
			t.Errorf("%s runs\n  %s\nwant\n  %s", c.name, got, c.want)
		}
	}
}
