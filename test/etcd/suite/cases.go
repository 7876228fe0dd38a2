package main

import (
	"bufio"
	"cmp"
	_ "embed"
	"fmt"
	"io"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Sets of cases, as in cases.txt.
const (
	singleNode = "single-node"
	threeNode  = "three-node"
)

var sets = []string{singleNode, threeNode}

// testCase is a leaf among etcd's tests.
type testCase struct {
	Name string // package/function/subtest…, such as common/TestAuthTxn/NoJWT
	Set  string
	// Took is how long it took with etcd when cases.txt was written, to a tenth of a second.
	Took time.Duration
}

// function is package/function.
func (c testCase) function() string { return functionOf(c.Name) }

func functionOf(name string) string {
	pkg, rest, _ := strings.Cut(name, "/")
	function, _, _ := strings.Cut(rest, "/")
	return pkg + "/" + function
}

//go:embed cases.txt
var casesText string

//go:embed excluded.txt
var excludedText string

// parseCases reads lines of the form "set seconds name".
func parseCases(text string) ([]testCase, error) {
	var cases []testCase
	seen := map[string]bool{}
	err := lines(text, func(line string) error {
		fields := strings.Fields(line)
		if len(fields) != 3 || !slices.Contains(sets, fields[0]) || !strings.Contains(fields[2], "/") {
			return fmt.Errorf("want: set seconds package/name; sets are %s", strings.Join(sets, " and "))
		}
		seconds, err := strconv.ParseFloat(fields[1], 64)
		if err != nil {
			return err
		}
		if seen[fields[2]] {
			return fmt.Errorf("%s is there twice", fields[2])
		}
		seen[fields[2]] = true
		cases = append(cases, testCase{Name: fields[2], Set: fields[0], Took: time.Duration(seconds * float64(time.Second))})
		return nil
	})
	return cases, err
}

// writeCases is the inverse of parseCases, ordered by name.
func writeCases(w io.Writer, cases []testCase) error {
	out := bufio.NewWriter(w)
	fmt.Fprintln(out, "# All cases, as `suite -calibrate` found them on a real etcd: set, seconds, name.")
	cases = slices.SortedFunc(slices.Values(cases), func(a, b testCase) int { return cmp.Compare(a.Name, b.Name) })
	for _, c := range cases {
		fmt.Fprintf(out, "%s %.1f %s\n", c.Set, c.Took.Seconds(), c.Name)
	}
	return out.Flush()
}

// exclusion says why cases do not apply.
type exclusion struct {
	// Only is the storage for which alone this holds, or offline; "" for all.
	Only string
	// Pattern of the names: a name, all below a name, or with * for any text within one element.
	Pattern string
	Reason  string

	match *regexp.Regexp
}

func (e *exclusion) covers(name, storage string) bool {
	return (e.Only == "" || e.Only == storage) && e.match.MatchString(name)
}

// offline marks what does not apply on a machine that has no route to the Internet, whether or not that is there.
const offline = "offline"

// here is what of all applies on this machine, whatever the storage.
func here(all []exclusion, routed bool) []exclusion {
	all = slices.Clone(all)
	for i := range all {
		if all[i].Only == offline && !routed {
			all[i].Only = ""
		}
	}
	return all
}

// hasRoute: a UDP socket sends nothing when it is connected, but fails without a route.
func hasRoute() bool {
	conn, err := net.Dial("udp", "8.8.8.8:80") // as etcd's tests do
	if err != nil {
		return false
	}
	return conn.Close() == nil
}

// parseExclusions reads lines of the form "[storage:|offline:]pattern reason…".
func parseExclusions(text string) ([]exclusion, error) {
	var all []exclusion
	err := lines(text, func(line string) error {
		pattern, reason, ok := strings.Cut(line, " ")
		if !ok {
			return fmt.Errorf("want: pattern reason")
		}
		e := exclusion{Pattern: pattern, Reason: strings.TrimSpace(reason)}
		if only, rest, ok := strings.Cut(pattern, ":"); ok {
			if only != offline && !slices.Contains(storages, only) {
				return fmt.Errorf("storage %q; there are %s", only, strings.Join(storages, ", "))
			}
			e.Only, e.Pattern = only, rest
		}
		quoted := strings.ReplaceAll(regexp.QuoteMeta(e.Pattern), `\*`, `[^/]*`)
		var err error
		e.match, err = regexp.Compile("^" + quoted + "(/|$)")
		all = append(all, e)
		return err
	})
	return all, err
}

// excludedBy is the first exclusion that covers name, or nil.
func excludedBy(exclusions []exclusion, name, storage string) *exclusion {
	for i := range exclusions {
		if exclusions[i].covers(name, storage) {
			return &exclusions[i]
		}
	}
	return nil
}

// lines calls read with each line of text that is neither empty nor a comment, and names the line in its error.
func lines(text string, read func(string) error) error {
	number := 0
	for line := range strings.Lines(text) {
		number++
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if err := read(line); err != nil {
			return fmt.Errorf("line %d (%s): %w", number, line, err)
		}
	}
	return nil
}
