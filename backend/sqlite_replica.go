package backend

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
)

// Here is what a file holds and does only as a replica's.

// walState is what settle knows of the WAL. It belongs to the holder of the commit token.
type walState struct {
	frames int // in it after the last commit
	next   int // a checkpoint is due when there are this many
}

// walFrames is the size of the WAL, in pages, from which on it is copied into the database: see writerPragmas.
const walFrames = 500

// checkpointDue says whether it is time to settle.
func (l *sqliteLog) checkpointDue() (due bool, err error) {
	l.wal.frames, _, err = l.w.walCheckpoint(checkpointNone)
	return l.wal.frames >= max(l.wal.next, walFrames), err
}

// settle makes everything committed durable and, as far as no reader is in the way, copies the WAL into the database.
//
// SQLite promises with synchronous=NORMAL: the WAL is synced before pages of it are copied, and the database before the WAL
// is begun anew, which is when all of it was copied. So a checkpoint that has copied everything has left everything durable,
// and one that has not, for a reader or for want of room, is followed by a sync of the WAL.
func (l *sqliteLog) settle() error {
	l.wal.next = l.wal.frames + walFrames // not with every commit, while something is in the way
	frames, copied, err := l.w.walCheckpoint(checkpointPassive)
	if e := asSQLiteError(err); e != nil && !e.busy() && !e.full() {
		return err
	}
	if err == nil && frames == copied {
		l.wal.next = walFrames
		return nil
	}
	return l.w.syncWAL()
}

// writePosition writes up to where the log is applied, and the members if they have changed.
func (l *sqliteLog) writePosition(b *batch) error {
	r := &b.st.replica
	if b.membersChanged {
		if err := l.writeMembers(r.members); err != nil {
			return err
		}
	}
	return runWith(l.putPosition, int64(r.index), int64(r.term), r.clock, int64(r.clockTerm), int64(r.members.ClusterID))
}

func (l *sqliteLog) writeMembers(m *Membership) error {
	if err := l.w.exec(sqliteClearMembers); err != nil {
		return err
	}
	put, err := l.w.cached(sqlitePutMember)
	if err != nil {
		return err
	}
	for _, id := range m.Removed {
		if err := putMember(put, &Member{ID: id}, 1); err != nil {
			return err
		}
	}
	for i := range m.Members {
		if err := putMember(put, &m.Members[i], 0); err != nil {
			return err
		}
	}
	return nil
}

func putMember(s *stmt, m *Member, removed int64) error {
	learner := int64(0)
	if m.Learner {
		learner = 1
	}
	for i, v := range []int64{int64(m.ID), removed, learner} {
		if err := s.bindInt64(i+1, v); err != nil {
			return err
		}
	}
	peers, err := urlsText(m.PeerURLs)
	if err != nil {
		return err
	}
	clients, err := urlsText(m.ClientURLs)
	if err != nil {
		return err
	}
	for i, v := range []string{m.Name, peers, clients} {
		if err := s.bindText(i+4, v); err != nil {
			return err
		}
	}
	return s.run()
}

func urlsText(urls []string) (string, error) {
	if urls == nil {
		urls = []string{}
	}
	text, err := json.Marshal(urls)
	return string(text), err
}

// readPosition reads up to where the log is applied, and the members; found says whether the file is a member's at all.
func readPosition(c *conn) (r replicaState, found bool, err error) {
	r.members = &Membership{}
	err = eachRow(c, sqlitePosition, func(s *stmt) error {
		found = true
		r.index, r.term = uint64(s.columnInt64(0)), uint64(s.columnInt64(1))
		r.clock, r.clockTerm = s.columnInt64(2), uint64(s.columnInt64(3))
		r.members.ClusterID = uint64(s.columnInt64(4))
		return nil
	})
	return r, found, err
}

// readMembers adds the members to what readPosition has read.
func readMembers(c *conn, m *Membership) error {
	err := eachRow(c, sqliteMembers, func(s *stmt) error {
		member := Member{ID: uint64(s.columnInt64(0)), Learner: s.columnInt64(2) != 0, Name: s.columnText(3)}
		if s.columnInt64(1) != 0 {
			m.Removed = append(m.Removed, member.ID)
			return nil
		}
		if err := json.Unmarshal([]byte(s.columnText(4)), &member.PeerURLs); err != nil {
			return fmt.Errorf("%w: the peer URLs of member %x: %w", ErrDamaged, member.ID, err)
		}
		if err := json.Unmarshal([]byte(s.columnText(5)), &member.ClientURLs); err != nil {
			return fmt.Errorf("%w: the client URLs of member %x: %w", ErrDamaged, member.ID, err)
		}
		m.Members = append(m.Members, member)
		return nil
	})
	if err != nil {
		return err
	}
	// To SQLite half of the ids are negative.
	slices.SortFunc(m.Members, func(a, b Member) int { return cmp.Compare(a.ID, b.ID) })
	slices.Sort(m.Removed)
	return nil
}
