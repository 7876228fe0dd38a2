package outages

import (
	"bytes"
	"fmt"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/test/postgres"
)

// Ten processes that start at once on an empty database all come up, on one store.
func TestTenQuiresStartAtOnce(t *testing.T) {
	t.Parallel()
	s := newStore(t, postgres.Options{})
	quires := make([]*quire, 10)
	for i := range quires {
		quires[i] = run(t, s.url(), "--postgres-max-connections=6")
	}
	for i, q := range quires {
		if err := q.WaitReady(40 * time.Second); err != nil {
			t.Fatalf("quire %d: %v\n%s", i, err, q.Output())
		}
	}
	for i, q := range quires {
		if rev := q.put(t, "k", fmt.Sprint(i)).Header.Revision; rev != int64(i)+2 {
			t.Errorf("write %d made revision %d, want %d", i, rev, i+2)
		}
	}
	for i, q := range quires {
		if got := q.get(t, "k"); got != "9" {
			t.Errorf("quire %d reads %q, want 9", i, got)
		}
	}
}

// everything is a short round through what uses the database: writes of two processes, an event from one to the other, a
// lease, a compaction, values that are read from the table, a restart.
func everything(t *testing.T, url string, flags ...string) {
	t.Helper()
	a, b := begin(t, url, flags...), begin(t, url, flags...)
	w := b.watchAll(t, "k/")
	var wanted []stored
	for i := range 10 {
		value := fmt.Sprint(i)
		rev := []*quire{a, b}[i%2].put(t, "k/x", value).Header.Revision
		wanted = append(wanted, stored{revision: rev, version: int64(i) + 1, key: "k/x", value: value})
	}
	w.complete(wanted)
	a.grant(t, 1, 2, 77)
	if got := b.get(t, "k/x"); got != "9" {
		t.Errorf("the other quire reads %q, want 9", got)
	}
	old, err := b.kv.Range(within(t, patience), &pb.RangeRequest{Key: []byte("k/x"), Revision: wanted[4].revision})
	if err != nil || string(old.Kvs[0].Value) != "4" {
		t.Errorf("an old revision: %v %v", old, err)
	}
	if _, err := a.kv.Compact(within(t, patience), &pb.CompactionRequest{Revision: wanted[5].revision, Physical: true}); err != nil {
		t.Errorf("compact: %v", err)
	}
	for began := time.Now(); b.leased(t) > 0; time.Sleep(20 * time.Millisecond) {
		if time.Since(began) > patience {
			t.Fatal("a lease with a TTL of 2 s does not expire")
		}
	}
	a.stop(t)()
	if got := begin(t, url, flags...).get(t, "k/x"); got != "9" {
		t.Errorf("after a restart: %q, want 9", got)
	}
}

func TestPgBouncerInTransactionPooling(t *testing.T) {
	t.Parallel()
	s := newStore(t, postgres.Options{})
	pooler, err := postgres.StartPgBouncer(t.Context(), s.Server, postgres.PgBouncerOptions{Settings: map[string]string{"default_pool_size": "6"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of PgBouncer's log:\n%s", pooler.LogTail(3000))
		}
		if err := pooler.Stop(); err != nil {
			t.Errorf("stop PgBouncer: %v", err)
		}
	})
	url := pooler.DSN(s.database, postgres.Superuser)
	everything(t, url, "--postgres-schema=polled")
	everything(t, url, "--postgres-schema=notified", "--postgres-listen-url="+s.url())
	// Under load too, with fewer connections to the server than the quires have to the pooler, while some are killed.
	quires := beginAll(t, 3, url)
	w := quires[0].watchAll(t, loadPrefix)
	l := write(t, 2, quires...)
	for range 10 {
		l.more(10)
		if _, err := s.TerminateBackends(t.Context(), "datname = '"+s.database+"' AND random() < 0.3"); err != nil {
			t.Fatal(err)
		}
	}
	for _, q := range quires {
		eventually(t, "a write", patience, q.tryPut)
	}
	l.more(30)
	l.stop()
	l.onlyUnavailable()
	l.account(s)
	agree(t, quires...)
	w.complete(s.rows(t, loadPrefix))
}

