package k8s

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/quire-db/quire/test/postgres"
)

const (
	haPlanes  = 3
	haWriters = 2 // of each resource, through each API server
	haPause   = 60 * time.Millisecond

	// recoveryLimit is how long writes may be interrupted, on a machine that is busy.
	recoveryLimit = 15 * time.Second
)

// haResources come to the API servers' clients on both ways: straight from
// quire, and from the watch cache.
var haResources = []resource{configMaps, secrets}

// TestHighlyAvailable is the recipe of docs/postgres.md: a primary with a
// synchronous standby, three quires on them, three API servers each on its
// own quire. While clients work through all three, a quire is killed, and the
// primary is stopped and its standby promoted. It claims: nothing that was
// acknowledged is lost, watches through each API server saw every change once
// and in order, none of them had to list again, the leader of an election
// stays, writes go on by themselves, and in the end all three show the same.
func TestHighlyAvailable(t *testing.T) {
	if filepath.Base(binary(t, "QUIRE_TEST_SERVER", "bin/quire")) == "etcd" {
		t.Skip("etcd has no such thing")
	}
	db := startReplicatedDatabase(t)
	planes := startPlanes(t, db.storage)
	namespace := planes[0].newNamespace(t)
	load := startLoad(t, planes, namespace)
	leader := load.election.leader(t, planes)
	load.progress(t, "before any fault", planes, 50)
	initializations := cacheInitializations(t, planes)

	// The leader's, so that its election is concerned as well.
	killed := planes[leader]
	others := slices.DeleteFunc(slices.Clone(planes), func(cp *controlPlane) bool { return cp == killed })
	load.fault(t, "quire "+killed.name+" is killed and restarted", func() {
		killed.killStore(t)
		begin := time.Now()
		load.progress(t, "while "+killed.name+" is away", others, 20) // its leader has to be heard again in time
		killed.startStore(t)
		t.Logf("%s was away for %v", killed.name, time.Since(begin).Round(time.Millisecond))
	})
	load.fault(t, "the primary is stopped and the standby promoted", func() { db.failOver(t) })
	// The quires are those of before: each went on by itself.
	load.stop()
	if t.Failed() {
		return
	}
	load.check(t)
	load.election.check(t, planes)
	for i, now := range cacheInitializations(t, planes) {
		for resource, count := range initializations[i] {
			if now[resource] != count {
				t.Errorf("%s: the API server has filled its cache of %s again, %v times since before the faults", planes[i].name, resource, now[resource]-count)
			}
		}
	}
	t.Run("CachesAreConsistent", func(t *testing.T) {
		for _, cp := range planes {
			t.Run(cp.name, func(t *testing.T) {
				t.Parallel()
				testConsistencyChecks(t, cp, secrets)
			})
		}
	})
	for _, cp := range planes {
		testLogs(t, cp)
		checkWatchesGoOn(t, cp)
	}
	for _, cp := range planes {
		cp.apiserver.kill()
		cp.store.signal(t, syscall.SIGTERM, 30*time.Second)
	}
	planes[0].checkStore(t)
}

// replicatedDatabase is a primary and its synchronous standby.
type replicatedDatabase struct {
	primary, standby *postgres.Server
	storage          string // names both
}

// startReplicatedDatabase does what docs/postgres.md says, client certificates
// included.
func startReplicatedDatabase(t *testing.T) *replicatedDatabase {
	t.Helper()
	db := &replicatedDatabase{primary: postgres.New(t, postgres.Options{TLS: postgres.ClientCertificates})}
	err := db.primary.Exec(t.Context(), postgres.Superuser,
		"CREATE ROLE quire LOGIN",
		"CREATE DATABASE kube OWNER quire ENCODING 'UTF8' TEMPLATE template0")
	if err != nil {
		t.Fatal(err)
	}
	if db.standby, err = db.primary.Standby(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of the standby's log:\n%s", db.standby.LogTail(4000))
		}
		if err := db.standby.Stop(); err != nil {
			t.Errorf("stopping the standby: %v", err)
		}
	})
	certificate, err := db.primary.Authority.ClientParameters("quire")
	if err != nil {
		t.Fatal(err)
	}
	db.storage = db.primary.DSNAt(db.primary.Address+","+db.standby.Address, "kube", "quire", certificate...)
	return db
}

