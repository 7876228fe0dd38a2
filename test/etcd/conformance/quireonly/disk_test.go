package quireonly

import (
	"context"
	"database/sql"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	_ "modernc.org/sqlite"

	"github.com/quire-db/quire/test/etcd/start"
	"github.com/quire-db/quire/test/ports"
)

// aboutFiles skips a test whose claim is about the database file or its directory where there is none.
func aboutFiles(t *testing.T) {
	t.Helper()
	if start.OnPostgres(t) {
		t.Skip("this is about the database file; with QUIRE_STORAGE=postgres there is none")
	}
}

// mustRefuse starts quire, which must say why it does not and what to do, and end with status 1.
func mustRefuse(t *testing.T, args []string, says ...string) {
	t.Helper()
	p := start.Run(t, nil, args...)
	code, err := p.Wait(20 * time.Second)
	if err != nil {
		t.Fatal(err)
	}
	output := p.Output()
	if code != 1 {
		t.Errorf("the exit status is %d, want 1", code)
	}
	for _, part := range says {
		if !strings.Contains(output, part) {
			t.Errorf("the output does not say %q:\n%s", part, output)
		}
	}
	if strings.Contains(output, "goroutine ") || strings.Contains(output, "panic:") {
		t.Errorf("quire panicked:\n%s", output)
	}
}

func serveArgs(t *testing.T, dir string) []string {
	a := ports.FreeAddress(t)
	return []string{"--data-dir=" + dir, "--listen-client-urls=http://" + a, "--advertise-client-urls=http://" + a}
}

func openDatabase(t *testing.T, dir string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(dir, "quire.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func check(t *testing.T, dir string) (code int, output string) {
	t.Helper()
	p := start.Run(t, nil, append([]string{"check", "--data-dir=" + dir}, start.StorageFlags(t, dir)...)...)
	code, err := p.Wait(60 * time.Second)
	if err != nil {
		t.Fatal(err)
	}
	return code, p.Output()
}

// filled is a data directory in which a quire has worked and ended.
func filled(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "data")
	s := start.QuireIn(t, dir, start.Options{})
	for i := range 500 {
		put(t, s, &pb.PutRequest{Key: fmt.Appendf(nil, "key/%04d", i), Value: []byte(strings.Repeat("v", 300))})
	}
	stop(t, s, syscall.SIGTERM)
	return dir
}

func TestADirectoryInUseIsRefused(t *testing.T) {
	aboutFiles(t)
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "data")
	s := start.QuireIn(t, dir, start.Options{})
	mustRefuse(t, serveArgs(t, dir), "in use", dir)
	put(t, s, &pb.PutRequest{Key: []byte("a")}) // the first goes on
}

func TestANewerSchemaIsRefused(t *testing.T) {
	aboutFiles(t)
	t.Parallel()
	dir := filled(t)
	db := openDatabase(t, dir)
	if _, err := db.Exec("INSERT INTO schema_version (version_id, is_applied) VALUES (9999, 1)"); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	mustRefuse(t, serveArgs(t, dir), "newer", "9999")
}

func TestADamagedFileIsNamedAndNotServed(t *testing.T) {
	aboutFiles(t)
	for name, damage := range map[string]func(t *testing.T, file *os.File, size int64){
		"no database at all": func(t *testing.T, f *os.File, size int64) {
			if err := f.Truncate(0); err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt([]byte(strings.Repeat("this is not a database\n", 1000)), 0); err != nil {
				t.Fatal(err)
			}
		},
		"the second half is gone": func(t *testing.T, f *os.File, size int64) {
			if err := f.Truncate(size / 2); err != nil {
				t.Fatal(err)
			}
		},
		"pages overwritten": func(t *testing.T, f *os.File, size int64) {
			garbage := []byte(strings.Repeat("\xa5\x5a", 4096))
			for at := size / 4; at < size; at += 16 << 10 {
				if _, err := f.WriteAt(garbage, at); err != nil {
					t.Fatal(err)
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filled(t)
			path := filepath.Join(dir, "quire.db")
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			info, err := f.Stat()
			if err != nil {
				t.Fatal(err)
			}
			damage(t, f, info.Size())
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			if code, output := check(t, dir); code != 1 {
				t.Errorf("quire check ends with %d on a damaged file:\n%s", code, output)
			}
			mustRefuse(t, serveArgs(t, dir), "damaged", path)
		})
	}
}

func TestCheckCallsASoundDatabaseSound(t *testing.T) {
	t.Parallel()
	dir := filled(t)
	code, output := check(t, dir)
	if code != 0 || !strings.Contains(output, "sound") || !strings.Contains(output, "500 keys") {
		t.Errorf("quire check ends with %d:\n%s", code, output)
	}
	if start.OnPostgres(t) {
		return
	}
	if code, output := check(t, t.TempDir()); code != 1 || !strings.Contains(output, "no database") {
		t.Errorf("quire check of an empty directory ends with %d:\n%s", code, output)
	}
}

// mount puts a small file system of its own at a new directory.
func mount(t *testing.T, size string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: a full or read-only disk is a file system mounted for this test")
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size="+size, "tmpfs", dir).CombinedOutput(); err != nil {
		t.Skipf("cannot mount a file system here: %v %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", "-l", dir).CombinedOutput(); err != nil {
			t.Errorf("umount %s: %v %s", dir, err, out)
		}
	})
	return dir
}

