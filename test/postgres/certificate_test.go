package postgres

import (
	"strings"
	"testing"
)

func TestTLSIsDemanded(t *testing.T) {
	t.Parallel()
	s := New(t, Options{NoFsync: true, TLS: ServerTLS})
	rows, err := s.QueryAt(t.Context(), s.DSN(Superuser, Superuser), "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
	if err != nil || rows[0][0] != "t" {
		t.Errorf("the connection of the DSN speaks TLS: %q, %v", rows, err)
	}
	refused(t, s, s.DSN(Superuser, Superuser, "sslmode=disable"), "no encryption")
	stranger, err := NewAuthority(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	refused(t, s, s.DSN(Superuser, Superuser, "sslrootcert="+stranger.File), "certificate verify failed")
}

func TestClientCertificatesAreDemanded(t *testing.T) {
	t.Parallel()
	s := New(t, Options{NoFsync: true, TLS: ClientCertificates})
	exec1(t, s, "CREATE ROLE alice LOGIN", "CREATE ROLE bob LOGIN")
	alice, err := s.Authority.ClientParameters("alice")
	if err != nil {
		t.Fatal(err)
	}
	rows, err := s.QueryAt(t.Context(), s.DSN(Superuser, "alice", alice...), "SELECT client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
	if err != nil || rows[0][0] != "/CN=alice" {
		t.Errorf("with her certificate: %q, %v, want /CN=alice", rows, err)
	}
	refused(t, s, s.DSN(Superuser, "bob", alice...), "certificate authentication failed")
	refused(t, s, s.DSN(Superuser, "alice", "sslcert=/nonexistent"), "requires a valid client certificate")
	stranger, err := NewAuthority(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	forged, err := stranger.ClientParameters("alice")
	if err != nil {
		t.Fatal(err)
	}
	refused(t, s, s.DSN(Superuser, "alice", forged...), "unknown ca")
	// A standby has the same authority and a certificate of its own.
	standby := newStandby(t, s, false)
	if _, err := s.QueryAt(t.Context(), standby.DSN(Superuser, "alice", alice...), "SELECT 1"); err != nil {
		t.Errorf("with her certificate to the standby: %v", err)
	}
}

func refused(t *testing.T, s *Server, dsn, because string) {
	t.Helper()
	if _, err := s.QueryAt(t.Context(), dsn, "SELECT 1"); err == nil || !strings.Contains(err.Error(), because) {
		t.Errorf("%s: %v, want it refused: %s", dsn, err, because)
	}
}
