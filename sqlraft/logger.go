package sqlraft

import (
	"fmt"

	"go.etcd.io/raft/v3"
)

// raftLogger gives what Raft has to say to a hook. Below warnings it says a lot, all of it seen elsewhere too, and
// formatting it costs: that is dropped unless somebody asks for it.
type raftLogger struct {
	tell func(message string) // warnings and errors; nil: dropped
	info func(message string) // the rest; nil: dropped
}

var _ raft.Logger = (*raftLogger)(nil)

func (l *raftLogger) say(to func(string), v []any) {
	if to != nil {
		to(fmt.Sprint(v...))
	}
}

func (l *raftLogger) sayf(to func(string), format string, v []any) {
	if to != nil {
		to(fmt.Sprintf(format, v...))
	}
}

func (l *raftLogger) Debug(...any)             {}
func (l *raftLogger) Debugf(string, ...any)    {}
func (l *raftLogger) Info(v ...any)            { l.say(l.info, v) }
func (l *raftLogger) Infof(f string, v ...any) { l.sayf(l.info, f, v) }
func (l *raftLogger) Warning(v ...any)         { l.say(l.tell, v) }
func (l *raftLogger) Warningf(f string, v ...any) {
	l.sayf(l.tell, f, v)
}
func (l *raftLogger) Error(v ...any)            { l.say(l.tell, v) }
func (l *raftLogger) Errorf(f string, v ...any) { l.sayf(l.tell, f, v) }

// Fatal and Panic are broken invariants.
func (l *raftLogger) Fatal(v ...any)            { panic("sqlraft: Raft: " + fmt.Sprint(v...)) }
func (l *raftLogger) Fatalf(f string, v ...any) { panic("sqlraft: Raft: " + fmt.Sprintf(f, v...)) }
func (l *raftLogger) Panic(v ...any)            { l.Fatal(v...) }
func (l *raftLogger) Panicf(f string, v ...any) { l.Fatalf(f, v...) }
