//go:build linux

package partitions

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
)

// store is a dumb etcd that is told the events of a history.
type store map[string]*mvccpb.KeyValue

// replay takes the events of one revision, and says what about them cannot be.
func (s store) replay(events []*mvccpb.Event) (wrong []string) {
	before := maps.Clone(s)
	for _, e := range events {
		key := string(e.Kv.Key)
		complain := func(format string, args ...any) {
			wrong = append(wrong, fmt.Sprintf("revision %d, %s %q: ", e.Kv.ModRevision, e.Type, key)+fmt.Sprintf(format, args...))
		}
		if !proto.Equal(e.PrevKv, before[key]) {
			complain("the watch says that %v was there before, it was %v", e.PrevKv, before[key])
		}
		old := s[key]
		if e.Type == mvccpb.Event_DELETE {
			if old == nil {
				complain("there is no such key")
			}
			delete(s, key)
			continue
		}
		version, created := int64(1), e.Kv.ModRevision
		if old != nil {
			version, created = old.Version+1, old.CreateRevision
		}
		if e.Kv.Version != version || e.Kv.CreateRevision != created {
			complain("version %d, created at %d; want version %d, created at %d", e.Kv.Version, e.Kv.CreateRevision, version, created)
		}
		s[key] = e.Kv
	}
	return wrong
}

// account compares what clients were told with the history of the store from its first revision up to and with last, and
// returns what does not fit.
func account(operations []*operation, events []*mvccpb.Event, last int64) (wrong []string) {
	a := &accountant{written: map[string][]*mvccpb.Event{}, at: map[int64][]*operation{}}
	for _, e := range events {
		if e.Type == mvccpb.Event_PUT {
			a.written[string(e.Kv.Value)] = append(a.written[string(e.Kv.Value)], e)
		}
	}
	a.nobodyWrote(operations, events)
	a.inTime(operations)
	a.inOrder(operations)

	for _, o := range operations {
		if o.err != nil {
			continue
		}
		if o.revision < 1 || o.revision > last {
			a.complain("an answer at revision %d, the store is at %d: %s", o.revision, last, o)
			continue
		}
		a.at[o.revision] = append(a.at[o.revision], o)
	}
	s := store{}
	for revision := int64(1); revision <= last; revision++ {
		n := 0
		for n < len(events) && events[n].Kv.ModRevision == revision {
			n++
		}
		if n == 0 && revision > 1 {
			a.complain("the history has no revision %d", revision)
		}
		before := maps.Clone(s)
		a.wrong = append(a.wrong, s.replay(events[:n])...)
		for _, o := range a.at[revision] {
			a.settle(o, before, s, events[:n])
		}
		events = events[n:]
	}
	if len(events) > 0 {
		a.complain("after revision %d comes %d", last, events[0].Kv.ModRevision)
	}
	return a.wrong
}

type accountant struct {
	written map[string][]*mvccpb.Event // by value
	at      map[int64][]*operation     // what was answered at a revision
	wrong   []string
}

func (a *accountant) complain(format string, args ...any) {
	a.wrong = append(a.wrong, fmt.Sprintf(format, args...))
}

// settle checks an answer at a revision against the states before and at it.
func (a *accountant) settle(o *operation, before, at store, events []*mvccpb.Event) {
	if o.wrote() {
		a.settleWrite(o, before, events)
		return
	}
	if o.kind == swap || o.kind == remove {
		if valueOf(at, o.key) == o.expect {
			a.complain("refused, though at revision %d the key is as it expects: %s", o.revision, o)
		}
	}
	want := map[string]*mvccpb.KeyValue{}
	for key, kv := range at {
		if key == o.key || o.kind == list && strings.HasPrefix(key, registers) {
			want[key] = kv
		}
	}
	if !maps.EqualFunc(o.found, want, func(a, b *mvccpb.KeyValue) bool { return proto.Equal(a, b) }) {
		a.complain("at revision %d the store has %v: %s", o.revision, want, o)
	}
}

