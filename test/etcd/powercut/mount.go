//go:build linux

package powercut

import (
	"bytes"
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Mount is a disk in a machine: a directory in which processes work. The process that has mounted it stays out of the
// directory: the kernel would have it wait for itself.
type Mount struct {
	Dir  string
	disk *Disk

	faults faults
	power  atomic.Pointer[power]
	server *fuse.Server
	log    bytes.Buffer // what the library has to say, for a test that has failed
}

// power is on from a mount to the next cut or kill.
type power struct {
	mu   sync.Mutex
	left int64 // operations of these kinds until it freezes by itself; 0: it does not
	on   Op
	off  chan struct{} // closed when the power goes: from here on nothing is answered
	gone chan struct{} // closed when the processes are dying: everything fails, so that they can end
}

func newPower() *power { return &power{off: make(chan struct{}), gone: make(chan struct{})} }

// Victim is a process on a mount; *start.Process is one.
type Victim interface {
	Signal(os.Signal) error
	Wait(limit time.Duration) (int, error)
}

// Mount mounts the disk in a directory of its own until the test ends. Without FUSE it fails the test, or skips it
// if QUIRE_NO_FUSE=1 allows that.
func (d *Disk) Mount(t testing.TB) *Mount {
	t.Helper()
	m := &Mount{Dir: t.TempDir(), disk: d}
	if err := m.mount(); err != nil {
		text := fmt.Sprintf("cannot mount a file system through /dev/fuse: %v; this needs Linux with FUSE, and root", err)
		if os.Getenv("QUIRE_NO_FUSE") == "1" {
			t.Skip(text)
		}
		t.Fatalf("%s (QUIRE_NO_FUSE=1 skips the test)", text)
	}
	t.Cleanup(func() {
		m.Abandon()
		if err := m.unmount(); err != nil {
			t.Error(err)
		}
		if t.Failed() && m.log.Len() > 0 {
			t.Logf("FUSE at %s says:\n%s", m.Dir, m.log.Bytes())
		}
	})
	return m
}

// mount is done here and not by the library, which would let /dev/fuse be inherited by the processes that the test starts:
// the mount would outlive the test with them.
func (m *Mount) mount() error {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/fuse: %w", err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=%d,group_id=%d", fd, os.Geteuid(), os.Getegid())
	if err := unix.Mount("powercut", m.Dir, "fuse.powercut", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		return errors.Join(fmt.Errorf("mount(2) at %s: %w", m.Dir, err), unix.Close(fd))
	}
	m.power.Store(newPower())
	s, err := fuse.NewServer(newFileSystem(m), fmt.Sprintf("/dev/fd/%d", fd), &fuse.MountOptions{
		DisableXAttrs:      true,
		DisableReadDirPlus: true,
		// The kernel is the only one who changes anything: what it has cached stays right.
		ExplicitDataCacheControl: true,
		Logger:                   log.New(&m.log, "", log.Ltime|log.Lmicroseconds),
		PanicHandler:             func(cause any) fuse.Status { panic(cause) },
	})
	if err != nil {
		return errors.Join(fmt.Errorf("FUSE at %s: %w", m.Dir, err), unix.Unmount(m.Dir, unix.MNT_DETACH))
	}
	m.server = s
	go s.Serve()
	return nil
}

// unmount takes the directory away; what a dead process had in shared memory maps is written before, or fails.
func (m *Mount) unmount() error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := unix.Unmount(m.Dir, 0)
		if err == nil {
			break
		}
		// A process that was killed a moment ago may still hold a file.
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return errors.Join(fmt.Errorf("unmount %s: %w", m.Dir, err), unix.Unmount(m.Dir, unix.MNT_DETACH))
		}
		time.Sleep(time.Millisecond)
	}
	m.server.Wait()
	return nil
}

// Freeze is the moment at which the power goes: nothing that reaches the disk afterwards is done or answered.
func (m *Mount) Freeze() {
	p := m.power.Load()
	p.mu.Lock()
	defer p.mu.Unlock()
	end(p.off)
}

// end closes a channel that may be closed already. REQUIRES: the lock that goes with it.
func end(c chan struct{}) {
	select {
	case <-c:
	default:
		close(c)
	}
}

