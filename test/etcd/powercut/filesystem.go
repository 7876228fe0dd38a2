//go:build linux

package powercut

import (
	"fmt"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// fileSystem speaks FUSE for a disk: a thin skin, every method asks the mount whether the operation may happen, and has
// the disk do it.
type fileSystem struct {
	fuse.RawFileSystem // answers "not implemented"
	m                  *Mount
	d                  *Disk

	known struct {
		sync.Mutex
		nodes    map[uint64]known
		listings map[uint64][]fuse.DirEntry // by the handle of the open directory
		last     uint64                     // handle
	}
}

// known is a node that the kernel may ask for by its number.
type known struct {
	*node
	lookups uint64 // how often the kernel was told of it
}

func newFileSystem(m *Mount) *fileSystem {
	fs := &fileSystem{RawFileSystem: fuse.NewDefaultRawFileSystem(), m: m, d: m.disk}
	fs.known.nodes = map[uint64]known{fuse.FUSE_ROOT_ID: {fs.d.root, 1}}
	fs.known.listings = make(map[uint64][]fuse.DirEntry)
	return fs
}

// String implements fuse.RawFileSystem.
func (fs *fileSystem) String() string { return "powercut" }

// cacheFor is how long the kernel may believe what it was told: nobody else changes anything.
const cacheFor = time.Hour

func (fs *fileSystem) node(id uint64) *node {
	fs.known.Lock()
	defer fs.known.Unlock()
	k, ok := fs.known.nodes[id]
	if !ok {
		panic(fmt.Sprintf("the kernel asks for node %d, which it has forgotten", id))
	}
	return k.node
}

// tell describes a node to the kernel, which from now on knows it.
func (fs *fileSystem) tell(n *node, out *fuse.EntryOut) {
	fs.known.Lock()
	k := fs.known.nodes[n.id]
	fs.known.nodes[n.id] = known{n, k.lookups + 1}
	fs.known.Unlock()
	out.NodeId = n.id
	out.SetEntryTimeout(cacheFor)
	out.SetAttrTimeout(cacheFor)
	fs.describe(n, &out.Attr)
}

func (fs *fileSystem) describe(n *node, out *fuse.Attr) {
	fs.d.mu.Lock()
	defer fs.d.mu.Unlock()
	out.Ino, out.Mode, out.Nlink = n.id, n.mode, n.links
	out.Size = uint64(len(n.file.now))
	out.Blocks = (out.Size + sectorBytes - 1) / sectorBytes
	out.Blksize = 4096
	out.SetTimes(&n.mtime, &n.mtime, &n.mtime)
}

// Forget implements fuse.RawFileSystem.
func (fs *fileSystem) Forget(id, lookups uint64) {
	fs.known.Lock()
	defer fs.known.Unlock()
	k := fs.known.nodes[id]
	if k.lookups -= min(lookups, k.lookups); k.lookups > 0 || id == fuse.FUSE_ROOT_ID {
		fs.known.nodes[id] = k
	} else {
		delete(fs.known.nodes, id)
	}
}

// Lookup implements fuse.RawFileSystem.
func (fs *fileSystem) Lookup(_ <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if _, bad := fs.m.allow(0, name); bad != fuse.OK {
		return bad
	}
	n, err := fs.d.lookup(fs.node(in.NodeId), name)
	if err != nil {
		return fuse.Status(errno(err))
	}
	fs.tell(n, out)
	return fuse.OK
}

// GetAttr implements fuse.RawFileSystem.
func (fs *fileSystem) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	if _, bad := fs.m.allow(0, ""); bad != fuse.OK {
		return bad
	}
	out.SetTimeout(cacheFor)
	fs.describe(fs.node(in.NodeId), &out.Attr)
	return fuse.OK
}

// SetAttr implements fuse.RawFileSystem. Owners are not kept.
func (fs *fileSystem) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	n := fs.node(in.NodeId)
	size, sized := in.GetSize()
	op := Op(0)
	if sized {
		op = Write
	}
	if _, bad := fs.m.allow(op, fs.d.nameOf(n)); bad != fuse.OK {
		return bad
	}
	if sized {
		fs.d.truncate(n, int64(size))
	}
	fs.d.mu.Lock()
	if mode, ok := in.GetMode(); ok {
		n.mode = n.mode&syscall.S_IFMT | mode
	}
	if at, ok := in.GetMTime(); ok {
		n.mtime = at
	}
	fs.d.mu.Unlock()
	out.SetTimeout(cacheFor)
	fs.describe(n, &out.Attr)
	return fuse.OK
}

// Create implements fuse.RawFileSystem.
func (fs *fileSystem) Create(_ <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE
	return fs.make(in.NodeId, name, syscall.S_IFREG|in.Mode&0o7777, &out.EntryOut)
}

// Mkdir implements fuse.RawFileSystem.
func (fs *fileSystem) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	return fs.make(in.NodeId, name, syscall.S_IFDIR|in.Mode&0o7777, out)
}

func (fs *fileSystem) make(dir uint64, name string, mode uint32, out *fuse.EntryOut) fuse.Status {
	if _, bad := fs.m.allow(Names, name); bad != fuse.OK {
		return bad
	}
	n, err := fs.d.create(fs.node(dir), name, mode)
	if err != nil {
		return fuse.Status(errno(err))
	}
	fs.tell(n, out)
	return fuse.OK
}

