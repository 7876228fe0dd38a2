package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	"github.com/quire-db/quire/test/load/proc"
	"github.com/quire-db/quire/test/postgres"
)

// bed is one server in one scene: one or more processes of its own with data of their own.
type bed struct {
	o        *options
	kind     string    // as in -servers
	spec     proc.Spec // of the first process
	database string    // name of its database in PostgreSQL; "" if it uses none
	p        fleet
	peers    []string           // addresses of a cluster's members
	conns    []*grpc.ClientConn // conns[i] leads to process i % len(p)

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

func newBed(ctx context.Context, o *options, kind, scene string) (*bed, error) {
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
		if kind == "quire" && !o.raft {
			// Else the flags of etcd's kind, which name a cluster, would make it a member of one.
			b.spec.Flags = append(b.spec.Flags, "--storage=sqlite://"+filepath.Join(b.spec.DataDir(), "quire.db"))
		}
	case floor:
		b.spec.Kind = "etcd" // whose command line it takes
	case quirePostgres, quirePostgres3, kinePostgres:
		if err := o.database.Resume(); err != nil {
			return nil, err
		}
		var err error
		if b.database, err = o.database.NewDatabase(ctx); err != nil {
			return nil, err
		}
		dsn := o.database.DSN(b.database, postgres.Superuser)
		if kind == kinePostgres {
			b.spec.Kind = "kine"
			b.spec.Flags = []string{"--endpoint=" + dsn}
		} else {
			b.spec.Kind = "quire"
			b.spec.Flags = []string{"--storage=" + dsn, o.quotaFlag()}
		}
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

// start starts the server's processes at once on fresh ports and returns how long it took until all of them had answered a read.
func (b *bed) start(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	specs, err := b.specs()
	if err != nil {
		return 0, err
	}
	for _, s := range specs {
		if s.Addr, err = proc.FreeAddr(); err != nil {
			return 0, err
		}
		p, err := proc.Start(s)
		if err != nil {
			return 0, err
		}
		b.p = append(b.p, p)
	}
	b.spec = b.p[0].Spec
	if err := b.answers(ctx); err != nil {
		return 0, err
	}
	return time.Since(b.p[0].Started), b.connect()
}

// specs are those of all processes, without the addresses for clients.
func (b *bed) specs() ([]proc.Spec, error) {
	if b.o.raft {
		return b.cluster()
	}
	specs := make([]proc.Spec, processes(b.kind))
	for i := range specs {
		s := b.spec
		if i > 0 {
			s.Dir = filepath.Join(s.Dir, fmt.Sprintf("process-%d", i+1))
		}
		var err error
		if s.Peer, err = proc.FreeAddr(); err != nil {
			return nil, err
		}
		specs[i] = s
	}
	return specs, nil
}

// answers returns when all processes have answered a read.
func (b *bed) answers(ctx context.Context) error {
	for _, p := range b.p {
		if err := p.Wait(ctx, func(ctx context.Context) error {
			// A connection that failed waits before it tries again: ask with a new one each time.
			conns, err := dial(p.Spec.Addr, 1)
			if err != nil {
				return err
			}
			defer conns[0].Close()
			return callProto(ctx, conns[0], methodRange, &pb.RangeRequest{Key: []byte("/registry/health")}, &pb.RangeResponse{})
		}); err != nil {
			return err
		}
	}
	return nil
}

// awakeLimit is how long a server on PostgreSQL, or a cluster, may take until it serves again after it was stopped.
const awakeLimit = 30 * time.Second

// awake returns when a server on PostgreSQL serves again after it was stopped: what it had asked the database then has taken
// longer, by its clock, than it waits, and it answers that the database is away until it has asked again. The members of a
// cluster have not heard of each other, and elect a leader.
func (b *bed) awake(ctx context.Context) error {
	if b.database == "" && !b.o.raft {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, awakeLimit)
	defer cancel()
	return b.answers(ctx)
}

// connect opens the clients' connections, to one process after the other, equally many to each.
func (b *bed) connect() error {
	perProcess := (b.o.conns + len(b.p) - 1) / len(b.p)
	for range perProcess {
		for _, p := range b.p {
			c, err := dial(p.Spec.Addr, 1)
			if err != nil {
				return err
			}
			b.conns = append(b.conns, c...)
		}
	}
	return nil
}

// kill ends the server with SIGKILL.
func (b *bed) kill() error {
	var errs []error
	for _, c := range b.conns {
		errs = append(errs, c.Close())
	}
	b.conns = nil
	b.p.Kill()
	b.p = nil
	return errors.Join(errs...)
}

// discard ends the server and removes its data.
func (b *bed) discard() error {
	return errors.Join(b.kill(), b.dropDatabase(), os.RemoveAll(b.spec.Dir))
}

// dropDatabase does nothing if there is none.
func (b *bed) dropDatabase() error {
	if b.database == "" {
		return nil
	}
	if err := b.o.database.Resume(); err != nil {
		return err
	}
	// Not the context of the run, which may have ended.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	err := b.o.database.DropDatabase(ctx, b.database)
	b.database = ""
	return err
}

// alive says why the server is gone, if one of its processes is.
func (b *bed) alive() error {
	for _, p := range b.p {
		select {
		case <-p.Done():
			return fmt.Errorf("the server ended by itself: %s", p.LogTail(500))
		default:
		}
	}
	return nil
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
	cpu      time.Duration
	written  int64   // bytes, PostgreSQL's included
	database float64 // seconds of PostgreSQL's processor time; not a number if the server does not use it
}

func (b *bed) usage() (u usage, err error) {
	if u.cpu, err = b.p.CPU(); err != nil {
		return usage{}, err
	}
	if u.written, err = b.p.WrittenBytes(); err != nil {
		return usage{}, err
	}
	if b.database == "" {
		u.database = math.NaN()
		return u, nil
	}
	cpu, err := b.o.database.family.CPU()
	if err != nil {
		return usage{}, err
	}
	written, err := b.o.database.family.WrittenBytes()
	u.database = cpu.Seconds()
	u.written += written
	return u, err
}

// since is what was used after an earlier reading.
func (u usage) since(before usage) usage {
	return usage{cpu: u.cpu - before.cpu, written: u.written - before.written, database: u.database - before.database}
}
