package backend

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/encoding/prototext"
)

// dump prints every row of a replica's database, for comparison with another replica's. Only rows that compaction has yet
// to delete may differ.
func dump(t *testing.T, db *DB) []string {
	t.Helper()
	settled(t, db)
	var out []string
	alone(t, db, func() error {
		for _, table := range []string{"revisions", "lease", "alarm", "meta", "raft", "member", "auth_user", "auth_grant", "auth_role", "auth_permission"} {
			columns := 0
			if err := eachRow(sqliteOf(db).w, "SELECT count(*) FROM pragma_table_info('"+table+"')", func(s *stmt) error {
				columns = int(s.columnInt64(0))
				return nil
			}); err != nil {
				return err
			}
			order := "1, 2"
			if columns == 1 {
				order = "1"
			}
			if err := eachRow(sqliteOf(db).w, "SELECT * FROM "+table+" ORDER BY "+order, func(s *stmt) error {
				line := table
				for i := range columns {
					line += fmt.Sprintf(" %.60q", s.columnBlob(i))
				}
				out = append(out, line)
				return nil
			}); err != nil {
				return err
			}
		}
		return nil
	})
	return out
}

// entryMaker makes a log that does a bit of everything.
type entryMaker struct {
	rnd         *rand.Rand
	index, term uint64
	clock, wall int64
	rev         int64 // about
}

func (m *entryMaker) key() []byte { return fmt.Appendf(nil, "k%02d", m.rnd.IntN(25)) }

func (m *entryMaker) put() *pb.PutRequest {
	rnd := m.rnd
	r := &pb.PutRequest{Key: m.key(), Value: fmt.Appendf(nil, "%d %s", m.index, strings.Repeat("x", rnd.IntN(3000))), PrevKv: rnd.IntN(3) == 0}
	switch rnd.IntN(6) {
	case 0:
		r.Lease = 1 + rnd.Int64N(8)
	case 1:
		r.IgnoreValue, r.Value = true, nil
	case 2:
		r.IgnoreLease = true
	}
	return r
}

func (m *entryMaker) deleteRange() *pb.DeleteRangeRequest {
	r := &pb.DeleteRangeRequest{Key: m.key(), PrevKv: m.rnd.IntN(2) == 0}
	if m.rnd.IntN(3) == 0 {
		r.RangeEnd = m.key()
	}
	return r
}

func (m *entryMaker) txn(depth int) *pb.TxnRequest {
	rnd := m.rnd
	ops := func() (ops []*pb.RequestOp) {
		for range rnd.IntN(4) {
			switch rnd.IntN(5) {
			case 0:
				ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: m.deleteRange()}})
			case 1:
				ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{
					Key: m.key(), RangeEnd: []byte("z"), Limit: 3, Revision: max(0, m.rev-rnd.Int64N(40)) * rnd.Int64N(2)}}})
			case 2:
				if depth > 0 {
					ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: m.txn(depth - 1)}})
				}
			default:
				ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: m.put()}})
			}
		}
		return ops
	}
	r := &pb.TxnRequest{Success: ops(), Failure: ops()}
	for range rnd.IntN(3) {
		c := &pb.Compare{Key: m.key(), Result: pb.Compare_CompareResult(rnd.IntN(4))}
		switch rnd.IntN(4) {
		case 0:
			c.Target, c.TargetUnion = pb.Compare_VERSION, &pb.Compare_Version{Version: rnd.Int64N(3)}
		case 1:
			c.Target, c.TargetUnion = pb.Compare_VALUE, &pb.Compare_Value{Value: []byte("2")}
		case 2:
			c.Target, c.TargetUnion = pb.Compare_LEASE, &pb.Compare_Lease{Lease: 1 + rnd.Int64N(8)}
			c.RangeEnd = []byte("z")
		default:
			c.Target, c.TargetUnion = pb.Compare_MOD, &pb.Compare_ModRevision{ModRevision: m.rev}
		}
		r.Compare = append(r.Compare, c)
	}
	return r
}

