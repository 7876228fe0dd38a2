package powercut

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// shell does what its words say, in the root: +name creates a file that holds its own name, synced, -name removes,
// a>b renames, sync syncs the root, +name/ makes a directory, sync:name syncs one.
func shell(t *testing.T, d *Disk, words string) {
	t.Helper()
	resolve := func(path string) entry {
		dir := d.root
		for {
			first, rest, deeper := strings.Cut(path, "/")
			if !deeper || rest == "" {
				return entry{dir, first}
			}
			var err error
			if dir, err = d.lookup(dir, first); err != nil {
				t.Fatalf("%s: %v", path, err)
			}
			path = rest
		}
	}
	for word := range strings.FieldsSeq(words) {
		var err error
		if from, to, ok := strings.Cut(word, ">"); ok {
			err = d.move(resolve(from), resolve(to), false)
		} else if name, ok := strings.CutPrefix(word, "+"); ok {
			e, mode := resolve(name), uint32(syscall.S_IFREG)
			if strings.HasSuffix(name, "/") {
				mode = syscall.S_IFDIR
			}
			var n *node
			if n, err = d.create(e.dir, e.name, mode|0o700); err == nil {
				d.write(n, []byte(e.name), 0)
				d.sync(n, d.made(n))
			}
		} else if name, ok := strings.CutPrefix(word, "-"); ok {
			e := resolve(name)
			err = d.remove(e.dir, e.name, strings.HasSuffix(name, "/"))
		} else if name, ok := strings.CutPrefix(word, "sync:"); ok {
			e := resolve(name)
			var n *node
			if n, err = d.lookup(e.dir, e.name); err == nil {
				d.syncDir(n)
			}
		} else {
			d.syncDir(d.root)
		}
		if err != nil {
			t.Fatalf("%s: %v", word, err)
		}
	}
}

// listing is all files, each with the name that it was created with if that is another one.
func listing(dir *node, prefix string) []string {
	var out []string
	for name, n := range dir.entries {
		if n.dir() {
			out = append(out, prefix+name+"/")
			out = append(out, listing(n, prefix+name+"/")...)
		} else if born := string(n.file.now); born != name {
			out = append(out, prefix+name+"="+born)
		} else {
			out = append(out, prefix+name)
		}
	}
	slices.Sort(out)
	return out
}

// Each case lists everything that may be found after a cut, and all of it must be found.
func TestWhatSurvivesOfNames(t *testing.T) {
	seed := random(t)
	for _, c := range []struct{ do, want string }{
		{"+a +b sync", "a,b"},
		{"+a +b", "- a b a,b"},
		{"+a sync -a", "a -"},
		{"+a sync a>b", "a b=a"},             // never both, never none
		{"+a +b sync a>b", "a,b b=a"},        // the old file or the new one
		{"+a sync a>b b>c", "a b=a c=a"},     // one name after the other
		{"+a sync a>b +a", "a b=a a,b=a"},    // not the new a without the rename of the old
		{"+d/ +d/a sync:d", "- d/,d/a"},      // a name in a directory whose own name is lost
		{"+d/ sync +d/a", "d/ d/,d/a"},       //
		{"+a +d/ sync a>d/a sync", "d/,d/a"}, // both names of a rename
		{"+a +d/ sync a>d/a sync:d", "d/,d/a"},
		{"+a sync a>b +c", "a b=a a,c b=a,c"}, // in any order
	} {
		t.Run(c.do, func(t *testing.T) {
			var found []string
			for range 1000 {
				d := NewDisk(seed.Uint64())
				shell(t, d, c.do)
				d.Cut()
				got := strings.Join(listing(d.root, ""), ",")
				if got == "" {
					got = "-"
				}
				if !slices.Contains(found, got) {
					found = append(found, got)
				}
			}
			want := strings.Fields(c.want)
			slices.Sort(found)
			slices.Sort(want)
			if !slices.Equal(found, want) {
				t.Errorf("found %q, want %q", found, want)
			}
		})
	}
}

