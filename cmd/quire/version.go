package main

import (
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
)

// Set by the linker: -ldflags "-X main.version=v1.2.3 -X main.gitSHA=abcdef0". Without it, what the Go
// toolchain noted about the module and the commit stands in.
var (
	version string
	gitSHA  string
)

// buildVersion returns quire's own version and the commit it was built from.
func buildVersion() (quire, sha string) {
	quire, sha = version, gitSHA
	if info, ok := debug.ReadBuildInfo(); ok {
		if quire == "" {
			quire = info.Main.Version
		}
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" && sha == "" {
				sha = s.Value
			}
		}
	}
	if quire == "" {
		quire = "(devel)"
	}
	if sha == "" {
		sha = "Not provided"
	}
	return quire, sha
}

// printVersion writes etcd's four lines, which its test framework and its users' scripts parse (the first must
// begin with "etcd Version:"), and then quire's own.
func printVersion(w io.Writer, etcdVersion string) error {
	quire, sha := buildVersion()
	_, err := fmt.Fprintf(w, "etcd Version: %s\nGit SHA: %s\nGo Version: %s\nGo OS/Arch: %s/%s\nquire Version: %s\n",
		etcdVersion, sha, runtime.Version(), runtime.GOOS, runtime.GOARCH, quire)
	return err
}
