package main

import (
	"fmt"
	"strings"
)

// document is docs/etcd-suite.md.
func document(cases []testCase, exclusions []exclusion) []byte {
	var b strings.Builder
	b.WriteString(`# etcd's own tests

<!-- Written by test/etcd/suite: make etcd-suite-doc -->

`)
	b.WriteString("`make test-etcd-suite` runs the end-to-end tests that etcd publishes as the Go module\n" +
		"`go.etcd.io/etcd/tests/v3`, packages `common` and `e2e`, in the version of the API that quire speaks. They start\n" +
		"the program `etcd` with etcd's flags, and speak to it with etcdctl, curl and Go's client. quire takes the place of\n" +
		"that program; etcdctl and etcdutl are etcd's. What fails is printed by name, and what it said is left in\n" +
		"`bin/etcd-suite`.\n\n")
	count := func(set string) (applicable int) {
		for _, c := range cases {
			if c.Set == set && excludedBy(exclusions, c.Name, storages[0]) == nil {
				applicable++
			}
		}
		return applicable
	}
	fmt.Fprintf(&b, "A case is a test function without subtests, or a subtest without further ones. Of %d cases, %d apply with a\n"+
		"single node and %d with several, and etcd passes all of these. A case is single-node when each server that it\n"+
		"starts names at most one member in `--initial-cluster` and looks for no others by discovery. The names of all\n"+
		"are in [cases.txt](../test/etcd/suite/cases.txt). Some have limits of seconds that a machine which is busy with\n"+
		"something else exceeds, with etcd too.\n\n", len(cases), count(singleNode), count(threeNode))
	b.WriteString("`QUIRE_STORAGE=sqlite` or `postgres` runs the single-node cases with that storage; without it a single node is a\n" +
		"cluster of one, as etcd's flags ask. `make test-etcd-suite ARGS='-run TestLock'` runs some, and\n" +
		"`QUIRE_BIN=bin/peers/etcd` tries them on etcd.\n")
	for _, storage := range append([]string{"", offline}, storages...) {
		var rows strings.Builder
		for _, e := range exclusions {
			if e.Only != storage {
				continue
			}
			covered := 0
			for _, c := range cases {
				if e.covers(c.Name, storage) {
					covered++
				}
			}
			fmt.Fprintf(&rows, "| `%s` | %d | %s |\n", e.Pattern, covered, e.Reason)
		}
		if rows.Len() == 0 {
			continue
		}
		title := "Excluded"
		switch storage {
		case "":
		case offline:
			title += " on a machine without a default route only"
		default:
			title += " with " + storage + " only"
		}
		fmt.Fprintf(&b, "\n## %s\n\n| cases | how many | why |\n|---|---|---|\n%s", title, rows.String())
	}
	return []byte(b.String())
}
