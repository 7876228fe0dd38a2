package powercut

import (
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Op is a kind of operation on a file system; several are combined with |.
type Op int

const (
	Read     Op = 1 << iota
	Write       // also truncate and fallocate
	Sync        // fsync and fdatasync of a file
	Names       // create, mkdir, unlink, rmdir, rename
	SyncDirs    // fsync of a directory

	Changes = Write | Sync | Names | SyncDirs
)

// Fault is something that goes wrong with a disk.
type Fault struct {
	On   Op
	File string // how the name of the file ends, such as "-wal"; "" is every file. For Names, the name that is changed.
	Skip int64  // so many such operations pass unharmed first
	For  int64  // how many are hit; 0 is all from then on

	Delay time.Duration // passes first
	// Errno is returned instead of doing it. A Sync that fails loses what it should have made durable: see content.lose.
	Errno syscall.Errno
	Flip  bool // a Read returns one wrong bit; the kernel's cache keeps it until the next mount
}

// Injected is a fault in force.
type Injected struct {
	Fault
	seen atomic.Int64
}

// Hits is how often the fault has happened.
func (f *Injected) Hits() int64 {
	n := max(f.seen.Load()-f.Skip, 0)
	if f.For > 0 {
		n = min(n, f.For)
	}
	return n
}

// hit says whether the fault happens to this operation.
func (f *Injected) hit(op Op, name string) bool {
	if f.On&op == 0 || !strings.HasSuffix(name, f.File) {
		return false
	}
	n := f.seen.Add(1) - f.Skip
	return n > 0 && (f.For == 0 || n <= f.For)
}

// faults are those in force.
type faults struct {
	sync.Mutex
	all []*Injected
}

// meet returns the first fault that happens to an operation; nil is none.
func (f *faults) meet(op Op, name string) *Injected {
	f.Lock()
	defer f.Unlock()
	var met *Injected
	for _, one := range f.all {
		if one.hit(op, name) && met == nil {
			met = one
		}
	}
	return met
}
