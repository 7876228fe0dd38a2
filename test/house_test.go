// Package test holds the black-box tests, and here the house rules: what the
// layout and the imports of the repository promise (docs/design.md says why).
package test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const (
	module   = "github.com/quire-db/quire"
	maxLines = 800
)

// topFolders are all the folders that the repository has at its top.
var topFolders = []string{"backend", "cmd", "docs", "etcdapi", "migrations", "sqlraft", "test", "watchpoller"}

// mayImport says which of quire's own folders a folder may import.
var mayImport = map[string][]string{
	"cmd":         {"backend", "etcdapi", "migrations", "sqlraft", "watchpoller"},
	"etcdapi":     {"backend"},
	"sqlraft":     {"backend"},
	"watchpoller": {"backend"},
	"backend":     {"migrations"},
	"migrations":  {},
	"test":        {"test"},
}

// bannedNames say nothing about what is inside.
var bannedNames = []string{"base", "common", "helper", "helpers", "misc", "shared", "types", "util", "utils"}

// goPackage is what `go list -json` says about a package.
type goPackage struct {
	ImportPath string
	Name       string
	Imports    []string
}

func TestImportsPointOneWay(t *testing.T) {
	packages := listPackages(t)
	if len(packages) < 5 {
		t.Fatalf("go list found only %d packages", len(packages))
	}
	for _, p := range packages {
		for _, imported := range p.Imports {
			if complaint := forbiddenImport(p.ImportPath, imported); complaint != "" {
				t.Error(complaint)
			}
		}
	}
}

// forbiddenImport returns what is wrong with an import, "" when nothing is.
func forbiddenImport(importer, imported string) string {
	from := folder(importer)
	if imported == "google.golang.org/grpc" && from != "etcdapi" && from != "cmd" && from != "test" {
		return fmt.Sprintf("%s imports %s: only etcdapi speaks gRPC", importer, imported)
	}
	// migrations hands goose a slog.Logger that discards all.
	logs := imported == "log" || imported == "log/slog" && from != "migrations" || imported == "go.uber.org/zap"
	if logs && slices.Contains([]string{"backend", "migrations", "sqlraft", "watchpoller"}, from) {
		return fmt.Sprintf("%s imports %s: nothing below etcdapi logs", importer, imported)
	}
	to := folder(imported)
	if to == "" || to == from {
		return ""
	}
	if allowed, known := mayImport[from]; !known || !slices.Contains(allowed, to) {
		return fmt.Sprintf("%s imports %s: %s may import %v", importer, imported, from, allowed)
	}
	return ""
}

// folder returns the folder at the top of the repository that a package of
// ours lies in, "" for a package that is not ours.
func folder(importPath string) string {
	inside, ours := strings.CutPrefix(importPath, module+"/")
	if !ours {
		return ""
	}
	top, _, _ := strings.Cut(inside, "/")
	return top
}

func TestForbiddenImportsAreFound(t *testing.T) {
	for _, c := range []struct {
		importer, imported string
		forbidden          bool
	}{
		{"backend", module + "/migrations", false},
		{"backend", module + "/etcdapi", true},
		{"backend", "google.golang.org/grpc", true},
		{"backend", "log/slog", true},
		{"backend", "database/sql", false},
		{"cmd/quire", module + "/watchpoller", false},
		{"cmd/quire", module + "/test/house", true},
		{"etcdapi", module + "/backend", false},
		{"etcdapi", module + "/watchpoller", true},
		{"etcdapi", "google.golang.org/grpc", false},
		{"watchpoller", module + "/sqlraft", true},
		{"migrations", module + "/backend", true},
		{"newfolder", module + "/backend", true},
	} {
		complaint := forbiddenImport(module+"/"+c.importer, c.imported)
		if (complaint != "") != c.forbidden {
			t.Errorf("%s imports %s: %q, want forbidden %t", c.importer, c.imported, complaint, c.forbidden)
		}
	}
}

func TestPackageNamesSaySomething(t *testing.T) {
	for _, p := range listPackages(t) {
		for element := range strings.SplitSeq(strings.TrimPrefix(p.ImportPath, module), "/") {
			if slices.Contains(bannedNames, element) || slices.Contains(bannedNames, p.Name) {
				t.Errorf("package %s (%s): the name says nothing about what is inside", p.ImportPath, p.Name)
				break
			}
		}
	}
}

