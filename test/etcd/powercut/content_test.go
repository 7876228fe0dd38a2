package powercut

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// random is a series of draws that the printed seed repeats.
func random(t testing.TB) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	if s := os.Getenv("QUIRE_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("QUIRE_SEED: %v", err)
		}
	}
	t.Logf("repeat with QUIRE_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

// sectors makes a content of whole sectors, a letter for each.
func sectors(letters string) []byte {
	var b []byte
	for _, l := range []byte(letters) {
		b = append(b, bytes.Repeat([]byte{l}, sectorBytes)...)
	}
	return b
}

// letters is the opposite: "." is a sector of zeros, "?" a torn one, and behind the last whole sector the length is told.
func letters(b []byte) string {
	var s strings.Builder
	for ; len(b) >= sectorBytes; b = b[sectorBytes:] {
		switch sector := b[:sectorBytes]; {
		case !bytes.Equal(sector, bytes.Repeat(sector[:1], sectorBytes)):
			s.WriteByte('?')
		case sector[0] == 0:
			s.WriteByte('.')
		default:
			s.WriteByte(sector[0])
		}
	}
	if len(b) > 0 {
		fmt.Fprintf(&s, "+%d", len(b))
	}
	return s.String()
}

// Each case lists everything that may be found after a cut, and all of it must be found.
func TestWhatSurvivesOfAFile(t *testing.T) {
	r := random(t)
	for _, c := range []struct {
		name string
		do   func(c *content)
		want string
	}{
		{"what is synced", func(c *content) { c.write(sectors("ab"), 0); c.sync(c.made) }, "ab"},
		{"nothing but old and new, in each sector for itself", func(c *content) {
			c.write(sectors("ab"), 0)
			c.sync(c.made)
			c.write(sectors("AB"), 0)
		}, "ab Ab aB AB"},
		{"every one of several writes", func(c *content) {
			c.write(sectors("a"), 0)
			c.sync(c.made)
			c.write(sectors("b"), 0)
			c.write(sectors("c"), 0)
		}, "a b c"},
		{"a file that has grown: its old length, or zeros, or what was written", func(c *content) {
			c.write(sectors("a"), 0)
			c.sync(c.made)
			c.write(sectors("bc"), sectorBytes)
		}, "a a.. ab. a.c abc"},
		{"lengths in their order, data in any", func(c *content) {
			c.write(sectors("a"), 0)
			c.write(sectors("b"), sectorBytes)
		}, "- . a .. a. .b ab"},
		{"a truncation or none, and nothing that it has cut off", func(c *content) {
			c.write(sectors("ab"), 0)
			c.sync(c.made)
			c.truncate(0)
			c.write(sectors("B"), sectorBytes)
		}, "ab - .. .B"},
		{"a length that is no whole sector", func(c *content) {
			c.write(sectors("a"), 0)
			c.sync(c.made)
			c.truncate(100)
		}, "a +100"},
		{"what a sync has begun with", func(c *content) {
			c.write(sectors("a"), 0)
			begun := c.made
			c.write(sectors("b"), 0)
			c.sync(begun)
		}, "a b"},
		{"the same after a second sync that began before the first ended", func(c *content) {
			c.write(sectors("a"), 0)
			first := c.made
			c.write(sectors("b"), 0)
			second := c.made
			c.write(sectors("c"), 0)
			c.sync(second)
			c.sync(first)
		}, "b c"},
		{"of a sync that failed nothing is made good by the next", func(c *content) {
			c.write(sectors("ab"), 0)
			c.sync(c.made)
			c.write(sectors("A"), 0)
			c.lose(r)
			c.write(sectors("B"), sectorBytes)
			c.sync(c.made)
		}, "aB AB"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var found []string
			for range 2000 {
				var file content
				c.do(&file)
				file.cut(r)
				if !bytes.Equal(file.now, file.disk) || len(file.pending) > 0 {
					t.Fatal("after a cut a file holds something else than its disk")
				}
				got := letters(file.now)
				if got == "" {
					got = "-"
				}
				if !slices.Contains(found, got) {
					found = append(found, got)
				}
			}
			want := strings.Fields(c.want)
			slices.Sort(found)
			slices.Sort(want)
			if !slices.Equal(found, want) {
				t.Errorf("found %q, want %q", found, want)
			}
		})
	}
}

// Against a dumb model that keeps the whole file after each change: what survives is, sector by sector, one of those.
func TestSurvivorsAreFormerContents(t *testing.T) {
	r := random(t)
	for range 1000 {
		var file content
		former := [][]byte{nil} // since the last sync
		for n := r.IntN(40); n > 0; n-- {
			switch r.IntN(10) {
			case 0:
				file.sync(file.made)
				former = former[len(former)-1:]
				continue
			case 1:
				file.truncate(r.Int64N(6 * sectorBytes))
			default:
				data := make([]byte, 1+r.IntN(3*sectorBytes))
				for i := range data {
					data[i] = byte(1 + r.IntN(255))
				}
				file.write(data, r.Int64N(4*sectorBytes))
			}
			former = append(former, slices.Clone(file.now))
		}
		if !bytes.Equal(file.now, former[len(former)-1]) {
			t.Fatal("a reader does not see what was written")
		}
		file.cut(r)
		if !slices.ContainsFunc(former, func(f []byte) bool { return len(f) == len(file.now) }) {
			t.Fatalf("after a cut the length is %d, which it never was", len(file.now))
		}
		for at := 0; at < len(file.now); at += sectorBytes {
			end := min(at+sectorBytes, len(file.now))
			if !slices.ContainsFunc(former, func(f []byte) bool {
				padded := make([]byte, max(len(f), end))
				copy(padded, f)
				return bytes.Equal(padded[at:end], file.now[at:end])
			}) {
				t.Fatalf("after a cut the sector at %d holds what it never held", at)
			}
		}
	}
}
