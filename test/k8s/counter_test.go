package k8s

import (
	"context"
	"strconv"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/util/retry"
)

// counterName is the object that all counters write. Its text is a number.
const counterName = "counter"

// counter adds one to the object that all have in common, through its own
// control plane, with the resourceVersion that it has read and a new attempt
// when another one was faster.
type counter struct {
	cp        *controlPlane
	namespace string
	pause     time.Duration // after each addition

	answered  map[int64]string // what it was told: the text at a revision
	conflicts int
	unknown   int // updates that ended with an error, so may have happened
}

func createCounter(t *testing.T, cp *controlPlane, namespace string) {
	t.Helper()
	if _, err := configMaps.in(cp, namespace).Create(t.Context(), configMaps.object(counterName, "0"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func (c *counter) run(t *testing.T, stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		case <-time.After(c.pause):
		}
		// Conflicts that outlast the attempts are nothing to report: the others went on.
		err := retry.RetryOnConflict(retry.DefaultBackoff, func() error { return c.add(t) })
		if err != nil && !apierrors.IsConflict(err) {
			c.unknown++
		}
	}
}

func (c *counter) add(t *testing.T) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	client := configMaps.in(c.cp, c.namespace)
	object, err := client.Get(ctx, counterName, metav1.GetOptions{})
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(configMaps.text(object))
	if err != nil {
		t.Errorf("the counter is no number: %v", err)
		return err
	}
	text := strconv.Itoa(n + 1)
	configMaps.setText(object, text)
	var updated *unstructured.Unstructured
	updated, err = client.Update(ctx, object, metav1.UpdateOptions{})
	if apierrors.IsConflict(err) {
		c.conflicts++
	}
	if err != nil {
		return err
	}
	revision, err := strconv.ParseInt(updated.GetResourceVersion(), 10, 64)
	if err != nil {
		t.Errorf("the counter has no revision: %v", err)
		return err
	}
	c.answered[revision] = text
	return nil
}

// checkCounters claims that no addition was lost and none was made twice: the
// watch saw each number once, and at the revision that its author was told.
func checkCounters(t *testing.T, counters []*counter, history []change) {
	t.Helper()
	delivered := map[int64]string{}
	for _, c := range history {
		if c.name != counterName || c.kind == watch.Added {
			continue
		}
		delivered[c.revision] = c.text
		if want := strconv.Itoa(len(delivered)); c.text != want {
			t.Errorf("broke optimistic concurrency: the counter became %s at revision %d, want %s", c.text, c.revision, want)
			return
		}
	}
	answered, unknown, conflicts := 0, 0, 0
	for _, c := range counters {
		answered += len(c.answered)
		unknown += c.unknown
		conflicts += c.conflicts
		for revision, text := range c.answered {
			if got := delivered[revision]; got != text {
				t.Errorf("broke Durable: %s was told that the counter is %s at revision %d, the watch saw %q there", c.cp.name, text, revision, got)
			}
		}
	}
	if n := len(delivered); n < answered || n > answered+unknown {
		t.Errorf("the counter was raised %d times; %d additions were acknowledged and %d had no answer", n, answered, unknown)
	}
	if conflicts == 0 {
		t.Error("the counters never met: this test did not try conflicts")
	}
	t.Logf("counter: %d additions, %d conflicts, %d without an answer", len(delivered), conflicts, unknown)
}
