package sqlraft

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quire-db/quire/backend"
)

// snapshotPair is a member that has a copy of some megabytes, and one that wants it, with a proxy between.
func snapshotPair(t *testing.T, size int) (from, to *testMember, p *proxy, content []byte, sum [32]byte) {
	t.Helper()
	r := seeded(t)
	from, to = newTestMember(t, 1, "127.0.0.1:0", nil), newTestMember(t, 2, "127.0.0.1:0", nil)
	p = listenProxy(t, from)
	to.know(backend.Membership{ClusterID: testCluster, Members: []backend.Member{{ID: 1, PeerURLs: []string{p.url}}, {ID: 2, PeerURLs: []string{to.url}}}})
	content = make([]byte, size)
	for i := 0; i+8 <= size; i += 8 {
		binary.LittleEndian.PutUint64(content[i:], r.Uint64())
	}
	sum = sha256.Sum256(content)
	from.mu.snapshots["copy 1/2?"] = content
	return from, to, p, content, sum
}

func checkFetched(t *testing.T, path string, content []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, content) {
		t.Error("the copy is not what was sent")
	}
	if names := folder(t, filepath.Dir(path)); !slices.Equal(names, []string{filepath.Base(path)}) {
		t.Errorf("the folder holds %v", names)
	}
}

