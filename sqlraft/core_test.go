package sqlraft

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

	"github.com/quire-db/quire/backend"
)

// coreTest drives one core by hand; its disk never fails and what it wants applied is done at once.
type coreTest struct {
	t         *testing.T
	c         *core
	random    uint64
	connected bool
	sent      []packet
	applied   []backend.Entry
	copies    struct{ wanted, released int } // how often
}

const (
	testElection = 10
	testRequest  = 70
)

// newCoreTest makes member 1 of three; all of them were founded together.
func newCoreTest(t *testing.T) *coreTest {
	s := &coreTest{t: t, connected: true}
	members := threeMembers()
	entries := foundingEntries(members)
	o := coreOptions{
		id: 1, storage: newStorage(1, 1, entries), members: members, applied: 4, electionTicks: testElection, preVote: true,
		requestTicks: testRequest, retryTicks: 5, catchUpEntries: 100, catchUpBytes: 1 << 20,
		stamp: func() []byte { return []byte("now") }, random: func() uint64 { s.random++; return s.random },
		connectedSince: func(uint64, uint64) bool { return s.connected }, logger: &raftLogger{},
	}
	o.storage.hardState = hardState{term: 1, commit: 4}.message()
	var err error
	if s.c, err = newCore(o); err != nil {
		t.Fatal(err)
	}
	return s
}

// work does what the core wants.
func (s *coreTest) work() {
	s.t.Helper()
	var out output
	for {
		more, err := s.c.ready(&out)
		if err != nil {
			s.t.Fatal(err)
		}
		if !more {
			return
		}
		s.sent = append(s.sent, out.before...)
		if out.makeSnapshot {
			s.copies.wanted++
		}
		if out.releaseSnapshot {
			s.copies.released++
		}
		if err := s.c.persisted(&out); err != nil {
			s.t.Fatal(err)
		}
		s.sent = append(s.sent, out.after...)
		for _, op := range out.apply {
			s.applied = append(s.applied, op.entries...)
			s.c.done(op.number)
		}
	}
}

func (s *coreTest) ticks(n int) {
	s.t.Helper()
	for range n {
		s.c.tick()
		s.work()
	}
}

func (s *coreTest) receive(from uint64, m *raftpb.Message) {
	s.t.Helper()
	m.From, m.To = new(from), new(uint64(1))
	s.c.receive(packet{from: from, to: 1, message: m})
	s.work()
}

// follow makes member 2 the leader of a term.
func (s *coreTest) follow(term uint64) {
	s.t.Helper()
	s.receive(2, &raftpb.Message{Type: raftpb.MsgApp.Enum(), Term: new(term), Index: new(s.c.storage.last()),
		LogTerm: new(s.c.storage.entries[len(s.c.storage.entries)-1].GetTerm()), Commit: new(s.c.hard.commit)})
	if s.c.lead != 2 || s.c.hard.term != term {
		s.t.Fatalf("%x leads term %d", s.c.lead, s.c.hard.term)
	}
}

// lead has this member elected.
func (s *coreTest) lead() {
	s.t.Helper()
	for !s.c.leading {
		s.ticks(1)
		for _, p := range s.take() {
			if m := p.message; p.to == 2 && (m.GetType() == raftpb.MsgPreVote || m.GetType() == raftpb.MsgVote) {
				answer := raftpb.MsgVoteResp
				if m.GetType() == raftpb.MsgPreVote {
					answer = raftpb.MsgPreVoteResp
				}
				s.receive(2, &raftpb.Message{Type: answer.Enum(), Term: m.Term})
			}
		}
	}
	s.acknowledge()
	if !s.c.queue.stamping {
		s.t.Fatal("the leader may not stamp")
	}
}

// acknowledge has member 2 write everything that this leader has.
func (s *coreTest) acknowledge() {
	s.t.Helper()
	s.receive(2, &raftpb.Message{Type: raftpb.MsgAppResp.Enum(), Term: new(s.c.hard.term), Index: new(s.c.storage.last())})
}

func (s *coreTest) take() []packet {
	sent := s.sent
	s.sent = nil
	return sent
}

// forwards are the numbers of the proposals in what was sent, packet by packet.
func (s *coreTest) forwards() (numbers []string) {
	for _, p := range s.take() {
		if p.forward != nil {
			numbers = append(numbers, fmt.Sprintf("%d+%d", p.forward.first, len(p.forward.proposals)))
		}
	}
	return numbers
}

