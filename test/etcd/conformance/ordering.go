package conformance

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/ordering"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// lagging is a member that answers as often as told with the store's revision of before.
type lagging struct {
	clientv3.KV
	mu    sync.Mutex
	times int
}

// Do implements clientv3.KV.
func (l *lagging) Do(ctx context.Context, op clientv3.Op) (clientv3.OpResponse, error) {
	r, err := l.KV.Do(ctx, op)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil && l.times > 0 {
		l.times--
		switch {
		case r.Get() != nil:
			r.Get().Header.Revision--
		case r.Txn() != nil:
			r.Txn().Header.Revision--
		}
	}
	return r, err
}

func (l *lagging) lag(times int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.times = times
}

var orderingCases = []testCase{
	{name: "an answer of before what was seen is noticed and asked for again", run: func(x *exam) {
		c := x.client()
		member := &lagging{KV: c.KV}
		var violations []int64
		kv := ordering.NewKV(member, func(_ clientv3.Op, r clientv3.OpResponse, seen int64) error {
			violations = append(violations, seen)
			return nil
		})
		x.set(kv, "k", "1")
		rev := x.set(kv, "k", "2")
		equal(x, "the value", x.value(kv, "k"), "2") // now rev is seen
		member.lag(3)
		equal(x, "the value", x.value(kv, "k", clientv3.WithSerializable()), "2")
		if fmt.Sprint(violations) != fmt.Sprint([]int64{rev, rev, rev}) {
			x.Errorf("violations are %v, want three of %d", violations, rev)
		}
		member.lag(2)
		r, err := kv.Txn(x.ctx).If(clientv3.Compare(clientv3.Value("k"), "=", "2")).Then(clientv3.OpGet("k")).Else(clientv3.OpGet("none")).Commit()
		x.done("txn", err)
		equal(x, "succeeded", r.Succeeded, true)
		equal(x, "violations", len(violations), 5)
		_, err = kv.GetStream(x.ctx, "k")
		equal(x, "the code of a stream", status.Code(err), codes.Unimplemented)
	}},

	{name: "a store that has gone back for good is given up", run: func(x *exam) {
		c := x.client()
		member := &lagging{KV: c.KV}
		kv := ordering.NewKV(member, ordering.NewOrderViolationSwitchEndpointClosure(c))
		x.set(kv, "k", "")
		x.value(kv, "k")
		member.lag(1000)
		_, err := kv.Get(x.ctx, "k")
		x.refused("a get", err, ordering.ErrNoGreaterRev)
		_, err = kv.Txn(x.ctx).Then(clientv3.OpGet("k")).Commit()
		x.refused("a txn", err, ordering.ErrNoGreaterRev)
	}},

	{name: "in order, serializable reads of any process see what was read and written before", run: func(x *exam) {
		c := x.client()
		if len(x.Processes) > 0 {
			var all []string
			for _, p := range x.Processes {
				all = append(all, p.Address)
			}
			c.SetEndpoints(all...) // it goes from one to the next with each call
		}
		kv := ordering.NewKV(c.KV, func(clientv3.Op, clientv3.OpResponse, int64) error {
			time.Sleep(time.Millisecond) // who is behind catches up
			return x.ctx.Err()
		})
		for i := range 60 {
			rev := x.set(kv, "k", strconv.Itoa(i))
			for {
				r, err := kv.Get(x.ctx, "k")
				x.done("get", err)
				if r.Header.Revision >= rev {
					break
				}
			}
			equal(x, "the value", x.value(kv, "k", clientv3.WithSerializable()), strconv.Itoa(i))
			r, err := kv.Txn(x.ctx).Then(clientv3.OpGet("k", clientv3.WithSerializable())).Commit()
			x.done("txn", err)
			equal(x, "the value", string(r.Responses[0].GetResponseRange().Kvs[0].Value), strconv.Itoa(i))
		}
	}},
}
