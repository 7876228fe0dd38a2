// Package surface runs a real etcd and quire, as programs and with the same command line, and compares what lies around
// the API: flags, metrics, pages, logs, spans, TLS.
//
// The etcd is $ETCD_BIN, else bin/peers/etcd; `make bin/peers/etcd` builds it.
package surface
