package sqlraft

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"
)

// TestHooksTellOfTheLogAndOfCopies: what the metrics of a member are made of.
func TestHooksTellOfTheLogAndOfCopies(t *testing.T) {
	c := newNodeCluster(t, 3, Options{CatchUpEntries: 10})
	var written, serving, served, begun, fetched, begunInstalling, endedInstalling atomic.Int64
	var from, to atomic.Uint64
	c.o.Hooks.LogWritten = func(bytes int, took time.Duration) {
		if bytes%sectorBytes != 0 || bytes == 0 || took < 0 {
			t.Errorf("%d bytes were written to the log in %v", bytes, took)
		}
		written.Add(1)
	}
	c.o.Hooks.SnapshotServing = func(id uint64) { to.Store(id); serving.Add(1) }
	c.o.Hooks.SnapshotServed = func(_ uint64, _ time.Duration, err error) {
		if err == nil {
			served.Add(1)
		}
	}
	c.o.Hooks.SnapshotBegun = func(id uint64) { from.Store(id); begun.Add(1) }
	c.o.Hooks.SnapshotFetched = func(uint64, uint64, error) { fetched.Add(1) }
	c.o.Hooks.SnapshotInstalling = func(n int) {
		if n > 0 {
			begunInstalling.Add(1)
		} else {
			endedInstalling.Add(1)
		}
	}
	c.startAll()
	c.leader()
	away := c.members[2]
	away.stop()
	lead := c.leader()
	for i := range 300 {
		lead.mustWrite(fmt.Sprint(i))
	}
	away.start(nil)
	c.same(300)
	if written.Load() == 0 {
		t.Error("nothing was told of writing to the log")
	}
	until(t, "all that began has ended", func() bool {
		return serving.Load() > 0 && served.Load() == serving.Load() && begun.Load() > 0 && fetched.Load() == begun.Load() &&
			begunInstalling.Load() > 0 && endedInstalling.Load() == begunInstalling.Load()
	})
	if from.Load() == away.id || to.Load() != away.id {
		t.Errorf("member %x fetched from %x; served was %x", away.id, from.Load(), to.Load())
	}
}

// slowFile takes long to write and not to sync.
type slowFile struct{ diskFile }

func (f slowFile) write(p []byte, offset int64) error {
	time.Sleep(5 * time.Millisecond)
	return f.diskFile.write(p, offset)
}

// TestHooksTellSyncsFromWrites: what was written without a sync before is no part of the time that a sync took.
func TestHooksTellSyncsFromWrites(t *testing.T) {
	c := newNodeCluster(t, 1, Options{})
	var wrong, written atomic.Int64
	c.o.Hooks.LogSynced = func(took time.Duration) {
		if took < 0 {
			wrong.Add(1)
		}
	}
	c.o.Hooks.LogWritten = func(_ int, took time.Duration) { written.Add(int64(took)) }
	c.startAll()
	n := c.leader().node
	n.call(func(*core) { n.log.tail.f = slowFile{n.log.tail.f} })
	for i := range 10 {
		c.leader().mustWrite(fmt.Sprint(i))
	}
	if wrong.Load() > 0 {
		t.Errorf("%d syncs took less than nothing", wrong.Load())
	}
	if took := time.Duration(written.Load()); took < 50*time.Millisecond {
		t.Errorf("10 entries were written in %v", took)
	}
}
