package backend

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/lease/leasepb"
	"google.golang.org/protobuf/proto"
)

// Names in an etcd's database (server/storage/schema).
var (
	etcdKeys           = []byte("key")
	etcdMeta           = []byte("meta")
	etcdLeases         = []byte("lease")
	etcdAlarms         = []byte("alarm")
	etcdCluster        = []byte("cluster")
	etcdMembers        = []byte("members")
	etcdMembersRemoved = []byte("members_removed")
	etcdAuth           = []byte("auth")
	etcdUsers          = []byte("authUsers")
	etcdRoles          = []byte("authRoles")

	etcdBuckets = [][]byte{
		etcdKeys, etcdMeta, etcdLeases, etcdAlarms, etcdCluster, etcdMembers, etcdMembersRemoved, etcdAuth, etcdUsers, etcdRoles,
	}
)

// What is written with one transaction of the file is held in memory.
const (
	etcdBatchBytes = 4 << 20
	etcdBatchPuts  = 16 << 10
)

// etcdFile writes an etcd's database: a bbolt file that nobody else knows of, and that is of no use before it is complete.
// So nothing is synced, and of the file there is only what it will be read by.
type etcdFile struct {
	file *os.File
	db   *bolt.DB
	tx   *bolt.Tx
	puts int
	// values are those of tx: bbolt refers to them until it is committed.
	values []byte
	name   []byte // of the row that is being put
}

// newEtcdFile makes the database in an empty file, which it takes.
func newEtcdFile(file *os.File) (*etcdFile, error) {
	db, err := bolt.Open(file.Name(), 0, &bolt.Options{
		NoSync:     true,
		NoGrowSync: true,
		OpenFile:   func(string, int, os.FileMode) (*os.File, error) { return file, nil },
	})
	if err != nil {
		return nil, err
	}
	f := &etcdFile{file: file, db: db, values: make([]byte, 0, etcdBatchBytes)}
	if f.tx, err = db.Begin(true); err == nil {
		for _, name := range etcdBuckets {
			if _, err = f.tx.CreateBucket(name); err != nil {
				break
			}
		}
	}
	if err != nil {
		return nil, errors.Join(err, f.close())
	}
	return f, nil
}

// put adds a pair, which is copied. In a bucket that is filled in the order of its keys the pages become full.
func (f *etcdFile) put(bucket, key, value []byte) error {
	if f.puts >= etcdBatchPuts || f.puts > 0 && len(f.values)+len(value) > etcdBatchBytes {
		if err := f.next(); err != nil {
			return err
		}
	}
	begin := len(f.values)
	f.values = append(f.values, value...)
	f.puts++
	b := f.tx.Bucket(bucket)
	b.FillPercent = 1
	return b.Put(key, f.values[begin:])
}

// next commits what there is.
func (f *etcdFile) next() (err error) {
	if err := f.commit(); err != nil {
		return err
	}
	f.puts, f.values = 0, f.values[:0]
	if cap(f.values) > etcdBatchBytes {
		f.values = make([]byte, 0, etcdBatchBytes)
	}
	f.tx, err = f.db.Begin(true)
	return err
}

// commit leaves to the store the room that it needs to go on: without any, a member of a cluster has to stop.
func (f *etcdFile) commit() error {
	free, total, err := diskRoom(f.file)
	if err != nil {
		return err
	}
	if least := leastRoom(total); free < least+etcdBatchBytes {
		return fmt.Errorf("%w: of %d MiB that are free, %d must remain for the store", ErrDiskFull, free>>20, least>>20)
	}
	return f.tx.Commit()
}

// leastRoom is how much of a file system with so many bytes is not for snapshots: two segments of the Raft log and what the
// WAL may grow by, or less where there is little anyway.
func leastRoom(total uint64) uint64 { return min(256<<20, total/16) }

// row adds a row as etcd stores it.
func (f *etcdFile) row(w *storedRow) error {
	b := etcdRevision(f.name[:0], w.rev, w.sub)
	kv := keyValue{key: w.key}
	if w.deleted {
		b = append(b, 't')
	} else {
		kv = keyValue{mod: w.rev, create: w.create, version: w.version, lease: w.lease, key: w.key, value: w.value}
	}
	f.name = kv.appendMessage(b)
	return f.put(etcdKeys, f.name[:len(b)], f.name[len(b):])
}

// etcdRevision appends a revision as etcd names rows.
func etcdRevision(b []byte, rev, sub int64) []byte {
	b = append(binary.BigEndian.AppendUint64(b, uint64(rev)), '_')
	return binary.BigEndian.AppendUint64(b, uint64(sub))
}

