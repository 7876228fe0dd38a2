//go:build linux

package partitions

import (
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/anishathalye/porcupine"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// question and answer are an operation on one register as porcupine sees it: without revisions.
type question struct {
	key           string
	kind          kind
	value, expect string
}

type answer struct {
	known bool
	done  bool   // of swap and remove
	found string // by a read, or by a swap that was refused
}

// registers are checked one by one. The state of one is its value, "" while there is none.
var registerModel = porcupine.Model{
	Init: func() any { return "" },
	Step: func(state, input, output any) (bool, any) {
		q, a := input.(question), output.(answer)
		value := state.(string)
		switch q.kind {
		case put:
			return true, q.value
		case swap, remove:
			after := q.value
			if q.kind == remove {
				after = ""
			}
			switch {
			case value == q.expect:
				return a.done || !a.known, after
			default:
				return !a.known || !a.done && a.found == value, value
			}
		default:
			return a.found == value, value
		}
	},
	DescribeOperation: func(input, output any) string {
		q, a := input.(question), output.(answer)
		return fmt.Sprintf("%s %q if %q: %+v", q.kind, q.value, q.expect, a)
	},
}

// linear has porcupine look whether each register behaved as one that is in one place. A write of unknown outcome may
// take effect at any time after its call, or, unless the history of the store has it, never. Artifacts, if not "", is
// where a picture of a bad history goes.
func linear(operations []*operation, events []*mvccpb.Event, limit time.Duration, artifacts string) error {
	happened := map[string]bool{}
	keys := map[string]bool{}
	for _, e := range events {
		happened[string(e.Kv.Value)] = true
		keys[string(e.Kv.Key)] = true
	}
	histories := map[string][]porcupine.Operation{}
	add := func(o *operation, key string, a answer) {
		returned := int64(o.returned)
		if !a.known {
			returned = math.MaxInt64
		}
		histories[key] = append(histories[key], porcupine.Operation{
			ClientId: o.client,
			Input:    question{key: key, kind: o.kind, value: o.value, expect: o.expect},
			Output:   a,
			Call:     int64(o.called),
			Return:   returned,
		})
	}
	for _, o := range operations {
		switch {
		case o.kind == stale:
		case o.err != nil && (o.value == "" || !happened[o.value]):
		case o.err != nil:
			add(o, o.key, answer{})
		case o.kind == list:
			for key := range keys {
				if isRegister(key) {
					add(o, key, answer{known: true, found: string(o.found[key].GetValue())})
				}
			}
		default:
			add(o, o.key, answer{known: true, done: o.done, found: string(o.found[o.key].GetValue())})
		}
	}
	for _, key := range slices.Sorted(maps.Keys(histories)) {
		result, info := porcupine.CheckOperationsVerbose(registerModel, histories[key], limit)
		switch result {
		case porcupine.Ok:
			continue
		case porcupine.Unknown:
			return fmt.Errorf("porcupine could not tell within %v whether the %d operations on %s are linearizable", limit, len(histories[key]), key)
		}
		if artifacts == "" {
			return fmt.Errorf("the %d operations on %s are not linearizable; QUIRE_ARTIFACTS=directory keeps a picture", len(histories[key]), key)
		}
		picture := filepath.Join(artifacts, "not-linearizable.html")
		out, err := os.Create(picture)
		if err == nil {
			err = porcupine.Visualize(registerModel, info, out)
		}
		return fmt.Errorf("the %d operations on %s are not linearizable, see %s (%v)", len(histories[key]), key, picture, err)
	}
	return nil
}