func TestVerifyFullWithAClientCertificate(t *testing.T) {
	t.Parallel()
	s := newStore(t, postgres.Options{TLS: postgres.ClientCertificates})
	if err := s.CreateRole(t.Context(), postgres.Role{Name: "quire", Database: s.database, Schema: "quire"}); err != nil {
		t.Fatal(err)
	}
	certificate, err := s.Authority.ClientParameters("quire")
	if err != nil {
		t.Fatal(err)
	}
	everything(t, s.DSN(s.database, "quire", certificate...))
	if n := s.value(t, "SELECT count(*) FROM pg_stat_activity JOIN pg_stat_ssl USING (pid) WHERE usename = 'quire' AND NOT ssl"); n != "0" {
		t.Errorf("%s connections without TLS", n)
	}
	// Whoever is not let in says so.
	without := run(t, s.DSN(s.database, "quire"))
	if code, err := without.Wait(patience); err != nil || code == 0 {
		t.Errorf("without a certificate: status %d (%v), want it to end with another than 0\n%s", code, err, without.Output())
	}
	if len(without.Lines("check the role and its password or certificate")) == 0 {
		t.Errorf("it does not say what is missing:\n%s", without.Output())
	}
}

// A role that owns one schema and may do nothing else, and a schema whose name needs quoting.
func TestARoleThatOwnsOnlyItsSchema(t *testing.T) {
	t.Parallel()
	s := newStore(t, postgres.Options{})
	for i, schema := range []string{"quire", "My Store", `we"ird.name`} {
		role := fmt.Sprint("role", i)
		if err := s.CreateRole(t.Context(), postgres.Role{Name: role, Database: s.database, Schema: schema}); err != nil {
			t.Fatal(err)
		}
		everything(t, s.DSN(s.database, role), "--postgres-schema="+schema)
	}
	if n := s.value(t, `SELECT count(*) FROM "My Store".kv`); n != "1" {
		t.Errorf("%s keys in the view kv of My Store, want 1", n)
	}
}

// Two schemas of one database are two stores.
func TestTwoSchemasInOneDatabase(t *testing.T) {
	t.Parallel()
	s := newStore(t, postgres.Options{})
	var pairs [][]*quire
	for _, schema := range []string{"one", "two"} {
		pairs = append(pairs, beginAll(t, 2, s.url(), "--postgres-schema="+schema))
	}
	var watches []*watching
	for _, pair := range pairs {
		watches = append(watches, pair[1].watchAll(t, "k/"))
	}
	wanted := make([][]stored, 2)
	var all sync.WaitGroup
	for i, pair := range pairs {
		all.Go(func() {
			for n := range 50 {
				value := fmt.Sprint(i, "-", n)
				rev := pair[n%2].put(t, "k/x", value).Header.Revision
				wanted[i] = append(wanted[i], stored{revision: rev, version: int64(n) + 1, key: "k/x", value: value})
				if rev != int64(n)+2 {
					t.Errorf("write %d to store %d made revision %d, want %d", n, i, rev, n+2)
				}
			}
		})
	}
	all.Wait()
	for i, w := range watches {
		w.complete(wanted[i])
	}
}

// Keys and values are bytes: NUL, text that is not UTF-8, and as long as --max-request-bytes lets them be.
func TestKeysAndValuesAreBytes(t *testing.T) {
	t.Parallel()
	r := random(t)
	s := newStore(t, postgres.Options{})
	quires := beginAll(t, 2, s.url())
	w := quires[1].watchAll(t, "\x01")
	keys := []string{"\x01", "\x01\x00", "\x01\x00\x00", "\x01\x00\xff", "\x01\\x41", "\x01'\"\\", "\x01é", "\x01\xc3", "\x01\xfe\xff", "\x01" + string(bytes.Repeat([]byte{0}, 3000))}
	values := map[string][]byte{}
	var wanted []stored
	for i, key := range keys {
		values[key] = randomBytes(r, 100*i)
		if i == len(keys)-1 {
			values[key] = randomBytes(r, 1400<<10)
		}
		rev := quires[0].put(t, key, string(values[key])).Header.Revision
		wanted = append(wanted, stored{revision: rev, version: 1, key: key, value: string(values[key])})
	}
	w.complete(wanted)
	for i, q := range append(quires, begin(t, s.url())) {
		for key, value := range values {
			if got := q.get(t, key); got != string(value) {
				t.Errorf("quire %d: %q holds %d bytes, want the %d that were put", i, key, len(got), len(value))
			}
		}
	}
	answer, err := quires[1].kv.Range(within(t, patience), &pb.RangeRequest{Key: []byte("\x01"), RangeEnd: []byte("\x02"), KeysOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	if len(answer.Kvs) != len(keys) {
		t.Errorf("%d keys, want %d", len(answer.Kvs), len(keys))
	}
	for i := 1; i < len(answer.Kvs); i++ {
		if bytes.Compare(answer.Kvs[i-1].Key, answer.Kvs[i].Key) >= 0 {
			t.Errorf("key %q stands before %q", answer.Kvs[i-1].Key, answer.Kvs[i].Key)
		}
	}
}
