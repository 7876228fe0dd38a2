package etcdapi

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/backend"
)

// snapshotChunk is how much of a snapshot goes into one message, in bytes: as much as in etcd.
const snapshotChunk = 32 << 10

// Snapshot sends what this member holds as the database of an etcd, and then its SHA-256: so etcdutl and etcdctl want it.
// Any member answers, a learner and one without a leader too. It is written beside the database first, so that neither the
// store waits for a slow client nor the client for anything else.
func (m *maintenanceServer) Snapshot(_ *pb.SnapshotRequest, stream pb.Maintenance_SnapshotServer) (err error) {
	ctx, cancel := m.s.streamContext(stream.Context())
	defer cancel()
	start := time.Now()
	defer measure(m.s.metrics.maintenance.snapshot, start, &err)
	size, err := m.sendSnapshot(ctx, stream)
	if ctx.Err() != nil {
		err = streamEnd(ctx)
	}
	if h := m.s.opts.Hooks.SnapshotSent; h != nil {
		h(size, time.Since(start), err)
	}
	return err
}

func (m *maintenanceServer) sendSnapshot(ctx context.Context, stream pb.Maintenance_SnapshotServer) (size int64, err error) {
	if err := m.s.ready(ctx, true); err != nil {
		return 0, toStatus(err)
	}
	members, err := m.s.cluster.Members(ctx, false)
	if err != nil {
		return 0, toStatus(err)
	}
	stats := m.s.opts.Backend.Stats()
	raft := m.s.status(&stats)
	snapshot, err := m.s.opts.Backend.EtcdSnapshot(ctx, backend.EtcdSurroundings{
		StorageVersion: m.s.version.Storage,
		ClusterVersion: m.s.version.Cluster,
		Index:          raft.Applied,
		Term:           raft.Term,
		Members:        members,
	})
	if errors.Is(err, backend.ErrDiskFull) {
		// Not NOSPACE: nothing of the store is in want of room.
		return 0, status.Error(codes.ResourceExhausted, fmt.Sprintf("etcdserver: no room for a snapshot: %v", err))
	}
	if err != nil {
		return 0, toStatus(err)
	}
	defer func() { err = errors.Join(err, snapshot.Close()) }()

	hash := sha256.New()
	for left := snapshot.Size; left > 0; {
		// Who looks at messages on their way may do so after Send has returned.
		chunk := make([]byte, min(left, snapshotChunk))
		if _, err := io.ReadFull(snapshot, chunk); err != nil {
			return snapshot.Size, status.Error(codes.Unavailable, fmt.Sprintf("etcdserver: reading the snapshot: %v", err))
		}
		hash.Write(chunk)
		left -= int64(len(chunk))
		if err := stream.Send(&pb.SnapshotResponse{RemainingBytes: uint64(left), Blob: chunk, Version: m.s.version.Storage}); err != nil {
			return snapshot.Size, err
		}
	}
	return snapshot.Size, stream.Send(&pb.SnapshotResponse{Blob: hash.Sum(nil), Version: m.s.version.Storage})
}
