package sqlraft

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
)

// errPowerCut is what a disk answers once its process is no more.
var errPowerCut = errors.New("the power is cut")

// memoryDisk is a disk that forgets what was not synced. It stands for one process on one machine: crash cuts the power and
// returns the disk that the next process finds, kill ends the process only.
//
// What may survive a power cut of what was not synced: of the content of a file any sectors, in any order; of its size the
// old or the new one; of the names in a directory any of the changes, a rename whole. After a failed sync of a file, every
// other sector is lost for good, although reads show it, until it is written again.
type memoryDisk struct {
	segment int64

	mu        sync.Mutex
	dead      bool
	names     map[string]*memoryFile // path → file, as the process sees it
	kept      map[string]*memoryFile // the names that a power cut leaves
	renames   []memoryRename         // what leads from kept to names
	dirs      map[string]bool
	failures  map[string][]error
	remaining int          // operations until the power is cut, 0: not at all
	trace     func(string) // told of each operation that changes something
}

// memoryRename is a change of a directory: from is unbound if it is not empty, to is bound to file if it is not empty.
type memoryRename struct {
	from, to string
	file     *memoryFile
}

type memoryFile struct {
	name           string // the last one it was given
	size, keptSize int64
	now, kept      []byte // zeros follow
	pending        []memoryWrite
	written        []byte // the content of pending, one after the other
}

type memoryWrite struct {
	offset int64
	n      int
}

func newMemoryDisk(segmentBytes int64) *memoryDisk {
	return &memoryDisk{
		segment: segmentBytes, names: map[string]*memoryFile{}, kept: map[string]*memoryFile{},
		dirs: map[string]bool{}, failures: map[string][]error{},
	}
}

// failNext makes the next operation of a kind (create, open, size, read, write, sync, rename, remove, list, syncDirectory)
// fail; several calls queue up. A write that fails has written the first half of its sectors; other operations have done
// nothing, but see above for sync.
func (d *memoryDisk) failNext(op string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.failures[op] = append(d.failures[op], err)
}

// cutAfter cuts the power during the n-th operation from now, n > 0: it and all later ones fail with errPowerCut.
func (d *memoryDisk) cutAfter(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.remaining = n
}

// kill ends the process: every operation on d fails from now on. It returns the disk as the next process finds it, with
// everything that was written, synced or not.
func (d *memoryDisk) kill() *memoryDisk {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dead = true
	next := newMemoryDisk(d.segment)
	next.names, next.kept, next.renames, next.dirs = d.names, d.kept, d.renames, d.dirs
	return next
}

// crash cuts the power and returns the disk as it is found then, which follows from r alone.
func (d *memoryDisk) crash(r *rand.Rand) *memoryDisk {
	next := d.kill()
	share := []float64{0, 0.1, 0.5, 0.9, 1}[r.IntN(5)]
	survives := func() bool { return r.Float64() < share }
	for _, c := range next.renames {
		if !survives() {
			continue
		}
		delete(next.kept, c.from)
		if c.to != "" {
			next.kept[c.to] = c.file
		}
	}
	next.names, next.renames = map[string]*memoryFile{}, nil
	found := map[*memoryFile]*memoryFile{}
	for _, name := range sortedNames(next.kept) {
		f := next.kept[name]
		if found[f] == nil {
			found[f] = f.crash(survives)
		}
		next.names[name], next.kept[name] = found[f], found[f]
	}
	return next
}

func (f *memoryFile) crash(survives func() bool) *memoryFile {
	at := 0
	for _, w := range f.pending {
		data := f.written[at : at+w.n]
		at += w.n
		for offset := w.offset; len(data) > 0; {
			n := min(len(data), sectorBytes-int(offset%sectorBytes))
			if survives() {
				f.kept = overwrite(f.kept, data[:n], offset)
			}
			data, offset = data[n:], offset+int64(n)
		}
	}
	if f.size != f.keptSize && survives() {
		f.keptSize = f.size
	}
	if int64(len(f.kept)) > f.keptSize {
		f.kept = f.kept[:f.keptSize]
	}
	return &memoryFile{name: f.name, size: f.keptSize, keptSize: f.keptSize, now: slices.Clone(f.kept), kept: f.kept}
}

