package backend

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"math"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
)

// Hashes are made by streaming rows out of the storage: memory does not grow with the history, and writers do not wait.
// Rows that a compaction made unreachable are passed over, whether they are deleted yet or not, so the answer does not
// depend on how far that is. The View is held from beginning to end, so nothing that it can reach is deleted meanwhile.

// KVHash is the hash of the history up to a revision.
type KVHash struct {
	Hash            uint32
	Revision        int64 // up to which it goes, itself included
	CompactRevision int64 // that of the store when it was made; -1: never compacted, as etcd counts
	Head            int64 // the newest revision at that time
}

// HashKV returns what etcd 3.7 answers for the same requests, for every revision that is not compacted; 0 is the
// newest. It is a CRC-32C over "key", the name of etcd's bucket, and then, in order, over what etcd stores of each row:
// the revision, marked where it is a deletion, and the encoded KeyValue, in a deletion the key alone.
//
// Which rows, with the store compacted at C:
//   - all of the revisions after C, up to rev;
//   - of those up to C, what is still there at rev; if nothing at all is there at rev, what was there at C. (etcd means
//     to leave out what its compaction has yet to delete, and knows that by what it is to keep. Where that is nothing
//     it takes it that there was no compaction.)
//
// Example, compacted at 5:
//
//	a: 2 put, 4 put, 7 put   -> at 5 and 6: 4; from 7 on only 7
//	b: 3 put, 8 delete       -> up to 7: 3; from 8 on only the deletion
//	c: 2 put, 5 delete       -> none: the deletion at exactly C does not count
//
// For the revisions of the last ten compactions the answer is the hash, and the compaction revision, of just before them;
// see hashMemory. After a restart, and for compactions whose client did not wait, it is as above, which is what a restarted
// etcd answers.
//
// A revision that is not there yet is ErrFutureRev, a compacted one a *CompactedError. A negative one is the hash of no
// rows, as in etcd.
func (db *DB) HashKV(ctx context.Context, rev int64) (KVHash, error) {
	v := db.View()
	defer v.Release()
	h, ok, err := db.hashes.recall(ctx, rev)
	if ok {
		h.Head = v.rev
	}
	if ok || err != nil {
		return h, err
	}
	return db.hashKV(ctx, v, rev, false)
}

// hashKV is HashKV of a View, or what a compaction at rev remembers: a deletion in rev itself, which that compaction keeps,
// then is something that is there.
func (db *DB) hashKV(ctx context.Context, v *View, rev int64, compacting bool) (KVHash, error) {
	switch {
	case rev > v.rev:
		return KVHash{}, ErrFutureRev
	case rev > 0 && rev < v.compact:
		return KVHash{}, &CompactedError{CompactRevision: v.compact}
	case rev == 0:
		rev = v.rev
	}
	h := rowHash{sum: crc32.Checksum([]byte("key"), castagnoli)}
	if rev > 0 {
		there := v.compact // see above
		all := newKeyRange([]byte{0}, []byte{0})
		v.keys.ascend(all.from, all.end, all.unbounded, func(_ []byte, slot uint32, _ bool) bool {
			_, r := v.index.at(slot, rev)
			if r == nil || r.tombstone() && !(compacting && r.rev == rev) {
				return true
			}
			there = rev
			return false
		})
		left := newestRows{v: v, rev: there}
		err := db.rowsBetween(ctx, v, 0, rev, func(w *storedRow) (more bool) {
			if w.rev > v.compact || !w.deleted && left.have(w) {
				h.row(w)
			}
			return true
		})
		if err != nil {
			return KVHash{}, fmt.Errorf("hashing the history up to revision %d: %w", rev, err)
		}
	}
	return KVHash{Hash: h.sum, Revision: rev, CompactRevision: v.compact, Head: v.rev}, nil
}

// HashRows returns a hash over a part of the history: the revisions after one, up to and with another; and the
// compaction revision of the store when it was made, -1 if it was never compacted. Two stores with the same history that
// return the same compaction revision return the same hash, whatever each has deleted of what was compacted. The part
// may lie before the compaction revision: then it is a hash over what is left there. An end that is not there yet is
// ErrFutureRev.
//
// Its cost is that of reading the part, and about a hundred rows more.
func (db *DB) HashRows(ctx context.Context, after, upTo int64) (hash uint32, compact int64, err error) {
	_, hash, compact, err = db.HashSome(ctx, after, upTo, math.MaxInt, math.MaxInt64)
	return hash, compact, err
}

