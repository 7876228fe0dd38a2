package etcdapi

import (
	"errors"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/quire-db/quire/backend"
)

// allServices is the name under which grpc's health protocol asks for the server as a whole.
const allServices = ""

// StorageFailed is to be called when the storage cannot take writes (backend.Hooks.StorageError): grpc's health
// service answers NOT_SERVING until StorageHealed. After Close both are ignored. When the database has lost what was
// served from it (ErrHistoryLost) all streams end, and new ones at once: their clients have seen what is not there.
func (s *Server) StorageFailed(err error) {
	if errors.Is(err, backend.ErrHistoryLost) {
		s.stop(err)
	}
	s.health.SetServingStatus(allServices, healthpb.HealthCheckResponse_NOT_SERVING)
}

// StorageHealed is to be called when the storage takes writes again (backend.Hooks.StorageHealed).
func (s *Server) StorageHealed() {
	s.health.SetServingStatus(allServices, healthpb.HealthCheckResponse_SERVING)
}
