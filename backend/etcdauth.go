package backend

import "go.etcd.io/etcd/api/v3/authpb"

// etcdAuthState is who may do what, as etcd keeps it.
type etcdAuthState struct {
	enabled  bool
	revision uint64 // 1 where nothing was ever changed
	users    []*authpb.User
	roles    []*authpb.Role
}

// etcdAuthState reads it for an EtcdSnapshot. REQUIRES: the commit token is held; the messages are not changed later.
func (db *DB) etcdAuthState() *etcdAuthState { return &etcdAuthState{revision: 1} }
