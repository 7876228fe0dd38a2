package start

import (
	"context"
	"os"
	"os/exec"
	"sync"
	"testing"

	"github.com/quire-db/quire/test/ports"
	"github.com/quire-db/quire/test/postgres"
)

// OnPostgres says whether the quires under test keep their data in Postgres ($QUIRE_STORAGE is "postgres") and not in
// a file ("sqlite" or nothing).
func OnPostgres(t testing.TB) bool {
	t.Helper()
	return storage(t) == "postgres"
}

// OnRaft says whether the quires under test are members of a cluster ($QUIRE_STORAGE is "sqlraft").
func OnRaft(t testing.TB) bool {
	t.Helper()
	return storage(t) == "sqlraft"
}

func storage(t testing.TB) string {
	t.Helper()
	s := os.Getenv("QUIRE_STORAGE")
	switch s {
	case "", "sqlite", "postgres", "sqlraft":
	default:
		t.Fatalf("QUIRE_STORAGE is %q; it may be sqlite, postgres or sqlraft", s)
	}
	return s
}

// StorageFlags are the flags of a quire that has its data where the tests want it: none for a file, which lies in
// dataDir; for a cluster those of its only member; and on Postgres a database that belongs to dataDir. Whoever starts on the same dataDir again, or
// a second time beside the first, gets the same database. When the test ends it must be sound (quire check), and is dropped.
func StorageFlags(t testing.TB, dataDir string) []string {
	t.Helper()
	switch storage(t) {
	case "postgres":
	case "sqlraft":
		return memberFlags("default", ports.FreeAddress(t), "")
	default:
		return nil
	}
	return []string{"--storage=" + server(t).DSN(database(t, dataDir), postgres.Superuser)}
}

// Query returns the first column of what a person reads in the Postgres database that belongs to dataDir.
func Query(t testing.TB, dataDir, query string) (column []string) {
	t.Helper()
	s := server(t)
	dsn := s.DSN(database(t, dataDir), postgres.Superuser, "options=-csearch_path=quire")
	rows, err := s.QueryAt(context.Background(), dsn, query)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rows {
		column = append(column, r[0])
	}
	return column
}

// startServer starts the one Postgres server of this test process; it ends with the process. Many quires use it at
// once, with up to eight connections each. As with etcd, nothing is synced: the machine does not crash here.
var startServer = sync.OnceValues(func() (*postgres.Server, error) {
	return postgres.Start(context.Background(), postgres.Options{
		NoFsync:  true,
		Settings: map[string]string{"max_connections": "400"},
	})
})

func server(t testing.TB) *postgres.Server {
	t.Helper()
	s, err := startServer()
	if err != nil {
		t.Fatalf("QUIRE_STORAGE=postgres: %v", err)
	}
	return s
}

// databases are the names of those that exist, by the data directory that they stand for.
var databases struct {
	sync.Mutex
	of map[string]string
}

func database(t testing.TB, dataDir string) string {
	t.Helper()
	databases.Lock()
	defer databases.Unlock()
	if name, ok := databases.of[dataDir]; ok {
		return name
	}
	name := postgres.Database(t, server(t))
	if databases.of == nil {
		databases.of = make(map[string]string)
	}
	databases.of[dataDir] = name
	t.Cleanup(func() {
		databases.Lock()
		delete(databases.of, dataDir)
		databases.Unlock()
		// The quires have ended: they were started, and so are stopped, in reverse.
		storage := "--storage=" + server(t).DSN(name, postgres.Superuser)
		if output, err := exec.Command(Binary(t), "check", storage).CombinedOutput(); err != nil {
			t.Errorf("quire check %s: %v\n%s", storage, err, output)
		}
	})
	return name
}
