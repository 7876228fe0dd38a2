package watchpoller

import (
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// allWatchers is the watch id of a progress notification that holds for every watcher of the stream, and of answers
// that belong to no watcher. It is etcd's clientv3.InvalidWatchID.
const allWatchers = -1

// progressPeriod returns the period of one stream's progress notifications. Its random part keeps streams that were
// opened together from notifying together.
func (p *Poller) progressPeriod() time.Duration {
	return p.o.ProgressInterval + rand.N(p.o.ProgressInterval/10)
}

// requestProgress handles a WatchProgressRequest. The answer bears at least the revision that the store has now, so
// that a client that has read this revision elsewhere learns that the watch has it too. Requests that come before an
// earlier one is answered are answered with it.
func (s *stream) requestProgress() {
	p := s.p
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.ended {
		return
	}
	s.askedFor = p.src.Revision()
	p.mu.asking[s] = struct{}{}
	s.answerProgress()
	if _, waits := p.mu.asking[s]; waits {
		p.wake.ring()
	}
}

// answerAsking answers the progress requests that can be answered now. REQUIRES: p.mu.
func (p *Poller) answerAsking() {
	for s := range p.mu.asking {
		s.answerProgress()
	}
}

// answerProgress answers the stream's progress request, if it can: when all watchers are synced and have been given
// everything up to the revision asked for. The answer is queued behind these events. Like etcd it says nothing while
// a watcher waits for a future revision, after a watcher was canceled by compaction and not yet by the client, and
// when there is no watcher; the request is forgotten then. REQUIRES: p.mu.
func (s *stream) answerProgress() {
	p := s.p
	rev := p.mu.next - 1
	if rev < s.askedFor && len(s.watchers) > 0 && !p.mu.synced.empty() {
		return
	}
	if s.lagging.Load() > 0 {
		return
	}
	answer := len(s.watchers) > 0
	for _, w := range s.watchers {
		switch {
		case w.state != synced || w.startRev > p.src.Revision():
			answer = false
		case w.next > rev+1 || w.startRev > rev:
			return // follow is behind: the answer must not be older than what the client has seen from history
		}
	}
	delete(p.mu.asking, s)
	if !answer {
		return
	}
	s.control(nil, &pb.WatchResponse{Header: &pb.ResponseHeader{Revision: rev}, WatchId: allWatchers})
}

// notifyProgress runs once per period: every watcher with progress_notify that was sent nothing since the last time
// hears of the revision it has seen everything up to.
func (s *stream) notifyProgress() {
	p := s.p
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(s.watchers)) {
		w := s.watchers[id]
		if !w.progressNotify {
			continue
		}
		rev := max(p.mu.next, w.next) - 1 // catchUp may have been ahead of follow
		if w.quiet.Load() && w.state == synced && w.startRev <= rev {
			s.control(w, &pb.WatchResponse{Header: &pb.ResponseHeader{Revision: rev}, WatchId: w.id})
		}
		w.quiet.Store(true)
	}
}
