package etcdapi

import (
	"bytes"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/protobuf/proto"
)

func opPut(key string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key)}}}
}

func opDelete(key, end string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(end)}}}
}

func opRange(key string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key)}}}
}

func opTxn(then, otherwise []*pb.RequestOp) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{Success: then, Failure: otherwise}}}
}

func ops(o ...*pb.RequestOp) []*pb.RequestOp { return o }

func TestRangeChecks(t *testing.T) {
	const unimplementedSort = "rpc error: code = Unimplemented desc = RangeStream does not support custom sort orders"
	const unimplementedFilter = "rpc error: code = Unimplemented desc = RangeStream does not support revision filters"
	for name, c := range map[string]struct {
		req          *pb.RangeRequest
		unary        error
		stream       string // if not unary's
		streamPasses bool
	}{
		"plain":              {req: &pb.RangeRequest{Key: []byte("a")}, streamPasses: true},
		"empty key":          {req: &pb.RangeRequest{}, unary: rpctypes.ErrGRPCEmptyKey},
		"empty key with end": {req: &pb.RangeRequest{RangeEnd: []byte("z")}, unary: rpctypes.ErrGRPCEmptyKey},
		"unknown order":      {req: &pb.RangeRequest{Key: []byte("a"), SortOrder: 3}, unary: rpctypes.ErrGRPCInvalidSortOption},
		"negative order":     {req: &pb.RangeRequest{Key: []byte("a"), SortOrder: -1}, unary: rpctypes.ErrGRPCInvalidSortOption},
		"unknown target":     {req: &pb.RangeRequest{Key: []byte("a"), SortTarget: 5}, unary: rpctypes.ErrGRPCInvalidSortOption},
		"descending":         {req: &pb.RangeRequest{Key: []byte("a"), SortOrder: pb.RangeRequest_DESCEND}, stream: unimplementedSort},
		"ascending by key":   {req: &pb.RangeRequest{Key: []byte("a"), SortOrder: pb.RangeRequest_ASCEND}, streamPasses: true},
		"target, no order":   {req: &pb.RangeRequest{Key: []byte("a"), SortTarget: pb.RangeRequest_VALUE}, streamPasses: true},
		"ascending by value": {req: &pb.RangeRequest{Key: []byte("a"), SortOrder: pb.RangeRequest_ASCEND, SortTarget: pb.RangeRequest_VALUE}, stream: unimplementedSort},
		"min mod revision":   {req: &pb.RangeRequest{Key: []byte("a"), MinModRevision: 1}, stream: unimplementedFilter},
		"max mod revision":   {req: &pb.RangeRequest{Key: []byte("a"), MaxModRevision: 1}, stream: unimplementedFilter},
		"min create":         {req: &pb.RangeRequest{Key: []byte("a"), MinCreateRevision: 1}, stream: unimplementedFilter},
		"max create":         {req: &pb.RangeRequest{Key: []byte("a"), MaxCreateRevision: 1}, stream: unimplementedFilter},
	} {
		checkErr(t, name, checkRange(c.req), c.unary)
		err := checkRangeStream(c.req)
		switch {
		case c.streamPasses:
			checkErr(t, name+", streamed", err, nil)
		case c.stream == "":
			checkErr(t, name+", streamed", err, c.unary)
		case err == nil || err.Error() != c.stream:
			t.Errorf("%s, streamed: got %v, want %s", name, err, c.stream)
		}
	}
}

