package watchpoller

import (
	"context"
	"time"

	"github.com/quire-db/quire/backend"
)

// Source is the part of *backend.DB that watching needs. Its methods may be called by several goroutines at once.
type Source interface {
	// History returns whole revisions of a range, oldest first. It may block on storage.
	History(ctx context.Context, req backend.HistoryRequest) (backend.HistoryResult, error)
	// Recent is History from memory, without waiting: not ok when From is no longer there.
	Recent(req backend.HistoryRequest) (res backend.HistoryResult, ok bool)
	// PrevKV returns what key held just before rev; nil when that is nothing or compacted. It may block on storage.
	PrevKV(ctx context.Context, key []byte, rev int64) (backend.Frame, error)
	// Subscribe has f called after each batch that raised Revision or CompactRevision. Calls may be merged. f does
	// not block.
	Subscribe(f func(rev int64)) (cancel func())
	// Revision is the newest revision that History can return. It is raised before the subscribers are called,
	// and does not block: it is called with the poller's lock held. So is CompactRevision.
	Revision() int64
	CompactRevision() int64
}

var _ Source = (*backend.DB)(nil)

// A bell wakes one goroutine. Rings merge: whoever is woken looks at the state, not at the number of rings.
type bell chan struct{}

func newBell() bell { return make(bell, 1) }

// ring never blocks.
func (b bell) ring() {
	select {
	case b <- struct{}{}:
	default:
	}
}

// After a read failed, it is tried again after minRetry, then twice that, up to maxRetry.
const (
	minRetry = 20 * time.Millisecond
	maxRetry = time.Second
)

// A retry spaces the attempts of one loop.
type retry struct{ delay time.Duration }

func (r *retry) succeeded() { r.delay = 0 }

// wait blocks until the next attempt is due; false when ctx ended first.
func (r *retry) wait(ctx context.Context) bool { return r.waitEither(ctx, ctx) }

// waitEither is wait with two contexts.
func (r *retry) waitEither(a, b context.Context) bool {
	r.delay = min(max(2*r.delay, minRetry), maxRetry)
	t := time.NewTimer(r.delay)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-a.Done():
		return false
	case <-b.Done():
		return false
	}
}

// follow reads new rows as long as the poller lives. It sleeps until the source says that there are some; a lost
// hint is made good by the next one, or by the tick where there is one.
func (p *Poller) follow() {
	defer p.wg.Done()
	var tick <-chan time.Time
	if p.o.PollInterval > 0 {
		t := time.NewTicker(p.o.PollInterval)
		defer t.Stop()
		tick = t.C
	}
	var again retry
	for {
		more, err := p.advance()
		switch {
		case p.ctx.Err() != nil:
			return
		case err != nil:
			p.o.Hooks.readFailed(err)
			if !again.wait(p.ctx) {
				return
			}
			continue
		}
		again.succeeded()
		if more {
			continue
		}
		select {
		case <-p.wake:
		case <-tick:
		case <-p.ctx.Done():
			return
		}
	}
}