func (m *entryMaker) command() *pending {
	rnd := m.rnd
	p := &pending{cmd: Command{Author: []string{"", "ann", "b\x00b", rootUser}[rnd.IntN(4)]}}
	if p.cmd.Author != "" && rnd.IntN(5) > 0 {
		p.cmd.AuthRevision = 1 << 40 // whatever has changed since
	}
	lease := 1 + rnd.Int64N(8)
	switch n := rnd.IntN(100); {
	case n < 12:
		p.cmd.Request = randomAuth(rnd)
	case n < 40:
		p.cmd.Request = m.put()
	case n < 50:
		p.cmd.Request = m.deleteRange()
	case n < 70:
		p.cmd.Request = m.txn(2)
	case n < 78:
		p.cmd.Request = &pb.LeaseGrantRequest{ID: lease, TTL: rnd.Int64N(40) - 1}
	case n < 82:
		p.cmd.Request = &pb.LeaseRevokeRequest{ID: lease}
	case n < 88:
		p.cmd.Request = &pb.LeaseKeepAliveRequest{ID: lease}
	case n < 94:
		return &pending{expire: &expireLeases{}}
	case n < 97:
		p.cmd.Request = &pb.CompactionRequest{Revision: max(1, m.rev-rnd.Int64N(30))}
	default:
		p.cmd.Request = &pb.AlarmRequest{
			Action: pb.AlarmRequest_DEACTIVATE, MemberID: 1 + rnd.Uint64N(3), Alarm: pb.AlarmType_NOSPACE}
		switch rnd.IntN(20) {
		case 0:
			p.cmd.Request = &pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, MemberID: 1, Alarm: pb.AlarmType_CORRUPT}
		case 1, 2, 3, 4, 5, 6, 7, 8, 9, 10:
			p.cmd.Request = &pb.AlarmRequest{Action: pb.AlarmRequest_DEACTIVATE, MemberID: 1, Alarm: pb.AlarmType_CORRUPT}
		}
	}
	return p
}

// next makes an entry, as another member sees it: no tickets, the Commands encoded.
func (m *entryMaker) next(t *testing.T) Entry {
	t.Helper()
	rnd := m.rnd
	m.index++
	if rnd.IntN(15) == 0 { // another leader, with a clock of its own
		m.term += 1 + rnd.Uint64N(3)
		m.clock += rnd.Int64N(2e7) - 2e6
		m.wall += rnd.Int64N(2e7) - 1e7
	}
	m.clock += rnd.Int64N(2e6)
	m.wall += rnd.Int64N(3e6) - 1e6
	s := stamp{clock: m.clock, wall: m.wall, space: -1, member: 1 + m.term%3}
	if rnd.IntN(3) == 0 {
		s.space = rnd.Int64N(12_000)
	}
	e := Entry{Index: m.index, Term: m.term, Stamp: s.encode()}
	for range rnd.IntN(4) {
		payload := []byte{payloadVersion}
		for range 1 + rnd.IntN(5) {
			var err error
			if payload, err = appendCommand(payload, m.command()); err != nil {
				t.Fatal(err)
			}
		}
		e.Proposals = append(e.Proposals, Proposal{Payload: payload})
	}
	return e
}

func answerText(a answer) string {
	text := fmt.Sprint(a.expired, a.err)
	if a.resp != nil {
		text += " " + strings.Join(strings.Fields(prototext.Format(a.resp)), " ") // its spaces are random on purpose
	}
	return text
}

// hear gives an entry tickets, as on the member that has proposed it, and returns what to read the answers with.
func hear(t *testing.T, db *DB, e Entry) (heard Entry, answers func() []string) {
	t.Helper()
	heard = e
	heard.Proposals = slices.Clone(e.Proposals)
	var all []*pending
	for i, p := range e.Proposals {
		items, err := decodePayload(p.Payload)
		if err != nil {
			t.Fatal(err)
		}
		for _, item := range items {
			item.done = make(chan struct{})
		}
		all = append(all, items...)
		heard.Proposals[i].Ticket = &ticket{db: db, items: items}
	}
	return heard, func() (text []string) {
		for _, p := range all {
			<-p.done
			text = append(text, answerText(answer{p.resp, p.expired, p.err}))
		}
		return text
	}
}

// member is a replica that is fed entries as it likes.
type member struct {
	name string
	path string
	rnd  *rand.Rand
	o    Options
	db   *DB
	done int  // entries applied
	hear bool // it asks for the answers
	held *View
}

func (m *member) open(t *testing.T) {
	t.Helper()
	db, err := OpenReplica(t.Context(), m.path, m.o)
	if err != nil {
		t.Fatal(err)
	}
	db.Join(&tickets{make(chan Ticket, 1)})
	m.db = db
}

