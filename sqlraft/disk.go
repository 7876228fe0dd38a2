package sqlraft

import (
	"errors"
	"io"
	"io/fs"
	"os"

	"github.com/quire-db/quire/backend"
)

// disk is the file layer under the log: osDisk, and in the tests one in memory that forgets what was not synced.
//
// What the log takes for granted: a sector of 512 bytes is written whole or not at all; a rename is atomic; a name is
// durable once its directory is synced, a file's content and size once the file is. Nothing else: what is not synced may
// survive a power cut in part and in any order. Errors of the operating system come through unchanged.
type disk interface {
	// segmentBytes is how large the files of a log are made, a multiple of a sector.
	segmentBytes() int64
	// makeDirectory makes a directory (mode 0700), and those above it, where it is missing; the names are durable then.
	makeDirectory(dir string) error
	// list returns the names in dir, sorted.
	list(dir string) ([]string, error)
	// create makes a file that does not exist yet (mode 0600), full of zeros, with room for size bytes set aside.
	create(path string, size int64) (diskFile, error)
	open(path string) (diskFile, error)
	rename(from, to string) error
	remove(path string) error
	// syncDirectory makes durable which names are in dir.
	syncDirectory(dir string) error
}

type diskFile interface {
	// size is the length in bytes.
	size() (int64, error)
	// read fills p from offset on; io.ErrUnexpectedEOF says that the file is shorter.
	read(p []byte, offset int64) error
	write(p []byte, offset int64) error
	// sync makes the content and the size durable. When it fails, what was written is on the disk in part or not at all,
	// and no later sync mends that or tells: the page cache may hold it for clean. Only writing it again does.
	sync() error
	close() error
}

// osDisk is the operating system's disk. Segments are 64 MiB unless it says otherwise.
type osDisk struct {
	segment int64 // bytes; 0 is the default
}

func (d osDisk) segmentBytes() int64 {
	if d.segment > 0 {
		return d.segment
	}
	return 64 << 20
}

func (osDisk) makeDirectory(dir string) error { return backend.MakeDirectory(dir) }

func (osDisk) list(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(entries))
	for i, entry := range entries {
		names[i] = entry.Name()
	}
	return names, nil
}

func (osDisk) create(path string, size int64) (diskFile, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if err := preallocate(f, size); err != nil {
		return nil, errors.Join(&fs.PathError{Op: "preallocate", Path: path, Err: err}, f.Close(), os.Remove(path))
	}
	return &osFile{f}, nil
}

func (osDisk) open(path string) (diskFile, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return &osFile{f}, nil
}

func (osDisk) rename(from, to string) error { return os.Rename(from, to) }

func (osDisk) remove(path string) error { return os.Remove(path) }

func (osDisk) syncDirectory(dir string) error { return backend.SyncDirectory(dir) }

type osFile struct{ f *os.File }

func (o *osFile) size() (int64, error) {
	info, err := o.f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (o *osFile) read(p []byte, offset int64) error {
	n, err := o.f.ReadAt(p, offset)
	if err == io.EOF && n < len(p) {
		return io.ErrUnexpectedEOF
	}
	if n == len(p) {
		return nil
	}
	return err
}

func (o *osFile) write(p []byte, offset int64) error {
	_, err := o.f.WriteAt(p, offset)
	return err
}

func (o *osFile) sync() error {
	if err := syncData(o.f); err != nil {
		return &fs.PathError{Op: "sync", Path: o.f.Name(), Err: err}
	}
	return nil
}

func (o *osFile) close() error { return o.f.Close() }
