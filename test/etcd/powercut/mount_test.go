//go:build linux

package powercut

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { Main(m) }

// sh runs a shell command in a directory on the mount.
func sh(t *testing.T, dir, command string) string {
	t.Helper()
	out, err := trySh(t, dir, command)
	if err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	return out
}

func trySh(t *testing.T, dir, command string) (string, error) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "sh", "-c", "cd "+dir+" && "+command).CombinedOutput()
	return string(out), err
}

func TestItIsAFileSystem(t *testing.T) {
	m := NewDisk(random(t).Uint64()).Mount(t)
	for _, c := range []struct{ command, want string }{
		{"mkdir -p a/b/c && echo hello > a/b/c/f && cat a/b/c/f", "hello\n"},
		{"echo more >> a/b/c/f && cat a/b/c/f && stat -c %s a/b/c/f", "hello\nmore\n11\n"},
		{"mv a/b/c/f a/g && ls a a/b/c", "a:\nb\ng\n\na/b/c:\n"},
		{"truncate -s 3 a/g && cat a/g", "hel"},
		{"truncate -s 5 a/g && od -An -c a/g", "   h   e   l  \\0  \\0\n"},
		{"fallocate -l 8 a/g && stat -c %s a/g && fallocate -l 2 a/g && stat -c %s a/g", "8\n8\n"},
		{"dd if=/dev/zero of=z bs=1M count=5 2>/dev/null && cp z y && cmp y z && stat -c %s y", "5242880\n"},
		{"dd if=/dev/zero of=z bs=1 seek=4096 count=1 conv=notrunc 2>/dev/null && stat -c %s z", "5242880\n"},
		{"chmod 640 z && stat -c %a z", "640\n"},
		{"mkdir many && for i in $(seq 2000); do : > many/$i; done && ls many | wc -l && rm -r many && ls", "2000\na\ny\nz\n"},
		{"exec 3>u && rm u && echo x >&3 && stat -L -c '%h %s' /proc/self/fd/3", "0 2\n"},
		{"sync z a && sync -d z && flock z true && echo synced", "synced\n"},
	} {
		if got := sh(t, m.Dir, c.command); got != c.want {
			t.Errorf("%s: %q, want %q", c.command, got, c.want)
		}
	}
	if out, err := trySh(t, m.Dir, "rmdir a"); err == nil || !strings.Contains(out, "not empty") {
		t.Errorf("rmdir of a full directory: %v %s", err, out)
	}
}

func TestACutThroughTheMount(t *testing.T) {
	r := random(t)
	outcomes := map[string]int{}
	for range 120 {
		m := NewDisk(r.Uint64()).Mount(t)
		sh(t, m.Dir, "echo kept > kept && sync kept . && echo lost > lost && mv kept renamed && sync lost")
		if err := m.Cut(); err != nil {
			t.Fatal(err)
		}
		got := sh(t, m.Dir, "for f in *; do echo $f: $(cat $f); done")
		outcomes[got]++
		if strings.Contains(got, "kept:") == strings.Contains(got, "renamed:") {
			t.Errorf("a rename is half done: %s", got)
		}
		if strings.Contains(got, "lost:") && !strings.Contains(got, "lost: lost") {
			t.Errorf("the content of a file was synced, and is not there: %s", got)
		}
	}
	if len(outcomes) != 4 {
		t.Errorf("%d outcomes, want 4: %v", len(outcomes), outcomes)
	}
}

// SQLite's index of the WAL is a map that its processes share.
func TestSQLiteInWALModeRunsOnIt(t *testing.T) {
	if _, err := exec.LookPath("sqlite3"); err != nil {
		t.Fatal("sqlite3 is missing here; `make need-sqlite3` installs it")
	}
	m := NewDisk(random(t).Uint64()).Mount(t)
	const insert = `for i in $(seq 50); do echo 'INSERT INTO t SELECT randomblob(2000) FROM generate_series(1, 3);'; done |
		sqlite3 -cmd '.timeout 20000' db`
	sh(t, m.Dir, `sqlite3 db 'PRAGMA journal_mode = WAL; CREATE TABLE t (x);'`)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			if out, err := trySh(t, m.Dir, insert); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
	all.Wait()
	got := sh(t, m.Dir, `sqlite3 db 'PRAGMA integrity_check; SELECT count(*) FROM t; PRAGMA journal_mode'`)
	if got != "ok\n600\nwal\n" {
		t.Errorf("after 4 processes have inserted 150 rows each: %q", got)
	}
}

// held is a process, with all its children, that goes on until it is killed. Its input stays open.
type held struct {
	*exec.Cmd
	in   io.WriteCloser
	out  output
	done chan struct{}
}

// output is what a process has printed so far.
type output struct {
	mu   sync.Mutex
	text strings.Builder
}

// Write implements io.Writer.
func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

// String implements fmt.Stringer.
func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

func hold(t *testing.T, program string, args ...string) *held {
	t.Helper()
	p := &held{Cmd: exec.Command(program, args...), done: make(chan struct{})}
	p.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	p.Stdout, p.Stderr = &p.out, &p.out
	var err error
	if p.in, err = p.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.Cmd.Wait() // that it was killed is no error
		close(p.done)
	}()
	t.Cleanup(func() {
		p.Signal(syscall.SIGKILL) // fails when it has ended
		<-p.done
	})
	return p
}

