package k8s

import (
	"context"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

// The defaults of kube-controller-manager and kube-scheduler.
const (
	leaseDuration = 15 * time.Second
	renewDeadline = 10 * time.Second
	retryPeriod   = 2 * time.Second
)

const electionName = "election"

// election is one candidate beside each API server, as the controller managers
// of a cluster are. They contend for one Lease object.
type election struct {
	namespace string

	mu    sync.Mutex
	terms []string // who led, in order
	lost  []string // who stopped leading though nobody had asked it to
}

func startElection(t *testing.T, planes []*controlPlane, namespace string) *election {
	t.Helper()
	e := &election{namespace: namespace}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	for _, cp := range planes {
		config := rest.CopyConfig(cp.config)
		config.Timeout = renewDeadline / 2 // as the components of Kubernetes do
		client, err := kubernetes.NewForConfig(config)
		if err != nil {
			t.Fatal(err)
		}
		elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
			Lock: &resourcelock.LeaseLock{
				LeaseMeta:  metav1.ObjectMeta{Namespace: namespace, Name: electionName},
				Client:     client.CoordinationV1(),
				LockConfig: resourcelock.ResourceLockConfig{Identity: cp.name},
			},
			LeaseDuration: leaseDuration,
			RenewDeadline: renewDeadline,
			RetryPeriod:   retryPeriod,
			Callbacks: leaderelection.LeaderCallbacks{
				OnStartedLeading: func(context.Context) { e.note(&e.terms, cp.name) },
				OnStoppedLeading: func() {
					if ctx.Err() == nil {
						e.note(&e.lost, cp.name)
					}
				},
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		running.Go(func() { elector.Run(ctx) })
	}
	return e
}

func (e *election) note(list *[]string, name string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	*list = append(*list, name)
}

// leader waits for the first leader, and returns which of the planes it is
// beside.
func (e *election) leader(t *testing.T, planes []*controlPlane) int {
	t.Helper()
	leader := -1
	eventually(t, leaseDuration, func() (bool, string) {
		e.mu.Lock()
		defer e.mu.Unlock()
		for i, cp := range planes {
			if len(e.terms) > 0 && e.terms[0] == cp.name {
				leader = i
			}
		}
		return leader >= 0, "nobody was elected"
	})
	return leader
}

// check claims that the first leader led all the time, and that everybody sees
// it so.
func (e *election) check(t *testing.T, planes []*controlPlane) {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.terms) != 1 || len(e.lost) != 0 {
		t.Errorf("the leaders were %v, and these stopped leading: %v; want that the first goes on all the time", e.terms, e.lost)
		return
	}
	for _, cp := range planes {
		lease, err := cp.typed.CoordinationV1().Leases(e.namespace).Get(t.Context(), electionName, metav1.GetOptions{})
		if err != nil {
			t.Errorf("%s: reading the lease of the election: %v", cp.name, err)
			continue
		}
		holder, transitions := lease.Spec.HolderIdentity, lease.Spec.LeaseTransitions
		if holder == nil || *holder != e.terms[0] || transitions == nil || *transitions != 0 {
			t.Errorf("%s: the lease shows %+v, want that %s has held it from the start", cp.name, lease.Spec, e.terms[0])
		}
	}
}
