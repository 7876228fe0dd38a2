package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

const events = `{"Time":"2026-01-01T00:00:00Z","Action":"start","Package":"p"}
{"Time":"2026-01-01T00:00:01Z","Action":"run","Test":"TestA"}
{"Time":"2026-01-01T00:00:02Z","Action":"run","Test":"TestA/good"}
{"Time":"2026-01-01T00:00:03Z","Action":"pass","Test":"TestA/good"}
{"Time":"2026-01-01T00:00:04Z","Action":"run","Test":"TestA/bad"}
{"Time":"2026-01-01T00:00:05Z","Action":"output","Test":"TestA/bad","Output":"it broke\n"}
{"Time":"2026-01-01T00:00:06Z","Action":"fail","Test":"TestA/bad"}
{"Time":"2026-01-01T00:00:07Z","Action":"fail","Test":"TestA"}
{"Time":"2026-01-01T00:00:07Z","Action":"run","Test":"TestB"}
{"Time":"2026-01-01T00:00:08Z","Action":"run","Test":"TestB/good"}
{"Time":"2026-01-01T00:00:09Z","Action":"pass","Test":"TestB/good"}
{"Time":"2026-01-01T00:00:10Z","Action":"fail","Test":"TestB"}
{"Time":"2026-01-01T00:00:10Z","Action":"run","Test":"TestU"}
{"Time":"2026-01-01T00:00:10Z","Action":"run","Test":"TestU/http://x"}
{"Time":"2026-01-01T00:00:10Z","Action":"pass","Test":"TestU/http://x"}
{"Time":"2026-01-01T00:00:10Z","Action":"pass","Test":"TestU"}
{"Time":"2026-01-01T00:00:10Z","Action":"run","Test":"TestC"}
{"Time":"2026-01-01T00:00:11Z","Action":"skip","Test":"TestC"}
{"Time":"2026-01-01T00:00:11Z","Action":"run","Test":"TestD"}
`

func TestACasePassesOnlyIfItSaysSo(t *testing.T) {
	outcomes, err := readEvents(strings.NewReader(events), "common")
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{
		"common/TestA/good":     true,
		"common/TestA/bad":      false,
		"common/TestB/good":     false, // what is around it failed, for no other case's sake
		"common/TestU/http://x": true,
		"common/TestC":          false, // skipped
		"common/TestD":          false, // never ended
		"common/TestE":          false, // was not there
		"common/TestA":          false, // not a case
	} {
		if got := passed(outcomes, name); got != want {
			t.Errorf("%s passed: %t, want %t", name, got, want)
		}
	}
	if s := story(outcomes, "common/TestA/bad"); s != "it broke\n" {
		t.Errorf("the story is %q", s)
	}
}

func TestSetsFollowFromTheServersStarted(t *testing.T) {
	at := func(second int) time.Time { return time.Date(2026, 1, 1, 0, 0, second, 0, time.UTC) }
	one := call{At: at(1), Args: []string{"--name=a", "--initial-cluster=a=http://x:1"}}
	three := call{At: at(5), Args: []string{"--initial-cluster", "a=http://x:1,b=http://x:2"}}
	version := call{At: at(5), Args: []string{"--version"}}
	for _, c := range []struct {
		name  string
		calls []call
		want  string
	}{
		{"none", nil, singleNode},
		{"before it", []call{one}, singleNode},
		{"of several before it", []call{{At: at(1), Args: three.Args}}, threeNode},
		{"of several before it, of which it asks the version", []call{{At: at(1), Args: three.Args}, version}, threeNode},
		{"of several in it", []call{one, three}, threeNode},
		{"of several after it", []call{one, {At: at(9), Args: three.Args}}, singleNode},
		{"of one in it, of several before", []call{{At: at(1), Args: three.Args}, {At: at(5), Args: one.Args}}, singleNode},
		{"that find each other", []call{{At: at(5), Args: []string{"--discovery-token=x"}}}, threeNode},
	} {
		if got := setOf(&outcome{Begin: at(4), End: at(8)}, c.calls); got != c.want {
			t.Errorf("servers started: %s: %s, want %s", c.name, got, c.want)
		}
	}
}

