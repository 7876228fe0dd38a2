package backend

import (
	"bytes"
	"encoding/binary"
	"math/bits"
	"slices"
	"sort"
)

// A keyBlock is an ascending list of keys in two pointer-free slices:
//
//	data   /registry/pods/ns-1/ a b-7 b-8     the common prefix, then what follows it in each key
//	ends                       21 24 27       where each key ends in data
//
// The prefix is common to all keys; after a removal it need not be the longest.
type keyBlock struct {
	data   []byte
	ends   []uint32
	prefix int
}

func newKeyBlock(key []byte) keyBlock {
	return keyBlock{data: bytes.Clone(key), ends: []uint32{uint32(len(key))}, prefix: len(key)}
}

func (k *keyBlock) len() int { return len(k.ends) }

// start returns where the suffix of key i begins, or for i == len where data ends.
func (k *keyBlock) start(i int) int {
	if i == 0 {
		return k.prefix
	}
	return int(k.ends[i-1])
}

func (k *keyBlock) suffix(i int) []byte { return k.data[k.start(i):k.ends[i]] }

// appendKey appends key i to dst.
func (k *keyBlock) appendKey(dst []byte, i int) []byte {
	return append(append(dst, k.data[:k.prefix]...), k.suffix(i)...)
}

// search returns the index of the first key that is not below key, and whether it is key.
func (k *keyBlock) search(key []byte) (int, bool) {
	if prefix := k.data[:k.prefix]; !bytes.HasPrefix(key, prefix) {
		if bytes.Compare(key, prefix) < 0 {
			return 0, false
		}
		return len(k.ends), false
	}
	key = key[k.prefix:]
	lo, hi := 0, len(k.ends)
	for lo < hi {
		m := int(uint(lo+hi) / 2)
		switch c := bytes.Compare(k.suffix(m), key); {
		case c == 0:
			return m, true
		case c < 0:
			lo = m + 1
		default:
			hi = m
		}
	}
	return lo, false
}

// sizeAt returns the bytes of all suffixes if the prefix were cut to p bytes.
func (k *keyBlock) sizeAt(p int) int {
	return (k.prefix-p)*len(k.ends) + len(k.data) - k.prefix
}

// fits reports whether key can be inserted within the limits of a node.
func (k *keyBlock) fits(key []byte) bool {
	if k.len() == 0 {
		return true
	}
	p := commonPrefix(k.data[:k.prefix], key)
	return k.len() < treeMaxKeys && k.sizeAt(p)+len(key)-p <= treeMaxBytes
}

// middle returns where to cut the keys into two halves of about equal size, neither empty. REQUIRES: two keys or more.
func (k *keyBlock) middle() int {
	half := (k.prefix + len(k.data)) / 2
	c := sort.Search(k.len(), func(i int) bool { return int(k.ends[i]) > half })
	return min(max(c, 1), k.len()-1)
}

// slice copies the keys i to j-1, with the longest prefix they have, and room for one more key of that many bytes.
func (k *keyBlock) slice(i, j, room int) keyBlock {
	if i == j {
		return keyBlock{}
	}
	p := k.prefix + commonPrefix(k.suffix(i), k.suffix(j-1))
	out := keyBlock{prefix: p}
	size := p + k.start(j) - k.start(i) - (p-k.prefix)*(j-i)
	n := j - i
	if room > 0 {
		n++
	}
	out.data = append(make([]byte, 0, size+room), k.data[:k.prefix]...)
	out.data = append(out.data, k.suffix(i)[:p-k.prefix]...)
	out.ends = make([]uint32, 0, n)
	out.append(k, i, j)
	return out
}

// append copies the keys i to j-1 of src behind those of k. REQUIRES: they have the prefix of k.
func (k *keyBlock) append(src *keyBlock, i, j int) {
	if k.prefix == src.prefix { // the same suffixes: one copy
		shift := len(k.data) - src.start(i)
		k.data = append(k.data, src.data[src.start(i):src.start(j)]...)
		for _, end := range src.ends[i:j] {
			k.ends = append(k.ends, uint32(int(end)+shift))
		}
		return
	}
	for ; i < j; i++ {
		suffix := src.suffix(i)
		if k.prefix < src.prefix {
			k.data = append(k.data, src.data[k.prefix:src.prefix]...)
		} else {
			suffix = suffix[k.prefix-src.prefix:]
		}
		k.data = append(k.data, suffix...)
		k.ends = append(k.ends, uint32(len(k.data)))
	}
}

