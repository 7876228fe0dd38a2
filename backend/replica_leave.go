package backend

import (
	"fmt"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// Leave makes the database one that belongs to no cluster, as OpenSQLite opens it. What is applied stays; the members, and
// the position in the log, are forgotten. Leases keep the time that they have left. Afterwards nothing can be applied or
// written: close it. When it returns, all that is durable.
//
// REQUIRES: everything of the log that is to be kept is applied, and Apply is not called any more.
func (db *DB) Leave() error {
	_, err := db.step(func() error {
		if err := db.log.(*sqliteLog).leave(&db.st, time.Now().UnixMicro()-db.now()); err != nil {
			return err
		}
		return db.settle()
	})
	if err != nil {
		return err
	}
	_ = db.replica.fail(fmt.Errorf("%w: this member has left its cluster", ErrUnavailable))
	return nil
}

// Sync makes everything that is applied durable, whatever other programs read.
func (db *DB) Sync() error {
	_, err := db.step(db.settle)
	return err
}

// leave turns the database of a member into one of no cluster. Leases expire by the wall clock there, which is ahead of the
// cluster's by so much. An alarm for want of space comes back by itself if there is none; one of another member would not
// go by itself.
func (l *sqliteLog) leave(st *state, ahead int64) error {
	return l.transaction(func() error {
		for _, sql := range []string{
			"DELETE FROM raft", sqliteClearMembers, fmt.Sprintf("DELETE FROM alarm WHERE alarm = %d", pb.AlarmType_NOSPACE),
			fmt.Sprintf("UPDATE lease SET deadline = deadline + %d", ahead),
		} {
			if err := l.w.exec(sql); err != nil {
				return err
			}
		}
		// The applied index counted entries, and from now on counts rows and other changes: it must not fall.
		return l.putMeta(metaOtherChanges, max(int64(st.others), int64(st.replica.index)-(st.nextID-1)))
	})
}