// HashSome is HashRows of the first revisions of a part: of as many as are read with about maxRows rows and maxBytes bytes
// of keys and values, but of one in any case. What compaction has yet to delete counts too. The hash goes up to and with
// the revision reached.
func (db *DB) HashSome(ctx context.Context, after, upTo int64, maxRows int, maxBytes int64) (reached int64, hash uint32, compact int64, err error) {
	v := db.View()
	defer v.Release()
	if upTo > v.rev {
		return 0, 0, 0, ErrFutureRev
	}
	var h rowHash
	if reached, err = db.hashRows(ctx, v, after, upTo, maxRows, maxBytes, &h); err != nil {
		return 0, 0, 0, fmt.Errorf("hashing revisions %d to %d: %w", after+1, upTo, err)
	}
	return reached, h.sum, v.compact, nil
}

// hashRows adds what compaction leaves of the revisions after one, up to and with another, or as HashSome those up to
// reached.
func (db *DB) hashRows(ctx context.Context, v *View, after, upTo int64, maxRows int, maxBytes int64, h *rowHash) (reached int64, err error) {
	left := newestRows{v: v, rev: v.compact}
	reached = upTo
	rows, bytes, last := 0, int64(0), after
	err = db.rowsBetween(ctx, v, after, upTo, func(w *storedRow) (more bool) {
		if w.rev != last && rows > 0 && (rows >= maxRows || bytes >= maxBytes) {
			reached = w.rev - 1
			return false
		}
		rows++
		bytes += int64(len(w.key) + len(w.value))
		last = w.rev
		if left.keep(w) {
			h.row(w)
		}
		return true
	})
	return reached, err
}

// Hash returns a hash over everything that the store holds, and the newest revision: the compaction revision, the rows
// that compaction leaves, the leases with the TTL that was granted (but not when they run out, which is not the same in
// two stores), the alarms, users and roles. It says whether two quires hold the same, while nothing is written. It is no value of etcd's:
// etcd hashes every bucket of its file.
func (db *DB) Hash(ctx context.Context) (hash uint32, rev int64, err error) {
	v := db.View()
	defer v.Release()
	var h rowHash
	h.ints(v.compact)
	if _, err := db.hashRows(ctx, v, 0, v.rev, math.MaxInt, math.MaxInt64, &h); err != nil {
		return 0, 0, fmt.Errorf("hashing the store: %w", err)
	}
	leases := db.leases.granted()
	h.ints(int64(len(leases)))
	for _, l := range leases {
		h.ints(l.ID, l.GrantedTTL)
	}
	for _, a := range db.alarms.current().sorted() {
		h.ints(int64(a.member), int64(a.alarm))
	}
	if v.auth.revision > firstAuthRevision {
		text, err := json.Marshal(v.auth.since(newAuth()))
		if err != nil {
			return 0, 0, fmt.Errorf("hashing users and roles: %w", err)
		}
		h.add(text)
	}
	return h.sum, v.rev, nil
}

// granted lists the leases in the order of their ids, with nothing but what was granted.
func (t *leaseTable) granted() []LeaseStatus {
	t.mu.RLock()
	all := make([]LeaseStatus, 0, len(t.byID))
	for id, l := range t.byID {
		all = append(all, LeaseStatus{ID: id, GrantedTTL: l.ttl})
	}
	t.mu.RUnlock()
	slices.SortFunc(all, func(a, b LeaseStatus) int { return cmp.Compare(a.ID, b.ID) })
	return all
}

// newestRows knows the rows that are what their key holds at a revision, or the deletion that left nothing.
// REQUIRES: v can be asked about that revision.
type newestRows struct {
	v   *View
	rev int64
	// known keeps answers of the index: where a key was written often since, it has to walk far for them, and there may
	// be many rows of that key that are not deleted yet.
	known [1024]struct {
		slot uint32 // one more than it is
		rev  int64
	}
}

// keep says whether a compaction at the revision leaves w. A deletion at exactly that revision stays until the next one.
func (n *newestRows) keep(w *storedRow) bool {
	return w.rev > n.rev || (!w.deleted || w.rev == n.rev) && n.have(w)
}

