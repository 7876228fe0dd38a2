//go:build linux

package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/quire-db/quire/test/etcd/partitions/network"
)

// Options say what cluster to make.
type Options struct {
	Binary  string   // etcd or quire
	Dir     string   // for data and logs; it must exist
	Members int      // that the cluster begins with
	Spare   int      // hosts for members that are added later
	Flags   []string // of every member, after the ones that make the cluster
	PeerTLS bool     // members talk over TLS, with certificates that they make themselves
	Seed    uint64   // of what the network draws
}

// Cluster is a cluster, its network, and one host for all its clients.
type Cluster struct {
	Network *network.Network
	Clients *network.Host
	// Members are those that run or may be started again, in the order in which they came.
	Members []*Member

	options Options
	hosts   int // of those of the network, how many have a member or had one
	former  []*Member
}

// Start starts a cluster and returns when every member serves. The caller stops it.
func Start(ctx context.Context, o Options) (*Cluster, error) {
	n, err := network.New(o.Members+o.Spare+1, o.Seed)
	if err != nil {
		return nil, err
	}
	c := &Cluster{Network: n, Clients: n.Host(o.Members + o.Spare), options: o}
	var urls []string
	for range o.Members {
		m, err := c.newMember(fmt.Sprintf("m%d", len(c.Members)+1))
		if err != nil {
			return nil, errors.Join(err, c.Stop())
		}
		c.Members = append(c.Members, m)
		urls = append(urls, m.Name+"="+m.PeerURL())
	}
	for _, m := range c.Members {
		m.state, m.initial = "new", strings.Join(urls, ",")
	}
	if err := c.each(c.Members, (*Member).Start); err != nil {
		return nil, errors.Join(err, c.Stop())
	}
	if err := c.Ready(ctx, c.Members...); err != nil {
		err = fmt.Errorf("the cluster does not begin to serve: %w\n%s", err, c.Logs())
		return nil, errors.Join(err, c.Stop())
	}
	return c, nil
}

func (c *Cluster) newMember(name string) (*Member, error) {
	if c.hosts == c.options.Members+c.options.Spare {
		return nil, errors.New("every host of the network has its member; make it with more spare ones")
	}
	host := c.Network.Host(c.hosts)
	c.hosts++
	return newMember(c, name, host)
}

// Ready returns when every one of the members answers a linearizable read. Then it also knows its ID.
func (c *Cluster) Ready(ctx context.Context, members ...*Member) error {
	return c.each(members, func(m *Member) error { return m.ready(ctx) })
}

// each does something with members at the same time.
func (c *Cluster) each(members []*Member, do func(*Member) error) error {
	errs := make([]error, len(members))
	var all sync.WaitGroup
	for i, m := range members {
		all.Go(func() {
			if err := do(m); err != nil {
				errs[i] = fmt.Errorf("member %s: %w", m.Name, err)
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// Leader returns the member that leads in the newest term that any member knows of; it waits until there is one.
func (c *Cluster) Leader(ctx context.Context) (*Member, error) {
	for {
		var leader *Member
		var newest uint64
		for _, m := range c.Members {
			if !m.Running() {
				continue
			}
			s, err := m.Status(ctx, time.Second)
			if err != nil || s.RaftTerm < newest {
				continue
			}
			if s.RaftTerm > newest {
				leader, newest = nil, s.RaftTerm
			}
			if s.Leader == s.Header.MemberId {
				leader = m
			}
		}
		if leader != nil {
			return leader, nil
		}
		if !sleep(ctx, 20*time.Millisecond) {
			return nil, fmt.Errorf("nobody leads: %w", context.Cause(ctx))
		}
	}
}

// Others are all members but some.
func (c *Cluster) Others(but ...*Member) (others []*Member) {
	for _, m := range c.Members {
		if !contains(but, m) {
			others = append(others, m)
		}
	}
	return others
}

// Stop ends every member at once, and then the network. It is no test of how members end when an operator tells them to:
// that takes etcd seven seconds, when all are told at the same time.
func (c *Cluster) Stop() error {
	var errs []error
	for _, m := range append(c.former, c.Members...) {
		errs = append(errs, m.Kill(), m.close())
	}
	return errors.Join(append(errs, c.Network.Close())...)
}

// Complaints are what members have said that no member ever should say, and how they ended when nobody told them to.
func (c *Cluster) Complaints() error {
	var all []error
	for _, m := range append(c.former, c.Members...) {
		all = append(all, m.complaints()...)
	}
	return errors.Join(all...)
}

// Logs are the ends of all members' logs.
func (c *Cluster) Logs() string {
	const tail = 6 << 10
	var text strings.Builder
	for _, m := range append(c.former, c.Members...) {
		log, err := os.ReadFile(m.Log)
		if err != nil {
			log = []byte(err.Error())
		}
		fmt.Fprintf(&text, "--- the log of %s ends:\n%s\n", m.Name, log[max(0, len(log)-tail):])
	}
	return text.String()
}

func (c *Cluster) path(name string) string { return filepath.Join(c.options.Dir, name) }

// sleep returns false when the context ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

func contains(all []*Member, m *Member) bool {
	for _, other := range all {
		if other == m {
			return true
		}
	}
	return false
}
