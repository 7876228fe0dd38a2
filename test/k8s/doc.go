// Package k8s holds the tests that run real kube-apiservers on real quire
// processes and drive them with client-go. It is a module of its own, so that
// client-go does not enter quire's go.mod; `make test-k8s` and
// `make test-postgres` build what it needs and run it.
//
// TestKubernetes does not know what quire is: QUIRE_TEST_SERVER names the
// server binary and bin/peers/etcd serves as well as bin/quire does. A claim
// that etcd does not fulfil is a wrong claim. With QUIRE_STORAGE=postgres quire
// keeps its data in a PostgreSQL server that the test starts, with
// QUIRE_STORAGE=sqlraft it is the only member of a cluster.
//
// TestHighlyAvailable runs three kube-apiservers on three quires that share a
// PostgreSQL server with a synchronous standby, and breaks one after the other.
//
// Of the resources that the test uses, configmaps have no watch cache
// (--watch-cache-sizes=configmaps#0): their lists and watches reach quire
// itself. Secrets and the custom resource have one, as they do for users.
package k8s
