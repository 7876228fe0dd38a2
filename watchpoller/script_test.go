package watchpoller

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

var update = flag.Bool("update", false, "rewrite the golden transcripts in testdata")

// A client is the far end of one Serve.
type client struct {
	requests chan *pb.WatchRequest
	result   chan error
	cancel   context.CancelFunc

	mu    sync.Mutex
	got   []*pb.WatchResponse
	stall chan struct{}
	fail  error
}

// connect starts a stream; fn, if given, sees each response instead of c.got.
func connect(p *Poller, fn func(*pb.WatchResponse)) *client {
	ctx, cancel := context.WithCancel(context.Background())
	c := &client{requests: make(chan *pb.WatchRequest), result: make(chan error, 1), cancel: cancel}
	recv := func() (*pb.WatchRequest, error) {
		select {
		case r, ok := <-c.requests:
			if !ok {
				return nil, io.EOF
			}
			return r, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	send := func(msg any) error {
		c.mu.Lock()
		stall := c.stall
		c.mu.Unlock()
		if stall != nil {
			select {
			case <-stall:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.fail != nil {
			return c.fail
		}
		var m *pb.WatchResponse
		switch msg := msg.(type) {
		case *pb.WatchResponse:
			m = msg
		case *Response:
			m = msg.Proto()
		default:
			panic(fmt.Sprintf("sent a %T", msg))
		}
		if fn != nil {
			fn(m)
			return nil
		}
		c.got = append(c.got, m)
		return nil
	}
	go func() {
		err := p.Serve(ctx, recv, send)
		cancel() // as gRPC does when the handler has returned
		c.result <- err
	}()
	return c
}

func (c *client) create(r *pb.WatchCreateRequest) {
	c.requests <- &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: r}}
}

func (c *client) cancelWatch(id int64) {
	c.requests <- &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{
		CancelRequest: &pb.WatchCancelRequest{WatchId: id}}}
}

func (c *client) progress() {
	c.requests <- &pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{
		ProgressRequest: &pb.WatchProgressRequest{}}}
}

func (c *client) taken() []*pb.WatchResponse {
	c.mu.Lock()
	defer c.mu.Unlock()
	got := c.got
	c.got = nil
	return got
}

func (c *client) stop() error {
	c.cancel()
	return <-c.result
}

func describe(r *pb.WatchResponse) string {
	var b strings.Builder
	fmt.Fprintf(&b, "id=%d rev=%d", r.WatchId, r.Header.Revision)
	if r.Created {
		b.WriteString(" created")
	}
	if r.Canceled {
		b.WriteString(" canceled")
	}
	if r.CompactRevision != 0 {
		fmt.Fprintf(&b, " compact_revision=%d", r.CompactRevision)
	}
	if r.CancelReason != "" {
		fmt.Fprintf(&b, " reason=%q", r.CancelReason)
	}
	if r.Fragment {
		b.WriteString(" fragment")
	}
	for i, e := range r.Events {
		if i == 12 {
			fmt.Fprintf(&b, " … %d more, the last at %d", len(r.Events)-i, r.Events[len(r.Events)-1].Kv.ModRevision)
			break
		}
		value := string(e.Kv.Value)
		if len(value) > 8 {
			value = fmt.Sprintf("<%d>", len(value))
		}
		if e.Type == mvccpb.PUT {
			fmt.Fprintf(&b, " put(%s=%s)@%d", e.Kv.Key, value, e.Kv.ModRevision)
		} else {
			fmt.Fprintf(&b, " delete(%s)@%d", e.Kv.Key, e.Kv.ModRevision)
		}
		if e.PrevKv != nil {
			fmt.Fprintf(&b, "[was %s@%d]", e.PrevKv.Value, e.PrevKv.ModRevision)
		}
	}
	return b.String()
}

// TestScripts plays testdata/*.txt: commands, and what each client was sent because of them. Time stands still until
// everything is at rest, so that the transcripts are exact. -update rewrites them.
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txt"), func(t *testing.T) {
			in, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			var out string
			synctest.Test(t, func(t *testing.T) { out = play(t, string(in)) })
			if *update {
				if err := os.WriteFile(f, []byte(out), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if out != string(in) {
				t.Errorf("the transcript differs from %s; it is now:\n%s", f, out)
			}
		})
	}
}

