package differential

import (
	"errors"
	"testing"
	"time"

	"github.com/quire-db/quire/test/etcd/start"
)

// sequence is what was played on a pair from an empty store until it ended or a difference showed.
type sequence struct {
	seed       uint64
	base       int64 // revision of the store at its beginning
	operations []operation
	err        error // a *difference, or what kept the test from going on
}

// random plays up to n random operations from an empty store. After each the generator is told what the
// store looks like, so that what it makes has a meaning there.
func random(p *pair, seed uint64, n int) sequence {
	q := sequence{seed: seed}
	if q.err = p.reset(seed); q.err != nil {
		return q
	}
	q.base = p.base
	g := newGenerator(seed)
	for range n {
		g.base, g.head, g.compacted = p.base, p.head, p.compact
		for i, open := range p.open {
			clear(g.watches[i])
			for id := range open {
				g.watches[i][id] = true
			}
		}
		o := g.next()
		q.operations = append(q.operations, o)
		if q.err = p.play(o); q.err != nil {
			return q
		}
	}
	q.err = p.finish()
	return q
}

// replay plays q again on another pair.
func replay(p *pair, q sequence) error {
	if err := p.reset(q.seed); err != nil {
		return err
	}
	for _, o := range q.operations {
		if err := p.play(o.shifted(p.base - q.base)); err != nil {
			return err
		}
	}
	return p.finish()
}

// shrink drops operations from q as long as a difference remains: halves first, single ones at last. It
// stops at the deadline with what it has.
func shrink(t *testing.T, q sequence, first, second start.Func, deadline time.Time) sequence {
	// After a difference the two stores are perhaps no longer alike, so the next try has two fresh
	// servers; as long as they agree they serve for many tries.
	var p *pair
	defer func() {
		if p != nil {
			p.close()
		}
	}()
	fails := func(try sequence) error {
		if p == nil {
			var err error
			if p, err = newPair(first(t, start.Options{}), second(t, start.Options{})); err != nil {
				t.Logf("no servers for a shorter sequence: %v", err)
				p = nil
				return nil
			}
		}
		err := replay(p, try)
		if err == nil {
			return nil
		}
		p.close()
		p = nil
		var d *difference
		if errors.As(err, &d) {
			return d
		}
		return nil
	}
	for size := (len(q.operations) + 1) / 2; size >= 1; {
		dropped := false
		// From the end, so that what comes after the last needed operation goes first.
		for to := len(q.operations); to > 0; {
			if time.Now().After(deadline) {
				return q
			}
			from := max(to-size, 0)
			try := sequence{seed: q.seed, base: q.base}
			try.operations = append(append(try.operations, q.operations[:from]...), q.operations[to:]...)
			if err := fails(try); err != nil {
				q, dropped = try, true
				q.err = err
			}
			to = from
		}
		if size == 1 && !dropped {
			break
		}
		size = max(size/2, 1)
	}
	return q
}
