package backend

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/quire-db/quire/migrations"
)

func testFile(t testing.TB, path string) *sqliteFile {
	t.Helper()
	f, err := openSQLiteFile(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// failedOpen opens what must not open and returns the error, which must name path's directory or file.
func failedOpen(t *testing.T, path string) error {
	t.Helper()
	f, err := openSQLiteFile(t.Context(), path)
	if err == nil {
		mustDo(t, f.close())
		t.Fatal("opened what must be refused")
	}
	if !strings.Contains(err.Error(), filepath.Base(filepath.Dir(path))) {
		t.Errorf("the error does not say where: %v", err)
	}
	return err
}

const insertRevision = `INSERT INTO revisions (rev, sub, create_rev, version, lease, deleted, committed_at, author, key, value)
	VALUES (?, 0, ?, 1, 0, 0, 1767225600000000, '', ?, ?)`

func insertRow(s *stmt, rev int64, key, value []byte) error {
	return errors.Join(s.bindInt64(1, rev), s.bindInt64(2, rev), s.bindBlob(3, key), s.bindBlob(4, value), s.run())
}

func TestANewFileIsDurableFromTheStart(t *testing.T) {
	directory := filepath.Join(t.TempDir(), "a", "b c?#%")
	path := filepath.Join(directory, "quire.db")
	f := testFile(t, path)
	// Golden: what was decided for durability and space. Read back on the connection that commits.
	for pragma, want := range map[string]string{
		"journal_mode": "wal", "synchronous": "2" /* FULL */, "wal_autocheckpoint": "500", "page_size": "8192",
		"auto_vacuum": "2" /* INCREMENTAL */, "locking_mode": "normal", "mmap_size": "0", "cell_size_check": "1",
		"trusted_schema": "0", "foreign_keys": "0", "temp_store": "2", "journal_size_limit": "67108864",
		"busy_timeout": "250", "application_id": fmt.Sprint(sqliteApplicationID),
	} {
		if got, err := f.writer.queryText("PRAGMA " + pragma); err != nil || got != want {
			t.Errorf("PRAGMA %s is %q, want %q (%v)", pragma, got, want, err)
		}
	}
	for name, want := range map[string]fs.FileMode{
		directory: 0o700, filepath.Dir(directory): 0o700, path: 0o600, path + "-wal": 0o600, path + "-shm": 0o600, path + ".lock": 0o600,
	} {
		if info, err := os.Stat(name); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: mode %v, want %v (%v)", name, info.Mode().Perm(), want, err)
		}
	}
	mustDo(t, f.close())
	if _, err := os.Stat(path + "-wal"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a clean close left a WAL: %v", err)
	}
}

func TestCommittedRowsAreThereAfterReopening(t *testing.T) {
	path := filepath.Join(t.TempDir(), "quire.db")
	for round := range int64(3) {
		f := testFile(t, path)
		if n, err := f.writer.queryInt64("SELECT count(*) FROM revisions"); err != nil || n != round {
			t.Fatalf("round %d: %d rows, %v", round, n, err)
		}
		mustDo(t, insertRow(mustPrepare(t, f.writer, insertRevision), round+2, []byte("key"), []byte("value")))
		mustDo(t, f.close())
	}
}

func TestReadersSeeCommitsAndCannotWrite(t *testing.T) {
	f := testFile(t, filepath.Join(t.TempDir(), "quire.db"))
	insert := mustPrepare(t, f.writer, insertRevision)
	mustDo(t, insertRow(insert, 2, []byte("k"), []byte("v")))
	a, err := f.acquireReader(t.Context())
	mustDo(t, err)
	b, err := f.acquireReader(t.Context())
	mustDo(t, err)
	if a == b {
		t.Fatal("one reader lent twice")
	}
	short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if c, err := f.acquireReader(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a third reader: %v, %v", c, err)
	}
	mustDo(t, insertRow(insert, 3, []byte("k"), []byte("v2")))
	for _, r := range []*conn{a, b} {
		if n, err := r.queryInt64("SELECT max(rev) FROM revisions"); err != nil || n != 3 {
			t.Errorf("reader sees revision %d, %v", n, err)
		}
		if err := r.exec("DELETE FROM revisions"); asSQLiteError(err) == nil || !asSQLiteError(err).readonly() {
			t.Errorf("reader deletes: %v", err)
		}
	}
	mustDo(t, f.releaseReader(a, true))
	c, err := f.acquireReader(t.Context())
	mustDo(t, err)
	if c != a {
		t.Error("an idle reader was not lent again")
	}
	mustDo(t, f.releaseReader(c, false))
	mustDo(t, f.releaseReader(b, true))
	mustDo(t, f.close())
	if _, err := f.acquireReader(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("a reader of a closed file: %v", err)
	}
}

func TestCloseWaitsForLentReaders(t *testing.T) {
	f := testFile(t, filepath.Join(t.TempDir(), "quire.db"))
	r, err := f.acquireReader(t.Context())
	mustDo(t, err)
	closed := make(chan error, 1)
	go func() { closed <- f.close() }()
	<-f.done
	select {
	case err := <-closed:
		t.Fatalf("closed under a reader: %v", err)
	case <-time.After(20 * time.Millisecond): // time to be wrong in
	}
	if n, err := r.queryInt64("SELECT count(*) FROM revisions"); err != nil || n != 0 {
		t.Errorf("the lent reader: %d, %v", n, err)
	}
	mustDo(t, f.releaseReader(r, true))
	mustDo(t, <-closed)
}

func TestPeopleMayReadTheLiveFile(t *testing.T) {
	shell, err := exec.LookPath("sqlite3")
	if err != nil {
		t.Skip("the sqlite3 shell is not installed")
	}
	f := testFile(t, filepath.Join(t.TempDir(), "quire.db"))
	insert := mustPrepare(t, f.writer, insertRevision)
	for rev := int64(2); rev < 5; rev++ {
		mustDo(t, insertRow(insert, rev, fmt.Appendf(nil, "/key/%d", rev), []byte("value")))
		out, err := exec.Command(shell, f.path, "SELECT key, revision, value FROM kv ORDER BY revision DESC LIMIT 1").CombinedOutput()
		if want := fmt.Sprintf("/key/%d|%d|value\n", rev, rev); err != nil || string(out) != want {
			t.Errorf("the shell says %q, want %q (%v)", out, want, err)
		}
	}
	if _, err := os.Stat(f.path + "-wal"); err != nil {
		t.Errorf("the shell took the WAL away: %v", err)
	}
	mustDo(t, f.close())
}

// TestHoldDatabase is not a test but the second process of one: it opens $QUIRE_TEST_HOLD and keeps it until its input
// ends. Without the variable it has nothing to do.
func TestHoldDatabase(t *testing.T) {
	path := os.Getenv("QUIRE_TEST_HOLD")
	if path == "" {
		return
	}
	f := testFile(t, path)
	mustDo(t, insertRow(mustPrepare(t, f.writer, insertRevision), 2, []byte("from"), []byte("the other process")))
	fmt.Println("holding")
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		t.Error(err)
	}
	mustDo(t, f.close())
}

