//go:build linux

package partitions

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/quire-db/quire/test/etcd/partitions/cluster"
	"github.com/quire-db/quire/test/etcd/partitions/network"
)

// Clusters drawn at random suffer faults drawn at random, each a few, one cluster after the other.
func TestRandomFaults(t *testing.T) {
	needRoot(t)
	t.Parallel()
	var until time.Time
	if text := os.Getenv("QUIRE_MINUTES"); text != "" {
		minutes, err := strconv.ParseFloat(text, 64)
		if err != nil {
			t.Fatalf("QUIRE_MINUTES: %v", err)
		}
		until = time.Now().Add(time.Duration(minutes * float64(time.Minute)))
	}
	seed := newSeed(t)
	for round := uint64(0); round == 0 || time.Now().Before(until); round++ {
		t.Run(fmt.Sprint(round), func(t *testing.T) { randomRound(t, seed+round) })
	}
}

func randomRound(t *testing.T, seed uint64) {
	o := setup{members: 3, losesMajority: true, peerTLS: seed%2 == 0, spare: 2}
	if seed%3 == 0 {
		o.members = 5
	}
	if seed%5 < 2 {
		o.flags = append(o.flags, lagging.flags...)
	}
	o.learns = !isEtcd(t)
	s := beginWith(t, o, seed)
	faults := []func(){s.randomSplit, s.randomSplit, s.randomCuts, s.randomWeather, s.randomKills, s.randomKills, s.randomPauses,
		s.randomCrash, s.randomMove, s.randomReplacement, s.randomRestart}
	if !isEtcd(t) {
		faults = append(faults, s.randomLoss)
	}
	for range 5 {
		faults[s.random.IntN(len(faults))]()
		s.Heal()
		for _, m := range s.Members {
			s.must(m.Resume())
			if !m.Running() {
				s.must(m.Start())
			}
		}
		s.ready(s.Members...)
		s.writesGoOn(s.Members...)
	}
	s.finish()
}

// moment is how long a fault lasts: from less than a heartbeat to more than a kept lease.
func (s *stage) moment() time.Duration {
	longest := []int{50, 500, 3000, (keptTTL + 2) * 1000}
	return time.Duration(1+s.random.IntN(longest[s.random.IntN(len(longest))])) * time.Millisecond
}

// goesOn wants writes through those who are together to go on if they are a majority, and lets time pass.
func (s *stage) goesOn(together ...*cluster.Member) {
	s.Helper()
	if len(together) > len(s.Members)/2 && s.random.IntN(2) == 0 {
		s.writesGoOn(together...)
	}
	s.during(s.moment())
}

func (s *stage) randomSplit() {
	left := s.draw(1+s.random.IntN(len(s.Members)-1), s.Members)
	right := s.Others(left...)
	s.note("split %s from %s", names(left), names(right))
	s.Split(left, right)
	if len(left) < len(right) {
		left = right
	}
	s.goesOn(left...)
}

// randomCuts cuts lines one way.
func (s *stage) randomCuts() {
	var lines string
	for _, from := range s.Members {
		for _, to := range s.Others(from) {
			if s.random.IntN(3) == 0 {
				s.Set(from, to, cut)
				lines += " " + from.Name + "→" + to.Name
			}
		}
	}
	s.note("cut%s", lines)
	s.during(s.moment())
}

func (s *stage) randomWeather() {
	l := network.Line{
		Loss:   s.random.Float64() * 0.2,
		Delay:  time.Duration(s.random.IntN(50)) * time.Millisecond,
		Jitter: time.Duration(s.random.IntN(50)) * time.Millisecond,
	}
	s.note("every line is %+v", l)
	s.SetAll(l)
	s.during(s.moment())
}

func (s *stage) randomKills() {
	killed := s.draw(1+s.random.IntN(len(s.Members)), s.Members)
	s.note("kill %s", names(killed))
	for _, m := range killed {
		s.must(m.Kill())
	}
	s.goesOn(s.Others(killed...)...)
}

func (s *stage) randomPauses() {
	paused := s.draw(1+s.random.IntN(len(s.Members)), s.Members)
	s.note("stop %s", names(paused))
	s.paused = true
	for _, m := range paused {
		s.must(m.Pause())
	}
	s.goesOn(s.Others(paused...)...)
}

func (s *stage) randomCrash() {
	crashed := s.draw(1, s.Members)
	s.note("%s is gone without a word", names(crashed))
	s.must(crashed[0].Crash())
	s.goesOn(s.Others(crashed...)...)
}

func (s *stage) randomMove() {
	s.move()
	s.goesOn(s.Members...)
}

func (s *stage) randomReplacement() {
	s.replace(slices.Clone(s.draw(1, s.Members))[0], s.random.IntN(2) == 0)
}

func (s *stage) randomRestart() {
	ended := s.draw(1+s.random.IntN(len(s.Members)/2), s.Members)
	s.note("terminate %s", names(ended))
	for _, m := range ended {
		s.must(m.Terminate(patience))
	}
	s.goesOn(s.Others(ended...)...)
}

// randomLoss has a member lose its disk, or get an old copy of it back.
func (s *stage) randomLoss() {
	m := s.draw(1, s.Members)[0]
	s.must(m.Kill())
	if s.random.IntN(2) == 0 {
		s.note("%s loses its disk", m.Name)
		s.writesGoOn(s.Others(m)...)
		s.must(m.Wipe())
		m.Rejoins()
		return
	}
	copied := fmt.Sprintf("copy-%d", s.record.now())
	s.must(m.Copy(copied))
	s.must(m.Start())
	s.ready(m)
	s.during(s.moment())
	s.note("%s gets an old copy of its disk", m.Name)
	s.must(m.Kill())
	s.writesGoOn(s.Others(m)...)
	s.must(m.Restore(copied))
}
