//go:build linux

package partitions

import (
	"fmt"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
)

// kind is what a client asks for.
type kind int

const (
	put    kind = iota
	swap        // put if the key has a value (or none)
	remove      // delete, and put a marker, if the key has a value
	read        // of one key, linearizable
	list        // of all registers, linearizable
	stale       // of one key, serializable
)

func (k kind) String() string {
	return [...]string{"put", "swap", "remove", "read", "list", "stale read"}[k]
}

// linearizable says whether the answer must reflect everything that was answered to anybody before the question.
func (k kind) linearizable() bool { return k != stale }

// operation is one request of a client, and what it was told.
type operation struct {
	client int
	via    string // the member's name and how often it had been started
	kind   kind
	key    string
	value  string // to be written; no two operations write the same. That of remove goes to the client's marker
	expect string // what swap and remove compare with; "" is no such key

	called, returned time.Duration // since the record began

	err      error // if not nil, nothing below is known, and a write may still happen
	revision int64 // that of the answer's header
	done     bool  // a swap or remove has found what it expected
	found    map[string]*mvccpb.KeyValue
}

// wrote says whether the operation was acknowledged as a write.
func (o *operation) wrote() bool {
	return o.err == nil && (o.kind == put || (o.kind == swap || o.kind == remove) && o.done)
}

func (o *operation) String() string {
	what := fmt.Sprintf("%s %s", o.kind, o.key)
	switch o.kind {
	case put:
		what += fmt.Sprintf(" = %q", o.value)
	case swap, remove:
		what += fmt.Sprintf(" %q -> %q", o.expect, o.value)
	}
	what += fmt.Sprintf(" by client %d via %s, %v to %v", o.client, o.via, o.called.Round(time.Millisecond), o.returned.Round(time.Millisecond))
	if o.err != nil {
		return fmt.Sprintf("%s: %v", what, o.err)
	}
	return fmt.Sprintf("%s: revision %d, done %t, found %v", what, o.revision, o.done, values(o.found))
}

func values(kvs map[string]*mvccpb.KeyValue) map[string]string {
	found := make(map[string]string, len(kvs))
	for key, kv := range kvs {
		found[key] = string(kv.Value)
	}
	return found
}

// record is what all clients of a cluster did and were told.
type record struct {
	began time.Time

	mu struct {
		sync.Mutex
		operations []*operation
	}
}

func newRecord() *record { return &record{began: time.Now()} }

func (r *record) now() time.Duration { return time.Since(r.began) }

func (r *record) add(o *operation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.operations = append(r.mu.operations, o)
}

// operations are those that have returned.
func (r *record) operations() []*operation {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mu.operations[:len(r.mu.operations):len(r.mu.operations)]
}
