package conformance

import (
	"context"
	"fmt"
	"slices"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/naming/endpoints"
	"go.etcd.io/etcd/client/v3/naming/resolver"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

func (x *exam) endpoints(c *clientv3.Client, target string) endpoints.Manager {
	x.Helper()
	m, err := endpoints.NewManager(c, target)
	x.done("manage endpoints", err)
	return m
}

// list are the endpoints of a target, sorted: "key=address".
func (x *exam) list(m endpoints.Manager) string {
	x.Helper()
	all, err := m.List(x.ctx)
	x.done("list endpoints", err)
	var text []string
	for key, e := range all {
		text = append(text, fmt.Sprintf("%s=%s", key, e.Addr))
	}
	slices.Sort(text)
	return strings.Join(text, " ")
}

var namingCases = []testCase{
	{name: "endpoints are added, changed together, listed and watched", run: func(x *exam) {
		c := x.client()
		m := x.endpoints(c, "svc")
		x.done("add", x.endpoints(c, "svc2").AddEndpoint(x.ctx, "svc2/other", endpoints.Endpoint{Addr: "other"}))
		x.done("add", m.AddEndpoint(x.ctx, "svc/a", endpoints.Endpoint{Addr: "a:1", Metadata: "text"}))
		equal(x, "endpoints", x.list(m), "svc/a=a:1")
		all, err := m.List(x.ctx)
		x.done("list", err)
		equal(x, "metadata", all["svc/a"].Metadata, any("text"))

		ctx, cancel := context.WithCancel(x.ctx)
		updates, err := m.NewWatchChannel(ctx)
		x.done("watch", err)
		sees := func(want ...string) {
			x.Helper()
			var seen []string
			for _, u := range next(x, "updates", updates) {
				seen = append(seen, fmt.Sprintf("%d %s %s", u.Op, u.Key, u.Endpoint.Addr))
			}
			if !slices.Equal(seen, want) {
				x.Errorf("updates are %q, want %q", seen, want)
			}
		}
		sees("0 svc/a a:1")
		before := x.revision()
		x.done("update", m.Update(x.ctx, []*endpoints.UpdateWithOpts{
			endpoints.NewAddUpdateOpts("svc/b", endpoints.Endpoint{Addr: "b:1"}),
			endpoints.NewDeleteUpdateOpts("svc/a"),
			endpoints.NewAddUpdateOpts("svc/c", endpoints.Endpoint{Addr: "c:1"}),
		}))
		equal(x, "revisions of an update", x.revision()-before, 1)
		sees("0 svc/b b:1", "1 svc/a ", "0 svc/c c:1")
		equal(x, "endpoints", x.list(m), "svc/b=b:1 svc/c=c:1")

		s := x.session(c)
		x.done("add", m.AddEndpoint(x.ctx, "svc/d", endpoints.Endpoint{Addr: "d:1"}, clientv3.WithLease(s.Lease())))
		sees("0 svc/d d:1")
		x.done("end of the session", s.Close())
		sees("1 svc/d ")
		x.done("delete", m.DeleteEndpoint(x.ctx, "svc/b"))
		sees("1 svc/b ")
		cancel()
		closes(x, "a watch that is over", updates)

		equal(x, "the code of a foreign key", status.Code(m.AddEndpoint(x.ctx, "svc2/a", endpoints.Endpoint{})), codes.InvalidArgument)
		if _, err := endpoints.NewManager(c, ""); err == nil {
			x.Error("no target is taken")
		}
	}},

	{name: "gRPC finds the servers of a name, and follows them", run: func(x *exam) {
		c := x.client()
		m := x.endpoints(c, "servers")
		nobody := "127.0.0.1:1"
		x.done("add", m.AddEndpoint(x.ctx, "servers/nobody", endpoints.Endpoint{Addr: nobody}))
		builder, err := resolver.NewBuilder(c)
		x.done("make a resolver", err)
		conn, err := grpc.NewClient("etcd:///servers", grpc.WithResolvers(builder), grpc.WithTransportCredentials(insecure.NewCredentials()))
		x.done("connect", err)
		defer conn.Close()
		check := func() error {
			_, err := healthpb.NewHealthClient(conn).Check(x.ctx, &healthpb.HealthCheckRequest{})
			return err
		}
		equal(x, "the code while nobody is there", status.Code(check()), codes.Unavailable)
		// The server itself is one of them.
		x.done("update", m.Update(x.ctx, []*endpoints.UpdateWithOpts{
			endpoints.NewDeleteUpdateOpts("servers/nobody"), endpoints.NewAddUpdateOpts("servers/this", endpoints.Endpoint{Addr: x.Address}),
		}))
		x.until("calls reach the server", func() bool { return check() == nil })
		x.done("update", m.Update(x.ctx, []*endpoints.UpdateWithOpts{
			endpoints.NewDeleteUpdateOpts("servers/this"), endpoints.NewAddUpdateOpts("servers/nobody", endpoints.Endpoint{Addr: nobody}),
		}))
		x.until("calls go elsewhere", func() bool { return status.Code(check()) == codes.Unavailable })
	}},
}
