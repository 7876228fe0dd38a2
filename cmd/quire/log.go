package main

import (
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zapgrpc"
	"google.golang.org/grpc/grpclog"
)

// The words of --log-outputs that are not file paths.
const (
	outputDefault = "default"
	outputStderr  = "stderr"
	outputStdout  = "stdout"
	outputJournal = "systemd/journal"
)

// encoderConfig has etcd's names and formats (client/pkg/v3/logutil: DefaultZapLoggerConfig): tools that read
// etcd's log read ours.
var encoderConfig = zapcore.EncoderConfig{
	TimeKey:       "ts",
	LevelKey:      "level",
	NameKey:       "logger",
	CallerKey:     "caller",
	MessageKey:    "msg",
	StacktraceKey: "stacktrace",
	LineEnding:    zapcore.DefaultLineEnding,
	EncodeLevel:   zapcore.LowercaseLevelEncoder,
	EncodeTime: func(t time.Time, enc zapcore.PrimitiveArrayEncoder) {
		enc.AppendString(t.Format("2006-01-02T15:04:05.000000Z0700"))
	},
	EncodeDuration: zapcore.StringDurationEncoder,
	EncodeCaller:   zapcore.ShortCallerEncoder,
}

// checkLogging checks the logging flags, with etcd's rules (server/v3/embed: setupLogging).
func (c *config) checkLogging() error {
	switch c.Logger {
	case "zap":
	case "capnslog":
		return errors.New("--logger=capnslog is removed in v3.5; use --logger=zap")
	default:
		return fmt.Errorf("unknown logger option %q; use --logger=zap", c.Logger)
	}
	if _, err := zapcore.ParseLevel(c.LogLevel); err != nil {
		return fmt.Errorf("--log-level %q is not known; use debug, info, warn, error, panic or fatal", c.LogLevel)
	}
	switch c.LogFormat {
	case "json", "console", "":
	default:
		return fmt.Errorf("unknown log format: %s, supported values json, console", c.LogFormat)
	}
	if len(c.LogOutputs) == 0 {
		c.LogOutputs = []string{outputDefault}
	}
	if len(c.LogOutputs) > 1 {
		if slices.Contains(c.LogOutputs, outputDefault) {
			return fmt.Errorf("multi logoutput for %q is not supported yet; name stderr or stdout instead", outputDefault)
		}
		if slices.Contains(c.LogOutputs, outputJournal) {
			return fmt.Errorf("running with systemd/journal but other '--log-outputs' values (%q) are configured; use systemd/journal alone", c.LogOutputs)
		}
	}
	return c.LogRotation.check(c.LogOutputs)
}

// newLogger opens what --log-outputs names. Files are appended to. close flushes and closes them; the logger must
// not be used afterwards. A Fatal entry does not end the process: run returns instead, so that everything is
// closed in order.
func newLogger(c *config, stdout, stderr io.Writer) (lg *zap.Logger, closeLog func() error, err error) {
	level, err := zapcore.ParseLevel(c.LogLevel)
	if err != nil {
		return nil, nil, err
	}
	encoder := zapcore.NewJSONEncoder(encoderConfig)
	if c.LogFormat == "console" {
		encoder = zapcore.NewConsoleEncoder(encoderConfig)
	}
	var sinks []zapcore.WriteSyncer
	var files []io.Closer
	closeFiles := func() error {
		var errs []error
		for _, f := range files {
			errs = append(errs, f.Close())
		}
		return errors.Join(errs...)
	}
	for _, out := range c.LogOutputs {
		switch out {
		case outputDefault, outputStderr:
			sinks = append(sinks, zapcore.Lock(zapcore.AddSync(writerOnly{stderr})))
		case outputStdout:
			sinks = append(sinks, zapcore.Lock(zapcore.AddSync(writerOnly{stdout})))
		case outputJournal:
			core, err := newJournalCore(encoder, level, journalSocket)
			if err != nil {
				return nil, nil, err
			}
			return finishLogger(core, c.LogLevel, stderr), core.close, nil
		default:
			if c.LogRotation.Enabled {
				f, err := c.LogRotation.file(out)
				if err != nil {
					return nil, nil, errors.Join(err, closeFiles())
				}
				files = append(files, f)
				sinks = append(sinks, zapcore.Lock(zapcore.AddSync(f)))
				continue
			}
			f, err := os.OpenFile(out, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o666)
			if err != nil {
				return nil, nil, errors.Join(fmt.Errorf("--log-outputs: %w", err), closeFiles())
			}
			files = append(files, f)
			sinks = append(sinks, zapcore.Lock(f))
		}
	}
	core := zapcore.NewCore(encoder, zapcore.NewMultiWriteSyncer(sinks...), level)
	return finishLogger(core, c.LogLevel, stderr), closeFiles, nil
}

// writerOnly hides Sync: syncing a terminal or a pipe fails, and there is nothing to sync.
type writerOnly struct{ io.Writer }

// fatalReturns keeps zap from exiting after a Fatal entry.
type fatalReturns struct{}

func (fatalReturns) OnWrite(*zapcore.CheckedEntry, []zapcore.Field) {}

func finishLogger(core zapcore.Core, level string, stderr io.Writer) *zap.Logger {
	lg := zap.New(core, zap.AddCaller(), zap.WithFatalHook(fatalReturns{}),
		zap.ErrorOutput(zapcore.Lock(zapcore.AddSync(writerOnly{stderr}))))
	// gRPC's own logger writes plain text to stderr, where every line has to be JSON. What it has to say
	// below debug reaches clients as errors anyway.
	grpcLogger.Do(func() {
		if level == "debug" {
			grpclog.SetLoggerV2(zapgrpc.NewLogger(lg))
		} else {
			grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
		}
	})
	return lg
}

// grpcLogger: gRPC's logger is a global that must not be set any more once gRPC is in use.
var grpcLogger sync.Once

// logNotes writes the warnings that were found before the logger stood.
func (c *config) logNotes(lg *zap.Logger) {
	for _, n := range c.notes {
		var fields []zap.Field
		for _, k := range slices.Sorted(maps.Keys(n.fields)) {
			fields = append(fields, zap.String(k, n.fields[k]))
		}
		lg.Warn(n.msg, fields...)
	}
}

// stdLogger gives net/http a place for what it has to say.
func stdLogger(lg *zap.Logger) *log.Logger {
	std, err := zap.NewStdLogAt(lg, zap.DebugLevel)
	if err != nil {
		panic(fmt.Sprintf("zap does not know its own level: %v", err))
	}
	return std
}
