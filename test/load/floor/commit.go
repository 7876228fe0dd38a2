package main

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/sys/unix"
)

// committer makes puts durable, all that wait at once with one write and one sync.
//
// At any time one goroutine at most commits. A put that finds nobody at it commits itself, without waiting for another
// goroutine to wake up. Those that come meanwhile wait in one batch, which is then left to a goroutine of its own, until
// nobody waits any more. A batch is not limited: it has at most as many puts as there are calls under way.
type committer struct {
	queue struct {
		sync.Mutex
		busy bool   // somebody commits
		next *batch // who waits for the commit after it; nil: nobody
	}
	revision atomic.Int64 // of the last put that is durable; rises under the lock of watches
	keys     keys
	watches  watches

	// Used only by who commits.
	file   *os.File
	record []byte
}

// batch is puts that become durable together. Whoever waits for done may read the results then.
type batch struct {
	puts  []*pb.PutRequest
	done  chan struct{}
	first int64 // revision of the first put; the others follow without a gap
	err   error
}

// put returns the revision of a put when it is durable and all watches have been told.
func (c *committer) put(r *pb.PutRequest) (int64, error) {
	q := &c.queue
	q.Lock()
	if !q.busy {
		q.busy = true
		q.Unlock()
		b := &batch{puts: []*pb.PutRequest{r}}
		c.commit(b)
		if next := c.nextBatch(); next != nil {
			go c.commitAll(next)
		}
		return b.first, b.err
	}
	if q.next == nil {
		q.next = &batch{done: make(chan struct{})}
	}
	b, i := q.next, len(q.next.puts)
	b.puts = append(b.puts, r)
	q.Unlock()
	<-b.done
	return b.first + int64(i), b.err
}

// commitAll commits a batch, and those that come meanwhile, until nobody waits any more.
func (c *committer) commitAll(b *batch) {
	for ; b != nil; b = c.nextBatch() {
		c.commit(b)
		close(b.done)
	}
}

// nextBatch is the puts that wait, for who has just committed; nil: there are none, and nobody commits now.
func (c *committer) nextBatch() *batch {
	c.queue.Lock()
	defer c.queue.Unlock()
	b := c.queue.next
	c.queue.next = nil
	c.queue.busy = b != nil
	return b
}

// commit makes a batch durable, then visible, then known to watches.
func (c *committer) commit(b *batch) {
	c.record = c.record[:0]
	for _, r := range b.puts {
		c.record = append(append(c.record, r.Key...), r.Value...)
	}
	if _, b.err = c.file.Write(c.record); b.err != nil {
		return
	}
	if err := unix.Fdatasync(int(c.file.Fd())); err != nil {
		b.err = fmt.Errorf("syncing %s: %w", c.file.Name(), err)
		return
	}
	b.first = c.revision.Load() + 1
	c.keys.written(b.puts, b.first)
	b.err = c.publish(b.puts, b.first)
}
