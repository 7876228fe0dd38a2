package k8s

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/tools/cache"
)

const (
	killRounds    = 12
	writersPer    = 3 // of each resource
	keysPerWriter = 12
)

// testRestarts kills the store again and again while writers and informers
// work, and claims: nothing that was acknowledged is lost, revisions never go
// back, an uncached watch sees every acknowledged write, and the informers end
// up with what a fresh list shows.
func testRestarts(t *testing.T, cp *controlPlane) {
	namespace := cp.newNamespace(t)
	empty, err := configMaps.in(cp, namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	start := revisionOf(t, empty.GetResourceVersion())
	// Straight from the store: the API server's etcd client has to find the
	// place again after each kill, with nothing left out and nothing twice.
	followed := follow(t, cp, configMaps, namespace, start)
	informers := startInformers(t, cp, namespace, resources)

	stop := make(chan struct{})
	stopOnce := sync.OnceFunc(func() { close(stop) })
	var writers sync.WaitGroup
	defer func() { // when the test ends early, too
		stopOnce()
		writers.Wait()
	}()
	var all []*writer
	for _, r := range resources {
		for i := range writersPer {
			w := newWriter(cp, r, namespace, i)
			all = append(all, w)
			writers.Go(func() { w.run(t, stop) })
		}
	}
	random := rand.New(rand.NewPCG(uint64(start), 7))
	for round := range killRounds {
		// Let every writer get somewhere, so that each round has
		// acknowledged writes to lose.
		before := acknowledged(all)
		eventually(t, time.Minute, func() (bool, string) {
			return acknowledged(all) >= before+100, fmt.Sprintf("round %d: only %d writes were acknowledged", round, acknowledged(all)-before)
		})
		time.Sleep(time.Duration(random.IntN(300)) * time.Millisecond) // a random moment
		cp.killStore(t)
		if round == 0 {
			cp.checkEtcdChecks(t, false)
		}
		time.Sleep(time.Duration(200+random.IntN(800)) * time.Millisecond) // an outage that the clients notice
		cp.startStore(t)
	}
	before := acknowledged(all)
	eventually(t, time.Minute, func() (bool, string) {
		return acknowledged(all) >= before+100, "writers did not go on after the last restart"
	})
	stopOnce()
	writers.Wait()
	cp.checkEtcdChecks(t, true)
	if t.Failed() {
		return
	}

	last, err := configMaps.in(cp, namespace).Create(t.Context(), configMaps.object("zzz-last", "last"), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	history := followed.through(t, revisionOf(t, last.GetResourceVersion()))
	checkHistory(t, history)
	for _, w := range all {
		w.checkState(t, cp)
		if w.resource.kind == configMaps.kind {
			w.checkDelivered(t, history)
		}
	}
	for _, r := range resources {
		fresh := listPages(t, cp, r, namespace, nil)
		if r.kind == configMaps.kind {
			compareStates(t, "configmaps against the watch that lived through every kill", fresh.items, stateAt(history, fresh.revision))
		}
		informers.checkEqual(t, r, fresh.items)
	}
	total, unknown := acknowledged(all), int64(0)
	for _, w := range all {
		unknown += w.unknown.Load()
	}
	t.Logf("%d kills, %d acknowledged writes, %d writes without an answer", killRounds, total, unknown)
}

func acknowledged(writers []*writer) int64 {
	total := int64(0)
	for _, w := range writers {
		total += w.count.Load()
	}
	return total
}

// writer owns some objects: nobody else writes them, so it knows what they
// have to be.
type writer struct {
	cp        *controlPlane
	resource  resource
	namespace string
	number    int
	random    *rand.Rand

	count   atomic.Int64 // acknowledged writes
	unknown atomic.Int64 // writes that ended with an error, so may have happened

	// state is what was last known of each object: its text, or absent.
	state map[string]string
	// done is every write that happened, in order: those that were answered,
	// and of the others those that a read found. A delete tells no revision.
	done    []change
	newest  int64         // highest revision seen
	pause   time.Duration // after each write
	answers *answers      // nil, or who wants to know when writes are acknowledged
}

func newWriter(cp *controlPlane, r resource, namespace string, number int) *writer {
	return &writer{
		cp: cp, resource: r, namespace: namespace, number: number,
		random: rand.New(rand.NewPCG(uint64(number), 3)),
		state:  map[string]string{},
	}
}

func (w *writer) run(t *testing.T, stop <-chan struct{}) {
	for round := 0; ; round++ {
		select {
		case <-stop:
			return
		default:
		}
		name := fmt.Sprintf("%s%02d", w.prefix(), w.random.IntN(keysPerWriter))
		text := fmt.Sprintf("round %d", round)
		if err := w.write(name, text); err != nil {
			t.Errorf("broke Durable: %s %s, round %d: %v", w.resource.Resource, name, round, err)
			return
		}
		time.Sleep(w.pause) // keeps the load modest
	}
}

// prefix of the names of the writer's objects.
func (w *writer) prefix() string { return fmt.Sprintf("w%d-", w.number) }

// write does one write and, where it had no answer, finds out what became of
// it. Its error is a broken promise, never an outage.
func (w *writer) write(name, text string) error {
	// Longer than quire looks for what became of a write whose answer was lost.
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	client := w.resource.in(w.cp, w.namespace)
	known, present := w.state[name]
	remove := present && w.random.IntN(4) == 0
	var object *unstructured.Unstructured
	var err error
	kind := watch.Modified
	switch {
	case !present:
		kind = watch.Added
		object, err = client.Create(ctx, w.resource.object(name, text), metav1.CreateOptions{})
	case remove:
		kind = watch.Deleted
		err = client.Delete(ctx, name, metav1.DeleteOptions{})
	default:
		object, err = w.resource.update(ctx, client, name, text)
	}
	if err == nil {
		w.count.Add(1)
		if w.answers != nil {
			w.answers.note()
		}
		if remove {
			delete(w.state, name)
			w.done = append(w.done, change{kind: kind, name: name})
			return nil
		}
		w.state[name] = text
		return w.see(kind, object)
	}
	// Even AlreadyExists and NotFound are no answers: they may be the echo of
	// a first attempt that the API server repeated. A read tells.
	w.unknown.Add(1)

	object, err = w.read(name)
	if err != nil {
		return err
	}
	found, there := "", object != nil
	if there {
		found = w.resource.text(object)
	}
	unchanged := there == present && found == known
	happened := remove && !there || !remove && there && found == text
	if !unchanged && !happened {
		return fmt.Errorf("after a write without an answer the object (present %t) is neither as acknowledged before nor as written", there)
	}
	switch {
	case !happened:
	case remove:
		delete(w.state, name)
		w.done = append(w.done, change{kind: kind, name: name})
	default:
		w.state[name] = found
		return w.see(kind, object)
	}
	return nil
}

// read gets the object from the store, nil when there is none, and asks again
// for as long as the store is away.
func (w *writer) read(name string) (*unstructured.Unstructured, error) {
	deadline := time.Now().Add(time.Minute)
	for {
		// A write that the client gave up on may still be on its way through
		// the API server for a moment.
		time.Sleep(100 * time.Millisecond)
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		object, err := w.resource.in(w.cp, w.namespace).Get(ctx, name, metav1.GetOptions{})
		cancel()
		switch {
		case err == nil:
			return object, nil
		case apierrors.IsNotFound(err):
			return nil, nil
		case time.Now().After(deadline):
			return nil, fmt.Errorf("no answer for a minute: %w", err)
		}
	}
}

// see notes a create or an update that happened, with what it made.
func (w *writer) see(kind watch.EventType, object *unstructured.Unstructured) error {
	revision, err := strconv.ParseInt(object.GetResourceVersion(), 10, 64)
	if err != nil {
		return err
	}
	w.newest = max(w.newest, revision)
	w.done = append(w.done, change{kind, object.GetName(), revision, w.resource.text(object)})
	return nil
}

// checkDelivered claims that a watch delivered every write of this writer
// exactly once, in the order in which they were made, and nothing besides.
func (w *writer) checkDelivered(t *testing.T, history []change) {
	t.Helper()
	var delivered []change
	for _, c := range history {
		if strings.HasPrefix(c.name, w.prefix()) {
			delivered = append(delivered, c)
		}
	}
	for i, want := range w.done {
		if i >= len(delivered) {
			t.Errorf("broke Reliable: %s: the write %v, and %d after it, reached no watcher", w.resource.Resource, want, len(w.done)-i-1)
			return
		}
		got := delivered[i]
		if got.kind != want.kind || got.name != want.name || want.kind != watch.Deleted && got != want {
			t.Errorf("broke Reliable, Unique or Ordered: %s: the watch delivered %v where the writer did %v", w.resource.Resource, got, want)
			return
		}
	}
	if len(delivered) > len(w.done) {
		t.Errorf("broke Unique: %s: the watch delivered %v, which nobody did, and %d more", w.resource.Resource, delivered[len(w.done)], len(delivered)-len(w.done)-1)
	}
}

// checkState holds what a control plane shows against what this writer was told.
func (w *writer) checkState(t *testing.T, cp *controlPlane) {
	t.Helper()
	list, err := w.resource.in(cp, w.namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if revision := revisionOf(t, list.GetResourceVersion()); revision < w.newest {
		t.Errorf("a list shows revision %d, but %d had been acknowledged: revisions went back", revision, w.newest)
	}
	found := map[string]string{}
	for i := range list.Items {
		found[list.Items[i].GetName()] = w.resource.text(&list.Items[i])
	}
	for i := range keysPerWriter {
		name := fmt.Sprintf("%s%02d", w.prefix(), i)
		want, wantThere := w.state[name]
		got, there := found[name]
		if there != wantThere || got != want {
			t.Errorf("broke Durable: %s %s: present %t with %q, acknowledged was present %t with %q",
				w.resource.Resource, name, there, got, wantThere, want)
		}
	}
}

// informers are client-go's own caches, one per resource.
type informers struct {
	byKind map[string]cache.SharedIndexInformer

	mu sync.Mutex
	// handled is what the event handlers of each informer saw: the objects
	// that must be there if no event was kept from them.
	handled map[string]map[string]string
	broken  error
	relists []error // why an informer could not go on where it was and had to list again
}

func startInformers(t *testing.T, cp *controlPlane, namespace string, resources []resource) *informers {
	t.Helper()
	factory := dynamicinformer.NewFilteredDynamicSharedInformerFactory(cp.dynamic, 0, namespace, nil)
	result := &informers{byKind: map[string]cache.SharedIndexInformer{}, handled: map[string]map[string]string{}}
	stop := make(chan struct{})
	for _, r := range resources {
		informer := factory.ForResource(r.GroupVersionResource).Informer()
		result.byKind[r.kind] = informer
		result.handled[r.kind] = map[string]string{}
		if _, err := informer.AddEventHandler(result.handler(r)); err != nil {
			t.Fatal(err)
		}
		if err := informer.SetWatchErrorHandlerWithContext(result.watchFailed); err != nil {
			t.Fatal(err)
		}
	}
	factory.Start(stop)
	t.Cleanup(func() {
		close(stop)
		factory.Shutdown()
	})
	for gvr, synced := range factory.WaitForCacheSync(t.Context().Done()) {
		if !synced {
			t.Fatalf("the informer of %s did not sync", gvr.Resource)
		}
	}
	return result
}

// watchFailed is told by client-go why a watch or a list ended.
func (i *informers) watchFailed(ctx context.Context, r *cache.Reflector, err error) {
	if apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
		i.mu.Lock()
		i.relists = append(i.relists, err)
		i.mu.Unlock()
	}
	cache.DefaultWatchErrorHandler(ctx, r, err)
}

// handler records what an event handler sees, and that it could not be: an
// object that is added twice, or changes without having been there.
func (i *informers) handler(r resource) cache.ResourceEventHandler {
	record := func(object any, wasThere, isThere bool, event string) {
		i.mu.Lock()
		defer i.mu.Unlock()
		if unknown, ok := object.(cache.DeletedFinalStateUnknown); ok {
			object = unknown.Obj
		}
		o, ok := object.(*unstructured.Unstructured)
		if !ok {
			i.broken = errors.Join(i.broken, fmt.Errorf("%s: %s with a %T", r.Resource, event, object))
			return
		}
		seen := i.handled[r.kind]
		if _, there := seen[o.GetName()]; there != wasThere {
			i.broken = errors.Join(i.broken, fmt.Errorf("%s: %s of %s, present before: %t", r.Resource, event, o.GetName(), there))
		}
		if isThere {
			seen[o.GetName()] = r.text(o)
		} else {
			delete(seen, o.GetName())
		}
	}
	return cache.ResourceEventHandlerFuncs{
		AddFunc:    func(object any) { record(object, false, true, "add") },
		UpdateFunc: func(_, object any) { record(object, true, true, "update") },
		DeleteFunc: func(object any) { record(object, true, false, "delete") },
	}
}

// checkEqual waits until the informer's cache and the sum of its events are
// what a fresh list showed; the namespace is at rest by then.
func (i *informers) checkEqual(t *testing.T, r resource, want map[string]item) {
	t.Helper()
	state := func() (stored map[string]item, handled map[string]string) {
		stored = map[string]item{}
		for _, object := range i.byKind[r.kind].GetStore().List() {
			o := object.(*unstructured.Unstructured)
			stored[o.GetName()] = item{revisionOf(t, o.GetResourceVersion()), r.text(o)}
		}
		i.mu.Lock()
		defer i.mu.Unlock()
		if i.broken != nil {
			t.Fatalf("the events of an informer contradict each other: %v", i.broken)
		}
		handled = map[string]string{}
		for name, text := range i.handled[r.kind] {
			handled[name] = text
		}
		return stored, handled
	}
	eventually(t, time.Minute, func() (bool, string) {
		stored, handled := state()
		equal := len(stored) == len(want) && len(handled) == len(want)
		for name, w := range want {
			equal = equal && stored[name] == w && handled[name] == w.text
		}
		return equal, fmt.Sprintf("the informer of %s has %d objects, its handlers saw %d, a fresh list has %d, or they differ", r.Resource, len(stored), len(handled), len(want))
	})
}
