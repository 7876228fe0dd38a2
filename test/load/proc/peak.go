package proc

import (
	"fmt"
	"os"
)

// ResetPeak makes PeakRSS begin anew, at what is resident now.
func (p *Process) ResetPeak() error {
	path := fmt.Sprintf("/proc/%d/clear_refs", p.PID())
	// "5" resets VmHWM and nothing else (proc_pid_clear_refs(5)).
	if err := os.WriteFile(path, []byte("5"), 0); err != nil {
		return fmt.Errorf("resetting the peak of resident memory: %w (the kernel needs CONFIG_PROC_PAGE_MONITOR)", err)
	}
	return nil
}

// PeakRSS is the most memory in bytes that was resident at once, since the start or the last ResetPeak.
func (p *Process) PeakRSS() (int64, error) {
	kib, err := procField(p.PID(), "status", "VmHWM:")
	return kib * 1024, err
}
