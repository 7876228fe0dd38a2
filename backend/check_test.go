package backend

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// Revisions of the database that TestCheckFindsDamage damages.
const (
	checkedPut     = 6 // the third version of "…/a"
	checkedDelete  = 8 // of "…/b"
	checkedCompact = 4
)

// checkedDatabase makes a database with something of everything.
func checkedDatabase(t *testing.T) (path string) {
	t.Helper()
	path = testPath(t)
	db, err := OpenSQLite(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	key := func(s string) []byte { return []byte("/secret/key/" + s) }
	put := func(name string, lease int64, want int64) {
		resp := mustWrite(t, db, &pb.PutRequest{Key: key(name), Value: []byte("secret value"), Lease: lease}).(*pb.PutResponse)
		if resp.Header.Revision != want {
			t.Fatalf("revision %d, want %d", resp.Header.Revision, want)
		}
	}
	mustWrite(t, db, &pb.LeaseGrantRequest{ID: 7, TTL: 1 << 30})
	put("a", 0, 2)
	put("b", 0, 3)
	put("a", 0, checkedCompact)
	put("c", 7, 5)
	put("a", 0, checkedPut)
	put("d", 0, 7)
	mustWrite(t, db, &pb.DeleteRangeRequest{Key: key("b")})
	mustWrite(t, db, &pb.TxnRequest{Success: []*pb.RequestOp{ // 9
		{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: key("x")}}},
		{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: key("y")}}},
	}})
	put("e", 0, 10)
	mustWrite(t, db, &pb.CompactionRequest{Revision: checkedCompact})
	settled(t, db)
	closeAndCheck(t, db, path)
	return path
}

// edit damages a database that nobody has open.
func edit(t *testing.T, path, sql string) {
	t.Helper()
	c, err := openConn(path, false)
	if err != nil {
		t.Fatal(err)
	}
	mustDo(t, c.exec(sql))
	mustDo(t, c.close())
}

// TestCheckFindsDamage: every kind of damage is named, without the keys and values that it struck.
func TestCheckFindsDamage(t *testing.T) {
	const copyRow = `INSERT INTO revisions (rev, sub, create_rev, version, lease, deleted, committed_at, author, key, value)
		SELECT 11, 0, create_rev, version, lease, deleted, (SELECT max(committed_at) FROM revisions), author, key, value FROM revisions `
	for _, c := range []struct {
		name, sql string
		want      string // in one of the problems
	}{
		{"a revision is missing", fmt.Sprintf("DELETE FROM revisions WHERE rev = %d", checkedDelete), "revisions 8 to 8 are missing"},
		{"a row of a revision is missing", "DELETE FROM revisions WHERE rev = 9 AND sub = 0", "9.1 where 9.0 was expected"},
		{"the sub is wrong", "UPDATE revisions SET sub = 3 WHERE rev = 9 AND sub = 1", "9.3 where 9.1 was expected"},
		{"a sub starts late", "UPDATE revisions SET sub = 1 WHERE rev = 7", "7.1 where 7.0 was expected"},
		{"the version is skipped", "UPDATE revisions SET version = version + 1 WHERE rev = 6", "has version 4"},
		{"the version does not grow", "UPDATE revisions SET version = 2 WHERE rev = 6", "after version 2"},
		{"the creation moves", "UPDATE revisions SET create_rev = 3 WHERE rev = 6", "created 3, after version 2, created 2"},
		{"the creation lies ahead", "UPDATE revisions SET create_rev = 99 WHERE rev = 6", "create revision 99"},
		{"a first version is old", "UPDATE revisions SET create_rev = 5 WHERE rev = 7", "a first version, but created at 5"},
		{"a version without those before", "UPDATE revisions SET version = 2, create_rev = 5 WHERE rev = 7", "nothing of its key is left"},
		{"no version", "UPDATE revisions SET version = 0 WHERE rev = 7", "has version 0"},
		{"deleted twice", copyRow + "WHERE rev = 8", "deletes a key that does not exist"},
		{"written on after a delete", "UPDATE revisions SET key = (SELECT key FROM revisions WHERE rev = 8), version = 2, create_rev = 3 WHERE rev = 10", "version 2 after a delete"},
		{"a tombstone with a value", "UPDATE revisions SET value = x'00' WHERE rev = 8", "a tombstone with"},
		{"a tombstone with a version", "UPDATE revisions SET version = 1 WHERE rev = 8", "a tombstone with"},
		{"the lease is missing", "DELETE FROM lease", "lease 0000000000000007, which does not exist"},
		{"a lease of no seconds", "UPDATE lease SET ttl = 0", "was granted 0 seconds"},
		{"two rows are swapped", "UPDATE revisions SET rev = 13 - rev WHERE rev IN (6, 7)", "follows"},
		{"two rows change ids", "UPDATE revisions SET id = -id WHERE rev IN (6, 7); UPDATE revisions SET id = (SELECT -sum(id) FROM revisions WHERE id < 0) + id WHERE id < 0", "follows"},
		{"two keys are swapped", `CREATE TEMP TABLE s AS SELECT key FROM revisions WHERE rev = 7;
			UPDATE revisions SET key = (SELECT key FROM revisions WHERE rev = 6) WHERE rev = 7;
			UPDATE revisions SET key = (SELECT key FROM s) WHERE rev = 6`, "has version"},
		{"time runs backwards", "UPDATE revisions SET committed_at = 1 WHERE rev = 7", "was committed before"},
		{"compacted ahead", "UPDATE meta SET value = 99 WHERE name = 'compact_revision'", "compacted at revision 99"},
		{"a clock of a term to come", "INSERT INTO raft VALUES (1, 7, 2, 1000, 3, 9)", "its clock is of term 3"},
		{"a member without URLs", "INSERT INTO member VALUES (-1, 0, 0, 'n', 'http://a', '[]')", "the peer URLs of member ffffffffffffffff"},
		{"the compaction is forgotten", "DELETE FROM meta WHERE name = 'compact_revision'", "are missing"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := checkedDatabase(t)
			edit(t, path, c.sql)
			report, err := CheckSQLite(t.Context(), path, nil)
			all := strings.Join(report.Problems, "\n")
			if err != nil || !strings.Contains(all, c.want) {
				t.Errorf("problems (%v):\n%s\nwant one with %q", err, all, c.want)
			}
			mustBeDiscreet(t, all)
		})
	}
}

