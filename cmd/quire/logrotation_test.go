package main

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap"
)

func TestALogFileIsRotated(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log", "quire.log")
	c, err := loadConfig([]string{"--enable-log-rotation", "--log-outputs=" + file, `--log-rotation-config-json={"maxsize": 1, "maxbackups": 2}`}, nil)
	if err != nil {
		t.Fatal(err)
	}
	lg, closeLog, err := newLogger(c, io.Discard, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Repeat("x", 100_000)
	for range 25 {
		lg.Info("an entry", zap.String("text", text))
	}
	if err := closeLog(); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(filepath.Dir(file))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 3 {
		t.Fatalf("2.5 megabytes are in %d files, want 3", len(files))
	}
	for _, f := range files {
		info, err := f.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() > 1<<20 {
			t.Errorf("%s has %d bytes", f.Name(), info.Size())
		}
	}
}
