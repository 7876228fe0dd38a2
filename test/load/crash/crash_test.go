package crash

import (
	"flag"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/quire-db/quire/test/load/proc"
)

var (
	cycles     = flag.Int("cycles", 30, "how often the server is killed")
	seed       = flag.Uint64("seed", 0, "seed of the run; 0 draws one")
	checkEvery = flag.Int("check-every", 5, "run `quire check` before every n-th restart; 0: never")
)

// TestNothingAcknowledgedIsLost is the crash test: see the package's comment. QUIRE_BIN names another binary than
// bin/quire; one that is called etcd is taken for etcd itself. With QUIRE_STORAGE=sqlraft quire is the only member of a cluster.
func TestNothingAcknowledgedIsLost(t *testing.T) {
	binary := os.Getenv("QUIRE_BIN")
	if binary == "" {
		root, err := proc.RepoRoot()
		if err != nil {
			t.Fatal(err)
		}
		binary = filepath.Join(root, "bin", "quire")
	}
	if _, err := os.Stat(binary); err != nil {
		t.Fatalf("no server to kill: %v (build it with `make build`, or name one in QUIRE_BIN)", err)
	}
	storage := os.Getenv("QUIRE_STORAGE")
	if storage != "" && storage != "sqlraft" {
		t.Fatalf("QUIRE_STORAGE is %q; it may be sqlraft", storage)
	}
	o := options{
		binary: binary, isMember: storage == "sqlraft", isEtcd: filepath.Base(binary) == "etcd", cycles: *cycles, seed: *seed, checkEvery: *checkEvery, logf: t.Logf,
	}
	if o.seed == 0 {
		o.seed = rand.Uint64()
	}
	if o.isEtcd {
		o.checkEvery = 0
	}
	t.Logf("seed %d (repeat with -args -seed %d; the moments of the kills also depend on the machine)", o.seed, o.seed)
	r, err := newRun(o)
	if err != nil {
		t.Fatal(err)
	}
	finding := r.all()
	if err := r.close(finding != nil); err != nil {
		t.Error(err)
	}
	if finding != nil {
		t.Fatalf("%v\nseed %d; the database and the server's log are kept in %s", finding, o.seed, r.spec.Dir)
	}
	t.Log(r.summary())
}
