//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/test/etcd/partitions/cluster"
)

// measurement is that of one server.
type measurement struct {
	kills  int
	crash  bool
	random *rand.Rand
}

const patience = time.Minute

// measure starts a cluster and returns how long each kill of its leader stopped the writes.
func (m *measurement) measure(ctx context.Context, parent string, o cluster.Options) (took []time.Duration, err error) {
	if o.Dir, err = os.MkdirTemp(parent, "failover-"); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(o.Dir)) }()
	starting, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	c, err := cluster.Start(starting, o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.Complaints(), c.Stop()) }()
	for i := range m.kills {
		d, err := m.kill(ctx, c)
		if err != nil {
			return nil, fmt.Errorf("kill %d: %w\n%s", i+1, err, c.Logs())
		}
		took = append(took, d)
		fmt.Fprintf(os.Stderr, "%s: kill %d of %d: %v\n", filepath.Base(o.Binary), i+1, m.kills, d.Round(time.Millisecond))
	}
	return took, nil
}

// kill kills the leader once, and brings it back.
func (m *measurement) kill(ctx context.Context, c *cluster.Cluster) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	leader, err := c.Leader(ctx)
	if err != nil {
		return 0, err
	}
	others := c.Others(leader)
	// The cluster gets time to settle, and the kill comes at any moment between two heartbeats.
	time.Sleep(time.Second + time.Duration(m.random.Int64N(int64(500*time.Millisecond))))
	for _, member := range others {
		if err := put(ctx, member); err != nil {
			return 0, fmt.Errorf("a write before the kill: %w", err)
		}
	}
	end := leader.Kill
	if m.crash {
		end = leader.Crash
	}
	killed := time.Now()
	if err := end(); err != nil {
		return 0, err
	}
	if err := firstWrite(ctx, others); err != nil {
		return 0, err
	}
	took := time.Since(killed)
	c.Heal()
	if err := leader.Start(); err != nil {
		return 0, err
	}
	return took, c.Ready(ctx, c.Members...)
}

// firstWrite returns when one of the writes that it begins every few milliseconds, through one member after the other, is
// acknowledged. It does not wait for one that takes long: it may have gone to the dead.
func firstWrite(ctx context.Context, through []*cluster.Member) error {
	const every, limit = 5 * time.Millisecond, 2 * time.Second
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan struct{}, 1)
	tick := time.NewTicker(every)
	defer tick.Stop()
	for i := 0; ; i++ {
		m := through[i%len(through)]
		go func() {
			within, cancel := context.WithTimeout(ctx, limit)
			defer cancel()
			if put(within, m) != nil {
				return // the next one comes
			}
			select {
			case done <- struct{}{}:
			default:
			}
		}()
		select {
		case <-done:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("no write after the kill: %w", ctx.Err())
		case <-tick.C:
		}
	}
}

func put(ctx context.Context, m *cluster.Member) error {
	_, err := m.KV.Put(ctx, &pb.PutRequest{Key: []byte("failover"), Value: []byte("x")})
	return err
}
