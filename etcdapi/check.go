package etcdapi

import (
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/pkg/v3/adt"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// The checks of this file are those of etcd's v3rpc/key.go, in etcd's order where two could apply at once: clients
// and tests see which error comes first.

func checkRange(r *pb.RangeRequest) error {
	if len(r.GetKey()) == 0 {
		return rpctypes.ErrGRPCEmptyKey
	}
	if _, ok := pb.RangeRequest_SortOrder_name[int32(r.SortOrder)]; !ok {
		return rpctypes.ErrGRPCInvalidSortOption
	}
	if _, ok := pb.RangeRequest_SortTarget_name[int32(r.SortTarget)]; !ok {
		return rpctypes.ErrGRPCInvalidSortOption
	}
	return nil
}

func checkRangeStream(r *pb.RangeRequest) error {
	if err := checkRange(r); err != nil {
		return err
	}
	keyOrder := r.SortOrder == pb.RangeRequest_NONE ||
		r.SortTarget == pb.RangeRequest_KEY && r.SortOrder == pb.RangeRequest_ASCEND
	if !keyOrder {
		return status.Error(codes.Unimplemented, "RangeStream does not support custom sort orders")
	}
	if r.MinModRevision != 0 || r.MaxModRevision != 0 || r.MinCreateRevision != 0 || r.MaxCreateRevision != 0 {
		return status.Error(codes.Unimplemented, "RangeStream does not support revision filters")
	}
	return nil
}

func checkPut(r *pb.PutRequest) error {
	switch {
	case len(r.GetKey()) == 0:
		return rpctypes.ErrGRPCEmptyKey
	case r.IgnoreValue && len(r.Value) != 0:
		return rpctypes.ErrGRPCValueProvided
	case r.IgnoreLease && r.Lease != 0:
		return rpctypes.ErrGRPCLeaseProvided
	}
	return nil
}

func checkDelete(r *pb.DeleteRangeRequest) error {
	if len(r.GetKey()) == 0 {
		return rpctypes.ErrGRPCEmptyKey
	}
	return nil
}

// checkTxn checks the Txn and what is nested in it. maxOps bounds the longest of compares, success and failure;
// what it leaves is the bound for the next level.
func checkTxn(r *pb.TxnRequest, maxOps int) error {
	ops := max(len(r.GetCompare()), len(r.GetSuccess()), len(r.GetFailure()))
	if ops > maxOps {
		return rpctypes.ErrGRPCTooManyOps
	}
	for _, c := range r.GetCompare() {
		if len(c.GetKey()) == 0 {
			return rpctypes.ErrGRPCEmptyKey
		}
	}
	for _, branch := range [...][]*pb.RequestOp{r.GetSuccess(), r.GetFailure()} {
		for _, op := range branch {
			if err := checkOp(op, maxOps-ops); err != nil {
				return err
			}
		}
	}
	return nil
}

func checkOp(op *pb.RequestOp, maxOps int) error {
	switch r := op.GetRequest().(type) {
	case *pb.RequestOp_RequestRange:
		return checkRange(r.RequestRange)
	case *pb.RequestOp_RequestPut:
		return checkPut(r.RequestPut)
	case *pb.RequestOp_RequestDeleteRange:
		return checkDelete(r.RequestDeleteRange)
	case *pb.RequestOp_RequestTxn:
		return checkTxn(r.RequestTxn, maxOps)
	}
	return rpctypes.ErrGRPCKeyNotFound // etcd's answer to an operation that says nothing
}

// checkOverlaps refuses a Txn that would change a key twice ("It is not allowed to modify the same key several
// times within one txn", rpc.proto). REQUIRES: checkTxn passed, which bounds the work.
func checkOverlaps(r *pb.TxnRequest) error {
	for _, branch := range [...][]*pb.RequestOp{r.Success, r.Failure} {
		if len(branch) == 1 && branch[0].GetRequestTxn() == nil {
			continue // the Kubernetes Txn: one operation collides with nothing
		}
		if _, err := touchedBy(branch); err != nil {
			return err
		}
	}
	return nil
}

// touched is what a list of operations may write.
type touched struct {
	puts map[string]struct{}
	dels adt.IntervalTree // nil: no deletes
}

// everything is how etcd walks a tree of deletes when it merges it into another one.
var everything = adt.NewStringAffineInterval("\x00", "")

// touchedBy collects the puts and deletes of ops with those nested in them. Two puts of one key, or a put inside a
// delete, are ErrGRPCDuplicateKey; two deletes may overlap, and so may the two branches of one nested Txn, of which
// only one runs.
//
// The intervals are etcd's own type: what its tree answers for odd ranges (an end before the begin, the "\x00" that
// means "everything from here") is part of the rule.
func touchedBy(ops []*pb.RequestOp) (touched, error) {
	var t touched
	for _, op := range ops {
		if r := op.GetRequestDeleteRange(); r != nil {
			t.addDelete(r)
		}
	}
	for _, op := range ops {
		r := op.GetRequestTxn()
		if r == nil {
			continue
		}
		then, err := touchedBy(r.Success)
		if err != nil {
			return t, err
		}
		otherwise, err := touchedBy(r.Failure)
		if err != nil {
			return t, err
		}
		for key := range then.puts {
			if err := t.addPut(key); err != nil {
				return t, err
			}
		}
		for key := range otherwise.puts {
			if _, sibling := then.puts[key]; sibling {
				continue // already added, and checked against the same deletes, a moment ago
			}
			if err := t.addPut(key); err != nil {
				return t, err
			}
		}
		t.mergeDeletes(then.dels)
		t.mergeDeletes(otherwise.dels)
	}
	for _, op := range ops {
		if r := op.GetRequestPut(); r != nil {
			if err := t.addPut(string(r.Key)); err != nil {
				return t, err
			}
		}
	}
	return t, nil
}

func (t *touched) addPut(key string) error {
	if _, twice := t.puts[key]; twice {
		return rpctypes.ErrGRPCDuplicateKey
	}
	if t.dels != nil && t.dels.Intersects(adt.NewStringAffinePoint(key)) {
		return rpctypes.ErrGRPCDuplicateKey
	}
	if t.puts == nil {
		t.puts = make(map[string]struct{})
	}
	t.puts[key] = struct{}{}
	return nil
}

func (t *touched) addDelete(r *pb.DeleteRangeRequest) {
	if t.dels == nil {
		t.dels = adt.NewIntervalTree()
	}
	if len(r.RangeEnd) == 0 {
		t.dels.Insert(adt.NewStringAffinePoint(string(r.Key)), struct{}{})
		return
	}
	t.dels.Insert(adt.NewStringAffineInterval(string(r.Key), string(r.RangeEnd)), struct{}{})
}

func (t *touched) mergeDeletes(dels adt.IntervalTree) {
	if dels == nil {
		return
	}
	if t.dels == nil {
		t.dels = adt.NewIntervalTree()
	}
	t.dels.Union(dels, everything)
}

// checkSize refuses a write that is larger than --max-request-bytes. As in etcd the limit is on what would go
// through Raft: the request inside an InternalRaftRequest with its header.
func (s *Server) checkSize(req proto.Message) error {
	size := proto.Size(req)
	if uint64(size)+s.raftOverhead(size) > uint64(s.opts.MaxRequestBytes) {
		return rpctypes.ErrGRPCRequestTooLarge
	}
	return nil
}

// raftOverhead is what etcd's InternalRaftRequest adds to a request of size bytes: the request's tag (its field
// numbers are all below 16) and length, and a RequestHeader (field 100) with a request id, which etcd makes of two
// bytes of the member id above a 48-bit clock and counter.
func (s *Server) raftOverhead(size int) uint64 {
	const requestTag, headerTag, headerLength, idTag = 1, 2, 1, 1
	id := s.opts.Identity.MemberID<<48 | 1<<47
	return uint64(requestTag + protowire.SizeVarint(uint64(size)) + headerTag + headerLength + idTag + protowire.SizeVarint(id))
}
