package k8s

import (
	"context"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/util/retry"
)

var listOne = metav1.ListOptions{Limit: 1}

// testNamespaces claims that a namespace lives and ends as it should. There is
// no controller manager, so the test plays its part and finalizes.
func testNamespaces(t *testing.T, cp *controlPlane) {
	client := cp.typed.CoreV1().Namespaces()
	name := cp.newNamespace(t)
	created, err := client.Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	watcher, err := client.Watch(t.Context(), metav1.ListOptions{
		FieldSelector: "metadata.name=" + name, ResourceVersion: created.ResourceVersion,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer watcher.Stop()
	if _, err := cp.typed.CoreV1().ConfigMaps(name).Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "inside"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}

	if err := client.Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	terminating, err := client.Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatalf("a namespace with a finalizer was gone at once: %v", err)
	}
	if terminating.Status.Phase != corev1.NamespaceTerminating || terminating.DeletionTimestamp == nil {
		t.Errorf("after its deletion the namespace is %s, deleted at %v", terminating.Status.Phase, terminating.DeletionTimestamp)
	}
	_, err = cp.typed.CoreV1().ConfigMaps(name).Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "late"}}, metav1.CreateOptions{})
	if !apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
		t.Errorf("creating in a namespace that is going away: got %v, want Forbidden", err)
	}

	if err := cp.typed.CoreV1().ConfigMaps(name).DeleteCollection(t.Context(), metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil {
		t.Fatal(err)
	}
	terminating.Spec.Finalizers = nil
	if _, err := client.Finalize(t.Context(), terminating, metav1.UpdateOptions{}); err != nil {
		t.Fatalf("finalizing: %v", err)
	}
	if _, err := client.Get(t.Context(), name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("the finalized namespace: got %v, want NotFound", err)
	}
	wantEvents(t, watcher, watch.Modified, watch.Deleted)
}

// wantEvents reads that many events and compares their types.
func wantEvents(t *testing.T, watcher watch.Interface, want ...watch.EventType) {
	t.Helper()
	var got []watch.EventType
	timeout := time.After(time.Minute)
	for len(got) < len(want) {
		select {
		case event, ok := <-watcher.ResultChan():
			if !ok {
				t.Fatalf("the watch was closed after %v, want %v", got, want)
			}
			got = append(got, event.Type)
		case <-timeout:
			t.Fatalf("within a minute the watch delivered %v, want %v", got, want)
		}
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("the watch delivered %v, want %v", got, want)
	}
}

// testObjects claims that each verb does what it says, for each resource.
func testObjects(t *testing.T, cp *controlPlane) {
	namespace := cp.newNamespace(t)
	for _, r := range resources {
		client := r.in(cp, namespace)
		binary := "a text with \x00, ü and " + strings.Repeat("long ", 2000)
		created, err := client.Create(t.Context(), r.object("one", binary), metav1.CreateOptions{})
		if err != nil {
			t.Fatalf("%s: create: %v", r.Resource, err)
		}
		if _, err := client.Create(t.Context(), r.object("one", ""), metav1.CreateOptions{}); !apierrors.IsAlreadyExists(err) {
			t.Errorf("%s: creating twice: got %v, want AlreadyExists", r.Resource, err)
		}
		read, err := client.Get(t.Context(), "one", metav1.GetOptions{})
		if err != nil || r.text(read) != binary || read.GetResourceVersion() != created.GetResourceVersion() {
			t.Errorf("%s: reading back what was created: error %v, equal text %t, revision %s, want %s",
				r.Resource, err, read != nil && r.text(read) == binary, read.GetResourceVersion(), created.GetResourceVersion())
		}
		same, err := r.update(t.Context(), client, "one", binary)
		if err != nil || same.GetResourceVersion() != created.GetResourceVersion() {
			t.Errorf("%s: an update that changes nothing: error %v, and the revision went from %s to %s",
				r.Resource, err, created.GetResourceVersion(), same.GetResourceVersion())
		}
		replaced := read.DeepCopy()
		r.setText(replaced, "two")
		replaced.SetLabels(map[string]string{"shade": "blue"})
		updated, err := client.Update(t.Context(), replaced, metav1.UpdateOptions{})
		if err != nil || r.text(updated) != "two" {
			t.Fatalf("%s: update: %v", r.Resource, err)
		}
		if before, after := revisionOf(t, created.GetResourceVersion()), revisionOf(t, updated.GetResourceVersion()); after <= before {
			t.Errorf("%s: the update has revision %d, the creation %d", r.Resource, after, before)
		}
		patched, err := client.Patch(t.Context(), "one", types.JSONPatchType,
			[]byte(`[{"op":"test","path":"/metadata/labels/shade","value":"blue"},{"op":"replace","path":"/metadata/labels/shade","value":"red"}]`), metav1.PatchOptions{})
		if err != nil || patched.GetLabels()["shade"] != "red" {
			t.Errorf("%s: JSON patch: %v, labels %v", r.Resource, err, patched.GetLabels())
		}
		wrong := types.UID("00000000-0000-0000-0000-000000000000")
		err = client.Delete(t.Context(), "one", metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &wrong}})
		if !apierrors.IsConflict(err) {
			t.Errorf("%s: deleting with another object's UID: got %v, want Conflict", r.Resource, err)
		}
		if err := client.Delete(t.Context(), "one", metav1.DeleteOptions{}); err != nil {
			t.Errorf("%s: delete: %v", r.Resource, err)
		}
		if _, err := client.Get(t.Context(), "one", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			t.Errorf("%s: after the deletion: got %v, want NotFound", r.Resource, err)
		}
	}
}

