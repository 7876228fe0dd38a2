package crash

import (
	"bytes"
	"fmt"
	"hash/fnv"
	"strings"
)

// outcome is what the client that sent a write knows of it.
type outcome int

const (
	unknown      outcome = iota // no answer came: it may have happened or not, but at most once
	acknowledged                // answered: it must be in the history at write.rev
	refused                     // answered with an error, or a Txn whose compare failed: it must not be there
)

func (o outcome) String() string {
	return [...]string{"without an answer", "acknowledged", "refused"}[o]
}

// write is one request that changes keys, what it should do, and what became of it.
type write struct {
	id      string // unique over the whole run; every value it puts begins with it
	client  string // a client sends one write after the other
	seq     int    // position among the writes of its client
	after   int64  // newest revision that any client had been told of when this was sent
	guard   []guard
	steps   []step
	outcome outcome
	rev     int64 // of the answer, if acknowledged
	prev    *prev // what prev_kv of the answer said, if it was asked for
}

// guard is one compare of a Txn: the key's mod_revision was rev (0: there was no such key).
type guard struct {
	key string
	rev int64
}

// step is one operation: a put of a value with the given size, or a delete of [key, end) (of key if end is empty).
type step struct {
	del   bool
	key   string
	end   string
	size  int
	lease int64
}

// prev is the key as it was before a put: its mod_revision, 0 when there was none.
type prev struct{ rev int64 }

func (w *write) String() string {
	return fmt.Sprintf("write %s of %s (%s, revision %d)", w.id, w.client, w.outcome, w.rev)
}

// value is what a write puts with a step of this size: the id, a slash, and filling that follows from the id, so that nobody
// has to keep the bytes to know them again.
func value(id string, size int) []byte {
	b := make([]byte, 0, len(id)+1+size)
	b = append(b, id...)
	b = append(b, '/')
	h := fnv.New64a()
	h.Write([]byte(id))
	x := h.Sum64() | 1
	for range size {
		// xorshift: a filling that neither repeats nor compresses.
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b = append(b, byte(x))
	}
	return b
}

// writeID is the id of the write that put the value, "" if no client of ours made it.
func writeID(value []byte) string {
	id, _, ok := bytes.Cut(value, []byte("/"))
	if !ok {
		return ""
	}
	return string(id)
}

// covers says whether a step's range holds the key.
func (s step) covers(key string) bool {
	if s.end == "" {
		return key == s.key
	}
	return strings.Compare(key, s.key) >= 0 && strings.Compare(key, s.end) < 0
}