type failTicket struct{ err error }

func (t *failTicket) Fail(err error) { t.err = err }

// TestErrorsOfProposalsThatWaitedTooLong are those that etcd would choose.
func TestErrorsOfProposalsThatWaitedTooLong(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(s *coreTest)
		want error
	}{
		{"there is no leader", func(*coreTest) {}, rpctypes.ErrGRPCTimeout},
		{"the leader does not answer", func(s *coreTest) {
			for range 20 {
				s.ticks(1)
				s.receive(2, &raftpb.Message{Type: raftpb.MsgHeartbeat.Enum(), Term: new(uint64(2))})
			}
		}, rpctypes.ErrGRPCTimeout},
		{"the leader cannot be reached", func(s *coreTest) { s.connected = false; s.follow(2) }, rpctypes.ErrGRPCTimeoutDueToConnectionLost},
		{"the leader was elected a moment later", func(s *coreTest) { s.ticks(1); s.follow(2) }, rpctypes.ErrGRPCTimeoutDueToLeaderFail},
		{"the leader was elected long after", func(s *coreTest) { s.ticks(3 * testElection); s.follow(2) }, rpctypes.ErrGRPCTimeout},
	} {
		s := newCoreTest(t)
		if c.want == rpctypes.ErrGRPCTimeout && c.name[4] == 'l' {
			s.follow(2)
		}
		ticket := new(failTicket)
		s.c.propose([]byte("x"), false, ticket)
		s.work()
		c.do(s)
		for i := s.c.now; i < testRequest; i++ {
			if ticket.err != nil && i < testRequest-1 {
				t.Errorf("%s: it fails in tick %d: %v", c.name, i, ticket.err)
				break
			}
			s.c.tick()
			if s.c.lead != 0 { // it lives
				s.receive(2, &raftpb.Message{Type: raftpb.MsgHeartbeat.Enum(), Term: new(s.c.hard.term)})
			}
			s.work()
		}
		s.ticks(testRequest / 10)
		if !errors.Is(ticket.err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, ticket.err, c.want)
		}
	}
}

func TestTooManyProposalsAreRefused(t *testing.T) {
	s := newCoreTest(t)
	large := make([]byte, maxProposalBytes/2)
	tickets := make([]failTicket, 4)
	for i := range tickets {
		s.c.propose(large, false, &tickets[i])
	}
	if tickets[0].err != nil || tickets[1].err != nil || !errors.Is(tickets[2].err, rpctypes.ErrGRPCRequestTooManyRequests) {
		t.Errorf("%+v", tickets)
	}
	s.c.failAll(rpctypes.ErrGRPCStopped)
	if !errors.Is(tickets[0].err, rpctypes.ErrGRPCStopped) || s.c.own.count != 0 || s.c.own.bytes != 0 {
		t.Errorf("%+v, %d proposals of %d bytes are left", tickets, s.c.own.count, s.c.own.bytes)
	}
}

// TestForwardingGoesBack: what is not confirmed is sent again, in order, and only that.
func TestForwardingGoesBack(t *testing.T) {
	s := newCoreTest(t)
	s.follow(2)
	propose := func(n int) {
		for range n {
			s.c.propose([]byte("x"), false, new(failTicket))
		}
		s.work()
	}
	expect := func(what string, want ...string) {
		t.Helper()
		if got := s.forwards(); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: %v were sent, want %v", what, got, want)
		}
	}
	take := func(upTo uint64, refused bool) {
		s.c.receive(packet{from: 2, to: 1, taken: &taken{term: 2, session: s.c.own.sessions[0].id, upTo: upTo, refused: refused}})
		s.work()
	}
	live := func(n int) {
		for range n {
			s.c.tick()
			s.receive(2, &raftpb.Message{Type: raftpb.MsgHeartbeat.Enum(), Term: new(uint64(2))})
		}
	}
	propose(3)
	expect("new ones", "1+3")
	propose(2)
	expect("more", "4+2")
	take(2, false)
	live(testElection - 1)
	expect("not yet again")
	live(1)
	expect("what is not confirmed", "3+3")
	s.c.unreachable(2)
	live(1)
	expect("after a loss", "3+3")
	take(5, false)
	live(testElection + 1)
	expect("all is confirmed")
	propose(1)
	expect("another", "6+1")
	take(5, true)
	propose(1)
	live(testElection + 1)
	expect("the leader has refused")
	s.follow(3)
	if n := s.c.own.again; n != 0 {
		t.Errorf("%d were proposed anew before an entry of the new term is applied", n)
	}
	expect("only what was not sent to the former leader", "1+1")
	// The new leader's first entry shows that none of the others is in the log.
	s.receive(2, &raftpb.Message{Type: raftpb.MsgApp.Enum(), Term: new(uint64(3)), Index: new(uint64(4)), LogTerm: new(uint64(1)), Commit: new(uint64(5)),
		Entries: []*raftpb.Entry{{Index: new(uint64(5)), Term: new(uint64(3))}}})
	expect("the others too", "2+6")
}