// play runs a script and returns it with the answers it got. Lines that begin with "<" are answers.
func play(t *testing.T, script string) string {
	src := newMemSource()
	var p *Poller
	clients := make(map[string]*client)
	var out strings.Builder
	for line := range strings.Lines(script) {
		line = strings.TrimRight(line, "\n")
		if strings.HasPrefix(line, "<") {
			continue
		}
		out.WriteString(line + "\n")
		f := strings.Fields(line)
		if len(f) == 0 || strings.HasPrefix(line, "#") {
			continue
		}
		args := make(map[string]string)
		for _, a := range f[1:] {
			k, v, _ := strings.Cut(a, "=")
			args[k] = v
		}
		num := func(k string) int64 {
			if args[k] == "" {
				return 0
			}
			n, err := strconv.ParseInt(args[k], 10, 64)
			if err != nil {
				t.Fatalf("%s: %v", line, err)
			}
			return n
		}
		text := func(k string) string {
			s, err := strconv.Unquote(`"` + args[k] + `"`)
			if err != nil {
				t.Fatalf("%s: %v", line, err)
			}
			return s
		}
		name := "a"
		if v := args["on"]; v != "" {
			name = v
		}
		c := clients[name]
		switch f[0] {
		case "start":
			var interval time.Duration
			if v := args["progress"]; v != "" {
				var err error
				if interval, err = time.ParseDuration(v); err != nil {
					t.Fatalf("%s: %v", line, err)
				}
			}
			p = Start(src, Options{
				Header: func() *pb.ResponseHeader {
					return &pb.ResponseHeader{ClusterId: 1, MemberId: 2, RaftTerm: 3, Revision: 99}
				},
				StreamBytes: int(num("bytes")), MaxResponseBytes: int(num("fragment")), ProgressInterval: interval,
				Permit: func(_ context.Context, r *pb.WatchCreateRequest) string {
					if string(r.Key) == "secret" {
						return "etcdserver: permission denied"
					}
					return ""
				},
			})
			defer func() {
				p.Close()
				for n, c := range clients {
					if err := <-c.result; err != ErrClosed {
						t.Errorf("client %s: Serve returned %v, want ErrClosed", n, err)
					}
				}
			}()
		case "connect":
			clients[name] = connect(p, nil)
		case "put": // put key=value…, all one revision
			var ops []op
			for _, a := range f[1:] {
				k, v, _ := strings.Cut(a, "=")
				if n, ok := strings.CutPrefix(v, "x*"); ok {
					size, err := strconv.Atoi(n)
					if err != nil {
						t.Fatalf("%s: %v", line, err)
					}
					v = strings.Repeat("x", size)
				}
				ops = append(ops, op{key: k, value: v})
			}
			src.txn(ops...)
		case "puts": // puts n=100 key=k size=10, each its own revision, all found by one read
			src.hold()
			synctest.Wait()
			for range num("n") {
				src.put(args["key"], strings.Repeat("x", int(num("size"))))
			}
			synctest.Wait()
			src.release()
		case "delete":
			var ops []op
			for _, k := range f[1:] {
				ops = append(ops, op{key: k, del: true})
			}
			src.txn(ops...)
		case "compact":
			src.compactAt(num("rev"))
		case "create":
			r := &pb.WatchCreateRequest{Key: []byte(text("key")), RangeEnd: []byte(text("end")), StartRevision: num("rev"), WatchId: num("id")}
			_, r.PrevKv = args["prev_kv"]
			_, r.Fragment = args["fragment"]
			_, r.ProgressNotify = args["progress_notify"]
			if _, ok := args["noput"]; ok {
				r.Filters = append(r.Filters, pb.WatchCreateRequest_NOPUT)
			}
			if _, ok := args["nodelete"]; ok {
				r.Filters = append(r.Filters, pb.WatchCreateRequest_NODELETE)
			}
			c.create(r)
		case "cancel":
			c.cancelWatch(num("id"))
		case "progress":
			c.progress()
		case "empty": // requests that say nothing
			c.requests <- &pb.WatchRequest{}
			c.create(nil)
		case "half-close":
			close(c.requests)
		case "stall":
			c.mu.Lock()
			c.stall = make(chan struct{})
			c.mu.Unlock()
		case "resume":
			c.mu.Lock()
			close(c.stall)
			c.stall = nil
			c.mu.Unlock()
		case "hold":
			src.hold()
		case "release":
			src.release()
		case "break":
			src.fail(errBroken)
		case "repair":
			src.fail(nil)
		case "sleep":
			d, err := time.ParseDuration(f[1])
			if err != nil {
				t.Fatalf("%s: %v", line, err)
			}
			time.Sleep(d)
		case "status":
			synctest.Wait()
			p.mu.Lock()
			fmt.Fprintf(&out, "< synced=%d lagging=%d\n", p.mu.synced.size, len(p.mu.lagging))
			p.mu.Unlock()
		default:
			t.Fatalf("unknown command: %s", line)
		}
		synctest.Wait()
		for _, n := range []string{"a", "b"} {
			c := clients[n]
			if c == nil {
				continue
			}
			for _, r := range c.taken() {
				if r.Header.ClusterId != 1 || r.Header.MemberId != 2 || r.Header.RaftTerm != 3 {
					t.Errorf("%s: the header lacks the ids: %v", line, r.Header)
				}
				fmt.Fprintf(&out, "< %s: %s\n", n, describe(r))
			}
		}
	}
	return out.String()
}
