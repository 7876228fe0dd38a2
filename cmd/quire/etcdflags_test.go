package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

// TestFlagsWithoutEffectAreDocumented: docs/compatibility.md says "no effect" of the flags that have none, and of no other.
func TestFlagsWithoutEffectAreDocumented(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "..", "docs", "compatibility.md"))
	if err != nil {
		t.Fatal(err)
	}
	said := map[string]bool{}
	for _, row := range regexp.MustCompile("(?m)^\\| `--([a-z0-9-]+)` \\| (.*) \\|$").FindAllStringSubmatch(string(page), -1) {
		said[row[1]] = strings.HasPrefix(row[2], "no effect")
	}
	newFlagSet(&config{}).VisitAll(func(f *pflag.Flag) {
		documented, ok := said[f.Name]
		if _, none := f.Annotations[ineffective]; ok && none != documented {
			t.Errorf("--%s has no effect: %t; docs/compatibility.md says so: %t", f.Name, none, documented)
		}
		delete(said, f.Name)
	})
	delete(said, "discovery") // etcd's help has them, and etcd refuses them
	delete(said, "discovery-proxy")
	for name := range said {
		t.Errorf("docs/compatibility.md has a row for --%s, which there is not", name)
	}
}
