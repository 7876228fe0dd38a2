// Package k8s holds the test that runs a real kube-apiserver on a real quire
// process and drives it with client-go. It is a module of its own, so that
// client-go does not enter quire's go.mod; `make test-k8s` builds what it
// needs and runs it.
//
// Nothing here knows what quire is: QUIRE_TEST_SERVER names the server binary
// and bin/peers/etcd serves as well as bin/quire does. A claim that etcd does
// not fulfil is a wrong claim.
//
// Of the resources that the test uses, configmaps have no watch cache
// (--watch-cache-sizes=configmaps#0): their lists and watches reach quire
// itself. Secrets and the custom resource have one, as they do for users.
package k8s