func (a *accountant) settleWrite(o *operation, before store, events []*mvccpb.Event) {
	written := a.written[o.value]
	switch {
	case len(written) == 0:
		a.complain("acknowledged and lost: %s", o)
		return
	case written[0].Kv.ModRevision != o.revision:
		a.complain("it is revision %d: %s", written[0].Kv.ModRevision, o)
		return
	}
	if o.kind != put && valueOf(before, o.key) != o.expect {
		a.complain("done, though the key was %q before: %s", valueOf(before, o.key), o)
	}
	var changed []string
	for _, e := range events {
		changed = append(changed, fmt.Sprint(e.Type, " ", string(e.Kv.Key)))
	}
	slices.Sort(changed)
	want := []string{"PUT " + o.key}
	if o.kind == remove {
		want = []string{"DELETE " + o.key, "PUT " + marker(o.client)}
	}
	if !slices.Equal(changed, want) {
		a.complain("its revision changed %q, want %q: %s", changed, want, o)
	}
}

func valueOf(s store, key string) string {
	if kv := s[key]; kv != nil {
		return string(kv.Value)
	}
	return ""
}

// nobodyWrote looks for events that no operation asked for, or more than once.
func (a *accountant) nobodyWrote(operations []*operation, events []*mvccpb.Event) {
	sent := make(map[string]*operation, len(operations))
	for _, o := range operations {
		if o.value != "" {
			sent[o.value] = o
		}
	}
	for value, written := range a.written {
		if o := sent[value]; o != nil && len(written) > 1 {
			a.complain("applied %d times, as revisions %d and %d: %s", len(written), written[0].Kv.ModRevision, written[1].Kv.ModRevision, o)
		} else if o != nil && o.err == nil && !o.wrote() {
			a.complain("refused, and yet it is revision %d: %s", written[0].Kv.ModRevision, o)
		}
	}
	for _, e := range events {
		key := string(e.Kv.Key)
		if !strings.HasPrefix(key, registers) || e.Type != mvccpb.Event_PUT {
			continue
		}
		if o := sent[string(e.Kv.Value)]; o == nil || o.key != key {
			a.complain("revision %d puts %q = %q, which nobody sent", e.Kv.ModRevision, key, e.Kv.Value)
		}
	}
}

// inTime: a request that was made after something had been answered comes after it. What was answered at a revision shows
// that the revision was there, whoever was told.
func (a *accountant) inTime(operations []*operation) {
	answered := slices.DeleteFunc(slices.Clone(operations), func(o *operation) bool { return o.err != nil })
	slices.SortFunc(answered, func(a, b *operation) int { return cmp.Compare(a.returned, b.returned) })
	called := slices.Clone(operations)
	slices.SortFunc(called, func(a, b *operation) int { return cmp.Compare(a.called, b.called) })
	var newest *operation // of those answered before the call
	for _, o := range called {
		for len(answered) > 0 && answered[0].returned < o.called {
			if newest == nil || answered[0].revision > newest.revision {
				newest = answered[0]
			}
			answered = answered[1:]
		}
		if newest == nil || !o.kind.linearizable() {
			continue
		}
		switch written := a.written[o.value]; {
		case o.value != "" && len(written) > 0 && written[0].Kv.ModRevision <= newest.revision:
			a.complain("written at revision %d after revision %d had been answered:\n\t%s\n\tbefore: %s", written[0].Kv.ModRevision, newest.revision, o, newest)
		case o.err == nil && !o.wrote() && o.revision < newest.revision:
			a.complain("broke linearizability: answered at revision %d after revision %d had been answered:\n\t%s\n\tbefore: %s", o.revision, newest.revision, o, newest)
		}
	}
}

// inOrder: as long as it runs, a member never goes back in time, not even for serializable reads.
func (a *accountant) inOrder(operations []*operation) {
	type session struct {
		client int
		via    string
	}
	newest := map[session]*operation{}
	called := slices.Clone(operations)
	slices.SortStableFunc(called, func(a, b *operation) int { return cmp.Compare(a.called, b.called) })
	for _, o := range called {
		if o.err != nil {
			continue
		}
		s := session{o.client, o.via}
		before := newest[s]
		if before != nil && before.returned <= o.called && o.revision < before.revision {
			a.complain("the member went back from revision %d to %d:\n\t%s\n\tbefore: %s", before.revision, o.revision, o, before)
		}
		if before == nil || o.revision > before.revision {
			newest[s] = o
		}
	}
}

// acknowledged counts the writes that were, per span of time, for the log of a test.
func acknowledged(operations []*operation, from, to time.Duration) (writes, failed int) {
	for _, o := range operations {
		if o.returned < from || o.returned >= to {
			continue
		}
		if o.wrote() {
			writes++
		} else if o.err != nil {
			failed++
		}
	}
	return writes, failed
}
