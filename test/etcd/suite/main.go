package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/quire-db/quire/test/postgres"
)

// options are what the command line says.
type options struct {
	server    string
	storage   string
	peers     string
	fixtures  string
	logs      string
	sets      string
	run       string
	slice     time.Duration
	calibrate string
	document  string
}

func main() {
	if filepath.Base(os.Args[0]) == serverName {
		fmt.Fprintln(os.Stderr, "suite:", beServer(os.Args)) // it returns only when it fails
		os.Exit(1)
	}
	var o options
	flag.StringVar(&o.server, "server", os.Getenv("QUIRE_BIN"), "the server program to test")
	flag.StringVar(&o.storage, "storage", os.Getenv("QUIRE_STORAGE"), "where quire keeps its data: "+strings.Join(storages, ", ")+" (empty: no flag is added, which is sqlraft)")
	flag.StringVar(&o.peers, "peers", "", "directory with etcdctl, etcdutl, etcd-common.test and etcd-e2e.test")
	flag.StringVar(&o.fixtures, "fixtures", "", "the fixtures of etcd's tests")
	flag.StringVar(&o.logs, "logs", "", "directory for what failing cases print; what was there is removed")
	flag.StringVar(&o.sets, "sets", "", "comma-separated sets to run (empty: both; single-node alone where the storage knows no members)")
	flag.StringVar(&o.run, "run", "", "run only cases whose name (package/function/subtest) matches this regular expression")
	flag.DurationVar(&o.slice, "slice", 0, "run only a choice of cases that takes etcd about this long")
	flag.StringVar(&o.calibrate, "calibrate", "", "run all tests, and write the cases to this file; -server must be an etcd")
	flag.StringVar(&o.document, "document", "", "only write the document about the suite to this file")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := do(ctx, o, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "suite:", err)
		os.Exit(1)
	}
}

// errFailed is the outcome of a run in which cases failed; they have been printed.
var errFailed = errors.New("not all applicable cases passed")

func do(ctx context.Context, o options, out io.Writer) (err error) {
	cases, err := parseCases(casesText)
	if err != nil {
		return fmt.Errorf("cases.txt: %w", err)
	}
	exclusions, err := parseExclusions(excludedText)
	if err != nil {
		return fmt.Errorf("excluded.txt: %w", err)
	}
	if o.document != "" {
		return os.WriteFile(o.document, document(cases, exclusions), 0o644)
	}
	if err := o.check(); err != nil {
		return err
	}
	test2json, err := exec.CommandContext(ctx, "go", "tool", "-n", "test2json").Output()
	if err != nil {
		return fmt.Errorf("finding test2json: %w", err)
	}
	if err := adoptOrphans(); err != nil {
		return err
	}
	server := serverConfig{Binary: o.server, Storage: o.storage}
	if o.storage == "postgres" {
		p, err := startPostgres(ctx)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, p.Stop()) }()
		server.DSN = p.DSN("postgres", postgres.Superuser)
	}
	bench, err := newWorkbench(o.peers, o.fixtures, server)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, bench.remove()) }()
	exclusions = here(exclusions, hasRoute())
	s := &suite{bench: bench, peers: o.peers, test2json: strings.TrimSpace(string(test2json))}
	if o.calibrate != "" {
		return calibrate(ctx, s, exclusions, o.calibrate, out)
	}
	return s.test(ctx, o, cases, exclusions, out)
}

// check completes the options.
func (o *options) check() error {
	if o.storage != "" && !slices.Contains(storages, o.storage) {
		return fmt.Errorf("-storage is %q; it may be %s", o.storage, strings.Join(storages, ", "))
	}
	if o.sets == "" {
		o.sets = strings.Join(sets, ",")
		if o.storage == "sqlite" || o.storage == "postgres" {
			o.sets = singleNode
		}
	}
	for set := range strings.SplitSeq(o.sets, ",") {
		if !slices.Contains(sets, set) {
			return fmt.Errorf("-sets names %q; there are %s", set, strings.Join(sets, ", "))
		}
	}
	for name, path := range map[string]*string{"server": &o.server, "peers": &o.peers, "fixtures": &o.fixtures} {
		if *path == "" {
			return fmt.Errorf("-%s is needed; `make test-etcd-suite` gives all of them", name)
		}
		var err error
		if *path, err = filepath.Abs(*path); err != nil {
			return err
		}
		if _, err := os.Stat(*path); err != nil {
			return fmt.Errorf("-%s: %w", name, err)
		}
	}
	return nil
}

// startPostgres starts the server that all quires of a run use, each with a schema of its own. Nothing is synced: the
// machine does not crash here.
func startPostgres(ctx context.Context) (*postgres.Server, error) {
	return postgres.Start(ctx, postgres.Options{NoFsync: true, Settings: map[string]string{"max_connections": "100"}})
}

// tally is what the cases of one set came to.
type tally struct {
	passed, of int
	failing    []string
}

// test runs the cases that the options ask for and prints what they came to.
func (s *suite) test(ctx context.Context, o options, all []testCase, exclusions []exclusion, out io.Writer) error {
	filter, err := regexp.Compile(o.run)
	if err != nil {
		return fmt.Errorf("-run: %w", err)
	}
	if o.logs != "" {
		if err := errors.Join(os.RemoveAll(o.logs), os.MkdirAll(o.logs, 0o755)); err != nil {
			return err
		}
	}
	chosenSets := strings.Split(o.sets, ",")
	excluded := map[string]int{}
	var cases []testCase
	for _, c := range all {
		switch {
		case !slices.Contains(chosenSets, c.Set) || !filter.MatchString(c.Name):
		case excludedBy(exclusions, c.Name, o.storage) != nil:
			excluded[c.Set]++
		default:
			cases = append(cases, c)
		}
	}
	if o.slice > 0 {
		cases = slice(cases, o.slice)
	}
	if len(cases) == 0 {
		return errors.New("no case is chosen")
	}
	tallies := map[string]*tally{}
	for _, set := range chosenSets {
		tallies[set] = &tally{}
	}
	fmt.Fprintf(out, "%d cases, which take etcd %s\n", len(cases), total(cases).Round(time.Second))
	for _, group := range byFunction(cases) {
		outcomes, err := s.run(ctx, group[0].function(), runPattern(group), limit(total(group)))
		if err != nil {
			return err
		}
		for _, c := range group {
			t := tallies[c.Set]
			t.of++
			if passed(outcomes, c.Name) {
				t.passed++
				continue
			}
			t.failing = append(t.failing, c.Name)
			fmt.Fprintf(out, "FAIL %s\n", c.Name)
			if o.logs != "" {
				file := filepath.Join(o.logs, strings.ReplaceAll(c.Name, "/", "__")+".log")
				if err := os.WriteFile(file, []byte(story(outcomes, c.Name)), 0o644); err != nil {
					return err
				}
			}
		}
	}
	failed := false
	for _, set := range chosenSets {
		t := tallies[set]
		if t.of == 0 {
			continue
		}
		fmt.Fprintf(out, "%s: passed %d of %d applicable, %d excluded\n", set, t.passed, t.of, excluded[set])
		for _, name := range t.failing {
			failed = true
			fmt.Fprintf(out, "\tfailed: %s\n", name)
		}
	}
	if failed {
		return errFailed
	}
	return nil
}
