package sqlraft

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/quire-db/quire/backend"
)

func TestLogOnTheRealDisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "raft")
	d := osDisk{segment: 8192}
	l, _, err := openLog(d, dir)
	must(t, err)
	must(t, writeHistory(l))
	must(t, l.close())
	l, rec, err := openLog(d, dir)
	must(t, err)
	expectLog(t, rec, `"me" 2/0/50 after 50@2: 51@2(10)`)
	for i := uint64(52); i < 100; i++ {
		must(t, l.append(testHardState(2, 1, i-1), testEntries(i, 2, 1500), true))
		must(t, l.purge(i-10))
	}
	must(t, l.close())
	var bytes int64
	must(t, filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		want := fs.FileMode(0o600)
		if entry.IsDir() {
			want = 0o700
		} else {
			bytes += info.Size()
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %v, want %v", path, info.Mode().Perm(), want)
		}
		return nil
	}))
	if bytes != l.size() {
		t.Errorf("the files have %d bytes, size says %d", bytes, l.size())
	}
	l, rec, err = openLog(d, dir)
	must(t, err)
	must(t, l.close())
	if rec.start > 89 || rec.start < 80 || rec.start+uint64(len(rec.entries)) != 99 || rec.hard.GetCommit() != 98 {
		t.Errorf("found %s", rec)
	}

	oldest := filepath.Join(dir, segmentName(l.segments[0].seq))
	content, err := os.ReadFile(oldest)
	must(t, err)
	content[len(content)/2] ^= 1
	must(t, os.WriteFile(oldest, content, 0o600))
	if _, _, err := openLog(d, dir); !errors.Is(err, backend.ErrDamaged) || !strings.Contains(err.Error(), oldest) {
		t.Errorf("openLog says %v where %s is damaged", err, oldest)
	}
	must(t, os.Truncate(oldest, 700))
	if _, _, err := openLog(d, dir); !errors.Is(err, backend.ErrDamaged) {
		t.Errorf("openLog says %v where %s is cut off", err, oldest)
	}
}

const logWriterEnv = "QUIRE_TEST_LOG_WRITER"

// TestLogWriterProcess is the process that TestKilledWriterLosesNothing kills.
func TestLogWriterProcess(t *testing.T) {
	dir := os.Getenv(logWriterEnv)
	if dir == "" {
		t.Skip("only in a process of its own")
	}
	l, rec, err := openLog(osDisk{segment: 64 << 10}, dir)
	must(t, err)
	r := rand.New(rand.NewPCG(uint64(os.Getpid()), 0))
	term, commit := rec.hard.GetTerm()+1, rec.hard.GetCommit()
	last := commit // what is not committed is overwritten by the first append
	for {
		switch n := r.IntN(100); {
		case n == 0 && commit > 0:
			commit += uint64(r.IntN(5))
			last = commit
			must(t, l.restart(commit, term, nil))
		case n < 4 && commit > 20:
			must(t, l.purge(commit-20))
		default:
			sizes := make([]int, 1+r.IntN(4))
			for i := range sizes {
				sizes[i] = r.IntN(4000)
			}
			sync := r.IntN(4) > 0
			must(t, l.append(testHardState(term, 1, commit), testEntries(last+1, term, sizes...), sync))
			last += uint64(len(sizes))
			if sync {
				commit = last - uint64(r.IntN(2))
			} else {
				continue
			}
		}
		fmt.Printf("durable %d %d\n", last, term)
	}
}

func TestKilledWriterLosesNothing(t *testing.T) {
	dir := t.TempDir()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d of the times to kill at; the writers draw theirs from their process ids", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	total := 0
	for round := range 12 {
		var last, term uint64
		lines := 0
		cmd := exec.Command(os.Args[0], "-test.run=^TestLogWriterProcess$")
		cmd.Env = append(os.Environ(), logWriterEnv+"="+dir)
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		var timer *time.Timer
		var other []string
		for scanner := bufio.NewScanner(out); scanner.Scan(); {
			line := scanner.Text()
			if _, err := fmt.Sscanf(line, "durable %d %d", &last, &term); err != nil {
				other = append(other, line)
				continue
			}
			lines++
			if timer == nil { // once it writes
				timer = time.AfterFunc(time.Duration(r.IntN(60_000))*time.Microsecond, func() { _ = cmd.Process.Kill() })
			}
		}
		var exit *exec.ExitError
		if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != -1 {
			t.Fatalf("the writer ended by itself: %v\n%s", err, strings.Join(other, "\n"))
		}
		total += lines

		l, rec, err := openLog(osDisk{segment: 64 << 10}, dir)
		if err != nil {
			t.Fatalf("round %d, after entry %d: %v", round, last, err)
		}
		found := rec.start + uint64(len(rec.entries))
		switch {
		case found < last:
			t.Fatalf("round %d: entry %d is lost, the log ends at %d", round, last, found)
		case last > rec.start && rec.entries[last-rec.start-1].GetTerm() != term:
			t.Fatalf("round %d: entry %d has term %d, want %d", round, last, rec.entries[last-rec.start-1].GetTerm(), term)
		case rec.hard.GetTerm() != term:
			t.Fatalf("round %d: term %d, want %d", round, rec.hard.GetTerm(), term)
		}
		for i, e := range rec.entries {
			if want := testEntries(rec.start+uint64(i)+1, e.GetTerm(), len(e.GetData()))[0]; !proto.Equal(e, want) {
				t.Fatalf("round %d: entry %v, want %v", round, e, want)
			}
		}
		must(t, l.close())
	}
	if total < 100 {
		t.Errorf("only %d writes in all rounds", total)
	}
}

func BenchmarkLogAppend(b *testing.B) {
	for _, entries := range []int{1, 16, 128} {
		b.Run(fmt.Sprintf("%dx1KiB", entries), func(b *testing.B) {
			l, _, err := openLog(osDisk{}, b.TempDir())
			must(b, err)
			sizes := make([]int, entries)
			for i := range sizes {
				sizes[i] = 1024
			}
			batch, hs := testEntries(1, 1, sizes...), testHardState(1, 1, 0)
			index := uint64(0)
			b.ReportAllocs()
			b.SetBytes(int64(entries) * 1024)
			for b.Loop() {
				*hs.Commit = index
				for _, e := range batch {
					index++
					*e.Index = index
				}
				must(b, l.append(hs, batch, true))
				must(b, l.purge(*hs.Commit))
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "syncs/s")
			b.ReportMetric(float64(b.N*entries)/b.Elapsed().Seconds(), "entries/s")
			must(b, l.close())
		})
	}
}

func BenchmarkOpenLog(b *testing.B) {
	dir := b.TempDir()
	l, _, err := openLog(osDisk{}, dir)
	must(b, err)
	sizes := make([]int, 64)
	for i := range sizes {
		sizes[i] = 1024
	}
	for index := uint64(1); len(l.segments) < 3; index += 64 {
		must(b, l.append(nil, testEntries(index, 1, sizes...), false))
	}
	must(b, l.close())
	b.SetBytes(l.size())
	for b.Loop() {
		l, _, err := openLog(osDisk{}, dir)
		must(b, err)
		must(b, l.close())
	}
}