// overwrite puts p at offset of b, with zeros in front where b is shorter.
func overwrite(b, p []byte, offset int64) []byte {
	if end := int(offset) + len(p); end > len(b) {
		old := len(b)
		b = slices.Grow(b, end-old)[:end]
		clear(b[old:])
	}
	copy(b[offset:], p)
	return b
}

func sortedNames(names map[string]*memoryFile) []string {
	sorted := make([]string, 0, len(names))
	for name := range names {
		sorted = append(sorted, name)
	}
	slices.Sort(sorted)
	return sorted
}

// change lets a test damage the content of a file; what it returns is durable.
func (d *memoryDisk) change(path string, how func(content []byte) []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f := d.names[path]
	content := overwrite(slices.Clone(f.now), nil, f.size)
	content = how(content)
	*f = memoryFile{name: f.name, size: int64(len(content)), keptSize: int64(len(content)), now: content, kept: slices.Clone(content)}
}

// copy returns another disk with the same content, all of it durable.
func (d *memoryDisk) copy() *memoryDisk {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := newMemoryDisk(d.segment)
	for dir := range d.dirs {
		c.dirs[dir] = true
	}
	for name, f := range d.names {
		g := &memoryFile{name: f.name, size: f.size, keptSize: f.size, now: slices.Clone(f.now), kept: slices.Clone(f.now)}
		c.names[name], c.kept[name] = g, g
	}
	return c
}

// step begins an operation. When it fails during a power cut, underWay says that it may have been done by then.
func (d *memoryDisk) step(op, details string) (underWay bool, err error) {
	if d.dead {
		return false, errPowerCut
	}
	if d.trace != nil && details != "" {
		d.trace(op + " " + details)
	}
	if d.remaining > 0 {
		if d.remaining--; d.remaining == 0 {
			d.dead = true
			return true, errPowerCut
		}
	}
	if queue := d.failures[op]; len(queue) > 0 {
		d.failures[op] = queue[1:]
		return false, &fs.PathError{Op: op, Path: "memory", Err: queue[0]}
	}
	return true, nil
}

func (d *memoryDisk) segmentBytes() int64 { return d.segment }

func (d *memoryDisk) makeDirectory(dir string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dead {
		return errPowerCut
	}
	d.dirs[dir] = true
	return nil
}

func (d *memoryDisk) list(dir string) ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := d.step("list", ""); err != nil {
		return nil, err
	}
	if !d.dirs[dir] {
		return nil, &fs.PathError{Op: "list", Path: dir, Err: syscall.ENOENT}
	}
	var names []string
	for path := range d.names {
		if filepath.Dir(path) == dir {
			names = append(names, filepath.Base(path))
		}
	}
	slices.Sort(names)
	return names, nil
}

func (d *memoryDisk) create(path string, size int64) (diskFile, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	underWay, err := d.step("create", fmt.Sprintf("%s %d", filepath.Base(path), size))
	if !underWay {
		return nil, err
	}
	if d.names[path] != nil {
		return nil, &fs.PathError{Op: "create", Path: path, Err: syscall.EEXIST}
	}
	f := &memoryFile{size: size}
	d.rebind(memoryRename{to: path, file: f})
	return &memoryHandle{d, f}, err
}

func (d *memoryDisk) open(path string) (diskFile, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := d.step("open", ""); err != nil {
		return nil, err
	}
	f := d.names[path]
	if f == nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: syscall.ENOENT}
	}
	return &memoryHandle{d, f}, nil
}

func (d *memoryDisk) rename(from, to string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	underWay, err := d.step("rename", filepath.Base(from)+" "+filepath.Base(to))
	if !underWay {
		return err
	}
	f := d.names[from]
	if f == nil {
		return &fs.PathError{Op: "rename", Path: from, Err: syscall.ENOENT}
	}
	d.rebind(memoryRename{from: from, to: to, file: f})
	return err
}