func TestPutChecks(t *testing.T) {
	for name, c := range map[string]struct {
		req  *pb.PutRequest
		want error
	}{
		"plain":                        {&pb.PutRequest{Key: []byte("a"), Value: []byte("v"), Lease: 1}, nil},
		"empty key":                    {&pb.PutRequest{Value: []byte("v")}, rpctypes.ErrGRPCEmptyKey},
		"empty key before the others":  {&pb.PutRequest{Value: []byte("v"), IgnoreValue: true}, rpctypes.ErrGRPCEmptyKey},
		"ignore_value with a value":    {&pb.PutRequest{Key: []byte("a"), Value: []byte("v"), IgnoreValue: true}, rpctypes.ErrGRPCValueProvided},
		"ignore_value":                 {&pb.PutRequest{Key: []byte("a"), IgnoreValue: true}, nil},
		"ignore_lease with a lease":    {&pb.PutRequest{Key: []byte("a"), Lease: 1, IgnoreLease: true}, rpctypes.ErrGRPCLeaseProvided},
		"ignore_lease without a lease": {&pb.PutRequest{Key: []byte("a"), IgnoreLease: true}, nil},
	} {
		checkErr(t, name, checkPut(c.req), c.want)
	}
	checkErr(t, "delete without key", checkDelete(&pb.DeleteRangeRequest{}), rpctypes.ErrGRPCEmptyKey)
	checkErr(t, "delete", checkDelete(&pb.DeleteRangeRequest{Key: []byte("a")}), nil)
}

func TestTxnChecks(t *testing.T) {
	compare := func(n int) (cs []*pb.Compare) {
		for range n {
			cs = append(cs, &pb.Compare{Key: []byte("a")})
		}
		return cs
	}
	puts := func(n int) (os []*pb.RequestOp) {
		for i := range n {
			os = append(os, opPut(string(rune('a'+i))))
		}
		return os
	}
	for name, c := range map[string]struct {
		req  *pb.TxnRequest
		want error
	}{
		"empty":                       {&pb.TxnRequest{}, nil},
		"as many as allowed":          {&pb.TxnRequest{Compare: compare(4), Success: puts(4), Failure: puts(4)}, nil},
		"too many compares":           {&pb.TxnRequest{Compare: compare(5)}, rpctypes.ErrGRPCTooManyOps},
		"too many in success":         {&pb.TxnRequest{Success: puts(5)}, rpctypes.ErrGRPCTooManyOps},
		"too many in failure":         {&pb.TxnRequest{Failure: puts(5)}, rpctypes.ErrGRPCTooManyOps},
		"nested: what the outer left": {&pb.TxnRequest{Success: ops(opTxn(puts(3), nil))}, nil},
		"nested: more than that":      {&pb.TxnRequest{Success: ops(opTxn(puts(4), nil))}, rpctypes.ErrGRPCTooManyOps},
		"compare without key":         {&pb.TxnRequest{Compare: []*pb.Compare{{}}}, rpctypes.ErrGRPCEmptyKey},
		"put without key":             {&pb.TxnRequest{Success: ops(opPut(""))}, rpctypes.ErrGRPCEmptyKey},
		"range without key":           {&pb.TxnRequest{Failure: ops(opRange(""))}, rpctypes.ErrGRPCEmptyKey},
		"delete without key":          {&pb.TxnRequest{Failure: ops(opDelete("", ""))}, rpctypes.ErrGRPCEmptyKey},
		"nested put without key":      {&pb.TxnRequest{Failure: ops(opTxn(nil, ops(opPut(""))))}, rpctypes.ErrGRPCEmptyKey},
		"operation that says nothing": {&pb.TxnRequest{Success: ops(&pb.RequestOp{})}, rpctypes.ErrGRPCKeyNotFound},
		"nil operation":               {&pb.TxnRequest{Success: ops(nil)}, rpctypes.ErrGRPCKeyNotFound},
	} {
		checkErr(t, name, checkTxn(c.req, 4), c.want)
	}
}

