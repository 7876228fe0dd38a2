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
		gained   int64
		since    time.Duration // the end of the round before
		round    time.Duration
		min, max time.Duration
	}{
		{"nothing is written", t.Context(), 0, 100, 10 * time.Millisecond, 10 * time.Millisecond, 0, 10 * time.Millisecond},
		{"one revision in four milliseconds", t.Context(), 10, 100, 40 * time.Millisecond, 40 * time.Millisecond, 35 * time.Millisecond, 2 * time.Second},
		{"many", t.Context(), 1000, 1 << 20, 5 * time.Millisecond, 5 * time.Millisecond, maxRest * 5 * time.Millisecond, 2 * time.Second},
		{"a round that took very long", t.Context(), 1 << 20, 1 << 30, time.Minute, time.Minute, maxRestTime, 2 * time.Second},
		{"it came to the end", t.Context(), 1 << 20, 0, time.Minute, time.Minute, 0, maxRestTime / 2},
		{"the poller is closed", ended, 1 << 20, 1 << 30, time.Minute, time.Minute, 0, maxRestTime / 2},
	} {
		now := time.Now()
		y := yielding{rev: 100, at: now.Add(-x.since), most: maxRest}
		y.after(x.ctx, now.Add(-x.round), 100+x.written, x.gained)
		if took := time.Since(now); took < x.min || took > x.max {
			t.Errorf("%s: rested %v, want %v to %v", x.name, took, x.min, x.max)
		}
		if y.rev != 100+x.written {
			t.Errorf("%s: the revision was not noted", x.name)
		}
	}
}

// TestReadingHistoryArrives: who gains less than is written rests less and less, until it gains more.
func TestReadingHistoryArrives(t *testing.T) {
	y := yielding{at: time.Now(), most: maxRest}
	for range 10 {
		y.after(t.Context(), time.Now(), y.rev+100, 100)
	}
	if y.most > 0.1 {
		t.Errorf("it may still rest for %v rounds", y.most)
	}
	for range 10 {
		y.after(t.Context(), time.Now(), y.rev+100, 200)
	}
	if y.most != maxRest {
		t.Errorf("it may rest for %v rounds again, want %d", y.most, maxRest)
	}
}
