package quireonly

import (
	"context"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/test/etcd/start"
)

// The views are a public interface: people read them while quire runs.
func TestPeopleReadTheDataWithSQLWhileQuireRuns(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "data")
	s := start.QuireIn(t, dir, start.Options{})
	if _, err := s.Lease.LeaseGrant(context.Background(), &pb.LeaseGrantRequest{ID: 0x1f, TTL: 500}); err != nil {
		t.Fatal(err)
	}
	began := time.Now().UTC().Add(-time.Second)
	put(t, s, &pb.PutRequest{Key: []byte("a"), Value: []byte("one")})
	put(t, s, &pb.PutRequest{Key: []byte("a"), Value: []byte("three"), Lease: 0x1f})
	put(t, s, &pb.PutRequest{Key: []byte("b\x00"), Value: []byte{0xff}})
	put(t, s, &pb.PutRequest{Key: []byte("gone")})
	if _, err := s.KV.DeleteRange(context.Background(), &pb.DeleteRangeRequest{Key: []byte("gone")}); err != nil {
		t.Fatal(err)
	}
	// The same rows, each dialect's way to make them text.
	queries := map[string]string{
		"SELECT key||' '||revision||' '||create_revision||' '||version||' '||coalesce(lease,'-')||' '||size||' '||CAST(value AS TEXT) FROM kv WHERE key = 'a'": "a 3 2 2 000000000000001f 5 three",
		"SELECT key FROM kv ORDER BY revision":                                     "a|x'6200'",
		"SELECT revision||' '||sub||' '||op||' '||key FROM history":                "2 0 put a|3 0 put a|4 0 put x'6200'|5 0 put gone|6 0 delete gone",
		"SELECT CAST(value AS TEXT) FROM history WHERE key = 'a' AND revision < 3": "one",
		"SELECT id||' '||granted_ttl||' '||keys FROM leases":                       "000000000000001f 500 1",
	}
	dates := "SELECT at FROM history"
	if start.OnPostgres(t) {
		queries = map[string]string{
			"SELECT concat_ws(' ', key, revision, create_revision, version, coalesce(lease, '-'), size, convert_from(value, 'UTF8')) FROM kv WHERE key = 'a'": "a 3 2 2 000000000000001f 5 three",
			"SELECT key FROM kv ORDER BY revision":                                              `a|\x6200`,
			"SELECT concat_ws(' ', revision, sub, op, key) FROM history":                        `2 0 put a|3 0 put a|4 0 put \x6200|5 0 put gone|6 0 delete gone`,
			"SELECT convert_from(value, 'UTF8') FROM history WHERE key = 'a' AND revision < 3":  "one",
			"SELECT concat_ws(' ', id, granted_ttl, keys) FROM leases":                          "000000000000001f 500 1",
			"SELECT revision FROM history WHERE at > now() - interval '1 hour' AND author = ''": "2|3|4|5|6",
		}
		dates = "SELECT to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.MS') FROM history"
	}
	for query, want := range queries {
		if got := strings.Join(column(t, dir, query), "|"); got != want {
			t.Errorf("%s\n  gives %q, want %q", query, got, want)
		}
	}
	at := column(t, dir, dates)
	if len(at) != 5 {
		t.Errorf("%d changes have a date, want 5", len(at))
	}
	for _, text := range at {
		when, err := time.Parse("2006-01-02 15:04:05.000", text)
		if err != nil || when.Before(began) || when.After(time.Now().UTC().Add(time.Second)) {
			t.Errorf("a change is dated %q, %v", text, err)
		}
	}
}

// column returns the first column of what a person reads in the database that belongs to dir, while quire runs.
func column(t *testing.T, dir, query string) (got []string) {
	t.Helper()
	if start.OnPostgres(t) {
		return start.Query(t, dir, query)
	}
	r, err := openDatabase(t, dir).Query(query)
	if err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	defer r.Close()
	for r.Next() {
		var text string
		if err := r.Scan(&text); err != nil {
			t.Fatalf("%s: %v", query, err)
		}
		got = append(got, text)
	}
	if err := r.Err(); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return got
}
