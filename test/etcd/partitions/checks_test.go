//go:build linux

package partitions

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/test/etcd/partitions/cluster"
)

// example is a history as a cluster without faults makes it: the operations overlap, and take effect in the order of their calls.
type example struct {
	operations []*operation
	events     []*mvccpb.Event
	last       int64
}

func newExample(r *rand.Rand, n int) *example {
	x := &example{last: 1}
	s := store{}
	change := func(key, value string) {
		e := &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: x.last}, PrevKv: s[key]}
		if value == "" {
			e.Type = mvccpb.Event_DELETE
			delete(s, key)
		} else {
			e.Kv.Value, e.Kv.Version, e.Kv.CreateRevision = []byte(value), 1, x.last
			if old := s[key]; old != nil {
				e.Kv.Version, e.Kv.CreateRevision = old.Version+1, old.CreateRevision
			}
			s[key] = e.Kv
		}
		x.events = append(x.events, e)
	}
	for i := range n {
		key := register(r.IntN(2))
		o := &operation{
			client: i % 3, via: fmt.Sprintf("m%d.1", i%3), kind: kind(r.IntN(6)), key: key,
			called: time.Duration(i * 10), returned: time.Duration(i*10 + 15),
		}
		if o.kind <= remove {
			o.value = fmt.Sprint("v", i)
		}
		if o.kind == swap || o.kind == remove {
			o.expect = valueOf(s, key)
			if r.IntN(4) == 0 {
				o.expect = "another"
			}
			o.done = o.expect == valueOf(s, key)
			if o.kind == remove && o.expect == "" {
				o.kind = swap
			}
		}
		switch {
		case o.kind == put, o.kind == swap && o.done:
			x.last++
			change(key, o.value)
		case o.kind == remove && o.done:
			x.last++
			change(key, "")
			change(marker(o.client), o.value)
		case o.kind == list:
			o.key, o.found = registers, map[string]*mvccpb.KeyValue{}
			for key, kv := range s {
				if isRegister(key) {
					o.found[key] = kv
				}
			}
		default:
			o.found = map[string]*mvccpb.KeyValue{}
			if kv := s[key]; kv != nil {
				o.found[key] = kv
			}
		}
		o.revision = x.last
		x.operations = append(x.operations, o)
	}
	return x
}

// find returns an operation in the middle of the history for which ok holds.
func (x *example) find(ok func(*operation) bool) *operation {
	from := len(x.operations) / 2
	i := slices.IndexFunc(x.operations[from:], ok)
	if i < 0 {
		panic("the example has no such operation")
	}
	return x.operations[from+i]
}

// event returns that of the value which o has written.
func (x *example) event(o *operation) *mvccpb.Event {
	return x.events[slices.IndexFunc(x.events, func(e *mvccpb.Event) bool { return string(e.Kv.Value) == o.value })]
}

// forget is what a store does that loses a write: nothing after it notices.
func (x *example) forget(o *operation) {
	lost := x.event(o)
	for _, e := range x.events {
		if e.PrevKv == lost.Kv {
			e.PrevKv = proto.CloneOf(lost.Kv)
			e.PrevKv.Value = []byte("r")
		}
	}
	lost.Kv = proto.CloneOf(lost.Kv)
	lost.Kv.Value = []byte("r")
}

func isPut(o *operation) bool  { return o.kind == put }
func isRead(o *operation) bool { return o.kind == read && len(o.found) > 0 }