func TestASecondProcessIsRefusedUntilTheFirstIsGone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "quire.db")
	other := exec.Command(os.Args[0], "-test.run=^TestHoldDatabase$")
	other.Env = append(os.Environ(), "QUIRE_TEST_HOLD="+path)
	other.Stderr = os.Stderr
	in, err := other.StdinPipe()
	mustDo(t, err)
	out, err := other.StdoutPipe()
	mustDo(t, err)
	mustDo(t, other.Start())
	defer in.Close()
	line := make([]byte, len("holding\n"))
	if _, err := io.ReadFull(out, line); err != nil || string(line) != "holding\n" {
		t.Fatalf("the other process says %q, %v", line, err)
	}

	link := filepath.Join(t.TempDir(), "link.db")
	mustDo(t, os.Symlink(path, link))
	for _, name := range []string{path, link} {
		_, err = openSQLiteFile(t.Context(), name)
		if !errors.Is(err, ErrInUse) {
			t.Fatalf("second open by %s: %v", name, err)
		}
		for _, want := range []string{path + ".lock", fmt.Sprintf("process %d", other.Process.Pid), "stop that quire"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q does not say %q", err, want)
			}
		}
	}

	// Not even SIGKILL leaves the lock behind, and what was committed is there.
	mustDo(t, other.Process.Kill())
	if err := other.Wait(); err == nil {
		t.Error("the other process survived SIGKILL")
	}
	f := testFile(t, path)
	if value, err := f.writer.queryText("SELECT value FROM kv WHERE key = 'from'"); err != nil || value != "the other process" {
		t.Errorf("after SIGKILL: %q, %v", value, err)
	}
	if err := failedOpen(t, path); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) {
		t.Errorf("second open in one process: %v", err)
	}
	mustDo(t, f.close())
	mustDo(t, testFile(t, path).close())
}

