package postgres

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/quire-db/quire/test/ports"
)

// Superuser is the role that owns a test server. On the server's own socket it needs no password.
const Superuser = "postgres"

// Limits on how long a server may take.
const (
	startLimit    = 60 * time.Second
	fastStopLimit = 10 * time.Second
	stopLimit     = 30 * time.Second
)

// Options say what a server is like. The zero value is PostgreSQL's defaults, reached without TLS.
type Options struct {
	// Dir is where the server's files go; it must be open to all users. "" is the directory for temporary files.
	// Who measures commits names a directory on a real disk.
	Dir string
	// Settings are further lines of postgresql.conf, such as "max_connections": "20".
	Settings map[string]string
	// NoFsync loses commits when the machine (not when the server) crashes. For tests of what is computed, not kept.
	NoFsync bool
	// TLS says how clients get in over TCP.
	TLS TLSMode
	// DiskBytes puts the data directory on a file system of its own of that size, in memory, so that it can be
	// filled (FillDisk). An empty server takes 40 MB. Needs root: see ErrCannotMount. 0 is no limit.
	DiskBytes int64
}

// Server is one PostgreSQL server, the primary or a standby.
type Server struct {
	// Address is host:port of the TCP listener; it stays the same over restarts.
	Address string
	// Authority signed the server's certificate; nil without TLS.
	Authority *Authority

	installation installation
	workspace    *workspace
	dir          string // data/, log and the socket are in it
	port         int
	tls          TLSMode
	limited      bool              // data is a mount of its own
	standbys     int               // made from this server so far
	settings     map[string]string // postgresql.conf
	databases    struct {
		sync.Mutex
		made int
	}

	process *process // the last one; it may have ended
}

// Start starts a server with an empty database cluster and returns when it accepts connections. The context
// limits the start only.
func Start(ctx context.Context, o Options) (*Server, error) {
	s, err := newServer(o)
	if err != nil {
		return nil, fmt.Errorf("a PostgreSQL server for tests: %w", err)
	}
	if err := s.create(ctx, o); err != nil {
		return nil, errors.Join(fmt.Errorf("a PostgreSQL server for tests: %w", err), s.Stop())
	}
	return s, nil
}

// newServer makes the directory of a server that has no data yet.
func newServer(o Options) (*Server, error) {
	i, err := findInstallation()
	if err != nil {
		return nil, err
	}
	w, err := openWorkspace(o.Dir)
	if err != nil {
		return nil, err
	}
	s := &Server{installation: i, workspace: w, tls: o.TLS, limited: o.DiskBytes > 0, settings: maps.Clone(o.Settings)}
	if s.settings == nil {
		s.settings = map[string]string{}
	}
	if s.dir, err = w.newDir("server"); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *Server) create(ctx context.Context, o Options) error {
	if err := s.workspace.account.mkdir(s.dataDir(), 0o700); err != nil {
		return err
	}
	if s.limited {
		if err := s.mountData(o.DiskBytes); err != nil {
			return err
		}
	}
	if err := s.workspace.copyTemplate(s.installation, s.dataDir()); err != nil {
		return err
	}
	if o.NoFsync {
		s.settings["fsync"] = "off"
	}
	if o.TLS != NoTLS {
		authority, err := s.workspace.newAuthority()
		if err != nil {
			return err
		}
		s.Authority = authority
	}
	return s.startOnFreePort(ctx)
}

// startOnFreePort writes the configuration and starts. Somebody else may take the port between our look and the
// server's: then it tries another.
func (s *Server) startOnFreePort(ctx context.Context) error {
	for attempt := 1; ; attempt++ {
		port, err := ports.Free()
		if err != nil {
			return err
		}
		s.port, s.Address = port, ports.Loopback(port)
		if err := s.configure(); err != nil {
			return err
		}
		err = s.launch(ctx)
		if err == nil || attempt == 5 || !strings.Contains(err.Error(), "could not create any TCP/IP sockets") {
			return err
		}
	}
}

func (s *Server) dataDir() string { return filepath.Join(s.dir, "data") }
func (s *Server) logFile() string { return filepath.Join(s.dir, "log") }

// socketName is the file name length that a socket has behind the directory's.
const socketName = len("/.s.PGSQL.12345")

