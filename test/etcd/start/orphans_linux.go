package start

import "syscall"

// noOrphan makes the process end with the test, also when the test is killed.
var noOrphan = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