// With a journal the names are those of one moment, and an fsync of anything makes them durable.
func TestWhatSurvivesOfNamesInAJournal(t *testing.T) {
	seed := random(t)
	for _, c := range []struct{ do, want string }{
		{"+a +b", "a,b"}, // what shell creates it syncs
		{"+d/ +d/a", "d/,d/a"},
		{"+a +b a>c b>d", "a,b b,c=a c=a,d=b"},
		{"+a +d/ a>d/x sync:d", "d/,d/x=a"},
	} {
		var found []string
		for range 200 {
			d := NewDisk(seed.Uint64())
			d.Journal = true
			shell(t, d, c.do)
			d.Cut()
			if got := strings.Join(listing(d.root, ""), ","); !slices.Contains(found, got) {
				found = append(found, got)
			}
		}
		want := strings.Fields(c.want)
		slices.Sort(found)
		if !slices.Equal(found, want) {
			t.Errorf("%s: found %q, want %q", c.do, found, want)
		}
	}
}

func TestTheSameSeedIsTheSameCut(t *testing.T) {
	r := random(t)
	for range 20 {
		seed := r.Uint64()
		var found []string
		for range 2 {
			d := NewDisk(seed)
			shell(t, d, "+a +b +d/ +d/c sync a>x -b +e d/c>b sync:d x>d/y")
			for i := range 50 {
				for _, name := range []string{"b", "e"} {
					n, err := d.lookup(d.root, name)
					if err != nil {
						t.Fatal(err)
					}
					d.write(n, sectors("qwertz"), int64(i*sectorBytes))
				}
			}
			d.Cut()
			all := strings.Join(listing(d.root, ""), ",")
			found = append(found, all)
		}
		if found[0] != found[1] {
			t.Fatalf("seed %d: %.200q and %.200q", seed, found[0], found[1])
		}
	}
}

func TestWhatFileSystemsRefuse(t *testing.T) {
	d := NewDisk(random(t).Uint64())
	shell(t, d, "+a +b +d/ +d/c +e/")
	dir := d.root.entries["d"]
	for name, c := range map[string]struct{ got, want error }{
		"create what is there":              {second(d.create(d.root, "a", syscall.S_IFREG)), syscall.EEXIST},
		"remove what is not there":          {d.remove(d.root, "x", false), syscall.ENOENT},
		"unlink of a directory":             {d.remove(d.root, "e", false), syscall.EISDIR},
		"rmdir of a file":                   {d.remove(d.root, "a", true), syscall.ENOTDIR},
		"rmdir of a full directory":         {d.remove(d.root, "d", true), syscall.ENOTEMPTY},
		"rename of nothing":                 {d.move(entry{d.root, "x"}, entry{d.root, "y"}, false), syscall.ENOENT},
		"rename that must not replace":      {d.move(entry{d.root, "a"}, entry{d.root, "b"}, true), syscall.EEXIST},
		"rename of a file over a directory": {d.move(entry{d.root, "a"}, entry{d.root, "d"}, false), syscall.EISDIR},
		"rename of a directory over a file": {d.move(entry{d.root, "d"}, entry{d.root, "a"}, false), syscall.ENOTDIR},
		"rename over a full directory":      {d.move(entry{d.root, "e"}, entry{d.root, "d"}, false), syscall.ENOTEMPTY},
		"look up what is not there":         {second(d.lookup(dir, "a")), syscall.ENOENT},
	} {
		if !errors.Is(c.got, c.want) {
			t.Errorf("%s: %v, want %v", name, c.got, c.want)
		}
	}
	if got := strings.Join(listing(d.root, ""), ","); got != "a,b,d/,d/c,e/" {
		t.Errorf("what was refused has left %s", got)
	}
}

func second(_ *node, err error) error { return err }

func TestAnExportIsWhatProgramsSee(t *testing.T) {
	r := random(t)
	d := NewDisk(r.Uint64())
	shell(t, d, "+a +d/ +d/c")
	want := make([]byte, 300_000)
	copy(want[200_000:], "in the middle of much room")
	n, err := d.lookup(d.root.entries["d"], "c")
	if err != nil {
		t.Fatal(err)
	}
	d.write(n, want, 0)
	dir := t.TempDir()
	if err := d.Export(dir); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"a": "a", "d/c": string(want)} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s has %d bytes (%v), want the %d that were written", name, len(got), err, len(want))
		}
	}
}

func TestACloneIsADiskOfItsOwn(t *testing.T) {
	d := NewDisk(random(t).Uint64())
	shell(t, d, "+a +d/ +d/c")
	c := d.Clone(1)
	shell(t, d, "-a d/c>c")
	c.Cut()
	if got := strings.Join(listing(c.root, ""), ","); got != "a,d/,d/c" {
		t.Errorf("the clone has %s", got)
	}
}
