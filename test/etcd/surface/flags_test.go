package surface

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// example is a value for flags whose help shows none that could be given.
var example = map[string]string{
	"max-concurrent-streams": "1000", "memory-mlock": "true", "enable-grpc-gateway": "true", "backend-batch-interval": "100ms",
	"bcrypt-cost": "10", "auth-token-ttl": "300", "compaction-batch-limit": "1000", "compaction-sleep-interval": "1ms",
	"downgrade-check-time": "5s", "snapshot-catchup-entries": "5000", "bootstrap-defrag-threshold-megabytes": "100",
}

// TestFlagsOfEtcd: every flag in a real etcd's help is taken by quire, with its default value, if etcd itself takes it; and
// docs/compatibility.md has a row for it.
func TestFlagsOfEtcd(t *testing.T) {
	t.Parallel()
	theirs, ours := etcd(t), quire(t)
	help, err := exec.Command(theirs.path, "--help").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join("..", "..", "..", "docs", "compatibility.md"))
	if err != nil {
		t.Fatal(err)
	}
	flags := regexp.MustCompile(`(?m)^  --([a-z0-9-]+)(?: '?([^'\n]*)'?)?$`).FindAllStringSubmatch(string(help), -1)
	if len(flags) < 110 {
		t.Fatalf("etcd's help has only %d flags", len(flags))
	}
	dir := t.TempDir()
	try := func(p program, flag string) (ok bool, output string) {
		// The version is printed once the command line was understood.
		cmd := exec.Command(p.path, flag, "--version")
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		return err == nil && strings.Contains(string(out), "etcd Version: 3.7"), string(out)
	}
	taken := 0
	for _, f := range flags {
		name, value := f[1], f[2]
		if name == "config-file" { // with a file, nothing else is read
			continue
		}
		if v, ok := example[name]; ok {
			value = v
		}
		flag := fmt.Sprintf("--%s=%s", name, value)
		want, _ := try(theirs, flag)
		got, output := try(ours, flag)
		if want {
			taken++
		}
		if got != want {
			t.Errorf("%s is taken by etcd: %t, by quire: %t: %s", flag, want, got, output)
		}
		if row := fmt.Sprintf("| `--%s` |", name); !strings.Contains(string(page), row) {
			t.Errorf("docs/compatibility.md has no row that begins with %q", row)
		}
	}
	if taken < 110 {
		t.Errorf("etcd itself takes only %d of its flags with their defaults", taken)
	}
}
