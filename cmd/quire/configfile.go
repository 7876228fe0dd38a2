package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"
)

// sections of etcd's configuration file (server/v3/embed: configJSON, securityConfig) and the prefix that turns a
// name inside into the flag of the same meaning; renamed holds those for which that is not enough.
// What stands in a group is read as if it stood outside.
var sections = map[string]struct {
	prefix  string
	renamed map[string]string
	groups  []string
}{
	"client-transport-security": {renamed: map[string]string{
		"allowed-hostname": "client-cert-allowed-hostname", "crl-file": "client-crl-file",
	}},
	"peer-transport-security": {prefix: "peer-", renamed: map[string]string{
		"allowed-cn": "peer-cert-allowed-cn", "allowed-hostname": "peer-cert-allowed-hostname",
	}},
	"socket-options": {prefix: "socket-"},
	"discovery-config": {prefix: "discovery-", groups: []string{"client", "secure", "auth"}, renamed: map[string]string{
		"username": "discovery-user",
	}},
}

// readConfigFile sets flags from a YAML (or JSON) file in the shape of etcd.conf.yml.sample. Everything goes
// through the flags, so that a value is checked once and in one way. Unknown keys leave a warning. Durations may
// be whole nanoseconds, as etcd wants them, or text such as 10m.
func readConfigFile(path string, c *config, fs *pflag.FlagSet) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("--config-file: %w", err)
	}
	var top map[string]any
	// A number above 2^53 must not pass through a float, hence the strict integer reading of yaml → JSON → any.
	if err := yaml.Unmarshal(data, &top, useNumber); err != nil {
		return fmt.Errorf("--config-file %s: %w", path, err)
	}
	for _, key := range sortedKeys(top) {
		section, ok := sections[key]
		if !ok {
			if err := setFromFile(c, fs, path, key, key, top[key]); err != nil {
				return err
			}
			continue
		}
		if top[key] == nil {
			continue
		}
		inner, ok := top[key].(map[string]any)
		if !ok {
			return fmt.Errorf("--config-file %s: invalid %s: it must hold names and values", path, key)
		}
		if inner = ungroup(inner, section.groups); inner == nil {
			return fmt.Errorf("--config-file %s: invalid %s: each of %s must hold names and values", path, key, strings.Join(section.groups, ", "))
		}
		for _, name := range sortedKeys(inner) {
			flag, ok := section.renamed[name]
			if !ok {
				flag = section.prefix + name
			}
			if err := setFromFile(c, fs, path, key+"."+name, flag, inner[name]); err != nil {
				return err
			}
		}
	}
	return nil
}

// ungroup returns the names and values with those in groups taken out of them; nil where a group holds something else.
func ungroup(values map[string]any, groups []string) map[string]any {
	flat := make(map[string]any, len(values))
	for name, value := range values {
		if !slices.Contains(groups, name) {
			flat[name] = value
			continue
		}
		if value == nil {
			continue
		}
		group, ok := value.(map[string]any)
		if ok {
			group = ungroup(group, groups)
		}
		if group == nil {
			return nil
		}
		maps.Copy(flat, group)
	}
	return flat
}

func setFromFile(c *config, fs *pflag.FlagSet, path, key, flag string, value any) error {
	if key == "client-transport-security.allowed-cn" { // etcd has no flag for it
		if text, err := scalar(value); err != nil || text != "" {
			return fmt.Errorf("--config-file %s: %s is not supported, and ignoring it would let in clients that it keeps out; use allowed-hostname or a CA of their own", path, key)
		}
	}
	f := fs.Lookup(flag)
	// etcd's file has no discovery-fallback; its sample has, with a value that the flag refuses.
	if f == nil || flag == "config-file" || flag == "version" || flag == "discovery-fallback" {
		c.note("unknown key in the configuration file", "key", key, "config-file", path)
		return nil
	}
	text, err := scalar(value)
	if err != nil {
		return fmt.Errorf("--config-file %s: %s: %w", path, key, err)
	}
	if text == "" {
		return nil // etcd.conf.yml.sample leaves many values empty: the default
	}
	if f.Value.Type() == "duration" {
		if ns, err := strconv.ParseInt(text, 10, 64); err == nil {
			text = time.Duration(ns).String()
		}
	}
	if err := fs.Set(flag, text); err != nil {
		return fmt.Errorf("--config-file %s: %s: %w", path, key, err)
	}
	return nil
}

// scalar renders a YAML value as the text that the flag would be given.
func scalar(value any) (string, error) {
	switch v := value.(type) {
	case nil:
		return "", nil
	case string:
		return v, nil
	case bool:
		return strconv.FormatBool(v), nil
	case []any:
		words := make([]string, len(v))
		for i, e := range v {
			w, err := scalar(e)
			if err != nil {
				return "", err
			}
			words[i] = w
		}
		return strings.Join(words, ","), nil
	case map[string]any:
		return "", fmt.Errorf("names and values where one value is expected")
	default: // json.Number
		return fmt.Sprint(v), nil
	}
}

func sortedKeys(m map[string]any) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// useNumber keeps integers exact: without it, JSON numbers become float64.
func useNumber(d *json.Decoder) *json.Decoder {
	d.UseNumber()
	return d
}
