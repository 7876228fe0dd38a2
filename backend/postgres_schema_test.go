package backend

import (
	"errors"
	"strings"
	"sync"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/test/postgres"
)

// "Ten processes starting at once on an empty database all come up."
func TestPostgresTenOpenAnEmptyDatabaseAtOnce(t *testing.T) {
	o := pgTestOptions(t)
	var all sync.WaitGroup
	dbs := make([]*DB, 10)
	for i := range dbs {
		all.Go(func() {
			db, err := OpenPostgres(t.Context(), o, Options{})
			if err != nil {
				t.Error(err)
				return
			}
			dbs[i] = db
		})
	}
	all.Wait()
	for i, db := range dbs {
		if db == nil {
			continue
		}
		if rev := mustPut(t, db, "k", "v"); rev != int64(i+2) {
			t.Errorf("process %d made revision %d", i, rev)
		}
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	}
}

// What a newer quire leaves in the database: its schema version, and who may write beside it.
func setNewerSchema(t *testing.T, database string, writers int) {
	t.Helper()
	sql := "INSERT INTO quire.schema_version (version_id, is_applied) VALUES (99, true)"
	if err := postgres.Shared(t).Exec(t.Context(), database, sql); err != nil {
		t.Fatal(err)
	}
	if writers > 1 {
		if err := postgres.Shared(t).Exec(t.Context(), database, "UPDATE quire.meta SET value = 99 WHERE name = 'writer_schema'"); err != nil {
			t.Fatal(err)
		}
	}
}

// "During a rolling upgrade old and new processes run together or the old ones step back with a clear message,
// whichever the migration file declares."
func TestPostgresOlderProcessBesideANewerSchema(t *testing.T) {
	s := postgres.Shared(t)
	for _, writers := range []int{1, 99} {
		name := postgres.Database(t, s)
		o := PostgresOptions{URL: s.DSN(name, "postgres")}
		db := openPostgresTest(t, o, Options{})
		mustPut(t, db, "k", "before")
		setNewerSchema(t, name, writers)
		_, err := db.Write(t.Context(), Command{Request: &pb.PutRequest{Key: []byte("k"), Value: []byte("after")}})
		second, openErr := OpenPostgres(t.Context(), o, Options{})
		if writers == 1 {
			if err != nil || openErr != nil {
				t.Fatalf("an older process may write, but: %v, %v", err, openErr)
			}
			if err := second.Close(); err != nil {
				t.Error(err)
			}
			continue
		}
		for what, err := range map[string]error{"a running process writes": err, "a process starts": openErr} {
			if !errors.Is(err, ErrNewerSchema) || !strings.Contains(err.Error(), "start the newer quire") {
				t.Errorf("%s: %v, want ErrNewerSchema and what to do", what, err)
			}
		}
		if err := db.Linearizable(t.Context()); !errors.Is(err, ErrNewerSchema) {
			t.Errorf("it goes on reading: %v", err)
		}
		if got, err := s.Query(t.Context(), name, "SELECT count(*) FROM quire.revisions"); err != nil || got[0][0] != "1" {
			t.Errorf("rows %v, %v: the refused write is there", got, err)
		}
	}
}

// The settings of the role or the database must not make an acknowledged write less durable.
func TestPostgresCommitsSynchronouslyWhateverTheDefault(t *testing.T) {
	s := postgres.Shared(t)
	for _, c := range []struct{ set, want string }{{"off", "on"}, {"local", "on"}, {"remote_apply", "remote_apply"}} {
		name := postgres.Database(t, s)
		if err := s.Exec(t.Context(), name, "ALTER DATABASE "+quoteName(name)+" SET synchronous_commit = "+c.set); err != nil {
			t.Fatal(err)
		}
		db := openPostgresTest(t, PostgresOptions{URL: s.DSN(name, "postgres")}, Options{})
		// What holds when a transaction commits is what a deferred trigger sees.
		if err := s.Exec(t.Context(), name,
			"CREATE TABLE seen (setting text)",
			"CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.seen VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$",
			"CREATE CONSTRAINT TRIGGER see AFTER INSERT ON quire.commits DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION see()"); err != nil {
			t.Fatal(err)
		}
		mustPut(t, db, "k", "v")
		got, err := s.Query(t.Context(), name, "SELECT setting FROM seen")
		if err != nil || len(got) != 1 || got[0][0] != c.want {
			t.Errorf("default %s: committed with %v (%v), want %s", c.set, got, err, c.want)
		}
	}
}
