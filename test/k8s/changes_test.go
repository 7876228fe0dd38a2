package k8s

import (
	"context"
	"fmt"
	"maps"
	"strconv"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/watch"
)

// change is one event of a watch.
type change struct {
	kind     watch.EventType
	name     string
	revision int64
	text     string
}

func (c change) String() string {
	return fmt.Sprintf("%s %s at %d", c.kind, c.name, c.revision)
}

// revisionOf reads a resourceVersion, which is the store's revision.
func revisionOf(t *testing.T, resourceVersion string) int64 {
	t.Helper()
	revision, err := strconv.ParseInt(resourceVersion, 10, 64)
	if err != nil || revision <= 0 {
		t.Fatalf("resourceVersion %q is not a revision", resourceVersion)
	}
	return revision
}

// changes is what one watch has delivered so far, in its order.
type changes struct {
	resource resource

	mu    sync.Mutex
	all   []change
	ended string // why the watch ended; "" while it runs
}

// follow watches the resource in a namespace after a revision, until the test
// ends.
func follow(t *testing.T, cp *controlPlane, r resource, namespace string, after int64) *changes {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w, err := r.in(cp, namespace).Watch(ctx, metav1.ListOptions{ResourceVersion: strconv.FormatInt(after, 10)})
	if err != nil {
		cancel()
		t.Fatalf("watching %s after revision %d: %v", r.Resource, after, err)
	}
	c := &changes{resource: r}
	var stopped sync.WaitGroup
	stopped.Go(func() { c.receive(w) })
	t.Cleanup(func() {
		cancel()
		w.Stop()
		stopped.Wait()
	})
	return c
}

func (c *changes) receive(w watch.Interface) {
	for event := range w.ResultChan() {
		c.mu.Lock()
		if object, ok := event.Object.(*unstructured.Unstructured); ok && event.Type != watch.Error {
			revision, err := strconv.ParseInt(object.GetResourceVersion(), 10, 64)
			if err != nil {
				c.ended = "an event without a revision: " + err.Error()
			} else if event.Type != watch.Bookmark {
				c.all = append(c.all, change{event.Type, object.GetName(), revision, c.resource.text(object)})
			}
		} else {
			c.ended = fmt.Sprintf("error event: %v", event.Object)
		}
		c.mu.Unlock()
	}
	c.mu.Lock()
	if c.ended == "" {
		c.ended = "the watch was closed"
	}
	c.mu.Unlock()
}

// through returns what was delivered once a change with at least that
// revision is there.
func (c *changes) through(t *testing.T, revision int64) []change {
	t.Helper()
	var all []change
	eventually(t, time.Minute, func() (bool, string) {
		c.mu.Lock()
		defer c.mu.Unlock()
		all = c.all
		if n := len(all); n > 0 && all[n-1].revision >= revision {
			return true, ""
		}
		if c.ended != "" {
			t.Fatalf("the watch of %s ended with %d changes, before revision %d: %s", c.resource.Resource, len(all), revision, c.ended)
		}
		return false, fmt.Sprintf("a watch of %s did not deliver revision %d; %d changes came", c.resource.Resource, revision, len(all))
	})
	return all
}

// item is one object as a list shows it.
type item struct {
	revision int64
	text     string
}

// stateAt replays changes from an empty namespace up to a revision.
func stateAt(all []change, revision int64) map[string]item {
	state := map[string]item{}
	for _, c := range all {
		if c.revision > revision {
			break
		}
		if c.kind == watch.Deleted {
			delete(state, c.name)
		} else {
			state[c.name] = item{c.revision, c.text}
		}
	}
	return state
}

// checkHistory holds the changes of one watch against what a watch promises:
// ordered, unique, and a possible life for every object.
func checkHistory(t *testing.T, all []change) {
	t.Helper()
	live := map[string]bool{}
	last := int64(0)
	for _, c := range all {
		if c.revision <= last {
			t.Errorf("broke Ordered or Unique: %v came after revision %d", c, last)
		}
		last = c.revision
		if (c.kind == watch.Added) == live[c.name] {
			t.Errorf("broke Reliable: %v while the object was there: %t", c, live[c.name])
		}
		live[c.name] = c.kind != watch.Deleted
	}
}

func compareStates(t *testing.T, what string, got, want map[string]item) {
	t.Helper()
	if maps.Equal(got, want) {
		return
	}
	shown := 0
	for name, w := range want {
		if g, ok := got[name]; !ok {
			t.Errorf("%s: %s is missing, revision %d", what, name, w.revision)
			shown++
		} else if g != w {
			t.Errorf("%s: %s has revision %d, want %d (texts equal: %t)", what, name, g.revision, w.revision, g.text == w.text)
			shown++
		}
		if shown >= 10 {
			break
		}
	}
	for name, g := range got {
		if _, ok := want[name]; !ok && shown < 20 {
			t.Errorf("%s: %s is there, revision %d, and should not be", what, name, g.revision)
			shown++
		}
	}
}
