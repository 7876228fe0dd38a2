package main

import (
	"net/url"
	"strings"

	"github.com/quire-db/quire/sqlraft"
)

// identity is how etcd knows a member and its cluster.
type identity struct {
	ClusterID uint64
	MemberID  uint64
}

// newIdentity computes the ids that an etcd started with the same flags would have, were it alone.
//
// The peer URLs are those that initialCluster lists under name; advertised ones when it lists none.
func newIdentity(name, initialCluster, token string, advertised urlList) identity {
	var peerURLs []string
	for _, entry := range strings.Split(initialCluster, ",") {
		n, u, ok := strings.Cut(strings.TrimSpace(entry), "=")
		if !ok || n != name {
			continue
		}
		if parsed, err := url.Parse(u); err == nil {
			u = parsed.String()
		}
		peerURLs = append(peerURLs, u)
	}
	if len(peerURLs) == 0 {
		peerURLs = advertised.Strings()
	}
	member := sqlraft.MemberID(peerURLs, token)
	return identity{MemberID: member, ClusterID: sqlraft.ClusterID([]uint64{member})}
}