// meta adds what tells how far the database is. A store that was never compacted has no compaction revision.
func (f *etcdFile) meta(o *EtcdSurroundings, compact int64) error {
	var confState struct { // raftpb.ConfState, as etcd encodes it
		Voters    []uint64 `json:"voters,omitempty"`
		Learners  []uint64 `json:"learners,omitempty"`
		AutoLeave bool     `json:"auto_leave"`
	}
	for _, m := range o.Members {
		if m.Learner {
			confState.Learners = append(confState.Learners, m.ID)
		} else {
			confState.Voters = append(confState.Voters, m.ID)
		}
	}
	conf, err := json.Marshal(confState)
	if err != nil {
		return err
	}
	all := []struct {
		name  string
		value []byte
	}{
		{"confState", conf},
		{"consistent_index", binary.BigEndian.AppendUint64(nil, o.Index)},
		{"finishedCompactRev", etcdRevision(nil, compact, 0)},
		{"scheduledCompactRev", etcdRevision(nil, compact, 0)},
		{"storageVersion", []byte(o.StorageVersion)},
		{"term", binary.BigEndian.AppendUint64(nil, o.Term)},
	}
	if compact < 0 {
		all = slices.Delete(all, 2, 4)
	}
	for _, e := range all {
		if err := f.put(etcdMeta, []byte(e.name), e.value); err != nil {
			return err
		}
	}
	return nil
}

// cluster adds the members and the version of the cluster.
func (f *etcdFile) cluster(o *EtcdSurroundings) error {
	if err := f.put(etcdCluster, []byte("clusterVersion"), []byte(o.ClusterVersion)); err != nil {
		return err
	}
	for _, m := range o.Members {
		value, err := json.Marshal(struct { // membership.Member, as etcd encodes it
			ID         uint64   `json:"id"`
			PeerURLs   []string `json:"peerURLs"`
			Learner    bool     `json:"isLearner,omitempty"`
			Name       string   `json:"name,omitempty"`
			ClientURLs []string `json:"clientURLs,omitempty"`
		}{m.ID, m.PeerURLs, m.Learner, m.Name, m.ClientURLs})
		if err != nil {
			return err
		}
		if err := f.put(etcdMembers, fmt.Appendf(nil, "%x", m.ID), value); err != nil {
			return err
		}
	}
	return nil
}

// leases adds leases with their whole TTL: etcd writes down no more of them either, and counts it anew where it starts
// with the file.
func (f *etcdFile) leases(all []LeaseStatus) error {
	for _, l := range all {
		value, err := proto.Marshal(&leasepb.Lease{ID: l.ID, TTL: l.GrantedTTL})
		if err != nil {
			return err
		}
		if err := f.put(etcdLeases, binary.BigEndian.AppendUint64(nil, uint64(l.ID)), value); err != nil {
			return err
		}
	}
	return nil
}

// alarms adds what is raised.
func (f *etcdFile) alarms(all alarmSet) error {
	for _, k := range all.sorted() {
		name, err := proto.Marshal(&pb.AlarmMember{MemberID: k.member, Alarm: k.alarm})
		if err != nil {
			return err
		}
		if err := f.put(etcdAlarms, name, nil); err != nil {
			return err
		}
	}
	return nil
}

// auth adds users and roles. As in etcd there is no word of whether auth is enabled before it was.
func (f *etcdFile) auth(a *Auth) error {
	if err := f.put(etcdAuth, []byte("authRevision"), binary.BigEndian.AppendUint64(nil, a.Revision())); err != nil {
		return err
	}
	if a.Enabled() {
		if err := f.put(etcdAuth, []byte("authEnabled"), []byte{1}); err != nil {
			return err
		}
	}
	if err := putNamed(f, etcdUsers, a.Users()); err != nil {
		return err
	}
	return putNamed(f, etcdRoles, a.Roles())
}

// putNamed adds messages under their names.
func putNamed[M interface {
	proto.Message
	GetName() []byte
}](f *etcdFile, bucket []byte, all []M) error {
	for _, m := range all {
		value, err := proto.Marshal(m)
		if err != nil {
			return err
		}
		if err := f.put(bucket, m.GetName(), value); err != nil {
			return err
		}
	}
	return nil
}

// finish ends the writing, and returns the size of the database: its file may be longer.
func (f *etcdFile) finish() (size int64, err error) {
	// As etcd does. Earlier it would make a commit that fails read all that was written before.
	f.db.NoFreelistSync = true
	if err := f.commit(); err != nil {
		return 0, err
	}
	f.tx = nil
	err = f.db.View(func(tx *bolt.Tx) error { size = tx.Size(); return nil })
	return size, err
}

// close ends what of a transaction was not committed, and closes the file.
func (f *etcdFile) close() error {
	var err error
	if f.tx != nil {
		if err = f.tx.Rollback(); errors.Is(err, bolterrors.ErrTxClosed) {
			err = nil // a commit that failed has ended it
		}
	}
	return errors.Join(err, f.db.Close())
}
