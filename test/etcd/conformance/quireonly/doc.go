// Package quireonly tests the built binary where etcd has no say: its data on disk and on full, read-only
// and damaged disks, its SQL views, its command line, its TLS and how it starts and ends.
package quireonly
