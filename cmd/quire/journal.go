package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"go.uber.org/zap/zapcore"
)

// journalSocket is where systemd-journald listens (sd_journal_print(3), "Native Journal Protocol").
const journalSocket = "/run/systemd/journal/socket"

// journalCore sends entries to journald, one datagram each, with the priority that their level stands for.
// An entry larger than a datagram may be (some 200 KiB) is lost and reported to zap's error output.
type journalCore struct {
	zapcore.LevelEnabler
	enc  zapcore.Encoder
	conn *net.UnixConn
	name string // SYSLOG_IDENTIFIER
}

func newJournalCore(enc zapcore.Encoder, level zapcore.LevelEnabler, socket string) (*journalCore, error) {
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("--log-outputs=systemd/journal: journald is not reachable (%w); run under systemd or use --log-outputs=stderr", err)
	}
	return &journalCore{LevelEnabler: level, enc: enc, conn: conn, name: filepath.Base(os.Args[0])}, nil
}

func (c *journalCore) close() error { return c.conn.Close() }

func (c *journalCore) With(fields []zapcore.Field) zapcore.Core {
	clone := *c
	clone.enc = c.enc.Clone()
	for _, f := range fields {
		f.AddTo(clone.enc)
	}
	return &clone
}

func (c *journalCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c *journalCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	line, err := c.enc.EncodeEntry(e, fields)
	if err != nil {
		return err
	}
	defer line.Free()
	_, err = c.conn.Write(journalDatagram(bytes.TrimRight(line.Bytes(), "\n"), priority(e.Level), c.name))
	return err
}

func (c *journalCore) Sync() error { return nil }

// journalDatagram is the native protocol: NAME=value lines, and for a value that may hold newlines the name alone, its
// length as 64 bits little endian, and the bytes.
func journalDatagram(message []byte, priority int, name string) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "PRIORITY=%d\nSYSLOG_IDENTIFIER=%s\nMESSAGE\n", priority, name)
	b.Write(binary.LittleEndian.AppendUint64(nil, uint64(len(message))))
	b.Write(message)
	b.WriteByte('\n')
	return b.Bytes()
}

// priority maps zap's levels to syslog's.
func priority(l zapcore.Level) int {
	switch {
	case l <= zapcore.DebugLevel:
		return 7
	case l == zapcore.InfoLevel:
		return 6
	case l == zapcore.WarnLevel:
		return 4
	case l == zapcore.ErrorLevel:
		return 3
	default:
		return 2
	}
}
