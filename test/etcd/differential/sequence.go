package differential

import (
	"errors"
	"testing"
	"time"

	"github.com/quire-db/quire/test/etcd/start"
)

// sequence is what was played on a pair from an empty store until it ended or a difference showed.
type sequence struct {
	base       int64 // revision of the store at its beginning
	operations []operation
	err        error // a *difference, or what kept the test from going on
}

// random plays up to n random operations from an empty store. After each the generator is told what the
// store looks like, so that what it makes has a meaning there.
func random(p *pair, seed uint64, n int) sequence {
	var q sequence
	if q.err = p.reset(); q.err != nil {
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
	if err := p.reset(); err != nil {
		return err
	}
	for _, o := range q.operations {
		if err := p.play(o.shifted(p.base - q.base)); err != nil {
			return err
		}
	}
	return p.finish()
}

// shrink drops operations from q as long as a difference remains: halves first, single ones at last. Each
// try has two fresh servers, because after a difference the old ones are no longer alike. It stops at the
// deadline with what it has.
func shrink(t *testing.T, q sequence, first, second start.Func, deadline time.Time) sequence {
	fails := func(try sequence) error {
		var err error
		t.Run("try", func(t *testing.T) {
			p, perr := newPair(first(t, start.Options{}), second(t, start.Options{}))
			if perr != nil {
				t.Logf("no servers for a shorter sequence: %v", perr)
				return
			}
			defer p.close()
			err = replay(p, try)
		})
		var d *difference
		if errors.As(err, &d) {
			return d
		}
		return nil
	}
	for size := (len(q.operations) + 1) / 2; size >= 1; {
		dropped := false
		for from := 0; from < len(q.operations); {
			if time.Now().After(deadline) {
				return q
			}
			to := min(from+size, len(q.operations))
			try := sequence{base: q.base}
			try.operations = append(append(try.operations, q.operations[:from]...), q.operations[to:]...)
			if err := fails(try); err != nil {
				q, dropped = try, true
				q.err = err
				continue // the next ones have moved to from
			}
			from = to
		}
		if size == 1 && !dropped {
			break
		}
		size = max(size/2, 1)
		if size == 1 && len(q.operations) == 0 {
			break
		}
	}
	return q
}
