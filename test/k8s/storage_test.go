package k8s

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/quire-db/quire/test/postgres"
)

// onlyMember is the storage of a quire that is the only member of a cluster:
// it has etcd's flags and no --storage.
const onlyMember = "sqlraft"

// storageOfTest is the --storage that $QUIRE_STORAGE asks for: none, which is
// the data directory, for "" and "sqlite"; onlyMember for "sqlraft"; an empty
// database of a server of this test's own for "postgres".
func storageOfTest(t *testing.T) string {
	t.Helper()
	switch storage := os.Getenv("QUIRE_STORAGE"); storage {
	case "", "sqlite":
		return ""
	case onlyMember:
		return onlyMember
	case "postgres":
	default:
		t.Fatalf("QUIRE_STORAGE is %q; it may be sqlite, sqlraft or postgres", storage)
	}
	if filepath.Base(binary(t, "QUIRE_TEST_SERVER", "bin/quire")) == "etcd" {
		t.Fatal("QUIRE_STORAGE=postgres is for quire; QUIRE_TEST_SERVER names an etcd")
	}
	// Nothing is synced: the processes of this test are killed, the machine is not.
	server, err := postgres.Start(t.Context(), postgres.Options{NoFsync: true})
	if err != nil {
		t.Fatalf("QUIRE_STORAGE=postgres: %v", err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Errorf("stopping PostgreSQL: %v", err)
		}
	})
	return server.DSN(postgres.Database(t, server), postgres.Superuser)
}
