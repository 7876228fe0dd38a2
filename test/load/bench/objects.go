package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// objects is a set of keys in kube-apiserver's shape, /registry/<kind>/<namespace>/<name>, in a database that holds no
// others between its first key and objectsEnd. A key has one writer at a time, so that what it must be is known.
type objects struct {
	n    int
	size int     // of each value
	page int     // keys of a list page
	revs []int64 // mod_revision of each, as the last answer to its only writer said
}

// errDataLost: the server has not what it has acknowledged.
var errDataLost = errors.New("data is lost")

// objectsEnd is after every key of the set.
const objectsEnd = "/registry0"

// objectKinds are in order, and after /registry/health, a key of kine's own.
var objectKinds = []string{
	"ingress", "jobs", "leases", "minions", "persistentvolumes", "pods", "replicasets", "secrets", "serviceaccounts", "statefulsets",
}

const perNamespace = 100 // keys of one kind in one namespace

func newObjects(n, size, page int) *objects {
	return &objects{n: n, size: size, page: page, revs: make([]int64, n)}
}

// key is the name of object i: a greater i is a greater key.
func (s *objects) key(i int) []byte {
	perKind := (s.n + len(objectKinds) - 1) / len(objectKinds)
	in := i % perKind
	return fmt.Appendf(nil, "/registry/%s/namespace-%05d/app-%02d-6f7d9c5b84", objectKinds[i/perKind], in/perNamespace, in%perNamespace)
}

// end is the range end of a list that stops before object i.
func (s *objects) end(i int) []byte {
	if i >= s.n {
		return []byte(objectsEnd)
	}
	return s.key(i)
}

// order gives each of 0…n-1 once, far from the one before: objects are not made and changed in the order of their names.
func order(n, round int) func(k int) int {
	stride := max(1, n*618/1000+17*round)
	for gcd(stride, n) != 1 {
		stride++
	}
	return func(k int) int { return (k*stride + round) % n }
}

