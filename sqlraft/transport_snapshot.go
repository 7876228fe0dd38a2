package sqlraft

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Copies of the state are fetched by whoever needs one:
//
//	GET /raft/snapshot/<name>    with Range, as any file; X-Etcd-Cluster-ID, X-Server-From and X-Raft-To as for streams
//
// What has arrived lies in "<path>.<first 8 bytes of the SHA-256>.part" until the whole is there, so that no fetch
// goes on with a part of another copy. A part that was damaged by a power cut shows in the checksum.
const (
	snapshotPath    = "/raft/snapshot/"
	snapshotPortion = 256 << 10
	// snapshotSync: so many bytes are synced at a time. More at once would hold up the raft log, which shares the disk.
	snapshotSync = 32 << 20
	// snapshotTries in a row that bring nothing end a fetch.
	snapshotTries = 8
)

// errSnapshotGone: the member does not have that copy any more. It will offer another one.
var errSnapshotGone = errors.New("sqlraft: the copy of the state is not there any more")

// errSnapshotWrong: the copy, fetched twice, is not what its message has announced.
var errSnapshotWrong = errors.New("sqlraft: the copy of the state is not what was announced")

func (t *transport) serveSnapshot(w http.ResponseWriter, r *http.Request, to uint64) {
	name := strings.TrimPrefix(r.URL.Path, snapshotPath)
	content, size, release, err := t.o.handler.openSnapshot(name)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	defer release()
	w.Header().Set("Etag", snapshotTag(name))
	w.Header().Set("Content-Type", "application/octet-stream")
	start := time.Now()
	t.o.hooks.serving(to)
	timed := &timedResponse{ResponseWriter: w, control: http.NewResponseController(w)}
	http.ServeContent(timed, r, "", time.Time{}, io.NewSectionReader(content, 0, size))
	t.o.hooks.served(to, time.Since(start), timed.failed)
}

// snapshotTag is the ETag of a copy: there is only one content for a name.
func snapshotTag(name string) string { return `"` + url.PathEscape(name) + `"` }

// timedResponse gives up when the other side takes nothing for a time, and only then.
type timedResponse struct {
	http.ResponseWriter
	control *http.ResponseController
	failed  error // of the first write that did
}

func (w *timedResponse) Write(p []byte) (int, error) {
	const timeout = 30 * time.Second // on a slow line, room shows in the system's buffers only now and then
	err := w.control.SetWriteDeadline(time.Now().Add(timeout))
	n := 0
	if err == nil {
		n, err = w.ResponseWriter.Write(p)
	}
	if w.failed == nil {
		w.failed = err
	}
	return n, err
}

// fetchSnapshot brings the copy that member from calls name to path. When it returns nil, path is complete, is what
// sum says, and survives a power cut; until then there is no path. What an earlier call has fetched of the same copy
// is not fetched again, also after a restart; parts of other copies are removed. Progress, which may be nil, is told
// how many bytes are there.
//
// It returns errSnapshotGone, errSnapshotWrong, errUnknownMember, an error of the file system, or that of the network
// after a number of vain tries.
func (t *transport) fetchSnapshot(ctx context.Context, from uint64, name string, size int64, sum [32]byte, path string, progress func(done, total int64)) error {
	if !t.begin() {
		return errTransportClosed
	}
	defer t.wg.Done()
	ctx, cancel := t.bound(ctx)
	defer cancel()
	if progress == nil {
		progress = func(int64, int64) {}
	}
	f := &fetch{t: t, from: from, name: name, size: size, path: path, progress: progress}
	f.part = f.partOf(sum)
	if err := f.open(ctx); err != nil {
		return fmt.Errorf("sqlraft: unfinished copy of the state: %w", err)
	}
	err := f.download(ctx)
	if err == nil && [32]byte(f.sum.Sum(nil)) != sum {
		// The part that was there before may have been damaged: once more, from the beginning.
		if err = f.reset(); err == nil {
			err = f.download(ctx)
		}
		if err == nil && [32]byte(f.sum.Sum(nil)) != sum {
			err = fmt.Errorf("%w: the SHA-256 of %s from member %x is %x, not %x", errSnapshotWrong, name, from, f.sum.Sum(nil), sum)
			err = errors.Join(err, f.reset())
		}
	}
	if err == nil {
		err = f.sync()
	}
	if cerr := f.file.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	if err := os.Rename(f.part, path); err != nil {
		return err
	}
	return osDisk{}.syncDirectory(filepath.Dir(path))
}

// fetch is one call of fetchSnapshot.
type fetch struct {
	t          *transport
	from       uint64
	name       string
	size       int64
	path, part string
	progress   func(done, total int64)

	file     *os.File
	done     int64     // bytes in file
	sum      hash.Hash // of these
	unsynced int64
}

// partOf is where what has arrived lies.
func (f *fetch) partOf(sum [32]byte) string {
	return f.path + "." + hex.EncodeToString(sum[:8]) + ".part"
}

