package backend

import (
	"context"
	"slices"
	"sync"
)

// As etcd does, quire remembers what the hash up to the revision of a compaction was when it came, until it is restarted. The
// rows that it was made of are gone afterwards, so it is made first, of a View from just before. To read them all is too dear
// for every compaction; it is done for those whose client waits until the rows are gone (CompactionRequest.physical), and not
// on Postgres, where every process would have to read them through the network.
type hashMemory struct {
	mu     sync.Mutex
	due    []dueHash // the oldest first
	hashes []KVHash  // the newest last; of Head there is nothing in them
}

// rememberedHashes is how many etcd remembers (mvcc: hashStorageMaxSize).
const rememberedHashes = 10

// dueHash is the hash of a View up to a revision, at which it is going to be compacted.
type dueHash struct {
	view *View
	rev  int64
	done chan struct{} // closed when it is made, or cannot be
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
	m.due = append(m.due, dueHash{v, c.to, make(chan struct{})})
}

// remember makes the hashes that are due. One that cannot be made, because the database is being closed or cannot be read, is
// not remembered. It is called by one goroutine.
func (db *DB) remember() {
	m := &db.hashes
	for {
		m.mu.Lock()
		if len(m.due) == 0 {
			m.mu.Unlock()
			return
		}
		d := m.due[0]
		m.mu.Unlock()
		h, err := db.hashKV(db.ctx, d.view, d.rev, true)
		d.view.Release()
		m.mu.Lock()
		m.due = m.due[1:]
		if err == nil {
			m.hashes = append(m.hashes, h)
			m.hashes = m.hashes[max(0, len(m.hashes)-rememberedHashes):]
		}
		m.mu.Unlock()
		close(d.done)
	}
}

// recall returns the hash up to the revision of a compaction, once it is made.
func (m *hashMemory) recall(ctx context.Context, rev int64) (h KVHash, ok bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for {
		if i := slices.IndexFunc(m.hashes, func(h KVHash) bool { return h.Revision == rev }); i >= 0 {
			return m.hashes[i], true, nil
		}
		i := slices.IndexFunc(m.due, func(d dueHash) bool { return d.rev == rev })
		if i < 0 {
			return KVHash{}, false, nil
		}
		done := m.due[i].done
		m.mu.Unlock()
		select {
		case <-done:
		case <-ctx.Done():
			err = ctx.Err()
		}
		m.mu.Lock()
		if err != nil {
			return KVHash{}, false, err
		}
	}
}
