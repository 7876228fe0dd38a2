package main

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/quire-db/quire/test/load/proc"
)

// With -raft a server is a cluster of three members on this machine, and the clients are spread over them.

// members is how many members a cluster has.
const members = 3

// raftScenes are those of the ordinary table that a cluster changes. Restarts and what one process does with its memory are
// not among them.
func raftScenes() []scene {
	lists := listScene()
	prepare := postgresListScene().prepare
	lists.prepare = prepare // the large set of keys is for lists of one process
	var kept []workload
	for _, w := range lists.workloads {
		if !strings.Contains(w.name, "100k keys") {
			kept = append(kept, w)
		}
	}
	lists.workloads = kept
	return []scene{writeScene(), lists, watchScene(), leaseScene()}
}

// cluster gives the specs of a cluster's members. Their peers' addresses stay the same when they are started again: they are
// part of the cluster's data.
func (b *bed) cluster() ([]proc.Spec, error) {
	for len(b.peers) < members {
		addr, err := proc.FreeAddr()
		if err != nil {
			return nil, err
		}
		b.peers = append(b.peers, addr)
	}
	var all []string
	for i, peer := range b.peers {
		all = append(all, fmt.Sprintf("%s=http://%s", memberName(i), peer))
	}
	specs := make([]proc.Spec, members)
	for i := range specs {
		s := b.spec
		s.Name, s.Peer, s.Cluster = memberName(i), b.peers[i], strings.Join(all, ",")
		if i > 0 {
			s.Dir = filepath.Join(s.Dir, s.Name)
		}
		specs[i] = s
	}
	return specs, nil
}

func memberName(i int) string { return fmt.Sprintf("n%d", i+1) }
