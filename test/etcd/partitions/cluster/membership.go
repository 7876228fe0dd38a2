//go:build linux

package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/status"
)

// Remove removes a member through another one. Its process is left as it is.
func (c *Cluster) Remove(ctx context.Context, m, through *Member) error {
	err := again(ctx, func(ctx context.Context) error {
		_, err := through.Membership.MemberRemove(ctx, &pb.MemberRemoveRequest{ID: m.ID()})
		if status.Convert(err).Message() == status.Convert(rpctypes.ErrGRPCMemberNotFound).Message() {
			return nil // an earlier try has done it
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("remove member %s: %w", m.Name, err)
	}
	c.Members = c.Others(m)
	c.former = append(c.former, m)
	return nil
}

// Add adds a member on a host of its own, as a learner, starts it and returns when it serves as a voter. With the host of a
// former member, which must have ended, it takes that one's address and has an empty disk.
func (c *Cluster) Add(ctx context.Context, name string, instead, through *Member) (m *Member, err error) {
	if instead == nil {
		m, err = c.newMember(name)
	} else {
		m, err = newMember(c, name, instead.Host)
	}
	if err != nil {
		return nil, err
	}
	var members []*pb.Member
	var id uint64
	err = again(ctx, func(ctx context.Context) error {
		// Only the list says whether a try without an answer has added it.
		_, failed := through.Membership.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{m.PeerURL()}, IsLearner: true})
		list, err := through.Membership.MemberList(ctx, &pb.MemberListRequest{Linearizable: true})
		if err != nil {
			return errors.Join(failed, err)
		}
		members = list.Members
		for _, known := range members {
			if slices.Contains(known.PeerURLs, m.PeerURL()) {
				id = known.ID
				return nil
			}
		}
		return errors.Join(errors.New("it is not in the list of members"), failed)
	})
	if err != nil {
		return nil, fmt.Errorf("add member %s: %w", name, err)
	}
	c.Members = append(slices.Clone(c.Members), m)
	var urls []string
	for _, member := range members {
		known := member.Name
		if member.ID == id {
			known = name
		}
		for _, url := range member.PeerURLs {
			urls = append(urls, known+"="+url)
		}
	}
	m.state, m.initial = "existing", strings.Join(urls, ",")
	if err := m.Start(); err != nil {
		return nil, err
	}
	err = again(ctx, func(ctx context.Context) error {
		_, err := through.Membership.MemberPromote(ctx, &pb.MemberPromoteRequest{ID: id})
		if status.Convert(err).Message() == status.Convert(rpctypes.ErrGRPCMemberNotLearner).Message() {
			return nil // an earlier try has done it
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("promote member %s: %w\n%s", name, err, m.lastWords())
	}
	return m, c.Ready(ctx, m)
}

// again makes a call until it succeeds or the context ends: a cluster that changes its members refuses the next change for
// a while.
func again(ctx context.Context, call func(context.Context) error) error {
	for {
		try, cancel := context.WithTimeout(ctx, 10*time.Second)
		err := call(try)
		cancel()
		if err == nil || !sleep(ctx, 100*time.Millisecond) {
			return err
		}
	}
}
