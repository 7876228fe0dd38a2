package conformance

import (
	"testing"

	"github.com/quire-db/quire/test/etcd/start"
)

func TestEtcd(t *testing.T)  { Exercise(t, start.Etcd) }
func TestQuire(t *testing.T) { Exercise(t, start.Quire) }

// TestSeveralQuires spreads the calls of each case over two processes on one database: nobody is to notice.
func TestSeveralQuires(t *testing.T) {
	if !start.OnPostgres(t) {
		t.Skip("several quires on one store need QUIRE_STORAGE=postgres")
	}
	Exercise(t, start.Several(2))
}