func remount(t *testing.T, dir, mode string) {
	t.Helper()
	if out, err := exec.Command("mount", "-o", "remount,"+mode, dir).CombinedOutput(); err != nil {
		t.Skipf("cannot remount a file system here: %v %s", err, out)
	}
}

// A full disk refuses writes and loses nothing; when there is room again, the same process writes again.
func TestAFullDiskIsSurvived(t *testing.T) {
	aboutFiles(t)
	t.Parallel()
	disk := mount(t, "16m")
	ballast := filepath.Join(disk, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(disk, "data")
	s := start.QuireIn(t, dir, start.Options{})
	acknowledged := make(map[string]int64)
	write := func(key string) error {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		r, err := s.KV.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(strings.Repeat("v", 20_000))})
		if err == nil {
			acknowledged[key] = r.Header.Revision
		}
		return err
	}
	var err error
	for i := 0; i < 2000 && err == nil; i++ {
		err = write(fmt.Sprintf("k%04d", i))
	}
	if err == nil {
		t.Fatal("40 MB fit on a disk of 8 MB")
	}
	if code := status.Code(err); code != codes.Unavailable && code != codes.ResourceExhausted {
		t.Errorf("on a full disk a write is answered by %v", err)
	}
	before := len(acknowledged)
	verify := func(when string) {
		t.Helper()
		for key, revision := range acknowledged {
			r := get(t, s, key)
			if len(r.Kvs) != 1 || r.Kvs[0].ModRevision != revision || len(r.Kvs[0].Value) != 20_000 {
				t.Fatalf("%s: %s, acknowledged at %d, reads %d keys", when, key, revision, r.Count)
			}
		}
	}
	verify("on the full disk")

	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(30 * time.Second)
	for i := 0; ; i++ {
		if err = write(fmt.Sprintf("later%d", i)); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("there has been room for 30s and writes are still refused: %v", err)
		}
		time.Sleep(100 * time.Millisecond) // a client's pace
	}
	if len(acknowledged) != before+1 {
		t.Errorf("%d writes were acknowledged, then %d", before, len(acknowledged))
	}
	verify("with room again")
	stop(t, s, syscall.SIGTERM)
	s = start.QuireIn(t, dir, start.Options{})
	verify("after a restart")
	stop(t, s, syscall.SIGTERM)
	if code, output := check(t, dir); code != 0 {
		t.Errorf("quire check ends with %d:\n%s", code, output)
	}
}

func TestADiskThatIsFullAtTheStartIsNamed(t *testing.T) {
	aboutFiles(t)
	t.Parallel()
	disk := mount(t, "1m")
	if err := os.WriteFile(filepath.Join(disk, "ballast"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	mustRefuse(t, serveArgs(t, filepath.Join(disk, "data")), disk, "full")
}

func TestAReadOnlyDiskIsRefusedAtTheStart(t *testing.T) {
	aboutFiles(t)
	t.Parallel()
	disk := mount(t, "16m")
	remount(t, disk, "ro")
	mustRefuse(t, serveArgs(t, filepath.Join(disk, "data")), disk, "read-only")
}

func TestADataDirectoryThatIsAFileIsRefused(t *testing.T) {
	aboutFiles(t)
	t.Parallel()
	path := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	mustRefuse(t, serveArgs(t, path), path)
}
