package k8s

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	listedObjects = 240
	pageSize      = 37 // does not divide the number of objects
	listRounds    = 30
)

// listing is one complete list, put together from its pages.
type listing struct {
	revision int64
	items    map[string]item
}

// testLists claims that every page of a list shows the namespace at the
// revision of the first page, whatever is written meanwhile; that a list at an
// old revision shows that revision; and that a watch from any revision
// delivers exactly what came after it.
func testLists(t *testing.T, cp *controlPlane, r resource) {
	namespace := cp.newNamespace(t)
	empty, err := r.in(cp, namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatalf("listing the empty namespace: %v", err)
	}
	start := revisionOf(t, empty.GetResourceVersion())
	followed := follow(t, cp, r, namespace, start)

	for i := range listedObjects {
		if _, err := r.in(cp, namespace).Create(t.Context(), r.object(listedName(i), "first"), metav1.CreateOptions{}); err != nil {
			t.Fatalf("creating %s: %v", listedName(i), err)
		}
	}

	stop := make(chan struct{})
	stopOnce := sync.OnceFunc(func() { close(stop) })
	var writers sync.WaitGroup
	defer func() { // when the test ends early, too
		stopOnce()
		writers.Wait()
	}()
	for writer := range 3 {
		writers.Go(func() { writeUntil(t, cp, r, namespace, writer, stop) })
	}
	var listings []listing
	for range listRounds {
		listings = append(listings, listPages(t, cp, r, namespace, nil))
	}
	stopOnce()
	writers.Wait()
	if t.Failed() {
		return
	}

	last, err := r.in(cp, namespace).Create(t.Context(), r.object("zzz-last", "last"), metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("creating the last object: %v", err)
	}
	end := revisionOf(t, last.GetResourceVersion())
	all := followed.through(t, end)
	checkHistory(t, all)
	for i, l := range listings {
		compareStates(t, fmt.Sprintf("paged list %d at revision %d", i, l.revision), l.items, stateAt(all, l.revision))
	}
	compareStates(t, "the last list", listPages(t, cp, r, namespace, nil).items, stateAt(all, end))

	middles := []int64{all[len(all)/4].revision, all[len(all)/2].revision, all[len(all)*3/4].revision}
	for _, revision := range middles {
		old := listPages(t, cp, r, namespace, &revision)
		if old.revision != revision {
			t.Errorf("a list at exactly revision %d says that it shows %d", revision, old.revision)
		}
		compareStates(t, fmt.Sprintf("list at exactly revision %d", revision), old.items, stateAt(all, revision))
	}
	for _, revision := range append(middles, start, all[0].revision, all[len(all)-2].revision) {
		replayed := follow(t, cp, r, namespace, revision).through(t, end)
		first := slices.IndexFunc(all, func(c change) bool { return c.revision > revision })
		if !slices.Equal(replayed, all[first:]) {
			t.Errorf("a watch after revision %d delivered %d changes, want the same %d as the watch from the start",
				revision, len(replayed), len(all)-first)
		}
	}
	t.Logf("%s: %d changes, %d paged lists while they happened", r.Resource, len(all), len(listings))
}

func listedName(i int) string { return fmt.Sprintf("object-%03d", i) }

// writeUntil updates, deletes and creates again the objects whose number is
// the writer's, modulo three.
func writeUntil(t *testing.T, cp *controlPlane, r resource, namespace string, writer int, stop <-chan struct{}) {
	random := rand.New(rand.NewPCG(uint64(writer), 1))
	ctx := context.Background() // a write that has begun is waited for
	client := r.in(cp, namespace)
	present := map[string]bool{}
	for round := 0; ; round++ {
		select {
		case <-stop:
			return
		default:
		}
		name := listedName(random.IntN(listedObjects/3)*3 + writer)
		if _, known := present[name]; !known {
			present[name] = true
		}
		text := fmt.Sprintf("round %d of writer %d", round, writer)
		var err error
		switch {
		case !present[name]:
			_, err = client.Create(ctx, r.object(name, text), metav1.CreateOptions{})
			present[name] = true
		case random.IntN(4) == 0:
			err = client.Delete(ctx, name, metav1.DeleteOptions{})
			present[name] = false
		default:
			_, err = r.update(ctx, client, name, text)
		}
		if err != nil {
			t.Errorf("writing %s in round %d: %v", name, round, err)
			return
		}
	}
}