func TestStorageFlagsFollowTheDataDirectory(t *testing.T) {
	dir := t.TempDir()
	sqlite := serverConfig{Storage: "sqlite"}
	for _, c := range []struct{ args, want []string }{
		{[]string{"--data-dir", dir}, []string{"--storage=sqlite://" + dir + "/quire.db"}},
		{[]string{"--data-dir=/x", "--data-dir=" + dir}, []string{"--storage=sqlite://" + dir + "/quire.db"}},
		{[]string{"--data-dir", dir, "--config-file=x"}, nil},
	} {
		if got, err := storageFlags(sqlite, c.args); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%v: flags %v, %v; want %v", c.args, got, err, c.want)
		}
	}

	pg := serverConfig{Storage: "postgres", DSN: "postgres://x"}
	first, err := storageFlags(pg, []string{"--data-dir=" + dir})
	if err != nil || len(first) != 2 || first[0] != "--storage=postgres://x" {
		t.Fatalf("flags %v, %v", first, err)
	}
	if again, err := storageFlags(pg, []string{"--data-dir=" + dir}); err != nil || !slices.Equal(again, first) {
		t.Errorf("started again: %v, %v, before %v", again, err, first)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if other, err := storageFlags(pg, []string{"--data-dir=" + dir}); err != nil || slices.Equal(other, first) {
		t.Errorf("without its directory: %v, %v, before %v", other, err, first)
	}
}

func TestCallsAreReadAsTheyAreLogged(t *testing.T) {
	file := filepath.Join(t.TempDir(), "calls")
	if calls, err := readCalls(file); err != nil || calls != nil {
		t.Fatalf("without a call: %v, %v", calls, err)
	}
	for _, args := range [][]string{{"--version"}, {"--name=a b", "--x"}} {
		if err := logCall(file, args); err != nil {
			t.Fatal(err)
		}
	}
	calls, err := readCalls(file)
	if err != nil || len(calls) != 2 || !slices.Equal(calls[1].Args, []string{"--name=a b", "--x"}) {
		t.Errorf("calls are %v, %v", calls, err)
	}
}

// A server that a dead test left is a child of this process afterwards, and is killed; one that was there is not.
func TestOrphansAreKilled(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux gives orphans to this process")
	}
	if err := adoptOrphans(); err != nil {
		t.Fatal(err)
	}
	mine := exec.Command("sleep", "1000")
	if err := mine.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := mine.Process.Kill(); err != nil {
			t.Error(err)
		}
		_ = mine.Wait() // it says that it was killed
	}()
	before, err := children()
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	left, err := children()
	if err != nil {
		t.Fatal(err)
	}
	if len(left) != len(before)+1 {
		t.Fatalf("children are %v, before %v: the orphan is not among them", left, before)
	}
	if err := killOrphans(before); err != nil {
		t.Fatal(err)
	}
	after, err := children()
	if err != nil || len(after) != len(before) || !after[mine.Process.Pid] {
		t.Errorf("children are %v, %v; want %v", after, err, before)
	}
}

func TestServerReadsItsConfigurationBesideItsName(t *testing.T) {
	bench, err := newWorkbench(t.TempDir(), t.TempDir(), serverConfig{Binary: "/bin/false", Storage: "sqlite"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := bench.remove(); err != nil {
			t.Error(err)
		}
	}()
	data, err := os.ReadFile(filepath.Join(bench.bin(), serverConfigFile))
	if err != nil {
		t.Fatal(err)
	}
	var c serverConfig
	if err := json.Unmarshal(data, &c); err != nil || c.Binary != "/bin/false" || c.Calls != bench.calls() {
		t.Errorf("configuration %+v, %v", c, err)
	}
	if self, err := os.Readlink(filepath.Join(bench.bin(), serverName)); err != nil || filepath.Base(self) != "suite.test" {
		t.Errorf("the server is %s, %v; want this program", self, err)
	}
}
