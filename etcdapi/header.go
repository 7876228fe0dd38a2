package etcdapi

import pb "go.etcd.io/etcd/api/v3/etcdserverpb"

// header completes h, which holds at most a revision; nil makes a new one. A revision of 0 becomes the newest
// published revision, as in etcd.
func (s *Server) header(h *pb.ResponseHeader) *pb.ResponseHeader {
	h = s.headerWithoutRevision(h)
	if h.Revision == 0 {
		h.Revision = s.opts.Backend.Revision()
	}
	return h
}

// headerWithoutRevision completes h but for its revision: etcd's MemberList answers without one, and RangeStream
// pins its own.
func (s *Server) headerWithoutRevision(h *pb.ResponseHeader) *pb.ResponseHeader {
	if h == nil {
		h = &pb.ResponseHeader{}
	}
	raft := s.cluster.Status()
	h.ClusterId, h.MemberId, h.RaftTerm = raft.ClusterID, raft.ID, raft.Term
	return h
}
