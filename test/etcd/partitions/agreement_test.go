//go:build linux

package partitions

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/test/etcd/partitions/cluster"
)

// sameRevision waits until all members are at the revision of the cluster, when nobody writes any more.
func (s *stage) sameRevision() int64 {
	s.Helper()
	r, err := s.Members[0].KV.Range(s.within(patience), &pb.RangeRequest{Key: []byte("x")})
	s.must(err)
	last := r.Header.Revision
	for _, m := range s.Members {
		s.eventually(fmt.Sprintf("%s is at revision %d", m.Name, last), func(ctx context.Context) error {
			r, err := m.KV.Range(ctx, &pb.RangeRequest{Key: []byte("x"), Serializable: true})
			if err == nil && r.Header.Revision != last {
				err = fmt.Errorf("revision %d", r.Header.Revision)
			}
			return err
		})
	}
	return last
}

// eventually makes a call until it succeeds.
func (s *stage) eventually(what string, call func(context.Context) error) {
	s.Helper()
	ctx := s.within(patience)
	for {
		err := call(ctx)
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			s.Fatalf("%s: still not after %v: %v", what, patience, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// sameEvents reads the whole history from every member, and returns it.
func (s *stage) sameEvents(last int64) []*mvccpb.Event {
	s.Helper()
	var history []*mvccpb.Event
	for i, m := range s.Members {
		here, err := events(s.within(patience), s.record, m, last)
		s.must(err)
		if i == 0 {
			history = here
		} else if where := firstDifference(here, history); where != "" {
			s.Errorf("%s and %s have different histories: %s", m.Name, s.Members[0].Name, where)
		}
	}
	return history
}

// sameHashes compares the HashKV of all members at the newest and at older revisions, and once more after a compaction.
func (s *stage) sameHashes(last int64) {
	s.Helper()
	for _, revision := range []int64{last, 2 + s.random.Int64N(last-1), 2 + s.random.Int64N(last-1)} {
		s.sameHash(revision)
	}
	_, err := s.draw(1, s.Members)[0].KV.Compact(s.within(patience), &pb.CompactionRequest{Revision: last - 5, Physical: true})
	s.must(err)
	s.sameRevision() // a member that answers is past the compaction
	s.eventually("all members have compacted", func(ctx context.Context) error {
		for _, m := range s.Members {
			r, err := m.Maintenance.HashKV(ctx, &pb.HashKVRequest{})
			if err != nil {
				return err
			}
			if r.CompactRevision != last-5 {
				return fmt.Errorf("%s has compacted up to revision %d", m.Name, r.CompactRevision)
			}
		}
		return nil
	})
	s.sameHash(last)
}

func (s *stage) sameHash(revision int64) {
	s.Helper()
	hashes := map[uint32][]*cluster.Member{}
	for _, m := range s.Members {
		r, err := m.Maintenance.HashKV(s.within(patience), &pb.HashKVRequest{Revision: revision})
		s.must(err)
		if r.HashRevision != revision && r.HashRevision != 0 {
			s.Errorf("%s gives the hash of revision %d, want that of %d", m.Name, r.HashRevision, revision)
		}
		hashes[r.Hash] = append(hashes[r.Hash], m)
	}
	if len(hashes) != 1 {
		for hash, members := range hashes {
			s.Errorf("at revision %d the hash of %s is %d", revision, names(members), hash)
		}
	}
}

// sameLeases wants every member to know the same leases, those that are kept.
func (s *stage) sameLeases() {
	s.Helper()
	s.sameRevision()
	for _, m := range s.Members {
		s.eventually("the leases", func(ctx context.Context) error { return s.leases.listed(ctx, m) })
	}
}

// sameMembers wants all members to name the same members, and the same leader.
func (s *stage) sameMembers() {
	s.Helper()
	var first *pb.MemberListResponse
	leaders := map[uint64]string{}
	for _, m := range s.Members {
		r, err := m.Membership.MemberList(s.within(patience), &pb.MemberListRequest{Linearizable: true})
		s.must(err)
		slices.SortFunc(r.Members, func(a, b *pb.Member) int { return cmp.Compare(a.ID, b.ID) })
		if first == nil {
			first = r
		}
		if !slices.EqualFunc(r.Members, first.Members, func(a, b *pb.Member) bool { return proto.Equal(a, b) }) {
			s.Errorf("%s names the members %v, %s %v", m.Name, r.Members, s.Members[0].Name, first.Members)
		}
		status, err := m.Status(s.within(patience), patience)
		s.must(err)
		leaders[status.Leader] += m.Name + " "
	}
	if len(first.Members) != len(s.Members) {
		s.Errorf("the cluster has the members %v, want %s", first.Members, names(s.Members))
	}
	if len(leaders) != 1 || leaders[0] != "" {
		s.Errorf("members name different leaders: %v", leaders)
	}
}
