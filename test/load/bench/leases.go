package main

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

const (
	leased     = "/registry/leased/"
	leaseCount = 5000
	leaseTTL   = 5 // seconds: enough to grant all of them before the first one is due
)

// leaseScene: many leases that are due at once.
func leaseScene() scene {
	return scene{
		name:    "leases",
		prepare: func(context.Context, *bed) error { return nil },
		workloads: []workload{{
			name:    "5000 leases with a key each due at once: DELETE event after the lease is due",
			metrics: []metric{{unit: "ms p99"}, {unit: "ms max"}},
			run:     leasesDue,
		}},
	}
}

// leasesDue grants leases with a key each and measures how late the DELETE events come. etcd's lease begins when it is granted;
// kine has no leases but deletes a key its TTL after it was written: there the put counts.
func leasesDue(ctx context.Context, b *bed) ([]float64, error) {
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	n := b.o.scale(leaseCount)
	b.fresh++
	prefix := fmt.Sprintf("%s%d/", leased, b.fresh)
	ws, err := b.openWatches(ctx, b.conns[0], prefixRange(prefix))
	if err != nil {
		return nil, err
	}
	gone := make([]time.Time, n)
	var collectErr error
	var collecting sync.WaitGroup
	collecting.Go(func() { collectErr = collectDeletes(ws, prefix, gone) })

	due := make([]time.Time, n)
	err = b.fixed(ctx, workers64, n, func(ctx context.Context, w *worker, i int) error {
		grant := &pb.LeaseGrantResponse{}
		if err := callProto(ctx, w.conn, methodGrant, &pb.LeaseGrantRequest{TTL: leaseTTL}, grant); err != nil {
			return err
		}
		granted := time.Now()
		key := fmt.Appendf(nil, "%s%d", prefix, i)
		if err := putLeased(ctx, w, key, grant.ID); err != nil {
			return err
		}
		if b.isKine() {
			granted = time.Now()
		}
		due[i] = granted.Add(time.Duration(grant.TTL) * time.Second)
		return nil
	})
	if err != nil {
		cancel()
		collecting.Wait()
		return nil, err
	}
	collecting.Wait()
	if collectErr != nil {
		return nil, fmt.Errorf("not all keys were deleted within 90 s: %w", collectErr)
	}
	late := make([]time.Duration, n)
	for i := range late {
		// Granted is later here than at the server, so a delete can seem to come a little early.
		late[i] = max(0, gone[i].Sub(due[i]))
	}
	slices.Sort(late)
	return []float64{quantile(late, 0.99), quantile(late, 1)}, nil
}

// putLeased creates a key with a lease, in kube-apiserver's shape.
func putLeased(ctx context.Context, w *worker, key []byte, lease int64) error {
	op := putOp(key, 16)
	op.GetRequestPut().Lease = lease
	req, err := proto.Marshal(&pb.TxnRequest{Compare: []*pb.Compare{modIs(key, 0)}, Success: []*pb.RequestOp{op}})
	if err != nil {
		return err
	}
	return call(ctx, w.conn, methodTxn, req, &w.answer)
}

// collectDeletes notes when each key prefix+number is deleted, until all are.
func collectDeletes(ws *watchStream, prefix string, gone []time.Time) error {
	for left := len(gone); left > 0; {
		if err := grpc.ClientStream(ws).RecvMsg(&ws.answer); err != nil {
			return err
		}
		at := time.Now()
		if err := ws.deletes(func(key []byte) error {
			i, err := strconv.Atoi(string(bytes.TrimPrefix(key, []byte(prefix))))
			if err != nil || i >= len(gone) {
				return fmt.Errorf("a DELETE of an unknown key %q", key)
			}
			if gone[i].IsZero() {
				left--
			}
			gone[i] = at
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// deletes calls f with the key of each DELETE event in the last answer.
func (ws *watchStream) deletes(f func(key []byte) error) error {
	const fieldEventType = 1
	var inner error
	err := fields(ws.answer, func(num protowire.Number, _ uint64, event []byte) {
		if num != fieldWatchEvents || inner != nil {
			return
		}
		del := false
		var key []byte
		inner = fields(event, func(num protowire.Number, v uint64, b []byte) {
			switch num {
			case fieldEventType:
				del = v == 1
			case fieldEventKV:
				if err := fields(b, func(num protowire.Number, _ uint64, b []byte) {
					if num == fieldKVKey {
						key = b
					}
				}); err != nil {
					key = nil
				}
			}
		})
		if del && inner == nil {
			inner = f(key)
		}
	})
	if err == nil {
		err = inner
	}
	return err
}