// insert makes key the i-th. REQUIRES: that is its place, and k is not shared.
func (k *keyBlock) insert(i int, key []byte) {
	if k.len() == 0 {
		*k = newKeyBlock(key)
		return
	}
	if p := commonPrefix(k.data[:k.prefix], key); p < k.prefix {
		out := keyBlock{prefix: p, ends: make([]uint32, 0, k.len()+1)}
		out.data = append(make([]byte, 0, p+k.sizeAt(p)+len(key)-p), k.data[:p]...)
		out.append(k, 0, k.len())
		*k = out
	}
	suffix := key[k.prefix:]
	at, size := k.start(i), len(k.data)
	k.data = grown(k.data, len(suffix))
	k.data = k.data[:size+len(suffix)]
	copy(k.data[at+len(suffix):], k.data[at:size])
	copy(k.data[at:], suffix)
	k.ends = insertAt(k.ends, i, uint32(at))
	for j := i; j < len(k.ends); j++ {
		k.ends[j] += uint32(len(suffix))
	}
}

// remove takes key i out. REQUIRES: k is not shared.
func (k *keyBlock) remove(i int) {
	if k.len() == 1 {
		*k = keyBlock{}
		return
	}
	from, to := k.start(i), int(k.ends[i])
	k.data = append(k.data[:from], k.data[to:]...)
	k.ends = slices.Delete(k.ends, i, i+1)
	for j := i; j < len(k.ends); j++ {
		k.ends[j] -= uint32(to - from)
	}
	if cap(k.data) > 2*len(k.data)+256 {
		*k = k.slice(0, k.len(), 0)
	}
}

// joinKeys puts parts, which ascend and are not all empty, into one block, unless that would have more than treeMaxBytes.
func joinKeys(parts ...*keyBlock) (keyBlock, bool) {
	// A block without keys has no say in the prefix.
	parts = slices.DeleteFunc(parts, func(part *keyBlock) bool { return part.len() == 0 })
	prefix, n := parts[0].data[:parts[0].prefix], 0
	for _, part := range parts {
		prefix = prefix[:commonPrefix(prefix, part.data[:part.prefix])]
		n += part.len()
	}
	size := 0
	for _, part := range parts {
		size += part.sizeAt(len(prefix))
	}
	if size > treeMaxBytes {
		return keyBlock{}, false
	}
	out := keyBlock{prefix: len(prefix), ends: make([]uint32, 0, n)}
	out.data = append(make([]byte, 0, len(prefix)+size), prefix...)
	for _, part := range parts {
		out.append(part, 0, part.len())
	}
	return out, true
}

// separator returns the shortest key that is above a and not above b. REQUIRES: a < b.
func separator(a, b []byte) []byte { return bytes.Clone(b[:commonPrefix(a, b)+1]) }

// commonPrefix returns how many bytes a and b have in common at their beginning.
func commonPrefix(a, b []byte) int {
	n := min(len(a), len(b))
	i := 0
	for ; i+8 <= n; i += 8 {
		if x := binary.LittleEndian.Uint64(a[i:]) ^ binary.LittleEndian.Uint64(b[i:]); x != 0 {
			return i + bits.TrailingZeros64(x)/8
		}
	}
	for i < n && a[i] == b[i] {
		i++
	}
	return i
}

// grown returns s with room for n more. It grows by an eighth rather than doubling as append does: there are many nodes,
// most of which stay as they are.
func grown[E any](s []E, n int) []E {
	if cap(s)-len(s) >= n {
		return s
	}
	return append(make([]E, 0, (len(s)+n)*9/8+4), s...)
}

func insertAt[E any](s []E, i int, v E) []E {
	s = append(grown(s, 1), v)
	copy(s[i+1:], s[i:])
	s[i] = v
	return s
}