func (d *memoryDisk) remove(path string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	underWay, err := d.step("remove", filepath.Base(path))
	if !underWay {
		return err
	}
	if d.names[path] == nil {
		return &fs.PathError{Op: "remove", Path: path, Err: syscall.ENOENT}
	}
	d.rebind(memoryRename{from: path})
	return err
}

func (d *memoryDisk) rebind(c memoryRename) {
	delete(d.names, c.from)
	if c.to != "" {
		d.names[c.to] = c.file
		c.file.name = filepath.Base(c.to)
	}
	d.renames = append(d.renames, c)
}

func (d *memoryDisk) syncDirectory(dir string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := d.step("syncDirectory", dir); err != nil {
		return err
	}
	kept := d.renames[:0]
	for _, c := range d.renames {
		if !(c.from != "" && filepath.Dir(c.from) == dir || c.to != "" && filepath.Dir(c.to) == dir) {
			kept = append(kept, c)
			continue
		}
		delete(d.kept, c.from)
		if c.to != "" {
			d.kept[c.to] = c.file
		}
	}
	d.renames = kept
	return nil
}

type memoryHandle struct {
	d *memoryDisk
	f *memoryFile
}

func (h *memoryHandle) size() (int64, error) {
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	if _, err := h.d.step("size", ""); err != nil {
		return 0, err
	}
	return h.f.size, nil
}

func (h *memoryHandle) read(p []byte, offset int64) error {
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	if _, err := h.d.step("read", ""); err != nil {
		return err
	}
	if offset+int64(len(p)) > h.f.size {
		return io.ErrUnexpectedEOF
	}
	n := 0
	if offset < int64(len(h.f.now)) {
		n = copy(p, h.f.now[offset:])
	}
	clear(p[n:])
	return nil
}

func (h *memoryHandle) write(p []byte, offset int64) error {
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	if h.d.dead {
		return errPowerCut
	}
	details := ""
	if h.d.trace != nil {
		details = fmt.Sprintf("%s %d+%d", h.f.name, offset, len(p))
	}
	underWay, err := h.d.step("write", details)
	if !underWay {
		p = p[:len(p)/sectorBytes/2*sectorBytes]
	}
	h.f.now = overwrite(h.f.now, p, offset)
	h.f.pending = append(h.f.pending, memoryWrite{offset, len(p)})
	h.f.written = append(h.f.written, p...)
	h.f.size = max(h.f.size, offset+int64(len(p)))
	return err
}

func (h *memoryHandle) sync() error {
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	if h.d.dead {
		return errPowerCut
	}
	underWay, err := h.d.step("sync", h.f.name)
	if underWay && err != nil {
		return err // the cut decides
	}
	at := 0
	for _, w := range h.f.pending {
		data := h.f.written[at : at+w.n]
		at += w.n
		if err == nil {
			h.f.kept = overwrite(h.f.kept, data, w.offset)
			continue
		}
		for i := 0; i+sectorBytes <= len(data); i += 2 * sectorBytes {
			h.f.kept = overwrite(h.f.kept, data[i:i+sectorBytes], w.offset+int64(i))
		}
	}
	h.f.pending, h.f.written = h.f.pending[:0], h.f.written[:0]
	if err == nil {
		h.f.keptSize = h.f.size
	}
	return err
}

func (h *memoryHandle) close() error {
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	if h.d.dead {
		return errPowerCut
	}
	return nil
}

// content is what a file begins with, "" when there is no such file.
func (d *memoryDisk) content(t *testing.T, path string, n int) string {
	t.Helper()
	f, err := d.open(path)
	if err != nil {
		return ""
	}
	size, err := f.size()
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, min(int64(n), size))
	if err := f.read(p, 0); err != nil {
		t.Fatal(err)
	}
	return string(p)
}

