package surface

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
)

// traces takes spans as an OpenTelemetry collector does.
type traces struct {
	collector.UnimplementedTraceServiceServer
	address string

	mu       sync.Mutex
	requests []*collector.ExportTraceServiceRequest
}

func collect(t *testing.T) *traces {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c, s := &traces{address: l.Addr().String()}, grpc.NewServer()
	collector.RegisterTraceServiceServer(s, c)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return c
}

func (c *traces) Export(_ context.Context, r *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.requests = append(c.requests, r)
	return &collector.ExportTraceServiceResponse{}, nil
}

// spans are those received so far, by name; those of etcd itself with their attributes.
func (c *traces) spans() (spans map[string]bool, resources map[string]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	spans, resources = map[string]bool{}, map[string]bool{}
	for _, r := range c.requests {
		for _, resource := range r.ResourceSpans {
			resources[attributes(resource.Resource.Attributes)] = true
			for _, scope := range resource.ScopeSpans {
				for _, span := range scope.Spans {
					text := span.Name
					if !strings.Contains(span.Name, "/") { // those of calls have what the library puts there
						text += " " + attributes(span.Attributes)
					}
					spans[text] = true
				}
			}
		}
	}
	return spans, resources
}

func attributes(all []*commonpb.KeyValue) string {
	var text []string
	for _, a := range all {
		text = append(text, fmt.Sprintf("%s=%s%d%t", a.Key, a.Value.GetStringValue(), a.Value.GetIntValue(), a.Value.GetBoolValue()))
	}
	return strings.Join(text, " ")
}

func (c *traces) contains(text string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.requests {
		b, err := proto.Marshal(r)
		if err != nil || strings.Contains(string(b), text) {
			return true
		}
	}
	return false
}

// sampled is a request of a client that wants it to be traced.
func sampled(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "traceparent", "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01")
}

// TestSpansOfEtcd: with the same flags and requests, the spans of quire are named and described as those of a real etcd.
// Only requests are traced whose client asks for it, the sampling rate being 0.
func TestSpansOfEtcd(t *testing.T) {
	t.Parallel()
	const secret = "this-is-a-value"
	seen, described := map[string]map[string]bool{}, map[string]map[string]bool{}
	for _, p := range []program{etcd(t), quire(t)} {
		c := collect(t)
		s := p.start(t, 1, "--enable-distributed-tracing", "--distributed-tracing-address="+c.address,
			"--distributed-tracing-service-name=test-tracing", "--distributed-tracing-instance-id=one", "--distributed-tracing-sampling-rate=0")[0]
		client, ctx := s.client(t), within(t, 60*time.Second)
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		_, err := client.Put(ctx, "not-traced", secret)
		must(err)
		asked := sampled(ctx)
		_, err = client.Put(asked, "key", secret)
		must(err)
		_, err = client.Get(asked, "key", clientv3.WithRange("z"), clientv3.WithLimit(3), clientv3.WithKeysOnly())
		must(err)
		_, err = client.Get(asked, "key", clientv3.WithCountOnly(), clientv3.WithRev(2))
		must(err)
		_, err = client.Txn(asked).If(clientv3.Compare(clientv3.Value("compared"), "=", secret)).
			Then(clientv3.OpTxn(nil, nil, nil), clientv3.OpDelete("d"), clientv3.OpPut("p", secret)).Else(clientv3.OpGet("g")).Commit()
		must(err)
		_, err = client.Txn(asked).Then(clientv3.OpGet("g")).Commit()
		must(err)
		_, err = client.Delete(asked, "key", clientv3.WithPrefix())
		must(err)
		_, err = pbLeases(client).LeaseGrant(asked, grant(1234, 1000))
		must(err)
		_, err = client.KeepAliveOnce(asked, 1234)
		must(err)
		_, err = client.Revoke(asked, 1234)
		must(err)
		_, err = client.Compact(asked, 2)
		must(err)
		watching, cancel := context.WithCancel(asked)
		if r := <-client.Watch(watching, "watched", clientv3.WithCreatedNotify(), clientv3.WithProgressNotify(), clientv3.WithPrevKV()); !r.Created {
			t.Fatalf("a watch says %+v", r)
		}
		cancel()
		client.Close()
		eventually(t, "the spans of "+p.name+" have come", func() bool {
			spans, _ := c.spans()
			for text := range spans {
				if strings.HasPrefix(text, "watch ") {
					return spans["etcdserverpb.KV/Compact"]
				}
			}
			return false
		})
		s.Stop(20 * time.Second) // sends what is left
		seen[p.name], described[p.name] = c.spans()
		if c.contains(secret) {
			t.Errorf("a value is in the spans of %s", p.name)
		}
		if c.contains("not-traced") {
			t.Errorf("%s traced a request whose client did not ask for it", p.name)
		}
	}
	for _, x := range []struct {
		what         string
		theirs, ours map[string]bool
	}{{"spans", seen["etcd"], seen["quire"]}, {"resources", described["etcd"], described["quire"]}} {
		theirs, ours := slices.Sorted(maps.Keys(x.theirs)), slices.Sorted(maps.Keys(x.ours))
		if !slices.Equal(theirs, ours) {
			t.Errorf("%s of quire:\n%s\nof etcd:\n%s", x.what, strings.Join(ours, "\n"), strings.Join(theirs, "\n"))
		}
	}
}

// TestSamplingRate: at the rate of a million in a million, what no client has decided on is traced.
func TestSamplingRate(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, p program) {
		c := collect(t)
		s := p.start(t, 1, "--enable-distributed-tracing=true", "--distributed-tracing-address="+c.address, "--distributed-tracing-sampling-rate=1000000")[0]
		if _, err := s.client(t).Put(within(t, 60*time.Second), "key", "value"); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the span has come", func() bool {
			spans, resources := c.spans()
			return spans["put key=key0false"] && resources["service.name=etcd0false"]
		})
		s.Stop(20 * time.Second)
	})
}
