package backend

import (
	"slices"
	"sync"
)

// As etcd does, quire remembers what the hash up to the revision of a compaction was when it came, until it is restarted. The
// rows that it was made of are gone afterwards, so it is made first, of a View from just before. To read them all is too dear
// for every compaction; it is done for those whose client waits until the rows are gone (CompactionRequest.physical).
type hashMemory struct {
	mu     sync.Mutex
	due    []dueHash
	hashes []KVHash // the newest last; of Head there is nothing in them
}

// rememberedHashes is how many etcd remembers (mvcc: hashStorageMaxSize).
const rememberedHashes = 10

// dueHash is the hash of a View up to a revision, at which it is going to be compacted.
type dueHash struct {
	view *View
	rev  int64
}

// physicalCompaction is one that a batch has made.
type physicalCompaction struct{ from, to int64 }

// keepForHash holds the store as it is with the batch but for its compaction. REQUIRES: the commit token; the batch is durable,
// and no View of it is published yet.
func (db *DB) keepForHash(c physicalCompaction) {
	compact := db.st.compact
	db.st.compact = c.from
	db.publish()
	v := db.View()
	db.st.compact = compact
	m := &db.hashes
	m.mu.Lock()
	defer m.mu.Unlock()
	m.due = append(m.due, dueHash{v, c.to})
}

// remember makes the hashes that are due. One that cannot be made, because the database is being closed or cannot be read, is
// not remembered.
func (db *DB) remember() {
	m := &db.hashes
	m.mu.Lock()
	due := m.due
	m.due = nil
	m.mu.Unlock()
	for _, d := range due {
		h, err := db.hashKV(db.ctx, d.view, d.rev)
		d.view.Release()
		if err != nil {
			continue
		}
		m.mu.Lock()
		m.hashes = append(m.hashes, h)
		m.hashes = m.hashes[max(0, len(m.hashes)-rememberedHashes):]
		m.mu.Unlock()
	}
}

// recall returns the hash up to the revision of a compaction.
func (m *hashMemory) recall(rev int64) (KVHash, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if i := slices.IndexFunc(m.hashes, func(h KVHash) bool { return h.Revision == rev }); i >= 0 {
		return m.hashes[i], true
	}
	return KVHash{}, false
}
