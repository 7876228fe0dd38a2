package main

import (
	"bytes"
	"context"
	"slices"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// readyValue is the value of every key that is read.
var readyValue = bytes.Repeat([]byte("floor..."), 1024/8)

// kv is the service of the same name.
type kv struct {
	pb.UnimplementedKVServer
	commits *committer
}

// Put answers when the put is durable. Of the request only key and value are looked at.
func (s *kv) Put(_ context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
	rev, err := s.commits.put(r)
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return &pb.PutResponse{Header: &pb.ResponseHeader{Revision: rev}}, nil
}

// Txn does the put of its success branch, whatever is compared.
func (s *kv) Txn(_ context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	if len(r.Success) != 1 || r.Success[0].GetRequestPut() == nil {
		return nil, status.Error(codes.Unimplemented, "this server does only Txns whose success branch is one put")
	}
	rev, err := s.commits.put(r.Success[0].GetRequestPut())
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	header := &pb.ResponseHeader{Revision: rev}
	return &pb.TxnResponse{Header: header, Succeeded: true, Responses: []*pb.ResponseOp{
		{Response: &pb.ResponseOp_ResponsePut{ResponsePut: &pb.PutResponse{Header: header}}},
	}}, nil
}

// Range answers one key with the ready value, and many keys without values.
func (s *kv) Range(_ context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	// Before the keys are read: none is then missing that the header's revision includes.
	answer := &pb.RangeResponse{Header: &pb.ResponseHeader{Revision: s.commits.revision.Load()}}
	if len(r.RangeEnd) == 0 {
		answer.Kvs = []*mvccpb.KeyValue{{Key: r.Key, Value: readyValue}}
	} else {
		answer.Kvs = s.commits.keys.list(string(r.Key), string(r.RangeEnd))
	}
	answer.Count = int64(len(answer.Kvs))
	return answer, nil
}

// keys knows at which revision each key was last put.
type keys struct {
	mu   sync.Mutex
	revs map[string]int64 // guarded by mu
}

// written notes puts, of which the first has the given revision and each other one the next.
func (k *keys) written(puts []*pb.PutRequest, rev int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for i, r := range puts {
		k.revs[string(r.Key)] = rev + int64(i)
	}
}

// list is the keys of a range in order, with their revisions only. It looks at all keys there are: it is for preparing a
// measurement, not for measuring.
func (k *keys) list(from, end string) []*mvccpb.KeyValue {
	k.mu.Lock()
	defer k.mu.Unlock()
	var found []*mvccpb.KeyValue
	for key, rev := range k.revs {
		if contains(from, end, key) {
			found = append(found, &mvccpb.KeyValue{Key: []byte(key), ModRevision: rev})
		}
	}
	slices.SortFunc(found, func(a, b *mvccpb.KeyValue) int { return bytes.Compare(a.Key, b.Key) })
	return found
}

// contains reports whether etcd's range [from, end) holds a key: no end is one key alone, the end "\x00" is no end at all.
func contains(from, end, key string) bool {
	switch end {
	case "":
		return key == from
	case "\x00":
		return key >= from
	default:
		return key >= from && key < end
	}
}