// have says whether w is one of them.
func (n *newestRows) have(w *storedRow) bool {
	slot, _, ok := n.v.keys.get(w.key)
	if !ok {
		return false
	}
	k := &n.known[slot%uint32(len(n.known))]
	if k.slot != slot+1 {
		k.slot, k.rev = slot+1, 0
		if _, r := n.v.index.at(slot, n.rev); r != nil {
			k.rev = r.rev
		}
	}
	return k.rev == w.rev
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// rowHash is a CRC-32C that grows.
type rowHash struct {
	sum uint32
	buf []byte
}

func (h *rowHash) add(b []byte) { h.sum = crc32.Update(h.sum, castagnoli, b) }

// row adds a row as etcd stores it. What stands before and behind the value is encoded here, so that the value need
// not be copied.
func (h *rowHash) row(w *storedRow) {
	b := etcdRevision(h.buf[:0], w.rev, w.sub)
	if w.deleted {
		h.buf = appendBytes(append(b, 't'), tagKey, w.key)
		h.add(h.buf)
		return
	}
	b = appendBytes(b, tagKey, w.key)
	b = appendInt(b, tagCreateRevision, w.create)
	b = appendInt(b, tagModRevision, w.rev)
	b = appendInt(b, tagVersion, w.version)
	if len(w.value) > 0 {
		b = protowire.AppendVarint(append(b, tagValue), uint64(len(w.value)))
		h.add(b)
		h.add(w.value)
		b = b[:0]
	}
	h.buf = appendInt(b, tagLease, w.lease)
	h.add(h.buf)
}

// ints adds numbers.
func (h *rowHash) ints(all ...int64) {
	b := h.buf[:0]
	for _, n := range all {
		b = binary.BigEndian.AppendUint64(b, uint64(n))
	}
	h.buf = b
	h.add(b)
}

// A hash reads this much at a time, and lets others use the reading connection then. It looks for where it begins until
// there are no more than so many ids left.
const (
	hashPageRows   = 8192
	hashPageBytes  = 4 << 20
	hashSearchRows = 128
)

// rowsBetween calls each with the rows of the revisions after one, up to and with another, in order, until it wants no more;
// with those too that v cannot reach any more and that are not deleted yet.
func (db *DB) rowsBetween(ctx context.Context, v *View, after, upTo int64, each func(w *storedRow) (more bool)) error {
	if upTo <= after {
		return nil
	}
	start, err := db.rowAfter(ctx, v, after)
	if err != nil {
		return err
	}
	for full := true; full; {
		full = false
		rows, bytes := 0, 0
		err := db.hashPage(ctx, v, start, func(w *storedRow) (more bool) {
			if w.rev > upTo || w.rev > after && !each(w) {
				return false
			}
			start = w.id + 1
			rows++
			bytes += len(w.key) + len(w.value)
			full = rows >= hashPageRows || bytes >= hashPageBytes
			return !full
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// hashPage reads rows from an id on. However many hashes are being made, one of them reads at a time: the reading
// connections are few.
func (db *DB) hashPage(ctx context.Context, v *View, start int64, each func(w *storedRow) (more bool)) error {
	select {
	case db.hashTurn <- struct{}{}:
		defer func() { <-db.hashTurn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	return v.log.scan(ctx, start, v.compact, each)
}

// rowAfter returns an id with no row of a revision after the given one before it, and not many others behind it. The
// marks do not help: those before the compaction revision are gone.
func (db *DB) rowAfter(ctx context.Context, v *View, rev int64) (start int64, err error) {
	if rev <= 1 {
		return 0, nil
	}
	// Ids and revisions grow together: look further and further ahead until the row lies behind, then halve.
	end := int64(0) // 0: not known
	for step := int64(hashSearchRows); end == 0 || end-start > hashSearchRows; {
		middle := start + (end-start)/2
		if end == 0 {
			middle, step = start+step, 2*step
		}
		id, older := int64(0), false
		err := db.hashPage(ctx, v, middle, func(w *storedRow) (more bool) {
			id, older = w.id, w.rev <= rev
			return false
		})
		if err != nil {
			return 0, err
		}
		if older {
			start = id
		} else {
			end = middle
		}
	}
	return start, nil
}
