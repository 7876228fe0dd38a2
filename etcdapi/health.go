package etcdapi

import healthpb "google.golang.org/grpc/health/grpc_health_v1"

// allServices is the name under which grpc's health protocol asks for the server as a whole.
const allServices = ""

// StorageFailed is to be called when the storage cannot take writes (backend.Hooks.StorageError): grpc's health
// service answers NOT_SERVING until StorageHealed. After Close both are ignored.
func (s *Server) StorageFailed(error) {
	s.health.SetServingStatus(allServices, healthpb.HealthCheckResponse_NOT_SERVING)
}

// StorageHealed is to be called when the storage takes writes again (backend.Hooks.StorageHealed).
func (s *Server) StorageHealed() {
	s.health.SetServingStatus(allServices, healthpb.HealthCheckResponse_SERVING)
}
