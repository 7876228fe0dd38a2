package etcdapi

import "github.com/prometheus/client_golang/prometheus"

// descriptorCollector shows etcd's own metrics of file descriptors, at the time of the scrape; etcd looks every ten minutes.
// Where the system does not tell there are none.
type descriptorCollector struct{}

var (
	descriptorsUsed  = prometheus.NewDesc("os_fd_used", "The number of used file descriptors.", nil, nil)
	descriptorsLimit = prometheus.NewDesc("os_fd_limit", "The file descriptor limit.", nil, nil)
)

func (descriptorCollector) Describe(out chan<- *prometheus.Desc) {
	out <- descriptorsUsed
	out <- descriptorsLimit
}

func (descriptorCollector) Collect(out chan<- prometheus.Metric) {
	if used, limit, err := descriptors(); err == nil {
		out <- prometheus.MustNewConstMetric(descriptorsUsed, prometheus.GaugeValue, float64(used))
		out <- prometheus.MustNewConstMetric(descriptorsLimit, prometheus.GaugeValue, float64(limit))
	}
}
