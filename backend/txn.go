package backend

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// txn runs one Txn over a reader, and where it writes, into a batch. As in etcd:
//   - all compares, those of nested Txns too, look at the state before the Txn;
//   - the operations that will run are checked before the first of them runs, so a Txn that fails
//     has changed nothing;
//   - operations run in order, and a later one sees what an earlier one wrote.
type txn struct {
	ctx context.Context
	*reader
	batch *batch // nil: only reads
}

// path is the branch that a Txn takes, and in it the branches of its nested Txns in order.
type path struct {
	succeeded bool
	nested    []*path
}

func (p *path) ops(req *pb.TxnRequest) []*pb.RequestOp {
	if p.succeeded {
		return req.Success
	}
	return req.Failure
}

func (x *txn) run(req *pb.TxnRequest) (*pb.TxnResponse, error) {
	p, err := x.decide(req)
	if err != nil {
		return nil, err
	}
	if err := x.check(req, p); err != nil {
		return nil, err
	}
	if err := x.checkWrittenOnce(req, p); err != nil {
		return nil, err
	}
	if x.batch != nil {
		x.batch.did.begin()
	}
	resp, err := x.execute(req, p)
	if err != nil {
		return nil, err
	}
	resp.Header.Revision = x.reader.rev
	return resp, nil
}

func (x *txn) decide(req *pb.TxnRequest) (*path, error) {
	p := &path{succeeded: true}
	for _, c := range req.Compare {
		ok, err := x.compare(c)
		if err != nil {
			return nil, err
		}
		if !ok {
			p.succeeded = false
			break
		}
	}
	for _, op := range p.ops(req) {
		if nested := op.GetRequestTxn(); nested != nil {
			n, err := x.decide(nested)
			if err != nil {
				return nil, err
			}
			p.nested = append(p.nested, n)
		}
	}
	return p, nil
}

// compare holds when every key in the compare's range satisfies it. Where there is no key, it is as if
// there were one with all numbers zero; a value compare then fails.
func (x *txn) compare(c *pb.Compare) (bool, error) {
	if x.batch != nil {
		x.batch.did.Ranges++
	}
	holds, any := true, false
	var err error
	x.visit(newKeyRange(c.Key, c.RangeEnd), x.reader.rev, false, func(_ []byte, n uint32, r *record) bool {
		any = true
		var value []byte
		if c.Target == pb.Compare_VALUE {
			var f Frame
			if f, err = x.frame(x.ctx, n, r); err != nil {
				return false
			}
			value = f.Value()
		}
		holds = compareRecord(c, r, value)
		return holds
	})
	if err != nil {
		return false, err
	}
	if !any {
		return c.Target != pb.Compare_VALUE && compareRecord(c, &record{}, nil), nil
	}
	return holds, nil
}

func compareRecord(c *pb.Compare, r *record, value []byte) bool {
	var result int
	switch c.Target {
	case pb.Compare_VALUE:
		result = bytes.Compare(value, c.GetValue())
	case pb.Compare_CREATE:
		result = compareInt(r.create, c.GetCreateRevision())
	case pb.Compare_MOD:
		result = compareInt(r.rev, c.GetModRevision())
	case pb.Compare_VERSION:
		result = compareInt(r.version, c.GetVersion())
	case pb.Compare_LEASE:
		result = compareInt(r.lease, c.GetLease())
	}
	switch c.Result {
	case pb.Compare_EQUAL:
		return result == 0
	case pb.Compare_NOT_EQUAL:
		return result != 0
	case pb.Compare_GREATER:
		return result > 0
	case pb.Compare_LESS:
		return result < 0
	}
	return true // an unknown result holds, as in etcd
}

