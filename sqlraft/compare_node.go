package sqlraft

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// comparePath ends in what is hashed: a version of quire that hashes something else needs another path, and answers none of
// this one's questions.
const comparePath = "sqlraft/compare/1"

// CompareOptions say what of the state is compared with other members, and when. Any member answers; only the leader asks.
type CompareOptions struct {
	History History // nil: nothing is compared, and nobody is answered
	// Every is how often a part is compared; 0: never. Compactions is the same, for etcd's feature gate CompactHashCheck.
	Every, Compactions time.Duration
}

// compareLoop compares while this member leads.
func (n *Node) compareLoop() {
	every, compactions := time.Tick(n.o.Compare.Every), time.Tick(n.o.Compare.Compactions) // nil for 0
	var c *comparer
	for {
		forCompactions := false
		select {
		case <-every:
		case <-compactions:
			forCompactions = true
		case <-n.ctx.Done():
			return
		}
		if n.Status().Leader != n.o.ID {
			c = nil
			continue
		}
		if c == nil {
			c = n.newComparer()
		}
		done, err := c.check(n.ctx)
		if n.ctx.Err() != nil {
			return
		}
		done.ForCompactions = forCompactions
		n.o.Hooks.Compared(done, err)
	}
}

func (n *Node) newComparer() *comparer {
	return newComparer(n.o.ID, n.o.Compare.History, n, n.o.requestTimeout(), n.o.Hooks.Differs)
}

// CompareAll compares the whole history with all other members that can be reached, whoever leads, and returns an
// ErrInconsistent if this member differs and is not of a majority. Members that cannot be reached are skipped. Other errors
// say that it came to nothing.
func (n *Node) CompareAll(ctx context.Context) (Comparison, error) {
	if n.o.Compare.History == nil {
		return Comparison{}, errors.New("sqlraft: Options.Compare.History is not set")
	}
	return n.newComparer().checkWhole(ctx)
}

// barrier is that of comparedCluster.
func (n *Node) barrier(ctx context.Context) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, n.o.requestTimeout())
	defer cancel()
	index, err := n.ReadIndex(ctx)
	if err != nil {
		return 0, err
	}
	return index, n.waitApplied(ctx, index)
}

// askPart is that of comparedCluster.
func (n *Node) askPart(ctx context.Context, id uint64, q part) (a partAnswer, err error) {
	body, err := json.Marshal(q)
	if err != nil {
		return a, err
	}
	data, err := n.t.request(ctx, id, comparePath, body)
	if err != nil {
		return a, err
	}
	if err := json.Unmarshal(data, &a); err != nil {
		return a, fmt.Errorf("sqlraft: what member %x answers: %w", id, err)
	}
	return a, nil
}

// serveCompare answers for this member.
func (n *Node) serveCompare(ctx context.Context, body []byte) ([]byte, error) {
	if n.o.Compare.History == nil {
		return nil, errors.New("sqlraft: this member does not compare")
	}
	var q part
	if err := json.Unmarshal(body, &q); err != nil {
		return nil, fmt.Errorf("sqlraft: %q is no question for a part of the history: %w", body, err)
	}
	// Whoever asks gives up before.
	ctx, cancel := context.WithTimeout(ctx, 2*n.o.requestTimeout())
	defer cancel()
	if err := n.waitApplied(ctx, q.Index); err != nil {
		return nil, err
	}
	a, err := answerPart(ctx, n.o.Compare.History, n.life, q)
	if err != nil {
		return nil, err
	}
	return json.Marshal(a)
}
