package postgres

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// session is a client that stays connected: one psql that is fed statement after statement.
type session struct {
	t      *testing.T
	stdin  io.Writer
	lines  chan string // of stdout; closed at its end
	ended  chan error  // how psql ended
	stderr bytes.Buffer
}

// openSession connects and returns when it is connected.
func openSession(t *testing.T, s *Server, dsn string) *session {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), s.installation.program("psql"), "--no-psqlrc", "--quiet", "--csv", "--tuples-only",
		"--no-password", "--set=ON_ERROR_STOP=1", "--dbname="+dsn)
	cmd.Env = environment()
	c := &session{t: t, lines: make(chan string, 100), ended: make(chan error, 1)}
	cmd.Stderr = &c.stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c.stdin = stdin
	go func() {
		lines := bufio.NewScanner(stdout)
		for lines.Scan() {
			c.lines <- lines.Text()
		}
		close(c.lines)
		c.ended <- cmd.Wait()
	}()
	t.Cleanup(func() { stdin.Close() })
	if got := c.ask("SELECT 'connected'"); got != "connected" {
		t.Fatalf("a new session answers %q", got)
	}
	return c
}

// send sends a statement and does not wait.
func (c *session) send(statement string) {
	c.t.Helper()
	if _, err := fmt.Fprintln(c.stdin, statement+";"); err != nil {
		c.t.Fatalf("sending %q: %v", statement, err)
	}
}

// answer waits for one line; "" when none comes within the limit.
func (c *session) answer(limit time.Duration) string {
	c.t.Helper()
	select {
	case line, ok := <-c.lines:
		if !ok {
			c.t.Fatalf("the session ended instead of answering: %v", <-c.ended)
		}
		return line
	case <-time.After(limit):
		return ""
	}
}

func (c *session) ask(statement string) string {
	c.t.Helper()
	c.send(statement)
	line := c.answer(20 * time.Second)
	if line == "" {
		c.t.Fatalf("no answer to %q within 20 s", statement)
	}
	return line
}

// mustBreak waits until psql gives up and returns what it says.
func (c *session) mustBreak() string {
	c.t.Helper()
	select {
	case err := <-c.ended:
		if err == nil {
			c.t.Fatal("the session ended without an error")
		}
		return strings.TrimSpace(c.stderr.String())
	case <-time.After(20 * time.Second):
		c.t.Fatal("the session is still alive after 20 s")
		return ""
	}
}