// TestLargeProposals: packets and entries are bounded, and nothing is left behind.
func TestLargeProposals(t *testing.T) {
	s := newCoreTest(t)
	s.follow(2)
	big := bytes.Repeat([]byte{1}, maxForwardBytes-100)
	for range 20 {
		s.c.propose(big, false, new(failTicket))
	}
	s.work()
	if got := s.forwards(); len(got) != maxFlightBytes/maxForwardBytes {
		t.Errorf("%d packets are on their way: %v", len(got), got)
	}
	s.c.receive(packet{from: 2, to: 1, taken: &taken{term: 2, session: s.c.own.sessions[0].id, upTo: 5}})
	s.work()
	if got := s.forwards(); fmt.Sprint(got) != "[9+1 10+1 11+1 12+1 13+1]" {
		t.Errorf("then %v", got)
	}

	l := newCoreTest(t)
	l.lead()
	for i := range 30 {
		payload := big
		if i%10 == 0 {
			payload = make([]byte, 2*maxEntryBytes)
		}
		l.c.propose(payload, false, new(failTicket))
	}
	l.work()
	for range 40 {
		l.acknowledge()
	}
	total := 0
	for _, e := range l.applied {
		size := 0
		for _, p := range e.Proposals {
			size += len(p.Payload)
		}
		if size > maxEntryBytes && len(e.Proposals) > 1 {
			t.Errorf("an entry has %d bytes in %d proposals", size, len(e.Proposals))
		}
		total += len(e.Proposals)
	}
	if total != 30 || l.c.queue.bytes != 0 || l.c.own.count != 0 {
		t.Errorf("%d proposals are applied, %d bytes wait, %d are on their way", total, l.c.queue.bytes, l.c.own.count)
	}
}

// TestALeaderTakesASessionInOrder: exactly the next number, once, and nothing of another term.
func TestALeaderTakesASessionInOrder(t *testing.T) {
	s := newCoreTest(t)
	s.lead()
	s.take()
	send := func(session, first uint64, n int, want taken) {
		t.Helper()
		f := &forward{term: s.c.hard.term, session: session, first: first}
		if want.term != 0 {
			f.term = want.term
		}
		for i := range n {
			f.proposals = append(f.proposals, forwarded{payload: fmt.Appendf(nil, "%d/%d", session, first+uint64(i))})
		}
		s.c.receive(packet{from: 3, to: 1, forward: f})
		s.work()
		want.term, want.session = f.term, session
		for _, p := range s.take() {
			if p.taken != nil && *p.taken != want {
				t.Errorf("%d from %d of session %d: %+v, want %+v", n, first, session, *p.taken, want)
			}
		}
	}
	send(7, 2, 1, taken{upTo: 0})
	send(7, 1, 2, taken{upTo: 2})
	send(7, 1, 2, taken{upTo: 2})
	send(7, 2, 3, taken{upTo: 4})
	send(8, 1, 1, taken{upTo: 1})
	send(7, 1, 4, taken{upTo: 4})
	send(7, 5, 1, taken{term: s.c.hard.term + 1, refused: true})
	s.acknowledge()
	var got []string
	for _, e := range s.applied {
		for _, p := range e.Proposals {
			got = append(got, string(p.Payload))
		}
		if string(e.Stamp) != "now" {
			t.Errorf("entry %d has stamp %q", e.Index, e.Stamp)
		}
	}
	if fmt.Sprint(got) != "[7/1 7/2 7/3 7/4 8/1]" {
		t.Errorf("%v are in the log", got)
	}
}

