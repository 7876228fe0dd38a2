package main

import (
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/quire-db/quire/test/load/proc"
)

func TestConnectionsAreSpreadEvenlyOverTheProcesses(t *testing.T) {
	b := &bed{o: &options{conns: 8}}
	for _, addr := range []string{"127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"} {
		b.p = append(b.p, &proc.Process{Spec: proc.Spec{Addr: addr}})
	}
	if err := b.connect(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		for _, c := range b.conns {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		}
	}()
	if len(b.conns) != 9 {
		t.Fatalf("%d connections to three processes, expected 9", len(b.conns))
	}
	for i, c := range b.conns {
		if want := b.p[i%3].Spec.Addr; !strings.HasSuffix(c.Target(), want) {
			t.Errorf("connection %d leads to %s, expected %s", i, c.Target(), want)
		}
	}
	target := func(c *grpc.ClientConn) string { return c.Target() }
	if target(b.conns[0]) == target(b.conns[len(b.conns)-1]) {
		t.Error("the watcher of watchIdle and its writer share a process")
	}
	clients := map[string]int{}
	for i := range clients192 {
		clients[target(b.conns[i%len(b.conns)])]++
	}
	for addr, n := range clients {
		if n != clients192/3 {
			t.Errorf("%d of the 192 clients are on %s, expected 64", n, addr)
		}
	}
}

func TestServersAreRefusedWhereTheyCannotBeMeasured(t *testing.T) {
	for _, c := range []struct {
		o      options
		server string
		fits   bool
	}{
		{options{postgres: true}, quirePostgres, true},
		{options{postgres: true}, "etcd", true},
		{options{}, "quire", true},
		{options{}, quirePostgres, false},
		{options{bloat: true}, quirePostgres3, true},
		{options{bloat: true}, "quire", false},
		{options{profile: true, servers: []string{quirePostgres}}, quirePostgres, true},
		{options{profile: true, servers: []string{"quire", "etcd"}}, "quire", false},
		{options{extents: extents}, floor, false},
		{options{extents: extents}, kinePostgres, false},
	} {
		if err := c.o.suits(c.server); (err == nil) != c.fits {
			t.Errorf("%s with %+v: %v, fits expected: %t", c.server, c.o, err, c.fits)
		}
	}
}

func TestServerWithoutPostgresHasNoFigureOfIt(t *testing.T) {
	none := usage{cpu: time.Second, database: math.NaN()}
	r := result{ops: 10, used: none.since(usage{database: math.NaN()})}
	if v := r.costs(); v[0] != 100_000 || !math.IsNaN(v[1]) {
		t.Errorf("costs are %v, expected 100000 and no number", v)
	}
	r.used = usage{cpu: time.Second, database: 2}.since(usage{database: 1})
	if v := r.costs(); !slices.Equal(v, []float64{100_000, 100_000}) {
		t.Errorf("costs are %v, expected 100000 twice", v)
	}
}

func TestPrefixEndsBehindTheKeysWithThePrefix(t *testing.T) {
	for prefix, want := range map[string]string{"/registry/one/": "/registry/one0", "/registry/many/000041": "/registry/many/000042", "a9": "a:"} {
		if got := prefixEnd(prefix); got != want {
			t.Errorf("prefixEnd(%q) = %q, expected %q", prefix, got, want)
		}
	}
}

func TestSizeThatGrowsIsNotFlat(t *testing.T) {
	at := func(sizes ...int64) (samples []bloatSample) {
		for _, n := range sizes {
			samples = append(samples, bloatSample{bytes: n << 20})
		}
		return samples
	}
	for _, c := range []struct {
		samples []bloatSample
		flat    bool
	}{
		{at(10, 90, 100, 60, 100, 80, 104, 70, 90), true},
		{at(10, 90, 200, 60, 100, 80, 106, 70, 90), false}, // the first third does not count
		{at(10, 90, 100, 100, 100, 100, 50, 40, 30), true},
	} {
		if verdict, flat := judge(c.samples); flat != c.flat || strings.Contains(verdict, "NOT") == c.flat {
			t.Errorf("%+v: %t, %s", c.samples, flat, verdict)
		}
	}
}
