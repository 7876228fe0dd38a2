package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// serverName is what etcd's tests call the server.
const serverName = "etcd"

// packages of etcd's tests that run against programs.
var packages = []string{"common", "e2e"}

// workbench is the directory that etcd's tests run in: the programs, the certificates, and where each package stands.
type workbench struct {
	dir string
}

// newWorkbench puts the programs where etcd's tests look for them. peers has etcdctl and etcdutl, fixtures the
// certificates of etcd's tests.
func newWorkbench(peers, fixtures string, server serverConfig) (*workbench, error) {
	dir, err := os.MkdirTemp("", "etcd-suite-")
	if err != nil {
		return nil, err
	}
	w := &workbench{dir: dir}
	self, err := os.Executable()
	if err != nil {
		return nil, errors.Join(err, w.remove())
	}
	server.Calls = w.calls()
	config, err := json.Marshal(server)
	if err != nil {
		return nil, errors.Join(err, w.remove())
	}
	steps := []func() error{
		func() error { return os.Mkdir(w.bin(), 0o700) },
		func() error { return os.Symlink(self, filepath.Join(w.bin(), serverName)) },
		func() error { return os.WriteFile(filepath.Join(w.bin(), serverConfigFile), config, 0o600) },
		func() error { return os.Symlink(fixtures, filepath.Join(dir, "fixtures")) },
	}
	for _, program := range []string{"etcdctl", "etcdutl"} {
		steps = append(steps, func() error {
			return os.Symlink(filepath.Join(peers, program), filepath.Join(w.bin(), program))
		})
	}
	for _, pkg := range packages {
		steps = append(steps, func() error { return os.Mkdir(w.packageDir(pkg), 0o700) })
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return nil, errors.Join(fmt.Errorf("preparing etcd's tests: %w", err), w.remove())
		}
	}
	return w, nil
}

func (w *workbench) bin() string                  { return filepath.Join(w.dir, "bin") }
func (w *workbench) calls() string                { return filepath.Join(w.dir, "calls") }
func (w *workbench) packageDir(pkg string) string { return filepath.Join(w.dir, pkg) }
func (w *workbench) remove() error                { return os.RemoveAll(w.dir) }
