package conformance

import (
	"fmt"
	"maps"
	"strconv"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/mirror"
)

// copied is what a mirror has after its base.
func (x *exam) copied(s mirror.Syncer) (all map[string]string, pages int) {
	x.Helper()
	all = make(map[string]string)
	pagesOf, failed := s.SyncBase(x.ctx)
	for r := range pagesOf {
		pages++
		for _, kv := range r.Kvs {
			all[string(kv.Key)] = string(kv.Value)
		}
	}
	x.done("copy the base", <-failed)
	return all, pages
}

// follow brings a copy up to a revision.
func follow(x *exam, copied map[string]string, from clientv3.WatchChan, revision int64) {
	x.Helper()
	for {
		r := next(x, "updates", from)
		x.done("updates", r.Err())
		for _, e := range r.Events {
			if e.Type == clientv3.EventTypeDelete {
				delete(copied, string(e.Kv.Key))
			} else {
				copied[string(e.Kv.Key)] = string(e.Kv.Value)
			}
		}
		if n := len(r.Events); n > 0 && r.Events[n-1].Kv.ModRevision >= revision {
			return
		}
	}
}

// wholly is what is stored below a prefix.
func (x *exam) wholly(prefix string) map[string]string {
	x.Helper()
	r, err := x.client().Get(x.ctx, prefix, clientv3.WithPrefix())
	x.done("get all", err)
	all := make(map[string]string)
	for _, kv := range r.Kvs {
		all[string(kv.Key)] = string(kv.Value)
	}
	return all
}

// fill puts n keys below a prefix.
func (x *exam) fill(prefix string, n int) {
	x.Helper()
	for i := 0; i < n; {
		t := &pb.TxnRequest{}
		for ; i < n && len(t.Success) < 100; i++ {
			t.Success = append(t.Success, putOp(fmt.Sprintf("%s%05d", prefix, i), strconv.Itoa(i)))
		}
		x.txn(t)
	}
}

var mirrorCases = []testCase{
	{name: "base and updates make the whole, also of what is written meanwhile", run: func(x *exam) {
		x.fill("a/", 2100)
		x.fill("b/", 5)
		for prefix, wantPages := range map[string]int{"a/": 3, "b/": 1, "": 3} {
			s := mirror.NewSyncer(x.client(), prefix, 0)
			copied, pages := x.copied(s)
			equal(x, "pages of the base", pages, wantPages)
			if want := x.wholly(prefix); !maps.Equal(copied, want) {
				x.Errorf("%q: the base has %d keys, want %d", prefix, len(copied), len(want))
			}
			x.txn(&pb.TxnRequest{Success: []*pb.RequestOp{deleteOp("a/00100", "a/00200"), deleteOp("b/00001", ""), putOp("a/00000", "new"), putOp("b/new", "")}})
			x.put("b/00000", "again")
			last := x.put("a/00100", "back").Header.Revision
			if prefix == "b/" {
				last--
			}
			follow(x, copied, s.SyncUpdates(x.ctx), last)
			if want := x.wholly(prefix); !maps.Equal(copied, want) {
				x.Errorf("%q: the copy has %d keys, want %d: %v", prefix, len(copied), len(want), copied)
			}
			x.delete("b/new")
		}
	}},

	{name: "a mirror of a revision is of that one and what followed", run: func(x *exam) {
		rev := x.put("k", "old").Header.Revision
		x.put("k", "new")
		last := x.put("k2", "").Header.Revision
		s := mirror.NewSyncer(x.client(), "", rev)
		copied, _ := x.copied(s)
		if want := map[string]string{"k": "old"}; !maps.Equal(copied, want) {
			x.Errorf("the base is %v, want %v", copied, want)
		}
		follow(x, copied, s.SyncUpdates(x.ctx), last)
		if want := x.wholly(""); !maps.Equal(copied, want) {
			x.Errorf("the copy is %v, want %v", copied, want)
		}
	}},

	{name: "a mirror that a compaction has overtaken is told so", run: func(x *exam) {
		rev := x.put("k", "old").Header.Revision
		s := mirror.NewSyncer(x.client(), "", rev)
		x.copied(s)
		for range 3 {
			x.put("k", "new")
		}
		x.compact(rev + 2)
		r := next(x, "updates", s.SyncUpdates(x.ctx))
		x.refused("updates", r.Err(), rpctypes.ErrCompacted)
		equal(x, "the compacted revision", r.CompactRevision, rev+2)
		pages, failed := mirror.NewSyncer(x.client(), "", rev).SyncBase(x.ctx)
		closes(x, "the base", pages)
		x.refused("the base", next(x, "the base", failed), rpctypes.ErrCompacted)
	}},
}
