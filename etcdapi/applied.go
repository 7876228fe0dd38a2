package etcdapi

import (
	"errors"
	"fmt"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

// SlowApply is a read or a write that took longer than MetricsOptions.SlowApplyAfter. Request and Response describe it
// without values.
type SlowApply struct {
	Prefix            string // what kind of read it was, as in etcd's log; empty for writes
	Request, Response string
	Took              time.Duration
	Err               error // nil: it was done
}

// Applied is for backend.Hooks. Every member counts what it applies, whoever was asked for it, as in etcd.
func (m *Metrics) Applied(a *backend.Applied) {
	m.ranges.Add(float64(a.Ranges))
	m.puts.Add(float64(a.Puts))
	m.deletes.Add(float64(a.Deletes))
	m.txns.Add(float64(a.Txns))
	m.putBytes.Add(float64(a.PutBytes))
	for i := range a.Commands {
		m.applied(&a.Commands[i])
	}
}

func (m *Metrics) applied(c *backend.AppliedCommand) {
	if c.Request == nil && c.Expired == 0 {
		return // nothing was due after all
	}
	if c.Err == nil {
		switch r := c.Request.(type) {
		case nil:
			m.leasesRevoked.Add(float64(c.Expired))
		case *pb.LeaseGrantRequest:
			m.leasesGranted.Inc()
			m.leaseTTLs.Observe(float64(r.TTL))
		case *pb.LeaseRevokeRequest:
			m.leasesRevoked.Inc()
		case *pb.CompactionRequest:
			m.indexCompactionPause.Observe(milliseconds(c.Took))
		}
	}
	op := operationName(c.Request)
	ops, ok := m.applies[op]
	if !ok {
		ops = outcome{m.applySeconds.WithLabelValues("v3", op, "true"), m.applySeconds.WithLabelValues("v3", op, "false")}
		m.applies[op] = ops // Applied is called by one goroutine at a time
	}
	if c.Err == nil || errors.Is(c.Err, backend.ErrCompacted) {
		ops.ok.Observe(c.Took.Seconds())
	} else {
		ops.failed.Observe(c.Took.Seconds())
	}
	if c.Took > m.slowApplyAfter {
		response := ""
		if c.Err == nil && c.Response != nil {
			response = fmt.Sprintf("size:%d", proto.Size(c.Response))
		}
		m.slow(SlowApply{Request: loggable(c.Request), Response: response, Took: c.Took, Err: c.Err})
	}
}

// operationName is etcd's name for what is applied: PutRequest → Put.
func operationName(req proto.Message) string {
	if req == nil {
		return "LeaseRevoke" // as in etcd, where an expired lease is revoked by a request of the leader
	}
	return strings.TrimSuffix(string(req.ProtoReflect().Descriptor().Name()), "Request")
}

// ranged counts one Range.
func (m *Metrics) ranged(req *pb.RangeRequest, res *backend.RangeResult, took time.Duration, err error) {
	m.ranges.Inc()
	if err != nil {
		m.rangeFailed.Observe(took.Seconds())
	} else {
		m.rangeOK.Observe(took.Seconds())
	}
	if took <= m.slowApplyAfter {
		return
	}
	response := ""
	if err == nil {
		size := 0
		for _, kv := range res.KVs {
			size += len(kv)
		}
		response = fmt.Sprintf("range_response_count:%d size:%d", len(res.KVs), size)
	}
	m.slow(SlowApply{Prefix: "read-only range ", Request: loggable(req), Response: response, Took: took, Err: err})
}

// transacted counts one Txn that only reads.
func (m *Metrics) transacted(req *pb.TxnRequest, resp *pb.TxnResponse, took time.Duration, err error) {
	if err == nil {
		ranges := executedRanges(req, resp)
		m.ranges.Add(float64(ranges))
		if ranges > 1 {
			m.txns.Inc()
		}
	}
	if took <= m.slowApplyAfter {
		return
	}
	response := ""
	if err == nil {
		response = fmt.Sprintf("responses:%d size:%d", len(resp.GetResponses()), proto.Size(resp))
	}
	m.slow(SlowApply{Prefix: "read-only txn ", Request: loggable(req), Response: response, Took: took, Err: err})
}

func (m *Metrics) slow(s SlowApply) {
	m.slowApplies.Inc()
	if m.tellSlow != nil {
		m.tellSlow(s)
	}
}

// executedRanges counts the reads of the branches that a Txn took, those of nested ones included.
func executedRanges(req *pb.TxnRequest, resp *pb.TxnResponse) (n int) {
	ops := req.GetFailure()
	if resp.GetSucceeded() {
		ops = req.GetSuccess()
	}
	answers := resp.GetResponses()
	for i, op := range ops {
		switch r := op.Request.(type) {
		case *pb.RequestOp_RequestRange:
			n++
		case *pb.RequestOp_RequestTxn:
			if i < len(answers) {
				n += executedRanges(r.RequestTxn, answers[i].GetResponseTxn())
			}
		}
	}
	return n
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
