package postgres

import (
	"context"
	"errors"
	"sync"
	"testing"
)

// New starts a server that is stopped when the test ends. The test is skipped where there is nothing to start.
func New(t testing.TB, o Options) *Server {
	t.Helper()
	s, err := Start(t.Context(), o)
	if err != nil {
		skipOrFail(t, err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of PostgreSQL's log:\n%s", s.LogTail(4000))
		}
		if err := s.Stop(); err != nil {
			t.Errorf("stop PostgreSQL: %v", err)
		}
	})
	return s
}

var startShared = sync.OnceValues(func() (*Server, error) { return Start(context.Background(), Options{}) })

// Shared is one server for all tests of this process, which must leave it as it is; it ends with the process.
// Each test takes a database of its own: see Database.
func Shared(t testing.TB) *Server {
	t.Helper()
	s, err := startShared()
	if err != nil {
		skipOrFail(t, err)
	}
	return s
}

// skipOrFail ends a test that has no server.
func skipOrFail(t testing.TB, err error) {
	t.Helper()
	if errors.Is(err, ErrNotInstalled) || errors.Is(err, ErrCannotMount) {
		t.Skip(err)
	}
	t.Fatal(err)
}

// Database creates an empty database that is dropped when the test ends, and returns its name.
func Database(t testing.TB, s *Server) string {
	t.Helper()
	name, err := s.NewDatabase(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if !s.Running() {
			return
		}
		// t.Context() has ended by now.
		if err := s.DropDatabase(context.Background(), name); err != nil {
			t.Errorf("drop a test's database: %v", err)
		}
	})
	return name
}