func (db *replicatedDatabase) failOver(t *testing.T) {
	t.Helper()
	begin := time.Now()
	if err := db.primary.StopImmediate(); err != nil {
		t.Fatal(err)
	}
	stopped := time.Now()
	if err := db.standby.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("the primary was gone within %v, the standby a primary %v later", stopped.Sub(begin).Round(time.Millisecond), time.Since(stopped).Round(time.Millisecond))
}

// startPlanes starts the quires and the API servers, all of which begin on an
// empty database at about the same time.
func startPlanes(t *testing.T, storage string) []*controlPlane {
	t.Helper()
	authority := newControlPlaneAuthority(t)
	var planes []*controlPlane
	for i := range haPlanes {
		cp := newControlPlane(t, fmt.Sprintf("q%d", i+1), i+1, authority, storage)
		cp.startStore(t)
		cp.launchAPIServer(t, cp)
		planes = append(planes, cp)
	}
	for _, cp := range planes {
		cp.waitForAPIServer(t)
		cp.checkEtcdChecks(t, true)
	}
	return planes
}

// load is everybody who works through the control planes during the faults.
type load struct {
	planes    []*controlPlane
	namespace string

	answers   []*answers // of each plane
	followed  [][]*changes
	informers []*informers
	election  *election
	writers   []*writer
	counters  []*counter

	stop func() // ends writers and counters and waits for them
}