// open opens the part and reads what is there.
func (f *fetch) open(ctx context.Context) (err error) {
	if err := removeParts(f.path, f.part); err != nil {
		return err
	}
	if f.file, err = os.OpenFile(f.part, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	f.sum = sha256.New()
	info, err := f.file.Stat()
	if err == nil && info.Size() > f.size {
		err = f.file.Truncate(f.size)
	}
	buf := make([]byte, snapshotPortion)
	for err == nil && ctx.Err() == nil {
		var n int
		n, err = f.file.Read(buf)
		f.sum.Write(buf[:n])
		f.done += int64(n)
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return errors.Join(err, f.file.Close())
	}
	return nil
}

// removeParts removes what has arrived of copies that are to become path, but for one.
func removeParts(path, but string) error {
	parts, err := filepath.Glob(globQuote(path) + ".*.part")
	if err != nil {
		return err
	}
	for _, p := range parts {
		if p == but {
			continue
		}
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// globQuote makes path match only itself.
func globQuote(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}

func (f *fetch) reset() error {
	f.done, f.unsynced = 0, 0
	f.sum.Reset()
	if err := f.file.Truncate(0); err != nil {
		return err
	}
	_, err := f.file.Seek(0, io.SeekStart)
	return err
}

// download returns once everything is there, however often the connection breaks as long as each one brings
// something.
func (f *fetch) download(ctx context.Context) error {
	const longest = 2 * time.Second
	var wait time.Duration
	for tries := 0; f.done < f.size; {
		before := f.done
		err := f.try(ctx)
		var lasting *lastingError
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.As(err, &lasting):
			return lasting.error
		case errors.Is(err, errUnknownMember):
			return err
		case f.done == f.size:
			return nil
		case f.done > before:
			tries, wait = 0, 0
		default:
			if tries++; tries >= snapshotTries {
				return fmt.Errorf("sqlraft: fetching %s from member %x, %d of %d bytes are here: %w", f.name, f.from, f.done, f.size, err)
			}
		}
		wait = min(max(2*wait, 50*time.Millisecond), longest)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait/2 + rand.N(wait)):
		}
	}
	return nil
}

// lastingError is one that trying again does not help.
type lastingError struct{ error }

// try fetches as much as one connection brings.
func (f *fetch) try(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stalled := time.AfterFunc(f.t.o.readTimeout, cancel)
	defer stalled.Stop()
	header := http.Header{}
	if f.done > 0 {
		header.Set("Range", fmt.Sprintf("bytes=%d-", f.done))
		header.Set("If-Range", snapshotTag(f.name))
	}
	answer, err := f.t.ask(ctx, f.from, http.MethodGet, snapshotPath+f.name, nil, header)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	switch answer.StatusCode {
	case http.StatusOK:
		if answer.ContentLength != f.size {
			return &lastingError{fmt.Errorf("%w: %s has %d bytes, not %d", errSnapshotWrong, f.name, answer.ContentLength, f.size)}
		}
		if f.done > 0 { // it does not know ranges, or that copy
			if err := f.reset(); err != nil {
				return &lastingError{err}
			}
		}
	case http.StatusPartialContent:
		if want := fmt.Sprintf("bytes %d-%d/%d", f.done, f.size-1, f.size); answer.Header.Get("Content-Range") != want {
			return &lastingError{fmt.Errorf("%w: %s: got %q, not %q", errSnapshotWrong, f.name, answer.Header.Get("Content-Range"), want)}
		}
	case http.StatusNotFound:
		return &lastingError{fmt.Errorf("%w: %w", errSnapshotGone, refusalOf(answer, f.from, f.t.o.clusterID()))}
	default:
		return refusalOf(answer, f.from, f.t.o.clusterID())
	}
	f.progress(f.done, f.size)
	buf := make([]byte, snapshotPortion)
	for f.done < f.size {
		n, err := answer.Body.Read(buf[:min(int64(len(buf)), f.size-f.done)])
		stalled.Reset(f.t.o.readTimeout)
		if n > 0 {
			if werr := f.write(buf[:n]); werr != nil {
				return &lastingError{werr}
			}
			f.progress(f.done, f.size)
		}
		if err != nil {
			return err // an end before the end is io.ErrUnexpectedEOF
		}
	}
	return nil
}

func (f *fetch) write(b []byte) error {
	n, err := f.file.Write(b)
	f.sum.Write(b[:n])
	f.done += int64(n)
	if errors.Is(err, syscall.ENOSPC) {
		// The log needs the room, perhaps, more than the next try needs what is here.
		return errors.Join(fmt.Errorf("sqlraft: a copy of %d bytes does not fit on the disk of %s: make room: %w", f.size, f.part, err), os.Remove(f.part))
	}
	if f.unsynced += int64(n); err == nil && f.unsynced >= snapshotSync {
		err = f.sync()
	}
	return err
}

// sync removes the part when it fails: what the page cache holds is then no proof of what the disk does.
func (f *fetch) sync() error {
	f.unsynced = 0
	if err := f.file.Sync(); err != nil {
		return errors.Join(err, os.Remove(f.part))
	}
	return nil
}
