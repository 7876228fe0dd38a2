package migrations

import (
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"io/fs"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	_ "modernc.org/sqlite"
)

func open(t *testing.T) (*sql.DB, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "quire.db")
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	db.SetMaxOpenConns(1)
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return db, path
}

func migrated(t *testing.T) (*sql.DB, string) {
	t.Helper()
	db, path := open(t)
	if err := Up(t.Context(), db, SQLite); err != nil {
		t.Fatal(err)
	}
	return db, path
}

func mustExec(t *testing.T, db *sql.DB, query string, args ...any) {
	t.Helper()
	if _, err := db.Exec(query, args...); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
}

// table reads a whole result with every column as text, NULL as "NULL".
func table(t *testing.T, db *sql.DB, query string) [][]string {
	t.Helper()
	rows, err := db.Query(query)
	if err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	defer rows.Close()
	names, err := rows.Columns()
	if err != nil {
		t.Fatal(err)
	}
	var all [][]string
	for rows.Next() {
		cells := make([]sql.NullString, len(names))
		into := make([]any, len(names))
		for i := range cells {
			into[i] = &cells[i]
		}
		if err := rows.Scan(into...); err != nil {
			t.Fatal(err)
		}
		line := make([]string, len(names))
		for i, c := range cells {
			line[i] = c.String
			if !c.Valid {
				line[i] = "NULL"
			}
		}
		all = append(all, line)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return all
}

func expect(t *testing.T, db *sql.DB, query string, want [][]string) {
	t.Helper()
	if got := table(t, db, query); !reflect.DeepEqual(got, want) {
		t.Errorf("%s\n got %q\nwant %q", query, got, want)
	}
}

type row struct {
	id, rev, sub, createRev, version, lease, deleted int64
	author                                           string
	key, value                                       []byte
}

// committedAt of row id is this plus id milliseconds.
var committedAt = time.Date(2026, 3, 4, 5, 6, 7, 89_999_000, time.UTC)

func insert(t *testing.T, db *sql.DB, rows ...row) {
	t.Helper()
	for _, r := range rows {
		if r.value == nil {
			r.value = []byte{}
		}
		mustExec(t, db, `INSERT INTO revisions (id, rev, sub, create_rev, version, lease, deleted, committed_at, author, key, value)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
			r.id, r.rev, r.sub, r.createRev, r.version, r.lease, r.deleted,
			committedAt.Add(time.Duration(r.id)*time.Millisecond).UnixMicro(), r.author, r.key, r.value)
	}
}

func TestUpBringsAnEmptyDatabaseToTheLatestVersionAndMayBeRepeated(t *testing.T) {
	db, _ := open(t)
	ctx := t.Context()
	if v, err := Version(ctx, db, SQLite); err != nil || v != 0 {
		t.Fatalf("version of an empty database: %d, %v; want 0", v, err)
	}
	if n := table(t, db, "SELECT count(*) FROM sqlite_master")[0][0]; n != "0" {
		t.Fatalf("asking for the version created %s objects", n)
	}
	for range 2 {
		if err := Up(ctx, db, SQLite); err != nil {
			t.Fatal(err)
		}
		if v, err := Version(ctx, db, SQLite); err != nil || v != Latest(SQLite) {
			t.Fatalf("version after Up: %d, %v; want %d", v, err, Latest(SQLite))
		}
	}
	expect(t, db, `SELECT type, name FROM sqlite_master WHERE name NOT LIKE 'sqlite%' ORDER BY type, name`, [][]string{
		{"table", "alarm"}, {"table", "auth_grant"}, {"table", "auth_permission"}, {"table", "auth_role"}, {"table", "auth_user"}, {"table", "lease"}, {"table", "member"}, {"table", "meta"}, {"table", "raft"},
		{"table", "revisions"}, {"table", "schema_version"},
		{"view", "history"}, {"view", "kv"}, {"view", "leases"}, {"view", "members"},
	})
}

func TestColumnNamesAreAPublicAPI(t *testing.T) {
	db, _ := migrated(t)
	for name, want := range map[string]string{
		"revisions": "id rev sub create_rev version lease deleted committed_at author key value",
		"lease":     "id ttl deadline",
		"alarm":     "member alarm",
		"meta":      "name value",
		"kv":        "key revision create_revision version lease size modified_at author value",
		"history":   "revision sub op key create_revision version lease size at author value",
		"leases":    "id granted_ttl deadline remaining keys",
		"raft":      "only applied term clock clock_term cluster",
		"member":    "id removed learner name peer_urls client_urls",
		"members":   "id name learner peer_urls client_urls",

		"auth_user":       "name password no_password",
		"auth_grant":      "user role",
		"auth_role":       "name",
		"auth_permission": "role place type key range_end",
	} {
		var got []string
		for _, line := range table(t, db, "SELECT name FROM pragma_table_info('"+name+"') ORDER BY cid") {
			got = append(got, line[0])
		}
		if strings.Join(got, " ") != want {
			t.Errorf("columns of %s: %v, want %s", name, got, want)
		}
	}
	if n := table(t, db, "SELECT count(*) FROM pragma_index_list('revisions')")[0][0]; n != "0" {
		t.Errorf("revisions has %s indexes; an index costs 4x the write throughput", n)
	}
}

func TestANewerSchemaIsRefusedAndLeftAlone(t *testing.T) {
	db, _ := migrated(t)
	newer := Latest(SQLite) + 3
	mustExec(t, db, "INSERT INTO schema_version (version_id, is_applied) VALUES (?, 1)", newer)
	before := table(t, db, "SELECT * FROM schema_version ORDER BY id")

	err := Up(t.Context(), db, SQLite)
	var refused *NewerSchemaError
	if !errors.As(err, &refused) {
		t.Fatalf("Up on a newer schema: %v", err)
	}
	if refused.Database != newer || refused.Latest != Latest(SQLite) {
		t.Errorf("error carries %+v", refused)
	}
	for _, want := range []string{"version 6", "up to 3", "start the newer quire or restore a backup"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not say %q", err, want)
		}
	}
	expect(t, db, "SELECT * FROM schema_version ORDER BY id", before)
}

func TestEveryFileSaysWhatItEnablesAndWhoCanOpenIt(t *testing.T) {
	names, err := fs.Glob(files, "*/*.sql")
	if err != nil || len(names) == 0 {
		t.Fatalf("embedded files: %v, %v", names, err)
	}
	for _, name := range names {
		text, err := fs.ReadFile(files, name)
		if err != nil {
			t.Fatal(err)
		}
		head, _, _ := strings.Cut(string(text), "-- +goose Up")
		if !strings.HasPrefix(head, "-- 0") || !strings.Contains(head, "enables") || !strings.Contains(head, "can open") {
			t.Errorf("%s does not begin with a comment on what it enables and who can open it", name)
		}
		if strings.Contains(string(text), "+goose Down") {
			t.Errorf("%s has a way down; a database is never taken back", name)
		}
	}
}

func TestAnUnknownDialectIsAnError(t *testing.T) {
	db, _ := open(t)
	if err := Up(t.Context(), db, Dialect{folder: "oracle"}); err == nil {
		t.Error("Up accepted dialect oracle")
	}
	if _, err := Version(t.Context(), db, Dialect{folder: "oracle"}); err == nil {
		t.Error("Version accepted dialect oracle")
	}
	if n := Latest(Dialect{folder: "oracle"}); n != 0 {
		t.Errorf("Latest(oracle) = %d", n)
	}
}

func TestUpStopsWithItsContext(t *testing.T) {
	db, _ := open(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Up(ctx, db, SQLite); !errors.Is(err, context.Canceled) {
		t.Errorf("Up with a cancelled context: %v", err)
	}
}

// story is one small history: a put, two keys in one revision, an update, a delete, a key that came back.
func story(t *testing.T, db *sql.DB) {
	t.Helper()
	insert(t, db,
		row{id: 1, rev: 2, createRev: 2, version: 1, key: []byte("/a"), value: []byte("one"), author: "ann"},
		row{id: 2, rev: 3, createRev: 3, version: 1, key: []byte("/b"), value: []byte("k8s\x00\xff"), lease: 0x1234},
		row{id: 3, rev: 3, sub: 1, createRev: 3, version: 1, key: []byte("/c"), lease: 0x1234},
		row{id: 4, rev: 4, createRev: 2, version: 2, key: []byte("/a"), value: []byte("two"), lease: 0x7fffffffffffffff},
		row{id: 5, rev: 5, deleted: 1, key: []byte("/c")},
		row{id: 6, rev: 6, deleted: 1, key: []byte("/b")},
		// ids 7 and 8: rows that compaction removed
		row{id: 9, rev: 8, createRev: 8, version: 1, key: []byte("/b"), value: []byte("again"), lease: 0x1234},
	)
}

func TestViewKVShowsWhatIsThereNow(t *testing.T) {
	db, _ := migrated(t)
	expect(t, db, "SELECT * FROM kv", nil)
	story(t, db)
	expect(t, db, "SELECT * FROM kv ORDER BY key", [][]string{
		{"/a", "4", "2", "2", "7fffffffffffffff", "3", "2026-03-04 05:06:07.093", "", "two"},
		{"/b", "8", "8", "1", "0000000000001234", "5", "2026-03-04 05:06:07.098", "", "again"},
	})
	expect(t, db, "SELECT typeof(key), typeof(value), typeof(size), typeof(lease) FROM kv WHERE key = '/a'", [][]string{
		{"text", "blob", "integer", "text"},
	})
	expect(t, db, "SELECT count(*), max(revision), sum(size) FROM kv", [][]string{{"2", "8", "8"}})
}

func TestViewHistoryShowsEveryRowInOrder(t *testing.T) {
	db, _ := migrated(t)
	story(t, db)
	expect(t, db, "SELECT * FROM history", [][]string{
		{"2", "0", "put", "/a", "2", "1", "NULL", "3", "2026-03-04 05:06:07.090", "ann", "one"},
		{"3", "0", "put", "/b", "3", "1", "0000000000001234", "5", "2026-03-04 05:06:07.091", "", "k8s\x00\xff"},
		{"3", "1", "put", "/c", "3", "1", "0000000000001234", "0", "2026-03-04 05:06:07.092", "", ""},
		{"4", "0", "put", "/a", "2", "2", "7fffffffffffffff", "3", "2026-03-04 05:06:07.093", "", "two"},
		{"5", "0", "delete", "/c", "0", "0", "NULL", "0", "2026-03-04 05:06:07.094", "", ""},
		{"6", "0", "delete", "/b", "0", "0", "NULL", "0", "2026-03-04 05:06:07.095", "", ""},
		{"8", "0", "put", "/b", "8", "1", "0000000000001234", "5", "2026-03-04 05:06:07.098", "", "again"},
	})
	expect(t, db, "SELECT op, count(*) FROM history WHERE key = '/b' GROUP BY op ORDER BY op", [][]string{{"delete", "1"}, {"put", "2"}})
}

func TestViewLeasesShowsDeadlinesAndAttachedKeys(t *testing.T) {
	db, _ := migrated(t)
	story(t, db)
	soon := time.Now().Add(90 * time.Second)
	mustExec(t, db, "INSERT INTO lease (id, ttl, deadline) VALUES (?, ?, ?)", 0x1234, 60, committedAt.UnixMicro())
	mustExec(t, db, "INSERT INTO lease (id, ttl, deadline) VALUES (?, ?, ?)", 0x99, 120, soon.UnixMicro())
	mustExec(t, db, "INSERT INTO lease (id, ttl, deadline) VALUES (?, ?, ?)", 0x7fffffffffffffff, 1, committedAt.Add(time.Second).UnixMicro())
	expect(t, db, "SELECT id, granted_ttl, deadline, keys FROM leases", [][]string{
		{"0000000000001234", "60", "2026-03-04 05:06:07.089", "1"},
		{"7fffffffffffffff", "1", "2026-03-04 05:06:08.089", "1"},
		{"0000000000000099", "120", soon.UTC().Truncate(time.Millisecond).Format("2006-01-02 15:04:05.000"), "0"},
	})
	// A minute of room for a slow machine.
	expect(t, db, "SELECT id, remaining BETWEEN 30 AND 90 FROM leases WHERE remaining > 0", [][]string{{"0000000000000099", "1"}})
}

// keys and how the views show them. Written once here, used with the built-in SQLite and with the shell's.
var shownKeys = []struct{ key, shown string }{
	{"/registry/pods/default/web-0", "/registry/pods/default/web-0"},
	{"a b~!'\"", "a b~!'\""},
	{"größe/日本/🙂", "größe/日本/🙂"},
	{"«»\u00a0", "«»\u00a0"},
	{"\ufffd", "\ufffd"},
	{strings.Repeat("k", 3000), strings.Repeat("k", 3000)},
	{"\x00", "x'00'"},
	{"a\x00b", "x'610062'"},
	{"a\nb", "x'610A62'"},
	{"\x7f", "x'7F'"},
	{"\u0085", "x'C285'"},
	{"\xff\xfe", "x'FFFE'"},
	{"ok\x80", "x'6F6B80'"},
	{"ok\xbb", "x'6F6BBB'"},             // a lone continuation byte is not »
	{"ok\xc3", "x'6F6BC3'"},             // cut short
	{"\xc3a", "x'C361'"},                // cut short, then text
	{"\xc0\xaf", "x'C0AF'"},             // overlong
	{"\xe0\x82\xa9", "x'E082A9'"},       // overlong
	{"\xed\xa0\x80", "x'EDA080'"},       // surrogate
	{"\xc3\xa9\xa9", "x'C3A9A9'"},       // one byte too many
	{"\xf4\x90\x80\x80", "x'F4908080'"}, // above U+10FFFF
	{"x'00'", "x'7827303027'"},          // would look like the key \x00
	{strings.Repeat("é", 513), "x'" + strings.Repeat("C3A9", 513) + "'"},
}

func insertShownKeys(t *testing.T, db *sql.DB) {
	t.Helper()
	for i, k := range shownKeys {
		id := int64(i + 1)
		insert(t, db, row{id: id, rev: id + 1, createRev: id + 1, version: 1, key: []byte(k.key), value: []byte("v")})
	}
}

func TestKeysAreShownAsTextOrElseAsABlobLiteral(t *testing.T) {
	db, _ := migrated(t)
	insertShownKeys(t, db)
	for _, view := range []string{"kv", "history"} {
		got := table(t, db, "SELECT key FROM "+view+" ORDER BY revision")
		if len(got) != len(shownKeys) {
			t.Fatalf("%s shows %d keys, want %d", view, len(got), len(shownKeys))
		}
		for i, k := range shownKeys {
			if got[i][0] != k.shown {
				t.Errorf("%s shows key %q as %q, want %q", view, k.key, got[i][0], k.shown)
			}
			if strings.HasPrefix(k.shown, "x'") {
				expect(t, db, "SELECT count(*) FROM revisions WHERE key = "+k.shown, [][]string{{"1"}})
			}
		}
	}
}

// People look into the file with the sqlite3 of their distribution, which is older than the built-in one, and with
// untrusted schemas where that is the default.
func TestViewsWorkInTheSQLiteShell(t *testing.T) {
	shell, err := exec.LookPath("sqlite3")
	if err != nil {
		t.Skip("the sqlite3 shell is not installed")
	}
	db, path := migrated(t)
	insertShownKeys(t, db)
	out, err := exec.Command(shell, "-readonly", path,
		"PRAGMA trusted_schema=OFF; SELECT hex(key) FROM kv ORDER BY revision; SELECT count(*) FROM history; SELECT count(*) FROM leases;").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	lines := strings.Fields(string(out))
	if len(lines) != len(shownKeys)+2 {
		t.Fatalf("the shell printed %d lines: %s", len(lines), out)
	}
	for i, k := range shownKeys {
		if want := strings.ToUpper(hex.EncodeToString([]byte(k.shown))); lines[i] != want {
			t.Errorf("the shell shows key %q as %s, want %s", k.key, lines[i], want)
		}
	}
}

func TestViewKVReadsTheTableWithoutAJoinPerKey(t *testing.T) {
	db, _ := migrated(t)
	var plan strings.Builder
	for _, line := range table(t, db, "EXPLAIN QUERY PLAN SELECT key, value FROM kv") {
		plan.WriteString(line[3] + "\n")
	}
	// One scan to find the newest row of each key, then look-ups by primary key.
	if strings.Count(plan.String(), "SCAN revisions") != 1 || !strings.Contains(plan.String(), "SEARCH r USING INTEGER PRIMARY KEY") {
		t.Errorf("plan of kv:\n%s", plan.String())
	}
	if strings.Contains(plan.String(), "AUTOMATIC") {
		t.Errorf("kv builds an index for each query:\n%s", plan.String())
	}
}
