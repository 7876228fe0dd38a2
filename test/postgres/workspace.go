package postgres

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
)

// workspace is a directory with everything that the servers of this process keep below one base directory:
//
//	quire-postgres-123/
//	  template/         a fresh data directory, copied for each server
//	  server-1/         data/, log, the socket
//	  tls-2/            certificates
//	  pgbouncer-3/
//
// A guard, a small shell process, waits until this process has ended, however it ended; then it ends every process
// that works below the directory, unmounts what is mounted there and removes it. A signal on the parent's death
// (PR_SET_PDEATHSIG) would not do: it removes no files, and frozen backends would stay frozen for ever.
type workspace struct {
	dir     string
	account account
	guard   *os.File // closed by the kernel when this process ends; never by us

	mu struct {
		sync.Mutex
		template string // "" until the first server needs it
		made     int    // subdirectories so far
	}
}

var workspaces struct {
	sync.Mutex
	byBase map[string]*workspace
}

// guardScript runs with the workspace as its only argument. Servers are asked to stop first, because a server that
// is killed leaves a shared memory segment in the kernel (and a frozen one must wake up to hear it).
const guardScript = `
trap '' HUP INT TERM
cat >/dev/null
below() {
	for p in /proc/[0-9]*; do
		case $(readlink "$p/cwd" 2>/dev/null) in "$1"/*) echo "${p#/proc/}" ;; esac
	done
}
signal=QUIT
for round in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
	left=$(below "$1")
	test -n "$left" || break
	kill -"$signal" $left 2>/dev/null
	kill -CONT $left 2>/dev/null
	sleep 0.2
	test "$round" -lt 10 || signal=KILL
done
while read -r _ where _; do
	case $where in "$1"/*) umount -l "$where" ;; esac
done </proc/mounts
rm -rf "$1"
`

// openWorkspace returns the workspace below base ("" is the directory for temporary files), made on first use.
func openWorkspace(base string) (*workspace, error) {
	if base == "" {
		base = os.TempDir()
	}
	// The guard compares with /proc/pid/cwd, which has no symbolic links.
	base, err := filepath.Abs(base)
	if err != nil {
		return nil, err
	}
	if base, err = filepath.EvalSymlinks(base); err != nil {
		return nil, fmt.Errorf("the directory for test servers: %w", err)
	}
	workspaces.Lock()
	defer workspaces.Unlock()
	if w := workspaces.byBase[base]; w != nil {
		return w, nil
	}
	a, err := serverAccount()
	if err != nil {
		return nil, err
	}
	if a.switched {
		if err := reachable(base); err != nil {
			return nil, err
		}
	}
	dir, err := os.MkdirTemp(base, "quire-postgres-")
	if err != nil {
		return nil, err
	}
	w := &workspace{dir: dir, account: a}
	if err := errors.Join(os.Chmod(dir, 0o755), a.own(dir), w.startGuard()); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	if workspaces.byBase == nil {
		workspaces.byBase = map[string]*workspace{}
	}
	workspaces.byBase[base] = w
	return w, nil
}

// reachable says whether every user may go through all directories down to dir.
func reachable(dir string) error {
	for up := dir; ; up = filepath.Dir(up) {
		info, err := os.Stat(up)
		if err != nil {
			return err
		}
		if info.Mode().Perm()&0o001 == 0 {
			return fmt.Errorf("the user postgres cannot reach %s: %s is closed to other users (%s); set TMPDIR, or the directory in the options, to one that is open",
				dir, up, info.Mode())
		}
		if up == filepath.Dir(up) {
			return nil
		}
	}
}

func (w *workspace) startGuard() error {
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	cmd := exec.Command("/bin/sh", "-c", guardScript, "quire-postgres-guard", w.dir)
	cmd.Dir = "/"
	cmd.Stdin = read
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return errors.Join(fmt.Errorf("starting the guard of the test servers: %w", err), read.Close(), write.Close())
	}
	w.guard = write
	return read.Close()
}

// newDir makes a directory of the servers' account in the workspace.
func (w *workspace) newDir(kind string) (string, error) {
	w.mu.Lock()
	w.mu.made++
	dir := filepath.Join(w.dir, kind+"-"+strconv.Itoa(w.mu.made))
	w.mu.Unlock()
	return dir, w.account.mkdir(dir, 0o755)
}

// copyTemplate fills data, an empty directory, with a fresh database cluster. One initdb takes a second, a copy
// hundredths of one.
func (w *workspace) copyTemplate(i installation, data string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.mu.template == "" {
		template := filepath.Join(w.dir, "template")
		// Without syncing: a test needs what was committed after a crash of the server, not of the machine.
		err := run(w.account.command(w.dir, i.program("initdb"), "--pgdata="+template, "--username="+Superuser, "--auth=trust",
			"--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"))
		if err != nil {
			return errors.Join(err, os.RemoveAll(template))
		}
		w.mu.template = template
	}
	return run(exec.Command("cp", "-a", "--reflink=auto", w.mu.template+"/.", data))
}
