package outages

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// load is writers that never stop, and an account of what each was told. Every value is written once, by one request, so
// a request that was applied twice shows.
type load struct {
	t    *testing.T
	end  context.CancelFunc
	done sync.WaitGroup

	mu struct {
		sync.Mutex
		notes []note
	}
}

// note is what one writer was told of one request.
type note struct {
	key, value string
	revision   int64 // of an acknowledged one
	err        error
	took       time.Duration
}

// refusal: the server says that nothing was changed.
func (n *note) refusal() bool {
	return n.err != nil && (status.Code(n.err) != codes.Unavailable || strings.Contains(n.err.Error(), "nothing was changed"))
}

// write starts writers on each quire. Every second one writes to keys of its own, the others to keys that all of them
// compare and swap, so that they meet in every batch.
func write(t *testing.T, perQuire int, quires ...*quire) *load {
	ctx, cancel := context.WithCancel(t.Context())
	l := &load{t: t, end: cancel}
	for i, q := range quires {
		for w := range perQuire {
			name := fmt.Sprintf("%d.%d", i, w)
			l.done.Go(func() {
				if w%2 == 0 {
					l.putAll(ctx, q, name)
				} else {
					l.swapAll(ctx, q, name)
				}
			})
		}
	}
	t.Cleanup(l.stop)
	return l
}

const loadPrefix = "load/"

func (l *load) putAll(ctx context.Context, q *quire, name string) {
	for i := 0; ctx.Err() == nil; i++ {
		n := note{key: fmt.Sprint(loadPrefix, name, "/", i%3), value: fmt.Sprint(name, "-", i)}
		l.request(ctx, n, func(ctx context.Context) (int64, bool, error) {
			r, err := q.kv.Put(ctx, &pb.PutRequest{Key: []byte(n.key), Value: []byte(n.value)})
			return r.GetHeader().GetRevision(), true, err
		})
	}
}

func (l *load) swapAll(ctx context.Context, q *quire, name string) {
	known := map[string]int64{}
	for i := 0; ctx.Err() == nil; i++ {
		n := note{key: fmt.Sprint(loadPrefix, "shared/", i%2), value: fmt.Sprint(name, "-", i)}
		key := []byte(n.key)
		l.request(ctx, n, func(ctx context.Context) (int64, bool, error) {
			r, err := q.kv.Txn(ctx, &pb.TxnRequest{
				Compare: []*pb.Compare{{Key: key, Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: known[n.key]}}},
				Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: key, Value: []byte(n.value)}}}},
				Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: key}}}},
			})
			switch {
			case err != nil:
				return 0, false, err
			case r.Succeeded:
				known[n.key] = r.Header.Revision
			default:
				known[n.key] = 0
				if kvs := r.Responses[0].GetResponseRange().Kvs; len(kvs) > 0 {
					known[n.key] = kvs[0].ModRevision
				}
			}
			return r.Header.Revision, r.Succeeded, nil
		})
	}
}

// request sends one and notes what comes of it, unless it was not to be applied.
func (l *load) request(ctx context.Context, n note, send func(context.Context) (revision int64, written bool, err error)) {
	began := time.Now()
	// The end of the load withdraws no request: its answer is wanted.
	within, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	revision, written, err := send(within)
	if err == nil && !written {
		return
	}
	n.revision, n.err, n.took = revision, err, time.Since(began)
	l.mu.Lock()
	l.mu.notes = append(l.mu.notes, n)
	l.mu.Unlock()
	if err != nil {
		// As a client would, instead of turning in circles.
		time.Sleep(20 * time.Millisecond)
	}
}

// stop ends the writers and waits for their last answers.
func (l *load) stop() {
	l.end()
	l.done.Wait()
}

// acknowledged is how many requests were by now.
func (l *load) acknowledged() (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.mu.notes {
		if l.mu.notes[i].err == nil {
			n++
		}
	}
	return n
}

// more waits until so many further requests are acknowledged.
func (l *load) more(n int) {
	l.t.Helper()
	wanted := l.acknowledged() + n
	for deadline := time.Now().Add(patience); l.acknowledged() < wanted; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			l.t.Fatalf("writers have stopped: %d of %d further writes within %v\n%s", n-(wanted-l.acknowledged()), n, patience, l.summary())
		}
	}
}

// errors are what was said to whom was not acknowledged, once each, with their number.
func (l *load) errors() map[string]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	said := map[string]int{}
	for i := range l.mu.notes {
		if err := l.mu.notes[i].err; err != nil {
			said[err.Error()]++
		}
	}
	return said
}

