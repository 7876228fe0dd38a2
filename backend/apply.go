package backend

import (
	"fmt"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// apply runs one Command against the batch's state. It is deterministic: the same state, Commands and
// times give the same rows and answers, on whatever machine and in whatever storage mode. It reads
// neither a clock nor random numbers, and no map order reaches a row.
//
// A Command that returns an error has changed nothing, but for the NOSPACE alarm that it may raise.
// A Command that fails after it has written something sets b.failure, which fails the whole batch.
func (b *batch) apply(cmd Command) (proto.Message, error) {
	b.next(cmd.Author)
	resp, err := b.applyRequest(&cmd)
	if err != nil && b.failure == nil && b.sub > 0 {
		b.failure = fmt.Errorf("a command failed after its first write: %w", err)
	}
	return resp, err
}

// applyRequest checks what etcd checks, in its order: the alarms, who asks, the space.
func (b *batch) applyRequest(cmd *Command) (proto.Message, error) {
	req := cmd.Request
	if err := b.checkAlarms(req); err != nil {
		return nil, err
	}
	if err := b.permit(cmd); err != nil {
		return nil, err
	}
	if err := b.checkSpace(req); err != nil {
		return nil, err
	}
	if resp, handled, err := b.applyAuth(req); handled {
		return resp, err
	}
	switch r := req.(type) {
	case *pb.PutRequest:
		if err := b.checkPut(r); err != nil {
			return nil, err
		}
		return orNil(b.applyPut(r))
	case *pb.DeleteRangeRequest:
		return orNil(b.applyDeleteRange(r))
	case *pb.TxnRequest:
		x := txn{ctx: b.ctx, reader: &b.reader, batch: b}
		return orNil(x.run(r))
	case *pb.CompactionRequest:
		return orNil(b.applyCompaction(r))
	case *pb.LeaseGrantRequest:
		return orNil(b.applyLeaseGrant(r))
	case *pb.LeaseRevokeRequest:
		return orNil(b.applyLeaseRevoke(r))
	case *pb.LeaseKeepAliveRequest:
		return orNil(b.applyLeaseKeepAlive(r))
	case *pb.AlarmRequest:
		return b.applyAlarm(r), nil
	}
	panic(fmt.Sprintf("backend: no command for a %T", req))
}

// orNil keeps a typed nil out of the interface.
func orNil[M proto.Message](m M, err error) (proto.Message, error) {
	if err != nil {
		return nil, err
	}
	return m, nil
}

func (b *batch) header() *pb.ResponseHeader { return &pb.ResponseHeader{Revision: b.st.rev} }

// applyCompaction moves the compaction revision: instant and logical. The rows go later, in steps.
func (b *batch) applyCompaction(r *pb.CompactionRequest) (*pb.CompactionResponse, error) {
	switch {
	case r.Revision <= b.st.compact:
		return nil, &CompactedError{CompactRevision: b.st.compact}
	case r.Revision > b.st.rev:
		return nil, ErrFutureRev
	}
	if r.Physical && r.Revision > 0 && b.db.shared == nil {
		b.physical = &physicalCompaction{from: b.st.compact, to: r.Revision}
	}
	b.st.compact, b.reader.compact = r.Revision, r.Revision
	b.compacted = true
	return &pb.CompactionResponse{Header: b.header()}, nil
}

// applyLeaseGrant: the id has been drawn before the Command was queued, where the client asked for one.
func (b *batch) applyLeaseGrant(r *pb.LeaseGrantRequest) (*pb.LeaseGrantResponse, error) {
	switch {
	case r.ID == 0:
		return nil, ErrLeaseNotFound // etcd's answer to the id that means no lease
	case r.TTL > maxLeaseTTL:
		return nil, ErrLeaseTTLTooLarge
	case b.leases.exists(r.ID):
		return nil, ErrLeaseExists
	}
	ttl := max(r.TTL, 1) // Write has raised it to what is asked of each here
	b.st.logical += leaseCharge
	b.leases.grant(r.ID, ttl, b.now+ttl*1e6)
	return &pb.LeaseGrantResponse{Header: b.header(), ID: r.ID, TTL: ttl}, nil
}

func (b *batch) applyLeaseRevoke(r *pb.LeaseRevokeRequest) (*pb.LeaseRevokeResponse, error) {
	l := b.db.leases.byID[r.ID]
	if l == nil {
		return nil, ErrLeaseNotFound
	}
	b.revoke(l)
	return &pb.LeaseRevokeResponse{Header: b.header()}, nil
}

// revoke deletes the lease's keys, sorted, as one revision, and the lease.
func (b *batch) revoke(l *lease) {
	keys := l.sortedKeys()
	b.st.logical -= leaseCharge
	b.leases.revoke(l)
	for _, k := range keys {
		b.deleteKeys(keyRange{from: []byte(k), single: true})
	}
}

// applyLeaseKeepAlive prolongs a lease from now on. One that is due has lost, even if the expiry loop
// has not come round to it: it is never answered with success and then revoked.
func (b *batch) applyLeaseKeepAlive(r *pb.LeaseKeepAliveRequest) (*pb.LeaseKeepAliveResponse, error) {
	l := b.db.leases.byID[r.ID]
	if l == nil || l.deadline <= b.now {
		return nil, ErrLeaseNotFound
	}
	b.leases.renew(l, b.now+l.ttl*1e6)
	return &pb.LeaseKeepAliveResponse{Header: b.header(), ID: l.id, TTL: l.ttl}, nil
}

// applyExpiry revokes leases that are due, the oldest deadline first, each in a revision of its own. Under the
// CORRUPT alarm nothing is revoked, as in etcd.
func (b *batch) applyExpiry() (ids []int64) {
	if b.alarms.has(pb.AlarmType_CORRUPT) {
		return nil
	}
	rows := len(b.rows)
	for len(ids) < expiredPerCommand && len(b.rows)-rows < expiredRowsPerCommand && len(b.db.leases.due) > 0 {
		l := b.db.leases.due[0]
		if l.deadline > b.now {
			break
		}
		b.next("")
		b.revoke(l)
		ids = append(ids, l.id)
	}
	return ids
}

func (b *batch) applyAlarm(r *pb.AlarmRequest) *pb.AlarmResponse {
	resp := &pb.AlarmResponse{Header: b.header()}
	k := alarmKey{r.MemberID, r.Alarm}
	_, standing := b.alarms[k]
	switch r.Action {
	case pb.AlarmRequest_ACTIVATE:
		if r.Alarm == pb.AlarmType_NONE {
			return resp
		}
		b.changeAlarm(k, true)
	case pb.AlarmRequest_DEACTIVATE:
		if !standing {
			return resp
		}
		b.changeAlarm(k, false)
	default:
		return resp
	}
	resp.Alarms = append(resp.Alarms, &pb.AlarmMember{MemberID: r.MemberID, Alarm: r.Alarm})
	return resp
}
