//go:build !linux

package start

import "syscall"

// noOrphan: only Linux ends a process with its parent.
var noOrphan *syscall.SysProcAttr
