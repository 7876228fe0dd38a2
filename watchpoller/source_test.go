package watchpoller

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"sort"
	"sync"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

// A memSource is a Source over a list of rows in memory.
type memSource struct {
	mu       sync.Mutex
	rows     []backend.Event
	live     map[string]*mvccpb.KeyValue
	rev      int64
	compact  int64
	subs     map[int]func(int64)
	nextSub  int
	reads    int   // calls of History
	failing  error // what reads return, if not nil
	held     chan struct{}
	largest  int // most events that one read brought
	prevRead int // calls of PrevKV
}

func newMemSource() *memSource {
	return &memSource{live: make(map[string]*mvccpb.KeyValue), rev: 1, subs: make(map[int]func(int64))}
}

func frame(kv *mvccpb.KeyValue) backend.Frame {
	b, err := proto.Marshal(kv)
	if err != nil {
		panic(err)
	}
	return protowire.AppendBytes(protowire.AppendTag(nil, 2, protowire.BytesType), b)
}

// An op is a put, or a delete when del is set.
type op struct {
	key, value string
	del        bool
}

// txn commits ops as one revision and returns it. Deletes of missing keys are left out.
func (m *memSource) txn(ops ...op) int64 {
	m.mu.Lock()
	rev := m.rev + 1
	n := len(m.rows)
	for _, o := range ops {
		old := m.live[o.key]
		if o.del {
			if old == nil {
				continue
			}
			delete(m.live, o.key)
			kv := &mvccpb.KeyValue{Key: []byte(o.key), ModRevision: rev}
			m.rows = append(m.rows, backend.Event{Rev: rev, Type: mvccpb.DELETE, Key: kv.Key, KV: frame(kv)})
			continue
		}
		kv := &mvccpb.KeyValue{Key: []byte(o.key), Value: []byte(o.value), CreateRevision: rev, ModRevision: rev, Version: 1}
		if old != nil {
			kv.CreateRevision, kv.Version = old.CreateRevision, old.Version+1
		}
		m.live[o.key] = kv
		m.rows = append(m.rows, backend.Event{Rev: rev, Type: mvccpb.PUT, Key: kv.Key, KV: frame(kv)})
	}
	if len(m.rows) > n {
		m.rev = rev
	}
	rev = m.rev
	m.mu.Unlock()
	m.tell(rev)
	return rev
}

func (m *memSource) put(key, value string) int64 { return m.txn(op{key: key, value: value}) }

func (m *memSource) compactAt(rev int64) {
	m.mu.Lock()
	m.compact = max(m.compact, rev)
	now := m.rev
	m.mu.Unlock()
	m.tell(now)
}

func (m *memSource) tell(rev int64) {
	m.mu.Lock()
	var fs []func(int64)
	for _, f := range m.subs {
		fs = append(fs, f)
	}
	m.mu.Unlock()
	for _, f := range fs {
		f(rev)
	}
}

// hold makes reads wait until release.
func (m *memSource) hold() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.held = make(chan struct{})
}

func (m *memSource) release() {
	m.mu.Lock()
	defer m.mu.Unlock()
	close(m.held)
	m.held = nil
}

func (m *memSource) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.failing = err
}

func (m *memSource) wait(ctx context.Context) error {
	m.mu.Lock()
	held := m.held
	m.mu.Unlock()
	if held != nil {
		select {
		case <-held:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (m *memSource) History(ctx context.Context, req backend.HistoryRequest) (backend.HistoryResult, error) {
	if err := m.wait(ctx); err != nil {
		return backend.HistoryResult{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reads++
	if m.failing != nil {
		return backend.HistoryResult{}, m.failing
	}
	if req.From < m.compact {
		return backend.HistoryResult{}, &backend.CompactedError{CompactRevision: m.compact}
	}
	res := backend.HistoryResult{Next: m.rev + 1, Head: m.rev}
	rng := watchRange(req.Key, req.RangeEnd)
	size := 0
	for i := sort.Search(len(m.rows), func(i int) bool { return m.rows[i].Rev >= req.From }); i < len(m.rows); i++ {
		e := m.rows[i]
		full := req.MaxEvents > 0 && len(res.Events) >= req.MaxEvents || req.MaxBytes > 0 && size >= req.MaxBytes
		if full && e.Rev != m.rows[i-1].Rev {
			res.Next = e.Rev
			break
		}
		if rng.contains(e.Key) {
			res.Events = append(res.Events, e)
			size += len(e.KV)
		}
	}
	m.largest = max(m.largest, len(res.Events))
	return res, nil
}

// recentRevs is how many revisions the source has in memory: so few that both ways are gone in every test.
const recentRevs = 3

func (m *memSource) Recent(req backend.HistoryRequest) (backend.HistoryResult, bool) {
	m.mu.Lock()
	refused := m.held != nil || m.failing != nil || req.From <= m.rev-recentRevs
	m.mu.Unlock()
	if refused {
		return backend.HistoryResult{}, false
	}
	res, err := m.History(context.Background(), req)
	return res, err == nil
}

func (m *memSource) PrevKV(ctx context.Context, key []byte, rev int64) (backend.Frame, error) {
	if err := m.wait(ctx); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.prevRead++
	if m.failing != nil {
		return nil, m.failing
	}
	if rev-1 < m.compact {
		return nil, nil
	}
	for i := sort.Search(len(m.rows), func(i int) bool { return m.rows[i].Rev >= rev }) - 1; i >= 0; i-- {
		if bytes.Equal(m.rows[i].Key, key) {
			if m.rows[i].Type == mvccpb.DELETE {
				return nil, nil
			}
			return slices.Clone(m.rows[i].KV), nil
		}
	}
	return nil, nil
}

func (m *memSource) Subscribe(f func(int64)) func() {
	m.mu.Lock()
	defer m.mu.Unlock()
	id := m.nextSub
	m.nextSub++
	m.subs[id] = f
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.subs, id)
	}
}

func (m *memSource) Revision() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rev
}

func (m *memSource) CompactRevision() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.compact
}

// contains is the naive truth about ranges, for tests and models.
func (r keyRange) contains(key []byte) bool {
	switch {
	case r.single():
		return bytes.Equal(key, r.key)
	case bytes.Compare(key, r.key) < 0:
		return false
	}
	return r.unbounded() || bytes.Compare(key, r.end) < 0
}

var errBroken = errors.New("the disk cannot be read")
