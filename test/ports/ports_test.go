package ports

import (
	"net"
	"sync"
	"testing"
)

// TestAPortIsHandedOutOnce asks from many sides at once, as tests that run in parallel do.
func TestAPortIsHandedOutOnce(t *testing.T) {
	const askers, each = 20, 50
	var mu sync.Mutex
	seen := map[int]bool{}
	var all sync.WaitGroup
	for range askers {
		all.Go(func() {
			for range each {
				port, err := Free()
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				if seen[port] {
					t.Errorf("port %d is handed out twice", port)
				}
				seen[port] = true
				mu.Unlock()
			}
		})
	}
	all.Wait()
}

func TestATakenPortIsPassedOver(t *testing.T) {
	port, err := Free()
	if err != nil {
		t.Fatal(err)
	}
	// The one that is next in turn.
	taken, err := net.Listen("tcp", Loopback(first+(port-first+1)%count))
	if err != nil {
		t.Skipf("somebody else has it: %v", err)
	}
	defer taken.Close()
	after, err := Free()
	if err != nil {
		t.Fatal(err)
	}
	if Loopback(after) == taken.Addr().String() {
		t.Errorf("port %d is handed out while a server listens on it", after)
	}
}