func gcd(a, b int) int {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

func (s *objects) create(ctx context.Context, w *worker, i int) error {
	rev, err := create(ctx, w, s.key(i), s.size)
	s.revs[i] = rev
	return err
}

// update is kube-apiserver's update Txn. REQUIRES: nobody else writes object i.
func (s *objects) update(ctx context.Context, w *worker, i int) error {
	return update(ctx, w, s.key(i), &s.revs[i], s.size)
}

// put overwrites a random one of the objects that belong to the worker alone.
func (s *objects) put(ctx context.Context, w *worker) error {
	i := w.id + w.of*w.rng.IntN(s.n/w.of)
	req, err := proto.Marshal(&pb.PutRequest{Key: s.key(i), Value: filling[:s.size]})
	if err != nil {
		return err
	}
	if err := call(ctx, w.conn, methodPut, req, &w.answer); err != nil {
		return err
	}
	s.revs[i], err = revisionOf(w.answer)
	return err
}

// updateOwn is put for kine (see bed.put).
func (s *objects) updateOwn(ctx context.Context, w *worker) error {
	return s.update(ctx, w, w.id+w.of*w.rng.IntN(s.n/w.of))
}

// get reads a random object.
func (s *objects) get(ctx context.Context, w *worker) error {
	req, err := proto.Marshal(&pb.RangeRequest{Key: s.key(w.rng.IntN(s.n)), Limit: 1})
	if err != nil {
		return err
	}
	if err := call(ctx, w.conn, methodRange, req, &w.answer); err != nil {
		return err
	}
	return s.expect(w.answer, 1)
}

// expect checks that a list has so many key-values with their values.
func (s *objects) expect(answer []byte, n int) error {
	if err := expectKVs(answer, n); err != nil {
		return err
	}
	if len(answer) < n*s.size {
		return fmt.Errorf("a list of %d values of %d bytes has only %d bytes", n, s.size, len(answer))
	}
	return nil
}

// nextPage reads the next page of a walk over all objects.
func (s *objects) nextPage(ctx context.Context, w *worker, at *walk) error {
	req, err := proto.Marshal(&pb.RangeRequest{Key: s.key(at.from), RangeEnd: []byte(objectsEnd), Limit: int64(s.page), Revision: at.rev})
	if err != nil {
		return err
	}
	if err := call(ctx, w.conn, methodRange, req, &w.answer); err != nil {
		return err
	}
	if err := s.expect(w.answer, min(s.page, s.n-at.from)); err != nil {
		return err
	}
	if at.rev == 0 {
		if at.rev, err = revisionOf(w.answer); err != nil {
			return err
		}
	}
	if at.from += s.page; at.from >= s.n {
		*at = walk{}
	}
	return nil
}

// count asks how many objects there are.
func (s *objects) count(ctx context.Context, w *worker) error {
	const fieldRangeCount = 4
	req, err := proto.Marshal(&pb.RangeRequest{Key: s.key(0), RangeEnd: []byte(objectsEnd), CountOnly: true})
	if err != nil {
		return err
	}
	if err := call(ctx, w.conn, methodRange, req, &w.answer); err != nil {
		return err
	}
	n := 0
	if err := fields(w.answer, func(num protowire.Number, v uint64, _ []byte) {
		if num == fieldRangeCount {
			n = int(v)
		}
	}); err != nil {
		return err
	}
	if n != s.n {
		return fmt.Errorf("%w: the server counts %d keys, %d were written", errDataLost, n, s.n)
	}
	return nil
}

// verify reads the name and the mod_revision of every object, and one value of each thousand: an object that is missing, or
// older than its last acknowledged write, is an error. So are more newer ones than there were unanswered writes, which may
// have happened or not. What is found is noted as what the next writers must see.
func (s *objects) verify(ctx context.Context, b *bed, unanswered int) error {
	const chunk = 1000
	var newer atomic.Int64
	err := b.fixed(ctx, len(b.conns), (s.n+chunk-1)/chunk, func(ctx context.Context, w *worker, c int) error {
		from, to := c*chunk, min((c+1)*chunk, s.n)
		r := &pb.RangeResponse{}
		req := &pb.RangeRequest{Key: s.key(from), RangeEnd: s.end(to), KeysOnly: true}
		if err := callProto(ctx, w.conn, methodRange, req, r); err != nil {
			return err
		}
		n, err := s.compare(r.Kvs, from, to)
		if err != nil {
			return err
		}
		newer.Add(int64(n))
		if err := callProto(ctx, w.conn, methodRange, &pb.RangeRequest{Key: s.key(from)}, r); err != nil {
			return err
		}
		if len(r.Kvs) != 1 || !bytes.Equal(r.Kvs[0].Value, filling[:s.size]) {
			return fmt.Errorf("%w: key %q has not the value that was written", errDataLost, s.key(from))
		}
		return nil
	})
	if err != nil {
		return err
	}
	if n := int(newer.Load()); n > unanswered {
		return fmt.Errorf("%d keys are newer than their last acknowledged write, at most %d writes had no answer", n, unanswered)
	}
	return nil
}

// compare is verify for the objects from…to-1, of which the server has these. It returns how many were newer than known.
func (s *objects) compare(kvs []*mvccpb.KeyValue, from, to int) (newer int, err error) {
	if len(kvs) != to-from {
		return 0, fmt.Errorf("%w: %d keys from %q on, %d were written", errDataLost, len(kvs), s.key(from), to-from)
	}
	for k, kv := range kvs {
		i := from + k
		switch {
		case !bytes.Equal(kv.Key, s.key(i)):
			return 0, fmt.Errorf("%w: key %q is in the place of %q", errDataLost, kv.Key, s.key(i))
		case kv.ModRevision < s.revs[i]:
			return 0, fmt.Errorf("%w: key %q is at revision %d, its last acknowledged write was %d", errDataLost, kv.Key, kv.ModRevision, s.revs[i])
		case kv.ModRevision > s.revs[i]:
			newer++
			s.revs[i] = kv.ModRevision
		}
	}
	return newer, nil
}