// FreezeAfter freezes the mount when n more operations of these kinds have been done: the next one is not. Changes are
// the usual kinds.
func (m *Mount) FreezeAfter(n int64, on Op) {
	p := m.power.Load()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.left, p.on = n+1, on
}

// Frozen is closed at the moment at which the power goes.
func (m *Mount) Frozen() <-chan struct{} { return m.power.Load().off }

// Abandon freezes the mount and has everything fail that waits for it, so that a process on it can end. What fails
// then may be seen by a process that is not dying.
func (m *Mount) Abandon() {
	p := m.power.Load()
	p.mu.Lock()
	defer p.mu.Unlock()
	end(p.off)
	end(p.gone)
}

// Cut is a power cut: the processes, which are all there are on the mount, end at this moment, and it holds what has
// survived. All faults are over.
func (m *Mount) Cut(processes ...Victim) error {
	if err := m.kill(processes); err != nil {
		return err
	}
	if err := m.unmount(); err != nil {
		return err
	}
	m.disk.Cut()
	m.Heal()
	return m.mount()
}

// Kill ends the processes at this moment, as SIGKILL does, between two operations on the disk. Nothing is lost: what was
// not synced is still not. Other processes on the mount may meet errors while that lasts.
func (m *Mount) Kill(processes ...Victim) error {
	if err := m.kill(processes); err != nil {
		return err
	}
	m.power.Store(newPower())
	return nil
}

func (m *Mount) kill(processes []Victim) error {
	m.Freeze()
	defer m.Abandon()
	for _, p := range processes {
		if err := p.Signal(syscall.SIGKILL); err != nil {
			return err
		}
	}
	m.Abandon() // they do not see it any more
	for _, p := range processes {
		if _, err := p.Wait(20 * time.Second); err != nil {
			return err
		}
	}
	return nil
}

// Inject lets something go wrong from now on.
func (m *Mount) Inject(f Fault) *Injected {
	m.faults.Lock()
	defer m.faults.Unlock()
	in := &Injected{Fault: f}
	m.faults.all = append(m.faults.all, in)
	return in
}

// Heal ends all faults.
func (m *Mount) Heal() {
	m.faults.Lock()
	defer m.faults.Unlock()
	m.faults.all = nil
}

// allow waits while there is no power and then fails; it meets the faults that the operation is due. A nil fault is none.
func (m *Mount) allow(op Op, name string) (*Injected, fuse.Status) {
	p := m.power.Load()
	p.mu.Lock()
	if op&p.on != 0 && p.left > 0 {
		if p.left--; p.left == 0 {
			end(p.off)
		}
	}
	p.mu.Unlock()
	if !p.waitOn() {
		return nil, fuse.EIO
	}
	f := m.faults.meet(op, name)
	if f == nil {
		return nil, fuse.OK
	}
	if f.Delay > 0 {
		select {
		case <-time.After(f.Delay):
		case <-p.off:
		}
		if !p.waitOn() {
			return nil, fuse.EIO
		}
	}
	return f, fuse.Status(f.Errno)
}

// waitOn says whether there is power. Where there is none it returns when it does not matter any more.
func (p *power) waitOn() bool {
	select {
	case <-p.off:
		<-p.gone
		return false
	default:
		return true
	}
}

// Main runs the tests of a package in mount namespaces of their own: whatever becomes of the tests, no mount stays behind.
func Main(m *testing.M) {
	const inside = "POWERCUT_NAMESPACE"
	if os.Getenv(inside) != "" {
		os.Exit(m.Run())
	}
	runtime.LockOSThread() // Pdeathsig is about the thread
	again := exec.Command("/proc/self/exe", os.Args[1:]...)
	again.Env = append(os.Environ(), inside+"=1")
	again.Stdin, again.Stdout, again.Stderr = os.Stdin, os.Stdout, os.Stderr
	again.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := again.Start(); err != nil {
		os.Exit(m.Run()) // no mount will succeed either, and Mount says why
	}
	err := again.Wait()
	var exit *exec.ExitError
	switch {
	case err == nil:
		os.Exit(0)
	case errors.As(err, &exit) && exit.ExitCode() >= 0:
		os.Exit(exit.ExitCode())
	default:
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
}