func (l *load) summary() string {
	var text strings.Builder
	said := l.errors()
	total := 0
	for _, n := range said {
		total += n
	}
	fmt.Fprintf(&text, "%d acknowledged, %d not", l.acknowledged(), total)
	for i, s := range slices.Sorted(maps.Keys(said)) {
		if i == 8 {
			fmt.Fprintf(&text, "\n  … and %d texts more", len(said)-i)
			break
		}
		fmt.Fprintf(&text, "\n  %d × %.300s", said[s], s)
	}
	return text.String()
}

// stored is a row of the table.
type stored struct {
	revision, version int64
	key, value        string
}

// rows are all puts below a prefix, in order, as they stand in the table.
func (s *store) rows(t *testing.T, prefix string) []stored {
	t.Helper()
	const query = `SELECT rev, version, convert_from(key, 'UTF8'), convert_from(value, 'UTF8') FROM quire.revisions
		WHERE NOT deleted AND starts_with(convert_from(key, 'UTF8'), '%s') ORDER BY id`
	found, err := s.Query(t.Context(), s.database, fmt.Sprintf(query, prefix))
	if err != nil {
		t.Fatal(err)
	}
	all := make([]stored, len(found))
	for i, r := range found {
		all[i] = stored{revision: number(t, r[0]), version: number(t, r[1]), key: r[2], value: r[3]}
	}
	return all
}

func number(t *testing.T, text string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// account compares what the writers were told with what stands in the table. REQUIRES: the load has stopped, nothing was
// compacted.
func (l *load) account(s *store) {
	l.t.Helper()
	l.t.Log(l.summary())
	at := map[string]stored{}
	versions := map[string]int64{}
	for _, r := range s.rows(l.t, loadPrefix) {
		if before, twice := at[r.value]; twice {
			l.t.Errorf("%q was applied twice, as revisions %d and %d", r.value, before.revision, r.revision)
		}
		at[r.value] = r
		versions[r.key]++
		if r.version != versions[r.key] {
			l.t.Errorf("revision %d makes version %d of %q, want %d", r.revision, r.version, r.key, versions[r.key])
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, n := range l.mu.notes {
		r, there := at[n.value]
		switch {
		case n.err == nil && !there:
			l.t.Errorf("%q was acknowledged as revision %d and is lost", n.value, n.revision)
		case n.err == nil && (r.revision != n.revision || r.key != n.key):
			l.t.Errorf("%q was acknowledged as revision %d of %q and is revision %d of %q", n.value, n.revision, n.key, r.revision, r.key)
		case n.refusal() && there:
			l.t.Errorf("%q was refused (%v) and is revision %d", n.value, n.err, r.revision)
		}
	}
	if gaps := s.value(l.t, `SELECT max(rev) - 1 - count(DISTINCT rev) FROM quire.revisions`); gaps != "0" {
		l.t.Errorf("%s revisions are missing", gaps)
	}
}

// onlyUnavailable wants every refusal to be one that a client may try again.
func (l *load) onlyUnavailable() {
	l.t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	others, example := 0, error(nil)
	for _, n := range l.mu.notes {
		if n.err != nil && status.Code(n.err) != codes.Unavailable {
			others++
			example = n.err
		}
	}
	if others > 0 {
		l.t.Errorf("%d writes were refused with something else than Unavailable, such as %v", others, example)
	}
}

// slowestRefusal is the longest that a writer waited only to be refused.
func (l *load) slowestRefusal() (longest time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, n := range l.mu.notes {
		if n.err != nil {
			longest = max(longest, n.took)
		}
	}
	return longest
}

// noError wants every request to have been acknowledged.
func (l *load) noError() {
	l.t.Helper()
	if len(l.errors()) > 0 {
		l.t.Errorf("clients saw errors: %s", l.summary())
	}
}

// agree wants all quires to serve the same keys, with the same revisions, versions, leases and values.
func agree(t *testing.T, quires ...*quire) {
	t.Helper()
	var first *pb.RangeResponse
	for i, q := range quires {
		everything := &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}
		if i > 0 {
			everything.Revision = first.Header.Revision
		}
		var r *pb.RangeResponse
		eventually(t, "a read", patience, func(ctx context.Context) (err error) {
			r, err = q.kv.Range(ctx, everything)
			return err
		})
		if i == 0 {
			first = r
		}
		if !slices.EqualFunc(r.Kvs, first.Kvs, func(a, b *mvccpb.KeyValue) bool { return proto.Equal(a, b) }) {
			t.Errorf("quire %d has other keys at revision %d than quire 0", i, first.Header.Revision)
		}
	}
}
