package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/sys/unix"
)

// machineFacts describes where the figures come from, as lines of Markdown.
func machineFacts(dir string) ([]string, error) {
	cpu, err := procLine("/proc/cpuinfo", "model name")
	if err != nil {
		return nil, err
	}
	mem, err := procLine("/proc/meminfo", "MemTotal")
	if err != nil {
		return nil, err
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, err
	}
	sync, err := syncTime(dir)
	if err != nil {
		return nil, err
	}
	return []string{
		fmt.Sprintf("Date: %s", time.Now().UTC().Format(time.DateOnly)),
		fmt.Sprintf("Machine: %d × %s, %s of memory, Linux %s; the load generator (%s) runs on it too",
			runtime.NumCPU(), cpu, mem, unix.ByteSliceToString(uts.Release[:]), runtime.Version()),
		fmt.Sprintf("Disk: 4 KiB write + fdatasync %.2f ms (median)", sync.Seconds()*1000),
	}, nil
}

func procLine(path, name string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == name {
			return strings.Join(strings.Fields(v), " "), nil
		}
	}
	return "", fmt.Errorf("%s has no %q", path, name)
}

// syncTime is the median of 100 durable writes of 4 KiB, appended to a file as a write-ahead log does.
func syncTime(dir string) (time.Duration, error) {
	f, err := os.Create(filepath.Join(dir, "sync"))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	took := make([]time.Duration, 100)
	for i := range took {
		start := time.Now()
		if _, err := f.Write(filling[:4096]); err != nil {
			return 0, err
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return 0, err
		}
		took[i] = time.Since(start)
	}
	slices.Sort(took)
	return took[len(took)/2], nil
}

// describe says what a server is: the version it answers with, and what is not obvious of how it runs.
func describe(ctx context.Context, o *options, kind string) (string, error) {
	b, err := newBed(ctx, o, kind, "version")
	if err != nil {
		return "", err
	}
	if _, err := b.start(ctx); err != nil {
		return "", errors.Join(err, b.discard())
	}
	r := &pb.StatusResponse{}
	err = callProto(ctx, b.conns[0], methodStatus, &pb.StatusRequest{}, r)
	if err != nil {
		err = fmt.Errorf("asking for the version: %w", err)
	}
	if err := errors.Join(err, b.discard()); err != nil {
		return "", err
	}
	if o.raft {
		return fmt.Sprintf("%s: %s, three members on this machine, each with a third of the clients' connections, every acknowledged write synced by two of them, no other settings than %s; processor time, memory and bytes are sums over the members",
			kind, r.Version, o.quotaFlag()), nil
	}
	switch kind {
	case "kine":
		return fmt.Sprintf("kine: v0.16.4 (answers as etcd %s), its default SQLite data source (`_journal_mode=WAL&_synchronous=NORMAL&cache=shared`): "+
			"a commit is **not** synced, a power cut loses acknowledged writes. Its 'put' is an update Txn: its Put of an existing key answers success without having written", r.Version), nil
	case "kine-full":
		return "kine-full: the same kine with `_synchronous=FULL`: each commit is synced, as etcd and quire do", nil
	case kinePostgres:
		return fmt.Sprintf("kine-pg: kine v0.16.4 (answers as etcd %s) on PostgreSQL, no settings of its own. Its 'put' is an update Txn: its Put of an existing key answers success without having written", r.Version), nil
	case quirePostgres:
		return fmt.Sprintf("quire-pg: %s, one process on PostgreSQL, no other settings than %s", r.Version, o.quotaFlag()), nil
	case quirePostgres3:
		return "quire-pg3: three such processes, each with a third of the clients' connections; processor time and memory are sums over them", nil
	case "etcd":
		return fmt.Sprintf("etcd: %s, every acknowledged write synced, no other settings than %s; its resident memory includes the mapped database file", r.Version, o.quotaFlag()), nil
	default:
		return fmt.Sprintf("%s: %s, every acknowledged write synced, no other settings than %s", kind, r.Version, o.quotaFlag()), nil
	}
}
