package main

import (
	"crypto/sha1"
	"encoding/binary"
	"net/url"
	"slices"
	"strings"
)

// raftTerm is what headers carry where there is no Raft: not zero, and one byte long on the wire, because
// etcd's own tests compare encoded headers.
const raftTerm = 2

// identity is how etcd knows a member and its cluster.
type identity struct {
	ClusterID uint64
	MemberID  uint64
}

// newIdentity computes the ids that an etcd started with the same flags would have: the member's from its peer URLs
// and the cluster token, the cluster's from its members' (server/v3/etcdserver/api/membership: computeMemberID,
// RaftCluster.genID). SHA-1 names things here; it protects nothing.
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
	member := memberID(peerURLs, token)
	return identity{MemberID: member, ClusterID: clusterID([]uint64{member})}
}

// memberID is the first eight bytes, big endian, of SHA-1 over the sorted URLs joined without separator and
// followed by the token.
func memberID(peerURLs []string, token string) uint64 {
	sorted := slices.Sorted(slices.Values(peerURLs))
	sum := sha1.Sum([]byte(strings.Join(sorted, "") + token))
	return binary.BigEndian.Uint64(sum[:8])
}

// clusterID is the same over the sorted member ids.
func clusterID(members []uint64) uint64 {
	var b []byte
	for _, id := range slices.Sorted(slices.Values(members)) {
		b = binary.BigEndian.AppendUint64(b, id)
	}
	sum := sha1.Sum(b)
	return binary.BigEndian.Uint64(sum[:8])
}