// TestAHeartbeatThatClaimsTooMuch: the member stops taking part instead of falling over.
func TestAHeartbeatThatClaimsTooMuch(t *testing.T) {
	s := newCoreTest(t)
	s.follow(2)
	s.take()
	s.receive(2, &raftpb.Message{Type: raftpb.MsgHeartbeat.Enum(), Term: new(uint64(2)), Commit: new(uint64(100))})
	if !s.c.rejoin.lost || s.c.lead != 0 {
		t.Fatalf("lost %t, leader %x", s.c.rejoin.lost, s.c.lead)
	}
	s.receive(3, &raftpb.Message{Type: raftpb.MsgVote.Enum(), Term: new(uint64(3)), Index: new(uint64(200)), LogTerm: new(uint64(3))})
	s.ticks(5 * testElection)
	if sent := s.take(); len(sent) > 0 {
		t.Errorf("a lost member sends %+v", sent)
	}
	hs := s.c.readmitted(5, 3, 90)
	if hs.GetTerm() != 5 || hs.GetVote() != 3 {
		t.Errorf("it comes back with %v", hs)
	}
	if err := s.c.resume(); err != nil {
		t.Fatal(err)
	}
	s.receive(3, &raftpb.Message{Type: raftpb.MsgHeartbeat.Enum(), Term: new(uint64(5)), Commit: new(uint64(80))})
	if s.c.rejoin.lost {
		t.Error("a heartbeat from before it was let in again makes it lost once more")
	}
	s.receive(2, &raftpb.Message{Type: raftpb.MsgVote.Enum(), Term: new(uint64(5)), Index: new(uint64(200)), LogTerm: new(uint64(4))})
	for _, p := range s.take() {
		if p.message.GetType() == raftpb.MsgVoteResp && !p.message.GetReject() {
			t.Error("it votes in the term that it came back in")
		}
	}
}

// TestACopyThatIsAskedForAgainIsMadeOnce: Raft asks at every heartbeat while the copy is made. The one that is made then
// is not thrown away for that.
func TestACopyThatIsAskedForAgainIsMadeOnce(t *testing.T) {
	s := newCoreTest(t)
	s.lead()
	ask := func() bool {
		_, err := s.c.storage.Snapshot()
		s.work()
		return err == nil
	}
	if ask() || s.copies.wanted != 1 {
		t.Fatalf("%d copies are wanted", s.copies.wanted)
	}
	s.ticks(2)
	if ask() {
		t.Fatal("there is a copy before it is made")
	}
	s.c.snapshotMade(&snapshotNotice{from: 1, index: s.c.applied, term: s.c.hard.term, Name: "copy", Members: s.c.members}, nil)
	s.work()
	if !ask() || s.copies.wanted != 1 || s.copies.released != 0 {
		t.Errorf("%d copies were wanted, %d let go of", s.copies.wanted, s.copies.released)
	}
}

// TestARemovalIsAppliedOnceItIsDurable: whoever applies it answers the client, and refuses the one who was removed.
func TestARemovalIsAppliedOnceItIsDurable(t *testing.T) {
	s := newCoreTest(t)
	s.lead()
	s.c.propose((&memberChange{Kind: changeRemove, Member: backend.Member{ID: 2}}).payload(), true, nil)
	s.work()
	m := &raftpb.Message{Type: raftpb.MsgAppResp.Enum(), Term: new(s.c.hard.term), Index: new(s.c.storage.last()), From: new(uint64(2)), To: new(uint64(1))}
	s.c.receive(packet{from: 2, to: 1, message: m})
	var out output
	if _, err := s.c.ready(&out); err != nil {
		t.Fatal(err)
	}
	if len(out.apply) != 1 || out.apply[0].members == nil || !out.applyAfter || !out.mustSync || out.hardState.GetCommit() < out.apply[0].index {
		t.Errorf("%+v", out)
	}
}

