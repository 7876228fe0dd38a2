package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// calibrate runs all tests on an etcd and writes what cases there are to the file.
func calibrate(ctx context.Context, s *suite, exclusions []exclusion, file string, out io.Writer) error {
	var cases []testCase
	var complaints []string
	for _, pkg := range packages {
		functions, err := s.functions(ctx, pkg)
		if err != nil {
			return err
		}
		for _, function := range functions {
			if err := os.Remove(s.bench.calls()); err != nil && !os.IsNotExist(err) {
				return err
			}
			name := pkg + "/" + function
			outcomes, err := s.run(ctx, name, "^"+function+"$", 15*time.Minute)
			if err != nil {
				return err
			}
			calls, err := readCalls(s.bench.calls())
			if err != nil {
				return err
			}
			found, bad := casesOf(outcomes, calls, exclusions)
			cases, complaints = append(cases, found...), append(complaints, bad...)
			for _, complaint := range bad {
				fmt.Fprintln(out, complaint)
			}
		}
	}
	var text bytes.Buffer
	if err := writeCases(&text, cases); err != nil {
		return err
	}
	if err := os.WriteFile(file, text.Bytes(), 0o644); err != nil {
		return err
	}
	if len(complaints) > 0 {
		return fmt.Errorf("%d cases that this server does not pass and that excluded.txt does not name", len(complaints))
	}
	return nil
}

// functions are the names of the test functions of pkg.
func (s *suite) functions(ctx context.Context, pkg string) ([]string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(s.peers, "etcd-"+pkg+".test"), "-test.list=.")
	cmd.Dir = s.bench.packageDir(pkg)
	list, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("listing the tests of %s: %w", pkg, err)
	}
	functions := slices.DeleteFunc(strings.Fields(string(list)), func(name string) bool { return !strings.HasPrefix(name, "Test") })
	if len(functions) == 0 {
		return nil, fmt.Errorf("%s has no tests; was it built without -tags e2e?", pkg)
	}
	return functions, nil
}

// casesOf makes cases of what the tests of one function reported on a real etcd, given the starts of servers
// meanwhile. complaints are the tests that etcd did not pass and that no exclusion covers.
func casesOf(outcomes map[string]*outcome, calls []call, exclusions []exclusion) (cases []testCase, complaints []string) {
	for name, o := range outcomes {
		if o.Parent {
			continue
		}
		if !passed(outcomes, name) && excludedBy(exclusions, name, storages[0]) == nil {
			complaints = append(complaints, fmt.Sprintf("%s: %s", name, cmp.Or(o.Action, "did not end")))
		}
		cases = append(cases, testCase{Name: name, Set: setOf(o, calls), Took: o.End.Sub(o.Begin)})
	}
	return cases, complaints
}

// setOf applies the rule of the package comment to the servers that the test started, or where it started none to those
// that were started before it for it.
func setOf(o *outcome, calls []call) string {
	var own, earlier []call
	for _, c := range calls {
		switch {
		case c.At.After(o.End):
		case c.At.Before(o.Begin):
			earlier = append(earlier, c)
		default:
			own = append(own, c)
		}
	}
	if !slices.ContainsFunc(own, isServer) {
		own = earlier
	}
	for _, c := range own {
		if namesSeveral(c.Args) {
			return threeNode
		}
	}
	return singleNode
}

func isServer(c call) bool { return !slices.Contains(c.Args, "--version") }

// namesSeveral tells whether the server is to be one of several members.
func namesSeveral(args []string) bool {
	for _, flag := range []string{"discovery-token", "discovery-endpoints", "discovery-srv"} {
		if _, given := flagValue(args, flag); given {
			return true
		}
	}
	members, _ := flagValue(args, "initial-cluster")
	return strings.Contains(members, ",")
}

// readCalls reads what the servers left of their command lines.
func readCalls(path string) ([]call, error) {
	f, err := os.Open(path)
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var calls []call
	in := bufio.NewScanner(f)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		var c call
		if err := json.Unmarshal(in.Bytes(), &c); err != nil {
			return nil, err
		}
		calls = append(calls, c)
	}
	return calls, in.Err()
}

// total is how long the cases took with etcd.
func total(cases []testCase) time.Duration {
	var sum time.Duration
	for _, c := range cases {
		sum += c.Took
	}
	return sum
}
