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
		return s.opts.Identity.Header()
	}
	s.opts.Identity.fill(h)
	return h
}

// Header is a new header of this member, without a revision.
func (id Identity) Header() *pb.ResponseHeader {
	h := &pb.ResponseHeader{}
	id.fill(h)
	return h
}

func (id *Identity) fill(h *pb.ResponseHeader) {
	h.ClusterId, h.MemberId, h.RaftTerm = id.ClusterID, id.MemberID, defaultRaftTerm
	if id.RaftTerm != nil {
		h.RaftTerm = id.RaftTerm()
	}
}

// defaultRaftTerm is the term of a one-member etcd after its first start.
const defaultRaftTerm = 2
