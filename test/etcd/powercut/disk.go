package powercut

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"
)

// Disk is the disk of one machine: a tree of files as programs see it, and what of it is durable. It knows nothing of FUSE.
//
// Invariant: what is durable together with all pending changes is what programs see, except for what a failed sync lost.
type Disk struct {
	// Journal has names kept as the journal of ext4 keeps them: every fsync makes all earlier changes of names durable, and
	// a cut leaves the names of one moment. It is kinder than what a program may rely on. To be set before use.
	Journal bool

	mu      sync.Mutex
	rng     *rand.Rand
	root    *node
	lastID  uint64
	renamed []nameChange // changes of names that are not durable, oldest first
}

// node is a file or a directory.
type node struct {
	id    uint64
	mode  uint32 // with the type
	mtime time.Time
	name  string // the last one it had
	links uint32 // names it has now: 0 or 1

	entries, synced map[string]*node // of a directory: as programs see it, and as certainly on the disk
	file            content
}

func (n *node) dir() bool { return n.mode&syscall.S_IFMT == syscall.S_IFDIR }

// NewDisk is an empty disk. All that it draws follows from the seed and from what is done with it.
func NewDisk(seed uint64) *Disk {
	d := &Disk{rng: rand.New(rand.NewPCG(seed, 0x6469736b))}
	d.root = d.newNode("/", syscall.S_IFDIR|0o700)
	d.root.links = 1
	return d
}

func (d *Disk) newNode(name string, mode uint32) *node {
	d.lastID++
	n := &node{id: d.lastID, name: name, mode: mode, mtime: time.Now()}
	if n.dir() {
		n.entries, n.synced = make(map[string]*node), make(map[string]*node)
	}
	return n
}

// rename changes what names lead to, for programs at once and durably later.
func (d *Disk) rename(sets ...nameSet) {
	c := nameChange(sets)
	c.apply(current)
	d.renamed = append(d.renamed, c)
	for _, s := range c {
		s.dir.mtime = time.Now()
	}
}

func (d *Disk) lookup(dir *node, name string) (*node, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if n := dir.entries[name]; n != nil {
		return n, nil
	}
	return nil, syscall.ENOENT
}

// create makes a file or a directory.
func (d *Disk) create(dir *node, name string, mode uint32) (*node, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if dir.entries[name] != nil {
		return nil, syscall.EEXIST
	}
	n := d.newNode(name, mode)
	n.links = 1
	d.rename(nameSet{entry{dir, name}, n})
	return n, nil
}

// remove removes a file, or an empty directory if wantDir.
func (d *Disk) remove(dir *node, name string, wantDir bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := dir.entries[name]
	if n == nil {
		return syscall.ENOENT
	}
	if err := replaceable(n, wantDir); err != nil {
		return err
	}
	n.links = 0
	d.rename(nameSet{entry{dir, name}, nil})
	return nil
}

// replaceable says whether a name may cease to lead to n, as rmdir wants it or as unlink does.
func replaceable(n *node, wantDir bool) error {
	switch {
	case wantDir && !n.dir():
		return syscall.ENOTDIR
	case !wantDir && n.dir():
		return syscall.EISDIR
	case len(n.entries) > 0:
		return syscall.ENOTEMPTY
	}
	return nil
}

// move is rename(2); with keep it fails if there is something at the new place.
func (d *Disk) move(from, to entry, keep bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	n, old := from.dir.entries[from.name], to.dir.entries[to.name]
	switch {
	case n == nil:
		return syscall.ENOENT
	case old == n:
		return nil
	case old != nil && keep:
		return syscall.EEXIST
	case old != nil:
		if err := replaceable(old, n.dir()); err != nil {
			return err
		}
		old.links = 0
	}
	n.name = to.name
	d.rename(nameSet{from, nil}, nameSet{to, n})
	return nil
}

// list returns the nodes of a directory in the order of their names.
func (d *Disk) list(dir *node) (names []string, nodes []*node) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for name := range dir.entries {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		nodes = append(nodes, dir.entries[name])
	}
	return names, nodes
}

