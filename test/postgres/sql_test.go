package postgres

import (
	"context"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestEveryTestHasADatabaseOfItsOwn(t *testing.T) {
	t.Parallel()
	s := Shared(t)
	a, b := Database(t, s), Database(t, s)
	if a == b {
		t.Fatalf("two databases are both called %s", a)
	}
	ctx := t.Context()
	if err := s.Exec(ctx, a, "CREATE TABLE t (k text, v text)", `INSERT INTO t VALUES ('a"b', NULL), (E'c\nd', ',')`); err != nil {
		t.Fatal(err)
	}
	rows, err := s.QueryAt(ctx, s.DSN(a, Superuser, "application_name=me & you"), "SELECT k, v, current_setting('application_name') FROM t ORDER BY k")
	if err != nil {
		t.Fatal(err)
	}
	if want := [][]string{{`a"b`, "", "me & you"}, {"c\nd", ",", "me & you"}}; !reflect.DeepEqual(rows, want) {
		t.Errorf("over the DSN: %q, want %q", rows, want)
	}
	if err := s.Exec(ctx, b, "SELECT * FROM t"); err == nil || !strings.Contains(err.Error(), `relation "t" does not exist`) {
		t.Errorf("the table of one database in the other: %v", err)
	}
}

func TestARoleOwnsOnlyItsSchema(t *testing.T) {
	t.Parallel()
	s := Shared(t)
	database := Database(t, s)
	ctx := t.Context()
	if err := s.CreateRole(ctx, Role{Name: "quire role", Database: database, Schema: "quire's"}); err != nil {
		t.Fatal(err)
	}
	// Its objects go with the database, which is dropped later.
	t.Cleanup(func() {
		if err := s.Exec(context.Background(), database, `DROP OWNED BY "quire role"`, `DROP ROLE "quire role"`); err != nil {
			t.Error(err)
		}
	})
	dsn := s.DSN(database, "quire role")
	if _, err := s.QueryAt(ctx, dsn, `CREATE TABLE "quire's".t (); CREATE FUNCTION "quire's".f() RETURNS int LANGUAGE sql AS 'SELECT 1'`); err != nil {
		t.Errorf("in its own schema: %v", err)
	}
	for _, forbidden := range []string{
		"CREATE TABLE public.t ()", "CREATE SCHEMA other", "CREATE TEMPORARY TABLE t ()", "CREATE DATABASE other", "CREATE ROLE other",
	} {
		if _, err := s.QueryAt(ctx, dsn, forbidden); err == nil || !strings.Contains(err.Error(), "permission denied") {
			t.Errorf("%s: %v, want permission denied", forbidden, err)
		}
	}
	if _, err := s.QueryAt(ctx, s.DSN(Database(t, s), "quire role"), "CREATE TABLE public.t ()"); err == nil {
		t.Error("it created a table in somebody else's database")
	}
}

func TestTerminatedBackends(t *testing.T) {
	t.Parallel()
	s := Shared(t)
	database := Database(t, s)
	spared := openSession(t, s, s.DSN(database, Superuser, "application_name=spared"))
	victim := openSession(t, s, s.DSN(database, Superuser, "application_name=victim"))
	count, err := s.TerminateBackends(t.Context(), "datname = '"+database+"' AND application_name = 'victim'")
	if err != nil || count != 1 {
		t.Errorf("terminated %d backends, %v, want 1", count, err)
	}
	victim.send("SELECT 1")
	if said := victim.mustBreak(); !strings.Contains(said, "terminating connection due to administrator command") {
		t.Errorf("the victim hears %q", said)
	}
	if got := spared.ask("SELECT 1"); got != "1" {
		t.Errorf("the other session answers %q", got)
	}
}

func TestAFrozenServerAnswersWhenItThaws(t *testing.T) {
	t.Parallel()
	s := New(t, Options{NoFsync: true})
	c := openSession(t, s, s.DSN(Superuser, Superuser))
	if err := s.Pause(); err != nil {
		t.Fatal(err)
	}
	c.send("SELECT 'late'")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := s.Exec(ctx, Superuser, "SELECT 1"); err == nil || !strings.Contains(err.Error(), context.DeadlineExceeded.Error()) {
		t.Errorf("a new client of a frozen server: %v, want no answer", err)
	}
	if got := c.answer(time.Millisecond); got != "" {
		t.Errorf("a frozen server answered %q", got)
	}
	if err := s.Resume(); err != nil {
		t.Fatal(err)
	}
	if got := c.answer(20 * time.Second); got != "late" {
		t.Errorf("after the thaw the answer is %q, want late", got)
	}
	if err := s.WaitReady(t.Context()); err != nil {
		t.Error(err)
	}
	// A frozen server can be stopped.
	if err := s.Pause(); err != nil {
		t.Fatal(err)
	}
	if err := s.StopImmediate(); err != nil {
		t.Error(err)
	}
}

func TestAFullServerStillAnswersTheSuperuser(t *testing.T) {
	t.Parallel()
	s := New(t, Options{NoFsync: true, Settings: map[string]string{"max_connections": "5", "superuser_reserved_connections": "3"}})
	exec1(t, s, "CREATE ROLE client LOGIN")
	for range 2 {
		openSession(t, s, s.DSN(Superuser, "client"))
	}
	if _, err := s.QueryAt(t.Context(), s.DSN(Superuser, "client"), "SELECT 1"); err == nil || !strings.Contains(err.Error(), "remaining connection slots are reserved") {
		t.Errorf("the third client of a server with room for two: %v", err)
	}
	if count, err := s.TerminateBackends(t.Context(), "usename = 'client'"); err != nil || count != 2 {
		t.Errorf("the superuser terminated %d, %v, want 2", count, err)
	}
}
