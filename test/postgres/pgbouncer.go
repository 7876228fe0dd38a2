package postgres

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/quire-db/quire/test/ports"
)

// PgBouncer is a connection pooler in front of a server: each transaction of a client may run on another connection.
type PgBouncer struct {
	Address string // host:port for the clients, who need neither TLS nor password

	dir     string
	process *process
}

// PgBouncerOptions say what a pooler is like. The zero value is transaction pooling in front of the server itself.
type PgBouncerOptions struct {
	// Upstream is the address that it connects to; a Proxy's, for example. "" is the server's own socket.
	Upstream string
	// Settings are further lines of pgbouncer.ini, such as "default_pool_size": "2".
	Settings map[string]string
}

// StartPgBouncer starts Debian's pgbouncer in front of a server.
func StartPgBouncer(ctx context.Context, s *Server, o PgBouncerOptions) (*PgBouncer, error) {
	program, err := findPgBouncer()
	if err != nil {
		return nil, err
	}
	dir, err := s.workspace.newDir("pgbouncer")
	if err != nil {
		return nil, err
	}
	b := &PgBouncer{dir: dir}
	for attempt := 1; ; attempt++ {
		port, err := ports.Free()
		if err == nil {
			err = b.start(ctx, program, s, o, port)
		}
		// Somebody else may take the port between our look and pgbouncer's: then it tries another.
		if err == nil {
			return b, nil
		}
		if attempt == 5 || !errors.Is(err, errEnded) {
			return nil, errors.Join(fmt.Errorf("a PgBouncer for tests: %w", err), b.Stop())
		}
	}
}

func findPgBouncer() (string, error) {
	if found, err := exec.LookPath("pgbouncer"); err == nil {
		return found, nil
	}
	// Not in the PATH of everybody.
	const debian = "/usr/sbin/pgbouncer"
	if _, err := os.Stat(debian); err != nil {
		return "", fmt.Errorf("pgbouncer: %w", ErrNotInstalled)
	}
	return debian, nil
}

func (b *PgBouncer) start(ctx context.Context, program string, s *Server, o PgBouncerOptions, port int) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	b.Address = ports.Loopback(port)
	account := s.workspace.account
	settings := map[string]string{
		"listen_addr":     "127.0.0.1",
		"listen_port":     strconv.Itoa(port),
		"unix_socket_dir": "", // none
		"pool_mode":       "transaction",
		"auth_type":       "trust",
		// Whom the file does not name it looks up in the server.
		"auth_file":   filepath.Join(b.dir, "users"),
		"auth_user":   Superuser,
		"admin_users": Superuser,
	}
	maps.Copy(settings, o.Settings)
	host, hostPort := s.dir, strconv.Itoa(s.port)
	if o.Upstream != "" {
		var err error
		if host, hostPort, err = net.SplitHostPort(o.Upstream); err != nil {
			return err
		}
	}
	var text strings.Builder
	fmt.Fprintf(&text, "[databases]\n* = host=%s port=%s\n[pgbouncer]\n", host, hostPort)
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		fmt.Fprintf(&text, "%s = %s\n", name, settings[name])
	}
	ini := filepath.Join(b.dir, "pgbouncer.ini")
	err := errors.Join(account.write(ini, text.String()), account.write(settings["auth_file"], `"`+Superuser+`" ""`+"\n"))
	if err != nil {
		return err
	}
	if b.process, err = startProcess(account.command(b.dir, program, ini), filepath.Join(b.dir, "log")); err != nil {
		return err
	}
	return b.process.await(ctx, func() (bool, error) {
		return strings.Contains(b.LogTail(4000), "listening on "+b.Address), nil
	})
}

// DSN is the URL with which a client connects through the pooler. Parameters are as in Server.DSN.
func (b *PgBouncer) DSN(database, user string, parameters ...string) string {
	return dsn(b.Address, database, user, append([]string{"sslmode=disable"}, parameters...))
}

// LogTail returns up to n bytes from the end of the pooler's log.
func (b *PgBouncer) LogTail(n int64) string { return logTail(filepath.Join(b.dir, "log"), n) }

// Stop ends the pooler at once and removes its files.
func (b *PgBouncer) Stop() error {
	var err error
	if b.process != nil {
		err = b.process.stop(syscall.SIGTERM, stopLimit)
		if errors.Is(err, errStillRunning) {
			err = errors.Join(err, b.process.kill())
		}
	}
	return errors.Join(err, os.RemoveAll(b.dir))
}
