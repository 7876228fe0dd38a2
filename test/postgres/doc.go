// Package postgres starts real PostgreSQL servers for tests and breaks them: stops them hard, freezes them,
// fills their disk, promotes their standbys, cuts the network between them and their clients.
//
// It needs Linux and an installed PostgreSQL 15 or newer (`make need-postgres`) and talks to the servers with
// psql, not with a driver of its own. Run as root it runs the servers as the user postgres, because a server
// refuses to be root. A program may use it as well as a test: Start returns errors, New and Shared are
// the short forms for tests.
//
// What a test may rely on:
//
//  1. A server has a data directory, a port on 127.0.0.1 and a socket of its own; the cluster that a
//     distribution sets up is neither started nor used. Several processes may use this package at once.
//  2. Commits are durable as they are by default (fsync is on), unless Options.NoFsync says otherwise.
//  3. Nothing stays behind: Stop ends every process of a server and removes its files; what is left when the
//     test process ends, even by SIGKILL, a guard ends and removes (see workspace).
//  4. A server keeps its address over Restart, a Proxy over Cut and Heal.
//
// DSN, DSNAt, Exec, Query and WaitFor may be called from any goroutine. The methods that start, stop, signal or
// reconfigure a server belong to one goroutine at a time.
package postgres