// testLargeObjects claims that a value near the store's limit is kept, and one
// above it refused with the store's own error, after which all goes on.
func testLargeObjects(t *testing.T, cp *controlPlane) {
	client := widgets.in(cp, cp.newNamespace(t))
	large := strings.Repeat("x", 1400<<10)
	if _, err := client.Create(t.Context(), widgets.object("large", large), metav1.CreateOptions{}); err != nil {
		t.Fatalf("an object of 1400 KiB: %v", err)
	}
	read, err := client.Get(t.Context(), "large", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if widgets.text(read) != large {
		t.Error("the large object came back changed")
	}
	_, err = client.Create(t.Context(), widgets.object("too-large", strings.Repeat("x", 1700<<10)), metav1.CreateOptions{})
	if err == nil || !strings.Contains(err.Error(), "request is too large") {
		t.Errorf("an object of 1700 KiB: got %v, want etcd's \"request is too large\"", err)
	}
	if _, err := client.Create(t.Context(), widgets.object("small", "x"), metav1.CreateOptions{}); err != nil {
		t.Errorf("a small object after the one that was too large: %v", err)
	}
}

// testOptimisticConcurrency claims that of several writers with the same
// resourceVersion one wins, and that counting with retries loses no step.
func testOptimisticConcurrency(t *testing.T, cp *controlPlane) {
	const counters, steps = 6, 25
	client := cp.typed.CoreV1().ConfigMaps(cp.newNamespace(t))
	first, err := client.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "counter"}, Data: map[string]string{"n": "0"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var conflicts atomic.Int64
	var done sync.WaitGroup
	always := wait.Backoff{Steps: 10_000, Duration: time.Millisecond, Factor: 1, Jitter: 1}
	for range counters {
		done.Go(func() {
			for range steps {
				err := retry.RetryOnConflict(always, func() error {
					current, err := client.Get(t.Context(), "counter", metav1.GetOptions{})
					if err != nil {
						return err
					}
					var n int
					if _, err := fmt.Sscan(current.Data["n"], &n); err != nil {
						return err
					}
					current.Data["n"] = fmt.Sprint(n + 1)
					_, err = client.Update(t.Context(), current, metav1.UpdateOptions{})
					if apierrors.IsConflict(err) {
						conflicts.Add(1)
					}
					return err
				})
				if err != nil {
					t.Errorf("counting: %v", err)
					return
				}
			}
		})
	}
	done.Wait()
	last, err := client.Get(t.Context(), "counter", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprint(counters * steps); last.Data["n"] != want {
		t.Errorf("%d writers counted to %s, want %s", counters, last.Data["n"], want)
	}
	if conflicts.Load() == 0 {
		t.Error("there was no conflict at all, so the test has shown nothing")
	}
	first.Data["n"] = "stale"
	if _, err := client.Update(t.Context(), first, metav1.UpdateOptions{}); !apierrors.IsConflict(err) {
		t.Errorf("an update with an old resourceVersion: got %v, want Conflict", err)
	}
	err = client.Delete(t.Context(), "counter", metav1.DeleteOptions{Preconditions: &metav1.Preconditions{ResourceVersion: &first.ResourceVersion}})
	if !apierrors.IsConflict(err) {
		t.Errorf("a deletion with an old resourceVersion: got %v, want Conflict", err)
	}
}

// testServerSideApply claims that two appliers of one field are told of each
// other, that force takes the field over, and that leaving a field out
// removes it.
func testServerSideApply(t *testing.T, cp *controlPlane) {
	namespace := cp.newNamespace(t)
	for _, r := range resources {
		client := r.in(cp, namespace)
		apply := func(manager, text string, labels map[string]string, force bool) (*unstructured.Unstructured, error) {
			object := r.object("shared", text)
			object.SetLabels(labels)
			return client.Apply(t.Context(), "shared", object, metav1.ApplyOptions{FieldManager: manager, Force: force})
		}
		if _, err := apply("alice", "of alice", map[string]string{"alice": "was-here"}, false); err != nil {
			t.Fatalf("%s: the first apply: %v", r.Resource, err)
		}
		_, err := apply("bob", "of bob", map[string]string{"bob": "too"}, false)
		if !apierrors.IsConflict(err) || !strings.Contains(err.Error(), "alice") {
			t.Errorf("%s: applying another's field: got %v, want a Conflict that names alice", r.Resource, err)
		}
		forced, err := apply("bob", "of bob", map[string]string{"bob": "too"}, true)
		if err != nil {
			t.Fatalf("%s: apply with force: %v", r.Resource, err)
		}
		if r.text(forced) != "of bob" || forced.GetLabels()["alice"] == "" || len(forced.GetManagedFields()) != 2 {
			t.Errorf("%s: after force: text %q, labels %v, %d managers", r.Resource, r.text(forced), forced.GetLabels(), len(forced.GetManagedFields()))
		}
		reduced, err := client.Apply(t.Context(), "shared", withLabels(r, map[string]string{}), metav1.ApplyOptions{FieldManager: "alice"})
		if err != nil {
			t.Fatalf("%s: apply with less: %v", r.Resource, err)
		}
		if _, left := reduced.GetLabels()["alice"]; left || reduced.GetLabels()["bob"] == "" {
			t.Errorf("%s: after alice left her label out: %v", r.Resource, reduced.GetLabels())
		}
	}
}

func withLabels(r resource, labels map[string]string) *unstructured.Unstructured {
	object := &unstructured.Unstructured{Object: map[string]any{}}
	object.SetGroupVersionKind(r.GroupVersion().WithKind(r.kind))
	object.SetName("shared")
	object.SetLabels(labels)
	return object
}

// testFinalizers claims that an object with a finalizer outlives its deletion
// until the finalizer is taken away.
func testFinalizers(t *testing.T, cp *controlPlane) {
	namespace := cp.newNamespace(t)
	for _, r := range resources {
		client := r.in(cp, namespace)
		object := r.object("held", "x")
		object.SetFinalizers([]string{"test.quire.example/hold"})
		created, err := client.Create(t.Context(), object, metav1.CreateOptions{})
		if err != nil {
			t.Fatalf("%s: %v", r.Resource, err)
		}
		watcher, err := client.Watch(t.Context(), metav1.ListOptions{ResourceVersion: created.GetResourceVersion()})
		if err != nil {
			t.Fatal(err)
		}
		if err := client.Delete(t.Context(), "held", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		held, err := client.Get(t.Context(), "held", metav1.GetOptions{})
		if err != nil {
			t.Fatalf("%s: an object with a finalizer was gone at once: %v", r.Resource, err)
		}
		if held.GetDeletionTimestamp() == nil {
			t.Errorf("%s: the deleted object has no deletionTimestamp", r.Resource)
		}
		if _, err := client.Patch(t.Context(), "held", types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{}); err != nil {
			t.Fatalf("%s: taking the finalizer away: %v", r.Resource, err)
		}
		if _, err := client.Get(t.Context(), "held", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			t.Errorf("%s: without its finalizer: got %v, want NotFound", r.Resource, err)
		}
		wantEvents(t, watcher, watch.Modified, watch.Deleted)
		watcher.Stop()
	}
}

// testDeleteCollection claims that all objects with a label go, and no others.
func testDeleteCollection(t *testing.T, cp *controlPlane) {
	namespace := cp.newNamespace(t)
	for _, r := range resources {
		client := r.in(cp, namespace)
		for i := range 40 {
			object := r.object(listedName(i), "x")
			object.SetLabels(map[string]string{"half": fmt.Sprint(i % 2)})
			if _, err := client.Create(t.Context(), object, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		if err := client.DeleteCollection(t.Context(), metav1.DeleteOptions{}, metav1.ListOptions{LabelSelector: "half=1"}); err != nil {
			t.Fatalf("%s: %v", r.Resource, err)
		}
		left, err := client.List(t.Context(), metav1.ListOptions{LabelSelector: "half"})
		if err != nil {
			t.Fatal(err)
		}
		for i := range left.Items {
			if left.Items[i].GetLabels()["half"] != "0" {
				t.Errorf("%s: %s should have gone", r.Resource, left.Items[i].GetName())
			}
		}
		if len(left.Items) != 20 {
			t.Errorf("%s: %d objects are left, want 20", r.Resource, len(left.Items))
		}
	}
}

// testCustomResources claims that a definition, its objects, their defaults
// and their status work, and that the objects go when the definition goes.
func testCustomResources(t *testing.T, cp *controlPlane) {
	namespace := cp.newNamespace(t)
	gadgets := resource{
		GroupVersionResource: schema.GroupVersionResource{Group: widgets.Group, Version: widgets.Version, Resource: "gadgets"},
		kind:                 "Gadget",
		field:                widgets.field,
	}
	crd := definition(gadgets.Resource, gadgets.kind)
	cp.define(t, crd)
	client := gadgets.in(cp, namespace)
	created, err := client.Create(t.Context(), gadgets.object("one", "text"), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if size, _, err := unstructured.NestedInt64(created.Object, "spec", "size"); err != nil || size != 1 {
		t.Errorf("spec.size is %d (%v), its default is 1", size, err)
	}
	withStatus := created.DeepCopy()
	gadgets.setText(withStatus, "not through the status")
	if err := unstructured.SetNestedField(withStatus.Object, "Ready", "status", "phase"); err != nil {
		t.Fatal(err)
	}
	updated, err := client.UpdateStatus(t.Context(), withStatus, metav1.UpdateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if phase, _, err := unstructured.NestedString(updated.Object, "status", "phase"); err != nil || phase != "Ready" || gadgets.text(updated) != "text" {
		t.Errorf("after the status was updated: phase %q (%v), text %q", phase, err, gadgets.text(updated))
	}
	bad := gadgets.object("bad", "x")
	if err := unstructured.SetNestedField(bad.Object, "many", "spec", "size"); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Create(t.Context(), bad, metav1.CreateOptions{}); !apierrors.IsInvalid(err) {
		t.Errorf("an object against its schema: got %v, want Invalid", err)
	}

	definitions := cp.extensions.ApiextensionsV1().CustomResourceDefinitions()
	if err := definitions.Delete(t.Context(), crd.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, func() (bool, string) {
		_, err := definitions.Get(t.Context(), crd.Name, metav1.GetOptions{})
		return apierrors.IsNotFound(err), fmt.Sprintf("the deleted definition: %v, want NotFound", err)
	})
	cp.define(t, definition(gadgets.Resource, gadgets.kind))
	again, err := client.List(t.Context(), metav1.ListOptions{})
	if err != nil || len(again.Items) != 0 {
		t.Errorf("a definition made anew finds %d objects of the old one (%v)", len(again.Items), err)
	}
}

// testEventsExpire claims that an Event goes away by itself after --event-ttl,
// neither before nor much later, and that a watch is told.
func testEventsExpire(t *testing.T, cp *controlPlane) {
	const events = 20
	namespace := cp.newNamespace(t)
	client := cp.typed.CoreV1().Events(namespace)
	list, err := client.List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	watcher, err := client.Watch(t.Context(), metav1.ListOptions{ResourceVersion: list.ResourceVersion})
	if err != nil {
		t.Fatal(err)
	}
	defer watcher.Stop()
	begin := time.Now()
	for i := range events {
		event := &corev1.Event{
			ObjectMeta:     metav1.ObjectMeta{Name: fmt.Sprintf("event-%02d", i)},
			InvolvedObject: corev1.ObjectReference{Kind: "Namespace", Name: namespace, Namespace: namespace},
			Reason:         "Tested",
			Message:        "this is going to expire",
			Type:           corev1.EventTypeNormal,
		}
		if _, err := client.Create(t.Context(), event, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	created := time.Now()

	deleted := map[string]bool{}
	// The lease that carries the events may be some percent longer than the
	// TTL, and the store may take a moment to expire it.
	ctx, cancel := context.WithDeadline(t.Context(), created.Add(2*eventTTL+15*time.Second))
	defer cancel()
	for len(deleted) < events {
		select {
		case e, ok := <-watcher.ResultChan():
			if !ok {
				t.Fatalf("the watch was closed after %d of %d events had expired", len(deleted), events)
			}
			object, isEvent := e.Object.(*corev1.Event)
			if !isEvent {
				t.Fatalf("the watch delivered %s %v", e.Type, e.Object)
			}
			if e.Type != watch.Deleted {
				continue
			}
			if age := time.Since(begin); age < eventTTL-time.Second {
				t.Errorf("%s expired %v after it was written, too early for a TTL of %v", object.Name, age, eventTTL)
			}
			if deleted[object.Name] {
				t.Errorf("%s was deleted twice", object.Name)
			}
			deleted[object.Name] = true
		case <-ctx.Done():
			t.Fatalf("%d of %d events expired within %v", len(deleted), events, time.Since(created))
		}
	}
	t.Logf("all events expired %v after the last was written", time.Since(created).Round(time.Second/10))
	left, err := client.List(t.Context(), metav1.ListOptions{})
	if err != nil || len(left.Items) != 0 {
		t.Errorf("%d events are left (%v)", len(left.Items), err)
	}
}
