//go:build !linux

package etcdapi

import "errors"

func descriptors() (used int, limit uint64, err error) { return 0, 0, errors.ErrUnsupported }
