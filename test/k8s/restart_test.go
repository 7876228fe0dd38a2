package k8s

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
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
	informers := startInformers(t, cp, namespace)

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
	delivered := map[int64]change{}
	for _, c := range history {
		delivered[c.revision] = c
	}
	for _, w := range all {
		w.checkState(t)
		if w.resource.kind != configMaps.kind {
			continue
		}
		for revision, want := range w.acknowledged {
			if got, ok := delivered[revision]; !ok || got.name != want.name || got.text != want.text {
				t.Errorf("broke Reliable: the acknowledged write of %s at revision %d reached no watcher (delivered: %v)", want.name, revision, got)
			}
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
	// acknowledged has every create and update that was answered, by revision.
	acknowledged map[int64]change
	newest       int64 // highest revision seen
}

func newWriter(cp *controlPlane, r resource, namespace string, number int) *writer {
	return &writer{
		cp: cp, resource: r, namespace: namespace, number: number,
		random:       rand.New(rand.NewPCG(uint64(number), 3)),
		state:        map[string]string{},
		acknowledged: map[int64]change{},
	}
}

func (w *writer) run(t *testing.T, stop <-chan struct{}) {
	for round := 0; ; round++ {
		select {
		case <-stop:
			return
		default:
		}
		name := fmt.Sprintf("w%d-%02d", w.number, w.random.IntN(keysPerWriter))
		text := fmt.Sprintf("round %d", round)
		if err := w.write(name, text); err != nil {
			t.Errorf("broke Durable: %s %s, round %d: %v", w.resource.Resource, name, round, err)
			return
		}
	}
}

// write does one write and, where it had no answer, finds out what became of
// it. Its error is a broken promise, never an outage.
func (w *writer) write(name, text string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	client := w.resource.in(w.cp, w.namespace)
	known, present := w.state[name]
	remove := present && w.random.IntN(4) == 0
	var object *unstructured.Unstructured
	var err error
	switch {
	case !present:
		object, err = client.Create(ctx, w.resource.object(name, text), metav1.CreateOptions{})
	case remove:
		err = client.Delete(ctx, name, metav1.DeleteOptions{})
	default:
		object, err = w.resource.update(ctx, client, name, text)
	}
	if err == nil {
		w.count.Add(1)
		if remove {
			delete(w.state, name)
			return nil
		}
		w.state[name] = text
		revision, err := w.see(object)
		if err != nil {
			return err
		}
		w.acknowledged[revision] = change{name: name, text: text}
		return nil
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
		if _, err := w.see(object); err != nil {
			return err
		}
	}
	unchanged := there == present && found == known
	happened := remove && !there || !remove && there && found == text
	if !unchanged && !happened {
		return fmt.Errorf("after a write without an answer the object (present %t) is neither as acknowledged before nor as written", there)
	}
	if there {
		w.state[name] = found
	} else {
		delete(w.state, name)
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

func (w *writer) see(object *unstructured.Unstructured) (int64, error) {
	revision, err := strconv.ParseInt(object.GetResourceVersion(), 10, 64)
	if err != nil {
		return 0, err
	}
	w.newest = max(w.newest, revision)
	return revision, nil
}

// checkState holds what is in the store against what this writer was told.
func (w *writer) checkState(t *testing.T) {
	t.Helper()
	list, err := w.resource.in(w.cp, w.namespace).List(t.Context(), metav1.ListOptions{})
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
		name := fmt.Sprintf("w%d-%02d", w.number, i)
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
}

func startInformers(t *testing.T, cp *controlPlane, namespace string) *informers {
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
