package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"gopkg.in/natefinch/lumberjack.v2"
)

// logRotation is --enable-log-rotation and --log-rotation-config-json: the log file is renamed when it has grown to
// maxsize megabytes, and renamed ones are removed after maxage days, or when there are more than maxbackups (0: never).
type logRotation struct {
	Enabled bool
	JSON    string
}

const defaultLogRotation = `{"maxsize": 100, "maxage": 0, "maxbackups": 0, "localtime": false, "compress": false}`

// check has etcd's texts.
func (r *logRotation) check(outputs []string) error {
	if !r.Enabled {
		return nil
	}
	files := slices.DeleteFunc(slices.Clone(outputs), func(out string) bool {
		return out == outputDefault || out == outputStderr || out == outputStdout || out == outputJournal
	})
	if len(files) > 1 || (len(outputs) == 1 && len(files) == 0) {
		return errors.New("--log-outputs requires a single file path when --log-rotate-config-json is defined")
	}
	_, err := r.file("")
	return err
}

// file opens nothing: that happens with the first entry.
func (r *logRotation) file(name string) (io.WriteCloser, error) {
	l := &lumberjack.Logger{}
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	switch err := json.Unmarshal([]byte(r.JSON), l); {
	case errors.As(err, &syntax):
		return nil, fmt.Errorf("improperly formatted log rotation config: %w; --log-rotation-config-json must look like %s", err, defaultLogRotation)
	case errors.As(err, &kind):
		return nil, fmt.Errorf("invalid log rotation config: %w; --log-rotation-config-json must look like %s", err, defaultLogRotation)
	case err != nil:
		return nil, fmt.Errorf("fail to unmarshal log rotation config: %w", err)
	}
	l.Filename = name
	return l, nil
}
