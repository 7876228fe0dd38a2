// Package conformance says in etcd's own words what a server of the etcd v3 API promises, one case per
// sentence. The same cases run against a real etcd and against quire: a case that etcd fails is wrong.
package conformance

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/test/etcd/start"
)

// testCase is one claim. Each runs on a server of its own, so that revisions can be named.
type testCase struct {
	name    string
	options start.Options
	run     func(x *exam)
}

// Exercise runs every case against servers from begin.
func Exercise(t *testing.T, begin start.Func) {
	for _, service := range []struct {
		name  string
		cases []testCase
	}{
		{"KV", kvCases},
		{"Range", rangeCases},
		{"RangeStream", rangeStreamCases},
		{"Txn", txnCases},
		{"Watch", watchCases},
		{"Lease", leaseCases},
		{"Maintenance", maintenanceCases},
		{"Upkeep", upkeepCases},
		{"Snapshot", snapshotCases},
		{"Cluster", clusterCases},
		{"Auth", authCases},
		{"Permissions", permissionCases},
		{"Lock", lockCases},
		{"Election", electionCases},
		{"Gateway", gatewayCases},
		{"HTTP", httpCases},
		{"Errors", errorCases},
		{"Client", clientCases},
		{"Session", sessionCases},
		{"STM", stmCases},
		{"Leasing", leasingCases},
		{"Mirror", mirrorCases},
		{"Namespace", namespaceCases},
		{"Ordering", orderingCases},
		{"Kubernetes", kubernetesCases},
		{"Naming", namingCases},
		{"Recipes", recipeCases},
	} {
		t.Run(service.name, func(t *testing.T) {
			for _, c := range service.cases {
				t.Run(c.name, func(t *testing.T) {
					t.Parallel()
					ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
					t.Cleanup(cancel)
					s := begin(t, withSecret(t, c.options))
					c.run(&exam{T: t, Server: s, ctx: ctx})
				})
			}
		})
	}
}

// exam is a running case: the test, its server and short forms of the requests that most cases need.
// Each short form ends the case when the server refuses.
type exam struct {
	*testing.T
	*start.Server
	ctx context.Context
}

func (x *exam) put(key, value string) *pb.PutResponse {
	x.Helper()
	return x.putRequest(&pb.PutRequest{Key: []byte(key), Value: []byte(value)})
}

func (x *exam) putRequest(r *pb.PutRequest) *pb.PutResponse {
	x.Helper()
	resp, err := x.KV.Put(x.ctx, r)
	x.must(err, r)
	return resp
}

func (x *exam) delete(key string) *pb.DeleteRangeResponse {
	x.Helper()
	return x.deleteRequest(&pb.DeleteRangeRequest{Key: []byte(key)})
}

func (x *exam) deleteRequest(r *pb.DeleteRangeRequest) *pb.DeleteRangeResponse {
	x.Helper()
	resp, err := x.KV.DeleteRange(x.ctx, r)
	x.must(err, r)
	return resp
}

func (x *exam) rangeRequest(r *pb.RangeRequest) *pb.RangeResponse {
	x.Helper()
	resp, err := x.KV.Range(x.ctx, r)
	x.must(err, r)
	return resp
}

// get returns the pair of key, nil when there is none.
func (x *exam) get(key string) *mvccpb.KeyValue {
	x.Helper()
	resp := x.rangeRequest(&pb.RangeRequest{Key: []byte(key)})
	if len(resp.Kvs) == 0 {
		return nil
	}
	return resp.Kvs[0]
}

// revision is the store's revision now.
func (x *exam) revision() int64 {
	x.Helper()
	return x.rangeRequest(&pb.RangeRequest{Key: []byte("x"), CountOnly: true}).Header.Revision
}

func (x *exam) txn(r *pb.TxnRequest) *pb.TxnResponse {
	x.Helper()
	resp, err := x.KV.Txn(x.ctx, r)
	x.must(err, r)
	return resp
}

func (x *exam) compact(revision int64) {
	x.Helper()
	r := &pb.CompactionRequest{Revision: revision, Physical: true}
	_, err := x.KV.Compact(x.ctx, r)
	x.must(err, r)
}

func (x *exam) grant(id, ttl int64) *pb.LeaseGrantResponse {
	x.Helper()
	r := &pb.LeaseGrantRequest{ID: id, TTL: ttl}
	resp, err := x.Lease.LeaseGrant(x.ctx, r)
	x.must(err, r)
	return resp
}

func (x *exam) must(err error, request proto.Message) {
	x.Helper()
	if err != nil {
		x.Fatalf("%s: %v", show(request), err)
	}
}

// wantError demands the code and the text of want, one of rpctypes' errors.
func (x *exam) wantError(got, want error) {
	x.Helper()
	g, w := status.Convert(got), status.Convert(want)
	if g.Code() != w.Code() || g.Message() != w.Message() {
		x.Errorf("got error %v %q, want %v %q", g.Code(), g.Message(), w.Code(), w.Message())
	}
}

func equal[T comparable](x *exam, what string, got, want T) {
	x.Helper()
	if got != want {
		x.Errorf("%s is %v, want %v", what, got, want)
	}
}

func same(x *exam, what string, got, want proto.Message) {
	x.Helper()
	if !proto.Equal(got, want) {
		x.Errorf("%s is\n  %s, want\n  %s", what, show(got), show(want))
	}
}

func wantKeys(x *exam, kvs []*mvccpb.KeyValue, want ...string) {
	x.Helper()
	got := keysOf(kvs)
	if !slices.Equal(got, want) {
		x.Errorf("keys are %q, want %q", got, want)
	}
}

func keysOf(kvs []*mvccpb.KeyValue) []string {
	got := make([]string, len(kvs))
	for i, kv := range kvs {
		got[i] = string(kv.Key)
	}
	return got
}

func show(m proto.Message) string {
	text := prototext.MarshalOptions{}.Format(m)
	const most = 400
	if len(text) > most {
		text = text[:most] + fmt.Sprintf("… (%d bytes)", len(text))
	}
	return string(m.ProtoReflect().Descriptor().Name()) + "{" + strings.TrimSpace(text) + "}"
}

func kv(key, value string, create, mod, version int64) *mvccpb.KeyValue {
	return &mvccpb.KeyValue{Key: []byte(key), Value: []byte(value), CreateRevision: create, ModRevision: mod, Version: version}
}

func putOp(key, value string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: []byte(value)}}}
}

func putRequestOp(r *pb.PutRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: r}}
}

func rangeOp(r *pb.RangeRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: r}}
}

func getOp(key string) *pb.RequestOp { return rangeOp(&pb.RangeRequest{Key: []byte(key)}) }

func deleteOp(key, end string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(end)}}}
}

func txnOp(r *pb.TxnRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: r}}
}
