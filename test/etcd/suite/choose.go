package main

import (
	"cmp"
	"regexp"
	"slices"
	"strings"
	"time"
)

// slice chooses cases that take about the budget together: from each function its quickest case, then from each the
// next quickest, and so on, in each round the quickest first. The same cases always give the same slice.
func slice(cases []testCase, budget time.Duration) []testCase {
	rounds := map[string]int{}
	type ranked struct {
		testCase
		round int
	}
	order := make([]ranked, 0, len(cases))
	byTime := slices.SortedFunc(slices.Values(cases), func(a, b testCase) int {
		return cmp.Or(cmp.Compare(a.Took, b.Took), cmp.Compare(a.Name, b.Name))
	})
	for _, c := range byTime {
		key := c.Set + c.function()
		order = append(order, ranked{c, rounds[key]})
		rounds[key]++
	}
	slices.SortStableFunc(order, func(a, b ranked) int { return cmp.Compare(a.round, b.round) })
	var chosen []testCase
	for _, c := range order {
		if c.Took > budget {
			continue
		}
		budget -= c.Took
		chosen = append(chosen, c.testCase)
	}
	return chosen
}

// byFunction groups cases by test function, in the order of their names.
func byFunction(cases []testCase) [][]testCase {
	sorted := slices.SortedFunc(slices.Values(cases), func(a, b testCase) int { return cmp.Compare(a.Name, b.Name) })
	var groups [][]testCase
	for _, c := range sorted {
		if last := len(groups) - 1; last >= 0 && groups[last][0].function() == c.function() {
			groups[last] = append(groups[last], c)
		} else {
			groups = append(groups, []testCase{c})
		}
	}
	return groups
}

// runPattern is the -test.run argument that selects the cases, all of one function. It may select more, which are run
// and not counted: Go matches each level of subtests by itself.
func runPattern(cases []testCase) string {
	var levels [][]string
	shortest := -1
	for _, c := range cases {
		elements := strings.Split(c.Name, "/")[1:]
		if shortest < 0 || len(elements) < shortest {
			shortest = len(elements)
		}
		for i, e := range elements {
			if i == len(levels) {
				levels = append(levels, nil)
			}
			if quoted := regexp.QuoteMeta(e); !slices.Contains(levels[i], quoted) {
				levels[i] = append(levels[i], quoted)
			}
		}
	}
	var pattern []string
	for _, alternatives := range levels[:shortest] {
		slices.Sort(alternatives)
		pattern = append(pattern, "^("+strings.Join(alternatives, "|")+")$")
	}
	return strings.Join(pattern, "/")
}
