package main

import (
	"errors"
	"io"
	"slices"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// fieldEvents is WatchResponse.events in etcd's rpc.proto.
const fieldEvents = 11

type watchStream = grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]

// watch is the service of the same name.
type watch struct {
	pb.UnimplementedWatchServer
	commits *committer
}

// watches are all that are open. The lock orders what is sent on the streams.
type watches struct {
	sync.Mutex
	groups []*group // guarded by the lock
}

// group is the watches of one range: a put is compared with each range once, not with each watch.
type group struct {
	from, end string
	members   []watcher
	pending   []byte // events of the batch that is being published, as fields of a WatchResponse
}

type watcher struct {
	stream watchStream
	id     int64 // on its stream
}

// Watch opens watches until the client goes away.
func (s *watch) Watch(stream watchStream) error {
	defer s.commits.watches.remove(stream)
	for id := int64(0); ; id++ {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			<-stream.Context().Done() // a client that has no more to say still listens
			return nil
		}
		if err != nil {
			return err
		}
		create := r.GetCreateRequest()
		if create == nil {
			return status.Error(codes.Unimplemented, "this server only opens watches")
		}
		if err := s.commits.watch(watcher{stream, id}, create); err != nil {
			return err
		}
	}
}

// watch adds a watcher and tells its client, before any event.
func (c *committer) watch(w watcher, r *pb.WatchCreateRequest) error {
	c.watches.Lock()
	defer c.watches.Unlock()
	now := c.revision.Load()
	if r.StartRevision != 0 && r.StartRevision <= now {
		return status.Errorf(codes.Unimplemented, "a watch from revision %d on, at revision %d: this server has no history", r.StartRevision, now)
	}
	g := c.watches.group(string(r.Key), string(r.RangeEnd))
	g.members = append(g.members, w)
	return w.stream.Send(&pb.WatchResponse{Header: &pb.ResponseHeader{Revision: now}, WatchId: w.id, Created: true})
}

// group finds the group of a range or makes it. REQUIRES: the lock is held.
func (s *watches) group(from, end string) *group {
	i := slices.IndexFunc(s.groups, func(g *group) bool { return g.from == from && g.end == end })
	if i < 0 {
		i = len(s.groups)
		s.groups = append(s.groups, &group{from: from, end: end})
	}
	return s.groups[i]
}

// remove takes all watchers of a stream out, and the groups that are left empty.
func (s *watches) remove(stream watchStream) {
	s.Lock()
	defer s.Unlock()
	for _, g := range s.groups {
		g.members = slices.DeleteFunc(g.members, func(w watcher) bool { return w.stream == stream })
	}
	s.groups = slices.DeleteFunc(s.groups, func(g *group) bool { return len(g.members) == 0 })
}

// publish makes puts visible, of which the first has the given revision and each other one the next, and sends them to the
// watchers that want them.
func (c *committer) publish(puts []*pb.PutRequest, first int64) error {
	c.watches.Lock()
	defer c.watches.Unlock()
	last := c.revision.Add(int64(len(puts)))
	if len(c.watches.groups) == 0 {
		return nil
	}
	for i, r := range puts {
		key := string(r.Key)
		var event []byte // encoded for the first group that wants it
		for _, g := range c.watches.groups {
			if !contains(g.from, g.end, key) {
				continue
			}
			if event == nil {
				var err error
				event, err = proto.Marshal(&mvccpb.Event{Kv: &mvccpb.KeyValue{Key: r.Key, Value: r.Value, ModRevision: first + int64(i)}})
				if err != nil {
					return err
				}
			}
			g.pending = protowire.AppendTag(g.pending, fieldEvents, protowire.BytesType)
			g.pending = protowire.AppendBytes(g.pending, event)
		}
	}
	for _, g := range c.watches.groups {
		g.send(last)
	}
	return nil
}

// send sends what is pending to all watchers of the group.
func (g *group) send(rev int64) {
	if len(g.pending) == 0 {
		return
	}
	for _, w := range g.members {
		answer := &pb.WatchResponse{Header: &pb.ResponseHeader{Revision: rev}, WatchId: w.id}
		// Fields that a message does not know are sent as they are, which spares encoding the events for each watcher.
		answer.ProtoReflect().SetUnknown(g.pending)
		// It fails only when the stream is over: Watch returns then, and removes its watchers.
		_ = w.stream.Send(answer)
	}
	g.pending = g.pending[:0]
}
