package quireonly

import (
	"slices"
	"testing"

	reflectpb "google.golang.org/grpc/reflection/grpc_reflection_v1"

	"github.com/quire-db/quire/test/etcd/start"
)

// grpcurl and the like find the services by themselves. etcd 3.7 has no reflection.
func TestReflectionListsTheServices(t *testing.T) {
	t.Parallel()
	s := start.Quire(t, start.Options{})
	r, err := reflectpb.NewServerReflectionClient(s.Conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Send(&reflectpb.ServerReflectionRequest{MessageRequest: &reflectpb.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	a, err := r.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, service := range a.GetListServicesResponse().GetService() {
		names = append(names, service.Name)
	}
	for _, want := range []string{"etcdserverpb.KV", "etcdserverpb.Watch", "etcdserverpb.Lease", "etcdserverpb.Cluster", "etcdserverpb.Maintenance", "grpc.health.v1.Health"} {
		if !slices.Contains(names, want) {
			t.Errorf("services are %v, without %s", names, want)
		}
	}
}
