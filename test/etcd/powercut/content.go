package powercut

import (
	"maps"
	"math/rand/v2"
	"slices"
)

// sectorBytes is what a disk writes whole or not at all.
const sectorBytes = 512

// content is what one file holds: for those who read it, and on the disk.
type content struct {
	now     []byte
	disk    []byte   // certainly there after a power cut, but for pending
	pending []change // made since, oldest first
	made    int      // changes ever made
}

// change is a write of data at an offset, or, without data, a change of the length alone.
type change struct {
	at   int64
	data []byte
	size int64 // of the file afterwards
}

// write takes a copy of data.
func (c *content) write(data []byte, at int64) {
	if end := at + int64(len(data)); end > int64(len(c.now)) {
		c.now = resize(c.now, end)
	}
	copy(c.now[at:], data)
	c.add(change{at: at, data: slices.Clone(data), size: int64(len(c.now))})
}

func (c *content) truncate(size int64) {
	c.now = resize(c.now, size)
	c.add(change{size: size})
}

func (c *content) add(ch change) {
	c.pending = append(c.pending, ch)
	c.made++
}

// resize cuts b or fills it up with zeros.
func resize(b []byte, size int64) []byte {
	if size <= int64(len(b)) {
		return b[:size]
	}
	old := len(b)
	b = slices.Grow(b, int(size)-old)[:size]
	clear(b[old:])
	return b
}

// sync makes the first `made` changes of all durable, as far as they are not yet.
func (c *content) sync(made int) {
	n := max(made-(c.made-len(c.pending)), 0)
	for _, ch := range c.pending[:n] {
		c.disk = resize(c.disk, ch.size)
		copy(c.disk[ch.at:], ch.data)
	}
	c.pending = slices.Delete(c.pending, 0, n)
}

// lose is a sync that failed: some of the pending changes have reached the disk, and the others never will, although
// those who read the file still see them. So Linux does: pages whose write failed count as clean.
func (c *content) lose(r *rand.Rand) {
	c.disk = c.survivors(r)
	c.pending = nil
}

// cut leaves what survives a power cut.
func (c *content) cut(r *rand.Rand) {
	c.disk = c.survivors(r)
	c.now, c.pending = slices.Clone(c.disk), nil
}

// survivors draws what the disk holds if the power goes now.
func (c *content) survivors(r *rand.Rand) []byte {
	if len(c.pending) == 0 {
		return c.disk
	}
	// The changes of the length are ordered: those of the first `sized` changes survive.
	sized := drawLuck(r).among(r, len(c.pending)+1)
	size := int64(len(c.disk))
	if sized > 0 {
		size = c.pending[sized-1].size
	}
	out := resize(slices.Clone(c.disk), size)
	data := drawLuck(r)
	touched := c.touched()
	for _, sector := range slices.Sorted(maps.Keys(touched)) {
		at := sector * sectorBytes
		if at >= size {
			break
		}
		versions := c.versions(at, touched[sector], sized)
		copy(out[at:], versions[data.among(r, len(versions))])
	}
	return out
}

// touched lists the changes that concern each sector.
func (c *content) touched() map[int64][]int {
	out := make(map[int64][]int)
	size := int64(len(c.disk))
	for i, ch := range c.pending {
		from, to := ch.at, ch.at+int64(len(ch.data))
		if ch.data == nil && ch.size < size {
			from, to = ch.size, size
		}
		for s := from / sectorBytes; s*sectorBytes < to; s++ {
			out[s] = append(out[s], i)
		}
		size = ch.size
	}
	return out
}

// versions are what the sector at an offset may hold, oldest first, given the changes that concern it and that the length
// is the one after the first `sized` changes. What was behind the end at that time is gone, and what was written behind
// the end of a later truncation was not there yet.
func (c *content) versions(at int64, changes []int, sized int) [][]byte {
	cur := make([]byte, sectorBytes)
	if at < int64(len(c.disk)) {
		copy(cur, c.disk[at:])
	}
	out := [][]byte{cur}
	for _, i := range changes {
		ch := c.pending[i]
		next := slices.Clone(cur)
		if ch.data != nil {
			from := max(ch.at, at)
			copy(next[from-at:], ch.data[from-ch.at:])
			out = append(out, next)
		} else {
			if i >= sized {
				return out
			}
			clear(next[max(ch.size-at, 0):])
			out = [][]byte{next}
		}
		cur = next
	}
	return out
}

// luck is how much of what was not synced survives in one place. All and nothing are frequent: a disk that has written all of
// one file and nothing of another shows what a program has left unordered.
type luck float64

func drawLuck(r *rand.Rand) luck {
	switch r.IntN(4) {
	case 0:
		return 0
	case 1:
		return 1
	default:
		return luck(r.Float64())
	}
}

// among draws one of n successive states: the first if there is no luck at all, the last if all luck.
func (l luck) among(r *rand.Rand, n int) int {
	switch {
	case l == 0:
		return 0
	case l == 1 || r.Float64() < float64(l):
		return n - 1
	default:
		return r.IntN(n)
	}
}