func (m *member) close(t *testing.T) {
	t.Helper()
	if m.held != nil {
		m.held.Release()
		m.held = nil
	}
	closeAndCheck(t, m.db, m.path)
}

// TestReplicasAreEqual: whatever differs between members, the same log makes the same rows of every table, and the same
// answers.
func TestReplicasAreEqual(t *testing.T) {
	rnd := seed(t)
	maker := &entryMaker{rnd: rnd, term: 2, clock: time.Now().UnixMicro(), wall: time.Now().UnixMicro()}
	members := []*member{
		{name: "one entry at a time, hears all", hear: true},
		{name: "many entries at a time, hears nothing", o: Options{ValueCacheBytes: 1, QuotaBytes: -1, MinLeaseTTL: 60, MemberID: 7}},
		{name: "anything, with restarts", o: Options{QuotaBytes: 1, MemberID: 9}},
		{name: "anything, with Views that keep rows", hear: true, o: Options{ValueCacheBytes: 2 << 20, MinLeaseTTL: 1}},
	}
	for _, m := range members {
		m.path, m.rnd = testPath(t), rand.New(rand.NewPCG(rnd.Uint64(), 0))
		m.open(t)
	}
	const entries = 2000
	log := make([]Entry, 0, entries)
	changes := map[uint64]*Membership{} // entries that change the members
	answers := make([][]string, entries)
	for range 10 {
		for range entries / 10 {
			maker.rev = members[0].db.Revision()
			e := maker.next(t)
			if rnd.IntN(40) == 0 {
				changes[e.Index] = randomMembers(rnd)
			} else if rnd.IntN(40) == 0 {
				changes[e.Index] = nil
			}
			log = append(log, e)
		}
		for i, m := range members {
			for m.done < len(log) {
				m.step(t, i, log, changes, answers)
			}
		}
		want := dump(t, members[0].db)
		for _, m := range members[1:] {
			if m.held != nil {
				m.held.Release()
				m.held = nil
			}
			mustEqual(t, fmt.Sprintf("after entry %d, %s", len(log), m.name), dump(t, m.db), want)
		}
	}
	s := members[0].db.Stats()
	t.Logf("revision %d, compacted at %d, %d leases, %d keys, alarms %v", s.Revision, s.CompactRevision, s.Leases, s.Keys, members[0].db.Alarms())
	if s.Revision < entries/4 || s.CompactRevision < entries/8 {
		t.Error("the log does too little: the test tests little")
	}
	for _, m := range members {
		m.close(t)
	}
}

// step applies the next entries, and now and then does something that must not matter.
func (m *member) step(t *testing.T, i int, log []Entry, changes map[uint64]*Membership, answers [][]string) {
	t.Helper()
	if i == 2 && m.rnd.IntN(8) == 0 {
		mustDo(t, m.db.Close())
		m.open(t)
	}
	if i == 3 && m.rnd.IntN(5) == 0 {
		if m.held != nil {
			m.held.Release()
			m.held = nil
		} else {
			m.held = m.db.View()
		}
	}
	most := 1
	switch i {
	case 1:
		most = 100
	case 2, 3:
		most = 1 + m.rnd.IntN(10)
	}
	var group []Entry
	var read []func()
	for m.done < len(log) && len(group) < most {
		e := log[m.done]
		if members, other := changes[e.Index]; other {
			if len(group) == 0 {
				m.done++
				if err := m.db.ApplyMembers(e.Index, e.Term, members); err != nil {
					t.Fatal(err)
				}
			}
			break
		}
		at := m.done
		m.done++
		if !m.hear {
			group = append(group, e)
			continue
		}
		e, text := hear(t, m.db, e)
		group = append(group, e)
		read = append(read, func() {
			got := text()
			if answers[at] == nil {
				answers[at] = got
			}
			mustEqual(t, fmt.Sprintf("entry %d, answers of %q", at, m.name), got, answers[at])
		})
	}
	if len(group) == 0 {
		return
	}
	if err := m.db.Apply(group); err != nil {
		t.Fatalf("%s: %v", m.name, err)
	}
	for _, r := range read {
		r()
	}
	if i == 1 && m.rnd.IntN(3) == 0 {
		settled(t, m.db)
	}
}

