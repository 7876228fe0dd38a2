//go:build linux

package partitions

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/test/etcd/partitions/cluster"
)

// The keys that clients write are "r/" and a number: few, so that clients meet.
const registers, numRegisters = "r/", 7

func register(i int) string { return fmt.Sprint(registers, i) }

func isRegister(key string) bool { return strings.HasPrefix(key, registers) }

// marker is the key in which a client notes, with a value of its own, that it has removed a register: a deletion alone
// says nothing about who did it.
func marker(client int) string { return fmt.Sprint("removed/", client) }

// clients are those of a cluster: each does one thing after the other on its member, all through the test.
type clients struct {
	record *record
	ctx    context.Context
	begun  atomic.Int64
	pause  time.Duration // between two requests of one, on average
	weak   bool          // reads that should be linearizable are not, see TestStaleReadsAreFound
	of     map[*cluster.Member]*crowd
}

// crowd is the clients of one member.
type crowd struct {
	end  context.CancelFunc
	done sync.WaitGroup
}

func newClients(ctx context.Context, r *record, pause time.Duration) *clients {
	return &clients{record: r, ctx: ctx, pause: pause, of: map[*cluster.Member]*crowd{}}
}

// begin starts n clients on a member.
func (c *clients) begin(m *cluster.Member, n int, seed uint64) {
	ctx, cancel := context.WithCancel(c.ctx)
	here := &crowd{end: cancel}
	c.of[m] = here
	for range n {
		one := c.client(m, seed)
		here.done.Go(func() {
			for ctx.Err() == nil {
				if o := one.work(ctx); o.err != nil {
					time.Sleep(50 * time.Millisecond) // as a client would, instead of turning in circles
				}
				time.Sleep(c.pause/2 + time.Duration(one.random.Int64N(int64(c.pause))))
			}
		})
	}
}

// leave ends the clients of a member and waits for their last answers.
func (c *clients) leave(m *cluster.Member) {
	if here := c.of[m]; here != nil {
		here.end()
		here.done.Wait()
	}
}

// stop ends all clients and waits for their last answers.
func (c *clients) stop() {
	for _, here := range c.of {
		here.end()
	}
	for _, here := range c.of {
		here.done.Wait()
	}
}

// client is one of them.
type client struct {
	*clients
	id     int
	member *cluster.Member
	random *rand.Rand
	writes int
	known  map[string]string // what it believes the registers to be
}

func (c *clients) client(m *cluster.Member, seed uint64) *client {
	id := int(c.begun.Add(1)) - 1
	return &client{clients: c, id: id, member: m, random: rand.New(rand.NewPCG(seed, uint64(id))), known: map[string]string{}}
}

// work does one thing, drawn at random.
func (c *client) work(ctx context.Context) *operation {
	o := &operation{key: register(c.random.IntN(numRegisters))}
	switch n := c.random.IntN(100); {
	case n < 25:
		o.kind = put
	case n < 50:
		o.kind = swap
	case n < 57:
		o.kind = remove
	case n < 82:
		o.kind = read
	case n < 87:
		o.kind, o.key = list, registers
	default:
		o.kind = stale
	}
	// Most clients lose patience before the server does, some wait for what it says.
	limit := time.Second
	if c.random.IntN(5) == 0 {
		limit = 10 * time.Second
	}
	c.do(ctx, o, limit)
	return o
}

// do sends an operation whose kind and key are set, and records it. The end of ctx withdraws no request: its answer is wanted.
func (c *client) do(ctx context.Context, o *operation, limit time.Duration) {
	o.client = c.id
	o.via = fmt.Sprintf("%s.%d", c.member.Name, c.member.Starts())
	if o.kind == put || o.kind == swap || o.kind == remove {
		c.writes++
		o.value = fmt.Sprintf("%d-%d", c.id, c.writes)
		o.expect = c.known[o.key]
		if o.kind == remove && o.expect == "" {
			o.kind = swap
		}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	o.called = c.record.now()
	o.err = c.send(ctx, o)
	o.returned = c.record.now()
	if now := fmt.Sprintf("%s.%d", c.member.Name, c.member.Starts()); now != o.via {
		o.via += ", then " + now // a session of its own, see inOrder
	}
	c.record.add(o)
	switch {
	case o.err != nil:
	case o.wrote() && o.kind == remove:
		c.known[o.key] = ""
	case o.wrote():
		c.known[o.key] = o.value
	case o.kind != list:
		c.known[o.key] = string(o.found[o.key].GetValue())
	}
}

func (c *client) send(ctx context.Context, o *operation) error {
	key := []byte(o.key)
	switch o.kind {
	case put:
		r, err := c.member.KV.Put(ctx, &pb.PutRequest{Key: key, Value: []byte(o.value)})
		o.revision = r.GetHeader().GetRevision()
		return err
	case swap, remove:
		r, err := c.member.KV.Txn(ctx, c.txn(o))
		if err != nil {
			return err
		}
		o.revision, o.done = r.Header.Revision, r.Succeeded
		if !r.Succeeded {
			o.found = byKey(r.Responses[0].GetResponseRange().Kvs)
		}
		return nil
	}
	request := &pb.RangeRequest{Key: key, Serializable: o.kind == stale || c.weak}
	if o.kind == list {
		request.RangeEnd = endOf(o.key)
	}
	r, err := c.member.KV.Range(ctx, request)
	if err != nil {
		return err
	}
	o.revision, o.found = r.Header.Revision, byKey(r.Kvs)
	return nil
}

func (c *client) txn(o *operation) *pb.TxnRequest {
	key := []byte(o.key)
	compare := &pb.Compare{Key: key, Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte(o.expect)}}
	if o.expect == "" {
		compare = &pb.Compare{Key: key, Target: pb.Compare_CREATE, TargetUnion: &pb.Compare_CreateRevision{}}
	}
	written := o.key
	var success []*pb.RequestOp
	if o.kind == remove {
		written = marker(c.id)
		success = append(success, &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: key}}})
	}
	return &pb.TxnRequest{
		Compare: []*pb.Compare{compare},
		Success: append(success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(written), Value: []byte(o.value)}}}),
		Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: key}}}},
	}
}

func byKey(kvs []*mvccpb.KeyValue) map[string]*mvccpb.KeyValue {
	found := make(map[string]*mvccpb.KeyValue, len(kvs))
	for _, kv := range kvs {
		found[string(kv.Key)] = kv
	}
	return found
}

func endOf(prefix string) []byte {
	end := []byte(prefix)
	end[len(end)-1]++
	return end
}

// summary is how many operations were answered and what was said to the others.
func summary(operations []*operation) string {
	said := map[string]int{}
	writes := 0
	for _, o := range operations {
		if o.err != nil {
			said[o.err.Error()]++
		} else if o.wrote() {
			writes++
		}
	}
	text := fmt.Sprintf("%d operations, %d acknowledged writes", len(operations), writes)
	for _, s := range slices.Sorted(maps.Keys(said)) {
		text += fmt.Sprintf("\n\t%d × %.300s", said[s], s)
	}
	return text
}

// misnamed are the refusals that a client does not understand as "try again", but for some that are expected.
func misnamed(operations []*operation, expected ...string) (wrong []string) {
	for _, o := range operations {
		switch code := status.Code(o.err); code {
		case codes.OK, codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		default:
			if !slices.Contains(expected, status.Convert(o.err).Message()) {
				wrong = append(wrong, fmt.Sprintf("refused with %v: %s", code, o))
			}
		}
	}
	return wrong
}
