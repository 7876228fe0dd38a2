// Floor is a gRPC server that does nothing but what nobody can leave out: it is what `make bench` compares with to see what
// grpc-go, the disk and the load generator alone cost on a machine.
//
// It speaks as much of etcd's API as some of the workloads need, with grpc-go's default options and plain generated messages:
//
//   - A Put, or a Txn with a put, is answered when its key and value have been appended to one file and synced, many at once.
//     No compare is evaluated: a Txn always succeeds. What is in the file is never read.
//   - A Range of one key is answered with a ready value, whether the key was written or not; a Range of many with the keys that
//     were written and their revisions, without values: it is enough for clients that compare revisions.
//   - A watch receives the puts that come after it was opened. A client that does not read holds up all writes.
//
// It has no values, versions, history, deletes, leases or compaction. It ends when it is killed, and forgets everything.
package main

import (
	"flag"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime/debug"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
)

// ignored are flags that are there because whoever starts etcd gives them.
var ignored = []string{
	"name", "advertise-client-urls", "listen-peer-urls", "initial-advertise-peer-urls", "initial-cluster", "log-level",
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "floor:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	// A sixth of a get goes into collecting garbage at Go's default of 100. Nobody has to spend that, and quire does not.
	debug.SetGCPercent(800)
	f := flag.NewFlagSet("floor", flag.ContinueOnError)
	client := f.String("listen-client-urls", "http://127.0.0.1:2379", "URL to serve on, one only")
	dir := f.String("data-dir", "floor", "directory for the file that puts are appended to")
	for _, name := range ignored {
		f.String(name, "", "taken as etcd takes it, and ignored")
	}
	if err := f.Parse(args); err != nil {
		return err
	}
	u, err := url.Parse(*client)
	if err != nil || u.Scheme != "http" || u.Host == "" {
		return fmt.Errorf("--listen-client-urls=%q: one URL such as http://127.0.0.1:2379 is needed", *client)
	}
	if err := os.MkdirAll(*dir, 0o700); err != nil {
		return err
	}
	file, err := os.Create(filepath.Join(*dir, "puts"))
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", u.Host)
	if err != nil {
		return err
	}
	return newServer(file).Serve(l)
}

// newServer makes a server that appends puts to the file.
func newServer(file *os.File) *grpc.Server {
	c := &committer{file: file}
	c.keys.revs = map[string]int64{}
	c.revision.Store(1) // as an empty etcd
	s := grpc.NewServer()
	pb.RegisterKVServer(s, &kv{commits: c})
	pb.RegisterWatchServer(s, &watch{commits: c})
	return s
}
