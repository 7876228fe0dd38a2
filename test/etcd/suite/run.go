package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// limit is how long cases may take that take etcd so long. Some wait for ever for a line in a log.
func limit(etcd time.Duration) time.Duration { return 2*time.Minute + 4*etcd }

// outcome is what one test or subtest reported.
type outcome struct {
	Action     string // pass, fail or skip; "" if it never ended
	Begin, End time.Time
	Parent     bool // has subtests
	Output     strings.Builder
}

// event is a line of test2json.
type event struct {
	Time         time.Time
	Action, Test string
	Output       string
}

// suite is one run of etcd's tests.
type suite struct {
	bench *workbench
	peers string // directory of the test programs
	// test2json turns what a test program prints into events.
	test2json string
}

// run runs the tests of one function that pattern selects, for limit at most, and returns what each reported, by its whole name. What the
// tests left running has been killed. The error says why the tests could not be run, not that they failed.
func (s *suite) run(ctx context.Context, function, pattern string, limit time.Duration) (map[string]*outcome, error) {
	pkg, _, _ := strings.Cut(function, "/")
	before, err := children()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, s.test2json, "-t", "-p", pkg,
		filepath.Join(s.peers, "etcd-"+pkg+".test"),
		"-test.v=test2json", "-test.run="+pattern, "-test.timeout="+limit.String(),
		"-bin-dir="+s.bench.bin(), "-cert-dir="+filepath.Join(s.bench.dir, "fixtures"))
	cmd.Dir = s.bench.packageDir(pkg)
	cmd.Env = append(os.Environ(), "TMPDIR="+s.bench.dir)
	cmd.SysProcAttr = diesWithUs
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	// A process that a test left behind may hold the pipe open; it is killed below.
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	outcomes, err := readEvents(out, pkg)
	waited := cmd.Wait()
	var failed *exec.ExitError
	if errors.As(waited, &failed) || errors.Is(waited, exec.ErrWaitDelay) {
		waited = nil // the events tell
	}
	if err := errors.Join(err, waited, killOrphans(before), ctx.Err()); err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", function, err, stderr.Bytes())
	}
	return outcomes, nil
}

// readEvents collects what each test of pkg reports.
func readEvents(r io.Reader, pkg string) (map[string]*outcome, error) {
	outcomes := map[string]*outcome{}
	in := bufio.NewReader(r)
	for {
		line, err := in.ReadBytes('\n')
		if err == io.EOF {
			return outcomes, nil
		}
		if err != nil {
			return nil, err
		}
		var e event
		if err := json.Unmarshal(line, &e); err != nil {
			return nil, fmt.Errorf("event %q: %w", line, err)
		}
		if e.Test == "" {
			continue
		}
		name := pkg + "/" + e.Test
		o := outcomes[name]
		if o == nil {
			o = &outcome{Begin: e.Time}
			outcomes[name] = o
			for parent, ok := above(name); ok; parent, ok = above(parent) {
				if p := outcomes[parent]; p != nil {
					p.Parent = true
				}
			}
		}
		switch e.Action {
		case "pass", "fail", "skip":
			o.Action, o.End = e.Action, e.Time
		case "output":
			o.Output.WriteString(e.Output)
		}
	}
}

// above is the name of the test that a subtest belongs to.
func above(name string) (string, bool) {
	i := strings.LastIndexByte(name, '/')
	if i < 0 || !strings.Contains(name[:i], "/") {
		return "", false
	}
	return name[:i], true
}

// passed tells whether a case passed: it must have said so, and so must the tests above it, unless another case below
// them is why they failed.
func passed(outcomes map[string]*outcome, name string) bool {
	o := outcomes[name]
	if o == nil || o.Parent || o.Action != "pass" {
		return false
	}
	for parent, ok := above(name); ok; parent, ok = above(parent) {
		// Not each / in a name begins a subtest.
		if p := outcomes[parent]; p != nil && p.Action != "pass" && !failsBelow(outcomes, parent) {
			return false
		}
	}
	return true
}

func failsBelow(outcomes map[string]*outcome, parent string) bool {
	for name, o := range outcomes {
		if strings.HasPrefix(name, parent+"/") && o.Action != "pass" && o.Action != "skip" {
			return true
		}
	}
	return false
}

// story is what a test and those above it printed.
func story(outcomes map[string]*outcome, name string) string {
	var b strings.Builder
	if parent, ok := above(name); ok {
		b.WriteString(story(outcomes, parent))
	}
	if o := outcomes[name]; o != nil {
		b.WriteString(o.Output.String())
	} else {
		fmt.Fprintf(&b, "%s did not run\n", name)
	}
	return b.String()
}