func startLoad(t *testing.T, planes []*controlPlane, namespace string) *load {
	t.Helper()
	l := &load{planes: planes, namespace: namespace, followed: make([][]*changes, len(haResources))}
	empty, err := configMaps.in(planes[0], namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	start := revisionOf(t, empty.GetResourceVersion())
	createCounter(t, planes[0], namespace)
	for _, cp := range planes {
		for i, r := range haResources {
			l.followed[i] = append(l.followed[i], follow(t, cp, r, namespace, start))
		}
		l.informers = append(l.informers, startInformers(t, cp, namespace, haResources))
	}
	l.election = startElection(t, planes, namespace)

	ended := make(chan struct{})
	var running sync.WaitGroup
	l.stop = sync.OnceFunc(func() {
		close(ended)
		running.Wait()
	})
	t.Cleanup(l.stop)
	for i, cp := range planes {
		a := &answers{}
		l.answers = append(l.answers, a)
		for _, r := range haResources {
			for j := range haWriters {
				w := newWriter(cp, r, namespace, 10*i+j)
				w.pause, w.answers = haPause, a
				l.writers = append(l.writers, w)
				running.Go(func() { w.run(t, ended) })
			}
		}
		c := &counter{cp: cp, namespace: namespace, pause: haPause, answered: map[int64]string{}}
		l.counters = append(l.counters, c)
		running.Go(func() { c.run(t, ended) })
	}
	return l
}

// progress waits until so many writes were acknowledged through each of these
// planes.
func (l *load) progress(t *testing.T, when string, planes []*controlPlane, writes int64) {
	t.Helper()
	before := make([]int64, len(planes))
	for i, cp := range planes {
		before[i] = l.acknowledged(cp)
	}
	for i, cp := range planes {
		eventually(t, time.Minute, func() (bool, string) {
			n := l.acknowledged(cp) - before[i]
			return n >= writes, fmt.Sprintf("%s, only %d writes were acknowledged through %s", when, n, cp.name)
		})
	}
}

// acknowledged is how many writes were, through one plane.
func (l *load) acknowledged(cp *controlPlane) int64 {
	var own []*writer
	for _, w := range l.writers {
		if w.cp == cp {
			own = append(own, w)
		}
	}
	return acknowledged(own)
}

// fault does something bad, waits until writes go on through each plane, and
// logs what clients noticed.
func (l *load) fault(t *testing.T, what string, do func()) {
	t.Helper()
	unknown := l.unanswered()
	for _, a := range l.answers {
		a.begin()
	}
	do()
	l.progress(t, "after: "+what, l.planes, 50)
	for i, cp := range l.planes {
		gap := l.answers[i].longest()
		t.Logf("%s: through %s nothing was acknowledged for %v", what, cp.name, gap.Round(time.Millisecond))
		if gap > recoveryLimit {
			t.Errorf("%s: through %s nothing was acknowledged for %v, want %v at most", what, cp.name, gap, recoveryLimit)
		}
	}
	t.Logf("%s: %d writes ended without an answer", what, l.unanswered()-unknown)
}

func (l *load) unanswered() (total int64) {
	for _, w := range l.writers {
		total += w.unknown.Load()
	}
	return total
}

// check holds what was acknowledged, what watches delivered and what lists show
// against each other. REQUIRES: the load has stopped.
func (l *load) check(t *testing.T) {
	t.Helper()
	for i, r := range haResources {
		last, err := r.in(l.planes[0], l.namespace).Create(t.Context(), r.object("zzz-last", "last"), metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		end := revisionOf(t, last.GetResourceVersion())
		history := l.followed[i][0].through(t, end)
		checkHistory(t, history)
		for _, w := range l.writers {
			if w.resource.kind == r.kind {
				w.checkDelivered(t, history)
			}
		}
		if r.kind == configMaps.kind {
			checkCounters(t, l.counters, history)
		}
		want := stateAt(history, end)
		for j, cp := range l.planes {
			if got := l.followed[i][j].through(t, end); !slices.Equal(got, history) {
				t.Errorf("the watch of %s through %s delivered %d changes, want the %d that came through %s, in their order", r.Resource, cp.name, len(got), len(history), l.planes[0].name)
			}
			exact := listPages(t, cp, r, l.namespace, &end)
			if exact.revision != end || !maps.Equal(exact.items, want) {
				compareStates(t, fmt.Sprintf("%s through %s at revision %d (the list says %d)", r.Resource, cp.name, end, exact.revision), exact.items, want)
			}
			compareStates(t, fmt.Sprintf("%s through %s now", r.Resource, cp.name), listPages(t, cp, r, l.namespace, nil).items, want)
			l.informers[j].checkEqual(t, r, want)
		}
		t.Logf("%s: %d changes", r.Resource, len(history))
	}
	for _, w := range l.writers {
		for _, cp := range l.planes {
			w.checkState(t, cp)
		}
	}
	for j, cp := range l.planes {
		if relists := l.informers[j].relists; len(relists) > 0 {
			t.Errorf("informers through %s had to list again: %v", cp.name, relists)
		}
	}
	t.Logf("%d acknowledged writes, %d without an answer", acknowledged(l.writers), l.unanswered())
}

// cacheInitializations is how often each API server has filled the watch cache
// of each resource: once, unless the cache could not go on where it was.
func cacheInitializations(t *testing.T, planes []*controlPlane) []map[string]float64 {
	t.Helper()
	var all []map[string]float64
	for _, cp := range planes {
		counts, err := cp.countsByResource(t.Context(), "apiserver_watch_cache_initializations_total", "")
		if err != nil {
			t.Fatal(err)
		}
		if counts[secrets.Resource] == 0 {
			t.Fatalf("%s: the API server does not count how often it fills its caches: %v", cp.name, counts)
		}
		all = append(all, counts)
	}
	return all
}

// watchFailed is what the API server prints when a watch of its own on the store
// ended with an error or could not go on where it was. (That a revision is
// compacted it prints for other reasons too: its consistency check tries to read
// idle caches' old revisions.)
var watchFailed = regexp.MustCompile(`watch chan error|Failed to watch|(?i:watch.* ended with)|too old resource version`)

func checkWatchesGoOn(t *testing.T, cp *controlPlane) {
	t.Helper()
	text, err := os.ReadFile(cp.apiserver.logPath)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if watchFailed.MatchString(line) {
			t.Errorf("%s: %s", cp.apiserver.name, line)
		}
	}
}

// answers is when writes through one control plane were acknowledged.
type answers struct {
	mu   sync.Mutex
	last time.Time
	gap  time.Duration // the longest between two
}

// begin forgets what was, and begins a gap.
func (a *answers) begin() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.last, a.gap = time.Now(), 0
}

func (a *answers) note() {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	if !a.last.IsZero() {
		a.gap = max(a.gap, now.Sub(a.last))
	}
	a.last = now
}

// longest is the longest time since begin in which nothing was acknowledged.
func (a *answers) longest() time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	return max(a.gap, time.Since(a.last))
}
