package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"go.etcd.io/etcd/client/pkg/v3/types"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3discovery"
	"go.uber.org/zap"

	"github.com/quire-db/quire/sqlraft"
)

// newDiscovery registers the flags that name a discovery service: an etcd, or a quire, where the members of a cluster
// that is being made find each other by the token that they have in common.
func newDiscovery(fs *pflag.FlagSet) *v3discovery.DiscoveryConfig {
	secure, auth := &clientv3.SecureConfig{}, &clientv3.AuthConfig{}
	d := &v3discovery.DiscoveryConfig{ConfigSpec: clientv3.ConfigSpec{Secure: secure, Auth: auth}}
	fs.Var((*commaList)(&d.Endpoints), "discovery-endpoints", "Comma-separated endpoints of an etcd where the members of a new cluster find each other.")
	fs.StringVar(&d.Token, "discovery-token", "", "What the members of a new cluster have in common there.")
	fs.DurationVar(&d.DialTimeout, "discovery-dial-timeout", 2*time.Second, "How long to wait for a connection to --discovery-endpoints.")
	fs.DurationVar(&d.RequestTimeout, "discovery-request-timeout", 5*time.Second, "How long to wait for an answer of --discovery-endpoints.")
	fs.DurationVar(&d.KeepAliveTime, "discovery-keepalive-time", 2*time.Second, "How often to ping --discovery-endpoints.")
	fs.DurationVar(&d.KeepAliveTimeout, "discovery-keepalive-timeout", 6*time.Second, "How long to wait for the answer to a ping.")
	fs.BoolVar(&secure.InsecureTransport, "discovery-insecure-transport", true, "Speak to --discovery-endpoints without TLS, unless they are https.")
	fs.BoolVar(&secure.InsecureSkipVerify, "discovery-insecure-skip-tls-verify", false, "Do not verify the certificates of --discovery-endpoints; for tests.")
	fs.StringVar(&secure.Cert, "discovery-cert", "", "Path to the TLS certificate (PEM) to show to --discovery-endpoints.")
	fs.StringVar(&secure.Key, "discovery-key", "", "Path to its key (PEM).")
	fs.StringVar(&secure.Cacert, "discovery-cacert", "", "Path to the CA certificates (PEM) that --discovery-endpoints must be signed by.")
	fs.StringVar(&auth.Username, "discovery-user", "", "User at --discovery-endpoints.")
	fs.StringVar(&auth.Password, "discovery-password", "", "Password of --discovery-user.")
	return d
}

// checkDiscovery is the part of etcd's Config.Validate about it, with its text.
func checkDiscovery(d *v3discovery.DiscoveryConfig) error {
	if (d.Token != "") != (len(d.Endpoints) > 0) {
		return errors.New("both --discovery-token and --discovery-endpoints must be set")
	}
	return nil
}

// discover tells the discovery service of this member, waits there until as many have come as the cluster is to have, and
// returns them in the form of --initial-cluster. The token is that of the cluster too, as in etcd, and thus part of the ids.
func (c *config) discover(ctx context.Context, lg *zap.Logger) (initialCluster string, err error) {
	d := c.Cluster.Discovery
	urls := c.AdvertisePeerURLs.Strings()
	members := make([]string, len(urls))
	for i, u := range urls {
		members[i] = c.Name + "=" + u
	}
	type answer struct {
		members string
		err     error
	}
	answered := make(chan answer, 1)
	// It cannot be cancelled. When it is not waited for any more, the process is about to end.
	go func() {
		members, err := v3discovery.JoinCluster(lg, d, types.ID(sqlraft.MemberID(urls, d.Token)), strings.Join(members, ","))
		answered <- answer{members, err}
	}()
	select {
	case a := <-answered:
		if errors.Is(a.err, v3discovery.ErrFullCluster) {
			return "", fmt.Errorf("--discovery-token %s: %w: take a new token for a new cluster", d.Token, a.err)
		}
		if a.err != nil {
			return "", fmt.Errorf("--discovery-endpoints %s: %w", strings.Join(d.Endpoints, ","), a.err)
		}
		return a.members, nil
	case <-ctx.Done():
		return "", ctx.Err()
	}
}
