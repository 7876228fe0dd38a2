package main

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// storages that the server under test may have; the first is what etcd's own flags ask quire for: a member of a
// cluster, be it of one.
var storages = []string{"sqlraft", "sqlite", "postgres"}

// serverConfig is what this program is told when etcd's tests run it as "etcd": they pass no environment of ours on.
// It lies beside that name.
type serverConfig struct {
	Binary  string // of the server under test
	Storage string
	DSN     string // of the Postgres database, where Storage is postgres
	Calls   string // file to which each command line is added as a JSON line
}

const serverConfigFile = "server.json"

// call is one start of a server.
type call struct {
	At   time.Time
	Args []string
}

// beServer becomes the server under test, with the same arguments and the flags of its storage.
func beServer(argv []string) error {
	data, err := os.ReadFile(filepath.Join(filepath.Dir(argv[0]), serverConfigFile))
	if err != nil {
		return err
	}
	var c serverConfig
	if err := json.Unmarshal(data, &c); err != nil {
		return err
	}
	if err := logCall(c.Calls, argv[1:]); err != nil {
		return err
	}
	flags, err := storageFlags(c, argv[1:])
	if err != nil {
		return err
	}
	args := append([]string{argv[0]}, flags...)
	return syscall.Exec(c.Binary, append(args, argv[1:]...), os.Environ())
}

// logCall adds a line with one write, so that servers that start at once do not mix theirs.
func logCall(path string, args []string) error {
	line, err := json.Marshal(call{At: time.Now(), Args: args})
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(line, '\n'))
	return errors.Join(err, f.Close())
}

// storageFlags are the flags that put the data of the server with these arguments where the tests want it. A
// configuration file would make the server ignore them: it decides alone.
func storageFlags(c serverConfig, args []string) ([]string, error) {
	dir, given := flagValue(args, "data-dir")
	if !given {
		name, given := flagValue(args, "name")
		if !given {
			name = "default"
		}
		dir = name + ".etcd"
	}
	if _, file := flagValue(args, "config-file"); file {
		return nil, nil
	}
	switch c.Storage {
	case "sqlite":
		path, err := filepath.Abs(filepath.Join(dir, "quire.db"))
		return []string{"--storage=sqlite://" + path}, err
	case "postgres":
		schema, err := schemaOf(dir)
		return []string{"--storage=" + c.DSN, "--postgres-schema=" + schema}, err
	}
	return nil, nil
}

// schemaOf is the schema that belongs to a data directory: a new one for a new directory, kept in a file there so that
// a server that starts again finds its data, and one whose directory was removed finds none.
func schemaOf(dir string) (string, error) {
	file := filepath.Join(dir, "postgres-schema")
	name, err := os.ReadFile(file)
	if err == nil {
		return string(name), nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	schema := "quire_" + strings.ToLower(rand.Text())
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	return schema, os.WriteFile(file, []byte(schema), 0o600)
}

// flagValue finds --name=value or --name value, the last one.
func flagValue(args []string, name string) (value string, given bool) {
	for i, a := range args {
		flag, v, inline := strings.Cut(strings.TrimLeft(a, "-"), "=")
		if !strings.HasPrefix(a, "-") || flag != name {
			continue
		}
		if !inline && i+1 < len(args) {
			v = args[i+1]
		}
		value, given = v, true
	}
	return value, given
}