// configure writes the configuration files anew.
func (s *Server) configure() error {
	if length := len(s.dir) + socketName; length > 107 {
		return fmt.Errorf("the socket in %s would have a name of %d bytes, more than the 107 that are possible: set TMPDIR, or the directory in the options, to a shorter one", s.dir, length)
	}
	s.settings["listen_addresses"] = "127.0.0.1"
	s.settings["port"] = strconv.Itoa(s.port)
	s.settings["unix_socket_directories"] = s.dir
	s.settings["log_line_prefix"] = "%m [%p] %q%u@%d "
	if s.Authority != nil {
		certificate, key, err := s.Authority.serverCertificate(s.dir, s.workspace.account)
		if err != nil {
			return err
		}
		s.settings["ssl"] = "on"
		s.settings["ssl_ca_file"] = s.Authority.File
		s.settings["ssl_cert_file"] = certificate
		s.settings["ssl_key_file"] = key
	}
	if err := s.writeSettings(); err != nil {
		return err
	}
	return s.workspace.account.write(filepath.Join(s.dataDir(), "pg_hba.conf"), s.tls.clientAuthentication())
}

func (s *Server) writeSettings() error {
	var text strings.Builder
	for _, name := range slices.Sorted(maps.Keys(s.settings)) {
		fmt.Fprintf(&text, "%s = '%s'\n", name, strings.NewReplacer(`'`, `''`, `\`, `\\`).Replace(s.settings[name]))
	}
	return s.workspace.account.write(filepath.Join(s.dataDir(), "postgresql.conf"), text.String())
}

// launch starts the server program and waits until it accepts connections.
func (s *Server) launch(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	data := s.dataDir()
	p, err := startProcess(s.workspace.account.command(data, s.installation.program("postgres"), "-D", data), s.logFile())
	if err != nil {
		return err
	}
	s.process = p
	return p.await(ctx, func() (bool, error) { return s.ready() })
}

// ready reads what the postmaster writes into postmaster.pid, as pg_ctl does: the first line is the process, the
// eighth "ready" once it accepts connections (a hot standby's too). The file of a server that crashed is older
// than the process.
func (s *Server) ready() (bool, error) {
	text, err := os.ReadFile(filepath.Join(s.dataDir(), "postmaster.pid"))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	lines := strings.Split(string(text), "\n")
	return len(lines) >= 8 && lines[0] == strconv.Itoa(s.process.cmd.Process.Pid) && strings.TrimSpace(lines[7]) == "ready", nil
}

// Running says whether the server's main process is there. It may be frozen, or not accept connections yet.
func (s *Server) Running() bool { return s.process != nil && !s.process.ended() }

// StopImmediate stops the server at once, as `pg_ctl stop -m immediate` does: connections break, nothing is written
// out, and the next start recovers from the log. What was committed is there then, what was not is gone.
func (s *Server) StopImmediate() error {
	err := s.end(syscall.SIGQUIT, stopLimit)
	if errors.Is(err, errStillRunning) {
		err = errors.Join(err, s.process.kill())
	}
	return err
}

// StopFast stops the server as `pg_ctl stop -m fast` does: transactions are rolled back, everything is written out.
// One that takes long is stopped as StopImmediate does: PostgreSQL 15, asked while it recovers from a crash of one
// of its processes, never ends by itself.
func (s *Server) StopFast() error {
	err := s.end(syscall.SIGINT, fastStopLimit)
	if errors.Is(err, errStillRunning) {
		return s.StopImmediate()
	}
	return err
}

// end thaws a server, asks it to end, and waits.
func (s *Server) end(signal syscall.Signal, limit time.Duration) error {
	if !s.Running() {
		return nil
	}
	if err := s.Signal(syscall.SIGCONT); err != nil {
		return err
	}
	return s.process.stop(signal, limit)
}

// Restart starts the server again on the same address and waits until it accepts connections; one that runs is
// stopped first (StopFast).
func (s *Server) Restart(ctx context.Context) error {
	if err := s.StopFast(); err != nil {
		return fmt.Errorf("restarting PostgreSQL: %w", err)
	}
	if err := s.launch(ctx); err != nil {
		return fmt.Errorf("restarting PostgreSQL: %w", err)
	}
	return nil
}

// Stop ends the server and removes its files.
func (s *Server) Stop() error {
	err := s.StopImmediate()
	if s.limited {
		err = errors.Join(err, s.unmountData())
	}
	return errors.Join(err, os.RemoveAll(s.dir))
}

// Set changes a setting of postgresql.conf and waits until new connections have it; others follow within
// milliseconds. A setting that needs a restart takes effect with the next Restart.
func (s *Server) Set(ctx context.Context, name, value string) error {
	before, err := s.one(ctx, "SELECT pg_conf_load_time()")
	if err != nil {
		return err
	}
	s.settings[name] = value
	if err := s.writeSettings(); err != nil {
		return err
	}
	if err := s.process.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		return fmt.Errorf("telling PostgreSQL of its new settings: %w", err)
	}
	return s.WaitFor(ctx, Superuser, "SELECT pg_conf_load_time() > '"+before+"'")
}

// LogTail returns up to n bytes from the end of the server's log.
func (s *Server) LogTail(n int64) string { return logTail(s.logFile(), n) }
