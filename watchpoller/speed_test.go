package watchpoller

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// serveCounting runs one stream with a watch on everything from start on; reached is closed with the n-th event.
func serveCounting(b *testing.B, p *Poller, start int64, n int64) (reached chan struct{}) {
	reached = make(chan struct{})
	req := &pb.WatchCreateRequest{Key: []byte{0}, RangeEnd: []byte{0}, StartRevision: start}
	first := true
	recv := func() (*pb.WatchRequest, error) {
		if first {
			first = false
			return &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: req}}, nil
		}
		<-b.Context().Done()
		return nil, b.Context().Err()
	}
	var got int64
	go p.Serve(b.Context(), recv, func(msg any) error {
		if r, ok := msg.(*Response); ok {
			for _, buf := range r.WireBuffers() {
				_ = buf[0]
			}
			if got += int64(r.Events()); got == n {
				close(reached)
			}
		}
		return nil
	})
	return reached
}

// BenchmarkCatchUp is a single lagging watcher: events per second from history (in memory) to send.
func BenchmarkCatchUp(b *testing.B) {
	const rows = 200_000
	src := newMemSource()
	for i := range rows {
		src.put(fmt.Sprint("k", i%1000), "a value of thirty-two bytes, ....")
	}
	p := Start(src, Options{})
	for b.Loop() {
		<-serveCounting(b, p, 1, rows)
	}
	b.ReportMetric(float64(rows)*float64(b.N)/b.Elapsed().Seconds(), "events/s")
}

// BenchmarkLatency is the time from a commit to send, one write at a time.
func BenchmarkLatency(b *testing.B) {
	src := newMemSource()
	p := Start(src, Options{})
	var sent atomic.Int64
	got := make(chan struct{}, 1)
	req := &pb.WatchCreateRequest{Key: []byte("k")}
	created := make(chan struct{})
	first := true
	go p.Serve(b.Context(), func() (*pb.WatchRequest, error) {
		if first {
			first = false
			return &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: req}}, nil
		}
		<-b.Context().Done()
		return nil, b.Context().Err()
	}, func(msg any) error {
		if _, ok := msg.(*Response); !ok {
			close(created)
			return nil
		}
		sent.Store(int64(time.Since(epoch)))
		got <- struct{}{}
		return nil
	})
	<-created
	var total time.Duration
	for b.Loop() {
		at := time.Since(epoch)
		src.put("k", "v")
		<-got
		total += time.Duration(sent.Load()) - at
	}
	b.ReportMetric(float64(total.Nanoseconds())/float64(b.N), "ns/commit-to-send")
}

var epoch = time.Now()

// BenchmarkManyWatchers is one write under many watchers that it does not concern.
func BenchmarkManyWatchers(b *testing.B) {
	g := newGroup()
	for i := range 10_000 {
		k := fmt.Appendf(nil, "/registry/%05d/", i)
		g.add(&watcher{rng: keyRange{key: k, end: fmt.Appendf(nil, "/registry/%05d0", i)}})
		g.add(&watcher{rng: keyRange{key: k}})
	}
	key := []byte("/registry/05000/x")
	var dst []*watcher
	for b.Loop() {
		dst = g.match(dst[:0], key)
	}
	if len(dst) != 1 {
		b.Fatalf("%d watchers match, want 1", len(dst))
	}
}
