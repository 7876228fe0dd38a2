package main

import (
	"bytes"
	"errors"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// diesWithUs ends a process when this one ends, also when it is killed.
var diesWithUs = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}

// adoptOrphans makes processes whose parent ended children of this one, so that killOrphans finds them.
func adoptOrphans() error {
	return unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
}

// children are the ids of this process's children.
func children() (map[int]bool, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	found := map[int]bool{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue // not a process
		}
		stat, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // ended meanwhile
		}
		if err != nil {
			return nil, err
		}
		// pid (name) state parent …; the name may contain anything.
		_, rest, _ := bytes.Cut(stat[bytes.LastIndexByte(stat, ')')+1:], []byte(" "))
		if fields := strings.Fields(string(rest)); len(fields) > 1 && fields[1] == strconv.Itoa(os.Getpid()) {
			found[pid] = true
		}
	}
	return found, nil
}

// killOrphans kills the children that are not among known, and theirs, which become children of this process.
func killOrphans(known map[int]bool) error {
	for end := time.Now().Add(10 * time.Second); ; {
		now, err := children()
		if err != nil {
			return err
		}
		left := 0
		for pid := range now {
			if known[pid] {
				continue
			}
			left++
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return err
			}
			if _, err := syscall.Wait4(pid, nil, syscall.WNOHANG, nil); err != nil && !errors.Is(err, syscall.ECHILD) {
				return err
			}
		}
		if left == 0 {
			return nil
		}
		if time.Now().After(end) {
			return errors.New("processes that a test left behind do not end when killed")
		}
		time.Sleep(10 * time.Millisecond) // a killed process takes a moment to end
	}
}