// TestAMemberLetInAgainKnowsOfItsInstallation: a copy is being installed while the member becomes lost and is let in again.
func TestAMemberLetInAgainKnowsOfItsInstallation(t *testing.T) {
	s := newCoreTest(t)
	s.follow(2)
	data, err := json.Marshal(&snapshotNotice{Name: "a", Size: 1, Members: threeMembers()})
	if err != nil {
		t.Fatal(err)
	}
	s.receive(2, &raftpb.Message{Type: raftpb.MsgSnap.Enum(), Term: new(uint64(2)), Snapshot: &raftpb.Snapshot{Data: data,
		Metadata: &raftpb.SnapshotMetadata{Index: new(uint64(50)), Term: new(uint64(2)), ConfState: confStateOf(threeMembers())}}})
	if s.c.copies.fetching == nil {
		t.Fatal("not fetching")
	}
	s.c.downloaded("x", nil)
	// the applier is busy with the install
	var out output
	var ops []operation
	for {
		more, err := s.c.ready(&out)
		if err != nil {
			t.Fatal(err)
		}
		if !more {
			break
		}
		ops = append(ops, out.apply...)
		if err := s.c.persisted(&out); err != nil {
			t.Fatal(err)
		}
	}
	if len(ops) != 1 || ops[0].kind != opInstall {
		t.Fatalf("%+v", ops)
	}
	s.c.lose()
	s.work()
	s.c.readmitted(5, 3, 90)
	if err := s.c.resume(); err != nil {
		t.Fatal(err)
	}
	s.work()
	s.c.done(ops[0].number)
	s.work()
	if s.c.copies.fetching != nil || s.c.storage.last() != 50 {
		t.Errorf("the log ends at %d, it still waits for %+v", s.c.storage.last(), s.c.copies.fetching)
	}
}

// TestNothingThatAPeerSendsIsFatal: what no member sends is refused, or has no effect.
func TestNothingThatAPeerSendsIsFatal(t *testing.T) {
	// receive is what transport and core make of a message.
	receive := func(s *coreTest, m *raftpb.Message) {
		t.Helper()
		if m.From == nil {
			m.From = new(uint64(2))
		}
		m.To = new(uint64(1))
		var fr frame
		if err := fr.encode(&packet{message: m}); err != nil {
			t.Fatal(err)
		}
		p, err := decode(fr.buf[frameHeader:])
		if err != nil {
			return
		}
		p.from, p.to = 2, 1
		s.c.receive(p)
		s.work()
	}
	try := func(name string, f func(s *coreTest)) {
		s := newCoreTest(t)
		defer func() {
			if r := recover(); r != nil {
				t.Errorf("%s: panic: %v", name, r)
			}
		}()
		f(s)
	}
	try("MsgReadIndex without an entry", func(s *coreTest) {
		s.lead()
		receive(s, &raftpb.Message{Type: raftpb.MsgReadIndex.Enum()})
	})
	try("MsgReadIndexResp with a short context", func(s *coreTest) {
		s.follow(2)
		receive(s, &raftpb.Message{Type: raftpb.MsgReadIndexResp.Enum(), Term: new(uint64(2)), Index: new(uint64(1)), Entries: []*raftpb.Entry{{Data: []byte("x")}}})
	})
	try("MsgApp with a gap", func(s *coreTest) {
		s.follow(2)
		receive(s, &raftpb.Message{Type: raftpb.MsgApp.Enum(), Term: new(uint64(2)), Index: new(uint64(4)), LogTerm: new(uint64(1)), Commit: new(uint64(4)),
			Entries: []*raftpb.Entry{{Index: new(uint64(9)), Term: new(uint64(2))}}})
	})
	try("MsgStorageAppendResp under a false name", func(s *coreTest) {
		s.follow(2)
		receive(s, &raftpb.Message{Type: raftpb.MsgStorageAppendResp.Enum(), Term: new(uint64(2)), Index: new(uint64(99)), LogTerm: new(uint64(2)), From: new(raft.LocalAppendThread)})
		receive(s, &raftpb.Message{Type: raftpb.MsgApp.Enum(), Term: new(uint64(2)), Index: new(uint64(4)), LogTerm: new(uint64(1)), Commit: new(uint64(4))})
	})
	try("MsgApp commit beyond", func(s *coreTest) {
		s.follow(2)
		receive(s, &raftpb.Message{Type: raftpb.MsgApp.Enum(), Term: new(uint64(2)), Index: new(uint64(4)), LogTerm: new(uint64(1)), Commit: new(uint64(400))})
	})
	try("MsgAppResp beyond the log", func(s *coreTest) {
		s.lead()
		receive(s, &raftpb.Message{Type: raftpb.MsgAppResp.Enum(), Term: new(s.c.hard.term), Index: new(uint64(99))})
		s.c.propose([]byte("x"), false, nil)
		s.work()
		receive(s, &raftpb.Message{Type: raftpb.MsgAppResp.Enum(), Term: new(s.c.hard.term), Index: new(uint64(99))})
		s.ticks(3)
	})
	try("a type that there is not", func(s *coreTest) {
		s.follow(2)
		receive(s, &raftpb.Message{Type: raftpb.MessageType(-1).Enum(), Term: new(uint64(2))})
	})
	try("MsgSnap without a snapshot", func(s *coreTest) {
		s.follow(2)
		receive(s, &raftpb.Message{Type: raftpb.MsgSnap.Enum(), Term: new(uint64(2))})
	})
	for kind := range raftpb.MessageType_name {
		for _, leads := range []bool{false, true} {
			try(fmt.Sprint("nothing but the type ", raftpb.MessageType(kind), ", leading: ", leads), func(s *coreTest) {
				if leads {
					s.lead()
				} else {
					s.follow(2)
				}
				receive(s, &raftpb.Message{Type: raftpb.MessageType(kind).Enum()})
				receive(s, &raftpb.Message{Type: raftpb.MessageType(kind).Enum(), Term: new(s.c.hard.term)})
				s.ticks(3)
			})
		}
	}
}