func TestMemoryDiskForgetsWhatWasNotSynced(t *testing.T) {
	sector := func(c byte) []byte { return slices.Repeat([]byte{c}, sectorBytes) }
	// Runs all of a history up to a cut and says in how many ways a file was found.
	outcomes := func(path string, history func(d *memoryDisk)) map[string]int {
		found := map[string]int{}
		for seed := range uint64(300) {
			d := newMemoryDisk(4096)
			if err := d.makeDirectory("d"); err != nil {
				t.Fatal(err)
			}
			history(d)
			summary := ""
			for _, c := range d.crash(rand.New(rand.NewPCG(seed, 0))).content(t, path, 4*sectorBytes) {
				if c == 0 {
					c = '.'
				}
				if len(summary) == 0 || summary[len(summary)-1] != byte(c) {
					summary += string(c)
				}
			}
			found[summary]++
		}
		return found
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	write := func(f diskFile, s string) {
		t.Helper()
		var p []byte
		for i := range len(s) {
			p = append(p, sector(s[i])...)
		}
		must(f.write(p, 0))
	}
	for _, c := range []struct {
		name    string
		path    string
		history func(d *memoryDisk)
		want    []string
	}{
		{"a synced file whose name is not", "d/a", func(d *memoryDisk) {
			f, err := d.create("d/a", 1024)
			must(err)
			write(f, "x")
			must(f.sync())
		}, []string{"", "x."}},
		{"a name whose file is not synced", "d/a", func(d *memoryDisk) {
			f, err := d.create("d/a", 1024)
			must(err)
			write(f, "xy")
			must(d.syncDirectory("d"))
		}, []string{"", ".", ".y", "x.", "xy"}},
		{"all synced, then overwritten", "d/a", func(d *memoryDisk) {
			f, err := d.create("d/a", 1024)
			must(err)
			write(f, "xy")
			must(f.sync())
			must(d.syncDirectory("d"))
			write(f, "12")
			write(f, "34")
		}, []string{"14", "1y", "12", "32", "34", "3y", "x2", "x4", "xy"}},
		{"a rename", "d/b", func(d *memoryDisk) {
			f, err := d.create("d/a", 512)
			must(err)
			write(f, "x")
			must(f.sync())
			must(d.syncDirectory("d"))
			must(d.rename("d/a", "d/b"))
		}, []string{"", "x"}},
		{"a synced rename", "d/b", func(d *memoryDisk) {
			f, err := d.create("d/a", 512)
			must(err)
			write(f, "x")
			must(f.sync())
			must(d.rename("d/a", "d/b"))
			must(d.syncDirectory("d"))
		}, []string{"x"}},
		{"a removal", "d/a", func(d *memoryDisk) {
			_, err := d.create("d/a", 512)
			must(err)
			must(d.syncDirectory("d"))
			must(d.remove("d/a"))
		}, []string{"", "."}},
		{"a sync that failed and one that did not", "d/a", func(d *memoryDisk) {
			f, err := d.create("d/a", 1024)
			must(err)
			must(f.sync())
			must(d.syncDirectory("d"))
			d.failNext("sync", syscall.EIO)
			write(f, "xy")
			if err := f.sync(); !errors.Is(err, syscall.EIO) {
				t.Fatalf("sync says %v", err)
			}
			must(f.sync())
			if got := d.content(t, "d/a", 1024); got[0] != 'x' || got[512] != 'y' {
				t.Fatalf("the page cache shows %q", got)
			}
		}, []string{"x."}},
		{"a power cut in the middle of a write", "d/a", func(d *memoryDisk) {
			f, err := d.create("d/a", 1024)
			must(err)
			must(f.sync())
			must(d.syncDirectory("d"))
			d.cutAfter(1)
			if err := f.write(append(sector('x'), sector('y')...), 0); !errors.Is(err, errPowerCut) {
				t.Fatalf("write says %v", err)
			}
			if err := f.sync(); !errors.Is(err, errPowerCut) {
				t.Fatalf("sync says %v", err)
			}
		}, []string{".", ".y", "x.", "xy"}},
	} {
		found := outcomes(c.path, c.history)
		if len(found) != len(c.want) {
			t.Errorf("%s: a power cut leaves %v, want %q", c.name, found, c.want)
		}
		for _, want := range c.want {
			if found[want] == 0 {
				t.Errorf("%s: a power cut never leaves %q, but %v", c.name, want, found)
			}
		}
	}
}
