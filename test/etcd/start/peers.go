package start

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
)

// Etcdutl runs etcd's tool for files of etcd, which `make bin/peers/etcdutl` builds, and returns what it prints on stdout.
func Etcdutl(t testing.TB, args ...string) []byte {
	t.Helper()
	_, file, _, ok := runtime.Caller(0)
	if !ok {
		t.Fatal("cannot find the repository")
	}
	path := filepath.Join(filepath.Dir(file), "..", "..", "..", "bin", "peers", "etcdutl")
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("no etcdutl: %v; build it with `make bin/peers/etcdutl`", err)
	}
	out, err := exec.Command(path, args...).Output()
	if err != nil {
		var exit *exec.ExitError
		errors.As(err, &exit)
		t.Fatalf("etcdutl %q: %v\n%s%s", args, err, out, exit.Stderr)
	}
	return out
}

// TempDir is a directory that goes away with the test, in memory where there is room for files.
func TempDir(t testing.TB) string {
	t.Helper()
	return tempDir(t)
}
