package etcdapi

import (
	"context"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"

	"github.com/quire-db/quire/backend"
)

// leaderlessElections is how many election timeouts without a leader a stream that requires one lives through (etcd:
// maxNoLeaderCnt). To connect again costs a client much more than to send a request again.
const leaderlessElections = 3

// status is the cluster's, with the store's own indexes where there is no Raft: a command that is applied here is
// committed, and none is committed that is not applied. The first index is the founding of the store, as in etcd:
// whoever reads the status as JSON does not see an index of 0.
func (s *Server) status(stats *backend.Stats) ClusterStatus {
	st := s.cluster.Status()
	if s.opts.Cluster == nil {
		st.Committed, st.Applied = stats.AppliedIndex+1, stats.AppliedIndex+1
	}
	return st
}

// ledStreams are those with etcd's hasleader metadata. They hang on one context, which ends when the leader is lost for
// too long; the next streams hang on the next one.
type ledStreams struct {
	mu  sync.Mutex
	ctx context.Context
	end context.CancelCauseFunc
}

func (l *ledStreams) begin() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ctx, l.end = context.WithCancelCause(context.Background())
}

func (l *ledStreams) context() context.Context {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ctx
}

func (l *ledStreams) lost() {
	l.mu.Lock()
	end := l.end
	l.mu.Unlock()
	l.begin()
	end(rpctypes.ErrGRPCNoLeader)
}

// followLeader counts leaders, and ends the streams that require one when there was none for leaderlessElections, until
// the Server is closed.
func (s *Server) followLeader() {
	var last uint64
	for {
		changed := s.cluster.LeaderChanged()
		leader := s.cluster.Status().Leader
		var tooLong <-chan time.Time
		if leader == 0 {
			tooLong = time.After(leaderlessElections * s.opts.ElectionTimeout)
		} else if leader != last {
			s.metrics.leaderChanges.Inc()
		}
		last = leader
		select {
		case <-changed:
			continue
		case <-s.stopping.Done():
			return
		case <-tooLong:
			s.led.lost()
		}
		select {
		case <-changed:
		case <-s.stopping.Done():
			return
		}
	}
}

// ledStream is a stream that ends with the leader.
type ledStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (l *ledStream) Context() context.Context { return l.ctx }

// whileLed makes stream end with ErrGRPCNoLeader as its context's cause once the leader is lost for too long, and
// refuses it where there is none now. end is to be called after the handler.
func (s *Server) whileLed(stream grpc.ServerStream) (_ grpc.ServerStream, end func(), _ error) {
	// Before the leader is asked for: what is lost after the answer ends the stream.
	led := s.led.context()
	if s.cluster.Status().Leader == 0 {
		return nil, nil, rpctypes.ErrGRPCNoLeader
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	unlink := context.AfterFunc(led, func() { cancel(context.Cause(led)) })
	return &ledStream{stream, ctx}, func() { unlink(); cancel(nil) }, nil
}

// learnerServes tells whether a learner, which nobody should lean on, answers the request (etcd:
// isRPCSupportedForLearner).
func learnerServes(req any) bool {
	switch r := req.(type) {
	case *pb.StatusRequest:
		return true
	case *pb.RangeRequest:
		return r.Serializable
	}
	return false
}