func TestTopFolders(t *testing.T) {
	entries, err := os.ReadDir(root(t))
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, entry := range entries {
		name := entry.Name()
		ignored := strings.HasPrefix(name, ".") || name == "bin" || // built, see .gitignore
			strings.HasSuffix(name, ".etcd") || strings.HasSuffix(name, ".quire") // data of a server that ran here
		if entry.IsDir() && !ignored {
			found = append(found, name)
		}
	}
	if !slices.Equal(found, topFolders) {
		t.Errorf("the folders at the top are %v, want %v", found, topFolders)
	}
}

func TestFilesAreOneConceptEach(t *testing.T) {
	files := 0
	walkFiles(t, func(name string, text []byte) {
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") || generated.Match(text) {
			return
		}
		files++
		if lines := bytes.Count(text, []byte("\n")); lines > maxLines {
			t.Errorf("%s has %d lines, more than %d: look for the second concept", name, lines, maxLines)
		}
		if base := strings.TrimSuffix(path.Base(name), ".go"); slices.Contains(bannedNames, base) {
			t.Errorf("%s: the name says nothing about what is inside", name)
		}
	})
	if files < 10 {
		t.Fatalf("looked at only %d files", files)
	}
}

var generated = regexp.MustCompile(`(?m)^// Code generated .* DO NOT EDIT\.$`)

// unfinished is written so that this file does not match.
var unfinished = regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME|XX` + `X)\b`)

func TestNothingIsLeftUnfinished(t *testing.T) {
	walkFiles(t, func(name string, text []byte) {
		switch path.Ext(name) {
		case ".go", ".sql", ".mod", ".sh", "":
		default:
			return
		}
		for i, line := range bytes.Split(text, []byte("\n")) {
			if unfinished.Match(line) {
				t.Errorf("%s:%d: open an issue instead: %s", name, i+1, bytes.TrimSpace(line))
			}
		}
	})
}

// machinePath is a path of the machines that quire is written on; such a path
// works for nobody else.
var machinePath = regexp.MustCompile(`/wo` + `rk/(main|shared)|/ro` + `ot/`)

func TestNoMachinePaths(t *testing.T) {
	walkFiles(t, func(name string, text []byte) {
		if found := machinePath.Find(text); found != nil {
			t.Errorf("%s names %s, which other machines do not have", name, found)
		}
	})
}

// walkFiles calls visit for every file of the repository, nested modules
// included, with its slash-separated path from the root.
func walkFiles(t *testing.T, visit func(name string, text []byte)) {
	t.Helper()
	top := root(t)
	err := filepath.WalkDir(top, func(file string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(top, file)
		if err != nil {
			return err
		}
		name = filepath.ToSlash(name)
		if entry.IsDir() {
			if name == "bin" || name == ".git" || strings.HasSuffix(name, ".etcd") || strings.HasSuffix(name, ".quire") {
				return filepath.SkipDir
			}
			return nil
		}
		if !entry.Type().IsRegular() || path.Ext(name) == ".test" || path.Ext(name) == ".prof" {
			return nil
		}
		text, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // another test's temporary file
		}
		if err != nil {
			return err
		}
		visit(name, text)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func root(t *testing.T) string {
	t.Helper()
	top, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(top, "go.mod")); err != nil {
		t.Fatalf("this test has to run in the folder it lies in: %v", err)
	}
	return top
}

// listPackages lists the packages of quire's own module.
func listPackages(t *testing.T) []goPackage {
	t.Helper()
	command := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Name,Imports", "./...")
	command.Dir = root(t)
	var stderr bytes.Buffer
	command.Stderr = &stderr
	output, err := command.Output()
	if err != nil {
		t.Fatalf("%v: %v\n%s", command, err, stderr.Bytes())
	}
	var packages []goPackage
	decoder := json.NewDecoder(bytes.NewReader(output))
	for {
		var p goPackage
		err := decoder.Decode(&p)
		if errors.Is(err, io.EOF) {
			return packages
		}
		if err != nil {
			t.Fatalf("reading what go list says: %v", err)
		}
		packages = append(packages, p)
	}
}