// What the checks are there for they find, in a history in which nothing else is wrong.
func TestBrokenHistoriesAreFound(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(x *example)
		want string // complaint of the accountant; "" is none
		// porcupine, which sees no revisions, finds it too
		linear bool
	}{
		{name: "nothing", do: func(*example) {}},
		{name: "an answer that got lost on its way", do: func(x *example) {
			x.find(isPut).err = status.Error(codes.Unavailable, "lost")
		}},
		{name: "a write without answer that never happened", do: func(x *example) {
			x.operations = append(x.operations, &operation{kind: put, key: register(0), value: "never", called: 1, returned: 2, err: status.Error(codes.Unavailable, "lost")})
		}},
		{name: "an acknowledged write is lost", want: "acknowledged and lost", do: func(x *example) { x.forget(x.find(isPut)) }},
		{name: "a write is applied twice", want: "applied 2 times", do: func(x *example) {
			o := x.find(isPut)
			again := proto.CloneOf(x.event(o))
			x.last++
			again.Kv.ModRevision = x.last
			x.events = append(x.events, again)
		}},
		{name: "a write is another revision", want: "it is revision", do: func(x *example) { x.find(isPut).revision-- }},
		{name: "a write that nobody sent", want: "which nobody sent", do: func(x *example) {
			x.last++
			x.events = append(x.events, &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte(register(0)), Value: []byte("whose"), ModRevision: x.last}})
		}},
		{name: "a refused write happened", want: "refused, and yet", do: func(x *example) {
			x.find(func(o *operation) bool { return o.kind == swap && o.done }).done = false
		}},
		{name: "a swap is done though the value was another", want: "done, though the key was", linear: true, do: func(x *example) {
			x.find(func(o *operation) bool { return o.kind == swap && o.done }).expect = "another"
		}},
		{name: "a swap is refused though the value was right", want: "as it expects", linear: true, do: func(x *example) {
			o := x.find(func(o *operation) bool { return o.kind == swap && !o.done && len(o.found) > 0 })
			o.expect = string(o.found[o.key].Value)
		}},
		{name: "a read of an old value", want: "broke linearizability", linear: true, do: func(x *example) {
			o := x.find(isRead)
			for _, e := range x.events {
				if string(e.Kv.Key) == o.key && e.Type == mvccpb.Event_PUT {
					o.found[o.key], o.revision = e.Kv, e.Kv.ModRevision
					return
				}
			}
		}},
		{name: "a read of another value at the right revision", want: "the store has", linear: true, do: func(x *example) {
			o := x.find(isRead)
			o.found[o.key] = proto.CloneOf(o.found[o.key])
			o.found[o.key].Value = []byte("another")
		}},
		{name: "a read of the right value with another version", want: "the store has", do: func(x *example) {
			o := x.find(isRead)
			o.found[o.key] = proto.CloneOf(o.found[o.key])
			o.found[o.key].Version++
		}},
		{name: "a list without a key", want: "the store has", linear: true, do: func(x *example) {
			// What overlaps with it may not have removed the key.
			o := x.find(func(o *operation) bool {
				i := slices.Index(x.operations, o)
				quiet := i+1 < len(x.operations) && !x.operations[i-1].wrote() && !x.operations[i+1].wrote()
				return quiet && o.kind == list && len(o.found) == 2
			})
			delete(o.found, register(1))
		}},
		{name: "an answer of the future", want: "an answer at revision", do: func(x *example) { x.find(isRead).revision = x.last + 1 }},
		{name: "a member goes back in time", want: "the member went back", do: func(x *example) {
			o := x.find(func(o *operation) bool { return o.kind == stale })
			o.revision = 1
			clear(o.found)
		}},
		{name: "a write is seen before it was sent", want: "written at revision", linear: true, do: func(x *example) {
			o := x.find(func(o *operation) bool {
				return isPut(o) && slices.ContainsFunc(x.operations, func(later *operation) bool {
					return later.kind == read && later.called > o.called && later.revision == o.revision && later.key == o.key
				})
			})
			o.called, o.returned = 1e6, 1e6+1
			o.err = status.Error(codes.Unavailable, "lost")
		}},
		{name: "a revision is missing", want: "has no revision", do: func(x *example) {
			e := x.event(x.find(isPut))
			x.events = slices.DeleteFunc(x.events, func(other *mvccpb.Event) bool { return other.Kv.ModRevision == e.Kv.ModRevision })
		}},
		{name: "half a transaction", want: "its revision changed", do: func(x *example) {
			o := x.find(func(o *operation) bool { return o.kind == remove && o.done })
			x.events = slices.DeleteFunc(x.events, func(e *mvccpb.Event) bool {
				return e.Kv.ModRevision == o.revision && e.Type == mvccpb.Event_DELETE
			})
		}},
		{name: "a watch with another previous value", want: "the watch says that", do: func(x *example) {
			e := x.event(x.find(func(o *operation) bool { return isPut(o) && x.event(o).PrevKv != nil }))
			e.PrevKv = nil
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			seed := newSeed(t)
			t.Logf("repeat with QUIRE_SEED=%d", seed)
			x := newExample(rand.New(rand.NewPCG(seed, 3)), 3000)
			c.do(x)
			wrong := strings.Join(account(x.operations, x.events, x.last), "\n")
			if c.want == "" && wrong != "" {
				t.Errorf("complaints without cause: %s", wrong)
			}
			if !strings.Contains(wrong, c.want) {
				t.Errorf("the accountant complains of %q, want %q", wrong, c.want)
			}
			err := linear(x.operations, x.events, time.Minute, "")
			if c.linear && err == nil {
				t.Error("porcupine does not find it")
			}
			if c.want == "" && err != nil {
				t.Error(err)
			}
		})
	}
}

// answers are what a watch stream brings.
func created() *pb.WatchResponse { return &pb.WatchResponse{Created: true} }
func bookmark(revision int64) *pb.WatchResponse {
	return &pb.WatchResponse{Header: &pb.ResponseHeader{Revision: revision}}
}
func changes(revisions ...int64) *pb.WatchResponse {
	r := bookmark(slices.Max(revisions))
	for _, revision := range revisions {
		r.Events = append(r.Events, &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte("k"), ModRevision: revision}})
	}
	return r
}

