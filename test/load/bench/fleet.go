package main

import (
	"errors"
	"time"

	"github.com/quire-db/quire/test/load/proc"
)

// fleet is the processes that are one server together: one, or for quire-pg3 three. Figures are sums over them.
type fleet []*proc.Process

func (f fleet) Pause() error  { return f.each((*proc.Process).Pause) }
func (f fleet) Resume() error { return f.each((*proc.Process).Resume) }

// Kill ends all processes with SIGKILL.
func (f fleet) Kill() {
	for _, p := range f {
		p.Kill()
	}
}

// Stop sends SIGTERM to one after the other.
func (f fleet) Stop(timeout time.Duration) error {
	return f.each(func(p *proc.Process) error { return p.Stop(timeout) })
}

func (f fleet) ResetPeak() error { return f.each((*proc.Process).ResetPeak) }

func (f fleet) each(do func(*proc.Process) error) error {
	var errs []error
	for _, p := range f {
		errs = append(errs, do(p))
	}
	return errors.Join(errs...)
}

func (f fleet) CPU() (time.Duration, error)  { return sumOf(f, (*proc.Process).CPU) }
func (f fleet) WrittenBytes() (int64, error) { return sumOf(f, (*proc.Process).WrittenBytes) }
func (f fleet) RSS() (int64, error)          { return sumOf(f, (*proc.Process).RSS) }
func (f fleet) PeakRSS() (int64, error)      { return sumOf(f, (*proc.Process).PeakRSS) }

func sumOf[T ~int64](f fleet, figure func(*proc.Process) (T, error)) (T, error) {
	var total T
	for _, p := range f {
		v, err := figure(p)
		if err != nil {
			return 0, err
		}
		total += v
	}
	return total, nil
}