func TestALockFileWithoutAReadableHolderStillLocks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "quire.db")
	f := testFile(t, path)
	mustDo(t, os.Truncate(path+".lock", 0))
	if err := failedOpen(t, path); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "by another process") {
		t.Error(err)
	}
	mustDo(t, f.close())
}

func TestANewerSchemaIsRefusedUntouched(t *testing.T) {
	path := filepath.Join(t.TempDir(), "quire.db")
	mustDo(t, testFile(t, path).close())
	db, err := sql.Open("sqlite", path)
	mustDo(t, err)
	newer := migrations.Latest(migrations.SQLite) + 1
	if _, err := db.Exec("INSERT INTO schema_version (version_id, is_applied) VALUES (?, 1)", newer); err != nil {
		t.Fatal(err)
	}
	mustDo(t, db.Close())
	before, err := os.ReadFile(path)
	mustDo(t, err)

	err = failedOpen(t, path)
	if !errors.Is(err, ErrNewerSchema) || !strings.Contains(err.Error(), fmt.Sprintf("version %d", newer)) ||
		!strings.Contains(err.Error(), "start the newer quire or restore a backup") {
		t.Errorf("newer schema: %v", err)
	}
	after, err := os.ReadFile(path)
	mustDo(t, err)
	if !bytes.Equal(before, after) {
		t.Error("a refused file was changed")
	}
}

func TestDamagedFilesAreRefusedUntouched(t *testing.T) {
	make := func(t *testing.T) (string, []byte) {
		path := filepath.Join(t.TempDir(), "quire.db")
		f := testFile(t, path)
		insert := mustPrepare(t, f.writer, insertRevision)
		for rev := range int64(50) {
			mustDo(t, insertRow(insert, rev+2, []byte("k"), bytes.Repeat([]byte("v"), 5000)))
		}
		mustDo(t, f.close())
		content, err := os.ReadFile(path)
		mustDo(t, err)
		return path, content
	}
	for name, damage := range map[string]func(content []byte) []byte{
		"text":         func([]byte) []byte { return bytes.Repeat([]byte("this is no database\n"), 500) },
		"one byte":     func([]byte) []byte { return []byte("x") },
		"zeros":        func(c []byte) []byte { return bytes.Repeat([]byte{0}, len(c)) },
		"truncated":    func(c []byte) []byte { return c[:len(c)/2] },
		"header":       func(c []byte) []byte { c[3] ^= 0xff; return c },
		"schema page":  func(c []byte) []byte { copy(c[100:4000], bytes.Repeat([]byte{0xa5}, 4000)); return c },
		"garbage page": func(c []byte) []byte { copy(c[100:8192], bytes.Repeat([]byte{0xff}, 8192)); return c },
	} {
		t.Run(name, func(t *testing.T) {
			path, content := make(t)
			content = damage(content)
			mustDo(t, os.WriteFile(path, content, 0o600))
			err := failedOpen(t, path)
			if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "restore a backup") {
				t.Errorf("%v", err)
			}
			after, err := os.ReadFile(path)
			mustDo(t, err)
			if !bytes.Equal(content, after) {
				t.Error("the damaged file was changed")
			}
		})
	}
}

