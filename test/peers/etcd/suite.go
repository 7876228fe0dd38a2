// Package etcd pins etcd, its tools and its tests. The imports are what the test programs need beside themselves:
// without them go.sum would not know it.
package etcd

import (
	_ "go.etcd.io/etcd/tests/v3/framework"
	_ "go.etcd.io/etcd/tests/v3/robustness/report"
)