func (p *held) Signal(s os.Signal) error { return syscall.Kill(-p.Process.Pid, s.(syscall.Signal)) }

func (p *held) Wait(limit time.Duration) (int, error) {
	select {
	case <-p.done:
		return p.ProcessState.ExitCode(), nil
	case <-time.After(limit):
		return 0, errors.New("it still runs")
	}
}

// From the moment at which the power goes nothing is answered, and nothing reaches the disk.
func TestAFrozenDiskAnswersNothing(t *testing.T) {
	r := random(t)
	m := NewDisk(r.Uint64()).Mount(t)
	n := r.Int64N(80)
	m.FreezeAfter(n, Changes)
	// Four changes for each file: create, write, fsync of the file and of the directory.
	p := hold(t, "sh", "-c", "cd "+m.Dir+"; i=0; while true; do echo x > $i && sync $i . || echo seen; i=$((i+1)); done")
	select {
	case <-m.Frozen():
	case <-time.After(20 * time.Second):
		t.Fatal("the power did not go")
	}
	if _, err := p.Wait(50 * time.Millisecond); err == nil {
		t.Fatalf("a process on a frozen disk has ended: %s", p.out.String())
	}
	if err := m.Cut(p); err != nil {
		t.Fatal(err)
	}
	if out := p.out.String(); out != "" {
		t.Errorf("the process has seen an error: %s", out)
	}
	files := int64(len(strings.Fields(sh(t, m.Dir, "ls"))))
	if files < n/4 || files > n/4+1 {
		t.Errorf("%d files after %d changes, want %d or one more", files, n, n/4)
	}
}

func TestFaultsHappen(t *testing.T) {
	m := NewDisk(random(t).Uint64()).Mount(t)
	sh(t, m.Dir, "echo old > f && sync f .")
	open := func(flags int) int {
		t.Helper()
		fd, err := unix.Open(filepath.Join(m.Dir, "f"), flags, 0)
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	fd := open(unix.O_RDWR)
	defer unix.Close(fd)
	write := func() error { _, err := unix.Pwrite(fd, []byte("new"), 0); return err }
	for _, c := range []struct {
		name  string
		fault Fault
		do    func() error
		want  []error
	}{
		{"a write", Fault{On: Write, Skip: 1, For: 2, Errno: syscall.ENOSPC}, write, []error{nil, syscall.ENOSPC, syscall.ENOSPC, nil}},
		{"a write of another file", Fault{On: Write, File: "-wal", Errno: syscall.EIO}, write, []error{nil, nil}},
		{"a sync", Fault{On: Sync, File: "f", For: 1, Errno: syscall.EIO}, func() error { return unix.Fsync(fd) }, []error{syscall.EIO, nil}},
		{"a datasync", Fault{On: Sync, For: 1, Errno: syscall.EIO}, func() error { return unix.Fdatasync(fd) }, []error{syscall.EIO, nil}},
		{"a new name", Fault{On: Names, For: 1, Errno: syscall.ENOSPC}, func() error { return unix.Mkdir(filepath.Join(m.Dir, "d"), 0o700) },
			[]error{syscall.ENOSPC, nil, syscall.EEXIST}},
	} {
		t.Run(c.name, func(t *testing.T) {
			fault := m.Inject(c.fault)
			defer m.Heal()
			for i, want := range c.want {
				if got := c.do(); !errors.Is(got, want) && got != want {
					t.Errorf("number %d: %v, want %v", i, got, want)
				}
			}
			if want := len(slices.DeleteFunc(slices.Clone(c.want), func(err error) bool {
				return err == nil || errors.Is(err, syscall.EEXIST)
			})); fault.Hits() != int64(want) {
				t.Errorf("it counts %d hits, want %d", fault.Hits(), want)
			}
		})
	}
	t.Run("a slow sync", func(t *testing.T) {
		m.Inject(Fault{On: Sync, Delay: 200 * time.Millisecond})
		defer m.Heal()
		began := time.Now()
		if err := unix.Fsync(fd); err != nil || time.Since(began) < 200*time.Millisecond {
			t.Errorf("%v after %v", err, time.Since(began))
		}
	})
}

// A bit is wrong as long as the kernel remembers it, and right after the next mount.
func TestABitFlips(t *testing.T) {
	m := NewDisk(random(t).Uint64()).Mount(t)
	right := strings.Repeat("0123456789", 100)
	sh(t, m.Dir, fmt.Sprintf("printf %s > f && sync f .", right))
	if err := m.Cut(); err != nil {
		t.Fatal(err)
	}
	m.Inject(Fault{On: Read, For: 1, Flip: true})
	wrong := 0
	for i, got := range []byte(sh(t, m.Dir, "cat f")) {
		for b := got ^ right[i]; b != 0; b &= b - 1 {
			wrong++
		}
	}
	if wrong != 1 {
		t.Errorf("%d bits are wrong, want 1", wrong)
	}
	if err := m.Cut(); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, m.Dir, "cat f"); got != right {
		t.Errorf("a bit that was read wrong is wrong on the disk: %q", got)
	}
}
