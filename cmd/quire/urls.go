package main

import (
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"
)

// urlList is a flag of comma-separated URLs, kept sorted and without repeats as etcd keeps them
// (client/pkg/v3/types: NewURLs; pkg/v3/flags: UniqueURLs). The order matters: the member id hashes it.
type urlList []url.URL

// Set replaces the list; as in etcd an empty text changes nothing. Texts of errors are etcd's.
func (l *urlList) Set(s string) error {
	if s == "" {
		return nil
	}
	var all urlList
	for _, in := range strings.Split(s, ",") {
		in = strings.TrimSpace(in)
		u, err := url.Parse(in)
		if err != nil {
			return err
		}
		switch u.Scheme {
		case "http", "https":
			if _, _, err := net.SplitHostPort(u.Host); err != nil {
				return fmt.Errorf(`URL address does not have the form "host:port": %s`, in)
			}
			if u.Path != "" {
				return fmt.Errorf("URL must not contain a path: %s", in)
			}
		case "unix", "unixs":
			if u.Host+u.Path == "" {
				return fmt.Errorf("URL names no socket file: %s", in)
			}
		default:
			return fmt.Errorf("URL scheme must be http, https, unix, or unixs: %s", in)
		}
		all = append(all, *u)
	}
	slices.SortFunc(all, func(a, b url.URL) int { return strings.Compare(a.String(), b.String()) })
	*l = slices.CompactFunc(all, func(a, b url.URL) bool { return a.String() == b.String() })
	return nil
}

func (l urlList) String() string { return strings.Join(l.Strings(), ",") }
func (l *urlList) Type() string  { return "urls" }
func (l urlList) Strings() []string {
	out := make([]string, len(l))
	for i := range l {
		out[i] = l[i].String()
	}
	return out
}

// checkBindURLs: a name other than localhost could resolve to something else on every start, so only
// addresses can be listened on (server/v3/embed: checkBindURLs).
func checkBindURLs(urls []url.URL) error {
	for _, u := range urls {
		if u.Scheme == "unix" || u.Scheme == "unixs" {
			continue
		}
		host, _, err := net.SplitHostPort(u.Host)
		if err != nil {
			return err
		}
		if host != "localhost" && net.ParseIP(host) == nil {
			return fmt.Errorf("expected IP in URL for binding (%s)", u.String())
		}
	}
	return nil
}

// checkHostURLs: what is advertised must name a host (server/v3/embed: checkHostURLs).
func checkHostURLs(urls []url.URL) error {
	for _, u := range urls {
		if u.Scheme == "unix" || u.Scheme == "unixs" {
			continue
		}
		host, _, err := net.SplitHostPort(u.Host)
		if err != nil {
			return err
		}
		if host == "" {
			return fmt.Errorf("unexpected empty host (%s)", u.String())
		}
	}
	return nil
}

// secure tells whether TLS is spoken on u.
func secure(u url.URL) bool { return u.Scheme == "https" || u.Scheme == "unixs" }

// socket returns the network and address to listen on: unix://localhost:20000 is a socket file of that relative
// name, unix:///run/quire.sock an absolute one, as in etcd.
func socket(u url.URL) (network, address string) {
	if u.Scheme == "unix" || u.Scheme == "unixs" {
		return "unix", u.Host + u.Path
	}
	return "tcp", u.Host
}
