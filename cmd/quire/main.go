// Command quire is an etcd v3 server that keeps its data in SQL.
//
//	quire [flags]      serve; the flags are etcd's, and --storage
//	quire check        read the whole database and report what is unsound
//	quire version      print the version
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"go.uber.org/zap"
)

// Exit codes. Those for a bad command line are etcd's: 2 for what cannot be parsed, 1 for the rest.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	ctx, stop := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-signals
		stop() // close everything in order
		if s, ok := (<-signals).(syscall.Signal); ok {
			os.Exit(128 + int(s)) // in a hurry; what was acknowledged is durable all the same
		}
	}()
	os.Exit(run(ctx, os.Args[1:], os.Environ(), os.Stdout, os.Stderr))
}

// run is the whole program: it returns the exit code once everything is closed. Cancelling ctx is the request to stop.
func run(ctx context.Context, args, env []string, stdout, stderr io.Writer) int {
	command := ""
	if len(args) > 0 && args[0] != "" && args[0][0] != '-' {
		command, args = args[0], args[1:]
	}
	switch command {
	case "", "check":
	case "version":
		args = append([]string{"--version"}, args...)
	case "help":
		args = append([]string{"--help"}, args...)
	default:
		return usage(stderr, fmt.Errorf("%q is not a valid flag and not a command; the commands are check, version and help", command))
	}

	c, err := loadConfig(args, env)
	var bad *usageError
	switch {
	case errors.Is(err, errHelp):
		return report(stderr, printHelp(stdout))
	case errors.As(err, &bad):
		return usage(stderr, err)
	case err != nil && command == "check":
		return report(stderr, err)
	case err != nil:
		fallbackLogger(stderr).Fatal("failed to verify flags", zap.Error(err))
		return exitFailed
	}
	switch {
	case c.PrintVersion:
		return report(stderr, printVersion(stdout, c.EtcdVersion))
	case command == "check":
		return runCheck(ctx, c, stdout, stderr)
	}

	lg, closeLog, err := newLogger(c, stdout, stderr)
	if err != nil {
		fallbackLogger(stderr).Fatal("failed to open the log", zap.Error(err))
		return exitFailed
	}
	code := exitOK
	if err := serve(ctx, c, lg, env); err != nil {
		lg.Fatal("failed to serve", zap.Error(err), zap.String("storage", c.StoragePath))
		code = exitFailed
	}
	if err := closeLog(); err != nil {
		fmt.Fprintln(stderr, "quire: closing the log:", err)
		code = exitFailed
	}
	return code
}

func report(stderr io.Writer, err error) int {
	if err == nil {
		return exitOK
	}
	fmt.Fprintln(stderr, "quire:", err)
	return exitFailed
}

func usage(stderr io.Writer, err error) int {
	fmt.Fprintf(stderr, "quire: %v\nRun 'quire --help' for the list of flags.\n", err)
	return exitUsage
}

// fallbackLogger is for what happens before the flags about logging are known: JSON on stderr, as etcd does.
func fallbackLogger(stderr io.Writer) *zap.Logger {
	c := &config{LogLevel: "info", LogFormat: "json", LogOutputs: []string{outputStderr}}
	lg, _, err := newLogger(c, io.Discard, stderr)
	if err != nil {
		panic(fmt.Sprintf("the default log cannot be opened: %v", err)) // it opens no file
	}
	return lg
}

func printHelp(w io.Writer) error {
	_, err := fmt.Fprintf(w, `Usage:

  quire [flags]            Serve the etcd v3 API.
  quire check [flags]      Read the whole database (--data-dir or --storage) and report what is unsound.
  quire version            Print the version.

Each flag has its variable, ETCD_DATA_DIR for --data-dir. With --config-file, the file alone counts.

Flags:
%s`, newFlagSet(&config{}).FlagUsagesWrapped(100))
	return err
}