func mustBeDiscreet(t *testing.T, text string) {
	t.Helper()
	if strings.Contains(text, "secret") || strings.Contains(strings.ToLower(text), "736563726574") {
		t.Errorf("a key or value is printed: %s", text)
	}
}

// TestCheckFindsDamagedPages: what SQLite itself can tell. Whether the file opens at all depends on where it was hit.
func TestCheckFindsDamagedPages(t *testing.T) {
	const page = 8192
	for _, c := range []struct {
		name   string
		damage func(b []byte) []byte
	}{
		{"the last page is cut off", func(b []byte) []byte { return b[:len(b)-page] }},
		{"half a page is cut off", func(b []byte) []byte { return b[:len(b)-page/2] }},
		{"all but the first page is cut off", func(b []byte) []byte { return b[:page] }},
		{"the header of the rows' page is overwritten", func(b []byte) []byte { copy(b[tableRoot(b):], "garbage!"); return b }},
		{"a cell pointer is flipped", func(b []byte) []byte { b[tableRoot(b)+8] ^= 0xff; return b }},
		{"the magic is gone", func(b []byte) []byte { copy(b, "garbage"); return b }},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := checkedDatabase(t)
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, c.damage(b), 0o600); err != nil {
				t.Fatal(err)
			}
			report, err := CheckSQLite(t.Context(), path, nil)
			all := strings.Join(report.Problems, "\n")
			switch {
			case err == nil && len(report.Problems) == 0:
				t.Error("nothing was found")
			case err == nil || errors.Is(err, ErrDamaged):
			default:
				if e := asSQLiteError(err); e == nil || !e.corrupt() {
					t.Errorf("got %v, want damage", err)
				}
			}
			mustBeDiscreet(t, fmt.Sprint(all, err))
		})
	}
}

// tableRoot finds the page of the rows in a small database: the leaf (type 13) that holds a key.
func tableRoot(b []byte) int {
	for at := 8192; at < len(b); at += 8192 {
		if b[at] == 13 && strings.Contains(string(b[at:at+8192]), "/secret/key/a") {
			return at
		}
	}
	panic("no page holds the rows")
}

// TestOpenRefusesGaps: a database from which revisions are missing is not served.
func TestOpenRefusesGaps(t *testing.T) {
	path := checkedDatabase(t)
	edit(t, path, "DELETE FROM revisions WHERE rev = 7")
	if _, err := OpenSQLite(t.Context(), path, Options{}); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "revisions 7 to 7 are missing") {
		t.Errorf("got %v", err)
	}
}