func randomMembers(rnd *rand.Rand) *Membership {
	m := &Membership{ClusterID: rnd.Uint64()}
	for range rnd.IntN(4) {
		m.Members = append(m.Members, Member{
			ID: rnd.Uint64(), Name: []string{"", "n1", "ü"}[rnd.IntN(3)], PeerURLs: []string{"http://a:1", "http://b:2"}[:rnd.IntN(3)], Learner: rnd.IntN(2) == 0,
		})
	}
	for range rnd.IntN(3) {
		m.Removed = append(m.Removed, rnd.Uint64())
	}
	slices.SortFunc(m.Members, func(a, b Member) int { return cmp.Compare(a.ID, b.ID) })
	slices.Sort(m.Removed)
	return m
}

// TestReplicaRefusesWhatFailsHalfWay: a Command that fails after it has written has not been, whatever is applied with it.
func TestReplicaRefusesWhatFailsHalfWay(t *testing.T) {
	var want []string
	for together := range 2 {
		path := testPath(t)
		db, err := OpenReplica(t.Context(), path, Options{})
		if err != nil {
			t.Fatal(err)
		}
		bad := errors.New("half way")
		var group []logged
		refused := map[*pending]error{}
		for i := range 6 {
			item := &pending{cmd: Command{Request: putReq("k", fmt.Sprint(i))}, done: make(chan struct{})}
			if i == 2 || i == 5 {
				refused[item] = bad
			}
			tk := &ticket{db: db, items: []*pending{item}}
			s := &stamp{clock: int64(i), wall: int64(i), space: -1}
			group = append(group, logged{index: uint64(i + 1), term: 1, stamp: s, proposals: []proposed{{items: tk.items, ticket: tk, answers: make([]answer, 1)}}})
		}
		apply := func(group []logged) {
			alone(t, db, func() error { return db.applyOnce(group, refused) })
		}
		if together == 1 {
			apply(group)
		} else {
			for i := range group {
				apply(group[i : i+1])
			}
		}
		for i, l := range group {
			item := l.proposals[0].items[0]
			<-item.done
			if (item.err != nil) != (i == 2 || i == 5) {
				t.Errorf("command %d got %v", i, item.err)
			}
		}
		got := dump(t, db)
		if want == nil {
			want = got
		}
		mustEqual(t, "together", got, want)
		if db.Revision() != 5 {
			t.Errorf("at revision %d", db.Revision())
		}
		closeAndCheck(t, db, path)
	}
}

// TestReplicaExpiryDoesNotDependOnTheBatch: what one Command expires is bounded by what it has done itself.
func TestReplicaExpiryDoesNotDependOnTheBatch(t *testing.T) {
	const keys = expiredRowsPerCommand*2/3 + 1
	var log []Entry
	add := func(clock int64, p *pending) {
		payload, err := appendCommand([]byte{payloadVersion}, p)
		if err != nil {
			t.Fatal(err)
		}
		s := stamp{clock: clock, wall: clock, space: -1}
		log = append(log, Entry{Index: uint64(len(log) + 1), Term: 1, Stamp: s.encode(), Proposals: []Proposal{{Payload: payload}}})
	}
	for lease := range int64(3) {
		add(1, &pending{cmd: Command{Request: &pb.LeaseGrantRequest{ID: lease + 1, TTL: 1}}})
		txn := &pb.TxnRequest{}
		for k := range keys {
			txn.Success = append(txn.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{
				RequestPut: &pb.PutRequest{Key: fmt.Appendf(nil, "%d/%d", lease, k), Lease: lease + 1}}})
		}
		add(1, &pending{cmd: Command{Request: txn}})
	}
	add(5e6, &pending{expire: &expireLeases{}})
	for _, together := range []bool{false, true} {
		path := testPath(t)
		db, err := OpenReplica(t.Context(), path, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if together {
			err = db.Apply(log)
		}
		for i := 0; i < len(log) && !together && err == nil; i++ {
			err = db.Apply(log[i : i+1])
		}
		if err != nil {
			t.Fatal(err)
		}
		if got := db.Leases(); !slices.Equal(got, []int64{3}) {
			t.Errorf("together %t: leases %d are left, want the third alone", together, got)
		}
		closeAndCheck(t, db, path)
	}
}