// TestHowLongALeaderIsWaitedFor: at most one and a half election timeouts; half of one where nobody can connect to it; and a
// leader that is still heard keeps its office, whoever cannot connect to it.
func TestHowLongALeaderIsWaitedFor(t *testing.T) {
	campaigns := func(s *coreTest) bool {
		for _, p := range s.take() {
			if p.message != nil && p.message.GetType() == raftpb.MsgPreVote {
				return true
			}
		}
		return false
	}
	wait := func(s *coreTest, limit int) (n int) {
		for n < limit {
			n++
			if s.ticks(1); campaigns(s) {
				return n
			}
		}
		return n + 1
	}
	heartbeat := &raftpb.Message{Type: raftpb.MsgHeartbeat.Enum(), Term: new(uint64(2)), Commit: new(uint64(4))}
	for range 200 { // Raft draws how long it waits
		s := newCoreTest(t)
		s.follow(2)
		s.take()
		if n := wait(s, 100); n < testElection || n > testElection*3/2 {
			t.Fatalf("an election timeout is %d ticks, this one began after %d", testElection, n)
		}

		s = newCoreTest(t)
		s.follow(2)
		s.ticks(1)
		s.take()
		s.c.ended(2)
		if n := wait(s, 100); n < 2 || n > testElection*3/4 {
			t.Fatalf("the leader's process has ended; an election began after %d ticks", n)
		}

		s = newCoreTest(t)
		s.follow(2)
		s.c.ended(3)
		for range 3 * testElection {
			s.c.ended(2)
			s.ticks(1)
			s.receive(2, heartbeat)
			if campaigns(s) {
				t.Fatal("an election although the leader is heard")
			}
		}
	}
}

// TestAFailedDownloadIsTriedAgainLater: the longer, the more often it has failed.
func TestAFailedDownloadIsTriedAgainLater(t *testing.T) {
	s := newCoreTest(t)
	s.follow(2)
	data, err := json.Marshal(&snapshotNotice{Name: "a", Size: 1, Members: threeMembers()})
	if err != nil {
		t.Fatal(err)
	}
	offer := &raftpb.Message{Type: raftpb.MsgSnap.Enum(), Term: new(uint64(2)), Snapshot: &raftpb.Snapshot{Data: data,
		Metadata: &raftpb.SnapshotMetadata{Index: new(uint64(50)), Term: new(uint64(2)), ConfState: confStateOf(threeMembers())}}}
	last := 0
	for try := range 12 {
		s.receive(2, offer)
		if s.c.copies.fetching == nil {
			t.Fatalf("try %d is not made", try)
		}
		s.c.downloaded("", errors.New("broken"))
		waited := 0
		for s.take(); s.c.copies.fetching != nil; waited++ {
			if s.receive(2, offer); waited > 100*testElection {
				t.Fatal("it is never tried again")
			}
			s.ticks(1)
		}
		failed := false
		for _, p := range s.take() {
			failed = failed || p.to == 2 && p.message.GetType() == raftpb.MsgSnapStatus && p.message.GetReject()
		}
		if !failed {
			t.Errorf("try %d: the leader is not told that it may offer the copy again", try)
		}
		if waited < last || waited > 10*testElection {
			t.Errorf("after try %d it waits for %d ticks, before for %d", try, waited, last)
		}
		last = waited
	}
	if last != 10*testElection {
		t.Errorf("in the end it waits for %d ticks", last)
	}
}
