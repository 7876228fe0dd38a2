package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/quire-db/quire/backend"
)

// fakeStore has the revision that the test sets, and fails as the test says.
type fakeStore struct {
	mu        sync.Mutex
	rev       int64
	fail      error
	follows   bool // another member leads
	compacted []int64
}

func (s *fakeStore) leads() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.follows
}

func (s *fakeStore) follow(follows bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.follows = follows
}

func (s *fakeStore) set(rev int64, fail error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rev, s.fail = rev, fail
}

func (s *fakeStore) revision() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rev
}

func (s *fakeStore) compact(_ context.Context, rev int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.compacted = append(s.compacted, rev)
	return s.fail
}

func (s *fakeStore) taken() []int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.compacted
	s.compacted = nil
	return c
}

// startCompactor runs one in the bubble of the test until it ends.
func startCompactor(t *testing.T, r retention) (*fakeStore, *observer.ObservedLogs) {
	core, logs := observer.New(zap.InfoLevel)
	s := &fakeStore{rev: 1}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		(&compactor{lg: zap.New(core), leads: s.leads, revision: s.revision, compact: s.compact}).run(ctx, r)
	}()
	t.Cleanup(func() { cancel(); <-done })
	synctest.Wait()
	return s, logs
}

func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestPeriodicCompactionKeepsThePeriod(t *testing.T) {
	for _, period := range []time.Duration{5 * time.Second, time.Hour, 24 * time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			interval := min(period, time.Hour)
			step := interval / 10
			s, logs := startCompactor(t, retention{Period: period})
			steps := int64(period / step)
			// The revision after n steps is n+1, so "one period ago" can be read off.
			rev := int64(1)
			advance := func(n int64) {
				for range n {
					rev++
					s.set(rev, nil)
					pass(step)
				}
			}
			advance(steps - 1)
			if got := s.taken(); len(got) > 0 {
				t.Fatalf("%v: compacted to %v before a whole period has passed", period, got)
			}
			advance(1)
			if got := s.taken(); !slices.Equal(got, []int64{1}) {
				t.Fatalf("%v: compacted to %v after the first period, want [1]", period, got)
			}
			advance(10)
			// As in etcd, the oldest note is a step older than the period when the timer fires: nothing younger
			// than the period goes.
			if got := s.taken(); !slices.Equal(got, []int64{10}) {
				t.Fatalf("%v: compacted to %v after the next interval, want [10]", period, got)
			}
			if n := logs.FilterMessage("starting auto periodic compaction").Len(); n != 2 {
				t.Errorf("%d lines 'starting auto periodic compaction', want 2", n)
			}
			if n := logs.FilterMessage("completed auto periodic compaction").Len(); n != 2 {
				t.Errorf("%d lines 'completed auto periodic compaction', want 2", n)
			}
		})
	}
}

func TestPeriodicCompactionSkipsAnIdleStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := startCompactor(t, retention{Period: time.Minute})
		pass(10 * time.Minute)
		if got := s.taken(); !slices.Equal(got, []int64{1}) {
			t.Errorf("compacted to %v, want once to 1", got)
		}
	})
}

func TestPeriodicCompactionRetriesAfterATenth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, logs := startCompactor(t, retention{Period: time.Minute})
		s.set(7, errors.New("no room"))
		pass(time.Minute)
		pass(6 * time.Second)
		if got := s.taken(); len(got) != 2 {
			t.Fatalf("tried %v, want two attempts in the first period and a tenth", got)
		}
		s.set(7, backend.ErrCompacted) // somebody else was faster: as good as done
		pass(6 * time.Second)
		if got := s.taken(); len(got) != 1 {
			t.Fatalf("tried %v, want one more attempt", got)
		}
		pass(50 * time.Second)
		if got := s.taken(); len(got) != 0 {
			t.Errorf("tried %v although it was compacted already", got)
		}
		if n := logs.FilterMessage("failed auto periodic compaction").Len(); n != 2 {
			t.Errorf("%d lines 'failed auto periodic compaction', want 2", n)
		}
	})
}

func TestRevisionCompactionKeepsSoMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, logs := startCompactor(t, retention{Revisions: 100})
		s.set(100, nil)
		pass(revisionInterval)
		if got := s.taken(); len(got) > 0 {
			t.Fatalf("compacted to %v although only 100 revisions exist", got)
		}
		s.set(150, errors.New("no room"))
		pass(revisionInterval)
		s.set(160, nil)
		pass(revisionInterval)
		pass(revisionInterval) // nothing new
		if got := s.taken(); !slices.Equal(got, []int64{50, 60}) {
			t.Errorf("compacted to %v, want [50 60]", got)
		}
		for msg, want := range map[string]int{"starting auto revision compaction": 2, "failed auto revision compaction": 1, "completed auto revision compaction": 1} {
			if n := logs.FilterMessage(msg).Len(); n != want {
				t.Errorf("%d lines %q, want %d", n, msg, want)
			}
		}
	})
}

func TestNoRetentionNoCompaction(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := startCompactor(t, retention{})
		s.set(1000, nil)
		pass(48 * time.Hour)
		if got := s.taken(); len(got) > 0 {
			t.Errorf("compacted to %v", got)
		}
	})
}

func TestParseRetention(t *testing.T) {
	for _, x := range []struct {
		mode, text string
		want       retention
		err        string
	}{
		{modePeriodic, "0", retention{}, ""},
		{modePeriodic, "", retention{}, ""},
		{modePeriodic, "24", retention{Period: 24 * time.Hour}, ""},
		{modePeriodic, "5m", retention{Period: 5 * time.Minute}, ""},
		{modePeriodic, "1h30m", retention{Period: 90 * time.Minute}, ""},
		{modePeriodic, "-5", retention{}, "error parsing CompactionRetention"},
		{modePeriodic, "-5m", retention{}, "must not be negative"},
		{modePeriodic, "99999999", retention{}, "too large"},
		{modeRevision, "1000", retention{Revisions: 1000}, ""},
		{modeRevision, "1h", retention{}, "wants a number of revisions"},
		{modeRevision, "0s", retention{}, ""},
	} {
		got, err := parseRetention(x.mode, x.text)
		switch {
		case x.err == "" && (err != nil || got != x.want):
			t.Errorf("%s %q: %+v, %v; want %+v", x.mode, x.text, got, err, x.want)
		case x.err != "" && (err == nil || !strings.Contains(err.Error(), x.err)):
			t.Errorf("%s %q: error %v, want %q", x.mode, x.text, err, x.err)
		}
	}
}

// A new leader keeps as much history as the last one did, neither more nor less.
func TestOnlyTheLeaderCompacts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := startCompactor(t, retention{Period: 10 * time.Minute})
		s.follow(true)
		for rev := int64(1); rev <= 30; rev++ {
			s.set(rev, nil)
			pass(time.Minute)
		}
		if got := s.taken(); len(got) > 0 {
			t.Errorf("a follower compacted to %v", got)
		}
		s.follow(false)
		s.set(31, nil)
		pass(time.Minute)
		if got := s.taken(); !slices.Equal(got, []int64{20}) {
			t.Errorf("the new leader compacted to %v, want [20]: ten minutes ago, and the step that etcd adds", got)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		s, _ := startCompactor(t, retention{Revisions: 100})
		s.follow(true)
		s.set(500, nil)
		pass(time.Hour)
		if got := s.taken(); len(got) > 0 {
			t.Errorf("a follower compacted to %v", got)
		}
		s.follow(false)
		pass(revisionInterval)
		if got := s.taken(); !slices.Equal(got, []int64{400}) {
			t.Errorf("the new leader compacted to %v, want [400]", got)
		}
	})
}
