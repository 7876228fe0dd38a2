// Command suite runs etcd's own end-to-end tests, the packages common and e2e of go.etcd.io/etcd/tests/v3, with quire
// in the place of etcd, and prints how many of the applicable ones pass:
//
//	single-node: passed 370 of 370 applicable, 40 excluded
//
// A case is a leaf: a test function without subtests, or a subtest without further ones. cases.txt names all,
// excluded.txt those that do not apply, with the reason. A case counts as failed unless it reports that it passed, so
// one that is skipped, is gone, or dies with its process fails. Nothing is tried twice.
//
// A case belongs to the single-node set when every server that it starts names at most one member, and to the
// three-node set otherwise; one that starts no server counts as single-node. The rule is applied by -calibrate, which
// runs everything on a real etcd, looks at the command lines of the servers, and writes cases.txt. It refuses a case
// that etcd does not pass and that excluded.txt does not name.
//
// The server under test gets the command line that it would get as etcd. With -storage (or $QUIRE_STORAGE) sqlite or
// postgres one flag is added to it; see server.go.
//
// Each test function runs in a process of its own, one after the other: etcd's tests use fixed ports from 20000 on, so
// only one suite may run on a machine at a time. What a test leaves running is killed before the next one starts.
package main