func TestBrokenWatchesAreFound(t *testing.T) {
	all := changes(2, 3, 4, 4, 5).Events
	for _, c := range []struct {
		name    string
		answers []*pb.WatchResponse
		want    string
	}{
		{"nothing wrong", []*pb.WatchResponse{created(), changes(2, 3), bookmark(3), bookmark(3), changes(4, 4), created(), changes(5), bookmark(9)}, ""},
		{"a gap", []*pb.WatchResponse{created(), changes(2, 3), changes(5)}, "want"},
		{"an event is missing in the end", []*pb.WatchResponse{created(), changes(2, 3, 4, 4)}, "events, want 5"},
		{"an event comes twice", []*pb.WatchResponse{created(), changes(2, 3), changes(3, 4, 4, 5)}, "broke Ordered, Unique"},
		{"events in another order", []*pb.WatchResponse{created(), changes(2, 4, 4, 3, 5)}, "broke Ordered"},
		{"a revision in two parts", []*pb.WatchResponse{created(), changes(2, 3, 4), changes(4, 5)}, "Atomic"},
		{"an event after its bookmark", []*pb.WatchResponse{created(), changes(2, 3), bookmark(4), changes(4, 4, 5)}, "Bookmarkable"},
		{"a bookmark behind an event", []*pb.WatchResponse{created(), changes(2, 3), bookmark(2), changes(4, 4, 5)}, "Bookmarkable"},
		{"compacted", []*pb.WatchResponse{{Canceled: true, CompactRevision: 7}, changes(2, 3, 4, 4, 5)}, "nothing was compacted"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := &watching{member: &cluster.Member{Name: "m"}, record: newRecord()}
			for _, r := range c.answers {
				_ = w.take(r) // the end of the stream, which is what the complaint is about
			}
			wrong := strings.Join(w.complete(all), "\n")
			if (wrong != "") != (c.want != "") || !strings.Contains(wrong, c.want) {
				t.Errorf("the complaint is %q, want %q", wrong, c.want)
			}
		})
	}
}

func TestBrokenLeasesAreFound(t *testing.T) {
	const second = time.Second
	for _, c := range []struct {
		name  string
		lease lease
		puts  []int64 // revisions at which its keys were put; both keys, but for "apart"
		ends  []int64
		apart bool
		want  string
	}{
		{name: "kept until it was revoked", lease: lease{kept: true, renewed: 100 * second, revoked: true}, puts: []int64{2}, ends: []int64{50}},
		{name: "left", lease: lease{renewed: 10 * second}, puts: []int64{2}, ends: []int64{15}},
		{name: "left, its keys never put", lease: lease{}},
		{name: "left, and ends too early", lease: lease{renewed: 10 * second}, puts: []int64{2}, ends: []int64{14}, want: "it ended at 14s already"},
		{name: "left, and ends too late", lease: lease{renewed: 10 * second}, puts: []int64{2}, ends: []int64{22}, want: "it ended only at 22s"},
		{name: "renewed, and ends too early", lease: lease{kept: true, renewed: 10 * second}, puts: []int64{2}, ends: []int64{14}, want: "it ended at 14s already"},
		{name: "renewed in vain", lease: lease{kept: true, renewed: 10 * second}, puts: []int64{2}, ends: []int64{20}, want: "reached a majority all the time"},
		{name: "does not end", lease: lease{renewed: 10 * second}, puts: []int64{2}, want: "want each once"},
		{name: "ends twice", lease: lease{renewed: 10 * second}, puts: []int64{2}, ends: []int64{15, 16}, want: "want each once"},
		{name: "one key stays", lease: lease{renewed: 10 * second}, puts: []int64{2}, ends: []int64{15}, apart: true, want: "come and go together"},
		{name: "its keys were lost", lease: lease{kept: true}, want: "never there"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := &c.lease
			l.ttl = 5 * second
			ls := &leases{}
			ls.mu.all = []*lease{l}
			var events []*mvccpb.Event
			seen := map[int64]time.Duration{} // revision n is seen in second n
			add := func(part string, revision int64, e mvccpb.Event_EventType) {
				events = append(events, &mvccpb.Event{Type: e, Kv: &mvccpb.KeyValue{Key: []byte(l.key(part)), ModRevision: revision}})
				seen[revision] = time.Duration(revision) * second
			}
			for _, revision := range c.puts {
				add("a", revision, mvccpb.Event_PUT)
				add("b", revision, mvccpb.Event_PUT)
			}
			for _, revision := range c.ends {
				add("a", revision, mvccpb.Event_DELETE)
				if !c.apart {
					add("b", revision, mvccpb.Event_DELETE)
				}
			}
			wrong := strings.Join(ls.account(events, seen, true, 6*second), "\n")
			if (wrong != "") != (c.want != "") || !strings.Contains(wrong, c.want) {
				t.Errorf("the complaint is %q, want %q", wrong, c.want)
			}
		})
	}
}
