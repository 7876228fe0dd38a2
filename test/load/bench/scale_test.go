package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"go.etcd.io/etcd/api/v3/mvccpb"

	"github.com/quire-db/quire/test/load/proc"
)

func TestObjectsAreInKeyOrder(t *testing.T) {
	s := newObjects(12_345, kib, pageSize)
	for i := range s.n {
		if bytes.Compare(s.key(i), s.end(i+1)) >= 0 {
			t.Fatalf("key %d, %q, is not before %q", i, s.key(i), s.end(i+1))
		}
	}
}

func TestOrderTakesEachOnce(t *testing.T) {
	for _, n := range []int{1, 2, 256, 1000, 20_000, 50_000} {
		for round := range 3 {
			seen := make([]bool, n)
			next := order(n, round)
			for k := range n {
				if seen[next(k)] {
					t.Fatalf("of %d, round %d: %d comes twice", n, round, next(k))
				}
				seen[next(k)] = true
			}
		}
	}
}

func TestLostDataIsFound(t *testing.T) {
	store := func() (*objects, []*mvccpb.KeyValue) {
		s := newObjects(3, kib, pageSize)
		var kvs []*mvccpb.KeyValue
		for i := range s.n {
			s.revs[i] = int64(10 + i)
			kvs = append(kvs, &mvccpb.KeyValue{Key: s.key(i), ModRevision: s.revs[i]})
		}
		return s, kvs
	}
	s, kvs := store()
	if n, err := s.compare(kvs, 0, 3); n != 0 || err != nil {
		t.Errorf("a whole store: %d newer, %v", n, err)
	}
	kvs[1].ModRevision = 20
	if n, err := s.compare(kvs, 0, 3); n != 1 || err != nil || s.revs[1] != 20 {
		t.Errorf("a newer key: %d newer, %v, noted as %d", n, err, s.revs[1])
	}
	for what, damage := range map[string]func(kvs []*mvccpb.KeyValue) []*mvccpb.KeyValue{
		"a key is missing":   func(kvs []*mvccpb.KeyValue) []*mvccpb.KeyValue { return kvs[1:] },
		"a key is another":   func(kvs []*mvccpb.KeyValue) []*mvccpb.KeyValue { kvs[2].Key = []byte("other"); return kvs },
		"a write is lost":    func(kvs []*mvccpb.KeyValue) []*mvccpb.KeyValue { kvs[0].ModRevision--; return kvs },
		"a key is too often": func(kvs []*mvccpb.KeyValue) []*mvccpb.KeyValue { return append(kvs, kvs[2]) },
	} {
		s, kvs := store()
		if _, err := s.compare(damage(kvs), 0, 3); !errors.Is(err, errDataLost) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestServerThatLostDataHasNoFigures(t *testing.T) {
	got := tellWithVerify(t, fmt.Errorf("%w: a key", errDataLost))
	if !strings.Contains(got, "| load | s | fails: verify: data is lost: a key |") || !strings.Contains(got, "| list | s | fails: verify: data is lost") {
		t.Errorf("the table is\n%s", got)
	}
}

func TestServerThatEndsKeepsItsFigures(t *testing.T) {
	got := tellWithVerify(t, errors.New("no connection"))
	if !strings.Contains(got, "| load | s | 1.00 |") || !strings.Contains(got, "| list | s | fails: not reached: verify failed: no connection |") {
		t.Errorf("the table is\n%s", got)
	}
}

// tellWithVerify gives the table of a short story in whose middle the keys are looked for, with that outcome.
func tellWithVerify(t *testing.T, outcome error) string {
	t.Helper()
	works := func(context.Context) ([]float64, error) { return []float64{1}, nil }
	one := []metric{{unit: "s"}}
	steps := []step{
		{name: "load", metrics: one, needed: true, run: works},
		{name: "verify", needed: true, run: func(context.Context) ([]float64, error) { return nil, outcome }},
		{name: "list", metrics: one, run: works},
	}
	var rows []row
	for _, s := range steps {
		rows = append(rows, row{w: workload{name: s.name, metrics: s.metrics}, cells: map[string]*cell{}})
	}
	told := &story{o: &options{only: regexp.MustCompile("")}, kind: "quire"}
	if err := told.tell(t.Context(), steps, rows); err != nil {
		t.Fatal(err)
	}
	return table([]string{"quire"}, rows, 1)
}

func TestExtents(t *testing.T) {
	got, err := parseExtents("1m,20g", nil, 20)
	if err != nil || len(got) != 2 || got[0].keys != 50_000 || got[1].minBytes != 1<<30 || strings.Join(got[1].servers, ",") != "quire" {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := parseExtents("20g", []string{"etcd"}, 1); err != nil || strings.Join(got[0].servers, ",") != "etcd" || got[0].minBytes != 20<<30 {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{"2m", "1m,", "20g,x"} {
		if _, err := parseExtents(bad, nil, 1); err == nil {
			t.Errorf("-scale=%s was accepted", bad)
		}
	}
	if _, err := parseExtents("20g", nil, 10_000); err == nil {
		t.Error("a set smaller than its clients was accepted")
	}
}

// A table that cannot be written after an hour would be a pity.
func TestDocumentHasPlacesForTheTables(t *testing.T) {
	root, err := proc.RepoRoot()
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile(filepath.Join(root, "docs", "performance.md"))
	if err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(t.TempDir(), "performance.md")
	if err := os.WriteFile(copied, doc, 0o600); err != nil {
		t.Fatal(err)
	}
	all := []marks{benchMarks, profileMarks}
	for _, e := range extents {
		all = append(all, e.marks)
	}
	for _, m := range all {
		if err := insert(copied, m, "text"); err != nil {
			t.Error(err)
		}
	}
}
