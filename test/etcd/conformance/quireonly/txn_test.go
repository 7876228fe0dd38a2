package quireonly

import (
	"path/filepath"
	"syscall"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/test/etcd/start"
)

// etcd 3.7.3 accepts these Txns, which write a key twice because the check for that overlooks a delete
// with the range end "\x00" and one in another nested Txn, and dies of them: of the first at once, of the
// second when it reads at that revision after a compaction.
func TestTxnsThatKillEtcdAreSurvived(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := filepath.Join(t.TempDir(), "data")
	s := start.QuireIn(t, dir, start.Options{})
	put(t, s, &pb.PutRequest{Key: []byte("a"), Value: []byte("1")})
	put(t, s, &pb.PutRequest{Key: []byte("b"), Value: []byte("1")})

	putOp := func(r *pb.PutRequest) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: r}}
	}
	deleteOp := func(key, end string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(end)}}}
	}
	nested := func(op *pb.RequestOp) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{Success: []*pb.RequestOp{op}}}}
	}
	for _, ops := range [][]*pb.RequestOp{
		{deleteOp("a", "\x00"), putOp(&pb.PutRequest{Key: []byte("a"), IgnoreValue: true})},
		{nested(putOp(&pb.PutRequest{Key: []byte("b"), Value: []byte("2")})), nested(deleteOp("b", ""))},
		{nested(putOp(&pb.PutRequest{Key: []byte("c"), Value: []byte("2")})), nested(deleteOp("c", ""))},
	} {
		before := get(t, s, "b").Header.Revision
		r, err := s.KV.Txn(ctx, &pb.TxnRequest{Success: ops})
		after := get(t, s, "b").Header.Revision
		switch {
		case err != nil && after != before:
			t.Errorf("a refused Txn moved the revision from %d to %d: %v", before, after, err)
		case err == nil && (after != r.Header.Revision || after > before+1):
			t.Errorf("a Txn answered with revision %d moved the store from %d to %d", r.Header.Revision, before, after)
		}
	}
	put(t, s, &pb.PutRequest{Key: []byte("d")})
	head := put(t, s, &pb.PutRequest{Key: []byte("d")})
	state := make(map[int64]string)
	read := func(revision int64) string {
		r, err := s.KV.Range(ctx, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Revision: revision})
		if err != nil {
			t.Fatalf("reading at %d: %v", revision, err)
		}
		text := ""
		for _, kv := range r.Kvs {
			text += string(kv.Key) + "=" + string(kv.Value) + " "
		}
		return text
	}
	for revision := int64(2); revision <= head; revision++ {
		state[revision] = read(revision)
	}
	for compacted := int64(3); compacted <= head; compacted++ {
		if _, err := s.KV.Compact(ctx, &pb.CompactionRequest{Revision: compacted, Physical: true}); err != nil {
			t.Fatal(err)
		}
		for revision := compacted; revision <= head; revision++ {
			if got := read(revision); got != state[revision] {
				t.Errorf("compacted to %d, revision %d reads %q, before %q", compacted, revision, got, state[revision])
			}
		}
	}
	stop(t, s, syscall.SIGKILL)
	if code, output := check(t, dir); code != 0 {
		t.Errorf("quire check ends with %d:\n%s", code, output)
	}
	s = start.QuireIn(t, dir, start.Options{})
	if got := read(0); got != state[head] {
		t.Errorf("after a restart the store reads %q, before %q", got, state[head])
	}
}