func TestADatabaseOfAnotherProgramIsLeftAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kine.db")
	c := testConn(t, path)
	mustDo(t, c.exec("CREATE TABLE kine (id INTEGER PRIMARY KEY)"))
	mustDo(t, c.close())
	before, err := os.ReadFile(path)
	mustDo(t, err)
	if err := failedOpen(t, path); !strings.Contains(err.Error(), "not one of quire") || errors.Is(err, ErrDamaged) {
		t.Error(err)
	}
	after, err := os.ReadFile(path)
	mustDo(t, err)
	if !bytes.Equal(before, after) {
		t.Error("it was changed")
	}
}

func TestAFileLockedByAnotherProgramIsInUse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "quire.db")
	mustDo(t, testFile(t, path).close())
	c := testConn(t, path)
	mustDo(t, c.exec("PRAGMA locking_mode=EXCLUSIVE; BEGIN IMMEDIATE; CREATE TABLE x (y)"))
	err := explainOpenError(path, prepareFile(path))
	if !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "sqlite3 shell") {
		t.Errorf("%v", err)
	}
	mustDo(t, c.exec("ROLLBACK"))
}

func TestWrongPathsAreRefused(t *testing.T) {
	directory := t.TempDir()
	if err := failedOpen(t, filepath.Join(directory, "sub")+"/../."); !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a directory as file: %v", err)
	}
	mustDo(t, os.WriteFile(filepath.Join(directory, "file"), nil, 0o600))
	if err := failedOpen(t, filepath.Join(directory, "file", "quire.db")); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("a file as directory: %v", err)
	}
	mustDo(t, os.Symlink(filepath.Join(directory, "nowhere"), filepath.Join(directory, "dangling")))
	if err := failedOpen(t, filepath.Join(directory, "dangling")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a dangling link: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := openSQLiteFile(ctx, filepath.Join(directory, "cancelled.db")); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled start: %v", err)
	}
	mustDo(t, testFile(t, filepath.Join(directory, "cancelled.db")).close()) // and it left nothing that stands in the way
}

// TestOpenUnprivileged is not a test but the second process of one: root may write anywhere, so it gives up root and
// prints the error of opening $QUIRE_TEST_UNPRIVILEGED. Without the variable it has nothing to do.
func TestOpenUnprivileged(t *testing.T) {
	path := os.Getenv("QUIRE_TEST_UNPRIVILEGED")
	if path == "" {
		return
	}
	if os.Getuid() == 0 {
		mustDo(t, syscall.Setgid(65534))
		mustDo(t, syscall.Setuid(65534))
	}
	_, err := openSQLiteFile(t.Context(), path)
	fmt.Printf("permission=%v %v\n", errors.Is(err, fs.ErrPermission), err)
}

func TestReadOnlyPlacesAreNamed(t *testing.T) {
	directory, err := os.MkdirTemp("", "quire-readonly") // not t.TempDir: its parents are closed to other users
	mustDo(t, err)
	defer os.RemoveAll(directory)
	path := filepath.Join(directory, "quire.db")
	mustDo(t, testFile(t, path).close())
	open := func() string {
		other := exec.Command(os.Args[0], "-test.run=^TestOpenUnprivileged$")
		other.Env = append(os.Environ(), "QUIRE_TEST_UNPRIVILEGED="+path)
		out, err := other.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}

	mustDo(t, os.Chmod(directory, 0o555))
	mustDo(t, os.Chmod(path+".lock", 0o444))
	if out := open(); !strings.Contains(out, "permission=true") || !strings.Contains(out, directory) || !strings.Contains(out, "may not write there") {
		t.Errorf("read-only directory: %s", out)
	}
	mustDo(t, os.Chmod(directory, 0o777))
	mustDo(t, os.Chmod(path+".lock", 0o666))
	mustDo(t, os.Chmod(path, 0o444))
	if out := open(); !strings.Contains(out, "permission=true") || !strings.Contains(out, path) || !strings.Contains(out, "cannot be written") {
		t.Errorf("read-only file: %s", out)
	}
}

