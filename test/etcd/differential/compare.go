package differential

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
)

// answer is what one server said to one operation.
type answer struct {
	message proto.Message // nil with an error
	stream  []*pb.RangeStreamResponse
	err     error
}

func (a answer) String() string {
	if a.err != nil {
		s := status.Convert(a.err)
		return fmt.Sprintf("error %v: %s", s.Code(), s.Message())
	}
	if a.stream != nil {
		text := fmt.Sprintf("%d chunks", len(a.stream))
		for _, c := range a.stream {
			text += "\n    " + format(c)
		}
		return text
	}
	return format(a.message)
}

func format(m proto.Message) string {
	return "{" + prototext.MarshalOptions{}.Format(m) + "}"
}

// sameError compares what a client can tell apart: code and text.
func sameError(a, b error) bool {
	return status.Code(a) == status.Code(b) && status.Convert(a).Message() == status.Convert(b).Message()
}

// blankHeader checks that the header is whole and takes away what may differ between two stores.
func blankHeader(h *pb.ResponseHeader) error {
	if h == nil || h.ClusterId == 0 || h.MemberId == 0 || h.RaftTerm == 0 {
		return fmt.Errorf("incomplete header %v", h)
	}
	h.ClusterId, h.MemberId, h.RaftTerm = 0, 0, 0
	return nil
}

// blank takes away from a fresh answer all that may differ between two correct servers: ids, term, the
// order that etcd leaves open. What is left must be equal.
func blank(a answer) error {
	switch m := a.message.(type) {
	case *pb.LeaseTimeToLiveResponse:
		slices.SortFunc(m.Keys, bytes.Compare)
		return blankHeader(m.Header)
	case *pb.LeaseLeasesResponse:
		slices.SortFunc(m.Leases, func(a, b *pb.LeaseStatus) int { return cmp.Compare(a.ID, b.ID) })
		return blankHeader(m.Header)
	case interface{ GetHeader() *pb.ResponseHeader }:
		return blankHeader(m.GetHeader())
	}
	for i, c := range a.stream {
		if i == len(a.stream)-1 {
			return blankHeader(c.RangeResponse.GetHeader())
		}
	}
	return nil
}

// forgiveLag makes the revision in the header of b, which answers a renewal, that of a if it is an older one. Such a header
// tells what the process knew when it was asked (etcd's member, too), which may be less than its neighbours knew. Whether
// the lease is there must be right nevertheless.
func forgiveLag(a, b answer) {
	x, y := a.message.(*pb.LeaseKeepAliveResponse).GetHeader(), b.message.(*pb.LeaseKeepAliveResponse).GetHeader()
	if x != nil && y != nil && y.Revision < x.Revision {
		y.Revision = x.Revision
	}
}

// sameAnswer compares two blanked answers.
func sameAnswer(request proto.Message, a, b answer) bool {
	if a.err != nil || b.err != nil {
		return sameError(a.err, b.err)
	}
	if len(a.stream) != len(b.stream) {
		return false
	}
	for i := range a.stream {
		if !proto.Equal(a.stream[i], b.stream[i]) {
			return false
		}
	}
	if a.message == nil || proto.Equal(a.message, b.message) {
		return true
	}
	switch x := a.message.(type) {
	case *pb.LeaseTimeToLiveResponse:
		y := b.message.(*pb.LeaseTimeToLiveResponse)
		// The clocks were read one after the other.
		if d := x.TTL - y.TTL; d < -2 || d > 2 {
			return false
		}
		x = proto.Clone(x).(*pb.LeaseTimeToLiveResponse)
		x.TTL = y.TTL
		return proto.Equal(x, y)
	case *pb.RangeResponse:
		x, y := proto.Clone(x).(*pb.RangeResponse), proto.Clone(b.message).(*pb.RangeResponse)
		settleTies(request.(*pb.RangeRequest), x)
		settleTies(request.(*pb.RangeRequest), y)
		return proto.Equal(x, y)
	case *pb.TxnResponse:
		x, y := proto.Clone(x).(*pb.TxnResponse), proto.Clone(b.message).(*pb.TxnResponse)
		settleTxnTies(request.(*pb.TxnRequest), x)
		settleTxnTies(request.(*pb.TxnRequest), y)
		return proto.Equal(x, y)
	}
	return false
}

// settleTies orders keys that the requested sort leaves equal: etcd sorts with an unstable sort. When the
// limit cut such a group, which of them are in the answer is open as well, so only their number counts.
// Up to twelve keys Go's sort is stable and the answer is compared as it stands.
func settleTies(request *pb.RangeRequest, r *pb.RangeResponse) {
	if request.SortTarget == pb.RangeRequest_KEY || r.Count <= 12 {
		return
	}
	var by func(a, b *mvccpb.KeyValue) int
	switch request.SortTarget {
	case pb.RangeRequest_VERSION:
		by = func(a, b *mvccpb.KeyValue) int { return cmp.Compare(a.Version, b.Version) }
	case pb.RangeRequest_CREATE:
		by = func(a, b *mvccpb.KeyValue) int { return cmp.Compare(a.CreateRevision, b.CreateRevision) }
	case pb.RangeRequest_MOD:
		by = func(a, b *mvccpb.KeyValue) int { return cmp.Compare(a.ModRevision, b.ModRevision) }
	case pb.RangeRequest_VALUE:
		if request.KeysOnly {
			// What was sorted by is not in the answer.
			by = func(a, b *mvccpb.KeyValue) int { return 0 }
		} else {
			by = func(a, b *mvccpb.KeyValue) int { return bytes.Compare(a.Value, b.Value) }
		}
	default:
		return
	}
	for i := 0; i < len(r.Kvs); {
		j := i + 1
		for j < len(r.Kvs) && by(r.Kvs[i], r.Kvs[j]) == 0 {
			j++
		}
		group := r.Kvs[i:j]
		if j == len(r.Kvs) && r.More {
			for k := range group {
				group[k] = &mvccpb.KeyValue{}
			}
		} else {
			slices.SortFunc(group, func(a, b *mvccpb.KeyValue) int { return bytes.Compare(a.Key, b.Key) })
		}
		i = j
	}
}

func settleTxnTies(request *pb.TxnRequest, r *pb.TxnResponse) {
	ops := request.Failure
	if r.Succeeded {
		ops = request.Success
	}
	for i, op := range ops {
		if i >= len(r.Responses) {
			return
		}
		if inner := r.Responses[i].GetResponseRange(); inner != nil && op.GetRequestRange() != nil {
			settleTies(op.GetRequestRange(), inner)
		}
		if inner := r.Responses[i].GetResponseTxn(); inner != nil && op.GetRequestTxn() != nil {
			settleTxnTies(op.GetRequestTxn(), inner)
		}
	}
}