// listPages lists a namespace page by page: now, or at exactly a revision. It
// checks what holds for the pages of any list.
func listPages(t *testing.T, cp *controlPlane, r resource, namespace string, at *int64) listing {
	t.Helper()
	options := metav1.ListOptions{Limit: pageSize}
	if at != nil {
		options.ResourceVersion = strconv.FormatInt(*at, 10)
		options.ResourceVersionMatch = metav1.ResourceVersionMatchExact
	}
	result := listing{items: map[string]item{}}
	total, previous := int64(-1), ""
	for page := 0; ; page++ {
		list, err := r.in(cp, namespace).List(t.Context(), options)
		if err != nil {
			t.Fatalf("page %d of %s: %v", page, r.Resource, err)
		}
		revision := revisionOf(t, list.GetResourceVersion())
		if page == 0 {
			result.revision = revision
		} else if revision != result.revision {
			t.Errorf("page %d shows revision %d, the first page %d", page, revision, result.revision)
		}
		for i := range list.Items {
			object := &list.Items[i]
			if object.GetName() <= previous {
				t.Errorf("page %d: %s comes after %s", page, object.GetName(), previous)
			}
			previous = object.GetName()
			result.items[previous] = item{revisionOf(t, object.GetResourceVersion()), r.text(object)}
		}
		if remaining := list.GetRemainingItemCount(); remaining != nil {
			sum := int64(len(result.items)) + *remaining
			if total >= 0 && sum != total {
				t.Errorf("page %d: %d items so far and %d remaining, but the first page promised %d", page, len(result.items), *remaining, total)
			}
			total = sum
		}
		if list.GetContinue() == "" {
			if total >= 0 && total != int64(len(result.items)) {
				t.Errorf("the list has %d items, its first page promised %d", len(result.items), total)
			}
			return result
		}
		if len(list.Items) != pageSize {
			t.Errorf("page %d has %d items and goes on, want %d", page, len(list.Items), pageSize)
		}
		options = metav1.ListOptions{Limit: pageSize, Continue: list.GetContinue()}
	}
}

// oldReader is a reader that stopped for so long that what it was reading has
// been compacted away.
type oldReader struct {
	namespace string
	revision  int64
	token     string // continues a list that began at the revision
	rest      int    // number of objects that the first page did not show
}

func newOldReader(t *testing.T, cp *controlPlane) oldReader {
	t.Helper()
	namespace := cp.newNamespace(t)
	const objects = 5
	for i := range objects {
		if _, err := configMaps.in(cp, namespace).Create(t.Context(), configMaps.object(listedName(i), "old"), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	first, err := configMaps.in(cp, namespace).List(t.Context(), metav1.ListOptions{Limit: 2})
	if err != nil {
		t.Fatal(err)
	}
	return oldReader{
		namespace: namespace,
		revision:  revisionOf(t, first.GetResourceVersion()),
		token:     first.GetContinue(),
		rest:      objects - len(first.Items),
	}
}

// testCompaction claims that the API server's compaction reaches the store: a
// reader that comes back too late is told that its revision is gone, and how
// it can go on.
func testCompaction(t *testing.T, cp *controlPlane, old oldReader) {
	client := configMaps.in(cp, old.namespace)
	exact := metav1.ListOptions{
		ResourceVersion:      strconv.FormatInt(old.revision, 10),
		ResourceVersionMatch: metav1.ResourceVersionMatchExact,
	}
	// The API server compacts at each interval to where the store was one
	// interval before.
	eventually(t, 3*compactionInterval, func() (bool, string) {
		_, err := client.List(t.Context(), exact)
		return apierrors.IsResourceExpired(err), fmt.Sprintf("a list at revision %d, which should be compacted, ended with: %v", old.revision, err)
	})

	_, err := client.List(t.Context(), metav1.ListOptions{Limit: 2, Continue: old.token})
	if !apierrors.IsResourceExpired(err) {
		t.Fatalf("a continue token older than the compaction: got %v, want Expired", err)
	}
	status, ok := err.(apierrors.APIStatus)
	if !ok || status.Status().Continue == "" {
		t.Fatalf("Expired carries no token with which to go on: %v", err)
	}
	rest, err := client.List(t.Context(), metav1.ListOptions{Continue: status.Status().Continue})
	if err != nil || len(rest.Items) != old.rest {
		t.Errorf("going on with the new token: %d objects and error %v, want %d objects", len(rest.Items), err, old.rest)
	}

	watcher, err := client.Watch(t.Context(), metav1.ListOptions{ResourceVersion: exact.ResourceVersion})
	if err == nil {
		event := <-watcher.ResultChan()
		watcher.Stop()
		err = apierrors.FromObject(event.Object)
	}
	if !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) {
		t.Errorf("a watch after compacted revision %d: got %v, want Expired", old.revision, err)
	}
}