func TestFailuresOfTheOpenFileAreExplained(t *testing.T) {
	path := filepath.Join(t.TempDir(), "quire.db")
	f := testFile(t, path)
	mustDo(t, f.writer.exec("PRAGMA max_page_count = 20"))
	insert := mustPrepare(t, f.writer, insertRevision)
	var err error
	for rev := int64(2); err == nil && rev < 100; rev++ {
		err = insertRow(insert, rev, []byte("secret-key"), bytes.Repeat([]byte("secret-value"), 2000))
	}
	full := explainSQLiteError(f.path, err)
	if !errors.Is(full, ErrDiskFull) || !strings.Contains(full.Error(), "free space") || strings.Contains(full.Error(), "secret") {
		t.Errorf("full disk: %v", full)
	}
	mustDo(t, f.writer.exec("PRAGMA max_page_count = 1000000"))
	mustDo(t, insertRow(insert, 100, []byte("k"), make([]byte, 50_000))) // it goes on
	mustDo(t, f.close())

	for _, c := range []struct {
		code int
		want error
	}{{10, ErrStorage}, {5, ErrStorage}, {8, ErrStorage}, {11, ErrDamaged}, {26, ErrDamaged}, {13, ErrDiskFull}, {7, ErrStorage}} {
		cause := &sqliteError{Code: c.code, Extended: c.code, Msg: "m", Op: "step"}
		if err := explainSQLiteError(path, fmt.Errorf("commit: %w", cause)); !errors.Is(err, c.want) || !errors.Is(err, cause) || !strings.Contains(err.Error(), path) {
			t.Errorf("code %d: %v", c.code, err)
		}
	}
	if err := explainSQLiteError(path, context.Canceled); !errors.Is(err, context.Canceled) || errors.Is(err, ErrStorage) {
		t.Errorf("an error that is not SQLite's: %v", err)
	}
}

// BenchmarkInsert: rows of 1 KiB, one durable commit for each so many.
func BenchmarkInsert(b *testing.B) {
	for _, batch := range []int{1, 64, 256} {
		b.Run(fmt.Sprintf("rows=%d", batch), func(b *testing.B) {
			f := testFile(b, filepath.Join(b.TempDir(), "quire.db"))
			insert := mustPrepare(b, f.writer, insertRevision)
			begin, commit := mustPrepare(b, f.writer, "BEGIN IMMEDIATE"), mustPrepare(b, f.writer, "COMMIT")
			key, value := []byte("/registry/pods/default/some-pod-with-a-name-of-its-own-00"), make([]byte, 1024)
			rev, since := int64(1), int64(0)
			for b.Loop() {
				mustDo(b, begin.run())
				for range batch {
					rev++
					if err := insertRow(insert, rev, key, value); err != nil {
						b.Fatal(err)
					}
				}
				mustDo(b, commit.run())
				if since += int64(batch); since > 3500 { // about 500 pages
					since = 0
					if _, _, err := f.writer.walCheckpoint(checkpointPassive); err != nil {
						b.Fatal(err)
					}
				}
			}
			b.ReportMetric(float64(b.N*batch)/b.Elapsed().Seconds(), "rows/s")
			mustDo(b, f.close())
		})
	}
}

// BenchmarkScan: reading the narrow columns of every row, as opening a database does.
func BenchmarkScan(b *testing.B) {
	f := testFile(b, filepath.Join(b.TempDir(), "quire.db"))
	insert := mustPrepare(b, f.writer, insertRevision)
	const rows = 100_000
	mustDo(b, f.writer.exec("BEGIN"))
	for rev := range int64(rows) {
		mustDo(b, insertRow(insert, rev+2, fmt.Appendf(nil, "/registry/pods/default/some-pod-with-a-name-%014d", rev), make([]byte, 100)))
	}
	mustDo(b, f.writer.exec("COMMIT"))
	scan := mustPrepare(b, f.writer, "SELECT id, rev, sub, create_rev, version, lease, deleted, key FROM revisions ORDER BY id")
	for b.Loop() {
		n, bytes := 0, 0
		for {
			row, err := scan.step()
			mustDo(b, err)
			if !row {
				break
			}
			for i := range 7 {
				n += int(scan.columnInt64(i) & 1)
			}
			bytes += len(scan.columnBlob(7))
		}
		mustDo(b, scan.reset())
		if bytes != rows*58 && n == 0 {
			b.Fatal("wrong result", n, bytes)
		}
	}
	b.ReportMetric(float64(b.N*rows)/b.Elapsed().Seconds(), "rows/s")
	mustDo(b, f.close())
}
