package proc

import (
	"os"
	"os/exec"
	"testing"
	"time"
)

func TestFamilyCountsChildrenThatLiveAndThatHaveEnded(t *testing.T) {
	cmd := exec.Command("/bin/sh", "-c", "while :; do :; done")
	f := Family(os.Getpid())
	before, err := f.CPU()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	const work = 200 * time.Millisecond
	var used time.Duration
	for deadline := time.Now().Add(30 * time.Second); used < work && time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if used, err = processorTime(cmd.Process.Pid); err != nil {
			t.Fatal(err)
		}
	}
	living, err := f.CPU()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	// The error is that it was killed.
	_ = cmd.Wait()
	ended, err := f.CPU()
	if err != nil {
		t.Fatal(err)
	}
	if living-before < work {
		t.Errorf("a child used at least %s, the family's time rose by %s", work, living-before)
	}
	// The time of a child that has ended is known in ticks, of user and of kernel time.
	if ended < living-2*tick {
		t.Errorf("the family's time fell from %s to %s when a child ended", living, ended)
	}
}

func TestFamilyCountsWhatChildrenWrite(t *testing.T) {
	f := Family(os.Getpid())
	before, err := f.WrittenBytes()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := WorkDir("family-") // t.TempDir may be in memory
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	const size = 1 << 20
	if output, err := exec.Command("dd", "if=/dev/zero", "of="+dir+"/written", "bs=1M", "count=1", "conv=fsync").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, output)
	}
	after, err := f.WrittenBytes()
	if err != nil {
		t.Fatal(err)
	}
	if after-before < size {
		t.Errorf("a child wrote and synced %d bytes, the family's figure rose by %d", size, after-before)
	}
}
