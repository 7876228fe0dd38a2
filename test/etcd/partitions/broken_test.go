//go:build linux

package partitions

import (
	"strings"
	"testing"
	"time"
)

// A cluster whose linearizable reads are not: every client asks its own member alone. The checks have to notice.
func TestStaleReadsAreFound(t *testing.T) {
	s := begin(t, setup{weak: true, pause: 15 * time.Millisecond})
	follower := s.follower()
	s.note("cut %s, which follows, off", follower.Name)
	s.Split(group(follower), s.Others(follower))
	s.writesGoOn(s.Others(follower)...)
	s.during(fault)
	s.heal()
	history, last := s.settle()
	wrong := strings.Join(account(s.record.operations(), history, last), "\n")
	if !strings.Contains(wrong, "broke linearizability: answered at revision") {
		t.Errorf("the accountant does not find stale reads; it complains of %q", wrong)
	}
	if err := linear(s.record.operations(), history, time.Minute, ""); err == nil {
		t.Error("porcupine does not find stale reads")
	}
}
