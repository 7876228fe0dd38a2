//go:build linux

package powercut

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// book is all that is known of a store: what the clients were told, and the history that it leads to.
type book struct {
	*load
	*history
}

// verify compares a store with the book. No client is at work; leases may end meanwhile. If over is set, writes without an
// answer that have not happened yet never will: the process that knew of them is gone.
func (b *book) verify(ctx context.Context, client *clientv3.Client, over bool) error {
	full, err := client.Get(ctx, "", clientv3.WithPrefix())
	if err != nil {
		return fmt.Errorf("read everything: %w", err)
	}
	rev := full.Header.Revision
	if told := b.told.Load(); rev < told {
		return fmt.Errorf("the revision went back: somebody was told of %d, now it is %d", told, rev)
	}
	events, err := eventsUpTo(ctx, client, b.rev+1, rev)
	if err != nil {
		return err
	}
	b.load.mu.Lock()
	writes, seen := b.load.mu.writes, b.load.mu.events
	b.load.mu.writes, b.load.mu.events = nil, nil
	b.load.mu.Unlock()
	for _, w := range writes {
		if err := b.sent(w); err != nil {
			return err
		}
	}
	if len(seen) > len(events) {
		return fmt.Errorf("a watcher saw %d events, now there are %d", len(seen), len(events))
	}
	if err := sameEvents(seen, events[:len(seen)]); err != nil {
		return fmt.Errorf("a watcher saw another history: %w", err)
	}
	if err := b.replay(events, rev, b.mayEnd); err != nil {
		return err
	}
	if over {
		b.settle()
	}
	if err := b.compare(full.Kvs); err != nil {
		return fmt.Errorf("at revision %d: %w", rev, err)
	}
	raise(&b.told, rev)
	b.settled.Store(rev)
	if err := b.verifyCompaction(ctx, client); err != nil {
		return err
	}
	if err := b.verifyLeases(ctx, client, over); err != nil {
		return err
	}
	return b.verifyAlarm(ctx, client)
}

// eventsUpTo reads the history of the revisions from..to, both included.
func eventsUpTo(ctx context.Context, client *clientv3.Client, from, to int64) (events []*clientv3.Event, err error) {
	if from > to {
		return nil, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for r := range client.Watch(ctx, "", clientv3.WithPrefix(), clientv3.WithRev(from), clientv3.WithPrevKV()) {
		if err := r.Err(); err != nil {
			return nil, fmt.Errorf("watch from revision %d: %w", from, err)
		}
		for _, e := range r.Events {
			if e.Kv.ModRevision <= to {
				events = append(events, e)
			}
			if e.Kv.ModRevision > to {
				return events, nil
			}
		}
		if n := len(r.Events); n > 0 && r.Events[n-1].Kv.ModRevision == to {
			return events, nil
		}
	}
	return nil, fmt.Errorf("the history from revision %d up to %d ends after %d events: %w", from, to, len(events), context.Cause(ctx))
}

// verifyCompaction asks for what an acknowledged compaction has taken away, and for what no compaction may have.
func (b *book) verifyCompaction(ctx context.Context, client *clientv3.Client) error {
	if done := b.load.compact.Load(); done > 1 {
		if _, err := client.Get(ctx, "s/0", clientv3.WithRev(done-1)); !errors.Is(err, rpctypes.ErrCompacted) {
			return fmt.Errorf("the compaction at %d was acknowledged, a read at %d answers %v", done, done-1, err)
		}
	}
	if asked := b.asked.Load(); asked > 0 {
		if _, err := client.Get(ctx, "s/0", clientv3.WithRev(asked)); err != nil {
			return fmt.Errorf("nobody has asked for a compaction above %d, a read there answers %w", asked, err)
		}
	}
	return nil
}

func (b *book) verifyLeases(ctx context.Context, client *clientv3.Client, over bool) error {
	began := time.Now()
	list, err := client.Leases(ctx)
	if err != nil {
		return fmt.Errorf("list the leases: %w", err)
	}
	b.load.mu.Lock()
	defer b.load.mu.Unlock()
	listed := make(map[int64]bool)
	for _, l := range list.Leases {
		listed[int64(l.ID)] = true
		if b.load.mu.leases[int64(l.ID)] == nil {
			return fmt.Errorf("lease %d is there and was never asked for", l.ID)
		}
	}
	for id, k := range b.load.mu.leases {
		switch {
		case listed[id] && k.granted == refused:
			return fmt.Errorf("lease %d is there, its grant was refused", id)
		case listed[id] && k.revoking && k.revoked == acknowledged:
			return fmt.Errorf("lease %d is there, its revoke was acknowledged", id)
		case !listed[id] && k.granted == acknowledged && !k.revoking && began.Before(k.sent.Add(k.ttl)):
			return fmt.Errorf("lease %d of %s is lost: its grant was acknowledged %s ago", id, k.ttl, began.Sub(k.sent))
		case listed[id] && k.gone:
			return fmt.Errorf("lease %d is back", id)
		case !over:
		case !listed[id]:
			k.gone = true
		default:
			k.granted, k.revoking = acknowledged, false // that is settled now
		}
	}
	return b.verifyAttached(ctx, client, listed)
}

// verifyAttached compares the keys of some leases that live long.
func (b *book) verifyAttached(ctx context.Context, client *clientv3.Client, listed map[int64]bool) error {
	checked := 0
	for id := range listed {
		if b.load.mu.leases[id].ttl != longTTL {
			continue
		}
		if checked++; checked > 5 {
			break
		}
		r, err := client.TimeToLive(ctx, clientv3.LeaseID(id), clientv3.WithAttachedKeys())
		if err != nil {
			return fmt.Errorf("lease %d: %w", id, err)
		}
		var got []string
		for _, key := range r.Keys {
			got = append(got, string(key))
		}
		slices.Sort(got)
		want := b.sorted(func(kv *mvccpb.KeyValue) bool { return kv.Lease == id })
		if !slices.Equal(got, want) || r.GrantedTTL != int64(longTTL/time.Second) {
			return fmt.Errorf("lease %d has a TTL of %d s and the keys %q, must have %s and %q", id, r.GrantedTTL, got, longTTL, want)
		}
	}
	return nil
}

func (b *book) verifyAlarm(ctx context.Context, client *clientv3.Client) error {
	r, err := client.AlarmList(ctx)
	if err != nil {
		return fmt.Errorf("list the alarms: %w", err)
	}
	raised := slices.ContainsFunc(r.Alarms, func(a *pb.AlarmMember) bool { return a.MemberID == alarmed })
	b.load.mu.Lock()
	may := b.load.mu.alarm[raised]
	b.load.mu.alarm = map[bool]bool{raised: true}
	b.load.mu.Unlock()
	if !may {
		return fmt.Errorf("an alarm is raised: %t; the opposite was acknowledged", raised)
	}
	if !raised {
		return nil
	}
	_, err = pb.NewMaintenanceClient(client.ActiveConnection()).Alarm(ctx, &pb.AlarmRequest{
		Action: pb.AlarmRequest_DEACTIVATE, MemberID: alarmed, Alarm: pb.AlarmType_NOSPACE,
	})
	b.load.mu.Lock()
	b.load.mu.alarm = map[bool]bool{false: true, true: err != nil}
	b.load.mu.Unlock()
	return err
}
