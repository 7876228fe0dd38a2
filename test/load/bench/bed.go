package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	"github.com/quire-db/quire/test/load/proc"
)

// bed is one server in one scene: a process of its own with data of its own.
type bed struct {
	o     *options
	kind  string // as in -servers
	spec  proc.Spec
	p     *proc.Process
	conns []*grpc.ClientConn

	keys  map[string]*keySet // what prepare has loaded, by prefix
	walks map[string]*walk   // lists that go on in the next round
	marks map[string]int64   // revisions that a scene remembers
	fresh int                // keys created so far by create: never the same again
}

// startLimit is how long a server may take until it serves.
const startLimit = 10 * time.Minute

// quotaFlag keeps etcd's default of 2 GiB from ending a run; quire takes the same flag.
func (o *options) quotaFlag() string { return fmt.Sprintf("--quota-backend-bytes=%d", o.quota) }

// kineFull is kine's own default data source with synchronous=FULL in the place of NORMAL.
const kineFull = "sqlite://./db/state.db?_journal_mode=WAL&_busy_timeout=30000&_synchronous=FULL&_txlock=immediate&_stmt_cache_size=20&cache=shared"

func newBed(o *options, kind, scene string) (*bed, error) {
	b := &bed{
		o: o, kind: kind, keys: map[string]*keySet{}, walks: map[string]*walk{}, marks: map[string]int64{},
		spec: proc.Spec{Binary: o.binaries[kind], Dir: filepath.Join(o.dir, scene+"-"+kind), Kind: kind},
	}
	switch kind {
	case "kine-full":
		b.spec.Kind = "kine"
		b.spec.Flags = []string{"--endpoint=" + kineFull}
		if err := os.MkdirAll(filepath.Join(b.spec.DataDir(), "db"), 0o700); err != nil {
			return nil, err
		}
	case "etcd", "quire":
		b.spec.Flags = []string{o.quotaFlag()}
	case floor:
		b.spec.Kind = "etcd" // whose command line it takes
	}
	return b, nil
}

// floor is the server that does nothing (test/load/floor).
const floor = "floor"

// floorRows are the workloads that floor does. The others need what it has not: values, compares, history, leases, restarts.
var floorRows = regexp.MustCompile(`^(put, \d+ clients?$|k8s |linearizable get|80 % get|watch, |idle with)`)

// able: the server takes part in the workload.
func able(kind string, w workload) bool { return kind != floor || floorRows.MatchString(w.name) }

// isKine: the server knows only kube-apiserver's shapes of requests.
func (b *bed) isKine() bool { return b.spec.Kind == "kine" }

// start starts the server on fresh ports and returns how long it took until it answered a read.
func (b *bed) start(ctx context.Context) (time.Duration, error) {
	var err error
	if b.spec.Addr, err = proc.FreeAddr(); err != nil {
		return 0, err
	}
	if b.spec.Peer, err = proc.FreeAddr(); err != nil {
		return 0, err
	}
	if b.p, err = proc.Start(b.spec); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	first := time.Duration(0)
	err = b.p.Wait(ctx, func(ctx context.Context) error {
		// A connection that failed waits before it tries again: ask with a new one each time.
		conns, err := dial(b.spec.Addr, 1)
		if err != nil {
			return err
		}
		defer conns[0].Close()
		r := &pb.RangeResponse{}
		if err := callProto(ctx, conns[0], methodRange, &pb.RangeRequest{Key: []byte("/registry/health")}, r); err != nil {
			return err
		}
		first = time.Since(b.p.Started)
		return nil
	})
	if err != nil {
		return 0, err
	}
	if b.conns, err = dial(b.spec.Addr, b.o.conns); err != nil {
		return 0, err
	}
	return first, nil
}

// kill ends the server with SIGKILL.
func (b *bed) kill() error {
	var errs []error
	for _, c := range b.conns {
		errs = append(errs, c.Close())
	}
	b.conns = nil
	if b.p != nil {
		b.p.Kill()
		b.p = nil
	}
	return errors.Join(errs...)
}

// discard ends the server and removes its data.
func (b *bed) discard() error {
	return errors.Join(b.kill(), os.RemoveAll(b.spec.Dir))
}

// alive says why the server is gone, if it is.
func (b *bed) alive() error {
	select {
	case <-b.p.Done():
		return fmt.Errorf("the server ended by itself: %s", b.p.LogTail(500))
	default:
		return nil
	}
}

// revision asks for the store's present revision.
func (b *bed) revision(ctx context.Context) (int64, error) {
	r := &pb.RangeResponse{}
	if err := callProto(ctx, b.conns[0], methodRange, &pb.RangeRequest{Key: []byte("/registry/health")}, r); err != nil {
		return 0, err
	}
	return r.Header.Revision, nil
}

// saved is where the data of the prepared server is kept for scenes that start from it again.
func (b *bed) saved() string { return filepath.Join(b.spec.Dir, "saved") }

// save ends the server and keeps its data.
func (b *bed) save() error {
	if err := b.p.Stop(time.Minute); err != nil {
		return err
	}
	if err := b.kill(); err != nil {
		return err
	}
	return os.CopyFS(b.saved(), os.DirFS(b.spec.DataDir()))
}

// restore ends the server if it runs and puts the saved data back.
func (b *bed) restore() error {
	if err := b.kill(); err != nil {
		return err
	}
	if err := os.RemoveAll(b.spec.DataDir()); err != nil {
		return err
	}
	return os.CopyFS(b.spec.DataDir(), os.DirFS(b.saved()))
}

// usage is what the server has used so far.
type usage struct {
	cpu     time.Duration
	written int64
}

func (b *bed) usage() (usage, error) {
	cpu, err := b.p.CPU()
	if err != nil {
		return usage{}, err
	}
	written, err := b.p.WrittenBytes()
	return usage{cpu: cpu, written: written}, err
}
