package conformance

import (
	"testing"

	"github.com/quire-db/quire/test/etcd/start"
)

func TestEtcd(t *testing.T)  { Exercise(t, start.Etcd) }
func TestQuire(t *testing.T) { Exercise(t, start.Quire) }

// TestSeveralQuires spreads the calls of each case over two processes on one database, or over the three members of a
// cluster: nobody is to notice.
func TestSeveralQuires(t *testing.T) {
	switch {
	case start.OnPostgres(t):
		Exercise(t, start.Several(2))
	case start.OnRaft(t):
		Exercise(t, start.Several(3))
	default:
		t.Skip("several quires with the same data need QUIRE_STORAGE=postgres or sqlraft")
	}
}