// Unlink implements fuse.RawFileSystem.
func (fs *fileSystem) Unlink(_ <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	return fs.remove(in, name, false)
}

// Rmdir implements fuse.RawFileSystem.
func (fs *fileSystem) Rmdir(_ <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	return fs.remove(in, name, true)
}

func (fs *fileSystem) remove(in *fuse.InHeader, name string, wantDir bool) fuse.Status {
	if _, bad := fs.m.allow(Names, name); bad != fuse.OK {
		return bad
	}
	return fuse.Status(errno(fs.d.remove(fs.node(in.NodeId), name, wantDir)))
}

// Rename implements fuse.RawFileSystem.
func (fs *fileSystem) Rename(_ <-chan struct{}, in *fuse.RenameIn, from, to string) fuse.Status {
	if in.Flags&^unix.RENAME_NOREPLACE != 0 {
		return fuse.EINVAL
	}
	if _, bad := fs.m.allow(Names, to); bad != fuse.OK {
		return bad
	}
	err := fs.d.move(entry{fs.node(in.NodeId), from}, entry{fs.node(in.Newdir), to}, in.Flags != 0)
	return fuse.Status(errno(err))
}

// Open implements fuse.RawFileSystem.
func (fs *fileSystem) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	_, bad := fs.m.allow(0, "")
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE
	return bad
}

// Read implements fuse.RawFileSystem.
func (fs *fileSystem) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	n := fs.node(in.NodeId)
	fault, bad := fs.m.allow(Read, fs.d.nameOf(n))
	if bad != fuse.OK {
		return nil, bad
	}
	data := fs.d.read(n, int64(in.Offset), len(buf))
	if fault != nil && fault.Flip {
		data = fs.d.flip(data)
	}
	return fuse.ReadResultData(data), fuse.OK
}

// Write implements fuse.RawFileSystem.
func (fs *fileSystem) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	n := fs.node(in.NodeId)
	if _, bad := fs.m.allow(Write, fs.d.nameOf(n)); bad != fuse.OK {
		return 0, bad
	}
	fs.d.write(n, data, int64(in.Offset))
	return uint32(len(data)), fuse.OK
}

// Fallocate implements fuse.RawFileSystem, for reserving space only.
func (fs *fileSystem) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	if in.Mode&^unix.FALLOC_FL_KEEP_SIZE != 0 {
		return fuse.ENOTSUP
	}
	n := fs.node(in.NodeId)
	if _, bad := fs.m.allow(Write, fs.d.nameOf(n)); bad != fuse.OK {
		return bad
	}
	if in.Mode == 0 {
		fs.d.extend(n, int64(in.Offset+in.Length))
	}
	return fuse.OK
}

// Fsync implements fuse.RawFileSystem. What the kernel had in its cache it has written before.
func (fs *fileSystem) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	n := fs.node(in.NodeId)
	made := fs.d.made(n)
	fault, bad := fs.m.allow(Sync, fs.d.nameOf(n))
	switch {
	case bad == fuse.OK:
		fs.d.sync(n, made)
	case fault != nil:
		fs.d.lose(n)
	}
	return bad
}

// FsyncDir implements fuse.RawFileSystem.
func (fs *fileSystem) FsyncDir(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	n := fs.node(in.NodeId)
	if _, bad := fs.m.allow(SyncDirs, fs.d.nameOf(n)); bad != fuse.OK {
		return bad
	}
	fs.d.syncDir(n)
	return fuse.OK
}

// OpenDir implements fuse.RawFileSystem. A listing is that of this moment, so that nothing is missed while names go.
func (fs *fileSystem) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if _, bad := fs.m.allow(0, ""); bad != fuse.OK {
		return bad
	}
	var all []fuse.DirEntry
	names, nodes := fs.d.list(fs.node(in.NodeId))
	for i, n := range nodes {
		all = append(all, fuse.DirEntry{Name: names[i], Mode: n.mode, Ino: n.id})
	}
	fs.known.Lock()
	defer fs.known.Unlock()
	fs.known.last++
	out.Fh = fs.known.last
	fs.known.listings[out.Fh] = all
	return fuse.OK
}

// ReadDir implements fuse.RawFileSystem.
func (fs *fileSystem) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	fs.known.Lock()
	all := fs.known.listings[in.Fh]
	fs.known.Unlock()
	for i := in.Offset; i < uint64(len(all)); i++ {
		if !out.AddDirEntry(all[i]) {
			break
		}
	}
	return fuse.OK
}

// ReleaseDir implements fuse.RawFileSystem.
func (fs *fileSystem) ReleaseDir(in *fuse.ReleaseIn) {
	fs.known.Lock()
	defer fs.known.Unlock()
	delete(fs.known.listings, in.Fh)
}

// StatFs implements fuse.RawFileSystem: there is always room, unless a fault says otherwise.
func (fs *fileSystem) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	out.Bsize, out.Frsize, out.NameLen = 4096, 4096, 255
	out.Blocks, out.Bfree, out.Bavail = 16<<20, 8<<20, 8<<20
	out.Files, out.Ffree = 1<<20, 1<<19
	return fuse.OK
}
