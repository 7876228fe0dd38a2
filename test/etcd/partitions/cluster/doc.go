// Package cluster runs the members of an etcd or quire cluster, each a process on a host of a test network, and does to
// them what happens to machines: their lines break, they are killed, stopped for a while, lose their disks.
//
// It knows no testing.TB, so that programs can use it too: what fails is returned.
package cluster
