package main

import (
	"bytes"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

func committed(t *testing.T) ([]testCase, []exclusion) {
	t.Helper()
	cases, err := parseCases(casesText)
	if err != nil {
		t.Fatal(err)
	}
	exclusions, err := parseExclusions(excludedText)
	if err != nil {
		t.Fatal(err)
	}
	return cases, exclusions
}

func TestEachExclusionCoversACase(t *testing.T) {
	cases, exclusions := committed(t)
	for _, e := range exclusions {
		if !slices.ContainsFunc(cases, func(c testCase) bool { return e.covers(c.Name, e.Only) }) {
			t.Errorf("%q excludes nothing", e.Pattern)
		}
	}
}

func TestDocumentIsThatOfTheLists(t *testing.T) {
	cases, exclusions := committed(t)
	got, err := os.ReadFile("../../../docs/etcd-suite.md")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, document(cases, exclusions)) {
		t.Error("docs/etcd-suite.md is not what cases.txt and excluded.txt say; run `make etcd-suite-doc`")
	}
}

func TestCasesAreReadAsTheyAreWritten(t *testing.T) {
	cases := []testCase{
		{Name: "e2e/TestB/x#01", Set: threeNode, Took: 1500 * time.Millisecond},
		{Name: "common/TestA", Set: singleNode},
	}
	var text bytes.Buffer
	if err := writeCases(&text, cases); err != nil {
		t.Fatal(err)
	}
	got, err := parseCases(text.String())
	if err != nil {
		t.Fatal(err)
	}
	slices.Reverse(cases) // they are written in the order of their names
	if !slices.Equal(got, cases) {
		t.Errorf("read %v, wrote %v", got, cases)
	}
}

func TestBadListsAreRefused(t *testing.T) {
	for _, text := range []string{"two-node 1 common/TestA", "single-node x common/TestA", "single-node 1 TestA", "single-node 1 a/T\nsingle-node 1 a/T"} {
		if _, err := parseCases(text); err == nil {
			t.Errorf("cases %q were accepted", text)
		}
	}
	for _, text := range []string{"common/TestA", "oracle:common/TestA no reason"} {
		if _, err := parseExclusions(text); err == nil {
			t.Errorf("exclusions %q were accepted", text)
		}
	}
}

func TestExclusionsCoverNamesAndWhatIsBelow(t *testing.T) {
	exclusions, err := parseExclusions("# comment\ne2e/TestA why\ncommon/TestB*/x other\nsqlite:e2e/TestM members\noffline:e2e/TestO route\n")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, storage, reason string
	}{
		{"e2e/TestA", "", "why"},
		{"e2e/TestA/sub/sub", "postgres", "why"},
		{"e2e/TestAB", "", ""},
		{"common/TestBcd/x", "", "other"},
		{"common/TestBcd/y", "", ""},
		{"common/TestB/y/x", "", ""},
		{"e2e/TestM", "sqlite", "members"},
		{"e2e/TestM", "", ""},
	} {
		reason := ""
		if e := excludedBy(exclusions, c.name, c.storage); e != nil {
			reason = e.Reason
		}
		if reason != c.reason {
			t.Errorf("%s with storage %q is excluded for %q, want %q", c.name, c.storage, reason, c.reason)
		}
	}
	for _, routed := range []bool{true, false} {
		if excluded := excludedBy(here(exclusions, routed), "e2e/TestO", "sqlite") != nil; excluded == routed {
			t.Errorf("what needs a route is excluded: %t, where there is one: %t", excluded, routed)
		}
	}
}

func TestSliceTakesFromEachFunctionFirst(t *testing.T) {
	cases := []testCase{
		{Name: "common/TestA/1", Set: singleNode, Took: 2 * time.Second},
		{Name: "common/TestA/2", Set: singleNode, Took: 3 * time.Second},
		{Name: "common/TestA/3", Set: threeNode, Took: 4 * time.Second},
		{Name: "common/TestB", Set: singleNode, Took: 5 * time.Second},
		{Name: "common/TestLong", Set: singleNode, Took: time.Minute},
	}
	var got []string
	for _, c := range slice(cases, 13*time.Second) {
		got = append(got, c.Name)
	}
	// TestA/2 is of the second round, and 2 s are left for it.
	if want := []string{"common/TestA/1", "common/TestA/3", "common/TestB"}; !slices.Equal(got, want) {
		t.Errorf("the slice is %v, want %v", got, want)
	}
}

func TestRunPatternSelectsItsCases(t *testing.T) {
	group := []testCase{{Name: "common/TestA/x(1)/y"}, {Name: "common/TestA/z/y"}}
	pattern := runPattern(group)
	for _, c := range group {
		elements := strings.Split(c.Name, "/")[1:]
		for i, level := range strings.Split(pattern, "/") {
			if !regexp.MustCompile(level).MatchString(elements[i]) {
				t.Errorf("%s does not match %s", c.Name, pattern)
			}
		}
	}
	if regexp.MustCompile(strings.Split(pattern, "/")[0]).MatchString("TestAB") {
		t.Errorf("%s matches a longer name", pattern)
	}
	if got := runPattern([]testCase{{Name: "common/TestA"}}); got != "^(TestA)$" {
		t.Errorf("of a function alone: %s", got)
	}
}

func TestByFunctionKeepsAFunctionTogether(t *testing.T) {
	groups := byFunction([]testCase{{Name: "e2e/TestA/2"}, {Name: "e2e/TestB"}, {Name: "e2e/TestA/1"}, {Name: "common/TestA"}})
	var sizes []int
	for _, g := range groups {
		sizes = append(sizes, len(g))
	}
	if !slices.Equal(sizes, []int{1, 2, 1}) {
		t.Errorf("groups of %v cases: %v", sizes, groups)
	}
}
