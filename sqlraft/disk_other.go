//go:build !linux

package sqlraft

import "os"

// preallocate gives an empty file its size.
func preallocate(f *os.File, size int64) error { return f.Truncate(size) }

func syncData(f *os.File) error { return f.Sync() }
