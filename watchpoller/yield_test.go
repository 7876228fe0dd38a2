package watchpoller

import (
	"context"
	"testing"
	"time"
)

func TestReadingHistoryGivesWayToWriting(t *testing.T) {
	ended, end := context.WithCancel(t.Context())
	end()
	for _, x := range []struct {
		name     string
		ctx      context.Context
		written  int64
		since    time.Duration // the end of the round before
		round    time.Duration
		min, max time.Duration
	}{
		{"nothing is written", t.Context(), 0, 10 * time.Millisecond, 10 * time.Millisecond, 0, 10 * time.Millisecond},
		{"one revision in four milliseconds", t.Context(), 10, 40 * time.Millisecond, 40 * time.Millisecond, 35 * time.Millisecond, 2 * time.Second},
		{"many", t.Context(), 1000, 5 * time.Millisecond, 5 * time.Millisecond, maxRest * 5 * time.Millisecond, 2 * time.Second},
		{"a round that took very long", t.Context(), 1 << 20, time.Minute, time.Minute, maxRestTime, 2 * time.Second},
		{"the poller is closed", ended, 1 << 20, time.Minute, time.Minute, 0, maxRestTime / 2},
	} {
		now := time.Now()
		y := yielding{rev: 100, at: now.Add(-x.since)}
		y.after(x.ctx, now.Add(-x.round), 100+x.written)
		if took := time.Since(now); took < x.min || took > x.max {
			t.Errorf("%s: rested %v, want %v to %v", x.name, took, x.min, x.max)
		}
		if y.rev != 100+x.written {
			t.Errorf("%s: the revision was not noted", x.name)
		}
	}
}
