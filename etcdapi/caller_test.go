package etcdapi

import (
	"slices"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
	"google.golang.org/grpc"
)

// A method of a newer etcd has no caller checked unless somebody sees to it: it is to be guarded, or to check by itself and
// to be named here.
func TestEveryMethodChecksItsCaller(t *testing.T) {
	for desc, themselves := range map[*grpc.ServiceDesc]string{
		&pb.KV_ServiceDesc:          "Range RangeStream Put DeleteRange Txn",
		&pb.Watch_ServiceDesc:       "Watch",
		&pb.Lease_ServiceDesc:       "LeaseKeepAlive",
		&pb.Cluster_ServiceDesc:     "",
		&pb.Maintenance_ServiceDesc: "",
		&pb.Auth_ServiceDesc: "AuthEnable AuthDisable AuthStatus Authenticate " +
			"UserAdd UserGet UserList UserDelete UserChangePassword UserGrantRole UserRevokeRole " +
			"RoleAdd RoleGet RoleList RoleDelete RoleGrantPermission RoleRevokePermission",
		// These are made of requests to KV, Lease and Watch.
		&v3lockpb.Lock_ServiceDesc:         "Lock Unlock",
		&v3electionpb.Election_ServiceDesc: "Campaign Proclaim Leader Observe Resign",
	} {
		var methods []string
		for _, m := range desc.Methods {
			methods = append(methods, m.MethodName)
		}
		for _, s := range desc.Streams {
			methods = append(methods, s.StreamName)
		}
		for _, m := range methods {
			full := "/" + desc.ServiceName + "/" + m
			if guarded, itself := guards[full] != nil, slices.Contains(strings.Fields(themselves), m); guarded == itself {
				t.Errorf("%s: guarded %v, checks by itself %v", full, guarded, itself)
			}
		}
	}
}
