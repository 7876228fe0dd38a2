package proc

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Family is a process and its children, such as PostgreSQL's main process and its backends. What children have used
// that have ended, and that the process has waited for, counts too.
type Family int // the main process's id

// tick is the unit of times in /proc/pid/stat: USER_HZ is 100 on every architecture that Go knows.
const tick = 10 * time.Millisecond

// CPU is the processor time that the family has used so far: of what lives in nanoseconds, of what has ended in ticks of 10 ms.
func (f Family) CPU() (time.Duration, error) {
	total, err := f.sum(func(pid int) (int64, error) {
		cpu, err := processorTime(pid)
		return int64(cpu), err
	}, f.cpuOfEnded)
	return time.Duration(total), err
}

// WrittenBytes is what the family caused to be written to storage so far. The kernel adds what an ended child has written
// to its parent's figure.
func (f Family) WrittenBytes() (int64, error) {
	return f.sum(func(pid int) (int64, error) { return procField(pid, "io", "write_bytes:") }, func() (int64, error) { return 0, nil })
}

// sum adds up a figure of each process, and one of those that have ended. What a process has used moves from it to its
// parent when it ends: when one did meanwhile, sum begins anew. Where processes come and go all the time no reading is
// without that: then the last one is good enough, wrong by what those few have used that ended while it was taken.
func (f Family) sum(of func(pid int) (int64, error), ended func() (int64, error)) (int64, error) {
	const attempts = 5
	var total int64
	for range attempts {
		before, err := f.pids()
		if err != nil {
			return 0, err
		}
		if total, err = ended(); err != nil {
			return 0, err
		}
		for _, pid := range before {
			n, err := of(pid)
			if err != nil && (pid == int(f) || !isGone(err)) {
				return 0, err
			}
			total += n
		}
		after, err := f.pids()
		if err != nil {
			return 0, err
		}
		if !slices.ContainsFunc(before, func(pid int) bool { return !slices.Contains(after, pid) }) {
			break
		}
	}
	return total, nil
}

// isGone: the error is how /proc or a clock says that there is no such process.
func isGone(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL)
}

// pids are the process itself and its children, those included that have ended and that their parent has not waited for yet:
// what they used is still theirs.
func (f Family) pids() ([]int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, file := range files {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			return nil, err
		}
		stat, err := statFields(pid)
		if isGone(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if pid == int(f) || string(stat[statParent]) == strconv.Itoa(int(f)) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// Places in what statFields returns; proc_pid_stat(5) counts from 1 and has two fields more in front.
const (
	statParent      = 1
	statChildUser   = 13
	statChildSystem = 14
)

// statFields are the fields of /proc/pid/stat behind the name.
func statFields(pid int) ([][]byte, error) {
	path := fmt.Sprintf("/proc/%d/stat", pid)
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	// pid (name) state parent …; the name may hold anything.
	fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
	if len(fields) <= statChildSystem {
		return nil, fmt.Errorf("%s has %d fields behind the name, more are expected", path, len(fields))
	}
	return fields, nil
}

// cpuOfEnded is the processor time in nanoseconds of children that have ended and were waited for.
func (f Family) cpuOfEnded() (int64, error) {
	stat, err := statFields(int(f))
	if err != nil {
		return 0, err
	}
	user, err := strconv.ParseInt(string(stat[statChildUser]), 10, 64)
	if err != nil {
		return 0, err
	}
	system, err := strconv.ParseInt(string(stat[statChildSystem]), 10, 64)
	return (user + system) * int64(tick), err
}