func folder(t *testing.T, path string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestSnapshotsAreFetched(t *testing.T) {
	for _, size := range []int{0, 1, snapshotPortion, 5<<20 + 17} {
		_, to, _, content, sum := snapshotPair(t, size)
		path := filepath.Join(t.TempDir(), "copy[1]*.db")
		var last atomic.Int64
		err := to.fetchSnapshot(t.Context(), 1, "copy 1/2?", int64(size), sum, path, func(done, total int64) {
			if done < last.Load() || total != int64(size) {
				t.Errorf("progress went from %d to %d of %d", last.Load(), done, total)
			}
			last.Store(done)
		})
		if err != nil {
			t.Fatal(err)
		}
		if last.Load() != int64(size) {
			t.Errorf("the last progress was %d of %d", last.Load(), size)
		}
		checkFetched(t, path, content)
	}
}

func TestSnapshotsSurviveCuts(t *testing.T) {
	from, to, p, content, sum := snapshotPair(t, 8<<20)
	path := filepath.Join(t.TempDir(), "copy.db")
	var served atomic.Int64
	from.mu.Lock()
	from.mu.readSnap = func(int64) { served.Add(32 << 10) } // io.Copy's portion
	from.mu.Unlock()
	cuts := int64(0)
	err := to.fetchSnapshot(t.Context(), 1, "copy 1/2?", int64(len(content)), sum, path, func(done, _ int64) {
		if done/(1<<20) > cuts {
			cuts++
			p.cut()
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	checkFetched(t, path, content)
	if cuts < 8 {
		t.Errorf("the connection was cut %d times", cuts)
	}
	// What the system's buffers held was read in vain; beginning anew each time would be more than four times all.
	if n := served.Load(); n > 4*8<<20 {
		t.Errorf("%d bytes were read for a copy of %d: it was not resumed", n, 8<<20)
	}
}

// TestSnapshotsGoOnAfterARestart: of the one that fetches, in the middle.
func TestSnapshotsGoOnAfterARestart(t *testing.T) {
	from, to, p, content, sum := snapshotPair(t, 8<<20)
	dir := t.TempDir()
	path := filepath.Join(dir, "copy.db")
	if err := os.WriteFile(path+".0123456789abcdef.part", []byte("of another copy"), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	err := to.fetchSnapshot(ctx, 1, "copy 1/2?", int64(len(content)), sum, path, func(done, _ int64) {
		if done > 3<<20 {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("half a copy bears the name of the whole: %v", err)
	}
	if names := folder(t, dir); len(names) != 1 {
		t.Fatalf("the folder holds %v", names)
	}
	if err := to.close(); err != nil {
		t.Fatal(err)
	}
	again := newTestMember(t, 2, "127.0.0.1:0", nil)
	again.setPeers([]backend.Member{{ID: 1, PeerURLs: []string{p.url}}})
	first := int64(-1)
	from.mu.Lock()
	from.mu.readSnap = func(offset int64) {
		if first < 0 {
			first = offset
		}
	}
	from.mu.Unlock()
	if err := again.fetchSnapshot(t.Context(), 1, "copy 1/2?", int64(len(content)), sum, path, nil); err != nil {
		t.Fatal(err)
	}
	if first < 3<<20 {
		t.Errorf("the fetch began again at %d", first)
	}
	checkFetched(t, path, content)
}

// TestADamagedPartIsFetchedAgain: a power cut may leave anything of what was not synced.
func TestADamagedPartIsFetchedAgain(t *testing.T) {
	_, to, _, content, sum := snapshotPair(t, 2<<20)
	path := filepath.Join(t.TempDir(), "copy.db")
	for name, part := range map[string][]byte{
		"zeros": make([]byte, 1<<20), "longer": make([]byte, 3<<20), "whole": content, "whole and damaged": append(bytes.Clone(content[1:]), 7),
	} {
		if err := os.WriteFile((&fetch{path: path}).partOf(sum), part, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := to.fetchSnapshot(t.Context(), 1, "copy 1/2?", int64(len(content)), sum, path, nil); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		checkFetched(t, path, content)
	}
}

func TestWrongSnapshotsAreNotTaken(t *testing.T) {
	from, to, _, content, sum := snapshotPair(t, 2<<20)
	dir := t.TempDir()
	path := filepath.Join(dir, "copy.db")
	bad := bytes.Clone(content)
	bad[1<<20]++
	from.mu.Lock()
	from.mu.snapshots["bad"], from.mu.snapshots["short"] = bad, content[1:]
	from.mu.Unlock()
	for name, want := range map[string]error{"bad": errSnapshotWrong, "short": errSnapshotWrong, "none": errSnapshotGone} {
		err := to.fetchSnapshot(t.Context(), 1, name, int64(len(content)), sum, path, nil)
		if !errors.Is(err, want) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: there is a copy: %v", name, err)
		}
	}
	if err := to.fetchSnapshot(t.Context(), 1, "copy 1/2?", int64(len(content)), sum, path, nil); err != nil {
		t.Fatalf("the right copy after the wrong ones: %v", err)
	}
	checkFetched(t, path, content)
	if err := to.fetchSnapshot(t.Context(), 9, "copy 1/2?", 1, sum, path, nil); err == nil {
		t.Error("a member that is not known has served a copy")
	}
	if err := to.fetchSnapshot(t.Context(), 1, "copy 1/2?", 1, sum, filepath.Join(dir, "no", "folder"), nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a folder that is not there: %v", err)
	}
}

// TestSnapshotsOfDeadMembersEnd: the fetch gives up by itself.
func TestSnapshotsOfDeadMembersEnd(t *testing.T) {
	_, to, p, content, sum := snapshotPair(t, 2<<20)
	p.set(func() { p.mu.refuse = true })
	path := filepath.Join(t.TempDir(), "copy.db")
	began := time.Now()
	err := to.fetchSnapshot(t.Context(), 1, "copy 1/2?", int64(len(content)), sum, path, nil)
	if err == nil {
		t.Fatal("fetched from a member that lets nobody in")
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it took %v to find out", took)
	}
	// Something vain now and then ends nothing: what counts is that something comes.
	p.set(func() { p.mu.refuse = false })
	if err := to.fetchSnapshot(t.Context(), 1, "copy 1/2?", int64(len(content)), sum, path, nil); err != nil {
		t.Fatal(err)
	}
	checkFetched(t, path, content)
}

func TestASnapshotThatStallsIsResumed(t *testing.T) {
	_, to, p, content, sum := snapshotPair(t, 4<<20)
	path := filepath.Join(t.TempDir(), "copy.db")
	p.set(func() { p.mu.rate = 8 << 20 }) // else all of it is in the system's buffers before the first byte is read
	holes, began := 0, time.Now()
	err := to.fetchSnapshot(t.Context(), 1, "copy 1/2?", int64(len(content)), sum, path, func(done, _ int64) {
		if done > 1<<20 && holes == 0 {
			holes++
			p.set(func() { p.mu.hole = true })
			time.AfterFunc(1500*time.Millisecond, func() { p.set(func() { p.mu.hole = false }) })
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took < time.Second || took > 10*time.Second {
		t.Errorf("it took %v, with a stall of 1.5 s", took)
	}
	checkFetched(t, path, content)
}

// TestAServerWithoutRanges begins anew each time.
func TestAServerWithoutRanges(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789abcdef"), 64<<10)
	sum := sha256.Sum256(content)
	var asked atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == streamPath {
			http.Error(w, "no", http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", "1048576")
		if asked.Add(1) == 1 {
			_, _ = w.Write(content[:300<<10])
			panic(http.ErrAbortHandler)
		}
		_, _ = io.Copy(w, bytes.NewReader(content))
	}))
	defer server.Close()
	to := newTestMember(t, 2, "127.0.0.1:0", nil)
	to.setPeers([]backend.Member{{ID: 1, PeerURLs: []string{server.URL}}})
	path := filepath.Join(t.TempDir(), "copy.db")
	if err := to.fetchSnapshot(t.Context(), 1, "x", int64(len(content)), sum, path, nil); err != nil {
		t.Fatal(err)
	}
	checkFetched(t, path, content)
}

// TestManyFetchOneSnapshot while streams go on beside.
func TestManyFetchOneSnapshot(t *testing.T) {
	from, to, p, content, sum := snapshotPair(t, 8<<20)
	introduceVia(from, to, p)
	connectedToEachOther(t, from, to)
	dir := t.TempDir()
	errs := make(chan error, 4)
	for i := range cap(errs) {
		go func() {
			path := filepath.Join(dir, string(rune('a'+i)), "copy.db")
			err := os.Mkdir(filepath.Dir(path), 0o700)
			if err == nil {
				err = to.fetchSnapshot(context.Background(), 1, "copy 1/2?", int64(len(content)), sum, path, nil)
			}
			errs <- err
		}()
	}
	for range cap(errs) {
		from.sendUntilThere(to)
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	for i := range cap(errs) {
		checkFetched(t, filepath.Join(dir, string(rune('a'+i)), "copy.db"), content)
	}
}

// introduceVia makes two members know each other; the first is dialled through a proxy.
func introduceVia(a, b *testMember, p *proxy) {
	ms := backend.Membership{ClusterID: testCluster, Members: []backend.Member{{ID: a.id, PeerURLs: []string{p.url}}, {ID: b.id, PeerURLs: []string{b.url}}}}
	a.know(ms)
	b.know(ms)
}