func compareInt(a, b int64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

func (x *txn) check(req *pb.TxnRequest, p *path) error {
	nested := p.nested
	for _, op := range p.ops(req) {
		var err error
		switch o := op.Request.(type) {
		case *pb.RequestOp_RequestRange:
			err = x.checkRange(o.RequestRange)
		case *pb.RequestOp_RequestPut:
			x.batch.countPrevious(o.RequestPut)
			err = x.batch.checkPut(o.RequestPut)
		case *pb.RequestOp_RequestTxn:
			err = x.check(o.RequestTxn, nested[0])
			nested = nested[1:]
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// checkRange refuses what lies outside the history. Unlike in a plain Range a negative revision does
// not mean the newest one here (etcd's txn.checkRange).
func (x *txn) checkRange(req *pb.RangeRequest) error {
	switch {
	case req.Revision == 0:
		return nil
	case req.Revision > x.reader.rev:
		return ErrFutureRev
	case req.Revision < x.compact:
		return &CompactedError{CompactRevision: x.compact}
	}
	return nil
}

// checkWrittenOnce refuses a Txn that would write a key twice: a revision holds a key once. etcdapi refuses
// most such Txns by their form, as etcd does. What passes there, a delete up to "\x00" or a put and a delete in sibling
// Txns, ends the process of an etcd 3.7; here it is refused too.
func (x *txn) checkWrittenOnce(req *pb.TxnRequest, p *path) error {
	var puts [][]byte
	var deletes []keyRange
	seen := map[string]bool{}
	for op := range p.writes(req) {
		switch o := op.Request.(type) {
		case *pb.RequestOp_RequestPut:
			key := o.RequestPut.Key
			for _, d := range deletes {
				if _, live, _ := x.keys.get(key); live && d.contains(key) {
					return ErrDuplicateKey
				}
			}
			if len(puts) > 0 && seen[string(key)] {
				return ErrDuplicateKey
			}
			seen[string(key)] = true
			puts = append(puts, key)
		case *pb.RequestOp_RequestDeleteRange:
			d := newKeyRange(o.RequestDeleteRange.Key, o.RequestDeleteRange.RangeEnd)
			if slices.ContainsFunc(puts, d.contains) {
				return ErrDuplicateKey
			}
			deletes = append(deletes, d)
		}
	}
	return nil
}

// writes yields the puts and deletes that will run, in order.
func (p *path) writes(req *pb.TxnRequest) iter.Seq[*pb.RequestOp] {
	return func(yield func(*pb.RequestOp) bool) {
		nested := p.nested
		for _, op := range p.ops(req) {
			switch o := op.Request.(type) {
			case *pb.RequestOp_RequestPut, *pb.RequestOp_RequestDeleteRange:
				if !yield(op) {
					return
				}
			case *pb.RequestOp_RequestTxn:
				for inner := range nested[0].writes(o.RequestTxn) {
					if !yield(inner) {
						return
					}
				}
				nested = nested[1:]
			}
		}
	}
}

func (x *txn) execute(req *pb.TxnRequest, p *path) (*pb.TxnResponse, error) {
	ops := p.ops(req)
	resp := &pb.TxnResponse{
		Header:    &pb.ResponseHeader{},
		Succeeded: p.succeeded,
		Responses: make([]*pb.ResponseOp, len(ops)),
	}
	nested := p.nested
	for i, op := range ops {
		out := &pb.ResponseOp{}
		resp.Responses[i] = out
		switch o := op.Request.(type) {
		case *pb.RequestOp_RequestRange:
			if x.batch != nil {
				x.batch.did.Ranges++
				if x.batch.unheard {
					continue
				}
			}
			res, err := x.rangeKeys(x.ctx, o.RequestRange, true)
			if err != nil {
				return nil, err
			}
			out.Response = &pb.ResponseOp_ResponseRange{ResponseRange: res.response()}
		case *pb.RequestOp_RequestPut:
			r, err := x.batch.applyPut(o.RequestPut)
			if err != nil {
				return nil, err
			}
			out.Response = &pb.ResponseOp_ResponsePut{ResponsePut: r}
		case *pb.RequestOp_RequestDeleteRange:
			r, err := x.batch.applyDeleteRange(o.RequestDeleteRange)
			if err != nil {
				return nil, err
			}
			out.Response = &pb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: r}
		case *pb.RequestOp_RequestTxn:
			r, err := x.execute(o.RequestTxn, nested[0])
			if err != nil {
				return nil, err
			}
			nested = nested[1:]
			out.Response = &pb.ResponseOp_ResponseTxn{ResponseTxn: r}
		}
	}
	return resp, nil
}

// countPrevious counts the read of what a put replaces. As in etcd, a Txn reads it twice: when it is checked, too.
func (b *batch) countPrevious(req *pb.PutRequest) {
	if req.PrevKv || req.IgnoreValue || req.IgnoreLease {
		b.did.Ranges++
	}
}

// checkPut: the lease must exist, and ignore_value and ignore_lease need the key.
func (b *batch) checkPut(req *pb.PutRequest) error {
	if req.Lease != 0 && !b.leases.exists(req.Lease) {
		return ErrLeaseNotFound
	}
	if req.IgnoreValue || req.IgnoreLease {
		if _, live, _ := b.st.keys.get(req.Key); !live {
			return ErrKeyNotFound
		}
	}
	return nil
}

// applyPut writes one key. REQUIRES: checkPut passed in this state or, inside a Txn, before it.
func (b *batch) applyPut(req *pb.PutRequest) (*pb.PutResponse, error) {
	resp := &pb.PutResponse{Header: &pb.ResponseHeader{}}
	b.countPrevious(req)
	value, lease := req.Value, req.Lease
	prevKV := req.PrevKv && !b.unheard
	if prevKV || req.IgnoreValue || req.IgnoreLease {
		if slot, live, _ := b.st.keys.get(req.Key); live {
			n, r := b.index.at(slot, b.reader.rev)
			f, err := b.frame(b.ctx, n, r)
			if err != nil {
				return nil, err
			}
			if req.IgnoreValue {
				value = f.Value()
			}
			if req.IgnoreLease {
				lease = r.lease
			}
			if prevKV {
				resp.PrevKv = f.KeyValue()
			}
		} else if req.IgnoreValue || req.IgnoreLease {
			return nil, fmt.Errorf("a key vanished between a Txn's check and its put: %w", ErrKeyNotFound)
		}
	}
	b.put(req.Key, value, lease)
	resp.Header.Revision = b.reader.rev
	return resp, nil
}

func (b *batch) applyDeleteRange(req *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error) {
	resp := &pb.DeleteRangeResponse{Header: &pb.ResponseHeader{}}
	k := newKeyRange(req.Key, req.RangeEnd)
	if req.PrevKv {
		b.did.Ranges++
	}
	if req.PrevKv && !b.unheard {
		var err error
		b.visit(k, b.reader.rev, false, func(_ []byte, n uint32, r *record) bool {
			var f Frame
			if f, err = b.frame(b.ctx, n, r); err != nil {
				return false
			}
			resp.PrevKvs = append(resp.PrevKvs, f.KeyValue())
			return true
		})
		if err != nil {
			return nil, err
		}
	}
	resp.Deleted = b.deleteKeys(k)
	resp.Header.Revision = b.reader.rev
	return resp, nil
}
