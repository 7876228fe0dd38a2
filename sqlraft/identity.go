package sqlraft

import (
	"crypto/sha1"
	"encoding/binary"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Members and clusters have the ids that etcd would give them (server/v3/etcdserver/api/membership: computeMemberID,
// RaftCluster.genID). SHA-1 names things here; it protects nothing.

// MemberID is the id of a member that is there from the beginning of the cluster: the first eight bytes, big endian, of
// SHA-1 over the sorted URLs joined without separator and followed by the cluster's token.
func MemberID(peerURLs []string, token string) uint64 {
	sorted := slices.Sorted(slices.Values(peerURLs))
	sum := sha1.Sum([]byte(strings.Join(sorted, "") + token))
	return binary.BigEndian.Uint64(sum[:8])
}

// addedMemberID is the id of a member that is added later, at a second of the wall clock. So the same URLs have another
// id when their member was removed and comes again.
func addedMemberID(peerURLs []string, at time.Time) uint64 {
	return MemberID(peerURLs, strconv.FormatInt(at.Unix(), 10))
}

// ClusterID is the same sum over the sorted ids of the first members.
func ClusterID(members []uint64) uint64 {
	var b []byte
	for _, id := range slices.Sorted(slices.Values(members)) {
		b = binary.BigEndian.AppendUint64(b, id)
	}
	sum := sha1.Sum(b)
	return binary.BigEndian.Uint64(sum[:8])
}
