package main

import (
	"context"
	"fmt"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// keySet is a set of keys that the server holds: prefix + six digits.
type keySet struct {
	prefix string
	n      int
	size   int     // of each value
	revs   []int64 // mod_revision of each, as the last answer to its only writer said
}

func (s *keySet) key(i int) []byte { return fmt.Appendf(nil, "%s%06d", s.prefix, i) }

// prefixEnd is the range end for all keys with a prefix, as kube-apiserver writes it: the prefix with its last byte one greater.
// A prefix with a 0xff behind it, which covers the same keys here, is no text that kine can hand to PostgreSQL.
func prefixEnd(prefix string) string {
	last := len(prefix) - 1
	return prefix[:last] + string(rune(prefix[last]+1))
}

// prefixRange are both ends.
func prefixRange(prefix string) [2]string { return [2]string{prefix, prefixEnd(prefix)} }

// filling is the value of all writes: bytes that do not compress.
var filling = func() []byte {
	b := make([]byte, 1<<16)
	x := uint64(88172645463325252)
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x)
	}
	return b
}()

// createRequest is kube-apiserver's create: only if there is no such key (OptimisticPut with revision 0).
func createRequest(key []byte, size int) ([]byte, error) {
	return proto.Marshal(&pb.TxnRequest{
		Compare: []*pb.Compare{modIs(key, 0)},
		Success: []*pb.RequestOp{putOp(key, size)},
	})
}

// updateRequest is kube-apiserver's update: only if the key is still at the revision, else what it is now (OptimisticPut
// with GetOnFailure).
func updateRequest(key []byte, rev int64, size int) ([]byte, error) {
	return proto.Marshal(&pb.TxnRequest{
		Compare: []*pb.Compare{modIs(key, rev)},
		Success: []*pb.RequestOp{putOp(key, size)},
		Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: key}}}},
	})
}

func modIs(key []byte, rev int64) *pb.Compare {
	return &pb.Compare{
		Target: pb.Compare_MOD, Result: pb.Compare_EQUAL, Key: key, TargetUnion: &pb.Compare_ModRevision{ModRevision: rev},
	}
}

func putOp(key []byte, size int) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: key, Value: filling[:size]}}}
}

// create makes one key; it is an error if it is there already.
func create(ctx context.Context, w *worker, key []byte, size int) (rev int64, err error) {
	req, err := createRequest(key, size)
	if err != nil {
		return 0, err
	}
	if err := call(ctx, w.conn, methodTxn, req, &w.answer); err != nil {
		return 0, err
	}
	ok, err := succeeded(w.answer)
	if err != nil {
		return 0, err
	}
	if !ok {
		return 0, fmt.Errorf("create of the new key %q was refused", key)
	}
	return revisionOf(w.answer)
}

// update writes one key whose revision is *rev, and sets that. REQUIRES: nobody else writes it.
func update(ctx context.Context, w *worker, key []byte, rev *int64, size int) error {
	req, err := updateRequest(key, *rev, size)
	if err != nil {
		return err
	}
	if err := call(ctx, w.conn, methodTxn, req, &w.answer); err != nil {
		return err
	}
	ok, err := succeeded(w.answer)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("update of key %q at its own revision %d was refused", key, *rev)
	}
	*rev, err = revisionOf(w.answer)
	return err
}

// update writes key i of a set of which this worker is the only writer.
func (s *keySet) update(ctx context.Context, w *worker, i int) error {
	return update(ctx, w, s.key(i), &s.revs[i], s.size)
}

// load makes n keys with values of the given size, with the create that all servers know.
func (b *bed) load(ctx context.Context, prefix string, n, size int) (*keySet, error) {
	s := &keySet{prefix: prefix, n: n, size: size, revs: make([]int64, n)}
	err := b.fixed(ctx, 64, n, func(ctx context.Context, w *worker, i int) error {
		rev, err := create(ctx, w, s.key(i), size)
		s.revs[i] = rev
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("loading %d keys: %w", n, err)
	}
	b.keys[prefix] = s
	return s, nil
}
