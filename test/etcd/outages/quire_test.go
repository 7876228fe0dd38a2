package outages

import (
	"bytes"
	"context"
	"flag"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/test/etcd/start"
	"github.com/quire-db/quire/test/ports"
	"github.com/quire-db/quire/test/postgres"
)

var seed = flag.Uint64("seed", 0, "of the random draws; 0 draws one")

func TestMain(m *testing.M) {
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if !given {
		if err := flag.Set("test.parallel", "6"); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

// random is a series of draws that the printed seed repeats.
func random(t *testing.T) *rand.Rand {
	t.Helper()
	s := *seed
	if s == 0 {
		s = rand.Uint64()
	}
	t.Logf("repeat with -args -seed=%d", s)
	return rand.New(rand.NewPCG(s, 1))
}

// store is a Postgres server with an empty database for quires.
type store struct {
	*postgres.Server
	database string
}

// newStore starts a server. Nothing is synced unless the options ask for it: the machine does not crash here.
func newStore(t *testing.T, o postgres.Options) *store {
	t.Helper()
	o.NoFsync = true
	s := postgres.New(t, o)
	database, err := s.NewDatabase(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return &store{Server: s, database: database}
}

func (s *store) url() string { return s.DSN(s.database, postgres.Superuser) }

// through is the URL that leads through something in between.
func (s *store) through(address string) string {
	return s.DSNAt(address, s.database, postgres.Superuser)
}

// sql runs statements as the superuser.
func (s *store) sql(t *testing.T, statements ...string) {
	t.Helper()
	if err := s.Exec(t.Context(), s.database, statements...); err != nil {
		t.Fatal(err)
	}
}

// value is what a query returns that returns one value.
func (s *store) value(t *testing.T, query string) string {
	t.Helper()
	rows, err := s.Query(t.Context(), s.database, query)
	if err != nil {
		t.Fatal(err)
	}
	if len(rows) != 1 || len(rows[0]) != 1 {
		t.Fatalf("%s: %q, want one value", query, rows)
	}
	return rows[0][0]
}

// proxy is a network in front of an address, which ends with the test.
func proxy(t *testing.T, address string) *postgres.Proxy {
	t.Helper()
	p, err := postgres.StartProxy(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Errorf("close the proxy: %v", err)
		}
	})
	return p
}

// quire is one process, and the raw stubs of its services: they do not retry, so that a test sees every answer.
type quire struct {
	*start.Process
	address string

	kv    pb.KVClient
	watch pb.WatchClient
	lease pb.LeaseClient
}

// run starts a quire and does not wait until it serves. It must obey SIGTERM when the test ends, whatever became of its
// database.
func run(t *testing.T, storage string, flags ...string) *quire {
	t.Helper()
	q := &quire{address: ports.FreeAddress(t)}
	q.Process = start.Run(t, nil, append([]string{
		"--storage=" + storage,
		"--listen-client-urls=http://" + q.address,
		"--advertise-client-urls=http://" + q.address,
	}, flags...)...)
	t.Cleanup(q.stop(t))
	conn, err := start.Dial(q.address, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	q.kv, q.watch, q.lease = pb.NewKVClient(conn), pb.NewWatchClient(conn), pb.NewLeaseClient(conn)
	return q
}

// stop ends the process as an operator would, unless the test has done so.
func (q *quire) stop(t *testing.T) func() {
	return func() {
		if _, err := q.Wait(10 * time.Millisecond); err == nil {
			return
		}
		if err := q.Signal(syscall.SIGCONT); err != nil {
			t.Error(err)
		}
		code, err := q.Stop(20 * time.Second)
		if err != nil || code != 0 {
			t.Errorf("quire ended on SIGTERM with status %d (%v), want 0", code, err)
		}
	}
}

// begin starts a quire that serves.
func begin(t *testing.T, storage string, flags ...string) *quire {
	t.Helper()
	const attempts = 5
	for attempt := 1; ; attempt++ {
		q := run(t, storage, flags...)
		err := q.WaitReady(30 * time.Second)
		if err == nil {
			return q
		}
		// Somebody else may have taken the port.
		if attempt == attempts || !strings.Contains(q.Output(), "address already in use") {
			t.Fatalf("start quire: %v\n%s", err, q.Output())
		}
	}
}

// beginAll starts several on one database.
func beginAll(t *testing.T, n int, storage string, flags ...string) []*quire {
	t.Helper()
	all := make([]*quire, n)
	for i := range all {
		all[i] = begin(t, storage, flags...)
	}
	return all
}

// within bounds a call. Nothing may take longer than this, or it hangs.
func within(t *testing.T, limit time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

const patience = 20 * time.Second

func (q *quire) put(t *testing.T, key, value string) *pb.PutResponse {
	t.Helper()
	r, err := q.kv.Put(within(t, patience), &pb.PutRequest{Key: []byte(key), Value: []byte(value)})
	if err != nil {
		t.Fatalf("put %q: %v", key, err)
	}
	return r
}

// get is a linearizable read; "" is no such key.
func (q *quire) get(t *testing.T, key string) string {
	t.Helper()
	r, err := q.kv.Range(within(t, patience), &pb.RangeRequest{Key: []byte(key)})
	if err != nil {
		t.Fatalf("get %q: %v", key, err)
	}
	if len(r.Kvs) == 0 {
		return ""
	}
	return string(r.Kvs[0].Value)
}

// Calls that an outage may refuse.
func (q *quire) tryPut(ctx context.Context) error {
	_, err := q.kv.Put(ctx, &pb.PutRequest{Key: []byte("tried"), Value: []byte("x")})
	return err
}

func (q *quire) tryGet(ctx context.Context) error {
	_, err := q.kv.Range(ctx, &pb.RangeRequest{Key: []byte("tried")})
	return err
}

func (q *quire) trySerializableGet(ctx context.Context) error {
	_, err := q.kv.Range(ctx, &pb.RangeRequest{Key: []byte("tried"), Serializable: true})
	return err
}

// refused makes a call and wants it refused with Unavailable, within a limit and with a text.
func refused(t *testing.T, what string, limit time.Duration, text string, call func(context.Context) error) {
	t.Helper()
	began := time.Now()
	err := call(within(t, limit+patience))
	took := time.Since(began)
	if status.Code(err) != codes.Unavailable || !strings.Contains(status.Convert(err).Message(), text) {
		t.Errorf("%s: %v, want Unavailable with %q", what, err, text)
	}
	if took > limit {
		t.Errorf("%s was refused after %v, want within %v: %v", what, took.Round(time.Millisecond), limit, err)
	}
}

// eventually makes a call until it succeeds, and returns how long that took.
func eventually(t *testing.T, what string, limit time.Duration, call func(context.Context) error) time.Duration {
	t.Helper()
	began := time.Now()
	ctx := within(t, limit)
	for {
		err := call(ctx)
		if err == nil {
			return time.Since(began)
		}
		if time.Since(began) > limit {
			t.Fatalf("%s still fails after %v: %v", what, limit, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// ready is what /readyz answers.
func (q *quire) ready(t *testing.T) (code int, body string) {
	t.Helper()
	r, err := http.NewRequestWithContext(within(t, patience), http.MethodGet, "http://"+q.address+"/readyz", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Close = true
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatalf("/readyz: %v", err)
	}
	defer answer.Body.Close()
	var text bytes.Buffer
	if _, err := io.Copy(&text, answer.Body); err != nil {
		t.Fatalf("/readyz: %v", err)
	}
	return answer.StatusCode, text.String()
}
