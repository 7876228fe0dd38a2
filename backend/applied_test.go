package backend

import (
	"context"
	"errors"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

func TestAppliedSaysWhatABatchDid(t *testing.T) {
	var did []Applied
	db := openTest(t, testPath(t), Options{Hooks: Hooks{Applied: func(a *Applied) {
		kept := *a
		kept.Commands = append([]AppliedCommand(nil), a.Commands...)
		did = append(did, kept)
	}}})
	defer db.Close()
	next := func(what string, ranges, puts, deletes, putBytes, txns int) AppliedCommand {
		t.Helper()
		if len(did) != 1 || len(did[0].Commands) != 1 {
			t.Fatalf("%s: told %+v", what, did)
		}
		a := did[0]
		did = nil
		if a.Ranges != ranges || a.Puts != puts || a.Deletes != deletes || a.PutBytes != putBytes || a.Txns != txns {
			t.Errorf("%s: %d ranges, %d puts, %d deletes, %d bytes, %d txns; want %d, %d, %d, %d, %d",
				what, a.Ranges, a.Puts, a.Deletes, a.PutBytes, a.Txns, ranges, puts, deletes, putBytes, txns)
		}
		return a.Commands[0]
	}

	put := &pb.PutRequest{Key: []byte("a"), Value: []byte("123")}
	mustWrite(t, db, put)
	if c := next("a put", 0, 1, 0, 4, 0); c.Request != put || c.Response == nil || c.Err != nil || c.Took < 0 {
		t.Errorf("the command of a put is %+v", c)
	}
	mustWrite(t, db, &pb.PutRequest{Key: []byte("a"), Value: []byte("4"), PrevKv: true})
	next("a put with prev_kv", 1, 1, 0, 2, 1)
	mustWrite(t, db, &pb.DeleteRangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), PrevKv: true})
	next("a delete with prev_kv", 1, 0, 1, 0, 1)
	mustWrite(t, db, &pb.DeleteRangeRequest{Key: []byte("nothing")})
	next("a delete of nothing", 0, 0, 1, 0, 0)

	compare := &pb.Compare{Key: []byte("a"), Target: pb.Compare_VERSION, TargetUnion: &pb.Compare_Version{}}
	mustWrite(t, db, &pb.TxnRequest{Compare: []*pb.Compare{compare, compare}, Success: []*pb.RequestOp{putOp("b")}})
	next("a Txn that reads twice and then writes once", 2, 1, 0, 1, 1)
	mustWrite(t, db, &pb.TxnRequest{Compare: []*pb.Compare{compare}, Success: []*pb.RequestOp{putOp("b"), putOp("c")}})
	next("a Txn that reads once and then writes twice", 1, 2, 0, 2, 1)

	mustWrite(t, db, &pb.LeaseGrantRequest{ID: 7, TTL: 1000})
	next("a grant", 0, 0, 0, 0, 0)
	for _, k := range []string{"d", "e", "f"} {
		mustWrite(t, db, &pb.PutRequest{Key: []byte(k), Lease: 7})
		next("a put", 0, 1, 0, 1, 0)
	}
	mustWrite(t, db, &pb.LeaseRevokeRequest{ID: 7})
	next("a revocation of three keys", 0, 0, 3, 0, 1)

	_, err := db.Write(context.Background(), Command{Request: &pb.PutRequest{Key: []byte("x"), Lease: 99}})
	if !errors.Is(err, ErrLeaseNotFound) {
		t.Fatal(err)
	}
	if c := next("a put that is refused", 0, 0, 0, 0, 0); !errors.Is(c.Err, ErrLeaseNotFound) || c.Response != nil {
		t.Errorf("the command of a put that is refused is %+v", c)
	}
}
