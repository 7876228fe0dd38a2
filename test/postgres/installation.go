package postgres

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// ErrNotInstalled is what Start and StartPgBouncer return where the program is missing. Tests skip then.
var ErrNotInstalled = errors.New("not installed: run `make need-postgres`")

// oldestMajor is the oldest PostgreSQL that quire is tested with.
const oldestMajor = 15

// installation is a PostgreSQL on this machine.
type installation struct {
	bin   string // the directory of postgres, initdb, pg_basebackup and psql
	major int
}

var findInstallation = sync.OnceValues(func() (installation, error) {
	if runtime.GOOS != "linux" {
		return installation{}, fmt.Errorf("test servers need Linux, whose /proc and mounts they use: %w", ErrNotInstalled)
	}
	var candidates []string
	// Debian keeps each version in a directory of its own, outside PATH; so does Red Hat's packager.
	for _, pattern := range []string{"/usr/lib/postgresql/*/bin/postgres", "/usr/pgsql-*/bin/postgres"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return installation{}, err
		}
		candidates = append(candidates, found...)
	}
	if found, err := exec.LookPath("postgres"); err == nil {
		candidates = append(candidates, found)
	}
	newest := installation{}
	for _, postgres := range candidates {
		major, err := majorVersion(postgres)
		if err != nil {
			return installation{}, err
		}
		if major > newest.major {
			newest = installation{bin: filepath.Dir(postgres), major: major}
		}
	}
	if newest.major < oldestMajor {
		return installation{}, fmt.Errorf("PostgreSQL >= %d (newest found: %d of %q): %w",
			oldestMajor, newest.major, candidates, ErrNotInstalled)
	}
	return newest, nil
})

var versionPattern = regexp.MustCompile(`^postgres \(PostgreSQL\) (\d+)`)

func majorVersion(postgres string) (int, error) {
	output, err := exec.Command(postgres, "--version").Output()
	if err != nil {
		return 0, fmt.Errorf("asking %s for its version: %w", postgres, err)
	}
	match := versionPattern.FindSubmatch(output)
	if match == nil {
		return 0, fmt.Errorf("%s --version says %q, which names no version", postgres, output)
	}
	return strconv.Atoi(string(match[1]))
}

// program returns the path of one of PostgreSQL's own programs.
func (i installation) program(name string) string { return filepath.Join(i.bin, name) }

// account is the user that the servers run as.
type account struct {
	uid, gid int
	switched bool // we are root and the servers are somebody else
}

// serverAccount is ourselves, or the user postgres when we are root.
var serverAccount = sync.OnceValues(func() (account, error) {
	if os.Getuid() != 0 {
		return account{uid: os.Getuid(), gid: os.Getgid()}, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return account{}, fmt.Errorf("a server does not run as root, and the user postgres, which Debian's package makes, is missing: %w", err)
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return account{}, err
	}
	gid, err := strconv.Atoi(u.Gid)
	if err != nil {
		return account{}, err
	}
	return account{uid: uid, gid: gid, switched: true}, nil
})

// command makes a command that runs as the account, in dir, in a process group of its own: Ctrl-C in a terminal
// is for the test, which stops its servers in the right order.
func (a account) command(dir, program string, args ...string) *exec.Cmd {
	cmd := exec.Command(program, args...)
	cmd.Dir = dir
	cmd.Env = environment()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if a.switched {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(a.uid), Gid: uint32(a.gid)}
	}
	return cmd
}

// mkdir makes a directory that belongs to the account.
func (a account) mkdir(dir string, mode os.FileMode) error {
	if err := os.Mkdir(dir, mode); err != nil {
		return err
	}
	return a.own(dir)
}

// write writes a file that belongs to the account, in the place of one that is there.
func (a account) write(file, text string) error {
	beside := file + ".new"
	if err := os.WriteFile(beside, []byte(text), 0o600); err != nil {
		return err
	}
	if err := a.own(beside); err != nil {
		return err
	}
	return os.Rename(beside, file)
}

func (a account) own(file string) error {
	if !a.switched {
		return nil
	}
	return os.Chown(file, a.uid, a.gid)
}

// environment is ours without what would bend PostgreSQL's programs (PGHOST, PGOPTIONS, …), with messages in English.
func environment() []string {
	var kept []string
	for _, variable := range os.Environ() {
		if !strings.HasPrefix(variable, "PG") && !strings.HasPrefix(variable, "LC_") && !strings.HasPrefix(variable, "LANG") {
			kept = append(kept, variable)
		}
	}
	return append(kept, "LC_ALL=C")
}

// run runs a command to its end; an error holds what it printed.
func run(cmd *exec.Cmd) error {
	output, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, output)
	}
	return nil
}
