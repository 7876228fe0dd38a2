//go:build linux

// Command failover measures what the death of a leader costs: clusters of quire and of etcd, with default timers, whose
// leader is killed again and again (SIGKILL), and the time from each kill until a write through the others succeeds.
//
//	cd test/etcd && go run ./partitions/failover -kills 50
//
// It prints a table in Markdown. It needs Linux and root, and the binaries, `make build bin/peers/etcd`.
package main
