// Package partitions breaks what lies between and below the members of a real cluster: processes in network namespaces
// (package network) whose lines are cut, lose and delay packets, that are killed, stopped, restarted, replaced
// (package cluster), while clients on every member write, read, watch and keep leases.
//
// A test compares what clients were told with what the cluster knows in the end:
//   - account: the history of the store, revision by revision, holds every acknowledged write once, at its revision,
//     no write that was not sent, none twice; every read, linearizable or not, saw the state at its revision; what began
//     after something had been answered has no older revision.
//   - linear: the same without the help of revisions, by porcupine.
//   - watching: every watcher, resumed wherever its stream broke, got every event once, in order, whole revisions only, and
//     nothing after a bookmark that the bookmark had promised to be past.
//   - leases: no lease ended within its TTL after an acknowledged renewal; those that nobody renewed did end, once.
//   - agreement: all members have the same HashKV at several revisions, the same events, leases and members.
//
// The server is $QUIRE_TEST_SERVER, else $QUIRE_BIN, else bin/quire; `QUIRE_TEST_SERVER=bin/peers/etcd` (an absolute path)
// tries the tests on etcd. QUIRE_SEED repeats a run's draws (not its timing), QUIRE_MINUTES is how long TestRandomFaults
// runs, and QUIRE_ARTIFACTS names a directory that keeps the logs, and the data of tests that failed.
//
// They need Linux and root. Without root they fail, unless QUIRE_NO_NAMESPACES=1 says that they may be skipped.
package partitions
