package sqlraft

import (
	"errors"
	"math/rand/v2"
	"testing"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

func entriesFrom(index, term uint64, n, size int) []*raftpb.Entry {
	entries := make([]*raftpb.Entry, n)
	for i := range entries {
		entries[i] = &raftpb.Entry{Index: new(index + uint64(i)), Term: new(term), Data: make([]byte, size)}
	}
	return entries
}

// TestStorageIsRaftsMemoryStorage: the same operations on Raft's own storage give the same answers, and what was handed
// out stays as it was.
func TestStorageIsRaftsMemoryStorage(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 1))
	for range 300 {
		ours, theirs := newStorage(5, 1, nil), raft.NewMemoryStorage()
		if err := theirs.ApplySnapshot(&raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: new(uint64(5)), Term: new(uint64(1))}}); err != nil {
			t.Fatal(err)
		}
		type handed struct{ got, copied []*raftpb.Entry }
		var kept []handed
		for range 50 {
			switch r.IntN(4) {
			case 0, 1:
				at := ours.first() + r.Uint64N(ours.last()+2-ours.first())
				term, err := ours.Term(at - 1)
				if err != nil {
					t.Fatal(err)
				}
				entries := entriesFrom(at, term+r.Uint64N(2), r.IntN(5), r.IntN(100))
				ours.append(entries)
				if err := theirs.Append(entries); err != nil {
					t.Fatal(err)
				}
			case 2:
				if ours.last() >= ours.first() {
					to := ours.first() + r.Uint64N(ours.last()-ours.first()+1)
					ours.compact(to)
					if err := theirs.Compact(to); err != nil {
						t.Fatal(err)
					}
				}
			default:
				lo := 4 + r.Uint64N(20)
				if hi := lo + 1 + r.Uint64N(5); hi <= ours.last()+1 {
					a, errA := ours.Entries(lo, hi, 1<<30)
					b, errB := theirs.Entries(lo, hi, 1<<30)
					if !errors.Is(errA, errB) || !sameEntries(a, b) {
						t.Fatalf("seed %d: entries %d to %d: %v %v, %v %v", seed, lo, hi, a, errA, b, errB)
					}
					one, err := ours.Entries(lo, hi, 1)
					if err == nil && (len(one) != 1 || one[0] != a[0]) {
						t.Fatalf("seed %d: %d entries where one fits", seed, len(one))
					}
					kept = append(kept, handed{a, append([]*raftpb.Entry{}, a...)})
				}
			}
			for i := ours.first() - 2; i < ours.last()+3; i++ {
				a, errA := ours.Term(i)
				b, errB := theirs.Term(i)
				if a != b || !errors.Is(errA, errB) {
					t.Fatalf("seed %d: term of %d: %d %v, %d %v", seed, i, a, errA, b, errB)
				}
			}
			size := 0
			for _, e := range ours.entries[1:] {
				size += footprint(e)
			}
			if size != ours.bytes {
				t.Fatalf("seed %d: %d bytes counted as %d", seed, size, ours.bytes)
			}
			for _, h := range kept {
				for i := range h.got {
					if h.got[i] != h.copied[i] {
						t.Fatalf("seed %d: an entry that was handed out has changed", seed)
					}
				}
			}
		}
	}
}

func sameEntries(a, b []*raftpb.Entry) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !proto.Equal(a[i], b[i]) {
			return false
		}
	}
	return true
}

func TestStorageKeepsWhatFollowersMayNeed(t *testing.T) {
	for _, c := range []struct {
		name           string
		n, size        int
		applied        uint64
		entries, bytes int
		first          uint64
	}{
		{"few entries stay", 100, 10, 100, 200, 1 << 20, 1},
		{"a little too many stay", 120, 10, 120, 100, 1 << 20, 1},
		{"many go", 300, 10, 300, 100, 1 << 20, 201},
		{"those not applied stay", 300, 10, 50, 100, 1 << 20, 1},
		{"those not applied stay, whatever they take", 300, 1000, 50, 100, 10, 51},
		{"large ones go", 100, 904, 100, 200, 10_000, 91},
		{"nothing is left", 100, 10, 100, 0, 1 << 20, 101},
	} {
		s := newStorage(0, 0, entriesFrom(1, 1, c.n, c.size))
		s.keep(c.applied, c.entries, c.bytes)
		if s.first() != c.first || s.last() != uint64(c.n) {
			t.Errorf("%s: %d to %d are left, want %d to %d", c.name, s.first(), s.last(), c.first, c.n)
		}
	}
}
