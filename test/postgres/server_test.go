package postgres

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	if os.Getenv(orphanVariable) != "" {
		orphan()
	}
	os.Exit(m.Run())
}

func TestCommitsSurviveAnImmediateStop(t *testing.T) {
	t.Parallel()
	s := New(t, Options{})
	ctx := t.Context()
	if got := query(t, s, "SHOW fsync"); got != "on" {
		t.Errorf("fsync is %q by default, want on", got)
	}
	exec1(t, s, "CREATE TABLE t (a int)", "INSERT INTO t VALUES (1)")
	address := s.Address
	if err := s.StopImmediate(); err != nil {
		t.Fatal(err)
	}
	if s.Running() {
		t.Error("the server runs after its immediate stop")
	}
	if conn, err := net.Dial("tcp", address); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("connecting to a stopped server: %v, %v, want connection refused", conn, err)
	}
	if err := s.Restart(ctx); err != nil {
		t.Fatal(err)
	}
	if s.Address != address {
		t.Errorf("the address moved from %s to %s", address, s.Address)
	}
	if !strings.Contains(s.LogTail(1<<20), "automatic recovery in progress") {
		t.Error("the server did not recover from its log: the stop was not an immediate one")
	}
	if got := query(t, s, "SELECT a FROM t"); got != "1" {
		t.Errorf("after an immediate stop the row is %q, want 1", got)
	}
	// Of one that runs.
	if err := s.Restart(ctx); err != nil {
		t.Fatal(err)
	}
	if got := query(t, s, "SELECT a FROM t"); got != "1" {
		t.Errorf("after a restart the row is %q, want 1", got)
	}
}

func TestStopLeavesNothing(t *testing.T) {
	t.Parallel()
	s := New(t, Options{})
	pid := s.process.cmd.Process.Pid
	if all, err := family(pid); err != nil || len(all) < 2 {
		t.Fatalf("the processes of a running server: %v, %v, want several", all, err)
	}
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if all, err := family(pid); err != nil || len(all) != 0 {
		t.Errorf("Stop left processes: %v, %v", all, err)
	}
	if _, err := os.Stat(s.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Stop left %s: %v", s.dir, err)
	}
	if err := s.Stop(); err != nil {
		t.Errorf("stopping twice: %v", err)
	}
}

func TestSettings(t *testing.T) {
	t.Parallel()
	s := New(t, Options{NoFsync: true, Settings: map[string]string{"max_connections": "7", "cluster_name": `it's a \ name`}})
	for name, want := range map[string]string{"fsync": "off", "max_connections": "7", "cluster_name": `it's a \ name`} {
		if got := query(t, s, "SHOW "+name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if err := s.Set(t.Context(), "work_mem", "12MB"); err != nil {
		t.Fatal(err)
	}
	if got := query(t, s, "SHOW work_mem"); got != "12MB" {
		t.Errorf("work_mem is %q after Set, want 12MB", got)
	}
}

func TestAServerThatDoesNotStartSaysWhy(t *testing.T) {
	t.Parallel()
	Shared(t) // skips where there is none
	_, err := Start(t.Context(), Options{Settings: map[string]string{"no_such_setting": "1"}})
	if err == nil || !strings.Contains(err.Error(), `unrecognized configuration parameter "no_such_setting"`) {
		t.Errorf("the error does not hold the server's log: %v", err)
	}
}

func TestServersStartSideBySide(t *testing.T) {
	t.Parallel()
	Shared(t) // skips where there is none
	var all sync.WaitGroup
	var mu sync.Mutex
	addresses := map[string]bool{}
	for range 3 {
		all.Go(func() {
			s, err := Start(t.Context(), Options{})
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			addresses[s.Address] = true
			mu.Unlock()
			if err := s.Exec(t.Context(), Superuser, "CREATE TABLE mine ()"); err != nil {
				t.Error(err)
			}
			if err := s.Stop(); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if len(addresses) != 3 {
		t.Errorf("three servers have the addresses %v", addresses)
	}
}

func TestTheWayToTheDataMustBeOpen(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root's servers run as another user")
	}
	Shared(t) // skips where there is none
	closed := filepath.Join(t.TempDir(), "closed")
	inside := filepath.Join(closed, "inside")
	if err := os.MkdirAll(inside, 0o700); err != nil {
		t.Fatal(err)
	}
	_, err := Start(t.Context(), Options{Dir: inside})
	if err == nil || !strings.Contains(err.Error(), "set TMPDIR") {
		t.Errorf("a server in a closed directory: %v, want advice", err)
	}
}

// orphanVariable makes this test binary a program that starts a server, freezes it and waits to be killed.
const orphanVariable = "QUIRE_TEST_ORPHAN"

func orphan() {
	s, err := Start(context.Background(), Options{})
	if err == nil {
		err = s.Pause()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(s.process.cmd.Process.Pid, s.workspace.dir)
	select {}
}

func TestAKilledTestLeavesNothing(t *testing.T) {
	t.Parallel()
	Shared(t) // skips where there is none
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), orphanVariable+"=1")
	cmd.Stderr = os.Stderr
	output, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(output).ReadString('\n')
	if killed := cmd.Process.Kill(); err != nil || killed != nil {
		t.Fatalf("the other test: %v, %v", err, killed)
	}
	_ = cmd.Wait() // it was killed
	text, dir, _ := strings.Cut(strings.TrimSpace(line), " ")
	main, err := strconv.Atoi(text)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); err != nil {
		t.Fatalf("the killed test had no directory: %v", err)
	}
	const limit = 20 * time.Second
	for deadline := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		all, err := family(main)
		if err != nil {
			t.Fatal(err)
		}
		if _, err = os.Stat(dir); len(all) == 0 && errors.Is(err, os.ErrNotExist) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s after a test with a frozen server was killed: processes %v, directory: %v", limit, all, err)
		}
	}
	segments, err := os.ReadFile("/proc/sysvipc/shm")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(segments)) {
		// key, id, mode, size, the process that made it
		if fields := strings.Fields(line); len(fields) > 4 && fields[4] == text {
			t.Errorf("the server left a segment of shared memory: %s", line)
		}
	}
}

// query returns the single value of a query in the superuser's database.
func query(t *testing.T, s *Server, statement string) string {
	t.Helper()
	value, err := s.one(t.Context(), statement)
	if err != nil {
		t.Fatal(err)
	}
	return value
}

// exec1 runs statements in the superuser's database.
func exec1(t *testing.T, s *Server, statements ...string) {
	t.Helper()
	if err := s.Exec(t.Context(), Superuser, statements...); err != nil {
		t.Fatal(err)
	}
}
