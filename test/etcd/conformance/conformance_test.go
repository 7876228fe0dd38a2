package conformance

import (
	"testing"

	"github.com/quire-db/quire/test/etcd/start"
)

func TestEtcd(t *testing.T)  { Exercise(t, start.Etcd) }
func TestQuire(t *testing.T) { Exercise(t, start.Quire) }