// read returns a copy of up to n bytes.
func (d *Disk) read(f *node, at int64, n int) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	size := int64(len(f.file.now))
	at = min(at, size)
	return slices.Clone(f.file.now[at:min(at+int64(n), size)])
}

func (d *Disk) write(f *node, data []byte, at int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f.file.write(data, at)
	f.mtime = time.Now()
}

func (d *Disk) truncate(f *node, size int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f.file.truncate(size)
	f.mtime = time.Now()
}

// extend is fallocate(2): it makes the file longer, never shorter.
func (d *Disk) extend(f *node, size int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if size > int64(len(f.file.now)) {
		f.file.truncate(size)
		f.mtime = time.Now()
	}
}

func (d *Disk) nameOf(n *node) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return n.name
}

// made is how many changes of a file a sync that begins now has to make durable.
func (d *Disk) made(f *node) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return f.file.made
}

func (d *Disk) sync(f *node, made int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f.file.sync(made)
	if d.Journal {
		d.syncAllNames()
	}
}

func (d *Disk) syncAllNames() {
	for _, c := range d.renamed {
		c.apply(synced)
	}
	d.renamed = nil
}

// lose is a sync that fails, see content.lose.
func (d *Disk) lose(f *node) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f.file.lose(d.rng)
}

func (d *Disk) syncDir(dir *node) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.Journal {
		d.syncAllNames()
	}
	d.renamed = syncNames(d.renamed, dir)
}

// flip returns data with one bit changed.
func (d *Disk) flip(data []byte) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(data) > 0 {
		data[d.rng.IntN(len(data))] ^= 1 << d.rng.IntN(8)
	}
	return data
}

// Cut makes the disk what it is after a power cut: see the package's comment. REQUIRES: it is not mounted.
func (d *Disk) Cut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	cutNames(d.renamed, d.Journal, d.rng)
	d.renamed = nil
	var files []*node
	d.root.settle(func(n *node) { files = append(files, n) })
	// In an order that the seed repeats.
	slices.SortFunc(files, func(a, b *node) int { return int(a.id) - int(b.id) })
	for _, n := range files {
		n.file.cut(d.rng)
	}
}

// Clone is a second disk with the same content, all of it durable. It draws for itself.
func (d *Disk) Clone(seed uint64) *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := NewDisk(seed)
	c.Journal = d.Journal
	c.copyFrom(c.root, d.root)
	return c
}

func (d *Disk) copyFrom(to, from *node) {
	for name, n := range from.entries {
		made := d.newNode(name, n.mode)
		made.mtime, made.links = n.mtime, 1
		made.file.now, made.file.disk = slices.Clone(n.file.now), slices.Clone(n.file.now)
		to.entries[name], to.synced[name] = made, made
		d.copyFrom(made, n)
	}
}

// Export copies what programs see into a directory of another file system, which is made if missing.
func (d *Disk) Export(directory string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.root.export(directory)
}

func (n *node) export(path string) error {
	if !n.dir() {
		return exportFile(path, n.file.now, os.FileMode(n.mode)&os.ModePerm)
	}
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	for name, child := range n.entries {
		if err := child.export(filepath.Join(path, name)); err != nil {
			return err
		}
	}
	return nil
}

// exportFile leaves holes where there are only zeros: a log may have set much room aside.
func exportFile(path string, content []byte, mode os.FileMode) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.Truncate(int64(len(content))); err != nil {
		return err
	}
	zeros := make([]byte, 64<<10)
	for at := 0; at < len(content); at += len(zeros) {
		block := content[at:min(at+len(zeros), len(content))]
		if bytes.Equal(block, zeros[:len(block)]) {
			continue
		}
		if _, err := f.WriteAt(block, int64(at)); err != nil {
			return err
		}
	}
	return nil
}

// errno is the number of an error that Disk has returned.
func errno(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	var e syscall.Errno
	if !errors.As(err, &e) {
		panic(fmt.Sprintf("%v is no error of a file system", err))
	}
	return e
}