func TestATxnChangesAKeyOnlyOnce(t *testing.T) {
	dup := rpctypes.ErrGRPCDuplicateKey
	for name, c := range map[string]struct {
		ops  []*pb.RequestOp
		want error
	}{
		"one put":                          {ops(opPut("a")), nil},
		"two puts":                         {ops(opPut("a"), opPut("b")), nil},
		"the same put twice":               {ops(opPut("a"), opPut("a")), dup},
		"put and read":                     {ops(opPut("a"), opRange("a")), nil},
		"put and delete":                   {ops(opPut("a"), opDelete("a", "")), dup},
		"delete and put":                   {ops(opDelete("a", ""), opPut("a")), dup},
		"delete twice":                     {ops(opDelete("a", ""), opDelete("a", "")), nil},
		"put inside a deleted range":       {ops(opPut("b"), opDelete("a", "c")), dup},
		"put at its begin":                 {ops(opPut("a"), opDelete("a", "c")), dup},
		"put at its end":                   {ops(opPut("c"), opDelete("a", "c")), nil},
		"put before it":                    {ops(opPut("A"), opDelete("a", "c")), nil},
		"nested put, outer put":            {ops(opTxn(ops(opPut("a")), nil), opPut("a")), dup},
		"nested put, outer delete":         {ops(opTxn(nil, ops(opPut("b"))), opDelete("a", "c")), dup},
		"nested delete, outer put":         {ops(opPut("b"), opTxn(nil, ops(opDelete("a", "c")))), dup},
		"both branches put the same":       {ops(opTxn(ops(opPut("a")), ops(opPut("a")))), nil},
		"branches: put here, delete there": {ops(opTxn(ops(opPut("a")), ops(opDelete("a", "")))), nil},
		"siblings put the same":            {ops(opTxn(ops(opPut("a")), nil), opTxn(nil, ops(opPut("a")))), dup},
		"sibling deletes, later one puts":  {ops(opTxn(ops(opDelete("a", "c")), nil), opTxn(ops(opPut("b")), nil)), dup},
		"inside a nested branch":           {ops(opTxn(ops(opPut("a"), opPut("a")), nil)), dup},
		"two levels down":                  {ops(opTxn(ops(opTxn(ops(opPut("a")), nil)), nil), opPut("a")), dup},
	} {
		checkErr(t, name+", success", checkOverlaps(&pb.TxnRequest{Success: c.ops}), c.want)
		checkErr(t, name+", failure", checkOverlaps(&pb.TxnRequest{Failure: c.ops}), c.want)
	}
	checkErr(t, "success and failure are alternatives", checkOverlaps(&pb.TxnRequest{Success: ops(opPut("a")), Failure: ops(opPut("a"))}), nil)
}

func TestReadOnlyTxns(t *testing.T) {
	for name, c := range map[string]struct {
		req  *pb.TxnRequest
		want bool
	}{
		"empty":            {&pb.TxnRequest{}, true},
		"reads":            {&pb.TxnRequest{Success: ops(opRange("a")), Failure: ops(opRange("b"))}, true},
		"nested reads":     {&pb.TxnRequest{Success: ops(opTxn(ops(opRange("a")), nil))}, true},
		"a put in failure": {&pb.TxnRequest{Success: ops(opRange("a")), Failure: ops(opPut("b"))}, false},
		"a nested delete":  {&pb.TxnRequest{Success: ops(opTxn(nil, ops(opDelete("a", ""))))}, false},
	} {
		if got := readOnly(c.req); got != c.want {
			t.Errorf("%s: got %v", name, got)
		}
	}
}

// The limit is etcd's, to the byte: on the InternalRaftRequest that etcd would propose.
func TestRequestTooLargeIsDecidedOnWhatRaftWouldCarry(t *testing.T) {
	for _, member := range []uint64{testMember, 1, 0x00ff, 0x0100, 0x7fff, 0x8000} {
		s := newTestServer(t, newFakeStore(), func(o *Options) { o.Identity.MemberID = member })
		for _, n := range []int{0, 1, 100, 127, 128, 20_000} {
			req := &pb.PutRequest{Key: []byte("k"), Value: bytes.Repeat([]byte("v"), n)}
			raft := &pb.InternalRaftRequest{Header: &pb.RequestHeader{ID: member<<48 | 1<<47}, Put: req}
			if got := proto.Size(req) + int(s.raftOverhead(proto.Size(req))); got != proto.Size(raft) {
				t.Errorf("member %x, value of %d: counted %d bytes, etcd's request has %d", member, n, got, proto.Size(raft))
			}
			s.opts.MaxRequestBytes = uint(proto.Size(raft))
			checkErr(t, "at the limit", s.checkSize(req), nil)
			s.opts.MaxRequestBytes--
			checkErr(t, "over the limit", s.checkSize(req), rpctypes.ErrGRPCRequestTooLarge)
		}
	}
}
