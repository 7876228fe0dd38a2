package proc

import "runtime"

// startOnOwnThread starts the process from a goroutine that keeps its thread until the process has ended.
//
// Pdeathsig is sent when the *thread* that started the child ends, not the process (prctl(2),
// PR_SET_PDEATHSIG): started from any goroutine, a server would now and then be killed for no reason when the
// Go runtime retires that thread.
func startOnOwnThread(p *Process) error {
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err != nil {
			return
		}
		// The exit status is kept in ProcessState; a killed server is the normal case here.
		_ = p.cmd.Wait()
		p.log.Close()
		close(p.done)
	}()
	return <-started
}
